"""The tap: an identity on a hidden tensor that also gives its entropy, and its gradient's angle.

Forward, a tapped tensor h becomes (h, S, t): h itself, its entropy S, and a zero t. The objective
adds t to the loss and, in compression, S times its weight. Backward, the tap then receives
three gradients: g for h, the weight of S, and for t the scale of the whole loss (of a GradScaler,
of accumulation). It passes on g + (weight of S) * dS/dh in one pass, and leaves <g,d>, |g|² and |d|²
as the gradient of the `probe`, a leaf of three numbers, so that they add up over micro-batches
and need no Python in the backward.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from .config import EntropyConfig
from .entropy import apply_kernel, entropy_and_kernel, masked

PROBE_SIZE = 3
"""Statistics per tap: <g,d>, |g|² and |d|², for the arriving gradient g and the entropy gradient d."""


class TapMode(NamedTuple):
    """What a tap does in this step. Constants, so that a compiled model specializes on them."""

    entropy: EntropyConfig
    compress: bool
    """The entropy takes part in the backward."""
    measure: bool
    """Alignment statistics are taken."""
    combine: str
    max_ratio: float


class Tap(torch.autograd.Function):
    """(h, probe, ...) -> (h, S, t). Saves h itself (no copy) and one small matrix per window."""

    @staticmethod
    def forward(
        ctx: Any,
        h: Tensor,
        probe: Tensor,
        mask: Tensor | None,
        alpha: float,
        window: int | None,
        normalize: bool,
        compress: bool,
        measure: bool,
        combine: str,
        max_ratio: float,
    ) -> tuple[Tensor, Tensor, Tensor]:
        z, live = windows(h, window, mask)
        entropy, kernel = _mean_entropy(z, live, alpha, normalize, with_kernel=compress or measure)
        ctx.window, ctx.compress, ctx.measure, ctx.combine, ctx.max_ratio = (
            window,
            compress,
            measure,
            combine,
            max_ratio,
        )
        ctx.mark_non_differentiable(*([] if compress else [entropy]))
        if kernel is not None:
            # Without this, one overflowing layer would put nan into every weight below it.
            kernel = torch.where(entropy.isfinite(), kernel, 0)
            ctx.save_for_backward(h, mask, kernel)
        return h.view_as(h), entropy, entropy.new_zeros(())

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, g: Tensor, weight: Tensor, scale: Tensor) -> tuple[Tensor | None, ...]:
        if not (ctx.compress or ctx.measure):
            return (g, *[None] * 9)
        h, mask, kernel = ctx.saved_tensors
        z, _ = windows(h, ctx.window, mask)
        d = from_windows(apply_kernel(kernel, z), h)
        if ctx.compress:
            d = d.nan_to_num_(0.0, 0.0, 0.0)
        statistics = None
        if ctx.measure or ctx.combine != "sum":
            wide = g.to(d.dtype)
            gd, gg, dd = _dot(wide, d), _dot(wide, wide), _dot(d, d)
            statistics = torch.stack((gd * scale, gg, dd * scale.square())) if ctx.measure else None
        if ctx.compress:
            if ctx.combine == "project":
                g = g + (d * weight - wide * _opposing_part(gd * weight, gg)).to(g.dtype)
            else:
                if ctx.combine == "cap":
                    weight = weight * _shrink_to(ctx.max_ratio, gg, dd * weight.square())
                g = g + d.mul_(weight).to(g.dtype)
        return (g, statistics, *[None] * 8)


def entropy_of(h: Tensor, mask: Tensor | None, config: EntropyConfig) -> Tensor:
    """Mean entropy over the windows of ``h``, values only."""
    z, live = windows(h, config.window, mask)
    return _mean_entropy(z, live, config.alpha, config.normalize, with_kernel=False)[0]


def windows(h: Tensor, window: int | None, mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Cut a hidden tensor into matrices of ``window`` consecutive rows.

    Args:
        h: (batch, d), where the batch is the sequence; (batch, seq, d); or (batch, channels, *positions),
            where positions are rows and channels columns.
        window: rows per matrix; None = the whole sequence.
        mask: (batch, seq) bool, true where a token counts.

    Returns:
        z (matrices, window, d), short tails and masked rows filled with zeros, and the number of live
        rows of each matrix (matrices,), None where all are live.
    """
    rows = h.unsqueeze(0) if h.ndim == 2 else h if h.ndim == 3 else h.flatten(2).mT
    batch, length, features = rows.shape
    size = length if window is None else min(window, length)
    tail = -length % size if size else 0
    rows = masked(rows, mask)
    if not tail and mask is None:
        return rows.reshape(-1, size, features), None
    live = torch.ones(batch, length, dtype=torch.bool, device=h.device) if mask is None else mask
    z = F.pad(rows, (0, 0, 0, tail)).reshape(-1, size, features)
    return z, F.pad(live, (0, tail)).reshape(-1, size).sum(-1)


def from_windows(z: Tensor, like: Tensor) -> Tensor:
    """The inverse of :func:`windows`: matrices back to the shape of ``like``, the tail dropped."""
    if like.ndim == 2:
        return z.reshape(-1, z.shape[-1])[: like.shape[0]]
    if like.ndim == 3:
        return z.reshape(like.shape[0], -1, z.shape[-1])[:, : like.shape[1]]
    length = like[0, 0].numel()
    return z.reshape(like.shape[0], -1, z.shape[-1])[:, :length].mT.reshape(like.shape)


def _mean_entropy(
    z: Tensor, live: Tensor | None, alpha: float, normalize: bool, *, with_kernel: bool
) -> tuple[Tensor, Tensor | None]:
    """Mean over the windows that have a live row; the kernel is that of the mean."""
    values, kernel = entropy_and_kernel(z, alpha, live, normalize, with_kernel=with_kernel)
    if live is None:
        return values.mean(), None if kernel is None else kernel / values.numel()
    share = (live > 0).to(values.dtype)
    share = share / share.sum().clamp(min=1)
    return (values * share).sum(), None if kernel is None else kernel * share[:, None, None]


def _dot(a: Tensor, b: Tensor) -> Tensor:
    return torch.dot(a.reshape(-1), b.reshape(-1))


def _opposing_part(gd: Tensor, gg: Tensor) -> Tensor:
    """Coefficient of d's projection on g where the two oppose each other, otherwise 0."""
    return torch.where(gg > 0, gd / gg, 0).clamp(max=0)


def _shrink_to(max_ratio: float, gg: Tensor, dd: Tensor) -> Tensor:
    """Factor that brings |d| down to max_ratio * |g|; 1 where it is within it."""
    limit = max_ratio * gg.sqrt()
    norm = dd.sqrt()
    return torch.where(norm > limit, limit / norm, 1)
