"""The numbers of one optimizer step, summed over its micro-batches and brought to the host."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from .._capture import NUMBERS, PROBE_SIZE
from .._objective import Objective
from ..metrics import Measures
from .ranks import HostCopy, mean_over_ranks

_SCALARS = 2
"""Numbers of a step before those of its layers: loss and penalty."""


class Reading(NamedTuple):
    """One step's numbers on the host, averaged over micro-batches and ranks."""

    loss: float
    penalty: float
    """What compression added to the loss; 0 in memorization."""
    entropies: dict[str, float]
    """Per layer that ran."""
    measures: dict[str, Measures]
    """Per layer that ran, what can hide in its entropy."""
    validation: float
    """nan where none was recorded."""
    statistics: list[list[float]]
    """<g,d>, |g|² and |d|² per layer; empty without activation alignment."""


class StepRecord:
    """Collects micro-batches until the optimizer steps.

    Sums stay on the device. On one rank each addition starts a copy to the host, which runs while the backward
    does; on several, the sums are reduced over ranks first, in one collective.
    """

    def __init__(self, names: list[str]) -> None:
        self.names = names
        self.sums: Tensor | None = None  # the loss, the penalty, then one entropy and its measures per layer
        self.counts: list[int] = []  # micro-batches, then those in which each layer ran
        self.host_sums: HostCopy | None = None
        self.clear()

    def clear(self) -> None:
        self.sums = self.host_sums = None
        self.counts = [0] * (1 + len(self.names))

    def add(self, loss: Tensor, objective: Objective, group: dist.ProcessGroup | None) -> None:
        """One micro-batch: its loss and what its objective is made of."""
        layers, numbers = objective.layers, objective.numbers
        scalars = [loss.detach(), numbers.new_zeros(()) if objective.penalty is None else objective.penalty]
        if len(layers) < len(self.names):
            of_layer = dict(zip(layers, numbers.unbind(), strict=True))
            nothing = numbers.new_zeros(NUMBERS)
            numbers = torch.stack([of_layer.get(name, nothing) for name in self.names])
        row = torch.cat([*(scalar.reshape(1).to(numbers.dtype) for scalar in scalars), numbers.reshape(-1)])
        self.sums = row if self.sums is None else self.sums + row
        here = [1, *(int(name in layers) for name in self.names)]
        self.counts = [a + b for a, b in zip(self.counts, here, strict=True)]
        if group is None and not torch.compiler.is_compiling():
            self.host_sums = HostCopy(self.sums)

    def start_reading(
        self, statistics: Tensor | None, validation: float, group: dist.ProcessGroup | None
    ) -> Callable[[], Reading] | None:
        """Begin to bring the numbers to the host; the result waits for them. None when nothing was added.

        Args:
            statistics: (layers, 3) of the taps, None without activation alignment.
            validation: mean of the recorded validation losses, nan for none.
            group: ranks to average over.
        """
        if self.sums is None:
            return None
        if statistics is not None:
            statistics = statistics.reshape(-1).to(self.sums.dtype)
        names = self.names
        if group is None:
            arriving = self._alone(self.sums, statistics, validation)
        else:
            arriving = self._over_ranks(self.sums, statistics, validation, group)
        return lambda: _as_reading(names, arriving())

    def _alone(self, sums: Tensor, statistics: Tensor | None, validation: float) -> Callable[[], _Arrived]:
        """Of one process, whose sums are on their way since they were made."""
        divisors = [float(count) for count in self.counts]
        copied = HostCopy(sums) if self.host_sums is None else self.host_sums
        beside = None if statistics is None else HostCopy(statistics)
        return lambda: _Arrived(copied.read(), divisors, validation, [] if beside is None else beside.read())

    def _over_ranks(
        self, sums: Tensor, statistics: Tensor | None, validation: float, group: dist.ProcessGroup
    ) -> Callable[[], _Arrived]:
        """Means over ranks, in one collective."""
        counts, has_validation = self.counts, math.isfinite(validation)
        own_divisors = torch.tensor(_per_column([max(count, 1) for count in counts]))
        # A layer may rest on some ranks: the means are over those where it ran, and all ranks know which did.
        ran = [float(count > 0) for count in counts]
        both = [*ran, validation if has_validation else 0.0, float(has_validation)]
        parts = [
            sums / own_divisors.to(sums, non_blocking=True),
            torch.tensor(both, dtype=torch.float64).to(sums, non_blocking=True),
        ]
        if statistics is not None:  # the gradient of all ranks has 1 / n of each one's own
            parts.append(statistics / dist.get_world_size(group))
        copied = HostCopy(mean_over_ranks(torch.cat(parts), group))

        def arrived() -> _Arrived:
            values = copied.read()
            size, n = len(_per_column(counts)), len(counts)
            rest = values[size:]
            total, ranks = rest[n : n + 2]
            held_out = total / ranks if ranks > 0 else math.nan
            return _Arrived(values[:size], rest[:n], held_out, rest[n + 2 :])

        return arrived


class _Arrived(NamedTuple):
    """A step's numbers on the host, as they were sent."""

    sums: list[float]
    divisors: list[float]
    """Of the scalars, then of each layer; 0 where a layer did not run."""
    validation: float
    statistics: list[float]


def _as_reading(names: list[str], arrived: _Arrived) -> Reading:
    """Means by name."""
    sums, divisors, validation, statistics = arrived
    loss, penalty = (value / divisors[0] for value in sums[:_SCALARS])
    layers = {
        name: [value / ran for value in sums[_SCALARS + i * NUMBERS :][:NUMBERS]]
        for i, (name, ran) in enumerate(zip(names, divisors[1:], strict=True))
        if ran > 0
    }
    entropies = {name: values[0] for name, values in layers.items()}
    measures = {name: Measures(*values[1:]) for name, values in layers.items()}
    rows = [statistics[i : i + PROBE_SIZE] for i in range(0, len(statistics), PROBE_SIZE)]
    return Reading(loss, penalty, entropies, measures, validation, rows)


def _per_column(counts: list[int]) -> list[int]:
    """The count that each column of the sums has: the first for the scalars, then one per layer."""
    first, *layers = counts
    return [first] * _SCALARS + [count for count in layers for _ in range(NUMBERS)]


def mean_or_nan(values: list[float]) -> float:
    """Mean of ``values``, nan for none."""
    try:
        return math.fsum(values) / len(values) if values else math.nan
    except OverflowError:  # the sum is no float, the mean is
        return math.fsum(value / len(values) for value in values)
