"""Forward passes that no loss comes of, hooks that outlive their optimizer, and layers above frozen ones alone."""

from __future__ import annotations

import gc

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gapt_optim import GAPTConfig, GAPTOptimizer, GateConfig, RepresentationHook
from gapt_optim._capture import store
from gapt_optim._capture.store import MOST_WAITING

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


def test_the_latest_call_of_a_branch_that_the_loss_does_not_use_counts() -> None:
    found = []
    for stray in (False, True):
        torch.manual_seed(0)
        model = Branching()
        hook = RepresentationHook(model, ["stem", "branch"])
        optimizer = GAPTOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), hook, COMPRESSION)
        if stray:
            loss_of(model, seed=2, factor=50.0)
        optimizer.backward(loss_of(model))
        optimizer.step()
        assert optimizer.metrics is not None
        found.append(optimizer.metrics.layer_entropy)
    assert found[0] == found[1]


def test_passes_without_a_loss_are_not_kept_forever() -> None:
    model, optimizer = build()

    def kept_after(passes: int) -> set[int]:
        for _ in range(passes):
            loss_of(model)
        return {len(calls) for calls in optimizer.hook._store.calls.values()}

    for _ in range(2):
        assert kept_after(MOST_WAITING) == {MOST_WAITING}
        optimizer.discard_step()
    assert kept_after(MOST_WAITING) == {MOST_WAITING}
    with pytest.warns(UserWarning, match=r"no optimizer\.backward") as told:
        loss_of(model)
    assert told[0].filename == __file__
    assert kept_after(0) == {1}
    assert kept_after(MOST_WAITING - 1) == {MOST_WAITING}
    assert kept_after(1) == {1}  # of which nothing is said again


@pytest.mark.parametrize(("layers", "named"), [(["1"], r'"1", whose'), (["1", "3"], r'"1" \(and 1 more\), whose')])
def test_branches_that_ddp_leaves_out_are_counted(
    layers: list[str], named: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, optimizer = build()
    loss = loss_of(model)
    taken = {name: optimizer.hook._store.calls[name] for name in layers}
    monkeypatch.setattr(store, "nodes_averaged_by_ddp", lambda loss: set())
    with pytest.raises(RuntimeError, match=named):
        store._refuse_branches_that_ddp_leaves_out(loss, taken)


def test_passes_that_were_differentiated_past_the_wrapper_are_not_kept() -> None:
    model, optimizer = build()
    for _ in range(3):
        loss_of(model).backward()
        assert {len(calls) for calls in optimizer.hook._store.calls.values()} == {1}


def test_a_hook_is_free_again_when_its_optimizer_is_gone() -> None:
    model, optimizer = build()
    hook = optimizer.hook
    del optimizer
    gc.collect()
    loss_of(model)
    assert not any(hook._store.calls.values())
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
    optimizer.backward(loss)
    with pytest.raises(RuntimeError, match="add them and call objective or backward once"):
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
