"""A command's flags from its typed configuration, with errors of one line."""

from __future__ import annotations

import contextlib
import io
import os
import re
import sys
from collections.abc import Sequence
from typing import Any, NoReturn, TypeVar

T = TypeVar("T")


class UserError(Exception):
    """Says in one line what was found and what to change. Commands print it and end with code 2."""


def read_flags(kind: type[T], argv: Sequence[str], default: T | None = None) -> tuple[T, list[str]]:
    """Reads ``kind`` from ``argv`` by `tyro`; ``default`` holds what is not given. Returns it and the unknown flags.

    `tyro` explains an error in a box of many lines, of which one is kept.

    Raises:
        SystemExit: with 2 after an error, with 0 after ``--help``.
    """
    import tyro

    said = io.StringIO()
    options: dict[str, Any] = {} if default is None else {"default": default}
    try:
        with contextlib.redirect_stderr(said):
            read: tuple[T, list[str]] = tyro.cli(
                kind, args=argv, config=(tyro.conf.FlagCreatePairsOff,), return_unknown_args=True, **options
            )
            return read
    except SystemExit as end:
        if not end.code:
            raise
    line = " ".join(re.sub("[─│╭╮╰╯]", " ", said.getvalue()).split())
    line = re.split(r" Got errors| Argument helptext| For further| For full| \[type=", line)[0]
    line = re.sub(r"^Value error (?=Error)", "", line)
    fail(re.sub(r"^Error parsing ([\w.-]+): 1 validation error for \w+ ([\w.]*) ?", r"\1 \2: ", line))


def fail(error: object) -> NoReturn:
    """Ends the command with code 2 and one line on stderr, on the first of several ranks."""
    if os.environ.get("RANK", "0") == "0":
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr, flush=True)
    raise SystemExit(2)
