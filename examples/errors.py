"""What a user can mend (a bad file, a bad flag, a folder in the way) in one line, and the scripts' exit codes."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

from pydantic import ValidationError


class UserError(Exception):
    """Says in one line what was found and what to change. Scripts print it and exit with code 2."""


class StoppedError(Exception):
    """The user stopped training. What was done is stored; the message says how to go on."""


def complain(message: str) -> None:
    print(message, file=sys.stderr)


def exit_code(run: Callable[[], Any], say: Callable[[str], None] = complain) -> int:
    """Runs a script: 0 when it finished, 2 for what the user can mend, 130 after Ctrl-C. ``say`` prints why."""
    try:
        run()
    except UserError as error:
        say(f"error: {error}")
        return 2
    except ModuleNotFoundError as error:
        say(f'error: {error}; install what the examples use: pip install "gapt_optim[examples]"')
        return 2
    except StoppedError as stopped:
        say(str(stopped))
        return 130
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return 130
    return 0


def first_line(error: Exception) -> str:
    """What an exception of another library says, short enough for one line of ours."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def explain(error: ValidationError, flags: dict[str, str]) -> UserError:
    """A configuration error in terms of the flag that was typed; ``flags`` maps field paths to flags."""
    first = error.errors()[0]
    field = ".".join(str(part) for part in first["loc"])
    # A rule over several fields is reported at their section, so its message has to name them itself.
    name = flags.get(field, field or "configuration")
    message = first["msg"].removeprefix("Value error, ")
    found = "" if isinstance(first["input"], dict) else f", found {first['input']!r}"
    return UserError(f"{name}: {message[:1].lower()}{message[1:]}{found}")
