"""What the frameworks' callbacks share: finding the wrapper inside a framework's own, and what is logged."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from ..metrics import StepMetrics
from ..optimizer import GAPTOptimizer


def unwrapped(optimizer: Any) -> GAPTOptimizer | None:
    """The GAPTOptimizer in ``optimizer``, through the wrappers of Accelerate and Lightning; None if there is none."""
    # Lightning's wrapper is an instance of the class it wraps, so the search goes to the innermost.
    while (inner := getattr(optimizer, "optimizer", None)) is not None:
        optimizer = inner
    return optimizer if isinstance(optimizer, GAPTOptimizer) else None


def scalars(metrics: StepMetrics | None, *, layers: bool, prefix: str = "gapt") -> dict[str, float]:
    """The numbers of a step by the name they are logged under; those that are missing or not finite are left out."""
    if metrics is None:
        return {}
    values: dict[str, float | None] = {
        f"{prefix}/loss": metrics.loss,
        f"{prefix}/entropy": metrics.entropy,
        f"{prefix}/compression": float(metrics.phase == "compression"),
        f"{prefix}/switches": float(metrics.switches),
    }
    for kind, alignment in (("activation", metrics.alignment), ("parameter", metrics.parameter_alignment)):
        values[f"{prefix}/{kind}_cosine"] = None if alignment is None else alignment.cosine
    if layers:
        values |= {f"{prefix}/entropy/{name}": entropy for name, entropy in metrics.layer_entropy.items()}
    return {name: value for name, value in values.items() if value is not None and math.isfinite(value)}


class Replacement:
    """Replaces a method of one object until :meth:`undo`."""

    def __init__(self, owner: Any, name: str, make: Callable[[Callable[..., Any]], Callable[..., Any]]) -> None:
        self.owner, self.name = owner, name
        self.before: dict[str, Any] = {name: vars(owner)[name]} if name in vars(owner) else {}
        setattr(owner, name, make(getattr(owner, name)))

    def undo(self) -> None:
        vars(self.owner).pop(self.name, None)
        vars(self.owner).update(self.before)
