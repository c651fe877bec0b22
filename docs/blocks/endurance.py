"""What `python -m benchmarks.cost.endurance --json FILE` has measured, as a table."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from .cost import RESULTS

ROOT = Path(__file__).parents[2]

ROWS = {
    "time of a step, bare AdamW = 1": ("ratio", "{:.2f}"),
    "CPU time of a step (ms)": ("ms", "{:.2f}"),
    "resident memory (MB)": ("mb", "{:.1f}"),
    "live tensors": ("tensors", "{:.0f}"),
    "Python objects": ("objects", "{:,.0f}"),
    "open files": ("handles", "{:.0f}"),
}


def endurance() -> str:
    """Medians over the second and the last tenth of the run."""
    if str(ROOT) not in sys.path:  # a script has its own folder there
        sys.path.append(str(ROOT))
    from benchmarks.cost.endurance import tenths

    figures: dict[str, Any] = json.loads((RESULTS / "endurance.json").read_text(encoding="utf-8"))
    found, size = tenths(figures), figures["steps"] // 10
    lines = [f"| | steps {size + 1:,} to {2 * size:,} | steps {9 * size + 1:,} to {10 * size:,} | change |"]
    lines.append("|---|---:|---:|---:|")
    for label, (name, form) in ROWS.items():
        early, late = found[name]
        lines.append(f"| {label} | {form.format(early)} | {form.format(late)} | {late / early - 1:+.1%} |")
    return "\n".join(lines)
