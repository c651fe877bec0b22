"""A file of JSON lines, also while it grows: its records as flat rows, and what each holds per layer.

pandas alone refuses all of a file that has one line cut, as every run that was killed and resumed has. What is of
another kind than expected is missing, never an error.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from pandas import DataFrame

Record = dict[str, Any]

MEASURES = ("linear_entropy", "centered_cosine_entropy", "norm_ratio", "mean_share")
_TEXTS = ("phase", "next_phase", "reason")
_NUMBERS = ("loss", "entropy", "validation_loss", "entropy_share", "nonfinite_steps")
_COLUMNS = ("step", *_TEXTS, *_NUMBERS, *MEASURES, "alignment", "parameter_alignment")
_MOST_LAYER_ROWS = 2000
"""Beyond twice as many, what is per layer is kept of every second step: a long run of many layers fits into memory."""


class Records:
    """A file of metrics or of validations.

    Where a run went on from an earlier checkpoint, so that a step comes again, what was written before from that step
    on is left out: it is of a branch that ended.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._start_over()

    def _start_over(self) -> None:
        self.rows: list[Record] = []
        self.unreadable = self.replaced = 0
        self.resumed: list[int] = []
        self.last_line = b""
        """What is behind the last line feed: a line that is being written, or was cut short."""
        self._place = 0
        self._tables = {name: _Thinned() for name in ("layer_entropy", "layer_measures", "cosines")}

    def read(self) -> int:
        """Take the lines that are new and whole; the number of new rows, 0 where there is no file.

        Raises:
            OSError: the file is there and cannot be read.
        """
        if not self.path.exists():
            return 0
        if self.path.stat().st_size < self._place:  # another run took the file's place
            self._start_over()
        new = 0
        with self.path.open("rb") as file:
            file.seek(self._place)
            self.last_line = b""
            for line in file:
                if not line.endswith(b"\n"):
                    self.last_line = line
                    break
                self._place += len(line)
                new += self.add(line)
        return new

    def read_to_the_end(self) -> Records:
        """All of it, a last line without a line feed too.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: it has text in it, and none of it is a record with a ``step``.
        """
        if not self.path.exists():
            raise FileNotFoundError(2, "No such file or directory", str(self.path))
        self.read()
        if self.add(self.last_line):
            self.last_line = b""
        # A single line may be all that a run killed in its first step has written.
        if self.unreadable > 1 and not self.rows:
            raise ValueError(f"{self.path} holds no metrics: expected one JSON object with a step on each line")
        return self

    def add(self, line: bytes) -> bool:
        """Take one line; whether it was a record."""
        line = line.removeprefix(b"\xef\xbb\xbf").strip()
        try:
            record = json.loads(line.decode("utf-8"))
            step = int(record["step"])
        except (ValueError, KeyError, TypeError, OverflowError, RecursionError):
            self.unreadable += bool(line)
            return False
        if self.rows and self.rows[-1]["step"] >= step:
            self._go_back(step)
        self.rows.append(_flat_row(step, record))
        self._tables["layer_entropy"].add(step, table(record, "layer_entropy"))
        self._tables["layer_measures"].add(step, table(record, "layer_measures"))
        self._tables["cosines"].add(step, table(table(record, "alignment"), "layers"))
        return True

    def _go_back(self, step: int) -> None:
        before = len(self.rows)
        while self.rows and self.rows[-1]["step"] >= step:
            self.rows.pop()
        self.replaced += before - len(self.rows)
        self.resumed.append(step)
        for thinned in self._tables.values():
            thinned.drop_from(step)

    def frame(self) -> DataFrame:
        """A row per step, with all columns."""
        frame = DataFrame(self.rows, columns=list(_COLUMNS)).set_index("step")
        return frame.astype({column: float for column in frame.columns if column not in _TEXTS})

    def layers(self) -> dict[str, DataFrame]:
        """(steps, layers) of the entropy, of each measure and of the cosine of the gradients; only what there is."""
        found = {"entropy": self._tables["layer_entropy"].frame()}
        found |= {measure: self._tables["layer_measures"].frame(measure) for measure in MEASURES}
        found["cosine"] = self._tables["cosines"].frame("cosine")
        return {measure: frame for measure, frame in found.items() if not frame.empty}

    def notes(self) -> list[str]:
        """What a reader must know."""
        notes = []
        if not self.rows:
            notes.append("nothing was written yet")
        if self.last_line:
            notes.append("the last line is cut off and left out; the run is still writing, or was ended")
        if unreadable := self.unreadable - bool(self.last_line):
            notes.append(f"{unreadable:,} unreadable line{'s' * (unreadable > 1)} left out")
        if self.resumed:
            times = "" if len(self.resumed) == 1 else f"{len(self.resumed):,} times, last "
            notes.append(
                f"the run was resumed {times}at step {self.resumed[-1]:,}; what was written before from there on, "
                f"{self.replaced:,} record{'s' * (self.replaced > 1)}, is left out"
            )
        return [f"{self.path.name}: {note}" for note in notes]


class _Thinned:
    """What is per layer, by step: of all steps, or of every 2nd, 4th, ... where those are many."""

    def __init__(self) -> None:
        self.rows: dict[int, Record] = {}
        self.every, self.seen = 1, 0

    def add(self, step: int, values: Record) -> None:
        if not values:
            return
        if self.seen % self.every == 0:
            self.rows[step] = values
        self.seen += 1
        if len(self.rows) > 2 * _MOST_LAYER_ROWS:
            self.rows = dict(list(self.rows.items())[::2])
            self.every *= 2

    def drop_from(self, step: int) -> None:
        self.rows = {at: values for at, values in self.rows.items() if at < step}

    def frame(self, measure: str = "") -> DataFrame:
        """(steps, layers): the values themselves, or one of several that each layer has."""
        found = {
            step: {name: finite(table(values, name).get(measure) if measure else values[name]) for name in values}
            for step, values in self.rows.items()
        }
        return DataFrame.from_dict(found, orient="index").dropna(axis=1, how="all")


def _flat_row(step: int, record: Record) -> Record:
    row: Record = {"step": step}
    row |= {key: record[key] if isinstance(record.get(key), str) else None for key in _TEXTS}
    row["phase"] = row["phase"] or "memorization"
    row |= {key: finite(record.get(key)) for key in _NUMBERS}
    row |= {key: finite(table(record, "measures").get(key)) for key in MEASURES}
    return row | {key: finite(table(record, key).get("cosine")) for key in ("alignment", "parameter_alignment")}


def finite(value: Any) -> float:
    """A number as it is; NaN for anything else, and for what is beyond a chart."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return float(value) if is_number and abs(value) < 1e38 else math.nan


def table(record: Record, key: str) -> Record:
    """The table of that name; empty where there is none."""
    value = record.get(key)
    return value if isinstance(value, dict) else {}
