"""Runs are trained once, kept whole, and written down."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.evidence import harness
from benchmarks.evidence.harness import Record, Run, RunFailedError, train_missing
from benchmarks.evidence.tasks import conflict, text

QUICK = conflict.Settings(steps=3)


def runs_of(seeds: range) -> list[Run]:
    return [Run("conflict", replace(QUICK, seed=seed)) for seed in seeds]


class Trainer:
    """Counts what it is asked to train."""

    def __init__(self, failing: int | None = None) -> None:
        self.trained: list[int] = []
        self.failing = failing

    def __call__(self, run: Run) -> Record:
        self.trained.append(run.settings.seed)
        if run.settings.seed == self.failing:
            raise FloatingPointError("the loss is nan")
        return Record(run.task, run.described, {"final": {"loss": 1.0 * run.settings.seed}}, 1.0, "abc")


def quiet(message: str) -> None:
    pass


def test_a_repeated_command_trains_only_what_is_missing(tmp_path: Path) -> None:
    first, second = Trainer(), Trainer()
    train_missing(runs_of(range(3)), tmp_path, workers=1, say=quiet, train=first)
    records = train_missing(runs_of(range(5)), tmp_path, workers=1, say=quiet, train=second)
    assert first.trained == [0, 1, 2]
    assert second.trained == [3, 4]
    assert [r.result["final"]["loss"] for r in records] == [0.0, 1.0, 2.0, 3.0, 4.0]


def test_a_run_that_is_asked_for_twice_is_trained_once(tmp_path: Path) -> None:
    trainer = Trainer()
    records = train_missing(runs_of(range(2)) * 2, tmp_path, workers=1, say=quiet, train=trainer)
    assert trainer.trained == [0, 1]
    assert len(records) == 4


def test_a_failure_keeps_the_others_and_is_tried_again(tmp_path: Path) -> None:
    with pytest.raises(RunFailedError, match=r"1 of 3 runs failed[\s\S]*the loss is nan"):
        train_missing(runs_of(range(3)), tmp_path, workers=1, say=quiet, train=Trainer(failing=1))
    again = Trainer()
    train_missing(runs_of(range(3)), tmp_path, workers=1, say=quiet, train=again)
    assert again.trained == [1]


def test_a_damaged_file_is_named(tmp_path: Path) -> None:
    (run,) = runs_of(range(1))
    train_missing([run], tmp_path, workers=1, say=quiet, train=Trainer())
    path = tmp_path / f"{run.key}.json"
    path.write_text(path.read_text()[:20])
    with pytest.raises(ValueError, match=f"{run.key}.json holds no finished run"):
        train_missing([run], tmp_path, workers=1, say=quiet, train=Trainer())


def test_a_file_of_other_settings_is_refused(tmp_path: Path) -> None:
    first, other = runs_of(range(2))
    train_missing([first], tmp_path, workers=1, say=quiet, train=Trainer())
    (tmp_path / f"{first.key}.json").rename(tmp_path / f"{other.key}.json")
    with pytest.raises(ValueError, match="other settings"):
        train_missing([other], tmp_path, workers=1, say=quiet, train=Trainer())


@pytest.mark.parametrize(
    "changes", [{"seed": 1}, {"weight": 0.1}, {"gate": {"patience_memorization": 8}}, {"lr": 0.02}], ids=str
)
def test_every_setting_counts_in_the_name(changes: dict[str, object]) -> None:
    assert Run("conflict", replace(QUICK, **changes)).key != Run("conflict", QUICK).key  # type: ignore[arg-type]


def test_processes_give_what_one_process_gives(tmp_path: Path) -> None:
    runs = runs_of(range(2))
    alone = train_missing(runs, tmp_path / "one", workers=1, say=quiet)
    together = train_missing(runs, tmp_path / "two", workers=2, say=quiet)
    assert [r.result for r in alone] == [r.result for r in together]


def test_the_estimate_uses_finished_runs_of_the_same_kind() -> None:
    runs = runs_of(range(4))
    record = Record("conflict", runs[0].described, {}, 7.0, "abc")
    assert harness.estimate(runs, [record]) == pytest.approx(28.0)


def test_the_estimate_of_a_kind_that_never_ran_grows_with_its_steps() -> None:
    long = harness.estimate([Run("conflict", replace(QUICK, steps=100_000))])
    assert long > harness.estimate([Run("conflict", replace(QUICK, steps=1000))]) > 0


def test_results_are_written_and_read_back(tmp_path: Path) -> None:
    result = {"final": {"loss": 1.23456789}, "curve": {"step": [float(i) for i in range(1000)], "loss": [0.1] * 1000}}
    record = Record("conflict", {"seed": 3}, result, 1.0, "abc")
    path = harness.write_results("x", [record, record], "command", tmp_path)
    (found,) = harness.read_results("x", tmp_path)
    assert found.result["final"]["loss"] == 1.2346
    assert len(found.result["curve"]["step"]) <= 201
    assert found.result["curve"]["step"][-1] == 999.0
    content = json.loads(path.read_text())
    assert content["command"] == "command"
    assert content["seeds"] == [3]
    assert {"torch", "scipy", "gapt_optim"} <= set(content["versions"])


def test_committed_results_stand_for_files_that_are_gone(tmp_path: Path) -> None:
    first, second = (Run("conflict", replace(QUICK, seed=seed)) for seed in (1, 2))
    curve = {"step": [float(i) for i in range(1000)]}
    record = Record("conflict", first.described, {"final": {"loss": 0.5}, "curve": curve}, 1.0, "abc")
    harness.write_results("x", [record], "command", tmp_path)
    committed = harness.read_results("x", tmp_path)
    harness.restore(committed, tmp_path / "runs")
    assert harness.finished([first, second], tmp_path / "runs") == committed
    again = harness.write_results("again", committed, "command", tmp_path)
    assert json.loads(again.read_text())["runs"] == json.loads((tmp_path / "x.json").read_text())["runs"]


def test_a_text_run_says_which_file_is_absent(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("GAPT_TEST_DATA", str(tmp_path))
    text.corpus.cache_clear()
    with pytest.raises(FileNotFoundError, match="GAPT_TEST_DATA"):
        text.corpus("fineweb", 1000, 100)
