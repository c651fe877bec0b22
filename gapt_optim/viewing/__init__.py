"""Look at a model's layers, at a run while it trains, and at a page of it afterwards.

Nothing here is imported before it is used: each name brings what it needs (matplotlib for pictures, plotly for
pages, rich for tables).
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .doctor import diagnose
    from .errors import CommandError
    from .findings import FINDINGS, Diagnosis, Finding
    from .history import RunHistory, compression_spans, read_metrics, read_run, sign_changes
    from .layer_profile import LayerProfile, Profile, profile
    from .pictures import draw_alignment, draw_entropy_map, draw_training
    from .profile_view import draw_profile, write_profile
    from .report import write_report
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
    from .summary import conclude, figures, summary

_HOMES = {
    "CommandError": "errors",
    "Diagnosis": "findings",
    "FINDINGS": "findings",
    "Finding": "findings",
    "LayerProfile": "layer_profile",
    "Profile": "layer_profile",
    "RunFolder": "run_folder",
    "RunFolderError": "run_folder",
    "RunHistory": "history",
    "StoppedError": "scripts",
    "compression_spans": "history",
    "conclude": "summary",
    "config_of": "scripts",
    "diagnose": "doctor",
    "draw_alignment": "pictures",
    "draw_entropy_map": "pictures",
    "draw_profile": "profile_view",
    "draw_training": "pictures",
    "figures": "summary",
    "on_first_rank": "scripts",
    "open_run": "scripts",
    "pick_device": "scripts",
    "problem_within": "scripts",
    "profile": "layer_profile",
    "read_flags": "scripts",
    "read_metrics": "history",
    "read_run": "history",
    "run_script": "scripts",
    "sign_changes": "history",
    "stopping": "scripts",
    "summary": "summary",
    "write_profile": "profile_view",
    "write_report": "report",
}

__all__ = [
    "FINDINGS",
    "CommandError",
    "Diagnosis",
    "Finding",
    "LayerProfile",
    "Profile",
    "RunFolder",
    "RunFolderError",
    "RunHistory",
    "StoppedError",
    "compression_spans",
    "conclude",
    "config_of",
    "diagnose",
    "draw_alignment",
    "draw_entropy_map",
    "draw_profile",
    "draw_training",
    "figures",
    "on_first_rank",
    "open_run",
    "pick_device",
    "problem_within",
    "profile",
    "read_flags",
    "read_metrics",
    "read_run",
    "run_script",
    "sign_changes",
    "stopping",
    "summary",
    "write_profile",
    "write_report",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f".{_HOMES[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})
