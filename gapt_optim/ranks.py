"""Sums over ranks, and reading device values without waiting for the device too early."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

_MOST_NAMED = 5
"""Fields that an error about ranks names."""


def over_ranks() -> bool:
    """This process is one of a group."""
    return dist.is_available() and dist.is_initialized()


def group_of(process_group: dist.ProcessGroup | None) -> dist.ProcessGroup | None:
    """The group to average over: the given one, else the default one, None for a single process."""
    if not over_ranks():
        return None
    group = process_group if process_group is not None else dist.group.WORLD
    return group if group is not None and dist.get_world_size(group) > 1 else None


def meeting_device(group: dist.ProcessGroup | None, device: torch.device) -> torch.device:
    """Where ranks meet: at ``device``, or at the present accelerator where the group's backend knows only that."""
    known = [each.type for each in getattr(group, "_device_types", ())]
    if not known or device.type in known:
        return device
    return torch.device(known[0], torch.accelerator.current_device_index())


def sum_over_ranks(values: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Elementwise sum over the ranks of ``group``, in one collective; the same on every rank."""
    total = values.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(total, group=group)
    return total


def mean_over_ranks(values: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """Elementwise mean over the ranks of ``group``, in one collective; the same on every rank."""
    if group is None:
        return values
    return sum_over_ranks(values, group).div_(dist.get_world_size(group))  # gloo has no average


def refuse_different_ranks(
    described: Mapping[str, str], group: dist.ProcessGroup | None, device: torch.device | str = "cpu"
) -> None:
    """Raise on all ranks where they are not the same.

    All ranks of the group call it together. One small collective compares a digest, and only where that differs is
    what lies behind it sent round.

    Args:
        described: what must be the same, by name, such as ``{"config.objective.weight": "0.1"}``.
        group: ranks to compare; None compares nothing.
        device: one that the group's backend reduces on.

    Raises:
        ValueError: ranks differ; the message names each field with the values of two ranks, the same on every rank.
    """
    if group is None:
        return
    digest = torch.tensor(_digest(described), dtype=torch.int64, device=device)
    lowest_and_highest = torch.stack((digest, -digest))
    dist.all_reduce(lowest_and_highest, op=dist.ReduceOp.MIN, group=group)
    lowest, negated_highest = lowest_and_highest
    if torch.equal(lowest, -negated_highest):
        return
    everyone: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(everyone, dict(described), group=group)
    raise ValueError(difference_between(everyone))


def difference_between(described: Sequence[Mapping[str, str]]) -> str:
    """What differs between ranks, in one line that is the same for all of them.

    >>> difference_between([{"weight": "0.1"}, {"weight": "0.2"}]).split(";")[0]
    'ranks differ in weight (rank 0: 0.1, rank 1: 0.2)'
    """
    fields = dict.fromkeys(name for each in described for name in each)
    different: list[str] = []
    for name in fields:
        values = [each.get(name, "nothing") for each in described]
        other = next((rank for rank, value in enumerate(values) if value != values[0]), None)
        if other is not None:
            different.append(f"{name} (rank 0: {values[0]}, rank {other}: {values[other]})")
    more = f" and {len(different) - _MOST_NAMED} more" if len(different) > _MOST_NAMED else ""
    return (
        f"ranks differ in {', '.join(different[:_MOST_NAMED])}{more}; give all ranks the same configuration, layers "
        "and checkpoint, or say with process_group= which ranks train together"
        + (
            "; stages of a pipeline are connected by gapt_optim.integrations.pipelining.pipelined, and of experts that "
            "only some ranks have, watch the module around them"
            if "layers" in fields and any(each.get("layers") != described[0].get("layers") for each in described)
            else ""
        )
    )


def _digest(described: Mapping[str, str]) -> list[int]:
    """Four numbers of 62 bits, so that they can be negated."""
    sha = hashlib.sha256(json.dumps(sorted(described.items())).encode()).digest()
    return [int.from_bytes(sha[i : i + 8], "big") >> 2 for i in range(0, 32, 8)]


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


def is_dtensor(value: Any) -> bool:
    return type(value).__name__ == "DTensor"
