"""Accelerate's own loop, with a GAPTOptimizer."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator, skip_first_batches
from accelerate.state import AcceleratorState, GradientState, PartialState
from torch import nn
from torch.nn import functional as F
from torch.optim.lr_scheduler import ExponentialLR
from torch.utils.data import DataLoader

from gapt_optim import GAPTConfig, GAPTOptimizer, RepresentationHook, StepMetrics
from gapt_optim.integrations.common import unwrapped
from tests.loops import RESTLESS, Base, Net, adamw, assert_same, batch, loss_of, make_net, matrices_and_rest, weights

BATCHES = 24


@pytest.fixture(autouse=True)
def _no_state_of_other_tests() -> Iterator[None]:
    yield
    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()


def build(base: Callable[[nn.Module], Any], seed: int = 0) -> tuple[Net, GAPTOptimizer, list[StepMetrics]]:
    model, metrics = make_net(seed), []
    hook = RepresentationHook(model, "layers.*")
    return model, GAPTOptimizer(base(model), hook, GAPTConfig(gate=RESTLESS), observers=[metrics.append]), metrics


def the_only(examples: list[Any]) -> Any:
    return examples[0]


class Run:
    """A net on `batch`, prepared and trained as Accelerate's documentation does."""

    def __init__(self, base: Callable[[nn.Module], Any] = adamw, seed: int = 0, **settings: Any) -> None:
        self.accelerator = Accelerator(cpu=True, **settings)
        model, self.gapt, self.metrics = build(base, seed)
        data: Any = [batch(i) for i in range(BATCHES)]
        self.model, self.optimizer, self.scheduler, self.loader = self.accelerator.prepare(
            model, self.gapt, ExponentialLR(self.gapt, 0.95), DataLoader(data, collate_fn=the_only)
        )

    def train(self, first: int = 0, last: int = BATCHES, clip: float = 0.0) -> None:
        for i, (tokens, target) in enumerate(skip_first_batches(self.loader, first), first):
            if i == last:
                break
            with self.accelerator.accumulate(self.model):
                loss = F.cross_entropy(self.model(tokens), target)
                self.accelerator.backward(self.gapt.objective(loss))
                if clip and self.accelerator.sync_gradients:
                    self.accelerator.clip_grad_norm_(self.model.parameters(), clip)
                self.optimizer.step()
                self.scheduler.step()
                self.optimizer.zero_grad()


@pytest.mark.parametrize("base", [adamw, matrices_and_rest])
@pytest.mark.parametrize(("accumulate", "clip"), [(1, 0.0), (3, 0.1)])
def test_trains_as_a_plain_loop_does(base: Callable[[nn.Module], Any], accumulate: int, clip: float) -> None:
    run = Run(base, gradient_accumulation_steps=accumulate)
    run.train(clip=clip)

    model, optimizer, metrics = build(base)
    scheduler = ExponentialLR(optimizer, 0.95)
    for i in range(BATCHES):
        optimizer.backward(loss_of(model, i), scale=1 / accumulate)
        if (i + 1) % accumulate == 0:
            if clip:
                nn.utils.clip_grad_norm_(model.parameters(), clip)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()

    assert len(run.metrics) == BATCHES // accumulate
    assert [(m.phase, m.reason) for m in run.metrics] == [(m.phase, m.reason) for m in metrics]
    assert {m.phase for m in metrics} == {"memorization", "compression"}
    for name, value in weights(run.model).items():
        torch.testing.assert_close(value, model.state_dict()[name], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("base", [adamw, matrices_and_rest])
def test_resumes_bit_equal(tmp_path: Path, base: Base) -> None:
    whole = Run(base)
    whole.train(0, 7)
    whole.accelerator.save_state(str(tmp_path))
    whole.train(7)
    resumed = Run(base, seed=5)
    resumed.accelerator.load_state(str(tmp_path))
    resumed.train(7)
    assert resumed.metrics == whole.metrics[7:]
    assert_same(weights(resumed.model), weights(whole.model))
    assert_same(resumed.optimizer.state_dict(), whole.optimizer.state_dict())


def test_an_overflow_takes_no_step() -> None:
    """A loss scaler on the CPU, as mixed_precision="fp16" sets up on a GPU."""
    accelerator = Accelerator(cpu=True)
    accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    model, gapt, metrics = build(adamw)
    model, optimizer = accelerator.prepare(model, gapt)
    before = weights(model)
    for i in range(3):
        loss = loss_of(model, i)
        accelerator.backward(gapt.objective(loss) * (math.inf if i == 0 else 1.0))
        optimizer.step()
        optimizer.zero_grad()
        if i == 0:
            assert optimizer.step_was_skipped
            assert_same(weights(model), before)
    assert [m.step for m in metrics] == [1, 2]
    assert metrics[-1].loss == pytest.approx(float(loss.detach()))
    assert metrics[0].alignment is not None  # due in the first step
    assert metrics[0].alignment.cosine is not None


@pytest.mark.parametrize("several", [False, True])
def test_the_order_of_wrapping_and_preparing_is_told(several: bool) -> None:
    model = make_net()
    prepared = Accelerator(cpu=True).prepare(adamw(model))
    with pytest.raises(TypeError, match=r"prepared by Accelerate.*wrap first, then prepare.*accelerator\.prepare\("):
        GAPTOptimizer([prepared] if several else prepared, RepresentationHook(model, "layers.*"))


def test_the_wrapper_is_found_inside_the_prepared_optimizer() -> None:
    run = Run()
    assert run.optimizer.optimizer is run.gapt
    assert unwrapped(run.optimizer) is run.gapt
    run.gapt.base.optimizer = adamw(run.model)  # as Lookahead has one
    assert unwrapped(run.optimizer) is run.gapt
    assert unwrapped(adamw(run.model)) is None
