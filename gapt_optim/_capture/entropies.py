"""From Gram matrices to entropies: all layers of a step in one batch."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from ..entropy import (
    entropy_of_gram,
    kernel_matrix,
    measures_of_gram,
    window_weights,
    windows_first,
    windows_last,
)
from .grams import Grams, kernel_of

if TYPE_CHECKING:
    from ..config import EntropyConfig

NUMBERS = 5
"""Of a call: its entropy, then the four measures of what can hide in it (:func:`gapt_optim.entropy.measures_of_gram`).
Each is a mean over windows with weights (:func:`gapt_optim.entropy.window_weights`)."""


class Factors(NamedTuple):
    """Of calls of equal shape, what turns rows into the gradients of their mean entropies."""

    members: list[int]
    """Which calls."""
    matrices: Tensor
    """(members, windows, m, m)"""


def entropies_of(
    calls: list[Grams], config: EntropyConfig, device: torch.device, *, with_factors: bool
) -> tuple[Tensor, list[Factors]]:
    """The numbers of each call, (calls, 5) on ``device`` without a graph, and the factors where they are asked for.

    Calls of equal shape are computed as one batch: the matrices are so small that it is the number of operations
    that costs.
    """
    alike: dict[object, list[int]] = {}
    for i, call in enumerate(calls):
        matrices = call.matrices
        key = (matrices.shape, call.shape, call.live is None, matrices.dtype, call.dtype, matrices.device)
        alike.setdefault(key, []).append(i)
    factors: list[Factors] = []
    rows: dict[int, Tensor] = {}
    with torch.no_grad():
        for members in alike.values():
            batch = _batch([calls[i] for i in members])
            numbers, matrices_of = _mean_entropies(batch, config, len(members), with_factors)
            numbers = numbers.to(device)
            if matrices_of is not None:
                factors.append(Factors(members, matrices_of))
            if len(alike) > 1:
                rows.update(zip(members, numbers.unbind(), strict=True))
        return torch.stack([rows[i] for i in range(len(calls))]) if rows else numbers, factors


def _batch(calls: list[Grams]) -> Grams:
    """Calls of equal shape as one, their windows one after the other; matrices have the windows last."""
    live = [call.live for call in calls if call.live is not None]
    beside = [call.measures for call in calls if call.measures is not None]
    return calls[0]._replace(
        matrices=windows_last(torch.cat([call.matrices for call in calls])),
        live=torch.cat(live) if live else None,
        measures=(torch.cat([m for m, _ in beside]), torch.cat([n for _, n in beside])) if beside else None,
    )


def _mean_entropies(
    calls: Grams, config: EntropyConfig, count: int, with_factors: bool
) -> tuple[Tensor, Tensor | None]:
    """Means over windows: numbers (calls, 5), and factors (calls, windows, m, m)."""
    numbers, weights, factors = _of_windows(calls, config, with_factors)
    windows = len(numbers) // count
    weights = weights.reshape(count, windows, NUMBERS)
    shares = weights / weights.sum(1, keepdim=True)
    means = (numbers.reshape(shares.shape) * shares).sum(1)
    if factors is not None:
        factors = windows_first(factors.mul_(shares[..., 0].reshape(-1))).reshape(count, windows, *factors.shape[:2])
    return means, factors


def sums_of(call: Grams, config: EntropyConfig) -> tuple[Tensor, Tensor]:
    """Of the windows of a call, the weighted sum of each number, (5,), and the sum of its weights, (5,)."""
    with torch.no_grad():
        numbers, weights, _ = _of_windows(_batch([call]), config, with_factors=False)
        return (numbers * weights).sum(0), weights.sum(0)


def _of_windows(calls: Grams, config: EntropyConfig, with_factors: bool) -> tuple[Tensor, Tensor, Tensor | None]:
    """Of each window its numbers (windows, 5) and their weights (windows, 5), and factors (m, m, windows)."""
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
    two, three = window_weights(alive, values.dtype, 2), window_weights(alive, values.dtype, 3)
    if live is alive:
        own = three if kernel.center else two
    else:
        own = torch.ones_like(values) if live is None else window_weights(live, values.dtype, 2 + kernel.center)
    return torch.cat((values.unsqueeze(-1), measures), -1), torch.stack((own, two, three, two, two), -1), factors
