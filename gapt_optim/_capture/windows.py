"""Windows: a hidden tensor cut into matrices of consecutive rows, and back."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from ..entropy import masked


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


def from_windows(z: Tensor, like: Tensor) -> Tensor:
    """The inverse of :func:`windows`: matrices back to the shape of ``like``, the tail dropped."""
    size, features = z.shape[-2:]
    batch, length = _sequences(like)
    count, _ = _count_and_tail(length, size)
    rows = z.reshape(batch, count * size, features)[:, :length]
    return (rows.mT if like.ndim > 3 else rows).reshape(like.shape)


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


def _sequences(h: Tensor) -> tuple[int, int]:
    """Number of sequences and their length."""
    if h.ndim == 2:
        return 1, h.shape[0]
    return h.shape[0], h.shape[1] if h.ndim == 3 else math.prod(h.shape[2:])


def _count_and_tail(length: int, size: int) -> tuple[int, int]:
    """Windows of a sequence, and rows that the last one lacks; in a form that torch.compile simplifies."""
    count = (length + size - 1) // size if size else 0
    return count, count * size - length
