"""A run read back from its folder, as DataFrames."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from pandas import DataFrame, Series

from .records import Record, Records


@dataclass(frozen=True, eq=False)
class Run:
    """One run over its steps.

    >>> run = Run.of([{"step": 1, "phase": "memorization", "loss": 2.0}])
    >>> float(run.steps.loss[1])
    2.0
    """

    steps: DataFrame
    """By step: ``phase``, ``next_phase``, ``reason`` (of a switch), ``loss``, ``entropy``, ``linear_entropy``,
    ``centered_cosine_entropy``, ``norm_ratio``, ``mean_share``, ``entropy_share``, ``alignment`` and
    ``parameter_alignment`` (cosines), ``validation_loss``, ``nonfinite_steps``. NaN where a step does not have it."""
    held_out: DataFrame
    """The same of held-out data, by the steps trained before it."""
    layers: dict[str, DataFrame] = field(default_factory=dict)
    """(steps, layers) of ``entropy``, of each measure, and of the ``cosine`` of the gradients; only what there is."""
    settings: Record = field(default_factory=dict)
    """What the run was made with, from its ``settings.json``."""
    notes: tuple[str, ...] = ()
    """What a reader must know: lines that could not be read, a run that had not ended."""

    @property
    def end(self) -> int:
        """The last step that there is something of; 1 where there is none."""
        return max([int(frame.index[-1]) for frame in (self.steps, self.held_out) if len(frame)], default=1)

    def has(self, column: str) -> bool:
        """Some step or some validation has it."""
        return bool(self.steps[column].notna().any() or self.held_out[column].notna().any())

    @classmethod
    def of(cls, steps: Sequence[Record], held_out: Sequence[Record] = (), settings: Record | None = None) -> Run:
        """A run from records like those of ``metrics.jsonl`` and ``validation.jsonl``."""
        metrics, validations = Records(Path("metrics.jsonl")), Records(Path("validation.jsonl"))
        for file, records in ((metrics, steps), (validations, held_out)):
            for record in records:
                file.add(json.dumps(record).encode())
        return _run(metrics, validations, settings or {}, ())


def read_run(folder: str | os.PathLike[str]) -> Run:
    """A run from its folder: ``metrics.jsonl`` and, where they are, ``validation.jsonl`` and ``settings.json``.

    A line that a kill cut short is left out. Where the run went on from an earlier checkpoint, so that a step comes
    again, what was written before from that step on is left out. Without ``validation.jsonl``, the validation losses in
    the metrics are used.

    >>> Path("run").mkdir()
    >>> written = Path("run/metrics.jsonl").write_text('{"step": 1, "loss": 2.0}\\n')
    >>> float(read_run("run").steps.loss[1])
    2.0

    Raises:
        FileNotFoundError: the folder has no ``metrics.jsonl``.
        ValueError: ``metrics.jsonl`` has text in it, and none of it is a record with a ``step``.
    """
    folder = Path(folder)
    metrics = Records(folder / "metrics.jsonl").read_to_the_end()
    held_out = Records(folder / "validation.jsonl")
    notes: list[str] = []
    settings = _read_settings(folder / "settings.json", notes)
    notes += metrics.notes()
    if held_out.path.exists():
        notes += held_out.read_to_the_end().notes()
    return _run(metrics, held_out, settings, tuple(notes))


def _run(metrics: Records, held_out: Records, settings: Record, notes: tuple[str, ...]) -> Run:
    steps, validations = metrics.frame(), held_out.frame()
    if validations.empty:
        losses = steps.validation_loss.dropna()
        validations = DataFrame({"loss": losses}).reindex(columns=validations.columns)
        validations.index = losses.index - 1  # it was recorded before that step
    return Run(steps, validations, metrics.layers() or held_out.layers(), settings, notes)


def _read_settings(path: Path, notes: list[str]) -> Record:
    if not path.exists():
        return {}
    try:
        found = json.loads(path.read_text(encoding="utf-8-sig", errors="replace"))
        flat(found)
    except (ValueError, AttributeError, RecursionError, OSError):
        notes.append(f"{path.name} could not be read")
        return {}
    if not found:
        notes.append(f"{path.name} is empty")
    return dict(found)


def flat(settings: Record, prefix: str = "") -> Record:
    """Tables within tables as one, with dots between their names.

    >>> flat({"gate": {"frozen": True}, "lr": 0.1})
    {'gate.frozen': True, 'lr': 0.1}
    """
    found: Record = {}
    for key, value in settings.items():
        found |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) and value else {f"{prefix}{key}": value}
    return found


def find_runs(specs: Sequence[str]) -> dict[str, list[Run]]:
    """Runs by name, from folders of runs, folders that hold folders of runs, and NAME=FOLDER.

    >>> Path("runs/gapt").mkdir(parents=True)
    >>> written = Path("runs/gapt/metrics.jsonl").write_text('{"step": 1, "loss": 2.0}\\n')
    >>> list(find_runs(["runs", "mine=runs/gapt"]))
    ['gapt', 'mine']

    Raises:
        ValueError: a folder is not there or holds no run.
        OSError: a file cannot be read.
    """
    if not specs:
        raise ValueError("give the folder of at least one run")
    found: dict[str, list[Run]] = {}
    for spec in specs:
        name, equals, rest = spec.partition("=")
        named = bool(equals) and not Path(spec).exists()
        folder = check_folder(Path(rest if named else spec))
        folders = {name if named else folder.resolve().name: folder}
        if not (folder / "metrics.jsonl").exists():
            children = sorted(folder.iterdir(), key=lambda child: (child.name != "plain", child.name))
            inside = {child.name: child for child in children if (child / "metrics.jsonl").is_file()}
            if not inside:
                raise ValueError(f"the folder {str(folder)!r} has no metrics.jsonl: no run wrote there")
            folders = {f"{name}/{child}" if named else child: path for child, path in inside.items()}
        for run, path in folders.items():
            found.setdefault(run, []).append(read_run(path))
    return found


def each_seed(runs: Mapping[str, Sequence[Run]]) -> Iterator[tuple[str, str, Run]]:
    """Every run of several, with its name and, where there are seeds, which one it is."""
    for name, seeds in runs.items():
        for i, run in enumerate(seeds):
            yield name, f", seed {i + 1}" if len(seeds) > 1 else "", run


def check_folder(path: Path) -> Path:
    """The path, if it is a folder. Raises ValueError."""
    if path.is_file():
        raise ValueError(f"{str(path)!r} is a file; give the folder of the run, {str(path.parent)!r}")
    if not path.is_dir():
        raise ValueError(f"there is no folder {str(path)!r}")
    return path


def compression_spans(steps: DataFrame) -> list[tuple[int, int]]:
    """First and last step of each stretch of compression.

    >>> compression_spans(Run.of([{"step": step, "phase": "compression"} for step in (3, 4, 5)]).steps)
    [(3, 5)]
    """
    inside = np.concatenate([[0], (steps.phase == "compression").to_numpy(dtype=int), [0]])
    begins, ends = np.flatnonzero(np.diff(inside) == 1), np.flatnonzero(np.diff(inside) == -1) - 1
    return [(int(steps.index[begin]), int(steps.index[end])) for begin, end in zip(begins, ends, strict=True)]


def of_interest(runs: Mapping[str, Run]) -> str | None:
    """The run whose phases are shown: the last that compressed; None where none did."""
    compressed = [name for name, run in runs.items() if (run.steps.phase == "compression").any()]
    return compressed[-1] if compressed else None


def switches(steps: DataFrame) -> DataFrame:
    """The steps after which the phase switched: ``next_phase`` and ``reason``."""
    return steps.loc[steps.reason.notna(), ["next_phase", "reason"]]


def share_in_compression(steps: DataFrame) -> float:
    """Of the steps; NaN where there are none."""
    return float((steps.phase == "compression").mean())


def smoothed(values: Series, part: int = 50) -> Series:
    """Mean over what lies around each value: a fiftieth of what is there, or another part of it; at least five."""
    there = values.dropna()
    return there.rolling(max(5, len(there) // part), center=True, min_periods=1).mean()


def last_value(run: Run, column: str) -> float:
    """The final held-out value, or the average of the last training steps where none was held out; NaN for none."""
    held_out = run.held_out[column].dropna()
    values = held_out if len(held_out) else smoothed(run.steps[column])
    return float(values.iloc[-1]) if len(values) else float("nan")


def mean_of_last(seeds: Sequence[Run], column: str) -> float:
    """The mean of :func:`last_value` over the seeds that have one."""
    return float(Series([last_value(run, column) for run in seeds]).mean())


def pressed_entropy(run: Run) -> str:
    """What the run's entropy is of: as its settings say, or as its numbers show.

    >>> pressed_entropy(Run.of([{"step": 1}], settings={"entropy": {"kernel": "cosine", "center": True}}))
    'cosine kernel, centred'
    """
    entropy = section_of(run.settings, "entropy")
    if isinstance(entropy.get("kernel"), str):
        centred = ", centred" if entropy.get("center") else ""
        order = "" if entropy.get("alpha", 2) == 2 else f", order {entropy['alpha']}"
        window = entropy.get("window", "")
        rows = ", whole sequences" if window is None else f", windows of {window}" if window else ""
        return f"{entropy['kernel']} kernel{centred}{order}{rows}"
    for column, kernel in (("centered_cosine_entropy", "cosine kernel, centred"), ("linear_entropy", "linear kernel")):
        if is_pressed(run, column):
            return kernel
    return ""


def is_pressed(run: Run, column: str) -> bool:
    """The run's entropy is this one, at every step and validation that has both."""
    for frame in (run.steps, run.held_out):
        both = frame[["entropy", column]].dropna()
        if not np.allclose(both["entropy"], both[column], rtol=1e-4, atol=1e-6):
            return False
    return run.has(column)


def is_again(run: Run, column: str) -> bool:
    """The column is the run's pressed entropy under its other name, or nothing: to show it would show it twice."""
    return column in ("linear_entropy", "centered_cosine_entropy") and (is_pressed(run, column) or not run.has(column))


def section_of(settings: Record, section: str) -> Record:
    """The table of that name in a run's settings, however deep it lies; empty where there is none."""
    value = settings.get(section)
    if isinstance(value, dict):
        return value
    inner = (section_of(value, section) for value in settings.values() if isinstance(value, dict))
    return next(filter(None, inner), {})
