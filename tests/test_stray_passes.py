"""Forward passes that no loss comes of, hooks that outlive their optimizer, and layers above frozen ones alone."""

from __future__ import annotations

import copy
import gc
from collections import UserDict, defaultdict
from collections.abc import Callable
from dataclasses import InitVar, dataclass
from types import SimpleNamespace
from typing import Any, Literal

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from gapt_optim import AlignmentConfig, GAPTConfig, GAPTOptimizer, GateConfig, RepresentationHook
from gapt_optim.layout import replaced
from gapt_optim.objective import _largest_drop
from gapt_optim.passes import MOST_COMPILED, MOST_LOOSE, Pass, nodes_behind, tensors_in

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
    assert optimizer.hook.watching.passes.current.loose


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


@pytest.mark.parametrize("phase", ["memorization", "compression"])
def test_two_losses_of_one_pass_are_their_sum(phase: Literal["memorization", "compression"]) -> None:
    config = GAPTConfig(gate=GateConfig(initial_phase=phase, frozen=True))
    gradients, metrics = [], []
    for apart in (True, False):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 4))
        optimizer = GAPTOptimizer(torch.optim.SGD(model.parameters()), RepresentationHook(model, "1"), config)
        for step in range(2):
            out = model(torch.randn(64, 8))
            first, second = out.square().mean(), out.exp().mean()
            if not apart:
                optimizer.backward(first + second)
            elif step:
                optimizer.backward(first, retain_graph=True)
                optimizer.backward(second)
            else:
                optimizer.backward(first / 2, retain_graph=True, scaled_by=0.5, scale=2.0)
                with pytest.warns(UserWarning, match="several losses: its entropies go with the first one"):
                    optimizer.backward(second)
            gradients.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
            optimizer.step()
            optimizer.zero_grad()
            metrics.append(optimizer.metrics)
    for i in (0, 1):
        torch.testing.assert_close(gradients[i], gradients[i + 2])
        apart_, together = metrics[i], metrics[i + 2]
        assert apart_ is not None
        assert together is not None
        assert apart_.loss == pytest.approx(together.loss, rel=1e-6)
        assert apart_.entropy == pytest.approx(together.entropy, rel=1e-5)


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


class Stack(nn.Module):
    """Linear layers that know of masks, and can be stopped as a notebook's cell is."""

    def __init__(self, *, checkpointed: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(10, 8)
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(3))
        self.checkpointed = checkpointed
        self.stopped = False

    def body(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = torch.tanh(layer(input=x))
            if self.stopped:
                raise KeyboardInterrupt
        return x

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        x = self.embed(input_ids)
        found: Tensor = checkpoint(self.body, x, use_reentrant=False) if self.checkpointed else self.body(x)
        return found


def tokens() -> tuple[Tensor, Tensor, Tensor]:
    """Ids, and two masks of them."""
    ids = torch.randint(0, 10, (2, 16), generator=torch.Generator().manual_seed(0))
    first, second = torch.ones_like(ids), torch.ones_like(ids)
    first[0, 12:], second[:, 4:] = 0, 0
    return ids, first, second


def deeper(frames: int, function: Callable[[], Tensor]) -> Tensor:
    return function() if frames == 0 else deeper(frames - 1, function)


@pytest.mark.parametrize("frames", [0, 5])
def test_a_pass_that_was_interrupted_leaves_nothing(frames: int) -> None:
    """No hook is called then: the mask of that pass must not be that of later ones."""
    found = []
    for interrupted in (True, False):
        model = Stack()
        optimizer = GAPTOptimizer(torch.optim.SGD(model.parameters()), RepresentationHook(model, "layers.*"))
        ids, _, mask = tokens()
        if interrupted:
            model.stopped = True
            with pytest.raises(KeyboardInterrupt):
                model(ids, mask)
            model.stopped = False
        optimizer.backward(deeper(frames, lambda m=model, i=ids: m(i)).mean())  # type: ignore[misc]
        optimizer.step()
        assert optimizer.metrics is not None
        found.append(optimizer.metrics.layer_entropy)
    assert len(found[0]) == 3
    assert found[0] == found[1]


@pytest.mark.parametrize("every", [0, 1])
def test_a_checkpoint_behind_two_masked_passes(every: int) -> None:
    """A repeated call does not have the mask of its pass, and needs none."""
    gradients, metrics = [], []
    for checkpointed in (True, False):
        model = Stack(checkpointed=checkpointed)
        config = GAPTConfig.penalty(alignment=AlignmentConfig(every=every))
        hook = RepresentationHook(model, "layers.*")
        optimizer = GAPTOptimizer(torch.optim.SGD(model.parameters(), lr=0.0), hook, config)
        ids, first, second = tokens()
        optimizer.backward((model(ids, first) - model(ids, second)).square().mean())
        optimizer.step()
        gradients.append([p.grad for p in model.parameters()])
        metrics.append(optimizer.metrics)
    assert metrics[0] == metrics[1]
    assert all(torch.equal(p, q) for p, q in zip(*gradients, strict=True))  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", ["namespace", "mapping", "none"])
def test_an_output_that_shows_no_tensor(kind: str) -> None:
    """The loss tells by itself which captures it is made of."""
    model = nn.Sequential(nn.Linear(10, 16), nn.ReLU(), nn.Linear(16, 3))
    losses: list[Tensor] = []

    class Wrapping(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = model

        def forward(self, x: Tensor) -> Any:
            found = self.inner(x)
            losses.append(found.square().mean())
            return {"namespace": SimpleNamespace(x=found), "mapping": UserDict(x=found), "none": None}[kind]

    wrapping = Wrapping()
    optimizer = GAPTOptimizer(
        torch.optim.SGD(model.parameters()), RepresentationHook(wrapping, "inner.1"), GAPTConfig.penalty()
    )
    for _ in range(3):
        wrapping(torch.randn(16, 10))
        optimizer.backward(losses.pop())
        optimizer.step()
        assert optimizer.metrics is not None
        assert list(optimizer.metrics.layer_entropy) == ["inner.1"]
        assert not any(each.captures for each in kept(optimizer))


@pytest.mark.filterwarnings(
    "ignore:.*should not be instantiated:DeprecationWarning", "ignore:The .grad attribute of a Tensor:UserWarning"
)
def test_a_layer_of_a_compiled_model_that_runs_too_often() -> None:
    class Repeating(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block = nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            for _ in range(MOST_COMPILED + 1):
                x = torch.tanh(self.block(x))
            return x

    model = Repeating()
    hook = RepresentationHook(model, "block")
    optimizer = GAPTOptimizer(torch.optim.SGD(model.parameters()), hook, COMPRESSION)
    compiled = torch.compile(model, backend="aot_eager")
    with pytest.raises(RuntimeError, match=f'"block" ran {MOST_COMPILED} times or more for one loss'):
        optimizer.backward(compiled(torch.randn(16, 8)).mean())


def test_a_resting_layer_stops_no_memorization_where_gradients_are_compared() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    config = GAPTConfig(gate=GateConfig(frozen=True), alignment=AlignmentConfig(parameter_every=1))
    optimizer = GAPTOptimizer(torch.optim.SGD(model.parameters()), RepresentationHook(model, ["0"]), config)
    with pytest.warns(UserWarning, match="the loss does not depend on the output"):
        optimizer.backward(model[1](torch.randn(16, 8)).mean())
    optimizer.step()


class Twice(nn.Module):
    """Two lists of layers: only a forward pass tells which are the blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.ModuleList(nn.Linear(8, 8) for _ in range(3))
        self.last = nn.ModuleList(nn.Linear(8, 8) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.first:
            x = layer(x)
        x = torch.tanh(x)
        for layer in self.last:
            x = layer(x)
        return x


def test_a_forward_past_the_model_chooses_nothing_and_trains() -> None:
    model = Twice()
    hook = RepresentationHook(model)
    optimizer = GAPTOptimizer(torch.optim.SGD(model.parameters()), hook, GAPTConfig(gate=GateConfig(frozen=True)))
    with pytest.warns(UserWarning, match="waits for a forward pass"):
        optimizer.backward(model.forward(torch.randn(16, 8)).mean())
    optimizer.step()
    assert hook.names == []
    assert optimizer.metrics is not None
    assert optimizer.metrics.entropy is None


def test_a_copy_chooses_nothing_for_the_hook() -> None:
    model = Twice()
    hook = RepresentationHook(model)
    copy.deepcopy(model)(torch.randn(16, 8))
    assert hook.names == []
    model(torch.randn(16, 8))
    assert hook.names == ["first.0", "first.1", "first.2"]


def test_a_state_from_before_the_first_forward_pass_loads() -> None:
    model = Twice()
    optimizer = GAPTOptimizer(torch.optim.SGD(model.parameters()), RepresentationHook(model))
    state = optimizer.state_dict()
    optimizer.load_state_dict(state)
    optimizer.backward(model(torch.randn(16, 8)).mean())
    optimizer.step()
    optimizer.load_state_dict(state)
    optimizer.backward(model(torch.randn(16, 8)).mean())
    optimizer.step()
    assert optimizer.metrics is not None
    assert len(optimizer.metrics.layer_entropy) == 3


@pytest.mark.parametrize("scale", [0, 0.0, -1])
def test_a_scale_is_above_zero(scale: float) -> None:
    model, optimizer = build()
    with pytest.raises(ValueError, match="scale must be above 0"):
        optimizer.backward(loss_of(model), scale=scale)


@dataclass(frozen=True)
class Frozen:
    h: Tensor
    scale: InitVar[float] = 1.0


class Named(dict[str, Tensor]):
    def __init__(self, h: Tensor) -> None:
        super().__init__(h=h)


@pytest.mark.parametrize("kind", [Frozen, Named, lambda h: defaultdict(list, h=h), lambda h: (h, [h])])
def test_an_output_is_replaced_in_any_container(kind: Callable[[Tensor], Any]) -> None:
    old, new = torch.zeros(2), torch.ones(2)
    output = kind(old)
    found = replaced(output, old, new)
    assert type(found) is type(output)
    assert [tensor is new for tensor in tensors_in(found)] == [True] * len(list(tensors_in(output)))
    assert all(tensor is old for tensor in tensors_in(output))


def test_layers_without_windows_have_no_drop() -> None:
    means, known = torch.tensor([3.0, 0.0, 2.9, 1.0]), torch.tensor([True, False, True, True])
    assert _largest_drop(means, known) == 3
    assert _largest_drop(means[:3], known[:3]) == 2


class Adapter(nn.Module):
    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.base, self.added = base, nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.base(x) + self.added(x)
        return found


def test_an_adapter_around_a_watched_layer_is_told() -> None:
    model = nn.Sequential(nn.Linear(10, 16), nn.Linear(16, 16), nn.Linear(16, 3))
    hook = RepresentationHook(model, ["1"])
    optimizer = GAPTOptimizer(torch.optim.SGD(model.parameters(), lr=0.0), hook)
    model[1] = Adapter(model[1])
    for _ in range(99):
        optimizer.backward(loss_of(model))
        optimizer.step()
    optimizer.backward(loss_of(model))
    with pytest.warns(UserWarning, match='layer "1" is now a Adapter, and the hook watches the Linear inside of it'):
        optimizer.step()
