"""What a command says instead of a traceback."""

from __future__ import annotations


class CommandError(Exception):
    """One clear line for the user; the command ends with exit code 2."""
