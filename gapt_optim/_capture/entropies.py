"""From Gram matrices to entropies: all layers of a step in one batch."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from ..entropy import entropy_of_gram, kernel_matrix, measures_of_gram, windows_first, windows_last
from .grams import Grams, kernel_of

if TYPE_CHECKING:
    from ..config import EntropyConfig

NUMBERS = 5
"""Of a call: its entropy, then the four measures of what can hide in it (:func:`gapt_optim.entropy.measures_of_gram`).
Each is a mean over the windows with a row that counts."""


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
    measure_shares = _shares(alive.reshape(count, windows), values.dtype)
    if live is None:
        shares = values.new_full((count, windows), 1 / max(windows, 1))  # an empty batch has no window
    else:
        shares = measure_shares if live is alive else _shares(live.reshape(count, windows), values.dtype)
    entropy = (values.reshape(count, windows) * shares).sum(-1, keepdim=True)
    measured = (measures.reshape(count, windows, NUMBERS - 1) * measure_shares.unsqueeze(-1)).sum(-2)
    if factors is not None:
        factors = windows_first(factors.mul_(shares.reshape(-1))).reshape(count, windows, *factors.shape[:2])
    return torch.cat((entropy, measured), -1), factors


def _shares(live: Tensor, dtype: torch.dtype) -> Tensor:
    """What each window counts for in a mean: those with a row that counts alike, the others nothing.

    Where no window has one, all count: their entropy is 0, and the longest of no rows is as long as the others.
    """
    counts = live.to(dtype).clamp(min=1e-30, max=1)  # next to 1 it vanishes, next to its like it does not
    return counts / counts.sum(-1, keepdim=True)
