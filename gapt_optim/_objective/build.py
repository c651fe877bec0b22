"""The objective of one micro-batch: its loss, the entropies of its layers, and their part in what is differentiated."""

from __future__ import annotations

import math
from typing import NamedTuple, SupportsFloat

import torch
from torch import Tensor

from .._capture import Grams, entropies_of, link
from .._plan import StepPlan
from .layers import reduction_coefficients


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
    of_call = [(name, len(of_layer)) for name, of_layer in calls.items() for _ in of_layer]
    found = entropies_of(flat, plan.entropy, with_factors=plan.entropy_flows)
    entropies = _means_of_calls(found.values, of_call, loss.device)
    measures = _means_of_calls(found.measures, of_call, loss.device)
    if not plan.entropy_flows:
        return Objective(loss, entropies, measures, None, None)

    factors = [factor if n == 1 else factor / n for factor, (_, n) in zip(found.factors, of_call, strict=True)]
    zero = torch.zeros_like(next(iter(entropies.values())))
    penalty, weights = _penalty(loss.detach(), entropies, plan) if plan.compressing else (zero, {})
    of_calls = torch.stack([weights.get(name, zero) for name, _ in of_call]) * scaled_by
    total = loss + link(flat, factors, of_calls).to(loss.dtype)
    mean_entropy = None
    if plan.parameter_alignment and any(call.carrier is not None for call in flat):
        # A micro-batch that falls back to the loss alone has no entropy gradient.
        judged = [entropies[name] for name in plan.shares if name in entropies]
        finite = torch.stack([loss.detach().reshape(()).to(zero), *judged]).isfinite().all()
        share = finite.to(zero) / len(plan.shares)
        parts = torch.stack([share if name in plan.shares else zero for name, _ in of_call])
        mean_entropy = link(flat, factors, parts, alone=True)
    if not plan.compressing:
        return Objective(total, entropies, measures, None, mean_entropy)
    return Objective(total + (penalty * scaled_by).to(loss.dtype), entropies, measures, penalty, mean_entropy)


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


def _means_of_calls(values: list[Tensor], of_call: list[tuple[str, int]], device: torch.device) -> dict[str, Tensor]:
    """Per layer, the mean of ``values`` over its calls; ``of_call`` has each one's layer and how often that ran."""
    means: dict[str, Tensor] = {}
    for (name, n), value in zip(of_call, values, strict=True):
        part = value.to(device) if n == 1 else value.to(device) / n
        means[name] = means[name] + part if name in means else part
    return means


def _penalty(loss: Tensor, entropies: dict[str, Tensor], plan: StepPlan) -> tuple[Tensor, dict[str, Tensor]]:
    """What compression adds to the loss, and the weight of each layer in it; 0 where anything is not finite."""
    present = [name for name in plan.shares if name in entropies]
    if not present:
        return torch.zeros_like(loss), {}
    objective = plan.config.objective
    values = torch.stack([entropies[name] for name in present])
    shares = torch.tensor([plan.shares[name] for name in present], dtype=values.dtype)
    shares = shares.to(device=values.device, non_blocking=True)
    coefficients = objective.weight * reduction_coefficients(plan.config.layers.reduce, values, shares)
    if objective.floor > 0:
        values = values - objective.floor
        coefficients = torch.where(values > 0, coefficients, 0)
    total = (coefficients * values).sum()
    finite = total.isfinite() & loss.isfinite().reshape(())
    coefficients = torch.where(finite, coefficients, 0)
    weights = zip(present, coefficients.unbind(), strict=True)
    return torch.where(finite, total, 0), dict(weights)
