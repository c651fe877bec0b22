"""How activation alignment relates to parameter alignment, over a run that measured both.

    python -m benchmarks.evidence.alignment_spaces runs/alignment/metrics.jsonl

The run needs ``AlignmentConfig(parameter_every=10)`` or so, and a `JSONLines` observer. Prints, for memorization,
compression and both: steps measured, correlation of the two cosines, and the share of steps on which their signs agree.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import tyro
from scipy import stats

from .markdown import table


@dataclass
class Options:
    """How activation alignment relates to parameter alignment."""

    metrics: Annotated[Path, tyro.conf.Positional]
    """The `metrics.jsonl` of a run that measured both."""


def relation(rows: list[dict[str, object]]) -> str:
    """The table, from the records of a run; phases with fewer than three measured steps are left out."""
    found: list[tuple[str, float, float]] = []
    for row in rows:
        both = [(row.get(name) or {}).get("cosine") for name in ("alignment", "parameter_alignment")]  # type: ignore[attr-defined]
        if None not in both:
            found.append((str(row["phase"]), *both))
    lines = []
    for phase in ("memorization", "compression", "both"):
        pairs = np.array([pair for name, *pair in found if phase in (name, "both")])
        if len(pairs) < 3:
            continue
        correlation = stats.pearsonr(*pairs.T)
        low, high = correlation.confidence_interval()
        agree = float(np.mean((pairs[:, 0] > 0) == (pairs[:, 1] > 0)))
        lines.append(
            [
                phase,
                str(len(pairs)),
                f"{correlation.statistic:+.2f} [{low:+.2f}, {high:+.2f}]",
                f"{agree:.0%}",
                *(f"{mean:+.3f}" for mean in pairs.mean(0)),
            ]
        )
    header = ["phase", "steps", "correlation", "signs agree", "mean at the layers", "mean of the parameters"]
    return table(header, lines)


def main(argv: list[str] | None = None) -> int:
    """Print the table."""
    path = tyro.cli(Options, args=argv, prog="python -m benchmarks.evidence.alignment_spaces").metrics
    try:
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, ValueError) as error:
        print(f"error: {path}: {error}", file=sys.stderr)
        return 2
    print(relation(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
