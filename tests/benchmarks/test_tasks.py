"""What tasks train: the author's early gate and steps, the nuclear norm, and problems of multiplication."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from benchmarks.evidence.experiments.published import METHODS, PATIENCE
from benchmarks.evidence.tasks import cut, early, multiplication, text
from gapt_optim import GAPTConfig, GateConfig

from .test_experiments import TINY

SMALL: dict[str, Any] = {**TINY["early"], "layers": {"skip_first": 1, "skip_last": 1}}


def test_the_early_gate_follows_absolute_thresholds() -> None:
    gate = early.Gate(patience=3)
    for loss in (3.0, 2.98, 2.975, 2.971):  # falls by more than 0.01 once
        gate.update(loss, [1.0, 1.0])
        assert not gate.compressing
    gate.update(2.970, [1.0, 1.0])
    assert gate.compressing
    for entropy in (1.0, 0.99, 0.98):  # of one layer alone; a loss far above the old minimum is no spike of this phase
        gate.update(3.5, [1.0, entropy])
        assert gate.compressing
    for _ in range(3):
        gate.update(3.5, [1.0, 0.9795])
    assert not gate.compressing
    assert gate.switches == 2


def test_the_early_gate_ends_compression_at_a_spike_of_its_phase() -> None:
    gate = early.Gate(patience=1)
    for _ in range(2):
        gate.update(2.0, [1.0])
    assert gate.compressing
    gate.update(2.0, [0.9])
    gate.update(2.19, [0.8])
    assert gate.compressing
    gate.update(2.2, [0.7])
    assert not gate.compressing


def test_the_early_protocol_without_compression_is_plain_training() -> None:
    ours = early.train(early.Settings(**SMALL, patience=1000))["final"]
    plain = text.train(text.Settings(**TINY["early"]))["final"]
    assert ours["compression"] == 0
    assert ours["loss"] == ours["twin"] == plain["loss"]


def test_the_early_protocol_alternates_and_its_twin_has_the_steps_of_the_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    def always(gate: early.Gate, loss: float, entropies: list[float]) -> None:
        gate.compressing = True

    monkeypatch.setattr(early.Gate, "update", always)
    final = early.train(early.Settings(**{**SMALL, "steps": 6}))["final"]
    assert final["compression"] == 0.5
    assert final["twin"] == text.train(text.Settings(**{**TINY["early"], "steps": 3}))["final"]["loss"]
    assert final["loss"] != final["twin"]


def test_the_nuclear_norm_is_the_sum_of_singular_values_over_the_root_of_the_size() -> None:
    basis = torch.linalg.qr(torch.randn(8, 8)).Q
    full = basis @ torch.diag(torch.full((8,), 2.0)) @ basis.T
    one = torch.full((8, 8), 2.0)
    assert cut.nuclear_norm([full[None]]).item() == pytest.approx(8 * 2 / 8, rel=1e-5)
    assert cut.nuclear_norm([one[None], full[None]]).item() == pytest.approx((2 + 2) / 2, rel=1e-5)


def test_a_nuclear_norm_that_is_pressed_falls() -> None:
    pressed = cut.train(cut.Settings(**TINY["cut"], method="nuclear", weight=1.0))["final"]
    plain = cut.train(cut.Settings(**TINY["cut"]))["final"]
    assert cut.train(cut.Settings(**TINY["cut"], method="nuclear", weight=0.0))["final"]["loss"] == plain["loss"]
    assert pressed["loss"] != plain["loss"]


def test_problems_are_products_read_from_the_right_and_none_is_trained_and_judged() -> None:
    s = multiplication.Settings(second=2)
    generator = torch.Generator().manual_seed(0)
    seen: dict[bool, set[tuple[int, int]]] = {True: set(), False: set()}
    for held_out in seen:
        problems = multiplication.draw(s, 300, (1, 3), generator, held_out=held_out)
        for ids, mask, positions, targets in zip(*problems, strict=True):
            line = bytes(ids[mask.bool()].tolist()).decode()
            question, answer = line.rstrip("\n").split("=")
            a, b = (int(part[::-1]) for part in question.split("x"))
            assert answer == str(a * b)[::-1]
            assert bytes(targets[targets != multiplication.IGNORED].tolist()).decode() == f"{answer}\n"
            assert positions.diff().unique().tolist() == [1]
            assert positions[-1] < s.context
            seen[held_out].add((a, b))
    assert not seen[True] & seen[False]


def test_a_model_that_knows_the_answers_is_right() -> None:
    s = multiplication.Settings()
    problems = multiplication.draw(s, 16, (5, 6), torch.Generator().manual_seed(0), held_out=True)

    class Oracle(nn.Module):
        def forward(self, input_ids: Tensor, **others: Tensor) -> Any:
            logits = 50 * nn.functional.one_hot(problems.ids[:, 1:], text.BYTES).float()
            return type("Output", (), {"logits": logits})

    found = multiplication.judged(Oracle(), problems)
    assert found["loss"] < 1e-6
    assert found["right"] == found["digits"] == 1


def test_the_late_protocol_that_is_run_is_the_one_that_the_library_calls_published() -> None:
    run = METHODS["late protocol"].settings.config()
    gate = GateConfig.published(patience_memorization=PATIENCE[0], patience_compression=PATIENCE[1])
    assert run == GAPTConfig.published(gate=gate, alignment=run.alignment)
