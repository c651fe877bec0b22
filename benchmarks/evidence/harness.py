"""Trains what an experiment lacks, in processes of one thread, and keeps one file per finished run.

A run is a task's name and its settings. Its file is named by a hash of both, so a command that is repeated trains
what is missing only, and runs of other settings lie beside each other.
"""

from __future__ import annotations

import ctypes
import hashlib
import importlib
import json
import logging
import multiprocessing
import os
import platform
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from .tasks.settings import TaskSettings

Result = dict[str, Any]

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results"
PACKAGES = ("torch", "transformers", "numpy", "scipy", "gapt_optim")
_PROBE_STEPS = (5, 25)


@dataclass(frozen=True)
class Run:
    """One training run."""

    task: str
    """Module of `benchmarks.evidence.tasks`."""
    settings: TaskSettings

    @property
    def described(self) -> dict[str, Any]:
        """The settings as JSON holds them."""
        plain: dict[str, Any] = json.loads(json.dumps(asdict(self.settings)))
        return plain

    @property
    def key(self) -> str:
        """A name that is the same for the same settings: `text-gapt-300-1f0c..`."""
        return key_of(self.task, self.described)


def key_of(task: str, settings: Mapping[str, Any]) -> str:
    """Of a run with these settings, as JSON holds them."""
    digest = hashlib.sha256(json.dumps([task, settings], sort_keys=True).encode()).hexdigest()[:10]
    return f"{task}-{settings['method'].replace(' ', '_')}-{settings['seed']}-{digest}"


@dataclass(frozen=True)
class Record:
    """A finished run: its settings and what its task measured."""

    task: str
    settings: dict[str, Any]
    result: Result
    seconds: float
    """CPU time of the run."""
    commit: str

    def get(self, name: str) -> Any:
        """A setting, or else what the run ended with."""
        return self.settings[name] if name in self.settings else self.result["final"][name]


class RunFailedError(RuntimeError):
    """Some runs did not finish; the others are kept."""


def train_missing(
    runs: Sequence[Run],
    folder: Path,
    *,
    workers: int,
    say: Callable[[str], None] = print,
    train: Callable[[Run], Record] | None = None,
) -> list[Record]:
    """Train the runs that have no file in ``folder`` and return the records of all, in order.

    Args:
        runs: duplicates are trained once.
        workers: processes; 1 trains in this one.
        say: told the estimate before anything is trained, and each run as it finishes.
        train: for tests; what trains one run.

    Raises:
        RunFailedError: runs raised. The rest was trained and kept first.
        ValueError: a file in ``folder`` holds no finished run of its name.
    """
    folder.mkdir(parents=True, exist_ok=True)
    unique = {run.key: run for run in runs}
    records = {key: record for key, run in unique.items() if (record := _stored(folder, run)) is not None}
    missing = [run for key, run in unique.items() if key not in records]
    say(f"{len(records)} of {len(unique)} runs are there, {len(missing)} to train with {workers} worker(s).")
    if missing and train is None:
        seconds = estimate(missing, records.values())
        say(f"Estimate: {seconds / workers / 60:.0f} minutes ({seconds:.0f} s of CPU time).")
    failures = []
    for run, outcome in _outcomes(missing, train or train_run, workers):
        if isinstance(outcome, Exception):
            failures.append(f"{run.key}: {type(outcome).__name__}: {outcome}")
            say(f"FAILED {failures[-1]}")
            continue
        records[run.key] = outcome
        _store(folder, outcome)
        say(f"[{len(records)}/{len(unique)}] {run.key} {outcome.seconds:.0f} s {_brief(outcome)}")
    if failures:
        raise RunFailedError(f"{len(failures)} of {len(unique)} runs failed:\n  " + "\n  ".join(failures))
    return [records[run.key] for run in runs]


def finished(runs: Sequence[Run], folder: Path) -> list[Record]:
    """The records of those runs that have a file in ``folder``, in order."""
    unique = {run.key: run for run in runs}
    return [record for run in unique.values() if (record := _stored(folder, run)) is not None]


def restore(records: Iterable[Record], folder: Path) -> None:
    """Give records, such as those of committed results, the files in ``folder`` that they lack."""
    folder.mkdir(parents=True, exist_ok=True)
    for record in records:
        if not (folder / f"{key_of(record.task, record.settings)}.json").exists():
            _store(folder, record)


def train_run(run: Run) -> Record:
    """Train one run in this process, with one thread."""
    import torch

    torch.set_num_threads(1)
    keep_freed_memory()
    logging.getLogger("gapt_optim").setLevel(logging.WARNING)  # every switch of every run otherwise
    module = importlib.import_module(f".tasks.{run.task}", __package__)
    started = _cpu_seconds()
    result = module.train(run.settings)
    # In full: a gate of `{}` is the library's defaults, which change from one commit to another.
    result["gate"] = run.settings.config().gate.model_dump(mode="json")
    return Record(run.task, run.described, result, round(_cpu_seconds() - started, 2), commit())


def _cpu_seconds() -> float:
    """Of this process and of the processes that it started and waited for."""
    return sum(os.times()[:4])


def estimate(runs: Sequence[Run], finished: Iterable[Record] = ()) -> float:
    """CPU seconds that ``runs`` will take: from finished runs of their kind, or from a few steps of one."""
    known: dict[tuple[Any, ...], list[float]] = {}
    for record in finished:
        known.setdefault(_kind(record.task, record.settings), []).append(record.seconds)
    total = 0.0
    for run in runs:
        kind = _kind(run.task, run.described)
        if kind not in known:
            known[kind] = [_probe(run)]
        total += statistics.fmean(known[kind])
    return total


def _kind(task: str, settings: Mapping[str, Any]) -> tuple[Any, ...]:
    """Runs of one kind take about the same time: what differs is the seed, the method or its settings."""
    cost = {
        name: value
        for name, value in settings.items()
        if name not in ("seed", "weight", "strength", "lr", "keep_curve", "gate", "kernel", "center")
    }
    return (task, json.dumps(cost, sort_keys=True))


def _probe(run: Run) -> float:
    """Seconds of a whole run, from two short ones: they differ by steps, and end with one evaluation each."""

    def seconds(steps: int) -> float:
        return train_run(Run(run.task, replace(run.settings, steps=steps))).seconds

    seconds(_PROBE_STEPS[0])  # imports and reads what later runs find in memory
    short, long = map(seconds, _PROBE_STEPS)
    per_step = max(0.0, long - short) / (_PROBE_STEPS[1] - _PROBE_STEPS[0])
    evaluations = -(-run.settings.steps // int(getattr(run.settings, "evaluate_every", run.settings.steps)))
    return max(0.0, short - _PROBE_STEPS[0] * per_step) * evaluations + per_step * run.settings.steps


def _outcomes(
    runs: Sequence[Run], train: Callable[[Run], Record], workers: int
) -> Iterator[tuple[Run, Record | Exception]]:
    if workers == 1 or len(runs) <= 1:
        for run in runs:
            try:
                yield run, train(run)
            except Exception as error:
                yield run, error
        return
    # Spawned, not forked: a fork copies the locks of torch's threads, and hangs where one of them is held.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(min(workers, len(runs)), context, _end_with_parent) as pool:
        waiting = {pool.submit(train, run): run for run in runs}
        try:
            for future in as_completed(waiting):
                raised = future.exception()
                if isinstance(raised, BrokenProcessPool):
                    raise RunFailedError("a training process ended by itself; finished runs are kept") from raised
                yield waiting[future], raised if isinstance(raised, Exception) else future.result()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def _end_with_parent() -> None:
    """A worker whose sweep was killed would train on."""

    def wait() -> None:
        parent = multiprocessing.parent_process()
        if parent is not None:
            parent.join()
            os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


def _stored(folder: Path, run: Run) -> Record | None:
    path = folder / f"{run.key}.json"
    if not path.exists():
        return None
    try:
        record = Record(**json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path} holds no finished run ({error}); delete it to train it again") from error
    if (record.task, record.settings) != (run.task, run.described):
        raise ValueError(f"{path} holds a run of other settings; delete it to train it again")
    return record


def _store(folder: Path, record: Record) -> None:
    path = folder / f"{key_of(record.task, record.settings)}.json"
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(asdict(record)) + "\n", encoding="utf-8")
    os.replace(temporary, path)  # a killed process leaves no half a result


def _brief(record: Record) -> str:
    numbers = {k: v for k, v in record.result["final"].items() if isinstance(v, float | int)}
    return " ".join(f"{name}={value:.4g}" for name, value in list(numbers.items())[:9])


# Result files


def write_results(
    name: str, records: Sequence[Record], command: str, folder: Path | None = None, *, planned: int | None = None
) -> Path:
    """Write the committed file of an experiment: settings, versions, command, values and thinned curves."""
    unique = list({json.dumps([r.task, r.settings], sort_keys=True): r for r in records}.values())
    content = {
        "experiment": name,
        "command": command,
        "versions": versions(),
        "planned_runs": len(unique) if planned is None else planned,
        "finished_runs": len(unique),
        "commits": sorted({record.commit for record in unique}),
        "seeds": sorted({record.settings["seed"] for record in unique}),
        "cpu_seconds": round(sum(record.seconds for record in unique)),
        "runs": [
            {"task": r.task, "settings": r.settings, "seconds": r.seconds, "commit": r.commit, "result": thin(r.result)}
            for r in unique
        ],
    }
    folder = RESULTS if folder is None else folder
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.json"
    lines = json.dumps(content, indent=1).splitlines()
    path.write_text("\n".join(_joined_numbers(lines)) + "\n", encoding="utf-8")
    return path


def read_results(name: str, folder: Path | None = None) -> list[Record]:
    """The records of a committed file."""
    content = json.loads(((folder or RESULTS) / f"{name}.json").read_text(encoding="utf-8"))
    return [
        Record(run["task"], run["settings"], run["result"], run["seconds"], run["commit"]) for run in content["runs"]
    ]


def thin(result: Result, points: int = 200) -> Result:
    """The result with 5 significant digits, and curves of at most about ``points`` values that keep the last one."""
    longest = max((len(v) for v in result.get("curve", {}).values()), default=0)
    every = max(1, -(-(longest - 1) // points))
    curve = {
        name: values if len(values) != longest else [*values[:-1][::every], values[-1]]
        for name, values in result.get("curve", {}).items()
    }
    thinned: Result = _rounded({**result, **({"curve": curve} if curve else {})})
    return thinned


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.5g}")
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items()}
    return [_rounded(item) for item in value] if isinstance(value, list | tuple) else value


def _joined_numbers(lines: list[str]) -> Iterator[str]:
    """Lists of numbers on one line, which keeps the files readable and their differences small."""
    row: list[str] | None = None
    for line in lines:
        bare = line.strip()
        if row is not None and (bare in ("]", "],") or _is_number(bare.rstrip(","))):
            row.append(bare)
            if bare in ("]", "],"):
                yield row[0] + " ".join(row[1:-1]) + row[-1]
                row = None
            continue
        if row is not None:
            yield from row[:1]
            row = None
        if bare.endswith("["):
            row = [line]
            continue
        yield line
    if row is not None:
        yield from row


def _is_number(text: str) -> bool:
    with suppress(ValueError):
        float(text)
        return True
    return text in ("null", "true", "false")


def versions() -> dict[str, str]:
    """Of what the numbers depend on."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        with suppress(PackageNotFoundError):
            found[package] = version(package)
    if "gapt_optim" not in found:
        from gapt_optim import __version__

        found["gapt_optim"] = __version__
    return found


def commit() -> str:
    """Of the code that trained, with a `+` where files were changed; `unknown` without git."""
    try:
        head, changed = (
            subprocess.run(["git", *words], cwd=HERE, capture_output=True, text=True, check=True, timeout=20).stdout
            for words in (
                ["rev-parse", "--short=10", "HEAD"],
                ["status", "--porcelain", "--untracked-files=no", "--", "../../gapt_optim", "."],
            )
        )
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return head.strip() + ("+" if changed.strip() else "")


def keep_freed_memory() -> None:
    """Lets this process keep memory that it frees, for the next step: a tenth to a third of a small step on glibc."""
    with suppress(OSError, AttributeError, TypeError):
        allocator = ctypes.CDLL(None)
        allocator.mallopt(-4, 0)  # M_MMAP_MAX of glibc's malloc.h
        allocator.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD


def log(message: str) -> None:
    """A line on stderr, at once."""
    print(time.strftime("%H:%M:%S"), message, file=sys.stderr, flush=True)
