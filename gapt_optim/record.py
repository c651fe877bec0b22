"""The numbers of one optimizer step, summed over its micro-batches and brought to the host."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from .distributed import HostCopy, mean_over_ranks
from .tap import PROBE_SIZE


class Reading(NamedTuple):
    """One step's numbers on the host, averaged over micro-batches and ranks."""

    loss: float
    entropies: dict[str, float]
    """Per layer that ran."""
    validation: float
    """nan where none was recorded."""
    statistics: list[list[float]]
    """<g,d>, |g|² and |d|² per layer; empty where they are not measured."""


class StepRecord:
    """Collects micro-batches until the optimizer steps.

    Sums stay on the device. On one rank each addition starts a copy to the host, which runs while the backward
    does; on several, the sums are reduced over ranks first, in one collective.
    """

    def __init__(self, names: list[str]) -> None:
        self.names = names
        self.sums: Tensor | None = None  # the loss, then one entropy per layer
        self.counts: list[int] = []
        self.host_sums: HostCopy | None = None
        self.clear()

    def clear(self) -> None:
        self.sums = self.host_sums = None
        self.counts = [0] * (1 + len(self.names))

    def add(self, loss: Tensor, entropies: dict[str, Tensor], group: dist.ProcessGroup | None) -> None:
        """One micro-batch: its loss and the entropy of each layer that ran."""
        loss = loss.detach().reshape(())
        columns = [
            loss,
            *(entropies[name].detach() if name in entropies else loss.new_zeros(()) for name in self.names),
        ]
        dtype = next(iter(entropies.values())).dtype
        row = torch.stack([column.to(dtype) for column in columns])
        self.sums = row if self.sums is None else self.sums + row
        here = [1, *(int(name in entropies) for name in self.names)]
        self.counts = [a + b for a, b in zip(self.counts, here, strict=True)]
        if group is None and not torch.compiler.is_compiling():
            self.host_sums = HostCopy(self.sums)

    def start_reading(
        self, statistics: Tensor | None, validation: float, group: dist.ProcessGroup | None
    ) -> Callable[[], Reading] | None:
        """Begin to bring the numbers to the host; the result waits for them. None when nothing was added.

        Args:
            statistics: (layers, 3) of the taps, None where they are not measured.
            validation: mean of the recorded validation losses, nan for none.
            group: ranks to average over.
        """
        if self.sums is None:
            return None
        counts, names = self.counts, self.names
        parts = [self.sums] if group is not None or self.host_sums is None else []
        if group is not None:
            parts = [self.sums / torch.tensor([max(count, 1) for count in counts]).to(self.sums, non_blocking=True)]
            # A layer may rest on some ranks: the means are over those where it ran, and all ranks know which did.
            has_validation = math.isfinite(validation)
            both = [
                *(float(count > 0) for count in counts),
                validation if has_validation else 0.0,
                float(has_validation),
            ]
            parts.append(torch.tensor(both, dtype=torch.float64).to(self.sums, non_blocking=True))
        if statistics is not None:
            if group is not None:  # the gradient of all ranks has 1 / n of each one's own
                statistics = statistics / dist.get_world_size(group)
            parts.append(statistics.reshape(-1).to(self.sums.dtype))
        device_values = HostCopy(mean_over_ranks(torch.cat(parts), group)) if parts else None
        host_sums = self.host_sums if group is None else None

        def read() -> Reading:
            values = (host_sums.read() if host_sums is not None else []) + (
                device_values.read() if device_values is not None else []
            )
            size, divisors, held_out = len(counts), [float(count) for count in counts], validation
            rest = values[size:]
            if group is not None:
                total, ranks, rest, divisors = *rest[size : size + 2], rest[size + 2 :], rest[:size]
                held_out = total / ranks if ranks > 0 else math.nan
            rows = [rest[i : i + PROBE_SIZE] for i in range(0, len(rest), PROBE_SIZE)]
            entropies = {name: values[i] / divisors[i] for i, name in enumerate(names, 1) if divisors[i] > 0}
            return Reading(values[0] / divisors[0], entropies, held_out, rows)

        return read


def mean_or_nan(values: list[float]) -> float:
    """Mean of ``values``, nan for none."""
    return math.fsum(values) / len(values) if values else math.nan
