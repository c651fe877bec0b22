"""The forgetting example on tiny settings, and the properties its comparison rests on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import forgetting
import pytest
import torch
from forgetting import Settings

from gapt_optim import EntropyConfig, GAPTConfig, ObjectiveConfig, RepresentationHook
from tests.examples.conftest import Run, read_lines

# What the samples of a window share is their experience: here it may take the entropy down.
pytestmark = pytest.mark.filterwarnings("ignore:the entropy of layer:UserWarning")
METHODS = ("plain", "penalty", "published", "gapt")


def train(folder: Path, method: str = "gapt", **changes: Any) -> dict[str, Any]:
    folder.mkdir()
    return forgetting.train(Settings(**{"steps": 40, "finetune_steps": 10, "seed": 0, **changes}), method, folder)


def order(**changes: Any) -> torch.Tensor:
    settings = Settings(**{"steps": 6, "finetune_steps": 4, **changes})
    return forgetting.batch_order(settings, torch.Generator().manual_seed(0))


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
    mixed, turns = order(), order(order="interleaved")
    assert (mixed[:6, :16] < 500).all()  # P and then N
    assert (mixed[:6, 16:] >= 500).all()
    assert (turns[:6:2] < 500).all()
    assert (turns[1:6:2] >= 500).all()
    for rows in (mixed, turns):
        assert (rows[6:] < 500).all()  # fine-tuning


@pytest.mark.parametrize("method", METHODS)
def test_a_seed_decides_a_run(tmp_path: Path, method: str) -> None:
    first, again = train(tmp_path / "a", method), train(tmp_path / "b", method)
    assert first == again
    assert first["loss"] != train(tmp_path / "c", method, seed=1)["loss"]


def test_the_gate_in_memorization_is_plain_training(tmp_path: Path) -> None:
    assert train(tmp_path / "a", "plain") == train(tmp_path / "b", patience_memorization=1000)


def test_a_penalty_lowers_entropy(tmp_path: Path) -> None:
    plain, pressed = (train(tmp_path / name, name, kernel="linear", steps=200) for name in ("plain", "penalty"))
    assert pressed["entropy"] < 0.7 * plain["entropy"]


def test_separation_is_the_distance_in_units_of_the_spread() -> None:
    torch.manual_seed(0)
    student, p, n = forgetting.make_task()
    with RepresentationHook(student, "hidden") as hook:
        found = forgetting.evaluate(Settings(), student, hook, p, n)
    a, b = (student.hidden(each.test_inputs).detach() for each in (p, n))
    within = ((a - a.mean(0)).square().sum(1).mean() + (b - b.mean(0)).square().sum(1).mean()) / 2
    assert found["separation"] == pytest.approx(((a.mean(0) - b.mean(0)).norm() / within.sqrt()).item(), rel=1e-4)


def test_what_is_forgotten_is_how_much_the_loss_on_n_rose(tmp_path: Path) -> None:
    found = train(tmp_path / "run", "plain", steps=100, finetune_steps=100)
    start, learned, tuned = read_lines(tmp_path / "run" / "validation.jsonl")
    assert (start["step"], learned["step"], tuned["step"]) == (0, 100, 200)
    assert found["forgotten"] == tuned["loss_n"] - learned["loss_n"]
    assert found["forgotten"] > 0
    assert tuned["loss_p"] < learned["loss_p"]
    assert found["separation"] == learned["separation"]


def test_the_settings_reach_the_run() -> None:
    expected = GAPTConfig(entropy=EntropyConfig(kernel="linear", center=False), objective=ObjectiveConfig(weight=0.5))
    assert forgetting.config_of(Settings(kernel="linear", weight=0.5), "gapt") == expected


def test_the_script_leaves_a_comparison(tmp_path: Path, run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    run(forgetting, ["--steps", "24", "--finetune-steps", "6", "--out", str(out), "--methods", "plain", "penalty"])
    said = capsys.readouterr().out
    assert "separation of P and N" in said
    assert "N forgotten, tuned on P" in said
    runs = json.loads((out / "results.json").read_text())["runs"]
    assert (runs["plain"]["compression_share"], runs["penalty"]["compression_share"]) == (0, 1)
    assert (out / "training.png").stat().st_size > 1000
    for method in ("plain", "penalty"):
        assert len(read_lines(out / method / "metrics.jsonl")) == 30


@pytest.mark.parametrize("flags", ["--steps 0", "--finetune-steps 0", "--batch-size 1", "--order backwards"])
def test_impossible_settings_are_refused_before_training(tmp_path: Path, run: Run, flags: str) -> None:
    with pytest.raises(SystemExit):
        run(forgetting, [*flags.split(), "--out", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()
