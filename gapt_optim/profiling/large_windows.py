"""Order-2 entropies of windows of many rows, in few passes over their rows or Gram matrices.

A window's first token has the largest norm in many models, so each value is wanted with it and without. The matrices
are made without it. What it adds follows from its row alone, and every term of that is positive, so nothing is lost to
rounding: for a Gram matrix M of the other rows, with u the products of the first row with them and q its own,

- plain: ||M||^2 + 2 |u|^2 + q^2, and a trace of tr M + q;
- centred over n other rows, with u and q of the first row minus their mean: the scatter of n + 1 rows is that of n rows
  plus n / (n + 1) times that of the first row around their mean (Welford, 1962), so ||M||^2 + 2 c |u|^2 + c^2 q^2 with
  c = n / (n + 1), and a trace of tr M + c q.

Where there are more rows than features, the matrix is C, the d x d products of the other rows about their mean m, and
h the first row. Then all four follow from C, again as sums of what is positive:

- centred: ||C||^2, and with the first row ||C||^2 + 2 c a'Ca + c^2 |a|^4, where a = h - m;
- plain: ||C + n mm'||^2 = ||C||^2 + 2 n m'Cm + n^2 |m|^4, and with the first row 2 h'Ch + 2 n (m'h)^2 + |h|^4 more.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Collisions(NamedTuple):
    """What the Gram matrices of some windows show, with the first token or without."""

    entropies: dict[tuple[bool, bool], Tensor]
    """(windows,) in nats, by (cosine, center)."""
    resultant: Tensor
    """(windows,) squared norm of the sum of the rows."""


def collisions(gram: Tensor, live: Tensor, first: Tensor) -> tuple[Collisions, Collisions]:
    """Order-2 entropies with all rows, and without the first.

    Args:
        gram: (windows, n, n), linear.
        live: (windows, n), rows that count.
        first: (windows, n), true at most once in each window.
    """
    squares = gram.diagonal(dim1=-2, dim2=-1) * live
    least = 8 * torch.finfo(gram.dtype).tiny
    alive = live & (squares > least)
    at = (alive & first).long().argmax(-1, keepdim=True)
    there = (alive & first).any(-1)  # a window need not have a first token
    rest = (alive & ~first).to(gram.dtype)
    row = gram.gather(-2, at.unsqueeze(-1).expand(-1, 1, gram.shape[-1])).squeeze(-2)
    own = squares.gather(-1, at).squeeze(-1) * there
    count = rest.sum(-1)
    share = count / (count + 1)
    whole: dict[tuple[bool, bool], Tensor] = {}
    without: dict[tuple[bool, bool], Tensor] = {}
    total = squares.sum(-1)
    resultants = []
    for cosine in (False, True):
        # Scaled first, so that squares of entries stay in range.
        inverse = torch.where(squares > least, squares, torch.inf) if cosine else _positive(total, least).unsqueeze(-1)
        scale = inverse.rsqrt().expand_as(squares)
        matrix = (gram * (scale * rest).unsqueeze(-1)).mul_((scale * rest).unsqueeze(-2))
        head = scale.gather(-1, at).squeeze(-1)
        u, q = row * scale * rest * (head * there).unsqueeze(-1), own * head.square()
        trace = matrix.diagonal(dim1=-2, dim2=-1).sum(-1)
        norm = _squared(matrix)
        without[cosine, False] = _entropy(norm, trace, 0 * trace)
        whole[cosine, False] = _entropy(norm + 2 * u.square().sum(-1) + q.square(), trace + q, 0 * trace)
        means = matrix.sum(-1) / count.clamp(min=1).unsqueeze(-1)
        if not cosine:
            before = (means.sum(-1) * count, 2 * u.sum(-1) + q)
            resultants = [(before[0] + before[1]) * total, before[0] * total]
        mean = means.sum(-1) / count.clamp(min=1)
        half = (means - mean.unsqueeze(-1) / 2) * rest
        matrix.addcmul_(half.unsqueeze(-1), rest.unsqueeze(-2), value=-1)
        matrix.addcmul_(rest.unsqueeze(-1), half.unsqueeze(-2), value=-1)
        noise = 16 * torch.finfo(gram.dtype).eps
        norm, left = _squared(matrix), matrix.diagonal(dim1=-2, dim2=-1).sum(-1)
        without[cosine, True] = _entropy(norm, left, noise * trace)
        middle = u.sum(-1) / count.clamp(min=1)
        around = (u - middle.unsqueeze(-1) - means + mean.unsqueeze(-1)) * rest
        apart = share * (q - 2 * middle + mean).clamp(min=0) * there
        added = 2 * share * around.square().sum(-1) * there + apart.square()
        whole[cosine, True] = _entropy(norm + added, left + apart, noise * (trace + q))
    return Collisions(whole, resultants[0]), Collisions(without, resultants[1])


def collisions_of_rows(z: Tensor, live: Tensor, first: Tensor) -> tuple[Collisions, Collisions]:
    """The same from the rows (windows, n, d), which are zero where ``live`` is false; faster where n > d."""
    squares = z.square().sum(-1)
    least = 8 * torch.finfo(z.dtype).tiny
    alive = live & (squares > least)
    at = (alive & first).long().argmax(-1)
    there = (alive & first).any(-1)
    rest = (alive & ~first).to(z.dtype)
    count = rest.sum(-1)
    n, share = count.clamp(min=1), count / (count + 1)
    window = torch.arange(len(z), device=z.device)
    first_row = z[window, at]
    total = squares.sum(-1)
    noise = 16 * torch.finfo(z.dtype).eps
    whole: dict[tuple[bool, bool], Tensor] = {}
    without: dict[tuple[bool, bool], Tensor] = {}
    resultants: list[Tensor] = []
    for cosine in (False, True):
        # Scaled first, so that squares of entries stay in range.
        inverse = torch.where(squares > least, squares, torch.inf) if cosine else _positive(total, least).unsqueeze(-1)
        scale = inverse.rsqrt().expand_as(squares)
        rows = z * (scale * rest).unsqueeze(-1)
        mean = rows.sum(-2) / n.unsqueeze(-1)
        rows.addcmul_(rest.unsqueeze(-1), mean.unsqueeze(-2), value=-1)
        matrix = symmetric_products(rows.mT)
        head = first_row * (scale[window, at] * there).unsqueeze(-1)
        apart = (head - mean) * there.unsqueeze(-1)
        vectors = torch.stack([mean, apart, head], -1)
        between = vectors.mT @ vectors
        through = (vectors * (matrix @ vectors)).sum(-2).clamp(min=0)
        m, a, h = between.diagonal(dim1=-2, dim2=-1).unbind(-1)
        mcm, aca, hch = through.unbind(-1)
        norm, left = _squared(matrix), matrix.diagonal(dim1=-2, dim2=-1).sum(-1)
        trace = left + n * m
        without[cosine, True] = _entropy(norm, left, noise * trace)
        around = norm + 2 * share * aca + (share * a).square()
        whole[cosine, True] = _entropy(around, left + share * a, noise * (trace + h))
        plain = norm + 2 * n * mcm + (n * m).square()
        without[cosine, False] = _entropy(plain, trace, 0 * trace)
        plain = plain + 2 * hch + 2 * n * between[:, 0, 2].square() + h.square()
        whole[cosine, False] = _entropy(plain, trace + h, 0 * trace)
        if not cosine:
            sums = n.unsqueeze(-1) * mean
            resultants = [each.square().sum(-1) * total for each in (sums + head, sums)]
    return Collisions(whole, resultants[0]), Collisions(without, resultants[1])


def symmetric_products(rows: Tensor) -> Tensor:
    """``rows @ rows.mT`` of (windows, n, d), in four strips below the diagonal: 10 of 16 parts of the work."""
    windows, n, _ = rows.shape
    if n < 64:  # too small for strips to pay
        return rows @ rows.mT
    products = rows.new_empty(windows, n, n)
    strip = -(-n // 4)
    for start in range(0, n, strip):
        end = min(n, start + strip)
        part = rows[:, start:end] @ rows[:, :end].mT
        products[:, start:end, :end] = part
        products[:, :start, start:end] = part[:, :, :start].mT
    return products


def _squared(matrices: Tensor) -> Tensor:
    norms: Tensor = torch.linalg.vector_norm(matrices, dim=(-2, -1))
    return norms.square()


def _positive(values: Tensor, least: float) -> Tensor:
    return torch.where(values > least, values, torch.inf)


def _entropy(squared: Tensor, trace: Tensor, noise: Tensor) -> Tensor:
    """-log(squared / trace^2); 0 for a matrix that counts as zero."""
    zero = (trace <= noise) | (squared == 0)
    ratio = squared / torch.where(zero, 1, trace).square()
    return -torch.where(zero, 1, ratio).log().clamp(max=0)
