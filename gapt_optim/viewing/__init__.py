"""Look at a model's layers, at a run while it trains, and at a page of it afterwards.

Nothing here is imported before it is used: each name brings what it needs (matplotlib for pictures, plotly for
pages, rich for tables).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from .._lazy import lazy_names

if TYPE_CHECKING:
    from .doctor import diagnose
    from .findings import FINDINGS, Diagnosis, Finding
    from .history import RunHistory, compression_spans, read_metrics, read_run, sign_changes
    from .layer_profile import LayerProfile, Profile, profile
    from .pictures import draw_alignment, draw_entropy_map, draw_training
    from .profile_view import draw_profile, write_profile
    from .report import write_report

_HOMES = {
    "Diagnosis": "findings",
    "FINDINGS": "findings",
    "Finding": "findings",
    "LayerProfile": "layer_profile",
    "Profile": "layer_profile",
    "RunHistory": "history",
    "compression_spans": "history",
    "diagnose": "doctor",
    "draw_alignment": "pictures",
    "draw_entropy_map": "pictures",
    "draw_profile": "profile_view",
    "draw_training": "pictures",
    "profile": "layer_profile",
    "read_metrics": "history",
    "read_run": "history",
    "sign_changes": "history",
    "write_profile": "profile_view",
    "write_report": "report",
}

__all__ = [
    "FINDINGS",
    "Diagnosis",
    "Finding",
    "LayerProfile",
    "Profile",
    "RunHistory",
    "compression_spans",
    "diagnose",
    "draw_alignment",
    "draw_entropy_map",
    "draw_profile",
    "draw_training",
    "profile",
    "read_metrics",
    "read_run",
    "sign_changes",
    "write_profile",
    "write_report",
]

__getattr__, __dir__ = lazy_names(globals(), _HOMES)
