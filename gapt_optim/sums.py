"""The numbers of one optimizer step: sums and weights over its micro-batches and ranks, on their way to the host.

How a batch is cut into micro-batches and ranks changes none of them but by rounding.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from .metrics import Measures
from .objective import Objective
from .ranks import HostCopy, sum_over_ranks

_SCALARS = 2
"""Of a row before its layers: the loss, and what compression added to it."""
_MEASURES = 4


class StepNumbers(NamedTuple):
    """One step's numbers on the host, over micro-batches and ranks."""

    micro_batches: float
    loss: float
    """Mean over micro-batches; nan where there was none."""
    penalty: float
    """What compression added to it; 0 in memorization."""
    entropies: dict[str, float]
    """Of each layer that had windows which can have an entropy."""
    ran: list[str]
    """Layers that ran."""
    measures: dict[str, Measures]
    """By layer, what can hide in its entropy; empty where it was not due."""
    angles: dict[str, list[float]]
    """By layer, <g,d>, |g|² and |d|² for its mean entropy; empty where they were not due."""
    validation: float
    """Mean of the held-out losses; nan where none was recorded."""


class StepSums:
    """Collects micro-batches until the optimizer steps. Sums stay on the device.

    On one rank, each addition starts a copy to the host, which runs while the backward does. On several, the sums are
    reduced over ranks first, in one collective of a size that never changes.
    """

    def __init__(self, names: Sequence[str]) -> None:
        self.names = list(names)
        self.micro_batches = 0
        self._row: Tensor | None = None  # scalars, (2, layers) of entropies, (2, layers, 4) of measures
        self._ran: set[str] = set()
        self._on_host: HostCopy | None = None

    def clear(self) -> None:
        self.micro_batches, self._row, self._on_host, self._ran = 0, None, None, set()

    def add(self, loss: Tensor, objective: Objective, *, alone: bool, micro_batches: int = 1) -> None:
        """One micro-batch: its loss, and what its objective is made of. ``alone`` on one rank.

        Of a stage of a pipeline it is the objective alone, and counts for no micro-batch.
        """
        sums, measures, layers = objective.sums, objective.measures, objective.layers
        if len(layers) < len(self.names):
            sums = self._spread(sums, layers, 1)
            measures = None if measures is None else self._spread(measures, layers, 1)
        size = 2 * len(self.names) * _MEASURES
        of_measures = sums.new_zeros(size) if measures is None else measures.reshape(-1).to(sums.dtype)
        penalty = sums.new_zeros(1) if objective.penalty is None else objective.penalty.reshape(1).to(sums.dtype)
        row = torch.cat((loss.detach().reshape(1).to(sums.dtype), penalty, sums.reshape(-1), of_measures))
        self._collect(row if self._row is None else self._row + row, alone=alone)
        self._ran.update(layers)
        self.micro_batches += micro_batches

    def add_loss(self, loss: Tensor, *, alone: bool) -> None:
        """One more loss of a micro-batch that was added."""
        if self._row is None:
            return
        loss = loss.detach().reshape(1).to(self._row)
        self._collect(torch.cat((self._row[:1] + loss, self._row[1:])), alone=alone)

    def _collect(self, row: Tensor, *, alone: bool) -> None:
        self._row = row
        if alone and not torch.compiler.is_compiling():
            self._on_host = HostCopy(row)

    def _spread(self, values: Tensor, layers: list[str], dim: int) -> Tensor:
        """``values`` of some layers among zeros for the others."""
        own = dict(zip(layers, values.unbind(dim), strict=True))
        nothing = values.new_zeros([n for i, n in enumerate(values.shape) if i != dim])
        return torch.stack([own.get(name, nothing) for name in self.names], dim)

    def start_reading(
        self, angles: Tensor | None, validation: list[float], device: torch.device, group: dist.ProcessGroup | None
    ) -> Callable[[], StepNumbers] | None:
        """Begin to bring the numbers to the host; the result waits for them. None when nothing was added on any rank.

        Args:
            angles: (layers, 3) sums, or None where they are not due.
            validation: held-out losses since the last step.
            device: where ranks meet.
            group: ranks to sum over; None for a single process.
        """
        count = len(self.names)
        held_out = [math.fsum(validation) if validation else 0.0, float(len(validation))]
        known = [*(float(name in self._ran) for name in self.names), *held_out, float(self.micro_batches)]
        if group is None:
            if self._row is None:
                return None
            sums = HostCopy(self._row) if self._on_host is None else self._on_host
            beside = None if angles is None else HostCopy(angles.reshape(-1))
            return lambda: self._numbers([*sums.read(), *known], None if beside is None else beside.read(), ranks=1)
        # One type and device on all ranks, also on one that had no loss.
        like = torch.empty(0, device=device, dtype=torch.float32 if device.type == "mps" else torch.float64)
        row = like.new_zeros(_SCALARS + 2 * count * (1 + _MEASURES)) if self._row is None else self._row.to(like)
        own = torch.tensor(known, dtype=like.dtype)
        flat = like.new_zeros(3 * count) if angles is None else angles.reshape(-1).to(like)
        sent = torch.cat((row, own.to(device, non_blocking=True), flat))
        arriving = HostCopy(sum_over_ranks(sent, group))
        due, ranks = angles is not None, dist.get_world_size(group)

        def arrived() -> StepNumbers:
            values = arriving.read()
            numbers, own_angles = values[: len(values) - 3 * count], values[len(values) - 3 * count :]
            return self._numbers(numbers, own_angles if due else None, ranks=ranks)

        return arrived

    def _numbers(self, values: list[float], angles: list[float] | None, *, ranks: int) -> StepNumbers:
        """Sums over weights, by name."""
        names, count = self.names, len(self.names)
        (loss, penalty), values = values[:_SCALARS], values[_SCALARS:]
        totals, weights, values = values[:count], values[count : 2 * count], values[2 * count :]
        size = count * _MEASURES
        of_measures, weights_of, values = values[:size], values[size : 2 * size], values[2 * size :]
        ran, (held_out, held_out_count, micro_batches) = values[:count], values[count:]
        measures: dict[str, Measures] = {}
        for i, name in enumerate(names):
            part = slice(i * _MEASURES, (i + 1) * _MEASURES)
            if any(weights_of[part]):
                measures[name] = Measures.of_sums(of_measures[part], weights_of[part])
        found: dict[str, list[float]] = {}
        if angles is not None:
            for i, (name, weight) in enumerate(zip(names, weights, strict=True)):
                # The loss is a mean over ranks, whose gradient has 1 / n of each one's own.
                gd, gg, dd = angles[3 * i : 3 * i + 3]
                n = max(weight, 1.0)
                found[name] = [gd / n / ranks, gg / ranks**2, dd / n**2]
        return StepNumbers(
            micro_batches=micro_batches,
            loss=loss / micro_batches if micro_batches else math.nan,
            penalty=penalty / micro_batches if micro_batches else math.nan,
            entropies={
                name: total / weight for name, total, weight in zip(names, totals, weights, strict=True) if weight
            },
            ran=[name for name, times in zip(names, ran, strict=True) if times],
            measures=measures,
            angles=found,
            validation=held_out / held_out_count if held_out_count else math.nan,
        )
