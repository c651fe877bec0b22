"""What all tasks can be told: the method, its kernel and weight, the seed."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from gapt_optim import AlignmentConfig, EntropyConfig, GAPTConfig, GateConfig, LayerConfig, ObjectiveConfig

METHODS = ("plain", "penalty", "published", "gapt")
"""No entropy; a constant weight on it, from `objective.start` on; the author's gate; the library's."""


@dataclass(frozen=True)
class TaskSettings:
    """Fields that every task has."""

    method: str = "plain"
    seed: int = 0
    steps: int = 700
    kernel: str = "cosine"
    center: bool = True
    alpha: float = 2.0
    """Order of the entropy."""
    weight: float = 0.0
    """Of the entropy, per nat."""
    window: int | None = 8
    gate: dict[str, Any] = field(default_factory=dict)
    """Fields of the gate that differ from the library's defaults; for `published` from the author's."""
    layers: dict[str, Any] = field(default_factory=dict)
    """Fields of `LayerConfig`."""
    objective: dict[str, Any] = field(default_factory=dict)
    """Fields of `ObjectiveConfig` besides the weight."""

    def config(self) -> GAPTConfig:
        """The wrapper's settings. `plain` is a gate frozen in memorization, which is the bare optimizer's path."""
        gates = {
            "plain": lambda: GateConfig(frozen=True),
            "penalty": lambda: GateConfig(initial_phase="compression", frozen=True),
            "published": lambda: GateConfig.published(**self.gate),
            "gapt": lambda: GateConfig(**self.gate),
        }
        if self.method not in gates:
            raise ValueError(f"method must be one of {', '.join(gates)}, found {self.method!r}")
        return GAPTConfig(
            entropy=EntropyConfig(**self.kernel_settings(), window=self.window),
            gate=gates[self.method](),
            objective=ObjectiveConfig(weight=self.weight, **self.objective),
            layers=LayerConfig(**self.layers),
            alignment=AlignmentConfig(every=0),  # of no use here, and a good part of so small a step
        )

    def kernel_settings(self) -> dict[str, Any]:
        """Keywords of `matrix_entropy` and `EntropyConfig`."""
        return {"kernel": self.kernel, "center": self.center, "alpha": self.alpha}
