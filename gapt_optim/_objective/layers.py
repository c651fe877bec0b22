"""Which layers count at a step, and how the layers' entropies become the one that is minimized.

Layers are numbered from the input to the output. A *schedule* gives each layer's share of the pressure
at a step of compression; a *reduction* turns the entropies into one number. The paper's
objective is the schedule `all` with the reduction `mean`. `largest_drop` judges the shape of the whole
profile and takes no shares, so it goes with `all`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

Schedule = Callable[[int, int, int], list[float]]
Reduction = Callable[[Tensor, Tensor], Tensor]


def counted_layers(names: Sequence[str], skip_first: int, skip_last: int) -> list[str]:
    """Which of the tapped layers count. Skipping applies only where it leaves a layer."""
    n = len(names)
    return list(names) if n <= skip_first + skip_last else list(names[skip_first : n - skip_last])


def schedule_shares(name: str, n: int, step: int, period: int) -> list[float]:
    """Each of n layers' share of the pressure at compression step ``step`` (from 0); shares sum to 1."""
    shares = SCHEDULES[name](n, step, period)
    total = sum(shares)
    return [share / total for share in shares]


def all_layers(n: int, step: int, period: int) -> list[float]:
    """Every layer equally, every step."""
    return [1.0] * n


def rotate(n: int, step: int, period: int) -> list[float]:
    """One layer per step, in turn from input to output: full pressure on one place, the others left to adapt."""
    return [float(i == step % n) for i in range(n)]


def alternate(n: int, step: int, period: int) -> list[float]:
    """Even-numbered layers, then odd-numbered ones: a compressed layer always has free neighbours."""
    return [1.0] if n == 1 else [float(i % 2 == step % 2) for i in range(n)]


def blocks(n: int, step: int, period: int) -> list[float]:
    """Thirds of the depth in turn, ``period`` steps each: early, middle and late layers compress by themselves."""
    count = min(3, n)
    active = step // period % count
    return [float(i * count // n == active) for i in range(n)]


def progressive(n: int, step: int, period: int) -> list[float]:
    """The last layer first, one more towards the input every ``period`` steps, until all count."""
    depth = min(n, 1 + step // period)
    return [float(i >= n - depth) for i in range(n)]


def valley(n: int, step: int, period: int) -> list[float]:
    """Most on the middle layers, least at both ends: deepens the bottleneck that language models form there."""
    return [1.0 + min(i, n - 1 - i) for i in range(n)]


def mountain(n: int, step: int, period: int) -> list[float]:
    """Most on both ends, least in the middle: the opposite of `valley`, for comparison."""
    return [1.0 + max(i, n - 1 - i) - n // 2 for i in range(n)]


def slope(n: int, step: int, period: int) -> list[float]:
    """Growing with depth: late layers, close to the prediction, compress most."""
    return [1.0 + i for i in range(n)]


SCHEDULES: dict[str, Schedule] = {
    "all": all_layers,
    "rotate": rotate,
    "alternate": alternate,
    "blocks": blocks,
    "progressive": progressive,
    "valley": valley,
    "mountain": mountain,
    "slope": slope,
}


def reduction_coefficients(name: str, entropies: Tensor, shares: Tensor) -> Tensor:
    """What each layer's entropy counts for in the one that is minimized.

    Every reduction here is piecewise linear, so the reduced entropy is ``(coefficients * entropies).sum()`` and the
    coefficients are its gradient.

    Args:
        name: a key of :data:`REDUCTIONS`.
        entropies: (layers,), in order of depth.
        shares: (layers,), from :func:`schedule_shares`; a layer of share 0 takes no part in `mean`, `max` and `min`.

    Returns:
        (layers,)
    """
    return REDUCTIONS[name](entropies, shares)


def mean(entropies: Tensor, shares: Tensor) -> Tensor:
    """The mean, weighted by share: the paper's choice."""
    return shares


def maximum(entropies: Tensor, shares: Tensor) -> Tensor:
    """The highest: only the layer that is spread out most is compressed."""
    return _one_hot(entropies, entropies.masked_fill(shares == 0, -torch.inf).argmax())


def minimum(entropies: Tensor, shares: Tensor) -> Tensor:
    """The lowest: one layer becomes the bottleneck, the others stay as they are."""
    return _one_hot(entropies, entropies.masked_fill(shares == 0, torch.inf).argmin())


def largest_drop(entropies: Tensor, shares: Tensor) -> Tensor:
    """The layer behind the steepest fall between neighbours: goes on where the network compresses by itself."""
    if len(entropies) == 1:
        return torch.ones_like(entropies)
    return _one_hot(entropies, (-entropies.diff()).argmax() + 1)


def _one_hot(like: Tensor, index: Tensor) -> Tensor:
    return (_positions(like) == index).to(like.dtype)


def _positions(like: Tensor) -> Tensor:
    return torch.arange(len(like), device=like.device)


REDUCTIONS: dict[str, Reduction] = {
    "mean": mean,
    "max": maximum,
    "min": minimum,
    "largest_drop": largest_drop,
}
