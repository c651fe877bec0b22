"""What pictures are drawn with, by matplotlib without a display: colours, a style, a figure, a file."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

COLORS = {"plain": "#7d8590", "penalty": "#d9822b", "published": "#8250df", "gapt": "#1f6feb"}
OTHER_COLORS = ("#1a7f37", "#cf222e", "#0e7490", "#9a6700")
SHADE = "#1f6feb"
FAINT = "#656d76"

STYLE: Any = {
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
    "text.color": "#1f2328",
    "figure.facecolor": "white",
    "legend.frameon": False,
    "legend.fontsize": 8.5,
}


def color_of(name: str, place: int) -> str:
    """The colour of a run: that of its method where it is named so, else by its place."""
    return COLORS.get(name, OTHER_COLORS[place % len(OTHER_COLORS)])


def save_figure(figure: Any, path: str | os.PathLike[str]) -> Path:
    """Write it in the format that the suffix names; missing folders are made."""
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(target, dpi=160, bbox_inches="tight", pad_inches=0.18)
    return target
