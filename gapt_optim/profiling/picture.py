"""One picture of a profile, or of several, by matplotlib."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from .._display.pictures import FAINT, STYLE, save_figure
from .charts import (
    WITHOUT_FIRST,
    Heat,
    Panel,
    entropy_panels,
    other_panels,
    over_profiles,
    short_names,
    similarity,
)
from .comparison import Comparison, compare
from .results import Profile


def draw_profile(
    profiles: Profile | Mapping[str, Profile] | Comparison, path: str | os.PathLike[str], *, title: str = ""
) -> Path:
    """Write a picture (``.png``, ``.pdf``, ``.svg``) of a profile, or of several: entropies, norms, ranks, CKA.

    Needs matplotlib.

    >>> import torch
    >>> from gapt_optim.profiling import profile
    >>> model = torch.nn.Sequential(torch.nn.Linear(4, 16), torch.nn.ReLU())
    >>> draw_profile(profile(model, [torch.randn(64, 4)], "1"), "profile.png").name
    'profile.png'

    Raises:
        ValueError: there is none, or they cannot be compared.
    """
    import matplotlib as mpl
    from matplotlib.figure import Figure  # without pyplot: needs no display, and leaves the caller's backend alone

    found = profiles
    if isinstance(found, Mapping):
        if not found:
            raise ValueError("profiles is empty; pass at least one")
        found = compare(found) if len(found) > 1 else next(iter(found.values()))
    named = found.profiles if isinstance(found, Comparison) else {found.model or "model": found}
    shown: list[Panel | Heat] = [*entropy_panels(named), *other_panels(named)]
    if isinstance(found, Comparison) and len(named) > 2:
        shown.insert(0, over_profiles(found))
    heat = similarity(found) if isinstance(found, Profile) else None
    shown += [] if heat is None else [heat]
    with mpl.rc_context(STYLE):
        columns = min(2, len(shown))
        rows = -(-len(shown) // columns)
        figure = Figure(figsize=(5.4 * columns, 3.0 * rows + 0.5), layout="constrained")
        grid = figure.subplots(rows, columns, squeeze=False)
        for axes, panel in zip(grid.ravel(), shown, strict=False):
            if isinstance(panel, Heat):
                _draw_heat(figure, axes, panel)
            else:
                _draw_panel(axes, panel)
        for axes in grid.ravel()[len(shown) :]:
            axes.set_visible(False)
        figure.suptitle(title or ", ".join(named), x=0.01, ha="left", fontweight="bold", fontsize=13)
        return save_figure(figure, path)


def _draw_panel(axes: Any, panel: Panel) -> None:
    view = panel.views[0][0] if panel.views else None
    lines = [line for line in panel.lines if line.view == view]
    for line in lines:
        values = np.array([np.nan if value is None else value for value in line.values])
        style: dict[str, Any] = (
            {"ls": "--", "lw": 1.0} if line.dashed else {"ls": "-", "lw": 1.6, "marker": "o", "ms": 2.5}
        )
        axes.plot(values, color=line.color, label=None if line.dashed else line.name, **style)
        if line.errors is not None and any(line.errors):
            error = np.array([np.nan if value is None else value for value in line.errors])
            axes.fill_between(range(len(values)), values - error, values + error, color=line.color, alpha=0.15, lw=0)
    low, high = panel.bounds()
    for name, limit in panel.limits:
        if low <= limit <= high:
            axes.axhline(limit, color=FAINT, ls=":", lw=1, label=name)
    if any(line.dashed for line in lines):
        axes.plot([], [], color=FAINT, ls="--", lw=1, label=WITHOUT_FIRST.removeprefix("dashed: "))
    axes.set_ylim(low, high)
    suffix = f": {panel.views[0][1]}" if panel.views else ""
    axes.set_title(f"{panel.title}{suffix}", loc="left", fontsize=10, fontweight="bold")
    axes.set_ylabel(panel.unit)
    _ticks(axes.xaxis, panel.layers)
    axes.set_xlabel("layer")
    axes.grid(axis="y")
    if axes.get_legend_handles_labels()[1] and (len(lines) > 1 or panel.limits):
        axes.legend(fontsize=7, loc="best", framealpha=0.8, edgecolor="none")


def _draw_heat(figure: Any, axes: Any, heat: Heat) -> None:
    title, rows = next(iter(heat.values.items()))
    values = np.array([[np.nan if value is None else value for value in row] for row in rows], dtype=float)
    low, high = heat.bounds or (None, None)
    image = axes.imshow(values, origin="lower", aspect="auto", cmap="viridis", vmin=low, vmax=high)
    figure.colorbar(image, ax=axes, label=title or heat.unit, shrink=0.9)
    axes.set_title(heat.title, loc="left", fontsize=10, fontweight="bold")
    _ticks(axes.yaxis, heat.y)
    _ticks(axes.xaxis, heat.x)
    axes.set_xlabel(heat.x_title)
    axes.set_ylabel("layer")


def _ticks(axis: Any, names: list[str]) -> None:
    every = max(1, -(-len(names) // 10))
    axis.set_ticks(list(range(len(names)))[::every], short_names(names)[::every], fontsize=8)
