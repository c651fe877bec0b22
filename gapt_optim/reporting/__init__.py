"""A run: read back from its files, as a page, as a picture, in a terminal, and what is wrong with it.

Nothing here is imported before it is used: each name brings what it needs (pandas for a run, plotly for its page,
matplotlib for its picture).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from .._lazy import lazy_names

if TYPE_CHECKING:
    from .doctor import diagnose
    from .findings import FINDINGS, Diagnosis, Finding
    from .report import draw_runs, write_report
    from .run import Run, compression_spans, find_runs, read_run

_NAMES = {
    "doctor": ["diagnose"],
    "findings": ["Diagnosis", "FINDINGS", "Finding"],
    "report": ["draw_runs", "write_report"],
    "run": ["Run", "compression_spans", "find_runs", "read_run"],
}

__all__ = [
    "FINDINGS",
    "Diagnosis",
    "Finding",
    "Run",
    "compression_spans",
    "diagnose",
    "draw_runs",
    "find_runs",
    "read_run",
    "write_report",
]

__getattr__, __dir__ = lazy_names(globals(), _NAMES)
