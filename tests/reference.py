"""Slow twins of the library's arithmetic: plain loops, eigenvalues and autograd, in float64 where that matters."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise

import torch
from torch import Tensor

KERNELS = {
    "linear": ("linear", False),
    "centered linear": ("linear", True),
    "cosine": ("cosine", False),
    "centered cosine": ("cosine", True),
}
"""Each kernel by the name of its tests: ``kernel`` and ``center``."""


def reference_rows(z: Tensor, mask: Tensor | None, kernel: str, center: bool) -> Tensor:
    """The rows of one matrix (n, d) that count, as the kernel sees them."""
    if mask is not None:
        z = z[mask.bool()]
    if kernel == "cosine" or center:
        z = z[(z.detach() != 0).any(-1)]
    if kernel == "cosine":
        z = z / z.norm(dim=-1, keepdim=True)
    return z - z.mean(0) if center and len(z) else z


def reference_entropy(
    z: Tensor,
    alpha: float,
    mask: Tensor | None = None,
    normalize: bool = False,
    kernel: str = "cosine",
    center: bool = True,
) -> Tensor:
    """Entropy of one matrix (n, d), differentiable any number of times away from shared eigenvalues."""
    rows = reference_rows(z, mask, kernel, center)
    counted = rows.detach()
    if center and (len(rows) < 2 or bool(counted.norm() < 1e-7 * (z.detach().norm() if kernel == "linear" else 1))):
        return z.sum() * 0
    if rows.numel() == 0 or not rows.any():
        return z.sum() * 0
    p = torch.linalg.eigvalsh(rows @ rows.T)
    p = p / p.sum()
    p = p[p > 1e-12 * p.max()]
    value = _entropy_of_eigenvalues(p, alpha)
    if normalize:
        rank = min(len(rows) - center, z.shape[-1])
        value = value / math.log(rank) if rank > 1 else value * 0
    return value


def reference_measures(z: Tensor, mask: Tensor | None = None) -> list[float]:
    """Linear entropy, centered cosine entropy, norm ratio and mean share of one matrix (n, d)."""
    rows = reference_rows(z.double(), mask, "linear", False)
    rows = rows[(rows != 0).any(-1)]
    norms = rows.norm(dim=-1).tolist()
    linear, cosine = (float(reference_entropy(rows, 2.0, kernel=k, center=c)) for k, c in PLAIN_AND_CENTERED)
    return [
        linear,
        cosine,
        max(norms) / statistics.median(norms),
        float(rows.mean(0).norm() ** 2 / rows.square().sum(-1).mean()),
    ]


def reference_layer_measures(h: Tensor, window: int | None = 8, mask: Tensor | None = None) -> list[float]:
    """Means over the windows of one hidden tensor that say something: of the centered entropy those with three rows
    that are not zero, of the rest those with two; where there are none, those with one fewer.
    """
    windows = list(reference_windows(h, window, mask))
    counts = [len(reference_rows(z, live, "cosine", False)) for z, live in windows]
    found = [reference_measures(z, live) if n else [] for (z, live), n in zip(windows, counts, strict=True)]
    means = []
    for column, fewest in enumerate((2, 3, 2, 2)):
        least = min(fewest, max(counts))
        means.append(statistics.fmean(m[column] for m, n in zip(found, counts, strict=True) if n >= least))
    return means


PLAIN_AND_CENTERED = (("linear", False), ("cosine", True))


def _entropy_of_eigenvalues(p: Tensor, alpha: float) -> Tensor:
    if math.isinf(alpha):
        return -p.max().log()
    if abs(alpha - 1) < 1e-5:  # two terms of the series in alpha - 1, where the formula below cancels
        mean = (p * p.log()).sum()
        variance = (p * (p.log() - mean).square()).sum()
        return -mean - (alpha - 1) / 2 * variance
    return torch.logsumexp(alpha * p.log(), 0) / (1 - alpha)


def reference_windows(
    h: Tensor, window: int | None, mask: Tensor | None = None
) -> Iterator[tuple[Tensor, Tensor | None]]:
    """Rows of each window that has a live one, and their mask. Windows begin at a sequence's first live row."""
    sequences = [h] if h.ndim == 2 else list(h) if h.ndim == 3 else [image.flatten(1).T for image in h]
    for i, sequence in enumerate(sequences):
        size = len(sequence) if window is None else window
        first = 0 if mask is None or not mask[i].any() else int(mask[i].int().argmax())
        for start in range(first, len(sequence), size):
            live = None if mask is None else mask[i, start : start + size].bool()
            if live is None or live.any():
                yield sequence[start : start + size], live


def reference_layer_entropy(
    h: Tensor,
    alpha: float = 2.0,
    window: int | None = 8,
    mask: Tensor | None = None,
    normalize: bool = False,
    kernel: str = "cosine",
    center: bool = True,
) -> Tensor:
    """Mean entropy over the windows of one hidden tensor that have two rows that count, or three for a centered kernel.

    The entropy of all others is 0, whatever their rows are.
    """
    values = [
        reference_entropy(z, alpha, live, normalize, kernel, center)
        for z, live in reference_windows(h, window, mask)
        if len(reference_rows(z, live, kernel, center)) >= 2 + center
    ]
    return torch.stack(values).mean() if values else h.sum() * 0


def reference_objective(
    loss: Tensor,
    activations: Sequence[Tensor],
    weight: float = 1.0,
    window: int | None = 8,
    alpha: float = 2.0,
    mask: Tensor | None = None,
    normalize: bool = False,
    reduce: Callable[[list[Tensor]], Tensor] | None = None,
    kernel: str = "cosine",
    center: bool = True,
) -> Tensor:
    """loss + weight * the mean entropy over layers, or what ``reduce`` makes of them."""
    entropies = [reference_layer_entropy(h, alpha, window, mask, normalize, kernel, center) for h in activations]
    total = sum(entropies, torch.zeros(())) / len(entropies) if reduce is None else reduce(entropies)
    return loss + weight * total


def _number(value: Tensor) -> float:
    return float(value.detach())


def _mean(entropies: list[Tensor]) -> Tensor:
    return torch.stack(entropies).mean()


def _largest_drop(entropies: list[Tensor]) -> Tensor:
    if len(entropies) == 1:
        return entropies[0]
    return max(pairwise(entropies), key=lambda pair: _number(pair[0] - pair[1]))[1]


REFERENCE_REDUCTIONS: dict[str, Callable[[list[Tensor]], Tensor]] = {
    "mean": _mean,
    "largest_drop": _largest_drop,
}
"""Each reduction of a list of layer entropies, written down once more."""
