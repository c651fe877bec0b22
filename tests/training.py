"""What many tests do: wrap a model, run the reference on it, compare gradients."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from gapt_optim import (
    AlignmentConfig,
    EntropyConfig,
    GAPTConfig,
    GAPTOptimizer,
    GateConfig,
    LayerConfig,
    ObjectiveConfig,
    RepresentationHook,
)


def config(
    phase: str = "compression",
    entropy: dict[str, Any] | None = None,
    objective: dict[str, Any] | None = None,
    counting: dict[str, Any] | None = None,
    activation: bool = True,
    alignment: dict[str, Any] | None = None,
) -> GAPTConfig:
    """A gate frozen in ``phase``, weight 1, and the given parts; ``counting`` is that of the layers."""
    return GAPTConfig(
        gate=GateConfig(initial_phase=phase, frozen=True),
        entropy=EntropyConfig(**(entropy or {})),
        objective=ObjectiveConfig(**({"weight": 1.0} | (objective or {}))),
        layers=LayerConfig(**(counting or {})),
        alignment=AlignmentConfig(**({"every": int(activation)} | (alignment or {}))),
    )


def wrapped(model: nn.Module, layers: Any, phase: str = "compression", lr: float = 0.0, **parts: Any) -> GAPTOptimizer:
    """SGD on the model's parameters, wrapped, with a frozen gate."""
    options = {name: parts.pop(name, None) for name in ("output", "mask", "layout", "segments")}
    hook = RepresentationHook(model, layers, **options)
    return GAPTOptimizer(torch.optim.SGD(model.parameters(), lr=lr), hook, config(phase, **parts))


@contextmanager
def recorded(modules: Sequence[nn.Module], read: Callable[[Any], Tensor] | None = None) -> Any:
    """Outputs of each module inside the with block, one list of calls per module."""
    calls: list[list[Tensor]] = [[] for _ in modules]

    def keep(i: int) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            chosen = read(output) if read else output[0] if isinstance(output, tuple) else output
            calls[i].append(chosen)

        return hook

    handles = [module.register_forward_hook(keep(i)) for i, module in enumerate(modules)]
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()


def gradients(model: nn.Module) -> dict[str, Tensor]:
    """A copy of every parameter's gradient, zeros where it has none."""
    return {
        name: torch.zeros_like(p) if p.grad is None else p.grad.detach().clone() for name, p in model.named_parameters()
    }


def distance(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    """|a - b| / |b| over everything."""
    assert a.keys() == b.keys()
    difference = sum(float((a[name] - b[name]).double().square().sum()) for name in b)
    return (difference / sum(float(value.double().square().sum()) for value in b.values())) ** 0.5
