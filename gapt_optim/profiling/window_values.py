"""What windows show: entropies of several kernels and orders, with their first tokens and without them."""

from __future__ import annotations

import math
from itertools import product
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from ..entropy import Order, entropy_of_gram, window_weights
from ..kernels import LINEAR, Kernel, KernelMatrix, least, windows_last
from .large_windows import Collisions, collisions, collisions_of_rows, symmetric_products

Center = bool | Literal["first"]


class Kind(NamedTuple):
    """Which entropy: one column of the sums."""

    kernel: Literal["linear", "cosine"]
    center: Center
    """"first": the mean is taken off before rows are scaled to unit length, and not again."""
    alpha: float

    @property
    def order(self) -> Order:
        """As the library's entropies take it, of rows that were centred before where ``center`` is "first"."""
        return Order(self.alpha, Kernel(self.kernel == "cosine", self.center is True))


def all_kinds(orders: tuple[float, ...]) -> tuple[Kind, ...]:
    """Both kernels, centred or not."""
    kernels: tuple[Literal["linear", "cosine"], ...] = ("linear", "cosine")
    return tuple(Kind(*kind) for kind in product(kernels, (False, True), orders))


class WindowValues(NamedTuple):
    """What some windows show."""

    entropies: Tensor
    """(kinds, windows), in nats."""
    limits: Tensor
    """(kinds, windows), the largest that each can be."""
    weights: Tensor
    """(kinds, windows), 1 where a window can have the entropy."""
    norm_ratio: Tensor
    mean_share: Tensor
    shape_weights: Tensor
    """(windows,), the weights of the last two."""

    def of(self, windows: Tensor) -> WindowValues:
        """Those windows alone."""
        return WindowValues(*(values[..., windows] for values in self))


def values_of_windows(
    z: Tensor, live: Tensor, first: Tensor, kinds: tuple[Kind, ...], shape: tuple[int, int], dtype: torch.dtype
) -> tuple[WindowValues, WindowValues, Tensor | None]:
    """What windows show, with their first tokens and without, and of which windows the latter is; None for all."""
    size, features = shape
    if all(kind.alpha == 2 for kind in kinds) and len(z) <= size:  # few and large
        whole, without = values_of_order_2(z, live, first, kinds)
        return whole, without, None
    if size > features:
        whole, without = values_of_rows(z, live, first, kinds, dtype)
        return whole, without, None
    gram = z @ z.mT
    whole = values_of_gram(gram, live, features, kinds, dtype)
    at = first.any(-1)
    return whole, values_of_gram(gram[at], (live & ~first)[at], features, kinds, dtype), at


def values_of_gram(
    gram: Tensor, live: Tensor, features: int, kinds: tuple[Kind, ...], dtype: torch.dtype
) -> WindowValues:
    """What windows show, from their linear Gram matrices (windows, n, n) where n <= d.

    Args:
        gram: of the rows; float64 where an order needs eigenvalues.
        live: (windows, n), rows that count.
        features: d.
        kinds: of entropy.
        dtype: of the rows.
    """
    n = gram.shape[-1]
    gram = gram * (live.unsqueeze(-1) & live.unsqueeze(-2))
    norms = gram.diagonal(dim1=-2, dim2=-1)
    moved, rows = windows_last(gram), live.sum(-1)
    entropies, counts = [], []
    for kind in kinds:
        if kind.alpha == 2:
            matrix = KernelMatrix(moved, kind.order.kernel)
            value, count = matrix.order_2, matrix.live
        else:
            value, count, _ = entropy_of_gram(gram, rows, kind.order, (n, features), dtype, with_factor=False)
        entropies.append(value)
        counts.append(rows if count is None else count.long())
    return _gathered(entropies, counts, kinds, norms, gram.sum((-2, -1)), (n, features))


def values_of_order_2(
    z: Tensor, live: Tensor, first: Tensor, kinds: tuple[Kind, ...]
) -> tuple[WindowValues, WindowValues]:
    """The same as :func:`values_of_rows` for order 2 alone; faster for few large windows."""
    shape = (z.shape[-2], z.shape[-1])
    both: tuple[Collisions, Collisions]
    if shape[0] > 2 * shape[1]:
        norms = z.square().sum(-1)
        both = collisions_of_rows(z, live, first)
    else:
        gram = symmetric_products(z)
        norms = gram.diagonal(dim1=-2, dim2=-1)
        both = collisions(gram, live, first)
    norms = norms * live
    alive = norms > least(norms)
    found = []
    for one, keep in zip(both, (live, live & ~first), strict=True):
        counts = [(keep if kind.order.kernel.plain else keep & alive).sum(-1) for kind in kinds]
        entropies = [one.entropies[kind.kernel == "cosine", kind.center is True] for kind in kinds]
        found.append(_gathered(entropies, counts, kinds, norms * keep, one.resultant, shape))
    return found[0], found[1]


def values_of_rows(
    z: Tensor, live: Tensor, first: Tensor, kinds: tuple[Kind, ...], dtype: torch.dtype
) -> tuple[WindowValues, WindowValues]:
    """What windows with more rows than features show, with and without their first tokens, from d x d matrices.

    Args:
        z: (windows, n, d), zero where ``live`` is false; float64 where an order needs eigenvalues.
        live: (windows, n), rows that count.
        first: (windows, n), true at first tokens.
        kinds: of entropy.
        dtype: of the rows.
    """
    shape = (z.shape[-2], z.shape[-1])
    norms = z.square().sum(-1)
    alive = norms > least(z)
    unit = z * torch.where(alive, norms, math.inf).rsqrt().unsqueeze(-1)
    # The products are of the rows without the first token, whose square is then added: taken off, a long token would
    # leave nothing but its own rounding.
    rest, heads = ~first.unsqueeze(-1), first.unsqueeze(-1)
    sums = {}
    for kernel, rows in (("linear", z), ("cosine", unit)):
        without = rows * rest
        sums[kernel] = without.mT @ without, without.sum(-2), (rows * heads).sum(-2)
    found = []
    for with_first in (True, False):
        keep = live if with_first else live & ~first
        count = (alive & keep).sum(-1)
        entropies, counts = [], []
        for kind in kinds:
            gram, total, head = sums[kind.kernel]
            if with_first:
                gram, total = gram + head.unsqueeze(-1) * head.unsqueeze(-2), total + head
            if kind.center is True:
                gram = _centered(gram, total, count)
            rows_ = keep.sum(-1) if kind.order.kernel.plain else count
            ready = Order(kind.alpha, LINEAR)  # of the kernel already
            value, _, _ = entropy_of_gram(gram, rows_, ready, shape, dtype, with_factor=False)
            entropies.append(value)
            counts.append(rows_)
        _, total, head = sums["linear"]
        resultant = (total + head if with_first else total).square().sum(-1)
        found.append(_gathered(entropies, counts, kinds, norms * keep, resultant, shape))
    return found[0], found[1]


def _centered(gram: Tensor, total: Tensor, count: Tensor) -> Tensor:
    """Products of features (windows, d, d) of rows about their mean; 0 where that is all rounding."""
    before = gram.diagonal(dim1=-2, dim2=-1).sum(-1)
    mean = total / count.clamp(min=1).sqrt().unsqueeze(-1)
    gram = gram - mean.unsqueeze(-1) * mean.unsqueeze(-2)
    left = gram.diagonal(dim1=-2, dim2=-1).sum(-1)
    return gram * (left > 16 * torch.finfo(gram.dtype).eps * before)[..., None, None]


def _gathered(
    entropies: list[Tensor],
    counts: list[Tensor],
    kinds: tuple[Kind, ...],
    norms: Tensor,
    resultant: Tensor,
    shape: tuple[int, int],
) -> WindowValues:
    """The entropies with their limits, and norm ratio and mean share.

    Args:
        entropies: (windows,) of each kind.
        counts: (windows,) rows that count for it.
        kinds: of entropy.
        norms: (windows, n), squared; 0 where a row does not count.
        resultant: (windows,), squared norm of the sum of the rows.
        shape: (n, d).
    """
    limits = [
        (rows - int(bool(kind.center))).clamp(min=1, max=shape[1]).to(norms.dtype).log()
        for kind, rows in zip(kinds, counts, strict=True)
    ]
    nonzero = (norms > least(norms)).sum(-1)
    ordered = norms.sort(-1, descending=True).values
    last = nonzero.clamp(min=1)
    middle = torch.stack([(last - 1) // 2, last // 2], dim=-1)
    median = ordered.gather(-1, middle).sqrt().mean(-1)
    ratio = torch.where(nonzero > 0, ordered[..., 0].sqrt() / torch.where(nonzero > 0, median, 1), 1)
    total = norms.sum(-1)
    share = torch.where(nonzero > 0, resultant / (torch.where(nonzero > 0, total, 1) * last), 0).clamp(0, 1)
    weights = torch.stack(
        [window_weights(rows, norms, 2 + bool(kind.center), shape[0]) for kind, rows in zip(kinds, counts, strict=True)]
    )
    shape_weights = window_weights(nonzero, norms, 2, shape[0])
    return WindowValues(torch.stack(entropies), torch.stack(limits), weights, ratio, share, shape_weights)


def by_products(order: float) -> bool:
    """The order needs no eigenvalues."""
    return 2 <= order <= 8 and float(order).is_integer()
