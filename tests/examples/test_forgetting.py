"""The forgetting sweep on tiny settings, and the properties its comparison rests on."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import forgetting
import pytest
import torch
from errors import UserError, exit_code
from methods import METHODS

TINY = ["--steps", "24", "--workers", "1", "--quiet"]


def train(setting: str = "mixed", method: str = "gapt", seed: int = 0, **changes: Any) -> dict[str, Any]:
    settings = asdict(forgetting.Settings(**{"steps": 40, **changes}))
    return forgetting.train({"setting": setting, "method": method, "seed": seed, "settings": settings})


def order(setting: str, steps: int = 10) -> torch.Tensor:
    return forgetting.batch_order(setting, forgetting.Settings(steps=steps), torch.Generator().manual_seed(0))


def test_the_two_teachers_lie_on_both_sides_of_the_student() -> None:
    torch.manual_seed(0)
    student, p, n = forgetting.make_task()
    assert p.inputs.shape == (500, 10)
    assert p.test_answers.shape == (100, 10)
    assert torch.allclose(p.inputs.mean(0), torch.tensor([1.0] * 5 + [0.0] * 5), atol=0.06)
    assert torch.allclose(n.inputs.mean(0), torch.tensor([0.0] * 5 + [1.0] * 5), atol=0.06)
    assert abs(p.inputs.std(0).mean().item() - 0.25) < 0.01
    assert not torch.allclose(student(p.inputs), p.answers)


def test_a_seed_decides_the_task() -> None:
    tasks = []
    for seed in (3, 3, 4):
        torch.manual_seed(seed)
        tasks.append(forgetting.make_task()[2].answers)
    assert torch.equal(tasks[0], tasks[1])
    assert not torch.equal(tasks[0], tasks[2])


def test_a_mixed_batch_holds_p_and_then_n() -> None:
    rows = order("mixed")
    assert (rows[:, :16] < 500).all()
    assert (rows[:, 16:] >= 500).all()


def test_interleaved_batches_take_turns() -> None:
    rows = order("interleaved")
    assert (rows[::2] < 500).all()
    assert (rows[1::2] >= 500).all()


def test_sequential_batches_hold_p_and_later_n() -> None:
    rows = order("sequential")
    assert (rows[:5] < 500).all()
    assert (rows[5:] >= 500).all()


def test_finetune_sees_both_and_later_p_alone() -> None:
    rows = order("finetune")
    assert torch.equal(rows[:5], order("mixed")[:5])
    assert (rows[5:] < 500).all()


@pytest.mark.parametrize("method", METHODS)
def test_a_seed_decides_a_run(method: str) -> None:
    first, again, other = train(method=method), train(method=method), train(method=method, seed=1)
    assert first == again
    assert first["task_loss"] != other["task_loss"]


def test_the_gate_in_memorization_is_plain_training() -> None:
    plain, waiting = train(method="plain"), train(method="gapt", patience_memorization=1000)
    assert plain == waiting


def test_a_penalty_lowers_entropy() -> None:
    assert train(method="penalty", steps=200)["entropy"] < 0.7 * train(method="plain", steps=200)["entropy"]


def test_separation_is_the_distance_in_units_of_the_spread() -> None:
    result = train(steps=20)
    p, n = (torch.tensor(cloud) for cloud in result["clouds"])
    within = ((p - p.mean(0)).square().sum(1).mean() + (n - n.mean(0)).square().sum(1).mean()) / 2
    assert result["separation"] == pytest.approx(((p.mean(0) - n.mean(0)).norm() / within.sqrt()).item(), rel=1e-3)


def test_a_schedule_and_the_objective_reach_the_run() -> None:
    constant = train(method="gapt", steps=200)
    for changes in ({"schedule": "cosine"}, {"combine": "cap", "max_ratio": 0.1}, {"floor": 0.1}):
        assert train(method="gapt", steps=200, **changes)["task_loss"] != constant["task_loss"]
    assert train(method="plain", schedule="cosine")["task_loss"] != train(method="plain")["task_loss"]


def test_entropy_stays_above_a_floor() -> None:
    pressed, held = (train(method="penalty", steps=400, floor=floor)["entropy"] for floor in (0.0, 0.1))
    assert pressed < 0.05 < held


@pytest.mark.parametrize(("setting", "old"), [("sequential", "loss_p"), ("finetune", "loss_n")])
def test_forgetting_is_how_much_the_old_loss_rose(setting: str, old: str) -> None:
    result = train(setting, "plain", steps=200)
    assert result["forgotten_loss"] == result[old]
    assert 0 < result["forgetting"] < result["forgotten_loss"]
    assert "forgetting" not in train("mixed", "plain")


def test_results_of_one_setting(tmp_path: Path) -> None:
    forgetting.run(
        [*TINY, "--seeds", "2", "--tradeoff", "--methods", "plain", "penalty", "gapt", "--out", str(tmp_path)]
    )
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["seeds"] == [100, 101]
    assert set(results["relative"]) == {"penalty", "gapt"}
    for metric in ("separation", "entropy", "task_loss"):
        summary = results["runs"]["gapt"][metric]
        assert len(summary["values"]) == 2
        assert summary["mean"] == pytest.approx(sum(summary["values"]) / 2)
        low, high = results["relative"]["penalty"][metric]["ci95"]
        assert low <= results["relative"]["penalty"][metric]["mean"] <= high
    assert [point["weight"] for point in results["tradeoff"]["gapt"]] == list(forgetting.TRADEOFF_WEIGHTS)
    assert results["tradeoff"]["gapt"][3]["relative"]["separation"] == results["relative"]["gapt"]["separation"]
    assert "| penalty, 0.03 |" in (tmp_path / "table.md").read_text()
    assert results["configuration"]["steps"] == 24
    assert results["configuration"]["gapt"]["penalty"]["gate"]["frozen"] is True
    assert set(results["versions"]) >= {"python", "torch", "gapt_optim"}
    page = (tmp_path / "report.html").read_text()
    assert page.count("data:image/png;base64,") == 2
    assert 'src="http' not in page
    assert (tmp_path / "table.md").exists()


def test_results_of_several_settings(tmp_path: Path) -> None:
    argv = [*TINY, "--seeds", "1", "--settings", "mixed", "sequential", "--methods", "plain", "gapt"]
    results = forgetting.run([*argv, "--out", str(tmp_path)])
    assert set(results["relative"]) == {"mixed", "sequential"}
    assert "forgetting" in results["relative"]["sequential"]["gapt"]
    assert "forgetting" not in results["relative"]["mixed"]["gapt"]


def test_an_interrupted_sweep_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    argv = [*TINY, "--methods", "plain", "--out", str(tmp_path)]
    forgetting.run([*argv, "--seeds", "1"])
    trained, really = [], forgetting.train

    def note(job: dict[str, Any]) -> dict[str, Any]:
        trained.append(job["seed"])
        return really(job)

    monkeypatch.setattr(forgetting, "train", note)
    results = forgetting.run([*argv, "--seeds", "2"])
    assert trained == [101]
    assert len(results["runs"]["plain"]["separation"]["values"]) == 2


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--weight", "-1"], "--weight: .*found -1"),
        (["--patience-memorization", "0"], "--patience-memorization: .*found 0"),
        (["--steps", "1"], "--steps: needs at least 2, found 1"),
        (["--lr", "0"], "--lr: must be positive and finite, found 0"),
        (["--lr", "nan"], "--lr: must be positive and finite, found nan"),
        (["--tradeoff", "--methods", "gapt"], "--tradeoff: compares with plain"),
        (["--schedule", "linear"], "--schedule: must be one of constant, cosine, found linear"),
        (["--combine", "add"], "--combine: .*found 'add'"),
        (["--floor", "-1"], "--floor: .*found -1"),
        (["--seeds", "0"], "--seeds: needs at least 1, found 0"),
    ],
)
def test_impossible_settings_are_refused_before_training(tmp_path: Path, argv: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        forgetting.run([*argv, "--out", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()


def test_an_unwritable_folder_is_refused_before_training(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="--out"):
        forgetting.run([*TINY, "--out", str(tmp_path / "file")])
    assert exit_code(lambda: forgetting.run([*TINY, "--out", str(tmp_path / "file")])) == 2
