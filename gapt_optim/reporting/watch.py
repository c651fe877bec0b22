"""A run in the terminal while it trains: phase, switches with their reasons, and sparklines."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from .records import Record, Records

_BARS = "▁▂▃▄▅▆▇█"
_SHOWN = {
    "loss": "loss",
    "validation_loss": "held-out loss",
    "entropy": "entropy",
    "centered_cosine_entropy": "centred cosine",
    "norm_ratio": "norm ratio",
}


class RunFollower:
    """A run's metrics and, where it writes them to a file of their own, its held-out losses."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.metrics, self.held_out = Records(folder / "metrics.jsonl"), Records(folder / "validation.jsonl")

    def read(self) -> int:
        """Take what is new; the number of new rows."""
        return self.metrics.read() + self.held_out.read()

    def values(self, column: str) -> list[float]:
        """What there is of a column, in order of step."""
        rows = self.metrics.rows
        if column == "validation_loss" and self.held_out.rows:
            column, rows = "loss", self.held_out.rows
        return [row[column] for row in rows if not math.isnan(row[column])]

    def shows_again(self, column: str) -> bool:
        """The column is the entropy itself, wherever there are both."""
        return all(math.isnan(row[column]) or row[column] == row["entropy"] for row in self.metrics.rows)


def sparkline(values: Sequence[float], width: int) -> str:
    """The course of some values in so many characters, from the lowest to the highest.

    >>> sparkline([1, 2, 3], 3)
    '▁▅█'
    """
    means = _means(values, width)
    low, high = min(means, default=0.0), max(means, default=0.0)
    return "".join(_BARS[min(7, int(8 * (mean - low) / (high - low))) if high > low else 0] for mean in means)


def phase_line(rows: Sequence[Record], width: int) -> str:
    """A character per stretch of steps: full where most of it was compression."""
    shares = _means([row["phase"] == "compression" for row in rows], width)
    return "".join("█" if share > 0.5 else "▄" if share > 0 else "·" for share in shares)


def _means(values: Sequence[float], width: int) -> list[float]:
    parts = np.array_split(np.array(values, dtype=float), max(1, min(width, len(values))))
    return [float(part.mean()) for part in parts if len(part)]


def screen(run: RunFollower, width: int, state: str = "") -> Any:
    """What is shown, as a rich renderable."""
    from rich.table import Table
    from rich.text import Text

    shown = Table.grid(padding=(0, 2))
    shown.add_column(style="dim", no_wrap=True)
    shown.add_column(overflow="fold")
    shown.add_row("run", Text(str(run.folder)))
    rows = run.metrics.rows
    if not rows:
        shown.add_row("", "waiting for the first step")
    else:
        last = rows[-1]
        room = max(10, min(60, width - 34))
        style = "bold blue" if last["phase"] == "compression" else "bold"
        shown.add_row("step", Text(f"{last['step']:,}{'  ' + state if state else ''}"))
        shown.add_row("phase", Text.assemble((f"{last['phase']:<12}", style), " ", (phase_line(rows, room), "blue")))
        for column, title in _SHOWN.items():
            same = column == "centered_cosine_entropy" and run.shows_again(column)
            if (values := run.values(column)) and not same:
                shown.add_row(title, Text(f"{values[-1]:<12.4g} {sparkline(values, room)}"))
        switches = [row for row in rows if row["reason"]]
        share = sum(row["phase"] == "compression" for row in rows) / len(rows)
        shown.add_row("switches", Text(f"{len(switches):,}; {share:.0%} of the steps in compression"))
        for row in reversed(switches[-5:]):
            shown.add_row("", Text(f"{row['step']:>9,}  {row['reason']}: {row['next_phase']}"))
    if lines := run.metrics.unreadable + run.held_out.unreadable:
        shown.add_row("note", Text(f"{lines} line{'s' if lines > 1 else ''} could not be read"))
    return shown


def follow(folder: Path, *, interval: float, patience: float, once: bool = False) -> Iterator[tuple[RunFollower, str]]:
    """The run every ``interval`` seconds, with a word on its state, until it ends or adds no step for ``patience``."""
    run = RunFollower(folder)
    latest = time.monotonic()
    while True:
        over = (folder / "results.json").exists()  # before reading, so that nothing written until then is missed
        now, state = time.monotonic(), ""
        if run.read():
            latest = now
        if over:
            state = "ended"
        elif now - latest > patience:
            state = f"no new step for {patience:g} s"
        yield run, state
        if state or once:
            return
        time.sleep(interval)
