"""Pictures of experiments, by matplotlib."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from .stats import Interval, mean_interval

COLORS = {
    "plain": "#6b6b6b",
    "penalty": "#d1741f",
    "published": "#2f9e77",
    "gapt": "#3b6fc4",
}
NAMES = {
    "plain": "plain",
    "penalty": "constant penalty",
    "published": "published gate",
    "gapt": "gate",
}


def figure(columns: int, rows: int = 1, *, width: float = 4.6, height: float = 3.5) -> tuple[Figure, list[Axes]]:
    """Panels without boxes around them."""
    made, axes = plt.subplots(
        rows, columns, figsize=(width * columns, height * rows), layout="constrained", squeeze=False
    )
    flat = [axis for row in axes for axis in row]
    for axis in flat:
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(alpha=0.25)
    return made, flat


def save(made: Figure, path: Path) -> Path:
    """Write and close it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    made.savefig(path, dpi=130, metadata={"Software": None})
    plt.close(made)
    return path


def band(axis: Axes, x: Sequence[float], series: Sequence[Sequence[float]], color: str, label: str) -> None:
    """Mean over seeds with its 95 % interval."""
    intervals = [mean_interval(column) for column in zip(*series, strict=True)]
    axis.plot(x, [i.mean for i in intervals], color=color, label=label)
    if len(series) > 1:
        axis.fill_between(x, [i.low for i in intervals], [i.high for i in intervals], color=color, alpha=0.15, lw=0)


def curves_of_methods(
    points: Mapping[str, Sequence[tuple[Interval, Interval]]],
    path: Path,
    *,
    labels: tuple[str, str],
    title: str,
    marked: Mapping[str, tuple[float, float]] | None = None,
) -> Path:
    """A line per method through its settings (x, y), with the intervals of both, and single marked points."""
    made, (axis,) = figure(1, width=6.2, height=4.4)
    for i, (method, found) in enumerate(points.items()):
        rows = sorted(found, key=lambda row: row[0].mean)
        errors = [
            [[max(0.0, z.mean - z.low) for z in of], [max(0.0, z.high - z.mean) for z in of]]
            for of in zip(*rows, strict=True)
        ]
        axis.errorbar(
            [x.mean for x, _ in rows], [y.mean for _, y in rows], xerr=errors[0], yerr=errors[1],
            color=COLORS.get(method, f"C{i}"), marker="o", ms=4, lw=1.4, elinewidth=0.8, alpha=0.85,
            label=NAMES.get(method, method),
        )  # fmt: skip
    for name, (a, b) in (marked or {}).items():
        axis.plot([a], [b], marker="*", ms=13, ls="", color=COLORS.get(name, "black"), label=NAMES.get(name, name))
    axis.set(xlabel=labels[0], ylabel=labels[1], title=title)
    axis.legend(frameon=False, fontsize=8)
    return save(made, path)


def percent(interval: Interval, *, of_whole: bool = False) -> Interval:
    """A relative change in per cent; ``of_whole``: of what it is a change from, so that no change is 100."""
    return Interval(*(100 * (value + of_whole) for value in (interval.mean, interval.low, interval.high)))
