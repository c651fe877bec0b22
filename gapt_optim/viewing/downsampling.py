"""Fewer points for a chart than a run has steps, without losing what one looks for."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from statistics import fmean
from typing import Any

from .page import rounded

Points = list[tuple[float, float]]

MOST_POINTS = 1200
"""Points of a line: more than a screen has columns."""

MOST_CELLS = 24_000
"""Cells of one heat map."""


def extremes(points: Sequence[tuple[float, float]], limit: int) -> Points:
    """At most ``limit`` points, with the lowest and the highest of every stretch among them, and both ends."""
    if len(points) <= limit:
        return list(points)
    kept: Points = [points[0]]
    for stretch in _stretches(points, max(1, (limit - 2) // 2)):
        low, high = min(stretch, key=_value), max(stretch, key=_value)
        kept += sorted({low, high})
    kept.append(points[-1])
    return sorted(set(kept))


def thinned(points: Sequence[tuple[float, float]], limit: int) -> Points:
    """At most ``limit`` points, the last of every stretch; for what is smooth already."""
    if len(points) <= limit:
        return list(points)
    return [points[0], *(stretch[-1] for stretch in _stretches(points, limit - 1))]


def band(seeds: Sequence[Points], limit: int) -> tuple[list[float], list[float], list[float], list[float]]:
    """Steps, lowest, mean and highest over seeds, each seed's mean within common stretches of steps."""
    steps = sorted({step for points in seeds for step, _ in points})
    edges = [stretch[-1] for stretch in _stretches(steps, limit)] if len(steps) > limit else steps
    means: list[dict[int, float]] = []
    for points in seeds:
        sums: dict[int, list[float]] = {}
        at = 0
        for step, value in points:
            while edges[at] < step:
                at += 1
            sums.setdefault(at, []).append(value)
        means.append({at: fmean(values) for at, values in sums.items()})
    found: tuple[list[float], list[float], list[float], list[float]] = ([], [], [], [])
    for at, edge in enumerate(edges):
        values = [mean[at] for mean in means if at in mean]
        if values:
            for column, value in zip(found, (edge, min(values), fmean(values), max(values)), strict=True):
                column.append(value)
    return found


def heat_map(
    rows: Sequence[tuple[float, Mapping[str, float]]],
) -> tuple[list[float], list[str], list[list[float | None]]]:
    """Steps, layers, and the values (layers, steps), means over stretches where there are more steps than cells."""
    names: list[str] = max((list(layers) for _, layers in rows), key=len)
    limit = max(60, min(500, MOST_CELLS // max(1, len(names))))
    steps: list[float] = []
    columns: list[list[float | None]] = []
    for stretch in _stretches(rows, limit) if len(rows) > limit else ([row] for row in rows):
        steps.append(stretch[-1][0])
        column: list[float | None] = []
        for name in names:
            values = [value for _, layers in stretch if (value := layers.get(name)) is not None]
            column.append(fmean(values) if values else None)
        columns.append(column)
    return steps, names, [rounded(column[i] for column in columns) for i in range(len(names))]


def _stretches(items: Sequence[Any], count: int) -> Iterable[Sequence[Any]]:
    """So many parts of nearly equal length, one after another."""
    for i in range(count):
        part = items[i * len(items) // count : (i + 1) * len(items) // count]
        if part:
            yield part


def _value(point: tuple[float, float]) -> float:
    return point[1]
