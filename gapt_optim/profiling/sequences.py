"""A row for each sequence instead of one for each token, and layers compared with layers.

CKA is of the linear kernel, by an unbiased estimate of HSIC (Song et al., 2012) summed over sequences or batches
(Nguyen, Raghu and Kornblith, "Do wide and deep networks learn the same things?", 2021).
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..layout import Reading

MOST_SEQUENCES = 1024
MOST_ROWS = 128
"""Of a sequence, for CKA."""


class PooledRows:
    """The mean, the last and the first live row of each of the first sequences; of samples, these themselves."""

    def __init__(self) -> None:
        self.count = 0
        self.rows: dict[str, list[Tensor]] = {}

    def add(self, rows: Tensor, live: Tensor, axes: str) -> None:
        """Rows (batch, length, d), 0 where they do not count."""
        left = MOST_SEQUENCES - self.count
        if left <= 0:
            return
        if axes == "batch features":
            found = {"sample": rows[0][live[0]]}
        else:
            number = live.sum(1)
            there = number > 0
            found = {"mean": (rows.sum(1) / number.clamp(min=1).unsqueeze(1))[there]}
            if "length" in axes:
                places = torch.arange(live.shape[1], device=rows.device)
                ends = {"last": torch.where(live, places, -1).argmax(1), "first": live.to(torch.int32).argmax(1)}
                for name, place in ends.items():
                    found[name] = rows[torch.arange(len(rows), device=rows.device), place][there]
        for name, pooled in found.items():
            self.rows.setdefault(name, []).append(pooled[:left].cpu())
        self.count += len(next(iter(found.values())))

    def joined(self) -> dict[str, Tensor]:
        """(sequences, d) by how they are pooled."""
        return {name: torch.cat(parts) for name, parts in self.rows.items()}


class SimilaritySums:
    """CKA between all layers that run in a pass.

    Rows are the tokens where all layers have the same ones (at most 128 of a sequence, evenly spaced), and otherwise
    the samples of a batch, each flattened. Which of the two, the first pass decides.
    """

    def __init__(self) -> None:
        self.names: list[str] = []
        self.of_tokens: bool | None = None
        self.hsic: Tensor | None = None
        """(layers, layers)"""
        self._pass: dict[str, tuple[Tensor, Tensor, tuple[float, ...]]] = {}

    @torch.no_grad()
    def add(self, name: str, reading: Reading) -> None:
        """One output of the pass under way."""
        rows, live = reading.rows.float(), reading.live
        batch, length = rows.shape[:2]
        keep = rows.new_ones(batch, length) if live is None else live.to(rows.dtype)
        of_tokens = of_samples = rows.new_zeros(0)
        if self.of_tokens is not False:
            places = torch.linspace(0, length - 1, min(length, MOST_ROWS), device=rows.device).round().long()
            of_tokens = _vector(rows[:, places], keep[:, places])
        if self.of_tokens is not True:
            samples = rows if live is None else rows.masked_fill(~live.unsqueeze(-1), 0)
            samples = rows if reading.axes == "batch features" else samples.flatten(1).unsqueeze(0)
            of_samples = _vector(samples, samples.new_ones(samples.shape[:2]))
        self._pass[name] = of_tokens, of_samples, (batch, length, *keep.sum(1).tolist())

    def end_of_pass(self) -> None:
        """The pass is over: its layers meet. A pass with other layers than the first one is left out."""
        found, self._pass = self._pass, {}
        if not found:
            return
        if not self.names:
            self.names = list(found)
        if self.of_tokens is None:
            self.of_tokens = len({shape for _, _, shape in found.values()}) == 1
        columns = [vectors[0] if self.of_tokens else vectors[1] for vectors in found.values()]
        if list(found) != self.names or len({len(column) for column in columns}) > 1:
            return
        device = columns[0].device
        stacked = torch.stack([column.to(device) for column in columns]).double()
        self.hsic = plus(self.hsic, stacked @ stacked.mT)

    def value(self) -> tuple[tuple[float, ...], ...] | None:
        """(layers, layers), 1 on the diagonal; None where there are too few rows for it."""
        if self.hsic is None or not bool((self.hsic.diagonal() > 0).all()):
            return None
        own = self.hsic.diagonal()
        return tuple(map(tuple, (self.hsic / (own[:, None] * own[None]).sqrt()).clamp(-1, 1).tolist()))


def _vector(rows: Tensor, keep: Tensor) -> Tensor:
    """Gram matrices of rows (windows, n, d), as a vector; ``keep`` (windows, n) is 1 for those that count."""
    # The mean goes first: from products, a large one leaves its rounding.
    mean = (rows * keep.unsqueeze(-1)).sum(1, keepdim=True) / keep.sum(1).clamp(min=1)[:, None, None]
    rows = (rows - mean) * keep.unsqueeze(-1)
    return centered_without_diagonal(rows @ rows.mT, keep).flatten()


def centered_without_diagonal(gram: Tensor, keep: Tensor) -> Tensor:
    """Gram matrices (windows, n, n) so that the sum of the products of two is the unbiased HSIC of their rows.

    ``keep`` (windows, n) is 1 for rows that count. Windows with fewer than four are 0.
    """
    count = keep.sum(-1)[:, None, None]
    both = keep.unsqueeze(-1) * keep.unsqueeze(-2)
    both = both - torch.diag_embed(keep)
    gram = gram * both
    rows = gram.sum(-1, keepdim=True) / (count - 2).clamp(min=1)
    whole = gram.sum((-2, -1), keepdim=True) / ((count - 1) * (count - 2)).clamp(min=1)
    centered = (gram - rows - rows.mT + whole) * both
    return torch.where(count >= 4, centered / (count * (count - 3)).clamp(min=1).sqrt(), 0)


def plus(total: Tensor | None, value: Tensor) -> Tensor:
    return value if total is None else total.add_(value)
