"""Where in a layer's output its length lies: in which tokens, at which positions, in which channels."""

from __future__ import annotations

import torch
from torch import Tensor

from .results import Token

MOST_TOKENS = 5
MOST_CHANNELS = 5


class Where:
    """Sums of norms by position, squares by channel, and the longest tokens so far."""

    def __init__(self) -> None:
        self.edges = [0, 1, 2, 3, *(2**i for i in range(2, 31))]
        self.norms: Tensor | None = None
        """(2, bins): sums of norms and numbers of tokens."""
        self.squares: Tensor | None = None
        self.longest: list[Token] = []

    def add_rows(self, squares: Tensor, live: Tensor, begins: Tensor, ids: Tensor | None, sequences: int) -> None:
        """Squared norms (batch, length) of rows, those that count, where documents begin, and the tokens' ids.

        ``sequences`` came before these.
        """
        norms = squares.sqrt()
        place = places(live, begins)[live]
        edges = torch.tensor(self.edges, device=norms.device)
        bins = torch.bucketize(place, edges, right=True) - 1
        pair = torch.stack([norms[live], torch.ones_like(norms[live])])
        sums = norms.new_zeros(2, len(edges)).index_add(1, bins, pair).double().cpu()
        self.norms = sums if self.norms is None else self.norms + sums
        median = torch.where(live, norms, torch.nan).nanmedian(-1, keepdim=True).values
        ratio = torch.where(live & (median > 0), norms / median, 0)
        most = ratio.reshape(-1).topk(min(MOST_TOKENS, ratio.numel()))
        length = live.shape[1]
        for value, index in zip(most.values.tolist(), most.indices.tolist(), strict=True):
            sequence, position = divmod(index, length)
            token = None if ids is None else int(ids[sequence, position])
            self.longest.append(Token(value, sequences + sequence, position, token))
        self.longest = sorted(self.longest, reverse=True, key=lambda found: found.ratio)[:MOST_TOKENS]

    def add_channels(self, squares: Tensor) -> None:
        """Sums of squares (d,) over the rows that count."""
        self.squares = squares.double() if self.squares is None else self.squares + squares

    def by_position(self) -> list[tuple[int, float]]:
        """The mean norm of tokens from each position on, up to the next one."""
        if self.norms is None:
            return []
        return [(edge, total / n) for edge, total, n in zip(self.edges, *self.norms.tolist(), strict=True) if n]

    def channels(self) -> list[tuple[int, float]]:
        """The channels with the largest shares of the rows' squared norm, largest first."""
        if self.squares is None or not float(self.squares.sum()) > 0:
            return []
        most = (self.squares / self.squares.sum()).topk(min(MOST_CHANNELS, len(self.squares)))
        return list(zip(most.indices.tolist(), most.values.tolist(), strict=True))


def places(live: Tensor, begins: Tensor) -> Tensor:
    """(batch, length), how many rows of its document count before each row that does; -1 before the first."""
    counts = live.reshape(-1).cumsum(0).reshape(live.shape)
    before = torch.where(begins, counts - live.long(), 0).reshape(-1).cummax(0).values.reshape(live.shape)
    return counts - before - 1
