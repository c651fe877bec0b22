"""What the numbers of several seeds say: means with intervals, and changes against plain training."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Summary = dict[str, Any]


def summarize(values: Sequence[float]) -> dict[str, Any]:
    """Mean over seeds, its 95 % interval (None for a single seed) and the values."""
    return {
        "mean": float(np.mean(values)),
        "ci95": bootstrap(lambda rows: rows[..., 0].mean(-1), np.asarray(values, float)[:, None]),
        "values": [float(value) for value in values],
    }


def relative(values: Sequence[float], plain: Sequence[float]) -> dict[str, Any] | None:
    """Change of the mean against ``plain`` (-0.05 is 5 % lower), with seeds resampled in pairs.

    None where plain's mean is not positive: a ratio then says nothing.
    """
    rows = np.column_stack([np.asarray(values, float), np.asarray(plain, float)])

    def change(sample: Array) -> Array:
        base = sample[..., 1].mean(-1)
        ratio: Array = sample[..., 0].mean(-1) / np.where(base > 0, base, np.nan) - 1
        return ratio

    if not rows[:, 1].mean() > 0:
        return None
    ratios = [float(a / b - 1) if b else None for a, b in rows]
    interval = bootstrap(change, rows)
    if interval is not None and (rows >= 0).all():
        interval = [max(bound, -1.0) for bound in interval]  # widened, it may go beyond what is possible
    return {"mean": float(change(rows)), "ci95": interval, "values": ratios}


def bootstrap(
    statistic: Callable[[Array], Array], rows: Array, *, resamples: int = 10_000, level: float = 0.95
) -> list[float] | None:
    """Interval of a statistic over rows (seeds), by drawing as many rows again with replacement.

    ``statistic`` maps (..., rows, columns) to (...). Redrawn samples of n vary less than new ones would, by
    sqrt((n - 1) / n), which matters for a handful of seeds: the interval is widened by that factor.
    """
    count = len(rows)
    if count < 2:
        return None
    generator = np.random.default_rng(0)
    drawn = statistic(rows[generator.integers(count, size=(resamples, count))])
    center = float(statistic(rows))
    widened = center + (drawn - center) * math.sqrt(count / (count - 1))
    low, high = np.nanquantile(widened, [(1 - level) / 2, (1 + level) / 2])
    return [float(low), float(high)]


def compare(runs: Mapping[str, Sequence[Mapping[str, float]]], metrics: Sequence[str]) -> tuple[Summary, Summary]:
    """Summaries per method and metric, and changes against ``plain``, of runs of the same seeds in the same order."""
    summaries = {
        method: {metric: summarize([row[metric] for row in rows]) for metric in metrics}
        for method, rows in runs.items()
    }
    changes = {
        method: {
            metric: relative([row[metric] for row in rows], [row[metric] for row in runs["plain"]])
            for metric in metrics
        }
        for method, rows in runs.items()
        if method != "plain" and "plain" in runs
    }
    return summaries, changes


def table(summaries: Summary, changes: Summary, metrics: Sequence[str]) -> str:
    """Markdown: a row per metric, a column per method, intervals behind the changes."""
    lines = ["| | " + " | ".join(summaries) + " |", "|---|" + "---:|" * len(summaries)]
    for metric in metrics:
        cells = [cell(method, metric, summaries, changes) for method in summaries]
        lines.append(f"| {metric} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def cell(method: str, metric: str, summaries: Summary, changes: Summary) -> str:
    """One mean, and behind it the change against plain with its interval."""
    text = f"{summaries[method][metric]['mean']:.4g}"
    change = changes.get(method, {}).get(metric)
    if change is None:
        return text
    interval = "" if change["ci95"] is None else f"; {change['ci95'][0]:+.1%} to {change['ci95'][1]:+.1%}"
    return f"{text} ({change['mean']:+.1%}{interval})"
