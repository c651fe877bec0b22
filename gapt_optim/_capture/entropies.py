"""From Gram matrices to entropies: all layers of a step in one batch."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..config import EntropyConfig
from ..entropy import entropy_of_gram, measures_of_gram
from .grams import Grams, kernel_of


class Entropies(NamedTuple):
    """Entropies of several calls, each a mean over the windows with a row that counts."""

    values: list[Tensor]
    """Scalars."""
    factors: list[Tensor]
    """(windows, m, m), which turn rows into the gradients of these means; empty where they are not asked for."""
    measures: list[Tensor]
    """(4,): what can hide in each entropy, see :func:`gapt_optim.entropy.measures_of_gram`."""


def entropies_of(calls: list[Grams], config: EntropyConfig, *, with_factors: bool) -> Entropies:
    """The entropy of each call, and what can hide in it.

    Calls of equal shape are computed as one batch: the matrices are so small that it is the number of operations
    that costs.
    """
    empty = torch.empty(0)
    found = Entropies([empty] * len(calls), [empty] * (len(calls) if with_factors else 0), [empty] * len(calls))
    alike: dict[Any, list[int]] = {}
    for i, call in enumerate(calls):
        matrices = call.matrices
        key = (matrices.shape, call.shape, call.live is None, matrices.dtype, call.dtype, matrices.device)
        alike.setdefault(key, []).append(i)
    for members in alike.values():
        values, factors, measures = _mean_entropies(_batch([calls[i] for i in members]), config, with_factors)
        for i, value, of_call in zip(members, values.unbind(), measures.unbind(), strict=True):
            found.values[i], found.measures[i] = value, of_call
        if factors is not None:
            for i, factor in zip(members, factors.unbind(), strict=True):
                found.factors[i] = factor
    return found


def _batch(calls: list[Grams]) -> Grams:
    """Calls of equal shape as one, with a leading dimension for the calls."""
    first, one = calls[0], len(calls) == 1

    def stack(tensors: list[Tensor]) -> Tensor:
        return (tensors[0].unsqueeze(0) if one else torch.stack(tensors)).detach()

    live = [call.live for call in calls if call.live is not None]
    beside = [call.measures for call in calls if call.measures is not None]
    return first._replace(
        matrices=stack([call.matrices for call in calls]),
        live=stack(live) if live else None,
        measures=(stack([m for m, _ in beside]), stack([n for _, n in beside])) if beside else None,
    )


def _mean_entropies(calls: Grams, config: EntropyConfig, with_factors: bool) -> tuple[Tensor, Tensor | None, Tensor]:
    """Means over windows: entropies (calls,), factors (calls, windows, m, m) and measures (calls, 4)."""
    kernel = kernel_of(config)
    values, factors, live = entropy_of_gram(
        calls.matrices,
        config.alpha,
        kernel,
        calls.shape,
        calls.dtype,
        calls.live,
        config.normalize,
        with_gradient=with_factors,
    )
    measures, alive = calls.measures if calls.measures is not None else measures_of_gram(calls.matrices)
    measured = (measures * _shares(alive).unsqueeze(-1)).sum(-2)
    if live is None:
        count = max(values.shape[-1], 1)  # an empty batch has no window
        return values.sum(-1) / count, None if factors is None else factors.div_(count), measured
    shares = _shares(live).to(values.dtype)
    return (
        (values * shares).sum(-1),
        None if factors is None else factors.mul_(shares[..., None, None]),
        measured,
    )


def _shares(live: Tensor) -> Tensor:
    """What each window counts for in a mean: those with a row that counts alike, the others nothing."""
    share = (live > 0).to(torch.get_default_dtype() if not live.is_floating_point() else live.dtype)
    return share / share.sum(-1, keepdim=True).clamp(min=1)
