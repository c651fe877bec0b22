"""What a command says instead of a traceback."""

from __future__ import annotations

import re


class CommandError(Exception):
    """One clear line for the user; the command ends with exit code 2."""


def flag_error(said: str) -> str:
    """The message in what `tyro` prints about a wrong flag: a box of many lines, in ASCII where a terminal has no more.

    >>> flag_error("+-- Parsing error ---+\\n| Missing value for --seed |\\n+----+")
    'Missing value for --seed'
    """
    line = " ".join(re.sub(r"[\u2500-\u257f|]|\+?-{2,}(?![\w-])\+?|\+(?=-- )", " ", said).split())
    line = re.split(r" (?:Got errors|Arguments? (?:helptext|similar)|Similar|For (?:full|more|further))", line)[0]
    title = r"^(?:[A-Z][a-z]+ (?:error|choice|arguments?|options?)|Missing required \w+|Error)\s*:?\s*(?=\S)"
    return re.sub(title, "", line)
