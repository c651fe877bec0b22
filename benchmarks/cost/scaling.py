"""How the cost of compression grows with layers, width and tokens: fitted exponents and a picture.

    python -m benchmarks.cost.scaling --out docs/generated

CPU seconds of a bare step, and of what compression adds to it, over one size at a time. An exponent is the slope of
log seconds over log size. What is added is a difference of two larger numbers, so the median over rounds is taken.
"""

from __future__ import annotations

import statistics
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import torch
import tyro
from scipy import stats

from .figures import write_figures
from .table import time_rounds
from .workloads import BARE, Size, bare, wrapped

BASE = Size(layers=4, width=256, tokens=256, vocabulary=512)
SIZES: dict[str, tuple[int, ...]] = {
    "layers": (2, 4, 8, 16),
    "width": (128, 256, 512, 768),
    "tokens": (128, 256, 512, 1024),
}
OURS = "compression"


@dataclass
class Options:
    """Cost over layers, width and tokens."""

    rounds: int = 30
    """Rounds per size."""
    out: Path | None = None
    """Folder for cost-scaling.png and cost-scaling.json."""


def measure(name: str, sizes: tuple[int, ...], rounds: int, base: Size = BASE) -> list[dict[str, float]]:
    """Seconds of a bare step and of what compression adds, at each size."""
    rows = []
    for value in sizes:
        size = replace(base, **{name: value})
        seconds = time_rounds({BARE: bare(size), OURS: wrapped("compression")(size)}, rounds, 0)
        added = [a - b for a, b in zip(seconds[OURS], seconds[BARE], strict=True)]
        rows.append({name: value, "bare": statistics.median(seconds[BARE]), "added": statistics.median(added)})
    return rows


def exponent(x: list[float], y: list[float]) -> tuple[float, float]:
    """Slope of log y over log x with its standard error, of the points where y is above 0; nan for fewer than 3."""
    pairs = [(a, b) for a, b in zip(x, y, strict=True) if b > 0]
    if len(pairs) < 3:
        return float("nan"), float("nan")
    fit = stats.linregress(*np.log(np.asarray(pairs)).T)
    return float(fit.slope), float(fit.stderr)


def main(argv: list[str] | None = None) -> int:
    """Print the exponents."""
    options = tyro.cli(Options, args=argv, prog="python -m benchmarks.cost.scaling")
    torch.set_num_threads(1)
    figures: dict[str, Any] = {}
    print("| over | exponent of the bare step | exponent of what compression adds | added, smallest to largest |")
    print("|---|---:|---:|---:|")
    for name, sizes in SIZES.items():
        rows = measure(name, sizes, options.rounds)
        x = [row[name] for row in rows]
        fits = {part: exponent(x, [row[part] for row in rows]) for part in ("bare", "added")}
        figures[name] = {"rows": rows, "exponents": fits}
        shares = [row["added"] / row["bare"] for row in rows]
        cells = " | ".join(f"{slope:.2f} ± {error:.2f}" for slope, error in fits.values())
        print(f"| {name} | {cells} | {shares[0]:+.1%} to {shares[-1]:+.1%} |", flush=True)
    if options.out is not None:
        write_figures(figures, options.out / "cost-scaling.json")
        draw(figures, options.out / "cost-scaling.png")
    return 0


def draw(figures: dict[str, Any], path: Path) -> None:
    """A panel per size: the bare step, and what compression adds."""
    made, axes = plt.subplots(1, len(figures), figsize=(4 * len(figures), 3.4), layout="constrained", sharey=True)
    for axis, (name, found) in zip(axes, figures.items(), strict=True):
        x = [row[name] for row in found["rows"]]
        for part, color in (("bare", "#6b6b6b"), ("added", "#3b6fc4")):
            slope = found["exponents"][part][0]
            y = [1000 * row[part] if row[part] > 0 else np.nan for row in found["rows"]]
            label = f"{'bare step' if part == 'bare' else 'added by compression'}, exponent {slope:.2f}"
            axis.plot(x, y, color=color, marker="o", label=label)
        axis.set(xscale="log", yscale="log", xlabel=name)
        axis.set_xticks(x, [f"{v:g}" for v in x])
        axis.minorticks_off()
        axis.spines[["top", "right"]].set_visible(False)
        axis.legend(frameon=False, fontsize=8)
    axes[0].set_ylabel("CPU time of a step (ms)")
    made.savefig(path, dpi=130, metadata={"Software": None})
    plt.close(made)


if __name__ == "__main__":
    sys.exit(main())
