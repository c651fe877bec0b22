"""The forgetting example on tiny settings, and the properties its comparison rests on."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import forgetting
import pytest
import torch
from forgetting import Config
from gapt_optim.viewing import read_run

from gapt_optim import EntropyConfig, GAPTConfig, GateConfig, ObjectiveConfig, viewing
from gapt_optim.runs import run_script

METHODS = ("plain", "penalty", "published", "gapt")
LINEAR = EntropyConfig(kernel="linear", center=False)


def train(method: str = "gapt", gapt: GAPTConfig | None = None, **changes: Any) -> dict[str, Any]:
    return forgetting.train(Config(**{"steps": 40, "seed": 0, **changes}), gapt or GAPTConfig(), method)


def order(setting: Any, steps: int = 10) -> torch.Tensor:
    return forgetting.batch_order(Config(setting=setting, steps=steps), torch.Generator().manual_seed(0))


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


def test_orders_of_the_experiences() -> None:
    mixed, turns, sequential, finetune = (order(name) for name in ("mixed", "interleaved", "sequential", "finetune"))
    assert (mixed[:, :16] < 500).all()  # P and then N
    assert (mixed[:, 16:] >= 500).all()
    assert (turns[::2] < 500).all()
    assert (turns[1::2] >= 500).all()
    assert (sequential[:5] < 500).all()
    assert (sequential[5:] >= 500).all()
    assert torch.equal(finetune[:5], mixed[:5])
    assert (finetune[5:] < 500).all()


@pytest.mark.parametrize("method", METHODS)
def test_a_seed_decides_a_run(method: str) -> None:
    first, again, other = train(method), train(method), train(method, seed=1)
    assert first == again
    assert first["loss"] != other["loss"]


def test_the_gate_in_memorization_is_plain_training() -> None:
    assert train("plain") == train("gapt", GAPTConfig(gate=GateConfig(patience_memorization=1000)))


@pytest.mark.filterwarnings("ignore:the entropy of layer")
def test_a_penalty_lowers_entropy() -> None:
    gapt = GAPTConfig(entropy=LINEAR, objective=ObjectiveConfig(weight=1.0))
    assert train("penalty", gapt, steps=200)["entropy"] < 0.7 * train("plain", gapt, steps=200)["entropy"]


def test_separation_is_the_distance_in_units_of_the_spread() -> None:
    result = train(steps=20)
    p, n = (torch.tensor(cloud) for cloud in result["clouds"])
    within = ((p - p.mean(0)).square().sum(1).mean() + (n - n.mean(0)).square().sum(1).mean()) / 2
    assert result["separation"] == pytest.approx(((p.mean(0) - n.mean(0)).norm() / within.sqrt()).item(), rel=1e-3)


def test_a_schedule_and_the_objective_reach_the_run() -> None:
    constant = train("penalty", steps=100)
    for objective in ({"combine": "project"}, {"floor": 1.5}):
        changed = GAPTConfig(objective=ObjectiveConfig(**objective))
        assert train("penalty", changed, steps=100)["loss"] != constant["loss"]
    assert train("plain", schedule="cosine")["loss"] != train("plain")["loss"]


@pytest.mark.filterwarnings("ignore:the entropy of layer")  # the kernel that is pressed here can be evaded
def test_entropy_stays_above_a_floor() -> None:
    objectives = [ObjectiveConfig(weight=1.0, floor=floor) for floor in (0.0, 0.1)]
    configs = [GAPTConfig(entropy=LINEAR, objective=objective) for objective in objectives]
    pressed, held = (train("penalty", gapt, steps=400)["entropy"] for gapt in configs)
    assert pressed < 0.05 < held


@pytest.mark.parametrize(("setting", "old"), [("sequential", "loss_p"), ("finetune", "loss_n")])
def test_forgetting_is_how_much_the_old_loss_rose(setting: str, old: str) -> None:
    result = train("plain", setting=setting, steps=200)
    assert result["forgotten_loss"] == result[old]
    assert 0 < result["forgetting"] < result["forgotten_loss"]
    assert "forgetting" not in train("plain")


# What the samples of a window share is their experience: here it may take the entropy down.
@pytest.mark.filterwarnings("ignore:the entropy of layer:UserWarning")
def test_the_script_leaves_a_comparison(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    concluded: dict[str, Any] = {}
    monkeypatch.setattr(viewing, "conclude", lambda folder, methods, facts: concluded.update(facts, methods=methods))
    flags = ["--steps", "24", "--setting", "sequential", "--out", str(tmp_path / "out")]
    monkeypatch.setattr(sys, "argv", ["forgetting.py", *flags, "--methods", "plain", "penalty"])
    forgetting.main()
    assert concluded["methods"] == ("plain", "penalty")
    assert "penalty: separation" in capsys.readouterr().out
    for method in ("plain", "penalty"):
        run = read_run(tmp_path / "out" / method)
        assert len(run.steps) == 24
        assert viewing.figures(run)["forgetting"] > 0


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--gapt.objective.weight -1", "--gapt.objective.weight: Input should be"),
        ("--gapt.gate.patience-memorization 0", "--gapt.gate.patience-memorization: Input should be"),
        ("--steps 1", "--steps: Input should be greater than or equal to 2, found 1"),
        ("--lr 0", "--lr: Input should be greater than 0, found 0.0"),
        ("--lr nan", "--lr: Input should be"),
        ("--schedule linear", "invalid choice 'linear'"),
        ("--gapt.objective.combine add", "invalid choice 'add'"),
        ("--out ", "is empty"),
    ],
)
def test_impossible_settings_are_refused_before_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], flags: str, message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["forgetting.py", *flags.split(" ")])
    with pytest.raises(SystemExit) as ended:
        run_script(forgetting.main)
    assert ended.value.code == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.rglob("settings.json"))
