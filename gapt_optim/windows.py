"""Windows: a representation cut into matrices of consecutive rows, and back.

A window holds rows of one document only. Windows begin at a document's first row that counts, so that padding on
either side changes nothing. Rows that do not count and the end of a short last window are rows of zeros, which change
no entropy.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F


class Windows(NamedTuple):
    """Which rows of (batch, length) each window holds."""

    size: int
    """Rows of a window."""
    places: Tensor | None = None
    """(windows, size), places in the batch * length rows; None where each sequence is cut from its first row on."""
    keep: Tensor | None = None
    """True where a row counts: (windows, size), or (batch, length) without places; None where all do."""


def windows_of(batch: int, length: int, size: int | None, live: Tensor | None, segments: Tensor | None) -> Windows:
    """Windows of ``size`` consecutive rows; ``None`` takes each sequence, or each document, as one.

    Without ``segments`` nothing waits for the device. With them, the number of windows is read on the host once, but
    in a compiled model, where room is made for as many as there can be.

    Args:
        batch, length: of the rows.
        size: rows of a window; a sequence shorter than that is one window.
        live: (batch, length) bool, true where a row counts; None = all.
        segments: (batch, length), equal for neighbours of one document; None = one document per sequence.
    """
    size = length if size is None else min(size, length)
    if not length or not batch or (live is None and segments is None):
        return Windows(size)
    if segments is not None:
        return _windows_of_documents(size, live, segments)
    assert live is not None
    first = live.to(torch.int32).argmax(1, keepdim=True)
    place = torch.arange(_count(length, size) * size, device=live.device) + first
    inside = place < length
    place = place.clamp(max=length - 1)
    keep = live.gather(1, place) & inside
    place = place + length * torch.arange(batch, device=live.device).unsqueeze(1)
    return Windows(size, place.reshape(-1, size), keep.reshape(-1, size))


def _windows_of_documents(size: int, live: Tensor | None, segments: Tensor) -> Windows:
    rows = segments.numel()
    compiling = torch.compiler.is_compiling()
    place = torch.arange(rows, device=segments.device)
    new = torch.ones_like(segments, dtype=torch.bool)
    new[:, 1:] = segments[:, 1:] != segments[:, :-1]
    new, counts = new.reshape(-1), place >= 0 if live is None else live.reshape(-1)
    start = torch.where(new, place, 0).cummax(0).values
    # The first row of a document that counts: no other of it counts before.
    before = counts.cumsum(0) - counts.to(torch.int64)
    begins = counts & (before == before[start])
    origin = torch.where(begins, place, -1).cummax(0).values
    within = place - origin
    if size == segments.shape[1] and not compiling:
        size = int(torch.where(counts, within, 0).max()) + 1
    opens = (origin >= start) & (within % size == 0)
    window = opens.cumsum(0) - 1
    number = rows if compiling else int(window[-1]) + 1
    slot = torch.where(counts, window * size + within % size, number * size)
    index = torch.zeros(number * size + 1, dtype=torch.int64, device=segments.device).index_copy_(0, slot, place)
    keep = torch.zeros(number * size + 1, dtype=torch.bool, device=segments.device).index_fill_(0, slot, True)
    return Windows(size, index[:-1].reshape(number, size), keep[:-1].reshape(number, size))


def cut(rows: Tensor, windows: Windows) -> Tensor:
    """(batch, length, d) as (windows, size, d): a view where all rows count and no window is short."""
    size, places, keep = windows
    batch, length, features = rows.shape
    if places is not None:
        assert keep is not None
        return rows.reshape(-1, features)[places].masked_fill(~keep.unsqueeze(-1), 0)
    if keep is not None:
        rows = rows.masked_fill(~keep.unsqueeze(-1), 0)
    count = _count(length, size)
    tail = count * size - length
    return (F.pad(rows, (0, 0, 0, tail)) if tail else rows).reshape(batch * count, size, features)


def joined(z: Tensor, windows: Windows, batch: int, length: int) -> Tensor:
    """The inverse of :func:`cut`: (windows, size, d) as (batch, length, d), zero where no window has a row."""
    size, places, keep = windows
    features = z.shape[-1]
    if places is not None:
        assert keep is not None
        nowhere = batch * length
        rows = z.new_zeros(nowhere + 1, features)
        rows.index_copy_(0, torch.where(keep, places, nowhere).reshape(-1), z.reshape(-1, features))
        return rows[:-1].reshape(batch, length, features)
    rows = z.reshape(batch, _count(length, size) * size, features)[:, :length]
    return rows if keep is None else rows.masked_fill(~keep.unsqueeze(-1), 0)


def rows_that_count(windows: Windows, batch: int, length: int) -> Tensor | None:
    """(windows,) rows of each window that count; None where all do."""
    size, places, keep = windows
    tail = _count(length, size) * size - length
    if keep is None:
        if not tail:
            return None
        keep = torch.ones(1, length, dtype=torch.bool).expand(batch, length)
    if places is None:
        keep = F.pad(keep, (0, tail)).reshape(-1, size)
    return keep.sum(-1)


def _count(length: int, size: int) -> int:
    """Windows of a sequence, in a form that torch.compile simplifies."""
    return (length + size - 1) // size if size else 0
