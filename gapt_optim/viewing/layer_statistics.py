"""Sums over a layer's outputs from which everything in a profile follows, added to batch by batch.

Their size does not depend on the data. Sequences are rows of tokens (batch, seq, d), all samples of a batch
(batch, d), or all positions of an image with its channels as features (batch, channels, *positions), as for a
:class:`gapt_optim.RepresentationHook`.

Sources of the formulas, with z_i the n live rows of a window and K the Gram matrix of them:

- entropy: Giraldo, Rao and Principe, "Measures of entropy from data using infinitely divisible kernels", 2015.
  Kernels: ``linear`` <z_i, z_j>; ``cosine`` <z_i, z_j> / (|z_i| |z_j|). ``center`` takes H K H with
  H = I - 11'/n, as in CKA (Kornblith et al., 2019).
- effective rank: exp of the entropy (Roy and Vetterli, "The effective rank: a measure of effective dimensionality",
  2007, for order 1).
- norm ratio, max |z_i| / median |z_i|, and mean share, n |mean z|^2 / sum |z_i|^2: this library's, as in
  :class:`gapt_optim.Measures`. Share of the first token: |z_1|^2 / sum |z_i|^2, whose growth empties the entropies of
  middle layers (Queipo-de-Llano et al., "Attention sinks and compression valleys in LLMs are two sides of the same
  coin", 2025).
- curvature: mean angle between successive differences z_(t+1) - z_t (Hosseini and Fedorenko, "Large language models
  implicitly learn to straighten neural sentence trajectories", 2023).
- RankMe: exp of the entropy of sigma / sum sigma, sigma the singular values of all rows (Garrido et al., 2023).
- LiDAR: exp of the entropy of the eigenvalues of Sw^(-1/2) Sb Sw^(-1/2), with Sb the covariance of the samples' mean
  embeddings and Sw that of their views around them, plus 1e-4 I (Thilak et al., 2023).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from ._core import Kernel, KernelMatrix, entropy_of_gram, window_weights, windows_last
from .large_windows import collisions

KERNELS = ("linear", "cosine")
LIDAR_REGULARIZATION = 1e-4


class Kind(NamedTuple):
    """Which entropy: one column of the sums."""

    kernel: str
    center: bool
    alpha: float

    @property
    def matrix(self) -> Kernel:
        """Its kernel, as the library's entropies take it."""
        return Kernel(cosine=self.kernel == "cosine", center=self.center)


@dataclass(frozen=True)
class What:
    """What is summed."""

    orders: tuple[float, ...] = (2.0,)
    windows: tuple[int | None, ...] = (8, None)
    rankme_rows: int | None = 25_600
    views: int = 1

    @property
    def kinds(self) -> list[Kind]:
        return [Kind(*kind) for kind in product(KERNELS, (False, True), self.orders)]


class _Mean:
    """A weighted sum and its weight per column, in float64, on the device of what is added."""

    def __init__(self) -> None:
        self.sums: Tensor | None = None

    def add(self, values: Tensor, weights: Tensor) -> None:
        """``values`` (columns, items) with ``weights`` (items) or (columns, items), numbers or true for 1.

        Values that are not finite are left out.
        """
        wide = _wide(values)
        weights = torch.where(values.isfinite(), weights, 0).to(wide)
        pair = torch.stack([(torch.where(weights > 0, values, 0) * weights).sum(-1), weights.sum(-1)])
        self.sums = pair if self.sums is None else self.sums + pair

    def means(self) -> list[float | None]:
        if self.sums is None:
            return []
        total, count = self.sums.tolist()
        return [t / c if c else None for t, c in zip(total, count, strict=True)]


class WindowValues(NamedTuple):
    """What some windows show."""

    entropies: Tensor
    """(kinds, windows), in nats."""
    limits: Tensor
    """(kinds, windows), the largest that each can be."""
    weights: Tensor
    """(kinds, windows), what each counts for in a mean; 0 where no row counts."""
    norm_ratio: Tensor
    mean_share: Tensor
    shape_weights: Tensor
    """(windows,), the weights of the last two."""

    def of(self, windows: Tensor) -> WindowValues:
        """Those windows alone."""
        return WindowValues(*(values[..., windows] for values in self))


class WindowSums:
    """Entropies, norm ratio and mean share over windows of one length, with or without the first token."""

    def __init__(self) -> None:
        self.entropies, self.normalized, self.shape = _Mean(), _Mean(), _Mean()

    def add(self, found: WindowValues) -> None:
        self.entropies.add(found.entropies, found.weights)
        self.normalized.add(torch.where(found.limits > 0, found.entropies / found.limits, 0), found.weights)
        self.shape.add(torch.stack([found.norm_ratio, found.mean_share]), found.shape_weights)


class LayerSums:
    """Everything that is kept of one layer."""

    def __init__(self, what: What) -> None:
        self.what = what
        self.features = 0
        self.rows = torch.zeros((), dtype=torch.int64)
        self.sequences = 0
        self.tokens = False  # rows are tokens in order, so that the first one and curvature mean something
        keys = [(window, first) for window in what.windows for first in (True, False)]
        self.windows: dict[tuple[int | None, bool], WindowSums] = {key: WindowSums() for key in keys}
        self.curvature = {True: _Mean(), False: _Mean()}
        self.first_share = _Mean()
        self.gram: Tensor | None = None  # of all rows but the first tokens, (d, d) float64, its lower triangle
        self.first_gram: Tensor | None = None
        self.summed = 0  # rows in these two
        self.lidar: LidarSums | None = LidarSums() if what.views > 1 else None
        self.nonfinite = torch.zeros((), dtype=torch.int64)

    @torch.no_grad()
    def add(self, h: Tensor, mask: Tensor | None) -> Tensor:
        """One output (batch, d), (batch, seq, d) or (batch, channels, *positions), and its mask (batch, seq).

        Returns:
            The mean live row of each sample, (batch, d).
        """
        self.tokens = h.ndim == 3
        rows = h.unsqueeze(0) if h.ndim == 2 else h if h.ndim == 3 else h.flatten(2).mT
        rows = rows.to(torch.promote_types(h.dtype, torch.float32))
        live = torch.ones(rows.shape[:2], dtype=torch.bool, device=h.device) if mask is None else mask
        norms: Tensor = torch.linalg.vector_norm(rows, dim=-1)
        norms = norms.square()
        finite = norms.isfinite()  # one pass instead of three; a norm that overflows could be used nowhere
        self.nonfinite = self.nonfinite.to(h.device) + (live & ~finite).sum()
        live = live & finite
        if not live.all():
            rows, norms = rows.masked_fill(~live.unsqueeze(-1), 0), norms.masked_fill(~live, 0)
        first = live & (live.cumsum(1) == 1) if self.tokens else torch.zeros_like(live)
        self.features = rows.shape[-1]
        self.rows = self.rows.to(h.device) + live.sum()
        self.sequences += len(rows)
        if rows.numel() == 0:
            return rows.new_zeros(len(h), self.features)
        for window in self.what.windows:
            for part in _parts(rows, window):
                self._add_windows(window, rows[part], live[part], first[part])
        if self.tokens:
            total = norms.sum(-1)
            share = torch.where(total > 0, (norms * first).sum(-1) / total, 0)
            self.first_share.add(share.unsqueeze(0), (total > 0).unsqueeze(0))
            for part in _parts(rows, 8):
                self._add_curvature(rows[part], live[part], first[part])
        self._add_gram(rows, live, first)
        if h.ndim == 2:
            return rows[0]
        return rows.sum(1) / live.sum(1, keepdim=True).clamp(min=1)

    def _add_windows(self, window: int | None, rows: Tensor, live: Tensor, first: Tensor) -> None:
        length = rows.shape[1]
        size = length if window is None else min(window, length)
        tail = -length % size if size else 0
        z = F.pad(rows, (0, 0, 0, tail)).reshape(-1, size, rows.shape[-1])
        if not all(by_products(order) for order in self.what.orders):
            z = z.double()
        live, first = (F.pad(flags, (0, tail)).reshape(-1, size) for flags in (live, first))
        everything, rest = self.windows[window, True], self.windows[window, False]
        kinds, dtype, d = self.what.kinds, rows.dtype, rows.shape[-1]
        if size > d:
            whole, without = values_of_rows(z, live, first, kinds, dtype)
            everything.add(whole)
            if self.tokens:
                rest.add(without)
            return
        gram = z @ z.mT
        if self.what.orders == (2.0,) and len(z) <= size:  # few large windows
            whole, without = values_of_order_2(gram, live, first, kinds, d)
            everything.add(whole)
            if self.tokens:
                rest.add(without)
            return
        whole = values_of_gram(gram, live, d, kinds, dtype)
        everything.add(whole)
        if not self.tokens:
            return
        # Only a window that has a first token changes without it.
        at = first.any(-1)
        rest.add(whole.of(~at))
        rest.add(values_of_gram(gram[at], (live & ~first)[at], d, kinds, dtype))

    def _add_curvature(self, rows: Tensor, live: Tensor, first: Tensor) -> None:
        if rows.shape[1] < 3:
            return
        steps = rows[:, 1:] - rows[:, :-1]
        length = steps.square().sum(-1).sqrt()
        product_ = (steps[:, 1:] * steps[:, :-1]).sum(-1)
        sizes = length[:, 1:] * length[:, :-1]
        angle = torch.rad2deg(torch.acos((product_ / sizes).clamp(-1, 1))).reshape(1, -1)
        there = (live[:, 2:] & live[:, 1:-1] & live[:, :-2] & (sizes > 0)).reshape(1, -1)
        self.curvature[True].add(angle, there)
        self.curvature[False].add(angle, there & ~first[:, :-2].reshape(1, -1))

    def _add_gram(self, rows: Tensor, live: Tensor, first: Tensor) -> None:
        wanted = self.what.rankme_rows
        left = None if wanted is None else wanted - self.summed
        if left is not None and left <= 0:
            return
        if rows.device.type == "mps":  # has no float64
            rows, live, first = rows.cpu(), live.cpu(), first.cpu()
        if self.tokens:  # apart, because their norms may dwarf all others'
            heads = rows[first][:left].double()
            self.first_gram = _plus_products(self.first_gram, heads)
            self.summed += len(heads)
        rest = rows[live & ~first] if left is None else rows[live & ~first][: max(left - int(first.sum()), 0)]
        rest = rest.double()
        self.gram = _plus_products(self.gram, rest)
        self.summed += len(rest)

    def rankme(self, first: bool) -> float | None:
        """RankMe over all rows, or over all but the first tokens; None where it was not summed."""
        if self.gram is None:
            return None
        gram = self.gram if not first or self.first_gram is None else self.gram + self.first_gram
        eigenvalues = torch.linalg.eigvalsh(gram)  # of the lower triangle
        largest = eigenvalues[-1]
        tolerance = len(eigenvalues) * torch.finfo(eigenvalues.dtype).eps
        sigma = torch.where(eigenvalues > tolerance * largest, eigenvalues, 0).clamp(min=0).sqrt()
        return exp_entropy(sigma)


class LidarSums:
    """Sums over samples of which each has several views: embeddings e_xv, (d,) each."""

    def __init__(self) -> None:
        self.samples = 0
        self.views = 0
        self.squares: Tensor | None = None  # sum of e e' over samples and views
        self.mean_squares: Tensor | None = None  # sum of m m' over samples, m the mean of a sample's views
        self.mean_sum: Tensor | None = None

    def add(self, embeddings: Tensor) -> None:
        """(views, samples, d)."""
        e = (embeddings.cpu() if embeddings.device.type == "mps" else embeddings).double()
        mean = e.mean(0)
        flat = e.flatten(0, 1)
        self.views, self.samples = len(e), self.samples + e.shape[1]
        self.squares = _plus(self.squares, flat.mT @ flat)
        self.mean_squares = _plus(self.mean_squares, mean.mT @ mean)
        self.mean_sum = _plus(self.mean_sum, mean.sum(0))

    def value(self) -> float | None:
        if self.samples < 2 or self.squares is None or self.mean_squares is None or self.mean_sum is None:
            return None
        center = self.mean_sum / self.samples
        between = self.mean_squares / self.samples - torch.outer(center, center)
        within = self.squares / (self.samples * self.views) - self.mean_squares / self.samples
        within = within + LIDAR_REGULARIZATION * torch.eye(len(within), dtype=within.dtype, device=within.device)
        scales, vectors = torch.linalg.eigh(within)
        whiten = (vectors * scales.clamp(min=LIDAR_REGULARIZATION).rsqrt()) @ vectors.mT
        return exp_entropy(torch.linalg.eigvalsh(whiten @ between @ whiten).clamp(min=0))


def exp_entropy(weights: Tensor) -> float | None:
    """exp(-sum p log p) for p = weights / sum; None where all are 0."""
    total = float(weights.sum())
    if not total > 0 or not math.isfinite(total):
        return None
    p = weights / total
    return float(torch.special.entr(p).sum().exp())


def values_of_gram(gram: Tensor, live: Tensor, features: int, kinds: list[Kind], dtype: torch.dtype) -> WindowValues:
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
    moved = windows_last(gram)
    matrices = {kernel: KernelMatrix(moved, kernel) for kernel in {kind.matrix for kind in kinds}}
    entropies, counts = [], []
    for kind in kinds:
        matrix, shape = matrices[kind.matrix], (n, features)
        value, _, rows = entropy_of_gram(
            matrix, kind.alpha, kind.matrix, shape, dtype, live.sum(-1), False, with_gradient=False
        )
        entropies.append(value)
        counts.append(live.sum(-1) if rows is None else rows.long())
    return _gathered(entropies, counts, kinds, norms, gram.sum((-2, -1)), (n, features))


def values_of_order_2(
    gram: Tensor, live: Tensor, first: Tensor, kinds: list[Kind], features: int
) -> tuple[WindowValues, WindowValues]:
    """The same as :func:`values_of_gram` for order 2 alone, with and without the first tokens; faster for large n."""
    norms = gram.diagonal(dim1=-2, dim2=-1) * live
    alive = norms > 8 * torch.finfo(gram.dtype).tiny
    found = []
    for one, keep in zip(collisions(gram, live, first), (live, live & ~first), strict=True):
        counts = [(keep if kind.matrix.plain else keep & alive).sum(-1) for kind in kinds]
        entropies = [one.entropies[kind.kernel == "cosine", kind.center] for kind in kinds]
        found.append(_gathered(entropies, counts, kinds, norms * keep, one.resultant, (gram.shape[-1], features)))
    return found[0], found[1]


def values_of_rows(
    z: Tensor, live: Tensor, first: Tensor, kinds: list[Kind], dtype: torch.dtype
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
    alive = norms > 8 * torch.finfo(z.dtype).tiny
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
        here = alive & keep
        count = here.sum(-1)
        entropies, counts = [], []
        for kind in kinds:
            gram, total, head = sums[kind.kernel]
            if with_first:
                gram, total = gram + head.unsqueeze(-1) * head.unsqueeze(-2), total + head
            if kind.center:
                before = gram.diagonal(dim1=-2, dim2=-1).sum(-1)
                mean = total / count.clamp(min=1).sqrt().unsqueeze(-1)
                gram = gram - mean.unsqueeze(-1) * mean.unsqueeze(-2)
                left = gram.diagonal(dim1=-2, dim2=-1).sum(-1)  # where rows are equal, rounding
                gram = gram * (left > 16 * torch.finfo(gram.dtype).eps * before)[..., None, None]
            rows_ = keep.sum(-1) if kind.matrix.plain else count
            ready = KernelMatrix(windows_last(gram), Kernel(cosine=False, center=False))  # of the kernel already
            value, _, _ = entropy_of_gram(
                ready, kind.alpha, kind.matrix, shape, dtype, rows_, False, with_gradient=False
            )
            entropies.append(value)
            counts.append(rows_)
        _, total, head = sums["linear"]
        resultant = (total + head if with_first else total).square().sum(-1)
        found.append(_gathered(entropies, counts, kinds, norms * keep, resultant, shape))
    return found[0], found[1]


def _gathered(
    entropies: list[Tensor],
    counts: list[Tensor],
    kinds: list[Kind],
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
        (rows - int(kind.center)).clamp(min=1, max=shape[1]).to(norms.dtype).log()
        for kind, rows in zip(kinds, counts, strict=True)
    ]
    nonzero = (norms > 8 * torch.finfo(norms.dtype).tiny).sum(-1)
    ordered = norms.sort(-1, descending=True).values
    last = nonzero.clamp(min=1)
    middle = torch.stack([(last - 1) // 2, last // 2], dim=-1)
    median = ordered.gather(-1, middle).sqrt().mean(-1)
    ratio = torch.where(nonzero > 0, ordered[..., 0].sqrt() / torch.where(nonzero > 0, median, 1), 1)
    total = norms.sum(-1)
    share = torch.where(nonzero > 0, resultant / (torch.where(nonzero > 0, total, 1) * last), 0).clamp(0, 1)
    weights = torch.stack([_weights(rows, 2 + kind.center) for kind, rows in zip(kinds, counts, strict=True)])
    return WindowValues(torch.stack(entropies), torch.stack(limits), weights, ratio, share, _weights(nonzero, 2))


def _weights(rows: Tensor, fewest: int) -> Tensor:
    """Those of the library's means, but 0 for windows in which no row counts."""
    return torch.where(rows > 0, window_weights(rows, _wide(rows), fewest), 0)


def by_products(order: float) -> bool:
    """The order needs no eigenvalues."""
    return 2 <= order <= 8 and float(order).is_integer()


def _parts(rows: Tensor, window: int | None) -> Iterator[slice]:
    """Sequences taken together: few enough that what is made of them stays small."""
    length, features = rows.shape[1:]
    per_row = max(features, min(length, features) if window is None else window)
    limit = 1 << (20 if rows.device.type == "cpu" else 26)
    step = max(1, limit // max(1, per_row * length))
    for start in range(0, len(rows), step):
        yield slice(start, start + step)


def _plus(total: Tensor | None, value: Tensor) -> Tensor:
    return value if total is None else total.add_(value)


def _plus_products(total: Tensor | None, rows: Tensor) -> Tensor:
    """``rows.mT @ rows`` added to the lower triangle of ``total``: in four strips, 10 of 16 parts of the work."""
    d = rows.shape[1]
    if total is None:
        total = rows.new_zeros(d, d)
    strip = -(-d // 4)
    for start in range(0, d, strip):
        end = min(d, start + strip)
        total[start:end, :end].addmm_(rows[:, start:end].mT, rows[:, :end])
    return total


def _wide(values: Tensor) -> torch.dtype:
    return torch.float32 if values.device.type == "mps" else torch.float64
