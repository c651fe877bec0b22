"""Forward passes that no loss comes of, hooks that outlive their optimizer, and layers above frozen ones alone."""

from __future__ import annotations

import gc

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gapt_optim import GAPTConfig, GAPTOptimizer, GateConfig, RepresentationHook
from gapt_optim.passes import MOST_LOOSE, Pass, nodes_behind

COMPRESSION = GAPTConfig(gate=GateConfig(initial_phase="compression", frozen=True))


def build(*, frozen: bool = False) -> tuple[nn.Module, GAPTOptimizer]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(10, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 3))
    model[0].requires_grad_(not frozen)
    base = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    return model, GAPTOptimizer(base, RepresentationHook(model, ["1"] if frozen else ["1", "3"]), COMPRESSION)


def loss_of(model: nn.Module, seed: int = 1, factor: float = 1.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    x, y = torch.randn(64, 10, generator=generator), torch.randint(0, 3, (64,), generator=generator)
    return F.cross_entropy(model(x * factor), y)


@pytest.mark.parametrize("factor", [50.0, float("nan"), float("inf")])
def test_a_pass_whose_loss_is_thrown_away_does_not_reach_the_step(factor: float) -> None:
    model, optimizer = build()
    other, reference = build()
    loss_of(model, seed=2, factor=factor)
    for each, wrapped in ((model, optimizer), (other, reference)):
        wrapped.backward(loss_of(each))
        wrapped.step()
    assert optimizer.metrics is not None
    assert reference.metrics is not None
    assert optimizer.metrics.layer_entropy == reference.metrics.layer_entropy
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), other.parameters(), strict=True))


class Branching(nn.Module):
    """With a branch that the loss does not use."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.branch, self.head = nn.Linear(10, 6), nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.stem(x))
        self.branch(h)
        found: Tensor = self.head(h)
        return found


@pytest.mark.parametrize("phase", ["memorization", "compression"])
def test_a_branch_that_the_loss_does_not_use_is_neither_judged_nor_pressed(phase: str) -> None:
    model = Branching()
    hook = RepresentationHook(model, ["stem", "branch"])
    config = GAPTConfig(gate=GateConfig(initial_phase=phase, frozen=True))
    optimizer = GAPTOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), hook, config)
    loss = loss_of(model)
    optimizer.backward(loss)
    with pytest.warns(UserWarning, match=r'the loss does not use the output of layer "branch"'):
        optimizer.step()
    assert optimizer.metrics is not None
    assert list(optimizer.metrics.layer_entropy) == ["stem"]
    assert model.branch.weight.grad is None
    optimizer.zero_grad()
    loss = loss_of(model)
    optimizer.backward(loss)
    optimizer.step()  # told once


def kept(optimizer: GAPTOptimizer) -> list[Pass]:
    return [each for each in optimizer.hook.watching.passes.all() if each.captures]


def test_passes_without_a_loss_are_not_kept() -> None:
    """Neither is their graph: it goes with the last thing of the user's that needs it."""
    model, optimizer = build()
    for _ in range(5):
        loss = loss_of(model)
        assert len(kept(optimizer)) == 1
    out = model(torch.randn(64, 10))
    assert len(kept(optimizer)) == 2
    del loss
    assert len(kept(optimizer)) == 1
    del out
    assert kept(optimizer) == []


def test_a_pass_that_raises_is_not_kept() -> None:
    model, optimizer = build()
    with pytest.raises(RuntimeError, match="shapes"):
        model(torch.randn(64, 11))
    model[4].weight.data = torch.zeros(3, 5)
    with pytest.raises(RuntimeError, match="shapes"):
        model(torch.randn(64, 10))
    assert kept(optimizer) == []
    assert optimizer.hook.watching.passes.open is None


def test_calls_outside_of_the_model_are_kept_up_to_a_number() -> None:
    model, optimizer = build()
    for _ in range(MOST_LOOSE + 5):
        model[1](torch.randn(4, 16, requires_grad=True))
    assert sum(len(each.captures) for each in kept(optimizer)) == MOST_LOOSE
    optimizer.discard_step()
    optimizer.backward(loss_of(model))
    optimizer.step()
    assert kept(optimizer) == []


def test_two_passes_of_one_loss_and_two_losses_of_two_passes() -> None:
    """In whatever order the losses come."""
    found = []
    for order in ("sum", "forwards", "backwards"):
        model, optimizer = build()
        losses = [loss_of(model, seed=2), loss_of(model, seed=3)]
        if order == "sum":
            optimizer.backward((losses[0] + losses[1]) / 2, scaled_by=0.5)
        for loss in {"sum": [], "forwards": losses, "backwards": losses[::-1]}[order]:
            optimizer.backward(loss, scale=0.5)
        optimizer.step()
        assert optimizer.metrics is not None
        found.append([optimizer.metrics.layer_entropy["1"], optimizer.metrics.layer_entropy["3"]])
    assert found[0] == pytest.approx(found[1])
    assert found[1] == pytest.approx(found[2])


def test_nodes_behind_a_loss() -> None:
    model, _ = build()
    loss = loss_of(model)
    names = {type(node).__name__ for node in nodes_behind(loss)}
    assert {"NllLossBackward0", "AddmmBackward0", "AccumulateGrad"} <= names


def test_passes_that_were_differentiated_past_the_wrapper_are_not_kept() -> None:
    model, optimizer = build()
    for _ in range(3):
        loss_of(model).backward()
        assert kept(optimizer) == []


def test_a_hook_is_free_again_when_its_optimizer_is_gone() -> None:
    model, optimizer = build()
    hook = optimizer.hook
    del optimizer
    gc.collect()
    loss = loss_of(model)
    assert [each for each in hook.watching.passes.all() if each.captures] == []
    del loss
    again = GAPTOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), hook)
    again.backward(loss_of(model))
    again.step()
    assert again.metrics is not None


def test_layers_above_frozen_parameters_alone_are_measured_and_not_pushed() -> None:
    model, optimizer = build(frozen=True)
    plain, _ = build(frozen=True)
    with pytest.warns(UserWarning, match='the entropy of layer "1" has no gradient, as everything below is frozen'):
        optimizer.backward(loss_of(model))
    loss_of(plain).backward()
    pairs = zip(model.parameters(), plain.parameters(), strict=True)
    assert all(p.grad is q.grad is None or torch.equal(p.grad, q.grad) for p, q in pairs)
    optimizer.step()
    assert optimizer.metrics is not None
    assert optimizer.metrics.entropy is not None
    assert optimizer.metrics.entropy > 0


def test_a_second_loss_of_one_pass_is_explained() -> None:
    model, optimizer = build()
    loss = loss_of(model)
    optimizer.backward(loss, retain_graph=True)
    with pytest.raises(RuntimeError, match="where a forward pass has several losses, add them"):
        optimizer.backward(loss)


def test_statistics_of_an_abandoned_backward_are_not_counted() -> None:
    model, optimizer = build()
    other, reference = build()
    optimizer.backward(loss_of(model, seed=3), scale=1000.0)
    optimizer.zero_grad()
    optimizer.load_state_dict(optimizer.state_dict())
    for each, wrapped in ((model, optimizer), (other, reference)):
        wrapped.backward(loss_of(each))
        wrapped.step()
    assert optimizer.metrics is not None
    assert reference.metrics is not None
    assert optimizer.metrics.alignment == reference.metrics.alignment
