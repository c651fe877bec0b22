"""Jobs in processes, and sweeps that go on where they were."""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import sweep
from errors import UserError


def train_and_note(settings: dict[str, Any]) -> dict[str, Any]:
    """Notes that it ran, in a file that other processes can write to as well."""
    with Path(settings["log"]).open("a") as log:
        log.write(f"{settings['seed']}\n")
    if settings.get("fails"):
        raise FloatingPointError("loss is nan")
    sweep.advance(settings["steps"])
    return {"loss": settings["seed"] * 2.0}


def make_jobs(folder: Path, count: int = 4, **more: Any) -> list[sweep.Job]:
    log = str(folder / "log.txt")
    return [sweep.Job(f"job-{i}", {"seed": i, "log": log, "steps": 5, **more}, 5) for i in range(count)]


def noted(folder: Path) -> list[str]:
    return sorted((folder / "log.txt").read_text().split())


@pytest.mark.parametrize("workers", [1, 2])
def test_jobs_give_their_results_in_the_order_of_the_jobs(tmp_path: Path, workers: int) -> None:
    results = sweep.run_jobs(train_and_note, make_jobs(tmp_path), tmp_path / "runs", workers=workers, quiet=True)
    assert results == {f"job-{i}": {"loss": i * 2.0} for i in range(4)}
    assert noted(tmp_path) == ["0", "1", "2", "3"]


def test_an_interrupted_sweep_does_not_repeat_finished_jobs(tmp_path: Path) -> None:
    sweep.run_jobs(train_and_note, make_jobs(tmp_path, 2), tmp_path / "runs", workers=1, quiet=True)
    results = sweep.run_jobs(train_and_note, make_jobs(tmp_path, 4), tmp_path / "runs", workers=1, quiet=True)
    assert noted(tmp_path) == ["0", "1", "2", "3"]
    assert list(results) == ["job-0", "job-1", "job-2", "job-3"]
    assert results["job-0"] == {"loss": 0.0}


def test_results_are_kept_when_a_later_job_fails(tmp_path: Path) -> None:
    jobs = make_jobs(tmp_path, 2)
    bad = sweep.Job("bad", {**jobs[0].settings, "fails": True}, 5)
    with pytest.raises(UserError, match=r"bad: loss is nan; try a smaller --lr"):
        sweep.run_jobs(train_and_note, [*jobs, bad], tmp_path / "runs", workers=1, quiet=True)
    assert {path.name for path in (tmp_path / "runs").iterdir()} == {"job-0.json", "job-1.json"}


def wait_for_ever(settings: dict[str, Any]) -> dict[str, Any]:
    (Path(settings["log"]).parent / f"{os.getpid()}.pid").write_text("")
    time.sleep(600)
    return {}


SWEEP = """
import sys, pathlib
sys.path[:0] = {path!r}
import sweep, test_sweep
if __name__ == "__main__":
    folder = pathlib.Path({folder!r})
    sweep.run_jobs(test_sweep.wait_for_ever, test_sweep.make_jobs(folder, 2), folder / "runs", quiet=True)
"""


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="needs SIGKILL")
def test_workers_end_with_a_sweep_that_is_killed(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    folders = [str(Path(sweep.__file__).parent), str(Path(__file__).parent)]
    script.write_text(SWEEP.format(path=folders, folder=str(tmp_path)))
    parent = subprocess.Popen([sys.executable, str(script)])
    wait_until(lambda: len(list(tmp_path.glob("*.pid"))) == 2)
    parent.kill()
    parent.wait()
    workers = [int(path.stem) for path in tmp_path.glob("*.pid")]
    wait_until(lambda: not any(map(alive, workers)))


def alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    status = Path(f"/proc/{process}/stat")  # one that nobody waits for stays as a zombie
    return not status.exists() or status.read_text().rsplit(")", 1)[1].split()[0] != "Z"


def wait_until(condition: Callable[[], bool]) -> None:
    for _ in range(1200):
        if condition():
            return
        time.sleep(0.1)
    raise TimeoutError


def test_a_result_of_other_settings_is_refused_and_named(tmp_path: Path) -> None:
    sweep.run_jobs(train_and_note, make_jobs(tmp_path, 1), tmp_path / "runs", workers=1, quiet=True)
    with pytest.raises(UserError, match=r"job-0\.json: was trained with other settings \(lr\)"):
        sweep.run_jobs(train_and_note, make_jobs(tmp_path, 1, lr=0.1), tmp_path / "runs", workers=1, quiet=True)


def test_a_damaged_result_is_refused_and_named(tmp_path: Path) -> None:
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "job-0.json").write_text('{"settings": ')
    with pytest.raises(UserError, match=r"job-0\.json: is no result of a finished run .* delete it"):
        sweep.run_jobs(train_and_note, make_jobs(tmp_path, 1), tmp_path / "runs", workers=1, quiet=True)


def test_a_folder_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"--out .*: cannot write there .* choose another folder"):
        sweep.claim(tmp_path / "file" / "out")


def test_fingerprints_tell_settings_apart_and_ignore_their_order() -> None:
    assert sweep.fingerprint({"a": 1, "b": 2}) == sweep.fingerprint({"b": 2, "a": 1})
    assert sweep.fingerprint({"a": 1, "b": 2}) != sweep.fingerprint({"a": 1, "b": 3})


def test_methods_are_put_in_order_with_plain_first() -> None:
    options = argparse.Namespace(seeds=1, workers=1, first_seed=0, methods=["gapt", "plain"])
    sweep.check_arguments(options)
    assert options.methods == ["plain", "gapt"]


@pytest.mark.parametrize("name", ["seeds", "workers"])
def test_counts_below_one_are_refused(name: str) -> None:
    options = argparse.Namespace(**{"seeds": 1, "workers": 1, "first_seed": 0, "methods": ["plain"], name: 0})
    with pytest.raises(UserError, match=f"--{name}: needs at least 1, found 0"):
        sweep.check_arguments(options)
