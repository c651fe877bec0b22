"""The objective of one micro-batch: its loss, the entropies of its layers, and their part in what is differentiated."""

from __future__ import annotations

import math
from typing import NamedTuple, SupportsFloat

import torch
from torch import Tensor

from .._capture import Factors, Grams, entropies_of, link
from .._plan import StepPlan
from .layers import reduction_coefficients


class Objective(NamedTuple):
    """What :func:`build_objective` makes of a loss."""

    total: Tensor
    """Scalar to differentiate; the loss itself, bit for bit, in memorization."""
    layers: list[str]
    """Those that ran."""
    numbers: Tensor
    """(layers, 5), without a graph: of each its entropy, then what can hide in it."""
    penalty: Tensor | None
    """Scalar without a graph, what compression adds to the loss; None in memorization."""
    mean_entropy: Tensor | None
    """A zero with the gradient of the mean entropy, where parameter alignment is due."""


def build_objective(loss: Tensor, calls: dict[str, list[Grams]], plan: StepPlan, scaled_by: float) -> Objective:
    """Join a loss and what the taps left.

    Args:
        loss: scalar.
        calls: per layer, one item per call of it.
        plan: what this step does.
        scaled_by: factor that the loss was multiplied by already; the entropy gets it too.
    """
    flat = [call for of_layer in calls.values() for call in of_layer]
    numbers, factors = entropies_of(flat, plan.entropy, loss.device, with_factors=plan.entropy_flows)
    layers, times = list(calls), [len(of_layer) for of_layer in calls.values()]
    once = len(flat) == len(layers)
    if not once:
        numbers, factors = _means_of_calls(numbers, factors, times)
    if not plan.entropy_flows:
        return Objective(loss, layers, numbers, None, None)

    def of_calls(of_layers: Tensor) -> Tensor:
        return of_layers if once else torch.cat([of_layers[i].expand(n) for i, n in enumerate(times)])

    if plan.compressing:
        penalty, weights = _penalty(loss.detach(), layers, numbers[:, 0], plan)
        if scaled_by == 1.0:
            added = penalty
        else:
            added, weights = penalty * scaled_by, weights * scaled_by
    else:
        penalty, weights = None, torch.zeros_like(numbers[:, 0])
        added = weights.new_zeros(())
    total = loss + link(added, flat, factors, of_calls(weights)).to(loss.dtype)
    mean_entropy = None
    if plan.parameter_alignment and any(call.carrier is not None for call in flat):
        # A micro-batch that falls back to the loss alone has no entropy gradient.
        counts = torch.tensor([float(name in plan.shares) for name in layers], dtype=numbers.dtype)
        counts = counts.to(numbers.device, non_blocking=True)
        judged = torch.where(counts > 0, numbers[:, 0], 0).sum() + loss.detach().reshape(())
        shares = torch.where(judged.isfinite(), counts / len(plan.shares), 0)
        mean_entropy = link(torch.zeros_like(added), flat, factors, of_calls(shares), alone=True)
    return Objective(total, layers, numbers, penalty, mean_entropy)


def check_loss(loss: Tensor, scaled_by: float) -> None:
    """Raise TypeError or ValueError where :func:`build_objective` has no use for an argument, naming it."""
    if not isinstance(loss, Tensor):
        raise TypeError(f"loss must be a tensor, found {type(loss).__name__}")
    if loss.numel() != 1 or not loss.is_floating_point():
        raise ValueError(
            f"loss must be one floating-point number, found shape {tuple(loss.shape)} of {loss.dtype}; "
            "reduce it first, for example with loss.mean()"
        )
    if not isinstance(scaled_by, SupportsFloat):
        raise TypeError(f"scaled_by must be a number, found {type(scaled_by).__name__}; give 1 / micro-batches")
    if not (math.isfinite(scaled_by) and scaled_by > 0):
        raise ValueError(f"scaled_by must be a positive number, found {scaled_by}; give 1 / micro-batches")


def _means_of_calls(numbers: Tensor, factors: list[Factors], times: list[int]) -> tuple[Tensor, list[Factors]]:
    """Per layer, the mean of the numbers over its calls, ``times`` many; and the factors of these means."""
    of_layers = torch.stack([of_layer.mean(0) for of_layer in torch.split(numbers, times)])
    of_call = [n for n in times for _ in range(n)]
    return of_layers, [
        Factors(members, torch.stack([m / of_call[i] for i, m in zip(members, matrices.unbind(), strict=True)]))
        for members, matrices in factors
    ]


def _penalty(loss: Tensor, layers: list[str], entropies: Tensor, plan: StepPlan) -> tuple[Tensor, Tensor]:
    """What compression adds to the loss, and each layer's weight in it (layers,); 0 where anything is not finite."""
    places = [i for i, name in enumerate(layers) if name in plan.shares]
    if not places:
        return entropies.new_zeros(()), torch.zeros_like(entropies)
    objective = plan.config.objective
    values = entropies if len(places) == len(layers) else torch.stack([entropies[i] for i in places])
    shares = torch.tensor([plan.shares[layers[i]] for i in places], dtype=values.dtype)
    shares = shares.to(device=values.device, non_blocking=True)
    coefficients = objective.weight * reduction_coefficients(plan.config.layers.reduce, values, shares)
    if objective.floor > 0:
        values = values - objective.floor
        coefficients = torch.where(values > 0, coefficients, 0)
    total = (coefficients * values).sum()
    finite = (total + loss.reshape(())).isfinite()
    total, weights = torch.where(finite, total, 0), torch.where(finite, coefficients, 0)
    if len(places) < len(layers):
        of_places = dict(zip(places, weights.unbind(), strict=True))
        weights = torch.stack([of_places.get(i, torch.zeros_like(total)) for i in range(len(layers))])
    return total, weights
