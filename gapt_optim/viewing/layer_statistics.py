"""Sums over a layer's outputs from which everything in a profile follows, added to batch by batch.

Their size does not depend on the data. Sequences are rows of tokens (batch, seq, d), all samples of a batch
(batch, d), or all positions of an image with its channels as features (batch, channels, *positions), as for a
:class:`gapt_optim.RepresentationHook`.

Sources of the formulas, with z_i the n live rows of a window and K the Gram matrix of them:

- entropy: Giraldo, Rao and Principe, "Measures of entropy from data using infinitely divisible kernels", 2015.
  Kernels: ``linear`` <z_i, z_j>; ``cosine`` <z_i, z_j> / (|z_i| |z_j|). ``center`` takes H K H with
  H = I - 11'/n, as in CKA (Kornblith et al., 2019).
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

from ._core import entropy_of_gram

KERNELS = ("linear", "cosine")
LIDAR_REGULARIZATION = 1e-4


class Kind(NamedTuple):
    """Which entropy: one column of the sums."""

    kernel: str
    center: bool
    alpha: float


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
    """A sum and a count per column, in float64, on the device of what is added."""

    def __init__(self) -> None:
        self.sums: Tensor | None = None

    def add(self, values: Tensor, counts: Tensor) -> None:
        """``values`` (columns, items), of which those with ``counts`` (items) or (columns, items) true are added.

        Values that are not finite are left out.
        """
        counts = counts.expand_as(values) & values.isfinite()
        pair = torch.stack([torch.where(counts, values, 0).sum(-1, dtype=_wide(values)), counts.sum(-1)])
        pair = pair.to(_wide(values))
        self.sums = pair if self.sums is None else self.sums + pair

    def means(self) -> list[float | None]:
        if self.sums is None:
            return []
        total, count = self.sums.tolist()
        return [t / c if c else None for t, c in zip(total, count, strict=True)]


class WindowSums:
    """Entropies, norm ratio and mean share over windows of one length, with or without the first token."""

    def __init__(self) -> None:
        self.entropies, self.normalized, self.shape = _Mean(), _Mean(), _Mean()

    def add(self, values: Tensor, limits: Tensor, live: Tensor, ratio: Tensor, share: Tensor) -> None:
        counts = live > 0
        self.entropies.add(values, counts)
        self.normalized.add(torch.where(limits > 0, values / limits, 0), counts)
        self.shape.add(torch.stack([ratio, share]), counts)


class LayerSums:
    """Everything that is kept of one layer."""

    def __init__(self, what: What) -> None:
        self.what = what
        self.features = 0
        self.rows = 0
        self.sequences = 0
        self.tokens = False  # rows are tokens in order, so that the first one and curvature mean something
        keys = [(window, first) for window in what.windows for first in (True, False)]
        self.windows: dict[tuple[int | None, bool], WindowSums] = {key: WindowSums() for key in keys}
        self.curvature = {True: _Mean(), False: _Mean()}
        self.first_share = _Mean()
        self.gram: Tensor | None = None  # of all rows but the first tokens, (d, d) float64
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
        finite = rows.isfinite().all(-1)
        self.nonfinite = self.nonfinite.to(h.device) + (live & ~finite).sum()
        live = live & finite
        rows = rows.masked_fill(~live.unsqueeze(-1), 0)
        first = live & (live.cumsum(1) == 1) if self.tokens else torch.zeros_like(live)
        self.features = rows.shape[-1]
        self.rows = self.rows + live.sum()
        self.sequences += len(rows)
        norms = rows.square().sum(-1)
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
        live, first = (F.pad(flags, (0, tail)).reshape(-1, size) for flags in (live, first))
        everything, rest = self.windows[window, True], self.windows[window, False]
        if not self.tokens:
            everything.add(*_window_values(z, live, self.what.kinds))
            return
        keep = live & ~first
        if z.shape[-2] <= z.shape[-1]:
            gram = z @ z.mT
            values = _values_of_gram(gram, live, z.shape[-1], self.what.kinds)
            everything.add(*values)
            # Only the window that has the first token changes without it.
            touched = first.any(-1)
            if size == length:
                rest.add(*_values_of_gram(gram, keep, z.shape[-1], self.what.kinds))
                return
            at = touched.nonzero().squeeze(-1)
            rest.add(*(value[..., ~touched] for value in values))
            rest.add(*_values_of_gram(gram[at], keep[at], z.shape[-1], self.what.kinds))
            return
        without = z.masked_fill(~keep.unsqueeze(-1), 0)
        rest.add(*_window_values(without, keep, self.what.kinds))
        everything.add(*_window_values(z, live, self.what.kinds))

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
            self.first_gram = _plus(self.first_gram, heads.mT @ heads)
            self.summed += len(heads)
        rest = rows[live & ~first] if left is None else rows[live & ~first][: max(left - int(first.sum()), 0)]
        rest = rest.double()
        self.gram = _plus(self.gram, rest.mT @ rest)
        self.summed += len(rest)

    def rankme(self, first: bool) -> float | None:
        """RankMe over all rows, or over all but the first tokens; None where it was not summed."""
        if self.gram is None:
            return None
        gram = self.gram if not first or self.first_gram is None else self.gram + self.first_gram
        eigenvalues = torch.linalg.eigvalsh(gram)
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


def _window_values(z: Tensor, live: Tensor, kinds: list[Kind]) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """As :func:`_values_of_gram`, from the rows (windows, n, d) themselves: by d x d matrices where n > d."""
    n, d = z.shape[-2:]
    if n <= d:
        return _values_of_gram(z @ z.mT, live, d, kinds)
    norms = z.square().sum(-1)
    count = live.sum(-1)
    unit = z * torch.where(norms > 0, norms, math.inf).rsqrt().unsqueeze(-1)

    def forms() -> Iterator[tuple[str, bool, Tensor, Tensor]]:
        for kernel, rows, rows_live in (("linear", z, count), ("cosine", unit, (norms > 0).sum(-1))):
            gram = rows.mT @ rows
            yield kernel, False, gram, rows_live
            mean = rows.sum(-2) / rows_live.clamp(min=1).sqrt().unsqueeze(-1)
            yield kernel, True, gram - mean.unsqueeze(-1) * mean.unsqueeze(-2), rows_live

    total = norms.sum(-1)
    resultant = z.sum(-2).square().sum(-1)
    return _collect(forms(), kinds, norms, live, resultant, total, (n, d))


def _values_of_gram(
    gram: Tensor, live: Tensor, features: int, kinds: list[Kind]
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """What a window shows, from its linear Gram matrix (windows, n, n) and its live rows (windows, n).

    Returns:
        Entropies (kinds, windows) in nats, the largest that each can be, live rows, norm ratio and mean share (windows).
    """
    n = gram.shape[-1]
    flags = live.to(gram.dtype)
    gram = gram * flags.unsqueeze(-1) * flags.unsqueeze(-2)
    norms = gram.diagonal(dim1=-2, dim2=-1)
    scale = torch.where(norms > 0, norms, math.inf).rsqrt()

    def forms() -> Iterator[tuple[str, bool, Tensor, Tensor]]:
        for kernel in KERNELS:
            if kernel == "linear":
                matrix, there = gram, flags
            else:
                matrix, there = gram * scale.unsqueeze(-1) * scale.unsqueeze(-2), (norms > 0).to(gram.dtype)
            count = there.sum(-1)
            yield kernel, False, matrix, count
            row = matrix.sum(-1) / count.clamp(min=1).unsqueeze(-1)
            mean = row.sum(-1) / count.clamp(min=1)
            # Rows that do not count stay zero.
            shift = row - mean.unsqueeze(-1) / 2
            centered = matrix - (shift.unsqueeze(-1) + shift.unsqueeze(-2)) * there.unsqueeze(-1) * there.unsqueeze(-2)
            yield kernel, True, centered, count

    return _collect(forms(), kinds, norms, live, gram.sum((-2, -1)), norms.sum(-1), (n, features))


def _collect(
    forms: Iterator[tuple[str, bool, Tensor, Tensor]],
    kinds: list[Kind],
    norms: Tensor,
    live: Tensor,
    resultant: Tensor,
    total: Tensor,
    shape: tuple[int, int],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    found: dict[Kind, tuple[Tensor, Tensor]] = {}
    for kernel, center, matrix, count in forms:
        limit = (count - int(center)).clamp(min=0, max=shape[1]).to(norms.dtype)
        limit = torch.where(limit > 0, limit.log(), 0)
        uncentered = total if kernel == "linear" else count.to(norms.dtype)
        for kind in kinds:
            if (kind.kernel, kind.center) == (kernel, center):
                found[kind] = entropy_of_form(matrix, kind.alpha, uncentered, shape, norms.dtype), limit
    values = torch.stack([found[kind][0] for kind in kinds])
    limits = torch.stack([found[kind][1] for kind in kinds])
    count = live.sum(-1)
    # The median over rows that count: the others are moved behind the last.
    ordered = torch.where(live, norms, math.inf).sort(-1).values
    lower = ordered.gather(-1, ((count - 1).clamp(min=0) // 2).unsqueeze(-1)).squeeze(-1)
    upper = ordered.gather(-1, (count.clamp(min=1) // 2).clamp(max=norms.shape[-1] - 1).unsqueeze(-1)).squeeze(-1)
    median = (lower.sqrt() + torch.where(count % 2 == 0, upper, lower).sqrt()) / 2
    largest = torch.where(live, norms, 0).amax(-1).sqrt()
    ratio = torch.where(median > 0, largest / median, torch.where(largest > 0, math.inf, 1.0))
    share = torch.where(total > 0, resultant / (total * count.clamp(min=1)), 0).clamp(0, 1)
    return values, limits, count, ratio, share


def entropy_of_form(
    matrix: Tensor, alpha: float, before: Tensor, shape: tuple[int, int], dtype: torch.dtype
) -> Tensor:
    """Entropy (windows) of Gram matrices (windows, m, m); 0 where centring left nothing but rounding.

    Args:
        matrix: centred or not.
        alpha: order.
        before: the trace before centring, (windows).
        shape: (n, d) of the windows.
        dtype: of the rows.
    """
    trace = matrix.diagonal(dim1=-2, dim2=-1).sum(-1)
    eps = 8 * max(shape) * torch.finfo(matrix.dtype).eps
    alive = trace > torch.clamp(eps * before, min=torch.finfo(matrix.dtype).tiny)
    if alpha == 2:
        rho = matrix / torch.where(alive, trace, 1)[..., None, None]
        value = -rho.square().sum((-2, -1)).clamp(min=torch.finfo(matrix.dtype).tiny).log()
    else:
        wide = matrix if 2 < alpha <= 8 and float(alpha).is_integer() else matrix.double()
        value, _ = entropy_of_gram(wide, alpha, shape, dtype, with_kernel=False)
    return torch.where(alive, value.to(matrix.dtype).clamp(min=0), 0)


def _parts(rows: Tensor, window: int | None) -> Iterator[slice]:
    """Sequences taken together: few enough that what is made of them stays small."""
    length, features = rows.shape[1:]
    per_row = max(features, min(length, features) if window is None else window)
    limit = 1 << (21 if rows.device.type == "cpu" else 26)
    step = max(1, limit // max(1, per_row * length))
    for start in range(0, len(rows), step):
        yield slice(start, start + step)


def _plus(total: Tensor | None, value: Tensor) -> Tensor:
    return value if total is None else total.add_(value)


def _wide(values: Tensor) -> torch.dtype:
    return torch.float32 if values.device.type == "mps" else torch.float64
