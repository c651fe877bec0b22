"""What a profile should say, by definition: float64, one window at a time, eigenvalues."""

from __future__ import annotations

import math
from itertools import pairwise

import torch
from torch import Tensor


def entropy(rows: Tensor, kernel: str, center: bool, alpha: float) -> tuple[float, float]:
    """Entropy in nats and normalized, of the rows (n, d) that count."""
    z = rows.double()
    if kernel == "cosine" or center:
        z = z[z.norm(dim=-1) > 0]
    if kernel == "cosine":
        z = z / z.norm(dim=-1, keepdim=True)
    n, d = z.shape
    if center and n:
        z = z - z.mean(0)
    largest = min(n - center, d)
    values = torch.linalg.svdvals(z).square() if n else torch.zeros(0, dtype=torch.double)
    values = values[values > 1e-9 * values.sum()] if len(values) else values
    if len(values) == 0 or float(values.sum()) < 1e-12:
        return 0.0, 0.0
    p = values / values.sum()
    if alpha == 1:
        nats = float(-(p * p.log()).sum())
    elif math.isinf(alpha):
        nats = float(-p.max().log())
    else:
        nats = float((p**alpha).sum().log()) / (1 - alpha)
    return nats, nats / math.log(largest) if largest > 1 else 0.0


def windows(rows: Tensor, mask: Tensor, size: int | None) -> list[Tensor]:
    """Live rows of each window that has some, of (seq, d) and (seq,)."""
    size = len(rows) if size is None else size
    cuts = [(rows[i : i + size], mask[i : i + size]) for i in range(0, len(rows), size)]
    return [part[live] for part, live in cuts if live.any()]


def norm_ratio(rows: Tensor) -> float:
    norms = sorted(float(row.norm()) for row in rows.double())
    n = len(norms)
    return norms[-1] / ((norms[(n - 1) // 2] + norms[n // 2]) / 2)


def mean_share(rows: Tensor) -> float:
    z = rows.double()
    return float(len(z) * z.mean(0).square().sum() / z.square().sum())


def curvature(rows: Tensor) -> list[float]:
    """Angles in degrees between successive differences of (seq, d), all of whose rows count."""
    z = rows.double()
    steps = z[1:] - z[:-1]
    return [
        math.degrees(math.acos(max(-1.0, min(1.0, float(a @ b / (a.norm() * b.norm())))))) for a, b in pairwise(steps)
    ]


def rankme(rows: Tensor) -> float:
    sigma = torch.linalg.svdvals(rows.double())
    p = sigma / sigma.sum()
    p = p[p > 1e-9]
    return float(torch.exp(-(p * p.log()).sum()))
