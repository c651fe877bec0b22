"""Means over ranks, and reading device values without waiting for the device too early."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor


def group_of(process_group: dist.ProcessGroup | None) -> dist.ProcessGroup | None:
    """The group to average over: the given one, else the default one, None for a single process."""
    if not (dist.is_available() and dist.is_initialized()):
        return None
    group = process_group if process_group is not None else dist.group.WORLD
    return group if group is not None and dist.get_world_size(group) > 1 else None


def mean_over_ranks(values: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """Elementwise mean over the ranks of ``group``, in one collective; the same on every rank."""
    if group is None:
        return values
    total = values.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(total, group=group)  # gloo has no average
    return total.div_(dist.get_world_size(group))


class HostCopy:
    """A copy to host memory that starts now and is waited for when it is read."""

    def __init__(self, values: Tensor) -> None:
        self._values = values.detach().to("cpu", non_blocking=True)
        self._copied: torch.Event | None = None
        if values.device.type != "cpu":
            self._copied = torch.Event(device=values.device)
            self._copied.record()

    def read(self) -> list[float]:
        if self._copied is not None:
            self._copied.synchronize()
        values: list[float] = self._values.tolist()
        return values
