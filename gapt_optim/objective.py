"""The objective of one micro-batch: its loss, and in compression the weighted entropy of its layers.

From the entropies of windows on, it is ordinary autograd: sums over weights, means, a weight. So every scaling of the
loss reaches the entropy by itself.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple, SupportsFloat

import torch
from torch import Tensor

from .config import ObjectiveConfig
from .entropy import entropies, entropy_of_gram, measures_of, window_weights
from .passes import Capture
from .plan import Plan
from .shards import sum_grams, sum_windows


class Objective(NamedTuple):
    """What :func:`build_objective` makes of a loss."""

    total: Tensor
    """Scalar to differentiate; the loss itself, bit for bit, in memorization."""
    layers: list[str]
    """Those that ran for this loss."""
    sums: Tensor
    """(2, layers): over windows, the sums of the entropy and of the weights; without a graph."""
    measures: Tensor | None
    """(2, layers, 4): the same of what can hide in an entropy; None where they are not due."""
    penalty: Tensor | None
    """Scalar without a graph, what compression adds to the loss; None in memorization."""
    mean_entropy: Tensor | None
    """Scalar with a graph, where its gradient is wanted."""


def build_objective(loss: Tensor, taken: dict[str, list[Capture]], plan: Plan, scaled_by: float) -> Objective:
    """Join a loss and what the watched modules left for it.

    Args:
        loss: scalar.
        taken: per layer, one item per call of it.
        plan: how the entropies are computed, and what is pressed.
        scaled_by: factor that the loss was multiplied by already; the entropy gets it too.
    """
    layers = list(taken)
    calls = [capture for of_layer in taken.values() for capture in of_layer]
    if not calls:
        return Objective(loss, [], torch.zeros(2, 0, device=loss.device), None, None, None)
    with torch.set_grad_enabled(plan.differentiated):
        sums, measures = _sums_of_calls(calls, plan, loss.device)
        for call in calls:  # an angle still waits for the gradient, and keeps its capture
            call.gram = call.live = call.measures = None
        if len(calls) > len(layers):
            times = [len(of_layer) for of_layer in taken.values()]
            sums = _over(sums, times)
            measures = None if measures is None else _over(measures.mT, times).mT
        if not (plan.differentiated):
            return Objective(loss, layers, sums, measures, None, None)
        of_layers, weights = sums[0], sums[1].detach()
        sums, means = sums.detach(), of_layers / weights.clamp(min=1)
        mean_entropy = None
        if plan.compared:
            of_counted, their_weights = _of(plan.counted, layers, means, weights)
            mean_entropy = _finite(_mean(of_counted, their_weights, None), loss)
        if not plan.pressed:
            return Objective(loss, layers, sums, measures, None, mean_entropy)
        judged = [name for name in layers if name in plan.layers]
        means, weights = _of(plan.layers, layers, means, weights)
        for name in judged:
            for call in taken[name]:
                call.pressed = True
        penalty = plan.config.objective.weight * _pressed(means, weights, judged, plan)
        penalty = _finite(penalty, loss)
        added = penalty if scaled_by == 1.0 else penalty * scaled_by
        return Objective(loss + added.to(loss.dtype), layers, sums, measures, penalty.detach(), mean_entropy)


def _sums_of_calls(calls: list[Capture], plan: Plan, device: torch.device) -> tuple[Tensor, Tensor | None]:
    """(2, calls): over each call's windows, the sum of the entropies and the number of those that count. Where they are
    due, also (2, calls, 4): the same of the measures.

    Matrices of equal size are computed as one batch: they are so small that it is the number of operations that costs.
    """
    sharded = any(call.shards is not None for call in calls)
    if sharded:
        sum_grams(calls)
    alike: dict[object, list[int]] = {}
    by_features = plan.order.depends_on_features
    for i, call in enumerate(calls):
        assert call.gram is not None
        gram, (n, features) = call.gram, call.shape
        width = features if by_features else 0
        like = (gram.shape[1:], gram.shape[-1] < n, width, gram.dtype, gram.device, call.live is None)
        alike.setdefault(like, []).append(i)
    found = [_sums_of_alike([calls[i] for i in members], plan) for members in alike.values()]
    sums, measures = found[0]
    if len(found) == 1:
        sums, measures = sums.to(device), None if measures is None else measures.to(device)
    else:
        sums = _in_order([each for each, _ in found], alike.values(), device)
        if measures is not None:
            measures = _in_order([each for _, each in found if each is not None], alike.values(), device)
    return sum_windows(calls, sums) if sharded else sums, measures


def _in_order(parts: list[Tensor], members: Iterable[list[int]], device: torch.device) -> Tensor:
    """(2, calls, ...) of all calls, from parts that have the calls named in ``members``."""
    order = [i for each in members for i in each]
    dtype = torch.float64 if any(part.dtype == torch.float64 for part in parts) else parts[0].dtype
    back = torch.tensor(sorted(range(len(order)), key=order.__getitem__), device=device)
    return torch.cat([part.to(device, dtype) for part in parts], 1)[:, back]


def _sums_of_alike(calls: list[Capture], plan: Plan) -> tuple[Tensor, Tensor | None]:
    """The same for calls of equal shape."""
    order, first = plan.order, calls[0]
    gram = _joined([call.gram for call in calls])
    assert gram is not None
    live = _joined([call.live for call in calls])
    angled = any(call.angled for call in calls)
    if torch.is_grad_enabled() or not angled:
        value, live, factor = entropies(gram, live, order, first.shape, first.dtype)
    else:  # nothing is pressed, and angles need the factor all the same
        value, live, factor = entropy_of_gram(gram, live, order, first.shape, first.dtype, with_factor=True)
    sizes = [len(call.gram) for call in calls if call.gram is not None]
    if factor is not None and angled:
        for call, own in zip(calls, torch.split(factor, sizes), strict=True):
            call.factor = own if call.angled else None
    weight = window_weights(live, value, order.fewest, first.shape[0])
    sums = _over(torch.stack((value.masked_fill(weight == 0, 0), weight)), sizes)
    if not plan.due:
        return sums, None
    with torch.no_grad():
        return sums, _measures(calls, gram.detach(), sizes)


def _measures(calls: list[Capture], gram: Tensor, sizes: list[int]) -> Tensor:
    """(2, calls, 4): over the windows of each call, sums of what can hide in an entropy, and of the weights."""
    beside = [call.measures for call in calls]
    if None not in beside:
        found = torch.cat([each[0] for each in beside if each]), torch.cat([each[1] for each in beside if each])
    elif gram.shape[-1] < calls[0].shape[0]:
        return torch.zeros(2, len(calls), 4, dtype=gram.dtype, device=gram.device)  # of a pass before they were due
    else:
        found = measures_of(gram)
    values, weights = weighted_measures(*found)
    return torch.stack([_over(each.mT, sizes).mT for each in (values, weights)])


def weighted_measures(measures: Tensor, live: Tensor) -> tuple[Tensor, Tensor]:
    """(windows, 4) each: measures where a window has enough rows for them, otherwise 0, and which are counted."""
    two, three = ((live >= fewest).to(measures.dtype) for fewest in (2, 3))
    weights = torch.stack((two, three, two, two), -1)
    return torch.where(weights > 0, measures, 0), weights


def _joined(parts: Sequence[Tensor | None]) -> Tensor | None:
    given = [part for part in parts if part is not None]
    return torch.cat(given) if len(given) > 1 else given[0] if given else None


def _over(values: Tensor, sizes: list[int]) -> Tensor:
    """(..., sum of sizes) summed within each of ``sizes``, (..., len(sizes))."""
    if len(set(sizes)) == 1:
        return values.reshape(*values.shape[:-1], len(sizes), sizes[0]).sum(-1)
    return torch.stack([part.sum(-1) for part in torch.split(values, sizes, -1)], -1)


def _of(wanted: Sequence[str], layers: list[str], *values: Tensor) -> tuple[Tensor, ...]:
    """(layers,) values of those that are wanted."""
    places = [i for i, name in enumerate(layers) if name in wanted]
    if len(places) == len(layers):
        return values
    return tuple(torch.stack([value[i] for i in places]) if places else value[:0] for value in values)


def _mean(means: Tensor, weights: Tensor, among: int | None = None) -> Tensor:
    """Over the layers that can have an entropy, or as many as are named."""
    return means.sum() / ((weights > 0).sum().clamp(min=1) if among is None else among)


def _pressed(means: Tensor, weights: Tensor, layers: list[str], plan: Plan) -> Tensor:
    """What the weight multiplies: the entropies of the layers as one number, to be minimized."""
    objective = plan.config.objective
    if not layers:
        return means.sum()
    values = means if objective.direction == "down" else -means
    if plan.targets is not None:
        values = _up_to(means, weights, layers, plan.targets, objective)
    if plan.config.layers.reduce == "largest_drop" and len(layers) > 1:
        return values[_largest_drop(means.detach(), weights > 0)]
    return _mean(values, weights, plan.among)


def _largest_drop(means: Tensor, known: Tensor) -> Tensor:
    """Place of the layer whose entropy is furthest below that of the nearest one before it that has one."""
    places = torch.arange(len(means), device=means.device)
    before = torch.where(known, places, 0).cummax(0).values[:-1]
    drop = torch.where(known[1:] & known[before], means[before] - means[1:], -math.inf)
    return drop.argmax() + 1


def _up_to(
    means: Tensor, weights: Tensor, layers: list[str], targets: dict[str, float], objective: ObjectiveConfig
) -> Tensor:
    """What is left to the target, layer by layer; 0 beyond it, and where a layer has no target yet."""
    nothing = 0.0 if objective.direction == "up" else math.inf
    target = torch.tensor([targets.get(name, nothing) for name in layers], dtype=means.dtype).to(means.device)
    left = means - target if objective.direction == "down" else target - means
    return torch.where(weights > 0, left.clamp(min=0), 0)


def _finite(value: Tensor, loss: Tensor) -> Tensor:
    """``value``, and 0 where it or the loss is not finite."""
    return torch.where((value.detach() + loss.detach().reshape(())).isfinite(), value, 0)


def check_loss(loss: Tensor, scaled_by: float) -> None:
    """Raise TypeError or ValueError where :func:`build_objective` has no use for an argument, naming it."""
    if not isinstance(loss, Tensor):
        raise TypeError(f"loss must be a tensor, found {type(loss).__name__}")
    if loss.numel() != 1 or not loss.is_floating_point():
        raise ValueError(
            f"loss must be one floating-point number, found shape {tuple(loss.shape)} of {loss.dtype}; "
            "reduce it first, for example with loss.mean()"
        )
    if not isinstance(scaled_by, (int, float, SupportsFloat)):  # numbers first: a protocol is slow to ask for
        raise TypeError(f"scaled_by must be a number, found {type(scaled_by).__name__}; give 1 / micro-batches")
    if not (math.isfinite(scaled_by) and scaled_by > 0):
        raise ValueError(f"scaled_by must be a positive number, found {scaled_by}; give 1 / micro-batches")


def counted_layers(names: Sequence[str], skip_first: int, skip_last: int) -> tuple[str, ...]:
    """Which of the watched layers count. Skipping applies only where it leaves a layer."""
    n = len(names)
    return tuple(names) if n <= skip_first + skip_last else tuple(names[skip_first : n - skip_last])
