"""What one training step does, decided once before it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch.distributed as dist

from .gate import Phase

if TYPE_CHECKING:
    from .config import EntropyConfig, GAPTConfig


@dataclass(frozen=True)
class StepPlan:
    """Everything that is decided before a step; taps, objective and record read it, and nothing changes it."""

    config: GAPTConfig
    phase: Phase
    layers: tuple[str, ...]
    """The tapped modules, in order of depth."""
    shares: dict[str, float]
    """Of the layers that count in the objective, each one's share of the pressure. They sum to 1."""
    parameter_alignment: bool
    """The angle between parameter gradients is taken."""
    group: dist.ProcessGroup | None
    """Ranks to average over; None for a single process."""

    @property
    def entropy(self) -> EntropyConfig:
        """How entropies are computed."""
        return self.config.entropy

    @property
    def compressing(self) -> bool:
        """The entropy is minimized."""
        return self.phase is Phase.COMPRESSION

    @property
    def activation_alignment(self) -> bool:
        """Taps take statistics of the two gradients."""
        return self.config.alignment.activation

    @property
    def entropy_flows(self) -> bool:
        """Entropy gradients reach the taps, to be followed or to be compared with those of the loss."""
        return self.compressing or self.parameter_alignment or self.activation_alignment

    def passes_entropy(self, layer: str) -> bool:
        """The tap of ``layer`` adds the entropy gradient to the one that it passes on."""
        return (self.compressing or self.parameter_alignment) and layer in self.shares
