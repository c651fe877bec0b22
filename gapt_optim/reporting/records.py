"""The lines of a metrics file, one at a time: what is of another kind than expected is missing, never an error."""

from __future__ import annotations

import json
import math
from typing import Any

Record = dict[str, Any]

MEASURES = ("linear_entropy", "centered_cosine_entropy", "norm_ratio", "mean_share")
TEXTS = ("phase", "next_phase", "reason")
_NUMBERS = ("loss", "entropy", "validation_loss", "entropy_share", "nonfinite_steps")
COLUMNS = ("step", *TEXTS, *_NUMBERS, *MEASURES, "alignment", "parameter_alignment")


def read_line(line: str | bytes) -> tuple[Record, Record]:
    """One line as a flat row with all of :data:`COLUMNS`, and the record that it was made of.

    >>> row, record = read_line('{"step": 1, "loss": 2.0, "alignment": {"cosine": 0.5}}')
    >>> row["loss"], row["alignment"], row["phase"]
    (2.0, 0.5, 'memorization')

    Raises:
        ValueError: it is no JSON object with a ``step``, as a line that a kill cut short.
    """
    try:
        record = json.loads(line)
        step = int(record["step"])
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError):
        raise ValueError("expected a JSON object with a step") from None
    row: Record = {"step": step}
    row |= {key: record[key] if isinstance(record.get(key), str) else None for key in TEXTS}
    row["phase"] = row["phase"] or "memorization"
    row |= {key: finite(record.get(key)) for key in _NUMBERS}
    measures = table(record, "measures")
    row |= {key: finite(measures.get(key)) for key in MEASURES}
    row |= {key: finite(table(record, key).get("cosine")) for key in ("alignment", "parameter_alignment")}
    return row, record


def finite(value: Any) -> float:
    """A number as it is; NaN for anything else, and for what is beyond a chart."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return float(value) if is_number and abs(value) < 1e38 else math.nan


def table(record: Record, key: str) -> Record:
    """The table of that name; empty where there is none."""
    value = record.get(key)
    return value if isinstance(value, dict) else {}


def drop_from(rows: list[Record], step: int) -> int:
    """Take the rows at or after a step off the end of a list in order of step; how many those were.

    A row of that step comes next: the run went on from an earlier checkpoint, and they are of a branch that ended.

    >>> read = [{"step": 1}, {"step": 2}, {"step": 3}]
    >>> drop_from(read, 2), read
    (2, [{'step': 1}])
    """
    before = len(rows)
    while rows and rows[-1]["step"] >= step:
        rows.pop()
    return before - len(rows)
