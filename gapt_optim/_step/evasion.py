"""An entropy that falls without any compression, told once."""

from __future__ import annotations

import warnings
from dataclasses import dataclass

from .._plan import StepPlan
from .record import Reading

_DECAY = 0.9
"""Of the moving averages that are compared."""


@dataclass
class _Level:
    pressed: float
    cosine: float


class EvasionWatch:
    """Compares each layer's entropy with its centered cosine entropy, since compression began for the first time."""

    def __init__(self) -> None:
        self._now: dict[str, _Level] = {}
        self._before: dict[str, _Level] = {}
        self._compressed = False
        self._warned = False

    def look(self, plan: StepPlan, reading: Reading) -> None:
        """Take the numbers of one step.

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
                here = _Level(reading.entropies[name], reading.measures[name].centered_cosine_entropy)
                last = self._now.get(name, here)
                self._now[name] = _Level(_average(last.pressed, here.pressed), _average(last.cosine, here.cosine))
                if self._compressed:
                    self._compare(name, self._before.setdefault(name, here), self._now[name], reading)

    def _compare(self, name: str, before: _Level, now: _Level, reading: Reading) -> None:
        if self._warned or not (now.pressed < 0.5 * before.pressed and now.cosine > 0.9 * before.cosine):
            return
        self._warned = True
        measures = reading.measures[name]
        warnings.warn(
            f'the entropy of layer "{name}" fell from {before.pressed:.3g} to {now.pressed:.3g}, but its centered '
            f"cosine entropy only from {before.cosine:.3g} to {now.cosine:.3g} nats: this is no compression (norm "
            f"ratio {measures.norm_ratio:.3g}, mean share {measures.mean_share:.3g}). A few tokens grew long, or all "
            'tokens share one vector; press EntropyConfig(kernel="cosine", center=True), which neither lowers',
            UserWarning,
            stacklevel=6,
        )


def _average(mean: float, value: float) -> float:
    return _DECAY * mean + (1 - _DECAY) * value
