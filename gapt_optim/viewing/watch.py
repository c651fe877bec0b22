"""A run in the terminal while it trains: phase, switches with their reasons, and sparklines."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from .errors import CommandError
from .history import Record, drop_from, read_record, switches_of, values_of

_BARS = "▁▂▃▄▅▆▇█"


class Follower:
    """Reads a file of JSON lines as it grows. A line that is not whole yet is read when it is."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._start_over()

    def _start_over(self) -> None:
        self.records: list[Record] = []
        self.unreadable = 0
        self._place = 0
        self._rest = b""

    def read(self) -> int:
        """Take what is new; the number of new records.

        Raises:
            CommandError: the file is there and cannot be read.
        """
        try:
            size = self.path.stat().st_size
            if size < self._place:  # another run took the file's place
                self._start_over()
            with self.path.open("rb") as file:
                file.seek(self._place)
                text = file.read()
        except FileNotFoundError:
            return 0
        except OSError as error:
            raise CommandError(f"{self.path} cannot be read ({error.strerror})") from error
        self._place += len(text)
        *lines, self._rest = (self._rest + text).split(b"\n")
        new = 0
        for line in lines:
            if not line.strip():
                continue
            try:
                record, _ = read_record(line)
            except ValueError:
                self.unreadable += 1
                continue
            # Only what is drawn: a run's layers need not fit into memory.
            kept = ("step", "phase", "next_phase", "reason", "loss", "entropy", "validation_loss", "measures")
            record = {key: record[key] for key in kept if key in record}
            drop_from(self.records, record["step"])
            self.records.append(record)
            new += 1
        return new


def sparkline(values: Sequence[float], width: int) -> str:
    """The course of some values in so many characters, from the lowest to the highest."""
    if not values or width < 1:
        return ""
    count = min(width, len(values))
    means = []
    for i in range(count):
        part = values[i * len(values) // count : (i + 1) * len(values) // count]
        means.append(sum(part) / len(part))
    low, high = min(means), max(means)
    if not high > low:
        return _BARS[0] * count
    return "".join(_BARS[min(7, int(8 * (mean - low) / (high - low)))] for mean in means)


def phase_line(records: Sequence[Record], width: int) -> str:
    """A character per stretch of steps: full where most of it was compression."""
    if not records:
        return ""
    count = min(width, len(records))
    parts = (records[i * len(records) // count : (i + 1) * len(records) // count] for i in range(count))
    shares = (sum(record.get("phase") == "compression" for record in part) / len(part) for part in parts)
    return "".join("█" if share > 0.5 else "▄" if share > 0 else "·" for share in shares)


def screen(name: str, records: Sequence[Record], width: int, unreadable: int = 0, state: str = "") -> Any:
    """What is shown, as a rich renderable."""
    from rich.table import Table
    from rich.text import Text

    shown = Table.grid(padding=(0, 2))
    shown.add_column(style="dim")
    shown.add_column(overflow="fold")
    shown.add_row("run", Text(name))
    if not records:
        shown.add_row("", "waiting for the first step")
        if unreadable:
            shown.add_row("note", Text(_unreadable(unreadable)))
        return shown
    last = records[-1]
    phase = str(last.get("phase") or "memorization")
    style = "bold blue" if phase == "compression" else "bold"
    room = max(10, min(60, width - 40))
    shown.add_row("step", Text(f"{last['step']:,}{'  ' + state if state else ''}"))
    shown.add_row("phase", Text.assemble((phase, style), "  ", (phase_line(records, room), "blue")))
    for key, title in (("loss", "loss"), ("entropy", "entropy"), ("measures.centered_cosine_entropy", "centred cosine"),
                       ("measures.norm_ratio", "norm ratio"), ("validation_loss", "held-out loss")):  # fmt: skip
        points = [value for _, value in values_of(records, key)]
        if points:
            shown.add_row(title, Text(f"{points[-1]:9.4g}  {sparkline(points, room)}"))
    switches = switches_of(records)
    share = sum(record.get("phase") == "compression" for record in records) / len(records)
    shown.add_row("switches", Text(f"{len(switches)}, {share:.0%} of the steps in compression"))
    for step, phase, reason in list(islice(reversed(switches), 5)):
        shown.add_row("", Text(f"{step:>9,}  {reason}: {phase}"))
    if unreadable:
        shown.add_row("note", Text(_unreadable(unreadable)))
    return shown


def _unreadable(lines: int) -> str:
    return f"{lines} line{'s' if lines > 1 else ''} could not be read"


def ended(folder: Path) -> bool:
    """The run has written its results."""
    return (folder / "results.json").exists()


def follow(folder: Path, *, interval: float, patience: float, once: bool = False) -> Iterator[tuple[Follower, str]]:
    """The run's records again and again, with a word on its state, until it ends.

    Args:
        folder: of the run.
        interval: seconds between two looks.
        patience: seconds without a new step after which the run counts as ended.
        once: look only once.
    """
    follower = Follower(folder / "metrics.jsonl")
    latest = time.monotonic()
    while True:
        over = ended(folder)  # before reading, so that nothing written until then is missed
        new = follower.read()
        now = time.monotonic()
        latest = now if new else latest
        if over:
            yield follower, "ended"
            return
        if now - latest > patience:
            yield follower, f"no new step for {patience:g} s"
            return
        yield follower, ""
        if once:
            return
        time.sleep(interval)
