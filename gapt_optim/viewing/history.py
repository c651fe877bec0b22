"""A run read back from its files. Nothing beyond the standard library is needed."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

Record = dict[str, Any]


@dataclass(frozen=True)
class RunHistory:
    """One run over its steps."""

    steps: list[Record]
    """Records of ``metrics.jsonl``, by step."""
    validations: list[Record] = field(default_factory=list)
    """Held-out records: ``step`` (steps trained before it), ``loss``, ``entropy``, ``layer_entropy``."""


def read_metrics(path: str | os.PathLike[str]) -> list[Record]:
    """The records of a JSON-lines file in order of step.

    A line that a kill cut short is left out. A step that was taken twice, because the run went on from an
    earlier checkpoint, counts as the later one.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file has text in it, and none of it is a record with a ``step``.
    """
    records: dict[int, Record] = {}
    lines = 0
    with Path(path).open(encoding="utf-8", errors="replace") as file:
        for line in file:
            lines += bool(line.strip())
            try:
                record = json.loads(line)
                records[int(record["step"])] = record
            except (ValueError, KeyError, TypeError):
                continue
    # One unreadable line may be all that a run killed in its first step has written.
    if lines > 1 and not records:
        raise ValueError(f"{path} holds no metrics: expected one JSON object with a step on each line")
    return [records[step] for step in sorted(records)]


def read_run(folder: str | os.PathLike[str]) -> RunHistory:
    """A run from its folder: ``metrics.jsonl`` and, where there is one, ``validation.jsonl``.

    Without the second file, the validation losses in the metrics are used.
    """
    steps = read_metrics(Path(folder) / "metrics.jsonl")
    held_out = Path(folder) / "validation.jsonl"
    if held_out.exists():
        return RunHistory(steps, read_metrics(held_out))
    recorded = [
        {"step": record["step"] - 1, "loss": record["validation_loss"]}
        for record in steps
        if record.get("validation_loss") is not None
    ]
    return RunHistory(steps, recorded)


def compression_spans(steps: Iterable[Record]) -> list[tuple[int, int]]:
    """First and last step of each stretch of compression."""
    spans: list[tuple[int, int]] = []
    for record in steps:
        if record.get("phase") != "compression":
            continue
        step = int(record["step"])
        if spans and spans[-1][1] == step - 1:
            spans[-1] = (spans[-1][0], step)
        else:
            spans.append((step, step))
    return spans


def values_of(records: Sequence[Record], key: str) -> list[tuple[float, float]]:
    """(step, value) where there is a value."""
    return [(record["step"], record[key]) for record in records if record.get(key) is not None]


def cosines_of(records: Sequence[Record], key: str) -> list[tuple[float, float]]:
    return [
        (record["step"], record[key]["cosine"])
        for record in records
        if record.get(key) is not None and record[key].get("cosine") is not None
    ]


def sign_changes(steps: Sequence[Record]) -> list[int]:
    """The steps at which the activation cosine has another sign than on the step before."""
    cosines = cosines_of(steps, "alignment")
    return [int(step) for (_, before), (step, after) in pairwise(cosines) if before * after < 0]


def last_value(run: RunHistory, key: str) -> float | None:
    """The final held-out value, or the average of the last training steps where none was held out."""
    held_out = values_of(run.validations, key)
    if held_out:
        return held_out[-1][1]
    steps = smoothed(values_of(run.steps, key))
    return steps[-1][1] if steps else None


def smoothed(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """Exponential average over a fiftieth of the run, without the bias of its first value."""
    decay = 1 - 1 / max(1.0, len(points) / 50)
    mean, weight = 0.0, 0.0
    smooth = []
    for step, value in points:
        mean, weight = decay * mean + (1 - decay) * value, decay * weight + (1 - decay)
        smooth.append((step, mean / weight))
    return smooth


def layer_rows(run: RunHistory) -> list[tuple[float, dict[str, float]]]:
    """Layer entropies over steps: of the training steps, or of the validations where those have none."""
    for records in (run.steps, run.validations):
        rows = [(record["step"], record["layer_entropy"]) for record in records if record.get("layer_entropy")]
        if rows:
            return rows
    return []
