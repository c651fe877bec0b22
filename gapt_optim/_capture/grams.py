"""What one call of a tapped module leaves for the objective."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from ..entropy import Kernel, gram_matrix, measures_of_rows
from .windows import live_rows, window_shape, windows

if TYPE_CHECKING:
    from ..config import EntropyConfig


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
    """The two zeros t of the tap; None above frozen layers, where nothing flows back."""
    measures: tuple[Tensor, Tensor] | None
    """Where rows outnumber features: what :func:`measures_of_rows` gives, (windows, 4) and (windows,). Elsewhere the
    matrices tell."""


def kernel_of(config: EntropyConfig) -> Kernel:
    """The kernel that a configuration names."""
    return Kernel(cosine=config.kernel == "cosine", center=config.center)


def measures_beside(rows: Tensor) -> tuple[Tensor, ...]:
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


def grams_of(h: Tensor, mask: Tensor | None, config: EntropyConfig) -> Grams:
    """What a tap leaves when nothing flows back: in evaluation, or above frozen layers."""
    rows = windows(h.detach(), config.window, mask)
    gram = gram_matrix(rows, config.alpha, kernel_of(config))
    return captured(h, mask, config, gram, None, measures_beside(rows))
