"""The figures that `python -m benchmarks.cost.table --json FILE` has measured, as a table."""

from __future__ import annotations

import json
from pathlib import Path

RESULTS = Path(__file__).parents[2] / "benchmarks" / "cost" / "results"


def cost(name: str) -> str:
    """Ratios to the first row of the results called ``name``."""
    figures: dict[str, dict[str, float]] = json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))
    lines = ["| | CPU time | 95 % interval | memory |", "|---|---:|---:|---:|"]
    for i, (row, f) in enumerate(figures.items()):
        interval = f"{f['low']:.2f} to {f['high']:.2f}" if i and "low" in f else ""
        memory = f"{f['memory']:.3f}" if "memory" in f else ""
        lines.append(f"| {row} | {f['cpu']:.2f} | {interval} | {memory} |")
    return "\n".join(lines)
