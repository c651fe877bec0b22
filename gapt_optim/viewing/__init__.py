"""Runs on disk, and what is made of them."""

from .flags import UserError, fail, read_flags
from .run_folder import RunFolder, RunFolderError

__all__ = ["RunFolder", "RunFolderError", "UserError", "fail", "read_flags"]
