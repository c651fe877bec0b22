"""A small model, batches, and wrapped and bare training loops that the tests of the wrapper share."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import Optimizer

from gapt_optim import GAPTConfig, GAPTOptimizer, GateConfig, RepresentationHook

Base = Callable[[nn.Module], Optimizer]

COMPRESSING = GAPTConfig(gate=GateConfig(initial_phase="compression", frozen=True))
# Switches both ways every few steps, whatever the losses are.
RESTLESS = GateConfig(patience_memorization=2, patience_compression=3, min_improvement=0.5, spike_tolerance=10.0)


class Net(nn.Module):
    """Tokens through three tapped blocks to class scores; matrices only, unless ``bias``."""

    def __init__(self, features: int = 6, *, bias: bool = False, sparse: bool = False) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, features, sparse=sparse)
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(features, features, bias), nn.Tanh()) for _ in range(3))
        self.head = nn.Linear(features, 5, bias)

    def forward(self, tokens: Tensor) -> Tensor:
        h = self.embedding(tokens)
        for layer in self.layers:
            h = h + layer(h)
        return self.head(h).mean(1)


def make_net(seed: int = 0, **options: Any) -> Net:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return Net(**options)


def batch(i: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1000 + i)
    return torch.randint(0, 11, (4, 10), generator=generator), torch.randint(0, 5, (4,), generator=generator)


def loss_of(model: nn.Module, i: int) -> Tensor:
    tokens, target = batch(i)
    return F.cross_entropy(model(tokens), target)


def adamw(model: nn.Module) -> Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=0.01)


def sgd(model: nn.Module) -> Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)


def matrices_and_rest(model: nn.Module) -> list[Optimizer]:
    """Muon for the blocks, AdamW for the rest, as language models are trained."""
    inner = [p for name, p in model.named_parameters() if name.startswith("layers") and p.ndim == 2]
    rest = [p for p in model.parameters() if not any(p is other for other in inner)]
    return [torch.optim.Muon(inner, lr=0.02), torch.optim.AdamW(rest, lr=0.01)]


def wrap(
    model: nn.Module, base: Callable[[nn.Module], Any] = adamw, config: GAPTConfig | None = None, **options: Any
) -> GAPTOptimizer:
    return GAPTOptimizer(base(model), RepresentationHook(model, "layers.*"), config, **options)


def pair(
    base: Base = adamw, config: GAPTConfig | None = None, **net: Any
) -> tuple[tuple[Net, Optimizer], tuple[Net, GAPTOptimizer]]:
    """The same model twice: (model, bare optimizer), (model, wrapped optimizer)."""
    bare_model, model = make_net(**net), make_net(**net)
    return (bare_model, base(bare_model)), (model, wrap(model, base, config))


def train(
    model: nn.Module, optimizer: GAPTOptimizer | Optimizer, steps: range, *, bare: bool = False
) -> Iterator[dict[str, Any] | None]:
    """Train on batches ``steps``, giving the metrics after each (None of a bare optimizer)."""
    for i in steps:
        loss = loss_of(model, i)
        if bare or not isinstance(optimizer, GAPTOptimizer):
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            yield None
        else:
            optimizer.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
            assert optimizer.metrics is not None
            yield optimizer.metrics.as_dict()


def run(model: nn.Module, optimizer: GAPTOptimizer | Optimizer, steps: range) -> list[dict[str, Any] | None]:
    return list(train(model, optimizer, steps))


def without_ours(saved: Any) -> Any:
    """What a base saves, without the entry that its groups have from us: None, for flattened checkpoints."""
    if isinstance(saved, dict):
        return {k: without_ours(value) for k, value in saved.items() if not (k == "gapt" and value is None)}
    return [without_ours(value) for value in saved] if isinstance(saved, list) else saved


def weights(model: nn.Module) -> dict[str, Tensor]:
    return copy.deepcopy(model.state_dict())


def gradients(model: nn.Module) -> dict[str, Tensor | None]:
    return {name: None if p.grad is None else p.grad.clone() for name, p in model.named_parameters()}


def assert_same(a: Any, b: Any, where: str = "") -> None:
    """Equal bit for bit, through any nesting; nan equals nan."""
    if isinstance(a, Tensor):
        assert isinstance(b, Tensor), where
        assert a.dtype == b.dtype, where
        torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True, msg=lambda text: f"{where}: {text}")
    elif isinstance(a, dict):
        assert a.keys() == b.keys(), where
        for key in a:
            assert_same(a[key], b[key], f"{where}.{key}")
    elif isinstance(a, list | tuple):
        assert len(a) == len(b), where
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            assert_same(x, y, f"{where}[{i}]")
    else:
        assert a == b or (a != a and b != b), f"{where}: {a!r} != {b!r}"
