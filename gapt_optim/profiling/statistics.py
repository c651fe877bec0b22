"""Sums over a layer's outputs from which a profile follows, added to batch by batch.

Their size does not depend on the data. Rows, those that count and documents are what :mod:`gapt_optim.layout` says.
Sources of the formulas, with z_i the n live rows of a window and K the Gram matrix of them:

- entropy: Giraldo, Rao and Principe, "Measures of entropy from data using infinitely divisible kernels", 2015.
  Kernels: ``linear`` <z_i, z_j>; ``cosine`` <z_i, z_j> / (|z_i| |z_j|). ``center`` takes H K H with
  H = I - 11'/n, as in CKA (Kornblith et al., 2019); ``center="first"`` takes the mean off before rows are scaled.
- effective rank: exp of the entropy (Roy and Vetterli, "The effective rank: a measure of effective dimensionality",
  2007, for order 1).
- norm ratio, max |z_i| / median |z_i|, and mean share, n |mean z|^2 / sum |z_i|^2: this library's, as in
  :class:`gapt_optim.Measures`. Share of the first token: |z_1|^2 / sum |z_i|^2, whose growth empties the entropies of
  middle layers (Queipo-de-Llano et al., "Attention sinks and compression valleys in LLMs are two sides of the same
  coin", 2025).
- curvature: mean angle between successive differences z_(t+1) - z_t (Hosseini and Fedorenko, "Large language models
  implicitly learn to straighten neural sentence trajectories", 2023).
- RankMe: exp of the entropy of sigma / sum sigma, sigma the singular values of all rows (Garrido et al., 2023).
- standard errors: over sequences, of a ratio of sums (Cochran, "Sampling techniques", 1977, section 6.8).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from ..layout import Reading
from ..windows import cut, windows_of
from .batches import MOST_PROMPTS
from .sequences import PooledRows, plus
from .where import Where, places
from .window_values import Kind, all_kinds, by_products, symmetric_products, unit, values_of_windows

MeanAndError = tuple[float | None, float | None]
RankMeRows = int | Literal["auto"] | None
MOST_RANKME_ROWS = 25_600
ROWS_PER_FEATURE = 20
"""As many rows are enough for RankMe, which its paper takes over 12.5 per feature: 25,600 rows of 2,048 features."""


@dataclass(frozen=True)
class What:
    """What is summed."""

    kinds: tuple[Kind, ...] = field(default_factory=lambda: all_kinds((2.0,)))
    windows: tuple[int | None, ...] = (8, None)
    rankme_rows: RankMeRows = "auto"

    @property
    def orders(self) -> tuple[float, ...]:
        return tuple(dict.fromkeys(kind.alpha for kind in self.kinds))

    @property
    def centered_first(self) -> bool:
        return any(kind.center == "first" for kind in self.kinds)

    @property
    def main(self) -> int:
        """The column that stands for all where one must: centred cosine of order 2, or the first."""
        wanted = Kind("cosine", True, 2.0)
        return self.kinds.index(wanted) if wanted in self.kinds else 0


class Mean:
    """Means with their standard errors over sequences, per column, on the device of what is added."""

    def __init__(self) -> None:
        self.sums: Tensor | None = None
        """(6, columns): of v, w, v², v w, w² over sequences and the number of them, with v a sequence's sum of values
        and w that of their weights."""

    def add(self, values: Tensor, weights: Tensor, sequence: Tensor, sequences: int) -> Tensor:
        """Values and weights (columns, items), of so many sequences. Values that are not finite are left out.

        Returns the means (columns, sequences), nan where nothing counts.
        """
        wide = torch.float32 if values.device.type == "mps" else torch.float64  # which mps has not
        weights = torch.where(values.isfinite(), weights, 0).to(wide)
        weighted = torch.where(weights > 0, values, 0) * weights
        zeros = weights.new_zeros(len(values), sequences)
        v, w = (zeros.index_add(1, sequence, each) for each in (weighted, weights))
        sums = torch.stack([v, w, v * v, v * w, w * w, (w > 0).to(wide)]).sum(-1)
        self.sums = sums if self.sums is None else self.sums + sums
        return v / w

    def means(self) -> list[MeanAndError]:
        """Mean and standard error of each column; None where nothing, or a single sequence, counts."""
        found: list[MeanAndError] = []
        for v, w, vv, vw, ww, count in () if self.sums is None else self.sums.T.tolist():
            mean = v / w if w else None
            error = None
            if mean is not None and count >= 2:
                left = max(0.0, vv - 2 * mean * vw + mean * mean * ww)
                error = math.sqrt(left * count / (count - 1)) / w
            found.append((mean, error))
        return found


class LayerSums:
    """Everything that is kept of one layer."""

    def __init__(self, what: What) -> None:
        self.what = what
        self.features = self.rows = self.sequences = self.nonfinite = 0
        self.dtype: torch.dtype | None = None
        self.axes = ""
        self.tokens = False
        """Rows are in order, so that the first one and curvature mean something."""
        self.windows = {window: Mean() for window in what.windows}
        """Of what :class:`WindowValues` has, with first tokens and then without."""
        self.curvature = Mean()
        """With first tokens, and without them."""
        self.first_share = Mean()
        self.by_sequence: list[float] = []
        """The main entropy of the longest windows, of the first sequences alone."""
        self.ranks = RankSums(what.rankme_rows)
        self.pooled = PooledRows()
        self.where = Where()

    @torch.no_grad()
    def add(self, reading: Reading, ids: Tensor | None = None) -> None:
        """One output. ``ids`` (batch, length) are its tokens."""
        self.axes, self.dtype = reading.axes, reading.h.dtype
        tokens = "length" in reading.axes
        self.tokens |= tokens
        rows = reading.rows.to(torch.promote_types(reading.rows.dtype, torch.float32))
        batch, length, self.features = rows.shape
        every = torch.ones(batch, length, dtype=torch.bool, device=rows.device)
        live = every if reading.live is None else reading.live.to(rows.device)
        squares = rows.square()
        norms = squares.sum(-1)
        finite = norms.isfinite()  # one pass instead of three; a norm that overflows could be used nowhere
        self.nonfinite += int((live & ~finite).sum())
        live = live & finite
        count = int(live.sum())
        if count < live.numel():
            keep = live.unsqueeze(-1)
            rows, norms = rows.masked_fill(~keep, 0), norms.masked_fill(~live, 0)
            squares = squares.masked_fill_(~keep, 0)
        begins = starts(every, reading.segments)
        # Of each document, the first row that counts.
        first = live & (places(live, begins) == 0) if tokens else torch.zeros_like(live)
        self.rows += count
        if rows.numel() == 0:
            return
        for window in self.what.windows:
            for part in _parts(rows, window):
                segments = None if reading.segments is None else reading.segments[part]
                means = self._add_windows(window, rows[part], live[part], first[part], segments)
                if window == self.what.windows[-1] and len(self.by_sequence) < MOST_PROMPTS:
                    self.by_sequence += means.tolist()
        if tokens:
            self._add_shares(norms, first)
            for part in _parts(rows, 8):
                self._add_curvature(rows[part], live[part], first[part], begins[part])
            self.where.add_rows(norms, live, begins, ids, self.sequences)
        self.where.add_channels(squares.sum((0, 1)))
        self.ranks.add(rows, live, first)
        self.sequences += batch
        if any(kind.clamped for kind in self.what.kinds):
            rows = unit(centred(rows, live))
        self.pooled.add(rows, live, reading.axes)

    def _add_windows(
        self, window: int | None, rows: Tensor, live: Tensor, first: Tensor, segments: Tensor | None
    ) -> Tensor:
        """Returns the main entropy of each sequence."""
        batch, length, _ = rows.shape
        windows = windows_of(batch, length, window, None if bool(live.all()) else live, segments)
        z = cut(rows, windows)
        flags = torch.stack([live, first, torch.arange(1, batch + 1, device=rows.device)[:, None].expand_as(live)], -1)
        flags = cut(flags.to(torch.float32), windows)
        live, first, sequence = flags[..., 0] > 0, flags[..., 1] > 0, flags[..., 2].amax(-1).long().clamp(min=1) - 1
        if not all(by_products(order) for order in self.what.orders):
            z = z.double()
        if self.what.centered_first:
            z = centred(z, live)
        found = values_of_windows(z, live, first, self.what.kinds, rows.dtype)
        # Half of the windows are without their first tokens: columns of their own.
        values, weights = (each.reshape(len(each), 2, len(z)).transpose(0, 1).flatten(0, 1) for each in found)
        return self.windows[window].add(values, weights, sequence, batch)[self.what.main]

    def _add_shares(self, norms: Tensor, first: Tensor) -> None:
        total = norms.sum(-1)
        share = torch.where(total > 0, (norms * first).sum(-1) / total, 0)
        sequence = torch.arange(len(total), device=total.device)
        self.first_share.add(share.unsqueeze(0), (total > 0).unsqueeze(0), sequence, len(total))

    def _add_curvature(self, rows: Tensor, live: Tensor, first: Tensor, begins: Tensor) -> None:
        batch, length = live.shape
        if length < 3:
            return
        steps = rows[:, 1:] - rows[:, :-1]
        sizes = torch.linalg.vector_norm(steps, dim=-1)
        products = (steps[:, 1:] * steps[:, :-1]).sum(-1)
        sizes = sizes[:, 1:] * sizes[:, :-1]
        angle = torch.rad2deg(torch.acos((products / sizes).clamp(-1, 1)))
        there = live[:, 2:] & live[:, 1:-1] & live[:, :-2] & ~begins[:, 2:] & ~begins[:, 1:-1] & (sizes > 0)
        weights = torch.stack([there, there & ~first[:, :-2]])
        sequence = torch.arange(batch, device=rows.device).repeat_interleave(length - 2)
        self.curvature.add(angle.expand_as(weights).flatten(1), weights.flatten(1), sequence, batch)


class RankSums:
    """For RankMe: products of the features over rows, (d, d) float64."""

    def __init__(self, wanted: RankMeRows) -> None:
        self._wanted = wanted
        self.gram: Tensor | None = None
        """Of all rows but the first tokens."""
        self.first_gram: Tensor | None = None
        """Of the first tokens, whose norms may dwarf all others'."""
        self.rows = 0
        self.at: dict[int, float] = {}
        """RankMe of the first so many rows, for a comparison with fewer."""

    def add(self, rows: Tensor, live: Tensor, first: Tensor) -> None:
        wanted = self._wanted
        if wanted == "auto":
            wanted = min(MOST_RANKME_ROWS, ROWS_PER_FEATURE * rows.shape[-1])
        if wanted is not None and self.rows >= wanted:
            return
        if rows.device.type == "mps":  # has no float64
            rows, live, first = rows.cpu(), live.cpu(), first.cpu()
        rows, heads = rows.flatten(0, 1), first.flatten()
        if not bool(live.all()):
            rows, heads = rows[live.flatten()], heads[live.flatten()]
        while len(rows) and (wanted is None or self.rows < wanted):
            stop = 256  # or eight times as many, and so on: RankMe is kept after so many rows
            while stop <= self.rows or stop < rows.shape[1]:  # of fewer rows than features it says little
                stop *= 8
            stop = stop if wanted is None else min(stop, wanted)
            part = rows[: stop - self.rows].to(torch.float64, copy=True)
            head = heads[: stop - self.rows]
            if head.any():
                self.first_gram = plus(self.first_gram, symmetric_products(part[head].mT))
                part = part.masked_fill_(head.unsqueeze(1), 0)
            self.gram = plus(self.gram, symmetric_products(part.mT))
            self.rows += len(part)
            rows, heads = rows[len(part) :], heads[len(part) :]
            if self.rows == stop:
                value = self.rankme(True)
                if value is not None:
                    self.at[stop] = value

    def rankme(self, first: bool) -> float | None:
        """RankMe over all rows, or over all but the first tokens; None where it was not summed."""
        if self.gram is None:
            return None
        gram = self.gram if not first or self.first_gram is None else self.gram + self.first_gram
        eigenvalues = torch.linalg.eigvalsh(gram)
        tolerance = len(eigenvalues) * torch.finfo(eigenvalues.dtype).eps
        sigma = torch.where(eigenvalues > tolerance * eigenvalues[-1], eigenvalues, 0).clamp(min=0).sqrt()
        return exp_entropy(sigma)


def exp_entropy(weights: Tensor) -> float | None:
    """exp(-sum p log p) for p = weights / sum; None where all are 0."""
    total = float(weights.sum())
    if not total > 0 or not math.isfinite(total):
        return None
    return float(torch.special.entr(weights / total).sum().exp())


def centred(rows: Tensor, live: Tensor) -> Tensor:
    """Rows (..., n, d) less the mean of those that count, 0 where they do not."""
    mean = rows.sum(-2, keepdim=True) / live.sum(-1).clamp(min=1)[..., None, None]
    return (rows - mean) * live.unsqueeze(-1)


def starts(every: Tensor, segments: Tensor | None) -> Tensor:
    """(batch, length), true where a document begins."""
    begins = torch.zeros_like(every)
    begins[:, :1] = True
    if segments is not None:
        begins[:, 1:] = segments[:, 1:] != segments[:, :-1]
    return begins


def _parts(rows: Tensor, window: int | None) -> Iterator[slice]:
    """Sequences taken together: few enough that what is made of them stays small."""
    length, features = rows.shape[1:]
    per_row = max(features, min(length, features) if window is None else window)
    limit = 1 << (20 if rows.device.type == "cpu" else 26)
    step = max(1, limit // max(1, per_row * length))
    for start in range(0, len(rows), step):
        yield slice(start, start + step)
