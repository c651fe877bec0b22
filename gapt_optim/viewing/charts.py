"""What the pictures are drawn with: colours, a figure without a display, labels, and the phases behind a curve."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .history import Record, compression_spans

COLORS = {"plain": "#7d8590", "penalty": "#d9822b", "published": "#8250df", "gapt": "#1f6feb"}
OTHER_COLORS = ("#1a7f37", "#cf222e", "#0e7490", "#9a6700")
SHADE = "#1f6feb"
INK = "#1f2328"
FAINT = "#656d76"


def import_matplotlib() -> Any:
    """matplotlib without pyplot: needs no display, and leaves the caller's backend alone."""
    try:
        import matplotlib.figure
    except ImportError as error:
        raise ImportError("gapt_optim.viewing draws with matplotlib: pip install matplotlib") from error
    return matplotlib


def subplots(mpl: Any, rows: int, columns: int, figsize: tuple[float, float], **options: Any) -> tuple[Any, Any]:
    figure = mpl.figure.Figure(figsize=figsize)
    return figure, figure.subplots(rows, columns, **options)


def chart_style() -> dict[str, Any]:
    return {
        "font.size": 10,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.spines.left": False,
        "axes.edgecolor": "#afb8c1",
        "axes.labelcolor": FAINT,
        "axes.axisbelow": True,
        "grid.color": "#d8dee4",
        "grid.linewidth": 0.7,
        "xtick.color": FAINT,
        "ytick.color": FAINT,
        "ytick.major.size": 0,
        "text.color": INK,
        "figure.facecolor": "white",
    }


def save_figure(figure: Any, path: str | os.PathLike[str]) -> Path:
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(target, dpi=160, bbox_inches="tight", pad_inches=0.18)
    return target


def color_of(name: str, number: int) -> str:
    return COLORS.get(name, OTHER_COLORS[number % len(OTHER_COLORS)])


def with_minus(text: str) -> str:
    """A number's hyphen as the wider minus sign that matplotlib's own ticks have."""
    return text.replace("-", "\N{MINUS SIGN}")


def shade_compression(axes: Any, steps: Sequence[Record]) -> None:
    for first, last in compression_spans(steps):
        axes.axvspan(first - 1, last, color=SHADE, alpha=0.10, lw=0)


def name_switches(axes: Any, steps: Sequence[Record]) -> None:
    """Why each phase began, above its first step: entries of compression in the upper row, exits in the lower.

    Words that would run into each other are left out.
    """
    length = max((int(record["step"]) for record in steps), default=1)
    last = {"compression": -math.inf, "memorization": -math.inf}
    for record in steps:
        if not record.get("reason"):
            continue
        step, begins = int(record["step"]), record.get("next_phase", "compression")
        axes.plot([step, step], [1.0, 1.015], color=FAINT, lw=0.8, transform=axes.get_xaxis_transform(), clip_on=False)
        if (step - last[begins]) / length > 0.085:
            axes.annotate(
                record["reason"], (step, 1), (0, 15 if begins == "compression" else 5), ha="center", fontsize=8,
                xycoords=axes.get_xaxis_transform(), textcoords="offset points", color=FAINT,
            )  # fmt: skip
            last[begins] = step


def fit_after_the_start(axes: Any, curves: list[list[tuple[float, float]]]) -> None:
    """Limits for what comes after the steep first tenth, which would flatten all the rest."""
    end = max((curve[-1][0] for curve in curves if curve), default=0)
    late = [value for curve in curves for step, value in curve if step >= 0.1 * end and math.isfinite(value)]
    if late:
        low, high = min(late), max(late)
        room = 0.06 * (high - low or 1.0)
        axes.set_ylim(low - room, high + room)


def label_ends(axes: Any, labels: list[tuple[float, str, str]]) -> None:
    """Names at the right end of their lines, moved apart where they would overlap."""
    low, high = axes.get_ylim()
    gap = 0.085 * (high - low)
    places: list[float] = []
    ordered = sorted(labels)
    for value, _, _ in ordered:
        places.append(max(min(value, high), low) if not places else max(min(value, high), places[-1] + gap))
    overflow = max(0.0, places[-1] - high) if places else 0.0
    for index in range(len(places) - 1, -1, -1):
        limit = places[index] - overflow if index == len(places) - 1 else min(places[index], places[index + 1] - gap)
        places[index] = limit
    for (_, text, color), place in zip(ordered, places, strict=True):
        axes.text(
            1.012, (place - low) / (high - low), text, transform=axes.transAxes, va="center", color=color,
            fontweight="bold", fontsize=9.5,
        )  # fmt: skip


def cell_edges(steps: Any) -> Any:
    """Cell borders around the steps: each cell reaches back to the step before it."""
    import numpy as np

    first = max(0.0, steps[0] - (steps[1] - steps[0])) if len(steps) > 1 else 0.0
    return np.concatenate([[first], steps])


def add_title(axes: Any, title: str, subtitle: str) -> None:
    axes.annotate(
        title, (0, 1), (0, 52), xycoords="axes fraction", textcoords="offset points", fontsize=13, fontweight="bold"
    )
    axes.annotate(
        subtitle, (0, 1), (0, 36), xycoords="axes fraction", textcoords="offset points", fontsize=9.5, color=FAINT
    )
