"""A run read back from its files. Nothing beyond the standard library is needed."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

Record = dict[str, Any]

LAYER_TABLES = ("layer_entropy", "layer_measures")
"""Fields of a record that hold something per layer, beside ``alignment.layers``."""

MANY_BYTES = 64 << 20
"""Files beyond this keep what is per layer for some thousand steps only, or they would not fit into memory."""

_MOST_LAYER_ROWS = 4000


@dataclass(frozen=True)
class RunHistory:
    """One run over its steps.

    >>> RunHistory([{"step": 1, "phase": "memorization", "loss": 2.0}]).steps[0]["loss"]
    2.0
    """

    steps: list[Record]
    """Records of ``metrics.jsonl``, by step."""
    validations: list[Record] = field(default_factory=list)
    """Held-out records: ``step`` (steps trained before it), ``loss``, ``entropy``, ``layer_entropy``."""
    settings: Record = field(default_factory=dict)
    """What the run was made with, from its ``settings.json``."""
    notes: tuple[str, ...] = ()
    """What a reader must know: lines that could not be read, a run that had not ended."""
    version: str | None = None
    """Version of the library that made it, where the run says so."""


def read_metrics(path: str | os.PathLike[str]) -> list[Record]:
    """The records of a JSON-lines file in order of step.

    A line that a kill cut short is left out. Where the run went on from an earlier checkpoint, so that a step comes
    again, what was written before from that step on is left out.

    >>> written = Path("metrics.jsonl").write_text('{"step": 1, "loss": 2.0}\\n')
    >>> read_metrics("metrics.jsonl")
    [{'step': 1, 'loss': 2.0}]

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file has text in it, and none of it is a record with a ``step``.
    """
    return _read(Path(path))[0]


def read_run(folder: str | os.PathLike[str]) -> RunHistory:
    """A run from its folder: ``metrics.jsonl`` and, where they are, ``validation.jsonl`` and ``settings.json``.

    Without the second file, the validation losses in the metrics are used. Of a file of more than 64 MiB, what is per
    layer is kept for some thousand steps, evenly spaced, and all the rest for each step.

    >>> Path("run").mkdir()
    >>> written = Path("run/metrics.jsonl").write_text('{"step": 1, "loss": 2.0}\\n')
    >>> read_run("run").steps
    [{'step': 1, 'loss': 2.0}]

    Raises:
        FileNotFoundError: the folder has no ``metrics.jsonl``.
        ValueError: ``metrics.jsonl`` holds no metrics.
    """
    folder = Path(folder)
    steps, notes = _read(folder / "metrics.jsonl")
    settings = _read_table(folder / "settings.json", notes)
    if not settings:
        # A method of a comparison, whose settings lie beside the methods' folders.
        shared = read_settings(folder.resolve().parent)
        if folder.resolve().name in methods_of(shared):
            settings = {**shared, "method": folder.resolve().name}
    marker = _read_table(folder / "run.json", notes)
    version = marker.get("version")
    about = (settings, tuple(notes), str(version) if version is not None else None)
    held_out = folder / "validation.jsonl"
    if held_out.exists():
        try:
            validations, more = _read(held_out)
        except ValueError as error:
            validations, more = [], [str(error)]
        return RunHistory(steps, validations, about[0], about[1] + tuple(more), about[2])
    recorded = [
        {"step": record["step"] - 1, "loss": record["validation_loss"]}
        for record in steps
        if record.get("validation_loss") is not None
    ]
    return RunHistory(steps, recorded, *about)


def _read(path: Path) -> tuple[list[Record], list[str]]:
    records: list[Record] = []
    resumed: list[int] = []
    lines = broken = replaced = odd = 0
    every, ended = _thinning(path), True
    with path.open(encoding="utf-8-sig", errors="replace") as file:
        for line in file:
            lines += bool(line.strip())
            ended = line.endswith("\n")
            try:
                record, unusable = read_record(line)
            except ValueError:
                broken += bool(line.strip())
                continue
            step = record["step"]
            odd += unusable
            if every > 1 and step % every:
                _without_layers(record)
            if dropped := drop_from(records, step):
                replaced += dropped
                resumed.append(step)
            records.append(record)
    name = path.name
    # One unreadable line may be all that a run killed in its first step has written.
    if lines > 1 and not records:
        raise ValueError(f"{path} holds no metrics: expected one JSON object with a step on each line")
    cut = not ended and broken > 0
    notes = []
    if not records:
        what = "step" if name == "metrics.jsonl" else "validation"
        notes.append(f"{name} is empty: no {what} was written yet")
    if cut:
        notes.append(f"{name}: the last line is cut off and left out; the run is still writing, or was ended")
    if broken > cut:
        notes.append(f"{name}: {_count(broken - cut, 'line')} could not be read and {_are(broken - cut)} left out")
    if resumed:
        times = "" if len(resumed) == 1 else f"{len(resumed):,} times, last "
        notes.append(
            f"{name}: the run was resumed {times}at step {resumed[-1]:,}; {_count(replaced, 'record')} that "
            f"{'was' if replaced == 1 else 'were'} written before, from there on, {_are(replaced)} left out"
        )
    if odd:
        notes.append(f"{name}: {_count(odd, 'value')} {_are(odd)} left out: not finite, or of an unexpected kind")
    if every > 1:
        notes.append(f"{name} is large: what is shown per layer is of every {every}th step")
    missing = records[-1]["step"] - records[0]["step"] + 1 - len(records) if name == "metrics.jsonl" and records else 0
    if missing:
        notes.append(f"{name}: {_count(missing, 'step')} {_are(missing)} missing between the first and the last")
    phaseless = sum("phase" not in record for record in records) if name == "metrics.jsonl" else 0
    if phaseless:
        notes.append(f"{name}: {_count(phaseless, 'record')} without a phase {_are(phaseless)} shown as memorization")
    measured = sum(bool(record.get("layer_measures")) for record in records)
    entropies = sum(bool(record.get("layer_entropy")) for record in records)
    if name == "metrics.jsonl" and 0 < measured < entropies:
        notes.append(
            f"{name}: {entropies - measured} of {entropies} steps do not hold the other kernel's entropies; they were "
            "written by another version"
        )
    return records, notes


def drop_from(records: list[Record], step: int) -> int:
    """Take the records at or after a step off the end of a list in order of step; how many those were.

    A record of that step comes next: the run went on from an earlier checkpoint, and they are of a branch that ended.

    >>> read = [{"step": 1}, {"step": 2}, {"step": 3}]
    >>> drop_from(read, 2), read
    (2, [{'step': 1}])
    """
    before = len(records)
    while records and records[-1]["step"] >= step:
        records.pop()
    return before - len(records)


def read_record(line: str | bytes) -> tuple[Record, int]:
    """The record of one line, with what is of another kind than ours left out, and how many values that were.

    Raises:
        ValueError: it is no JSON object with a ``step``.
    """
    try:
        record = json.loads(line)
        record["step"] = int(record["step"])
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError):
        raise ValueError("expected a JSON object with a step") from None
    return record, _clean(record)


def _read_table(path: Path, notes: list[str]) -> Record:
    if not path.exists():
        return {}
    try:
        table = json.loads(path.read_text(encoding="utf-8-sig", errors="replace"))
    except (ValueError, RecursionError, OSError):
        table = None
    if not isinstance(table, dict) or _is_deep(table):
        notes.append(f"{path.name} could not be read")
        return {}
    if not table:
        notes.append(f"{path.name} is empty")
    return table


def _is_deep(table: Record) -> bool:
    """Tables within tables beyond what any settings have."""
    level: list[Any] = [table]
    for _ in range(50):
        level = [v for t in level for v in (t.values() if isinstance(t, dict) else t) if isinstance(v, dict | list)]
        if not level:
            return False
    return True


def read_settings(folder: Path) -> Record:
    """A folder's ``settings.json``; empty where there is none, or it cannot be read."""
    return _read_table(folder / "settings.json", [])


def methods_of(settings: Record) -> list[str]:
    """The methods that a comparison runs, in its order, from its settings; empty where they name none."""
    tables = (settings, settings.get("config"))
    found: Any = next((table["methods"] for table in tables if isinstance(table, dict) and "methods" in table), [])
    return [method for method in found if isinstance(method, str)] if isinstance(found, list) else []


def _thinning(path: Path) -> int:
    size = path.stat().st_size
    if size <= MANY_BYTES:
        return 1
    with path.open("rb") as file:
        average = max(1, len(file.read(1 << 20)) // max(1, file.seek(0) or sum(1 for _ in _lines(file, 1 << 20))))
    return max(1, math.ceil(size / average / _MOST_LAYER_ROWS))


def _lines(file: Any, limit: int) -> Iterable[bytes]:
    while file.tell() < limit and (line := file.readline()):
        yield line


_TABLES = (*LAYER_TABLES, "measures", "alignment", "parameter_alignment")
_NUMBERS = ("loss", "entropy", "validation_loss", "entropy_share", "nonfinite_steps")


def _clean(record: Record) -> int:
    """Drop what is of another kind than ours, so that readers need not ask; the number of values dropped."""
    dropped = 0
    for key in _NUMBERS:
        if record.get(key) is not None and not _is_number(record[key]):
            record[key] = None
            dropped += 1
    for key in ("phase", "next_phase", "reason"):
        if record.get(key) is not None and not isinstance(record[key], str):
            record[key] = None
            dropped += 1
    for key in _TABLES:
        if record.get(key) is None:
            continue
        if not isinstance(record[key], dict):
            record[key] = None
            dropped += 1
        else:
            within = ("layers", "parameters") if key.endswith("alignment") else ()
            dropped += _clean_table(record[key], _DEPTHS.get(key, 0), within)
    return dropped


_DEPTHS = {"layer_measures": 1}  # tables within the table


def _clean_table(table: Record, depth: int, tables: Sequence[str] = ()) -> int:
    """Keep numbers, or tables of them where ``depth`` is above 0; in ``tables``, tables of tables."""
    dropped = 0
    for key, value in table.items():
        inner = 2 if key in tables else depth
        if value is None:
            continue
        if isinstance(value, dict) if inner else _is_number(value):
            dropped += _clean_table(value, inner - 1) if inner else 0
        else:
            table[key] = None
            dropped += 1
    return dropped


def _is_number(value: Any) -> bool:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return abs(value) < 1e300  # also not nan: json.loads reads NaN, which is no JSON


def _without_layers(record: Record) -> None:
    for key in LAYER_TABLES:
        record.pop(key, None)
    for key in ("alignment", "parameter_alignment"):
        if record.get(key):
            record[key].pop("layers", None)
            record[key].pop("parameters", None)


def _count(number: int, what: str) -> str:
    return f"{number:,} {what}{'' if number == 1 else 's'}"


def _are(number: int) -> str:
    return "is" if number == 1 else "are"


def compression_spans(steps: Iterable[Record]) -> list[tuple[int, int]]:
    """First and last step of each stretch of compression.

    >>> compression_spans({"step": step, "phase": "compression"} for step in (3, 4, 5, 9))
    [(3, 5), (9, 9)]
    """
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


def switches_of(steps: Iterable[Record]) -> list[tuple[int, str, str]]:
    """(step, next phase, reason) of each step after which the phase switched."""
    return [
        (int(record["step"]), str(record.get("next_phase") or "?"), str(record["reason"]))
        for record in steps
        if record.get("reason")
    ]


def values_of(records: Sequence[Record], key: str) -> list[tuple[float, float]]:
    """(step, value) where there is a value. A dot reaches into a table: ``measures.norm_ratio``."""
    table, _, inner = key.rpartition(".")
    if not table:
        return [(record["step"], record[key]) for record in records if record.get(key) is not None]
    return [
        (record["step"], record[table][inner])
        for record in records
        if record.get(table) and record[table].get(inner) is not None
    ]


def cosines_of(records: Sequence[Record], key: str) -> list[tuple[float, float]]:
    return values_of(records, f"{key}.cosine")


def sign_changes(steps: Sequence[Record]) -> list[int]:
    """The steps at which the activation cosine has another sign than on the step before.

    >>> sign_changes([{"step": i, "alignment": {"cosine": cosine}} for i, cosine in enumerate([0.1, -0.2, -0.1])])
    [1]
    """
    return changes_of_sign(cosines_of(steps, "alignment"))


def changes_of_sign(points: Sequence[tuple[float, float]]) -> list[int]:
    """The steps whose value has another sign than the value before."""
    return [int(step) for (_, before), (step, after) in pairwise(points) if before * after < 0]


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


def layer_rows(run: RunHistory, measure: str = "entropy") -> list[tuple[float, dict[str, float]]]:
    """Something per layer over steps: of the training steps, or of the validations where those have none.

    Args:
        run: the run.
        measure: ``entropy``, one of the ``layer_measures``, or ``cosine`` of the activation alignment.
    """
    for records in (run.steps, run.validations):
        rows = [(record["step"], values) for record in records if (values := _layers_of(record, measure))]
        if rows:
            return rows
    return []


def _layers_of(record: Record, measure: str) -> dict[str, float]:
    if measure == "entropy":
        return record.get("layer_entropy") or {}
    if measure == "cosine":
        tables = (record.get("alignment") or {}).get("layers") or {}
    else:
        tables = record.get("layer_measures") or {}
    return {
        name: table[measure]
        for name, table in tables.items()
        if isinstance(table, dict) and table.get(measure) is not None
    }
