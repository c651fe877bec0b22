"""What windows show: entropies of several kernels and orders, with their first tokens and without them.

A window's first token has the largest norm in many models, so each value is wanted with it and without. Order 2 of
large windows follows from the other rows Z, centred, and from the first row h apart: with m the mean of the n other
rows, C the products of Z (of rows or of features, whichever are fewer), a = h - m, and c = n / (n + 1) (Welford, 1962),

- centred: ||C||^2, and with the first row ||C||^2 + 2 c |Za|^2 + c^2 |a|^4;
- plain: ||C||^2 + 2 n |Zm|^2 + n^2 |m|^4, and with the first row 2 |Zh|^2 + 2 n (m'h)^2 + |h|^4 more.

All terms are positive, so that nothing is lost to rounding, however long the first row is.
"""

from __future__ import annotations

import math
from itertools import product
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from ..entropy import Order, entropy_of_gram, gram_of
from ..kernels import Kernel, KernelMatrix, least, windows_last
from ..windows import Windows

Center = bool | Literal["first"]


class Kind(NamedTuple):
    """Which entropy: one column of the sums."""

    kernel: Literal["linear", "cosine"]
    center: Center
    """"first": the mean is taken off before rows are scaled to unit length, and not again."""
    alpha: float
    clamped: bool = False
    """Negative products are taken for 0: :func:`clamped_entropy`."""

    @property
    def lost(self) -> int:
        """Directions that centring takes away, for the largest entropy there can be."""
        return int(bool(self.center) and not self.clamped)

    @property
    def order(self) -> Order:
        """As the library's entropies take it, of rows that were centred before where ``center`` is "first"."""
        return Order(self.alpha, Kernel(self.kernel == "cosine", self.center is True))


def all_kinds(orders: tuple[float, ...]) -> tuple[Kind, ...]:
    """Both kernels, centred or not."""
    kernels: tuple[Literal["linear", "cosine"], ...] = ("linear", "cosine")
    return tuple(Kind(*kind) for kind in product(kernels, (False, True), orders))


PRESETS = {
    "layer-by-layer": Kind("cosine", "first", 1.0, clamped=True),
    "diff-erank": Kind("cosine", "first", 1.0),
}
"""The entropies of two papers, over whole sequences: Skean et al., "Layer by layer: uncovering hidden representations
in language models", 2025, as its code has it, and Wei et al., "Diff-eRank: a novel rank-based metric for evaluating
large language models", 2024."""


class WindowValues(NamedTuple):
    """What some windows show: of k kinds, k entropies in nats, these over their limits, norm ratio and mean share."""

    values: Tensor
    """(2 k + 2, windows)"""
    weights: Tensor
    """(2 k + 2, windows), 1 where a window can have the value."""


def values_of_windows(
    z: Tensor, live: Tensor, first: Tensor, kinds: tuple[Kind, ...], dtype: torch.dtype
) -> WindowValues:
    """What windows show with their first tokens, and behind them the same windows without.

    Args:
        z: (windows, n, d), zero where ``live`` is false; float64 where an order needs eigenvalues.
        live: (windows, n), rows that count.
        first: (windows, n), true at first tokens, at most one in each window.
        kinds: of entropy.
        dtype: of the rows.
    """
    windows, n, features = z.shape
    if all(kind.alpha == 2 for kind in kinds) and (n > features or windows <= n):
        return values_of_order_2(z, live, first, kinds)
    if n > features or any(kind.clamped for kind in kinds):
        found = [values_of_rows(z, keep, kinds, dtype) for keep in (live, live & ~first)]
        return WindowValues(*(torch.cat(pair, 1) for pair in zip(*found, strict=True)))
    gram, at = z @ z.mT, first.any(-1)  # only a window that has a first token changes without it
    both = values_of_gram(torch.cat([gram, gram[at]]), torch.cat([live, (live & ~first)[at]]), features, kinds, dtype)
    place = torch.arange(windows, device=z.device)
    place = torch.cat([place, torch.where(at, windows - 1 + at.cumsum(0), place)])
    return WindowValues(*(values[:, place] for values in both))


def values_of_gram(
    gram: Tensor, live: Tensor, features: int, kinds: tuple[Kind, ...], dtype: torch.dtype
) -> WindowValues:
    """What windows show, from their linear Gram matrices (windows, n, n), of which all kinds are made."""
    gram = gram * (live.unsqueeze(-1) & live.unsqueeze(-2))
    moved, rows, shape = windows_last(gram), live.sum(-1), (gram.shape[-1], features)
    entropies = [
        KernelMatrix(moved, kind.order.kernel).order_2
        if kind.alpha == 2
        else entropy_of_gram(gram, rows, kind.order, shape, dtype, with_factor=False)[0]
        for kind in kinds
    ]
    norms = gram.diagonal(dim1=-2, dim2=-1)
    return _gathered(torch.stack(entropies), kinds, norms, live, gram.sum((-2, -1)), features)


def values_of_rows(z: Tensor, live: Tensor, kinds: tuple[Kind, ...], dtype: torch.dtype) -> WindowValues:
    """What windows show, each kind from products of its own: for more rows than features, and orders beside 2."""
    z = z * live.unsqueeze(-1)
    entropies = []
    for kind in kinds:
        if kind.clamped:
            of_each = [clamped_entropy(unit(rows[keep])) for rows, keep in zip(z, live, strict=True)]
            entropies.append(z.new_tensor(of_each))
            continue
        gram, rows = gram_of(z, Windows(z.shape[1], None, live), kind.order)
        entropies.append(entropy_of_gram(gram, rows, kind.order, z.shape[1:], dtype, with_factor=False)[0])
    norms, resultant = z.square().sum(-1), z.sum(-2).square().sum(-1)
    return _gathered(torch.stack(entropies), kinds, norms, live, resultant, z.shape[2])


def values_of_order_2(z: Tensor, live: Tensor, first: Tensor, kinds: tuple[Kind, ...]) -> WindowValues:
    """What large windows show, for order 2 alone. Each has at most one first row."""
    squares = z.square().sum(-1)
    alive = squares > least(z)
    total = squares.sum(-1)
    window, at = torch.arange(len(z), device=z.device), (alive & first).long().argmax(-1)
    there = (alive & first)[window, at].to(z.dtype)  # a window need not have a first row
    rest = (alive & ~first).to(z.dtype)
    count = rest.sum(-1)
    share, n = count / (count + 1), count.clamp(min=1)
    # Of both kernels from here on, (2, windows, ...). Scaled first, so that squares of entries stay in range.
    sizes = torch.stack([total.unsqueeze(-1).expand_as(squares), squares])
    scale = torch.where(sizes > least(z), sizes, math.inf).rsqrt()
    of = (_scatter_of_rows if z.shape[-2] > z.shape[-1] else _scatter_of_gram)(
        z, scale * rest, scale[:, window, at] * there, window, at, n
    )
    apart = of.apart * there
    trace, noise = of.left + n * of.mean, 16 * torch.finfo(z.dtype).eps
    around = of.norm + 2 * share * of.through_apart * there + (share * apart).square()
    plain = of.norm + 2 * n * of.through_mean + (n * of.mean).square()
    whole = plain + 2 * of.through_head + 2 * n * of.mean_head.square() + of.head.square()
    # (2 kernels, 2 windows): with the first rows, and without.
    centred = [
        _entropy(around, of.left + share * apart, noise * (trace + of.head)),
        _entropy(of.norm, of.left, noise * trace),
    ]
    uncentred = [_entropy(whole, trace + of.head), _entropy(plain, trace)]
    both = [torch.cat(uncentred, 1), torch.cat(centred, 1)]
    nats = torch.stack([both[kind.center is True][int(kind.kernel == "cosine")] for kind in kinds])
    resultant = n.square() * of.mean[0]
    resultants = [(resultant + 2 * n * of.mean_head[0] + of.head[0]) * total, resultant * total]
    keep = torch.cat([live, live & ~first])
    return _gathered(nats, kinds, squares.repeat(2, 1) * keep, keep, torch.cat(resultants), z.shape[-1])


class _Scatter(NamedTuple):
    """Of the rows besides the first, each (2, windows): C and its trace, and products with m, h and a = h - m."""

    norm: Tensor
    """|C|^2"""
    left: Tensor
    mean: Tensor
    """|m|^2, and so on."""
    apart: Tensor
    head: Tensor
    mean_head: Tensor
    """m'h"""
    through_mean: Tensor
    """|Zm|^2, and so on."""
    through_apart: Tensor
    through_head: Tensor


def _scatter_of_rows(z: Tensor, weight: Tensor, of_head: Tensor, window: Tensor, at: Tensor, n: Tensor) -> _Scatter:
    """From a product of features for each kernel, for more rows than features."""
    y = z * weight.unsqueeze(-1)
    mean = y.sum(-2) / n.unsqueeze(-1)
    y.addcmul_((weight > 0).to(z.dtype).unsqueeze(-1), mean.unsqueeze(-2), value=-1)
    products = symmetric_products(y.mT)
    head = z[window, at] * of_head.unsqueeze(-1)
    vectors = torch.stack([mean, head - mean, head], -1)
    m, a, h = vectors.square().sum(-2).unbind(-1)
    zm, za, zh = (vectors * (products @ vectors)).sum(-2).clamp(min=0).unbind(-1)
    return _Scatter(*_size_and_trace(products), m, a, h, (mean * head).sum(-1), zm, za, zh)


def _scatter_of_gram(z: Tensor, weight: Tensor, of_head: Tensor, window: Tensor, at: Tensor, n: Tensor) -> _Scatter:
    """From one product of rows, for fewer of them."""
    gram = symmetric_products(z)
    rest = (weight > 0).to(z.dtype)
    row, own = gram[window, at], gram[window, at, at]
    u, h = row * weight * of_head.unsqueeze(-1), own * of_head.square()
    means = weight * (gram @ weight.permute(1, 2, 0)).permute(2, 0, 1) / n.unsqueeze(-1)
    m, mh = means.sum(-1) / n, u.sum(-1) / n
    products = (gram * weight.unsqueeze(-1)).mul_(weight.unsqueeze(-2))
    half = (means - m.unsqueeze(-1) / 2) * rest
    left, right = torch.stack([half, rest], -1), torch.stack([rest, half], -2)
    products.flatten(0, 1).baddbmm_(left.flatten(0, 1), right.flatten(0, 1), alpha=-1)
    zm, zh = (means - m.unsqueeze(-1)) * rest, (u - mh.unsqueeze(-1)) * rest
    through = (each.square().sum(-1) for each in (zm, zh - zm, zh))
    return _Scatter(*_size_and_trace(products), m, (h - 2 * mh + m).clamp(min=0), h, mh, *through)


def _size_and_trace(products: Tensor) -> tuple[Tensor, Tensor]:
    norms: Tensor = torch.linalg.vector_norm(products, dim=(-2, -1))
    return norms.square(), products.diagonal(dim1=-2, dim2=-1).sum(-1)


def symmetric_products(rows: Tensor) -> Tensor:
    """``rows @ rows.mT`` of (..., n, d), in four strips below the diagonal: 10 of 16 parts of the work."""
    n = rows.shape[-2]
    if n < 64:  # too small for strips to pay
        return rows @ rows.mT
    products = rows.new_empty(*rows.shape[:-1], n)
    strip = -(-n // 4)
    for start in range(0, n, strip):
        end = min(n, start + strip)
        part = rows[..., start:end, :] @ rows[..., :end, :].mT
        products[..., start:end, :end] = part
        products[..., :start, start:end] = part[..., :start].mT
    return products


def _entropy(squared: Tensor, trace: Tensor, noise: Tensor | float = 0.0) -> Tensor:
    """-log(squared / trace^2); 0 for a matrix that counts as zero."""
    zero = (trace <= noise) | (squared == 0)
    ratio = squared / torch.where(zero, 1, trace).square()
    return -torch.where(zero, 1, ratio).log().clamp(max=0)


def _gathered(
    nats: Tensor, kinds: tuple[Kind, ...], norms: Tensor, live: Tensor, resultant: Tensor, features: int
) -> WindowValues:
    """The entropies with what else windows show.

    Args:
        nats: (kinds, windows)
        kinds: of entropy.
        norms: (windows, n), squared; 0 where a row does not count.
        live: (windows, n), rows that count.
        resultant: (windows,), squared norm of the sum of the rows.
        features: of a row.
    """
    nonzero = (norms > least(norms)).sum(-1)
    # Under all but the plain kernel, a row of zeros does not count.
    counts = torch.stack([live.sum(-1) if kind.order.kernel.plain else nonzero for kind in kinds])
    lost = torch.tensor([kind.lost for kind in kinds], device=nats.device).unsqueeze(-1)
    limits = (counts - lost).clamp(min=1, max=features).to(norms.dtype).log()
    last, there = nonzero.clamp(min=1), nonzero > 0
    ordered = norms.sort(-1, descending=True).values
    median = ordered.gather(-1, torch.stack([(last - 1) // 2, last // 2], dim=-1)).sqrt().mean(-1)
    ratio = torch.where(there, ordered[:, 0].sqrt() / torch.where(there, median, 1), 1)
    share = torch.where(there, resultant / (torch.where(there, norms.sum(-1), 1) * last), 0).clamp(0, 1)
    normalized = torch.where(limits > 0, nats / limits, 0)
    weights, both = counts >= 2 + lost, (nonzero >= 2).expand(2, -1)
    return WindowValues(
        torch.cat([nats, normalized, torch.stack([ratio, share])]), torch.cat([weights, weights, both]).to(nats.dtype)
    )


def unit(rows: Tensor) -> Tensor:
    """Rows (..., n, d) of length 1, or of zeros."""
    return torch.nn.functional.normalize(rows, dim=-1, eps=least(rows))


def clamped_entropy(rows: Tensor) -> float:
    """The von Neumann entropy of the products of rows (n, d), or of features where these are fewer, the negative ones
    taken for 0, and so their negative eigenvalues."""
    n, d = rows.shape
    products = (rows.mT @ rows if n > d else rows @ rows.mT).double().clamp(min=0)
    p = torch.linalg.eigvalsh(products).clamp(min=0)
    return float(torch.special.entr(p / p.sum()).sum()) if p.any() else 0.0


def by_products(order: float) -> bool:
    """The order needs no eigenvalues."""
    return 2 <= order <= 8 and float(order).is_integer()
