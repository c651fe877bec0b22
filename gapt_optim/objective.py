"""The objective of one micro-batch: its loss, the entropies of its layers, and their part in what is differentiated."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .config import GAPTConfig
from .layers import reduction_coefficients
from .tap import Grams, entropies_of, link


class Objective(NamedTuple):
    """What :func:`build_objective` makes of a loss."""

    total: Tensor
    """Scalar to differentiate; the loss itself, bit for bit, in memorization."""
    entropies: dict[str, Tensor]
    """Per layer that ran, a scalar without a graph."""
    measures: dict[str, Tensor]
    """Per layer that ran, (4,): what can hide in its entropy."""
    penalty: Tensor | None
    """Scalar, what compression adds to the loss; None in memorization."""
    mean_entropy: Tensor | None
    """A zero with the gradient of the mean entropy, where that is measured."""


def build_objective(
    loss: Tensor,
    calls: dict[str, list[Grams]],
    config: GAPTConfig,
    counted: list[str],
    shares: Tensor,
    *,
    compressing: bool,
    flows: bool,
    measured: bool,
) -> Objective:
    """Join a loss and what the taps left.

    Args:
        loss: scalar.
        calls: per layer, one item per call of it.
        counted: the layers that count, in order of depth.
        shares: (counted,), each one's share of the pressure at this step.
        compressing: the entropy is minimized.
        flows: gradients of the entropy flow back to the taps, for compression or to be measured.
        measured: give the mean entropy too, for parameter alignment.
    """
    flat = [call for of_layer in calls.values() for call in of_layer]
    of_call = [(name, len(of_layer)) for name, of_layer in calls.items() for _ in of_layer]
    found = entropies_of(flat, config.entropy, with_factors=flows)
    entropies = _means_of_calls(found.values, of_call, loss.device)
    measures = _means_of_calls(found.measures, of_call, loss.device)
    if not flows:
        return Objective(loss, entropies, measures, None, None)

    factors = [factor if n == 1 else factor / n for factor, (_, n) in zip(found.factors, of_call, strict=True)]
    zero = torch.zeros_like(next(iter(entropies.values())))
    penalty, weights = _penalty(loss.detach(), entropies, config, counted, shares) if compressing else (zero, {})
    total = loss + link(flat, factors, torch.stack([weights.get(name, zero) for name, _ in of_call])).to(loss.dtype)
    mean_entropy = None
    if measured and any(call.carrier is not None for call in flat):
        # A micro-batch that falls back to the loss alone has no entropy gradient.
        judged = [entropies[name] for name in counted if name in entropies]
        finite = torch.stack([loss.detach().reshape(()).to(zero), *judged]).isfinite().all()
        share = finite.to(zero) / len(counted)
        parts = torch.stack([share if name in counted else zero for name, _ in of_call])
        mean_entropy = link(flat, factors, parts, alone=True)
    if not compressing:
        return Objective(total, entropies, measures, None, mean_entropy)
    return Objective(total + penalty.to(loss.dtype), entropies, measures, penalty, mean_entropy)


def _means_of_calls(values: list[Tensor], of_call: list[tuple[str, int]], device: torch.device) -> dict[str, Tensor]:
    """Per layer, the mean of ``values`` over its calls; ``of_call`` has each one's layer and how often that ran."""
    means: dict[str, Tensor] = {}
    for (name, n), value in zip(of_call, values, strict=True):
        part = value.to(device) if n == 1 else value.to(device) / n
        means[name] = means[name] + part if name in means else part
    return means


def _penalty(
    loss: Tensor, entropies: dict[str, Tensor], config: GAPTConfig, counted: list[str], shares: Tensor
) -> tuple[Tensor, dict[str, Tensor]]:
    """What compression adds to the loss, and the weight of each layer in it; 0 where anything is not finite."""
    present = [i for i, name in enumerate(counted) if name in entropies]
    if not present:
        return torch.zeros_like(loss), {}
    values = torch.stack([entropies[counted[i]] for i in present])
    shares = shares.to(device=values.device, dtype=values.dtype, non_blocking=True)
    if len(present) < len(counted):
        shares = torch.stack([shares[i] for i in present])
    coefficients = config.objective.weight * reduction_coefficients(config.layers.reduce, values, shares)
    if config.objective.floor > 0:
        values = values - config.objective.floor
        coefficients = torch.where(values > 0, coefficients, 0)
    total = (coefficients * values).sum()
    finite = total.isfinite() & loss.isfinite().reshape(())
    coefficients = torch.where(finite, coefficients, 0)
    weights = zip((counted[i] for i in present), coefficients.unbind(), strict=True)
    return torch.where(finite, total, 0), dict(weights)
