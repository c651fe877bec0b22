"""Runs on disk, and what is made of them."""

from .run_folder import RunFolder, RunFolderError, UserError
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
from .summary import conclude, figures, summary

__all__ = [
    "RunFolder",
    "RunFolderError",
    "StoppedError",
    "UserError",
    "conclude",
    "config_of",
    "figures",
    "on_first_rank",
    "open_run",
    "pick_device",
    "problem_within",
    "read_flags",
    "run_script",
    "stopping",
    "summary",
]
