"""Pictures of a sweep: clouds of representations, trade-off curves, and curves over training with bands."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np

from gapt_optim.viewing.charts import COLORS, FAINT

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
    right, top = 1.15 * np.abs(np.concatenate([points for pair in flat.values() for points in pair])).max(0)
    top = max(top, right / 3)
    with plt.rc_context(STYLE):
        size = (3.2 * len(clouds), 1.6 + 3.0 * top / right)
        figure, grid = plt.subplots(1, len(clouds), figsize=size, squeeze=False, sharey=True, layout="constrained")
        for axes, (method, pair) in zip(grid[0], flat.items(), strict=True):
            for points, color, name in zip(pair, CLOUD_COLORS, ("experience P", "experience N"), strict=True):
                axes.scatter(*points.T, s=9, color=color, alpha=0.6, lw=0, label=name)
            separation = np.linalg.norm(pair[0].mean(0) - pair[1].mean(0))
            axes.set_title(f"{method}: {separation:.1f} apart", fontsize=10, loc="left")
            axes.set(xlim=(-right, right), ylim=(-top, top), aspect="equal", xlabel="first principal axis")
        grid[0][0].set_ylabel("second\nprincipal axis")
        names = grid[0][0].get_legend_handles_labels()
        figure.legend(*names, fontsize=9, frameon=False, loc="outside lower right", ncols=2, markerscale=1.5)
        figure.suptitle(f"{title}; unit: spread within a cloud", x=0.01, ha="left", fontsize=11, weight="bold")
        return _save(figure, path)


def _on_principal_axes(first: Any, second: Any) -> tuple[Any, Any]:
    """Both clouds in the plane where they vary most together, the first on the left."""
    both = np.concatenate([first, second])
    spread = np.sqrt((first.var(0).sum() + second.var(0).sum()) / 2) or 1.0
    _, _, directions = np.linalg.svd(both - both.mean(0), full_matrices=False)
    flat = (both - both.mean(0)) @ directions[:2].T / spread
    flat[:, 0] *= -np.sign(flat[: len(first), 0].mean()) or 1.0
    return flat[: len(first)], flat[len(first) :]


def draw_tradeoff(tradeoff: Mapping[str, Sequence[Mapping[str, Any]]], path: Path, *, title: str) -> Path:
    """Change of separation over change of task loss, a curve per method over weights; bars: paired 95 % intervals."""
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(figsize=(8.4, 5.2))
        axes.plot(0, 0, "o", ms=8, color=COLORS["plain"], label="plain")
        for number, (method, points) in enumerate(tradeoff.items()):
            changes = [[point["relative"][metric] for point in points] for metric in ("task_loss", "separation")]
            x, y = ([100 * change["mean"] for change in row] for row in changes)
            left, up = (_bars(row, 100) for row in changes)
            bars: Any = {"xerr": left, "yerr": up, "elinewidth": 0.7}
            axes.errorbar(x, y, **bars, fmt="none", color=COLORS[method], alpha=0.35)
            axes.plot(x, y, "o-", ms=5, lw=1.8, color=COLORS[method], label=method)
            place: Any = {"xytext": (-6, 6), "ha": "right"} if number % 2 else {"xytext": (6, -11)}
            for point, right, high in zip(points, x, y, strict=True):
                axes.annotate(f"{point['weight']:g}", (right, high), **place, textcoords="offset points",
                              fontsize=8, color=COLORS[method])  # fmt: skip
        axes.set_xscale("symlog", linthresh=10, linscale=0.7)
        ticks = [tick for tick in (-30, -10, -5, 0, 5, 10, 30, 100, 300) if _within(tick, axes.get_xlim())]
        axes.set_xticks(ticks, [f"{tick:+d} %" if tick else "0" for tick in ticks])
        axes.minorticks_off()
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:+.0f} %" if value else "0")
        axes.set_xlabel("change of the task loss against plain; better to the left")
        axes.set_ylabel("change of the separation; better upwards")
        axes.legend(frameon=False, loc="upper left")
        axes.set_title(title, loc="left", fontweight="bold")
        return _save(figure, path)


def _within(value: float, limits: tuple[float, float]) -> bool:
    return limits[0] <= value <= limits[1]


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
                dots = {"marker": "o", "ms": 3.5} if len(steps) < 4 else {}  # a line of one point shows nothing
                axes.plot(steps, values.mean(0), **_line(method), **dots)
                if len(values) > 1:
                    low, high = _band(values)
                    axes.fill_between(steps, low, high, color=COLORS[method], alpha=0.15, lw=0)
            if levels and metric in levels:
                level, name = levels[metric]
                axes.axhline(level, color=FAINT, lw=0.9, ls="--")
                axes.annotate(name, (1, level), (0, 3), xycoords=("axes fraction", "data"),
                              textcoords="offset points", ha="right", fontsize=8, color=FAINT)  # fmt: skip
            axes.set_title(metric, loc="left", fontsize=10, fontweight="bold")
        for axes in grid.ravel()[len(curves) :]:
            axes.set_visible(False)
        for axes in grid[-1]:
            axes.set_xlabel("step")
        figure.suptitle(title, x=0.01, y=1.0, ha="left", va="bottom", fontsize=11)
        names = grid[0][0].get_legend_handles_labels()
        figure.legend(*names, loc="lower right", bbox_to_anchor=(1, 0.985), ncols=len(names[0]), frameon=False)
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
            axes.plot(x, y, **_line(method), marker="o", ms=3.5)
            axes.plot(x[-1:], y[-1:], "o", ms=10, mfc="none", color=COLORS[method])
        axes.plot([], [], "o", ms=10, mfc="none", color=FAINT, label="last step")
        axes.set_xlabel(labels[0])
        axes.set_ylabel(labels[1])
        axes.legend(frameon=False)
        axes.set_title(title, loc="left", fontsize=11, fontweight="bold")
        return _save(figure, path)


def _line(method: str) -> Any:
    """Plain is a broad line, which shows behind a method that trains just as it does."""
    return {"color": COLORS[method], "label": method, **({"lw": 5, "alpha": 0.5} if method == "plain" else {"lw": 1.6})}


def _bars(changes: Sequence[Mapping[str, Any]], unit: float) -> Any:
    """Lengths of error bars below and above the means, None without intervals."""
    if any(change["ci95"] is None for change in changes):
        return None
    return unit * np.array([[c["mean"] - c["ci95"][0], c["ci95"][1] - c["mean"]] for c in changes]).clip(min=0).T


def _band(values: Any) -> tuple[Any, Any]:
    """Bootstrap interval of the mean over seeds at each step, widened as in `seed_statistics.bootstrap`."""
    count = len(values)
    drawn = values[np.random.default_rng(0).integers(count, size=(2000, count))].mean(1)
    widened = values.mean(0) + (drawn - values.mean(0)) * np.sqrt(count / (count - 1))
    low, high = np.quantile(widened, [0.025, 0.975], axis=0)
    return (low.clip(min=0), high) if (values >= 0).all() else (low, high)


def _save(figure: Any, path: Path) -> Path:
    figure.savefig(path, dpi=130, bbox_inches="tight", pad_inches=0.15)
    plt.close(figure)
    return path
