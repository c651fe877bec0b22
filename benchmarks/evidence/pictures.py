"""Pictures of experiments, by matplotlib."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from .harness import Record
from .markdown import group, kernel_name, values
from .stats import Interval, mean_interval

COLORS = {
    "plain": "#6b6b6b",
    "penalty": "#d1741f",
    "published": "#2f9e77",
    "published often": "#1b6b50",
    "gapt": "#3b6fc4",
    "gapt, short phases": "#8fb3e0",
}
NAMES = {
    "plain": "plain",
    "penalty": "constant penalty",
    "published": "published gate",
    "published often": "published gate, per micro-batch",
    "gapt": "gate",
    "gapt, short phases": "gate, short phases",
}
_KERNEL_COLORS = {"linear": "#b5483a", "linear, centred": "#dca03c", "cosine": "#6a51a3", "cosine, centred": "#3b6fc4"}


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


def scatter_by_kernel(records: Iterable[Record], path: Path) -> Path:
    """Loss over centred cosine entropy at the end of training: a colour per kernel, filled for gates."""
    by_task: dict[str, list[Record]] = {}
    for record in records:
        by_task.setdefault(record.task, []).append(record)
    made, axes = figure(len(by_task))
    for axis, (task, found) in zip(axes, by_task.items(), strict=True):
        for (method, kernel, center), rows in group(found, "method", "kernel", "center").items():
            name = kernel_name({"kernel": kernel, "center": center})
            plain = method == "plain"
            axis.scatter(
                values(rows, "centred_cosine"),
                values(rows, "loss"),
                marker="*" if plain else "o",
                s=110 if plain else 36,
                facecolors=COLORS["plain"] if plain else _KERNEL_COLORS[name] if method == "gapt" else "none",
                edgecolors=COLORS["plain"] if plain else _KERNEL_COLORS[name],
                label="plain" if plain else f"{'gate' if method == 'gapt' else 'penalty'} on {name}",
            )
        axis.set(title=task, xlabel="centred cosine entropy (nats)", ylabel="held-out loss (nats)")
    entries = {label: mark for axis in axes for mark, label in zip(*axis.get_legend_handles_labels(), strict=True)}
    made.legend(entries.values(), entries.keys(), loc="outside right upper", fontsize=8, frameon=False)
    return save(made, path)


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


def path_of_training(
    axis: Axes, x: Sequence[Sequence[float]], y: Sequence[Sequence[float]], label: str, **style: Any
) -> None:
    """One quantity over another along training: the mean over seeds, and a dot where each seed ends."""
    means = [[statistics.fmean(column) for column in zip(*series, strict=True)] for series in (x, y)]
    (line,) = axis.plot(*means, lw=1.5, label=label, **style)
    axis.plot([of[-1] for of in x], [of[-1] for of in y], ls="", marker="o", ms=3, alpha=0.5, color=line.get_color())


def lines_of_methods(
    x: Mapping[str, Sequence[float]],
    series: Mapping[str, Mapping[str, Sequence[Sequence[float]]]],
    path: Path,
    *,
    x_label: str,
) -> Path:
    """A panel per name in ``series``: a mean with its band per method."""
    made, axes = figure(len(series))
    for axis, (name, methods) in zip(axes, series.items(), strict=True):
        for method, rows in methods.items():
            band(axis, x[method], rows, COLORS.get(method, "#444444"), NAMES.get(method, method))
        axis.set(xlabel=x_label, ylabel=name)
    axes[0].legend(frameon=False, fontsize=8)
    return save(made, path)
