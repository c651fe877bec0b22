"""Warnings that point at the line of the user's own that called us."""

from __future__ import annotations

import sys
import warnings


def tell(message: str) -> None:
    """Warn at the first line outside of torch and of this package.

    A fixed ``stacklevel`` would not find it: schedulers, a GradScaler and DistributedDataParallel put frames of theirs
    between.
    """
    frame, level = sys._getframe(), 1
    while frame.f_back is not None and _is_within(frame.f_globals.get("__name__")):
        frame, level = frame.f_back, level + 1
    warnings.warn(message, UserWarning, stacklevel=level)


def _is_within(module: str | None) -> bool:
    """Code that torch.fx generates has no module."""
    return not module or module.split(".")[0] in ("torch", "gapt_optim")
