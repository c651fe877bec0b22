"""Around a training run: its folder on disk, and what a script needs (flags, errors of one line, a stop between steps).

Nothing here is imported before it is used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from .._lazy import lazy_names

if TYPE_CHECKING:
    from .errors import CommandError, flag_error
    from .run_folder import RunFolder, RunFolderError
    from .scripts import (
        StoppedError,
        config_of,
        on_first_rank,
        open_run,
        pick_device,
        problem_within,
        read_flags,
        run_script,
        stopping,
    )

_HOMES = {
    "CommandError": "errors",
    "RunFolder": "run_folder",
    "RunFolderError": "run_folder",
    "StoppedError": "scripts",
    "config_of": "scripts",
    "flag_error": "errors",
    "on_first_rank": "scripts",
    "open_run": "scripts",
    "pick_device": "scripts",
    "problem_within": "scripts",
    "read_flags": "scripts",
    "run_script": "scripts",
    "stopping": "scripts",
}

__all__ = [
    "CommandError",
    "RunFolder",
    "RunFolderError",
    "StoppedError",
    "config_of",
    "flag_error",
    "on_first_rank",
    "open_run",
    "pick_device",
    "problem_within",
    "read_flags",
    "run_script",
    "stopping",
]

__getattr__, __dir__ = lazy_names(globals(), _HOMES)
