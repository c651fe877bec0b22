"""The constraint as a constraint: a weight as large as the loss's descent allows.

After "Bi-objective Trade-off with Dynamic Barrier Gradient Descent" (Gong, Liu and Liu, NeurIPS 2021). With parameter
gradients g of the loss and d of the entropy, a step along g + weight * d keeps the share ``descent`` of the descent
that g alone has, while <g, g + weight * d> >= descent * <g, g>. Where d opposes g, that bounds the weight.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from . import text


@dataclass(frozen=True)
class Settings(text.Settings):
    """Those of the text task; ``weight`` is the largest weight, which holds where the gradients agree."""

    method: str = "penalty"
    descent: float = 0.9
    """Share of the loss's descent that is kept."""
    every: int = 5
    """Steps from one measurement to the next; the weight is held between."""
    preconditioned: bool = False
    """Measure by the inner product of Adam's step, each entry over the root of its second moment."""


class Barrier:
    """The backward of a step, with the weight that its last measurement allows."""

    def __init__(self, base: torch.optim.Optimizer, s: Settings) -> None:
        self.base, self.s = base, s
        self.weight, self.steps, self.total = 0.0, 0, 0.0

    def __call__(self, model: nn.Module, blocks: list[nn.Module], rows: Tensor) -> tuple[float, float]:
        """As `text.Backward`; the share is that of the largest weight."""
        loss, entropy = text.loss_and_entropy(model, blocks, rows, self.s)
        if self.steps % self.s.every == 0:
            self.weight = self.allowed(loss, entropy)
        self.steps += 1
        (loss + self.weight * entropy).backward()  # type: ignore[no-untyped-call]
        return loss.item(), self.weight / self.s.weight

    def allowed(self, loss: Tensor, entropy: Tensor) -> float:
        """The largest weight that keeps the descent."""
        parameters = [p for group in self.base.param_groups for p in group["params"]]
        of_loss = torch.autograd.grad(loss, parameters, retain_graph=True)
        of_entropy = torch.autograd.grad(entropy, parameters, retain_graph=True, allow_unused=True)
        squared, opposed = 0.0, 0.0
        for p, g, d in zip(parameters, of_loss, of_entropy, strict=True):
            scaled = g
            if self.s.preconditioned and "exp_avg_sq" in self.base.state[p]:
                scaled = g / (self.base.state[p]["exp_avg_sq"].sqrt() + 1e-8)
            squared += float((g * scaled).sum())
            if d is not None:
                opposed -= float((d * scaled).sum())
        if opposed <= 0:
            return self.s.weight
        return min(self.s.weight, (1 - self.s.descent) * squared / opposed)


def train(s: Settings) -> dict[str, Any]:
    """One run."""
    return text.train(s, backward_with=lambda base: Barrier(base, s))
