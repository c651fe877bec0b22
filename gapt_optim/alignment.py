"""Angles between the gradients of two losses: cosines, projections, norms."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Angle:
    """How the loss gradient g and the entropy gradient d lie to each other in one layer or tensor."""

    cosine: float | None
    """<g,d> / (|g| |d|), in [-1, 1]; None where a norm is zero or not finite."""
    projection: float | None
    """<d,g> / |g|², the coefficient of d's projection on g; None like the cosine."""
    loss_norm: float
    """|g|, of the loss as it was differentiated (scaled, where the loss was scaled)."""
    entropy_norm: float
    """|d|, on the same scale; without the objective's weight."""

    @classmethod
    def of(cls, gd: float, gg: float, dd: float) -> Angle:
        """From <g,d>, |g|² and |d|²."""
        defined = gg > 0 and dd > 0 and math.isfinite(gg) and math.isfinite(dd) and math.isfinite(gd)
        return cls(
            cosine=max(-1.0, min(1.0, gd / math.sqrt(gg) / math.sqrt(dd))) if defined else None,
            projection=gd / gg if defined else None,
            loss_norm=math.sqrt(gg) if gg >= 0 else math.nan,
            entropy_norm=math.sqrt(dd) if dd >= 0 else math.nan,
        )


@dataclass(frozen=True)
class Alignment(Angle):
    """The angle over everything, and per layer."""

    layers: dict[str, Angle] = field(default_factory=dict)


def activation_alignment(names: Sequence[str], statistics: Sequence[Sequence[float]]) -> Alignment | None:
    """Alignment from each layer's <g,d>, |g|² and |d|², for the mean entropy over the layers.

    The overall angle is that of the layers' gradients laid end to end. None where no gradient arrived at all.
    """
    if not any(gg > 0 for _, gg, _ in statistics):
        return None
    # d is the gradient of one layer's entropy; the mean over n layers has 1/n of it.
    share = 1 / len(names)
    gd, gg, dd = (math.fsum(column) for column in zip(*statistics, strict=True))
    overall = Angle.of(gd * share, gg, dd * share * share)
    layers = {name: Angle.of(*row) for name, row in zip(names, statistics, strict=True)}
    return Alignment(overall.cosine, overall.projection, overall.loss_norm, overall.entropy_norm, layers)
