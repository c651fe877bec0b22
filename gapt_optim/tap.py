"""The tap: an identity on a hidden tensor that hands its Gram matrices to the objective.

Forward, a tapped tensor h becomes (h, K, t): h itself, the Gram matrices K of its windows, and a
zero t. :func:`link` turns the K of all layers into entropies at once and ties them to the loss.
Backward, a tap then receives three gradients: g for h, the entropy's factor for K, times the
scale of the whole loss (of a GradScaler, of accumulation), and for t the weight that its entropy has in
the objective, and 1, or 2 where entropies are differentiated alone, without a loss to combine with (0 in
a backward of something else). With d = factor @ h it passes on g + weight * d, and leaves <g,d>,
|g|² and |d|² as the gradient of the `probe`, a leaf of three numbers, so that they add up over
micro-batches and need no Python in the backward.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from .config import EntropyConfig
from .entropy import (
    Kernel,
    entropy_gradient,
    entropy_of_gram,
    gram_matrix,
    kernel_matrix,
    masked,
    measures_of_gram,
    measures_of_rows,
    windows_first,
    windows_last,
)

PROBE_SIZE = 3
"""Statistics per tap: <g,d>, |g|² and |d|², for the arriving gradient g and the entropy gradient d."""


class TapMode(NamedTuple):
    """What taps do in this step. Constants, so that a compiled model specializes on them."""

    entropy: EntropyConfig
    compress: bool
    """The entropy takes part in the backward."""
    measure: bool
    """Alignment statistics are taken."""
    combine: str
    max_ratio: float


class Grams(NamedTuple):
    """What one call of a tapped module leaves for the objective."""

    matrices: Tensor
    """(windows, m, m)"""
    live: Tensor | None
    """(windows,) rows that count; None = all, or those that the matrices show not to be zero."""
    shape: tuple[int, int]
    """(rows, features) of a window."""
    dtype: torch.dtype
    """Of the hidden tensor."""
    carrier: Tensor | None
    """The zero t; None above frozen layers, where nothing flows back."""
    measures: tuple[Tensor, Tensor] | None
    """Where rows outnumber features: what :func:`measures_of_rows` gives, (windows, 4) and (windows,). Elsewhere the
    matrices tell."""


class Tap(torch.autograd.Function):
    """(h, probe, ...) -> (h, K, t, *measures). Saves h itself, no copy, and nothing where nothing flows back."""

    @staticmethod
    def forward(
        ctx: Any,
        h: Tensor,
        probe: Tensor,
        mask: Tensor | None,
        alpha: float,
        cosine: bool,
        center: bool,
        window: int | None,
        compress: bool,
        measure: bool,
        combine: str,
        max_ratio: float,
    ) -> tuple[Tensor, ...]:
        ctx.kernel = Kernel(cosine, center)
        rows = windows(h, window, mask)
        gram = gram_matrix(rows, alpha, ctx.kernel)
        measures = _measures_beside(rows)
        carrier = h.new_zeros(2, dtype=gram.dtype)
        ctx.window, ctx.compress, ctx.measure, ctx.combine, ctx.max_ratio = (
            window,
            compress,
            measure,
            combine,
            max_ratio,
        )
        if not torch.compiler.is_compiling():  # a gradient that does not exist is no zero: see backward
            ctx.set_materialize_grads(False)
        if compress or measure:
            ctx.save_for_backward(h, mask)
            ctx.mark_non_differentiable(*measures)
        else:
            ctx.mark_non_differentiable(gram, *measures)
        return h.view_as(h), gram, carrier, *measures

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(
        ctx: Any, g: Tensor | None, factor: Tensor | None, carried: Tensor | None, *_: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        if factor is None or carried is None:  # a backward of something else, or nothing to send
            return (g, *[None] * 10)
        h, mask = ctx.saved_tensors
        if g is None:  # only the entropy reaches h
            # A weight of zero leaves the parameters below without a gradient, as they are without us; to see it takes
            # a wait for the device, on such side branches alone.
            if not (ctx.compress and carried[0]):
                return (None,) * 11
            g = torch.zeros_like(h)
        d = from_windows(entropy_gradient(factor, windows(h, ctx.window, mask), ctx.kernel), h)
        wide, statistics = g.to(d.dtype), None
        weight, linked = carried.to(d.dtype).unbind()
        if ctx.compress:
            # Without this, one overflowing layer would put nan into every weight below it.
            d = d.nan_to_num_(0.0, 0.0, 0.0)
        if ctx.measure or ctx.combine != "sum":
            flat_g, flat_d = wide.reshape(-1), d.reshape(-1)
            gd, gg, dd = torch.dot(flat_g, flat_d), torch.dot(flat_g, flat_g), torch.dot(flat_d, flat_d)
            # The gradient of another loss, or of another wrapper's, is not what is measured.
            statistics = torch.stack((gd, gg * linked, dd)) if ctx.measure else None
        if ctx.compress:
            if ctx.combine == "cap":
                shrink = _shrink_to(ctx.max_ratio, gg, dd * weight.square())
                weight = torch.where(linked > 1, weight, weight * shrink)
            total = torch.addcmul(wide, d, weight)
            if ctx.combine == "project":
                total.addcmul_(wide, _opposing_part(gd * weight, gg) * (linked - 2))
            g = total.to(g.dtype)
        return (g, statistics, *[None] * 9)


class _Link(torch.autograd.Function):
    """A zero whose gradient, the scale of the loss, sends each tap its factor and its weight."""

    @staticmethod
    def forward(ctx: Any, n: int, alone: bool, weights: Tensor, *tensors: Tensor) -> Tensor:
        # tensors: n factors, then the n matrices and the n carriers that the gradients go to
        ctx.n = n
        carried = F.pad(weights.unsqueeze(-1), (0, 1), value=2.0 if alone else 1.0)
        ctx.save_for_backward(carried, *tensors[:n])
        return weights.new_zeros(())

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, scale: Tensor) -> tuple[Tensor | None, ...]:
        carried, *factors = ctx.saved_tensors
        scaled = [factor * scale.to(factor) for factor in factors]
        each = [row.to(factor) for row, factor in zip(carried.unbind(), factors, strict=True)]
        return (None, None, None, *[None] * ctx.n, *scaled, *each)


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


def kernel_of(config: EntropyConfig) -> Kernel:
    return Kernel(cosine=config.kernel == "cosine", center=config.center)


def _measures_beside(rows: Tensor) -> tuple[Tensor, ...]:
    """Measures and live rows of windows whose Gram matrices do not tell them: those with more rows than features."""
    return measures_of_rows(rows) if rows.shape[-2] > rows.shape[-1] else ()


def captured(
    h: Tensor,
    mask: Tensor | None,
    config: EntropyConfig,
    gram: Tensor,
    carrier: Tensor | None,
    beside: Sequence[Tensor],
) -> Grams:
    """What a call leaves, from what its tap computed."""
    measures = (beside[0], beside[1]) if beside else None
    if kernel_of(config).plain:
        live = live_rows(h, config.window, mask)
    else:
        live = None if measures is None else measures[1]
    return Grams(gram, live, window_shape(h, config.window), h.dtype, carrier, measures)


def link(calls: list[Grams], factors: list[Tensor], weights: Tensor, *, alone: bool = False) -> Tensor:
    """A zero to add to the loss: it carries the entropy gradients of all calls to their taps.

    Args:
        calls: what the taps left; calls that nothing flows back to are passed over.
        factors: one per call.
        weights: (calls,) weight of each call's entropy in the objective.
        alone: this is differentiated by itself; taps add the entropy gradients up and combine them with nothing.
    """
    flowing = [i for i, call in enumerate(calls) if call.carrier is not None]
    if not flowing:  # every tapped layer lies above frozen parameters alone
        return weights.new_zeros(())
    if len(flowing) < len(calls):
        weights = torch.stack([weights[i] for i in flowing])  # a list as an index would wait for the device
    carriers = [carrier for carrier in (call.carrier for call in calls) if carrier is not None]
    matrices = [calls[i].matrices for i in flowing]
    zero: Tensor = _Link.apply(len(flowing), alone, weights, *(factors[i] for i in flowing), *matrices, *carriers)  # type: ignore[no-untyped-call]
    return zero


def grams_of(h: Tensor, mask: Tensor | None, config: EntropyConfig) -> Grams:
    """What a tap leaves when nothing flows back: in evaluation, or above frozen layers."""
    rows = windows(h.detach(), config.window, mask)
    gram = gram_matrix(rows, config.alpha, kernel_of(config))
    return captured(h, mask, config, gram, None, _measures_beside(rows))


def windows(h: Tensor, window: int | None, mask: Tensor | None) -> Tensor:
    """Cut a hidden tensor into matrices of ``window`` consecutive rows.

    Args:
        h: (batch, d), where the batch is the sequence; (batch, seq, d); or (batch, channels, *positions),
            where positions are rows and channels columns.
        window: rows per matrix; None = the whole sequence.
        mask: (batch, seq) bool, true where a token counts.

    Returns:
        (windows, rows, d), with short tails and masked rows filled with zeros.
    """
    rows = h.unsqueeze(0) if h.ndim == 2 else h if h.ndim == 3 else h.flatten(2).mT
    batch, length, features = rows.shape
    size, _ = window_shape(h, window)
    count, tail = _count_and_tail(length, size)
    rows = masked(rows, mask)
    return (F.pad(rows, (0, 0, 0, tail)) if tail else rows).reshape(batch * count, size, features)


def _sequences(h: Tensor) -> tuple[int, int]:
    """Number of sequences and their length."""
    if h.ndim == 2:
        return 1, h.shape[0]
    return h.shape[0], h.shape[1] if h.ndim == 3 else math.prod(h.shape[2:])


def _count_and_tail(length: int, size: int) -> tuple[int, int]:
    """Windows of a sequence, and rows that the last one lacks; in a form that torch.compile simplifies."""
    count = (length + size - 1) // size if size else 0
    return count, count * size - length


def window_shape(h: Tensor, window: int | None) -> tuple[int, int]:
    """(rows, features) of the windows of ``h``: a sequence shorter than a window is one window."""
    _, length = _sequences(h)
    return length if window is None else min(window, length), h.shape[1 if h.ndim > 3 else -1]


def live_rows(h: Tensor, window: int | None, mask: Tensor | None) -> Tensor | None:
    """Rows that count in each window, (windows,); None where all do."""
    batch, length = _sequences(h)
    size, _ = window_shape(h, window)
    count, tail = _count_and_tail(length, size)
    if not tail and mask is None:
        return None
    live = torch.ones(batch, length, dtype=torch.bool, device=h.device) if mask is None else mask
    return F.pad(live, (0, tail)).reshape(batch * count, size).sum(-1)


def from_windows(z: Tensor, like: Tensor) -> Tensor:
    """The inverse of :func:`windows`: matrices back to the shape of ``like``, the tail dropped."""
    size, features = z.shape[-2:]
    batch, length = _sequences(like)
    count, _ = _count_and_tail(length, size)
    rows = z.reshape(batch, count * size, features)[:, :length]
    return (rows.mT if like.ndim > 3 else rows).reshape(like.shape)


def _opposing_part(gd: Tensor, gg: Tensor) -> Tensor:
    """Coefficient of d's projection on g where the two oppose each other, otherwise 0."""
    return torch.where(gg > 0, gd / gg, 0).clamp(max=0)


def _shrink_to(max_ratio: float, gg: Tensor, dd: Tensor) -> Tensor:
    """Factor that brings |d| down to max_ratio * |g|; 1 where it is within it."""
    limit = max_ratio * gg.sqrt()
    norm = dd.sqrt()
    return torch.where(norm > limit, limit / norm, 1)
