"""The one exception for what a user can mend: a bad file, a bad flag, a folder in the way."""

from __future__ import annotations

from pydantic import ValidationError


class UserError(Exception):
    """Says in one line what was found and what to change. Scripts print it and exit with code 2."""


def explain(error: ValidationError, flags: dict[str, str]) -> UserError:
    """A configuration error in terms of the flag that was typed; ``flags`` maps field paths to flags."""
    first = error.errors()[0]
    field = ".".join(str(part) for part in first["loc"])
    # A rule over several fields is reported at their section, so its message has to name them itself.
    name = flags.get(field, field or "configuration")
    message = first["msg"].removeprefix("Value error, ")
    found = "" if isinstance(first["input"], dict) else f", found {first['input']!r}"
    return UserError(f"{name}: {message[:1].lower()}{message[1:]}{found}")
