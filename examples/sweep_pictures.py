"""Pictures of a sweep: clouds of representations, trade-off curves, and curves over training with bands."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np

COLORS = {"plain": "#7d8590", "penalty": "#d9822b", "published": "#8250df", "gapt": "#1f6feb"}
CLOUD_COLORS = ("#1f6feb", "#cf222e")
STYLE: Any = {
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.edgecolor": "#afb8c1",
    "grid.color": "#d8dee4",
    "grid.linewidth": 0.7,
}


def draw_clouds(clouds: Mapping[str, Sequence[Any]], path: Path, *, title: str) -> Path:
    """The two experiences' hidden representations per method, on the first two principal axes of both together.

    Lengths are in units of the spread within a panel's clouds, the unit of the separation.
    """
    flat = {
        method: _on_principal_axes(*(np.asarray(cloud, float) for cloud in pair)) for method, pair in clouds.items()
    }
    limit = 1.1 * max(np.abs(points).max() for pair in flat.values() for points in pair)
    with plt.rc_context(STYLE):
        figure, grid = plt.subplots(1, len(clouds), figsize=(3.2 * len(clouds), 3.9), squeeze=False)
        for axes, (method, pair) in zip(grid[0], flat.items(), strict=True):
            for points, color, name in zip(pair, CLOUD_COLORS, ("experience P", "experience N"), strict=True):
                axes.scatter(*points.T, s=9, color=color, alpha=0.6, lw=0, label=name)
            separation = np.linalg.norm(pair[0].mean(0) - pair[1].mean(0))
            axes.set_title(f"{method}: {separation:.1f} apart", fontsize=10, loc="left")
            axes.set(xlim=(-limit, limit), ylim=(-limit, limit), aspect="equal", xlabel="first principal axis")
        grid[0][0].set_ylabel("second principal axis")
        grid[0][0].legend(fontsize=8, frameon=False, loc="upper right")
        figure.suptitle(f"{title}; unit: spread within a cloud", x=0.07, y=0.97, ha="left", fontsize=11, weight="bold")
        return _save(figure, path)


def _on_principal_axes(first: Any, second: Any) -> tuple[Any, Any]:
    """Both clouds in the plane where they vary most together, the first on the left."""
    both = np.concatenate([first, second])
    spread = np.sqrt((first.var(0).sum() + second.var(0).sum()) / 2) or 1.0
    _, _, directions = np.linalg.svd(both - both.mean(0), full_matrices=False)
    flat = (both - both.mean(0)) @ directions[:2].T / spread
    flat[:, 0] *= -np.sign(flat[: len(first), 0].mean()) or 1.0
    return flat[: len(first)], flat[len(first) :]


def draw_tradeoff(tradeoff: Mapping[str, Sequence[Mapping[str, Any]]], path: Path) -> Path:
    """Separation against task loss, a curve per method over the entropy's weight, bars: 95 % intervals."""
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(figsize=(7.2, 4.6))
        for method, points in tradeoff.items():
            x = [point["task_loss"]["mean"] for point in points]
            y = [point["separation"]["mean"] for point in points]
            errors = {
                f"{axis}err": _bars([point[metric] for point in points])
                for axis, metric in (("x", "task_loss"), ("y", "separation"))
            }
            axes.errorbar(x, y, **errors, color=COLORS[method], marker="o", ms=5, lw=1.6, elinewidth=0.6, label=method)
            if len(points) > 1:
                for left, up, point in zip(x, y, points, strict=True):
                    axes.annotate(f"{point['weight']:g}", (left, up), (5, 4), textcoords="offset points", fontsize=7.5)
        axes.set_xlabel("task loss on test data (L1); better to the left")
        axes.set_ylabel("separation; better upwards")
        axes.legend(frameon=False)
        axes.set_title("What separation costs, over weights of the entropy", loc="left", fontweight="bold")
        return _save(figure, path)


def draw_curves(
    curves: Mapping[str, Mapping[str, Sequence[Sequence[float]]]],
    steps: Sequence[int],
    path: Path,
    *,
    levels: Mapping[str, tuple[float, str]] | None = None,
    title: str = "",
) -> Path:
    """A panel per metric over training: mean over seeds, and the 95 % interval of the mean as a band.

    ``curves[metric][method]`` holds one row of values per seed. ``levels`` draws a named line in a panel.
    """
    columns = 2
    rows = -(-len(curves) // columns)
    with plt.rc_context(STYLE):
        figure, grid = plt.subplots(rows, columns, figsize=(10, 3.0 * rows), squeeze=False, sharex=True)
        for axes, (metric, methods) in zip(grid.ravel(), curves.items(), strict=False):
            for method, seeds in methods.items():
                values = np.asarray(seeds, float)
                axes.plot(steps, values.mean(0), color=COLORS[method], lw=1.8, label=method)
                if len(values) > 1:
                    low, high = _band(values)
                    axes.fill_between(steps, low, high, color=COLORS[method], alpha=0.15, lw=0)
            if levels and metric in levels:
                level, name = levels[metric]
                axes.axhline(level, color="#656d76", lw=0.9, ls="--")
                axes.annotate(name, (1, level), (0, 3), xycoords=("axes fraction", "data"),
                              textcoords="offset points", ha="right", fontsize=8, color="#656d76")  # fmt: skip
            axes.set_title(metric, loc="left", fontsize=10, fontweight="bold")
        for axes in grid.ravel()[len(curves) :]:
            axes.set_visible(False)
        for axes in grid[-1]:
            axes.set_xlabel("step")
        grid[0][0].legend(frameon=False, fontsize=8)
        if title:
            figure.suptitle(title, x=0.01, ha="left", fontsize=11)
        figure.tight_layout()
        return _save(figure, path)


def draw_paths(
    paths: Mapping[str, tuple[Sequence[Sequence[float]], Sequence[Sequence[float]]]],
    path: Path,
    *,
    labels: tuple[str, str],
    title: str,
) -> Path:
    """One quantity against another as training goes on: mean over seeds, a dot per evaluation, a ring at the end.

    ``paths[method]`` holds x and y, each with one row of values per seed.
    """
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(figsize=(7.2, 4.6))
        for method, pair in paths.items():
            x, y = (np.asarray(rows, float).mean(0) for rows in pair)
            axes.plot(x, y, color=COLORS[method], marker="o", ms=3.5, lw=1.4, label=method)
            axes.plot(x[-1:], y[-1:], "o", ms=10, mfc="none", color=COLORS[method])
        axes.set_xlabel(labels[0])
        axes.set_ylabel(labels[1])
        axes.legend(frameon=False)
        axes.set_title(title, loc="left", fontweight="bold")
        return _save(figure, path)


def _bars(summaries: Sequence[Mapping[str, Any]]) -> Any:
    """Lengths of error bars below and above the means, None without intervals."""
    if any(summary["ci95"] is None for summary in summaries):
        return None
    return np.array([[s["mean"] - s["ci95"][0], s["ci95"][1] - s["mean"]] for s in summaries]).clip(min=0).T


def _band(values: Any) -> tuple[Any, Any]:
    """Bootstrap interval of the mean over seeds at each step, widened as in `seed_statistics.bootstrap`."""
    count = len(values)
    drawn = values[np.random.default_rng(0).integers(count, size=(2000, count))].mean(1)
    widened = values.mean(0) + (drawn - values.mean(0)) * np.sqrt(count / (count - 1))
    low, high = np.quantile(widened, [0.025, 0.975], axis=0)
    return low, high


def _save(figure: Any, path: Path) -> Path:
    figure.savefig(path, dpi=130, bbox_inches="tight", pad_inches=0.15)
    plt.close(figure)
    return path
