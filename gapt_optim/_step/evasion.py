"""An entropy that falls without any compression, told once."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

from .._plan import StepPlan
from .._tell import tell
from .record import Reading

_DECAY = 0.9
"""Of the moving averages that are compared."""


class _Level(NamedTuple):
    """Moving averages of one layer."""

    pressed: float
    cosine: float
    norm_ratio: float
    mean_share: float

    def moved_to(self, here: _Level) -> _Level:
        """One step on."""
        return _Level(*(_DECAY * mean + (1 - _DECAY) * value for mean, value in zip(self, here, strict=True)))


class EvasionWatch:
    """Compares each layer's entropy with its centered cosine entropy, since compression began for the first time."""

    def __init__(self) -> None:
        self._now: dict[str, _Level] = {}
        self._before: dict[str, _Level] = {}
        self._compressed = False
        self._warned = False

    def state_dict(self) -> dict[str, Any]:
        """Plain values, by layer."""
        return {
            "compressed": self._compressed,
            "warned": self._warned,
            "now": {name: level._asdict() for name, level in self._now.items()},
            "before": {name: level._asdict() for name, level in self._before.items()},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from :meth:`state_dict`."""
        self._compressed, self._warned = state["compressed"], state["warned"]
        self._now, self._before = (
            {name: _Level(**level) for name, level in state[when].items()} for when in ("now", "before")
        )

    def look(self, plan: StepPlan, reading: Reading) -> None:
        """Take the numbers of one step. Those of a layer that are not all finite are passed over.

        Warns:
            UserWarning: once, where a pressed entropy has halved and the centered cosine entropy fell by less than a
                tenth.
        """
        if self._warned:
            return
        if plan.compressing and not self._compressed:
            self._compressed, self._before = True, dict(self._now)
        for name in plan.shares:
            if name in reading.entropies:
                measures = reading.measures[name]
                here = _Level(
                    reading.entropies[name],
                    measures.centered_cosine_entropy,
                    measures.norm_ratio,
                    measures.mean_share,
                )
                if not all(map(math.isfinite, here)):
                    continue
                self._now[name] = self._now[name].moved_to(here) if name in self._now else here
                if self._compressed:
                    self._compare(name, self._before.setdefault(name, here), self._now[name])

    def _compare(self, name: str, before: _Level, now: _Level) -> None:
        if self._warned or not (now.pressed < 0.5 * before.pressed and now.cosine > 0.9 * before.cosine):
            return
        self._warned = True
        tell(
            f'the entropy of layer "{name}" fell from {before.pressed:.3g} to {now.pressed:.3g}, but its centered '
            f"cosine entropy only from {before.cosine:.3g} to {now.cosine:.3g} nats: nothing was compressed; "
            f"{_what_happened(before, now)} instead. "
            'Use EntropyConfig(kernel="cosine", center=True), which neither long tokens nor a shared vector lowers'
        )


def _what_happened(before: _Level, now: _Level) -> str:
    """Which of the two ways out was taken: the one that went further of the way that it can go."""
    longer = 1 - before.norm_ratio / now.norm_ratio if now.norm_ratio > 0 else 0.0
    shared = (now.mean_share - before.mean_share) / max(1 - before.mean_share, 1e-9)
    lengths = f"a few tokens grew long (norm ratio {before.norm_ratio:.3g} -> {now.norm_ratio:.3g})"
    common = f"all tokens came to share one vector (mean share {before.mean_share:.2g} -> {now.mean_share:.2g})"
    return lengths if longer > shared else common
