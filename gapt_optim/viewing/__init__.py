"""Look at a model's layers, at a run while it trains, and at a page of it afterwards.

Nothing here is imported before it is used: each name brings what it needs (matplotlib for pictures, plotly for
pages, rich for tables).
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .history import RunHistory, compression_spans, read_metrics, read_run, sign_changes
    from .pictures import draw_alignment, draw_entropy_map, draw_training

_HOMES = {
    "RunHistory": "history",
    "compression_spans": "history",
    "draw_alignment": "pictures",
    "draw_entropy_map": "pictures",
    "draw_training": "pictures",
    "read_metrics": "history",
    "read_run": "history",
    "sign_changes": "history",
}

__all__ = [
    "RunHistory",
    "compression_spans",
    "draw_alignment",
    "draw_entropy_map",
    "draw_training",
    "read_metrics",
    "read_run",
    "sign_changes",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f".{_HOMES[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})
