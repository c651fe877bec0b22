"""What is known to keep a network trainable, each in its plainest form, with one strength.

Under Adam. Units are hidden units between two linear maps, as each network names them in `units`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

MATURITY = 50
"""Steps before continual backpropagation may replace a unit again."""
DECAY = 0.99
"""Of the averages by which it judges units."""
COVARIANCE_SHARE = 0.125
"""Weight of the covariance over that of the variance in VCReg. It is not tuned: only the strength of both is."""


class Units(NamedTuple):
    """The hidden units of one layer."""

    into: nn.Linear
    norm: nn.LayerNorm | None
    """Between the linear map and the nonlinearity."""
    nonlinearity: nn.Module
    """Its output is what the units say."""
    out: nn.Linear


class Remedy:
    """Does nothing; the others replace some of these."""

    weight_decay = 0.0
    """Of AdamW, on matrices."""

    def penalty(self, hidden: Sequence[Tensor]) -> Tensor | None:
        """What is added to the loss; ``hidden`` are the outputs of the watched layers, with their graph."""
        return None

    def after_step(self) -> None:
        """Called behind each step of the optimizer."""

    def at_switch(self) -> None:
        """Called where the data change, before the first step on the new ones."""


class WeightDecay(Remedy):
    """That of AdamW: towards 0."""

    def __init__(self, strength: float) -> None:
        self.weight_decay = strength


class TowardStart(Remedy):
    """strength * |weights - weights at the start|^2 (Kumar et al. 2023, arXiv 2308.11958)."""

    def __init__(self, model: nn.Module, strength: float) -> None:
        self.parameters = list(model.parameters())
        self.start = nn.utils.parameters_to_vector(self.parameters).detach().clone()
        self.strength = strength

    def penalty(self, hidden: Sequence[Tensor]) -> Tensor:
        moved = nn.utils.parameters_to_vector(self.parameters) - self.start
        return self.strength * moved.square().sum()


class ShrinkAndPerturb(Remedy):
    """(1 - strength) * weights + strength * fresh weights at each switch (Ash and Adams 2020, arXiv 1910.08475).

    It alone is told where the data change. With strength 1 it starts afresh.
    """

    def __init__(self, model: nn.Module, build: Callable[[], nn.Module], strength: float) -> None:
        self.model, self.build, self.strength = model, build, strength

    @torch.no_grad()
    def at_switch(self) -> None:
        for old, fresh in zip(self.model.parameters(), self.build().parameters(), strict=True):
            old.lerp_(fresh, self.strength)


class ContinualBackpropagation(Remedy):
    """Replaces the share ``strength`` of the mature units per step, those of least use first (Dohare et al. 2024,
    Nature 632): use is the mean of |output| times the sum of |outgoing weights|."""

    def __init__(self, units: Sequence[Units], optimizer: torch.optim.Optimizer, strength: float) -> None:
        self.units, self.optimizer, self.strength = units, optimizer, strength
        self.said = [torch.zeros(layer.into.out_features) for layer in units]
        self.age = [torch.zeros(layer.into.out_features) for layer in units]
        self.due = [0.0] * len(units)
        for said, layer in zip(self.said, units, strict=True):
            layer.nonlinearity.register_forward_hook(lambda _, __, output, said=said: _average(said, output))

    @torch.no_grad()
    def after_step(self) -> None:
        for i, (layer, said, age) in enumerate(zip(self.units, self.said, self.age, strict=True)):
            age += 1
            mature = age > MATURITY
            self.due[i] += self.strength * int(mature.sum())
            count = int(self.due[i])
            if count == 0:
                continue
            self.due[i] -= count
            use = said * layer.out.weight.abs().sum(0)
            replaced = use.masked_fill(~mature, torch.inf).topk(count, largest=False).indices
            self._renew(layer, replaced)
            age[replaced] = 0
            said[replaced] = 0

    def _renew(self, layer: Units, rows: Tensor) -> None:
        fresh = nn.Linear(layer.into.in_features, layer.into.out_features)
        self._set(layer.into.weight, rows, fresh.weight[rows])
        self._set(layer.into.bias, rows, torch.zeros(len(rows)))
        if layer.norm is not None:
            self._set(layer.norm.weight, rows, torch.ones(len(rows)))
            self._set(layer.norm.bias, rows, torch.zeros(len(rows)))
        layer.out.weight[:, rows] = 0
        for moment in self._moments(layer.out.weight):
            moment[:, rows] = 0

    def _set(self, parameter: Tensor, rows: Tensor, value: Tensor) -> None:
        parameter[rows] = value
        for moment in self._moments(parameter):
            moment[rows] = 0

    def _moments(self, parameter: Tensor) -> list[Tensor]:
        state = self.optimizer.state[parameter]
        return [state[name] for name in ("exp_avg", "exp_avg_sq") if name in state]


@torch.no_grad()
def _average(said: Tensor, output: Tensor) -> None:
    """Move the mean |output| of each unit towards that of a batch. Evaluation, without gradients, does not count."""
    if output.requires_grad:
        said.lerp_(output.abs().flatten(0, -2).mean(0), 1 - DECAY)


class SpectralRegularization(Remedy):
    """strength * sum over matrices of (sigma^2 - 1)^2, sigma the largest singular value by one power iteration a
    step (Lewandowski et al. 2024, arXiv 2406.06811). Biases and norms are left alone."""

    def __init__(self, model: nn.Module, strength: float) -> None:
        self.matrices = [p for p in model.parameters() if p.ndim == 2]
        self.vectors = [nn.functional.normalize(torch.randn(p.shape[1]), dim=0) for p in self.matrices]
        self.strength = strength

    def penalty(self, hidden: Sequence[Tensor]) -> Tensor:
        parts = []
        for i, matrix in enumerate(self.matrices):
            with torch.no_grad():
                left = nn.functional.normalize(matrix @ self.vectors[i], dim=0)
                self.vectors[i] = nn.functional.normalize(matrix.mT @ left, dim=0)
            sigma = left @ (matrix @ self.vectors[i])
            parts.append((sigma.square() - 1).square())
        return self.strength * torch.stack(parts).sum()


class VarianceCovariance(Remedy):
    """VCReg (Zhu et al. 2023, arXiv 2306.13292): every feature of a watched layer keeps a standard deviation of 1 in
    the batch, and no two go together."""

    def __init__(self, strength: float) -> None:
        self.strength = strength

    def penalty(self, hidden: Sequence[Tensor]) -> Tensor:
        total = torch.zeros(())
        for output in hidden:
            z = output.flatten(0, -2)
            z = z - z.mean(0)
            covariance = z.mT @ z / (len(z) - 1)
            variances = covariance.diagonal()
            short = (1 - (variances + 1e-4).sqrt()).clamp(min=0).mean()
            together = (covariance.square().sum() - variances.square().sum()) / (len(variances) * (len(variances) - 1))
            total = total + short + COVARIANCE_SHARE * together
        return self.strength * total / len(hidden)


def named(
    name: str,
    strength: float,
    model: nn.Module,
    units: Sequence[Units],
    optimizer: torch.optim.Optimizer,
    build: Callable[[], nn.Module],
) -> Remedy:
    """The remedy that a setting names.

    Raises:
        ValueError: there is none of that name.
    """
    made: dict[str, Callable[[], Remedy]] = {
        "none": Remedy,
        "weight decay": lambda: WeightDecay(strength),
        "toward start": lambda: TowardStart(model, strength),
        "shrink and perturb": lambda: ShrinkAndPerturb(model, build, strength),
        "continual backpropagation": lambda: ContinualBackpropagation(units, optimizer, strength),
        "spectral": lambda: SpectralRegularization(model, strength),
        "vcreg": lambda: VarianceCovariance(strength),
    }
    if name not in made:
        raise ValueError(f"remedy must be one of {', '.join(made)}, found {name!r}")
    return made[name]()
