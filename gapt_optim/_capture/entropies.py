"""From Gram matrices to entropies: all layers of a step in one batch."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..config import EntropyConfig
from ..entropy import entropy_of_gram, kernel_matrix, measures_of_gram, windows_first, windows_last
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
        values, factors, measures = _mean_entropies(
            _batch([calls[i] for i in members]), config, len(members), with_factors
        )
        for i, value, of_call in zip(members, values.unbind(), measures.unbind(), strict=True):
            found.values[i], found.measures[i] = value, of_call
        if factors is not None:
            for i, factor in zip(members, factors.unbind(), strict=True):
                found.factors[i] = factor
    return found


def _batch(calls: list[Grams]) -> Grams:
    """Calls of equal shape as one, their windows one after the other; matrices have the windows last."""
    live = [call.live for call in calls if call.live is not None]
    beside = [call.measures for call in calls if call.measures is not None]
    return calls[0]._replace(
        matrices=windows_last(_joined([call.matrices for call in calls])),
        live=_joined(live) if live else None,
        measures=(_joined([m for m, _ in beside]), _joined([n for _, n in beside])) if beside else None,
    )


def _joined(tensors: list[Tensor]) -> Tensor:
    return (tensors[0] if len(tensors) == 1 else torch.cat(tensors)).detach()


def _mean_entropies(
    calls: Grams, config: EntropyConfig, count: int, with_factors: bool
) -> tuple[Tensor, Tensor | None, Tensor]:
    """Means over windows: entropies (calls,), factors (calls, windows, m, m) and measures (calls, 4)."""
    kernel = kernel_of(config)
    gram = kernel_matrix(calls.matrices, kernel, calls.shape)
    measures, alive = calls.measures if calls.measures is not None else measures_of_gram(calls.matrices, gram)
    values, factors, live = entropy_of_gram(
        gram,
        config.alpha,
        kernel,
        calls.shape,
        calls.dtype,
        calls.live,
        config.normalize,
        with_gradient=with_factors,
    )
    windows = values.shape[0] // count
    measured = (
        measures.reshape(count, windows, measures.shape[-1])
        * _shares(alive.reshape(count, windows), measures.dtype).unsqueeze(-1)
    ).sum(-2)
    if live is None:
        shares = values.new_full((count, windows), 1 / max(windows, 1))  # an empty batch has no window
    else:
        shares = _shares(live.reshape(count, windows), values.dtype)
    if factors is not None:
        factors = windows_first(factors.mul_(shares.reshape(-1))).reshape(count, windows, *factors.shape[:2])
    return (values.reshape(count, windows) * shares).sum(-1), factors, measured


def _shares(live: Tensor, dtype: torch.dtype) -> Tensor:
    """What each window counts for in a mean: those with a row that counts alike, the others nothing.

    Where no window has one, all count: their entropy is 0, and the longest of no rows is as long as the others.
    """
    counts = live > 0
    share = (counts | ~counts.any(-1, keepdim=True)).to(dtype)
    return share / share.sum(-1, keepdim=True).clamp(min=1)
