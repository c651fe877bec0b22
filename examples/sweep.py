"""Many small training runs side by side: jobs in processes, stored as they finish, with one progress bar.

A job is a name and settings that JSON can hold; its result is a dictionary that JSON can hold. Each finished job is
one file, so that a sweep that was interrupted goes on with the jobs that are missing.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import multiprocessing
import os
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from errors import StoppedError, UserError
from methods import METHODS
from run_folder import write_json
from tqdm.auto import tqdm

Settings = dict[str, Any]
Result = dict[str, Any]
_steps_done: Any = None  # a counter that all processes of a sweep share


@dataclass(frozen=True)
class Job:
    """One training run."""

    name: str
    """Stem of the file that its result is stored in."""
    settings: Settings
    steps: int
    """Training steps, the unit of the progress bar."""


def advance(steps: int = 1) -> None:
    """To be called by a job as it trains: moves the sweep's progress bar."""
    if _steps_done is not None:
        with _steps_done.get_lock():
            _steps_done.value += steps


def run_jobs(
    train: Callable[[Settings], Result],
    jobs: Sequence[Job],
    folder: Path,
    *,
    workers: int = 2,
    quiet: bool = False,
) -> dict[str, Result]:
    """The result of every job by name, from ``folder`` where it is there, otherwise from ``train``.

    Args:
        train: a function of a module, because processes receive it by name.
        workers: processes of one thread each; 1 trains in this process.

    Raises:
        UserError: ``folder`` holds a result of the same name and other settings.
        StoppedError: Ctrl-C.
    """
    results = {job.name: stored for job in jobs if (stored := _stored(folder, job)) is not None}
    missing = [job for job in jobs if job.name not in results]
    counter = multiprocessing.get_context("spawn").Value("q", 0)
    done = sum(job.steps for job in jobs if job.name in results)
    total = sum(job.steps for job in jobs)
    with tqdm(total=total, initial=done, unit="step", disable=quiet, dynamic_ncols=True) as bar:
        bar.set_postfix_str(f"{len(results)} of {len(jobs)} runs")
        try:
            for job, result in _train_all(train, missing, folder, workers, counter, bar):
                results[job.name] = result
                bar.set_postfix_str(f"{len(results)} of {len(jobs)} runs")
        except (KeyboardInterrupt, StoppedError) as stopped:
            raise StoppedError("Stopped. The same command goes on with the runs that are missing.") from stopped
        bar.update(total - bar.n)
    return {job.name: results[job.name] for job in jobs}


def _train_all(
    train: Callable[[Settings], Result], jobs: Sequence[Job], folder: Path, workers: int, counter: Any, bar: Any
) -> Iterable[tuple[Job, Result]]:
    start = bar.n
    if workers == 1 or len(jobs) <= 1:
        _start_worker(counter)
        try:
            for job in jobs:
                yield job, _train_and_store(train, job, folder)
                bar.update(start + counter.value - bar.n)
        finally:
            _start_worker(None)
        return
    # Spawned, not forked: a fork copies the locks of torch's threads, and hangs where one of them is held.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(min(workers, len(jobs)), context, _start_worker, (counter, 1)) as pool:
        running: dict[Future[Result], Job] = {pool.submit(_train_and_store, train, job, folder): job for job in jobs}
        try:
            while running:
                finished, _ = wait(running, timeout=0.5, return_when=FIRST_COMPLETED)
                bar.update(max(0, start + counter.value - bar.n))
                for future in finished:
                    yield running.pop(future), future.result()
        except BrokenProcessPool as error:
            raise UserError(
                "a training process ended by itself, most likely for want of memory; run the command again with "
                "--workers 1, finished runs are kept"
            ) from error
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def _start_worker(counter: Any, threads: int | None = None) -> None:
    global _steps_done
    _steps_done = counter
    if threads is not None:
        torch.set_num_threads(threads)
        threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """A worker whose sweep was killed would train on, and then wait for jobs for ever."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _train_and_store(train: Callable[[Settings], Result], job: Job, folder: Path) -> Result:
    try:
        result = train(job.settings)
    except FloatingPointError as error:
        raise UserError(f"{job.name}: {error}; try a smaller --lr") from error
    folder.mkdir(parents=True, exist_ok=True)
    write_json(_path(folder, job), {"settings": job.settings, "result": result})
    return result


def _stored(folder: Path, job: Job) -> Result | None:
    path = _path(folder, job)
    if not path.exists():
        return None
    try:
        record = json.loads(path.read_text())
        found, result = record["settings"], record["result"]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: is no result of a finished run ({error}); delete it to train it again") from error
    if found != json.loads(json.dumps(job.settings)):
        differing = [key for key in sorted({*found, *job.settings}) if found.get(key) != job.settings.get(key)]
        raise UserError(
            f"{path}: was trained with other settings ({', '.join(differing)}); give another --out, or the settings "
            "it was trained with"
        )
    stored: Result = result
    return stored


def _path(folder: Path, job: Job) -> Path:
    return folder / f"{job.name}.json"


def claim(folder: Path) -> None:
    """Makes sure before anything is trained that results can be written to ``folder``."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / f".writable-{os.getpid()}"
        probe.write_text("")
        probe.unlink()
    except OSError as error:
        raise UserError(f"--out {folder}: cannot write there ({error.strerror}); choose another folder") from error


def fingerprint(settings: Mapping[str, Any]) -> str:
    """A short name for settings, so that runs of other settings lie beside each other in one folder."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:8]


# The command line


def add_arguments(parser: argparse.ArgumentParser, *, seeds: int, out: str) -> None:
    """What every sweep can be told."""
    group = parser.add_argument_group("sweep")
    group.add_argument("--methods", nargs="+", default=list(METHODS), choices=METHODS, help="(default: all)")
    group.add_argument("--seeds", type=int, default=seeds, help=f"number of seeds (default: {seeds})")
    group.add_argument("--first-seed", type=int, default=100, help="(default: 100; settings were tuned on 0 to 9)")
    group.add_argument("--out", type=Path, default=Path(out), help=f"folder for everything written (default: {out})")
    group.add_argument("--workers", type=int, default=2, help="processes of one thread each (default: 2)")
    group.add_argument("--quiet", action="store_true", help="no progress bar")


def add_settings(parser: argparse.ArgumentParser, defaults: Mapping[str, Any]) -> None:
    """A flag per setting of a run."""
    group = parser.add_argument_group("settings of a run")
    for name, default in defaults.items():
        flag = f"--{name.replace('_', '-')}"
        group.add_argument(flag, type=type(default), default=default, help=f"(default: {default})")


def check_arguments(options: argparse.Namespace) -> None:
    """Refuses what cannot work, and puts ``plain``, which all is compared with, first."""
    for name in ("seeds", "workers"):
        if getattr(options, name) < 1:
            raise UserError(f"--{name}: needs at least 1, found {getattr(options, name)}")
    if options.first_seed < 0:
        raise UserError(f"--first-seed: must not be negative, found {options.first_seed}")
    options.methods = [method for method in METHODS if method in options.methods]
