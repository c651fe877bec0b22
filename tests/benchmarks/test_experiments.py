"""Every experiment in miniature, and the command."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from benchmarks.evidence import __main__ as command
from benchmarks.evidence import harness
from benchmarks.evidence.experiments import NAMES, load, trainability
from benchmarks.evidence.harness import Record, Run, train_run
from benchmarks.evidence.tasks import barrier
from benchmarks.evidence.tasks.settings import METHODS
from benchmarks.evidence.tasks.trainability import Alphabets

TINY: dict[str, dict[str, Any]] = {
    "text": {"corpus": "sotu", "train_bytes": 5000, "blocks": 2, "width": 16, "heads": 2, "context": 32, "batch": 8,
             "steps": 4, "evaluate_every": 2, "evaluate_sequences": 4},
    "multiplication": {"blocks": 2, "width": 16, "heads": 2, "context": 64, "batch": 4, "steps": 4,
                       "evaluate_every": 2, "evaluate_tokens": 600},
    "conflict": {"steps": 4},
    "loops": {"steps": 2},
    "example": {"steps": 2},
    "trainability": {"steps": 4, "tasks": 2, "batch": 4, "width": 8},
}  # fmt: skip
TINY["use"] = TINY["barrier"] = TINY["text"]
TINY["cycle"] = {**TINY["text"], "steps": 12, "measure_every": 1, "micro_batches": 4}


def small(run: Run) -> Run:
    changes = dict(TINY[run.task])
    if run.task == "multiplication":  # half and twice stay so
        changes["batch"] = {True: 4, False: 2}[run.settings.batch >= 8] * (1 + (run.settings.batch > 8))  # type: ignore[attr-defined]
    return Run(run.task, replace(run.settings, **changes))


@pytest.fixture(scope="module")
def miniature() -> Any:
    """Records of one seed of an experiment, trained once in this module, on text that a package has."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Alphabets, "CORPUS", "sotu")
        yield _trained()


def _trained() -> Any:
    trained: dict[str, Record] = {}

    def of(name: str) -> list[Record]:
        runs = load(name).runs(True, [300])
        if len(runs) > 30:  # a grid: some points of it
            runs = [run for i, run in enumerate(runs) if run.settings.method == "plain" or i % 18 == 0]
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
    if name == "trainability":  # tunes and compares in one
        seeds -= set(trainability.TUNING_SEEDS)
    tuning = name in ("gate", "pressing") or (name == "text" and seeds <= {0, 1})
    assert all(seed < 10 for seed in seeds) if tuning else all(seed >= 300 for seed in seeds)
    if not (first_look or tuning or name == "kernels"):
        assert len(seeds) >= 5


@pytest.mark.parametrize("task", ["text", "conflict", "multiplication"])
@pytest.mark.parametrize("method", METHODS)
def test_every_method_trains_and_starts_alike(task: str, method: str) -> None:
    from importlib import import_module

    module = import_module(f"benchmarks.evidence.tasks.{task}")
    settings = module.Settings(**TINY[task], method=method, weight=0.05)
    once, again = (train_run(Run(task, settings)).result for _ in range(2))
    assert once == again
    plain = train_run(Run(task, replace(settings, method="plain", weight=0.0))).result
    if method not in ("penalty", "published often"):  # too few steps for a gate to switch
        assert once["final"]["loss"] == plain["final"]["loss"]
    if method == "penalty":
        assert once["final"]["compression"] == 1.0
        assert once["final"]["loss"] != plain["final"]["loss"]


def test_the_gate_per_micro_batch_moves_several_times_a_step() -> None:
    from benchmarks.evidence.tasks import conflict, text

    gate = {"patience_memorization": 3, "patience_compression": 100, "min_improvement": 0.99, "spike_tolerance": 100.0}
    for module, task, calls in ((text, "text", 8), (conflict, "conflict", 2)):
        steps = 6
        s = module.Settings(**{**TINY[task], "steps": steps}, method="published often", weight=0.1, gate=gate)
        final = train_run(Run(task, s)).result["final"]
        # Compression begins after 4 updates at most, the first of which sets the minima.
        assert final["compression"] >= 1 - 5 / (calls * steps)
        assert final["switches"] == 1


@pytest.mark.parametrize("preconditioned", [False, True])
@pytest.mark.parametrize("opposed", [False, True])
def test_the_barrier_keeps_the_descent_of_the_loss(opposed: bool, preconditioned: bool) -> None:
    torch.manual_seed(0)
    weights = nn.Parameter(torch.randn(5, dtype=torch.float64))
    base = torch.optim.Adam([weights])
    g, d = torch.randn(2, 5, dtype=torch.float64)
    scale = torch.ones_like(g)
    if preconditioned:
        base.state[weights]["exp_avg_sq"] = torch.rand(5, dtype=torch.float64)
        scale = 1 / (base.state[weights]["exp_avg_sq"].sqrt() + 1e-8)
    if ((g * scale * d).sum() < 0) != opposed:
        d = -d
    s = barrier.Settings(weight=1e9, descent=0.8, preconditioned=preconditioned)
    weight = barrier.Barrier(base, s).allowed((weights * g).sum(), (weights * d).sum())
    if opposed:
        kept = (g * scale * (g + weight * d)).sum() / (g * scale * g).sum()
        assert float(kept) == pytest.approx(0.8)
    else:
        assert weight == 1e9


def test_tables_are_written_and_checked(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, miniature: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(harness, "RESULTS", tmp_path / "results")
    harness.write_results("conflict", miniature("conflict"), "test", tmp_path / "results")
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


def test_the_command_runs_what_is_asked_and_goes_on(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(harness, "RESULTS", tmp_path)
    conflict = load("conflict")
    few = [small(run) for run in conflict.runs(True, [300])][:3]
    monkeypatch.setattr(conflict, "runs", lambda first_look, seeds: few)
    words = ["run", "conflict", "--first-look", "--runs", str(tmp_path / "runs"), "--workers", "1"]
    assert command.main(words) == 0
    first = capsys.readouterr()
    assert "3 to train" in first.err
    assert "separation" in first.out
    assert command.main(words) == 0
    assert "0 to train" in capsys.readouterr().err
    assert (tmp_path / "conflict-first-look.json").exists()


def test_a_wrong_experiment_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["run", "karnels"]) == 2
    assert capsys.readouterr().err.startswith("error: no experiment 'karnels'")


def test_a_wrong_condition_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["run", "conflict", "--only", "kernal=cosine"]) == 2
    assert "runs have" in capsys.readouterr().err
