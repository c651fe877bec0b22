"""One run on several processes: which one this is, how the model and its batches are divided, what all agree on.

    torchrun --nproc-per-node 2 examples/gpt2_fineweb.py --parallel ddp

Everything here also works for one process, where it does nothing.
"""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Literal, TypeVar, get_args

import torch
import torch.distributed as dist
from errors import UserError
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

Parallel = Literal["none", "ddp", "fsdp"]
PARALLEL: tuple[Parallel, ...] = get_args(Parallel)
T = TypeVar("T")


@dataclass(frozen=True)
class Ranks:
    """This process among those that torchrun has started; without torchrun, the only one."""

    rank: int = 0
    world: int = 1
    local: int = 0
    """Number on this machine."""
    control: dist.ProcessGroup | None = None
    """For what is agreed on. It waits as long as it takes, such as for a corpus that the first rank prepares."""

    @property
    def first(self) -> bool:
        """Whether this is the rank that prints and writes files."""
        return self.rank == 0

    def check(self, parallel: Parallel) -> None:
        """Refuses a --parallel that does not fit to how the script was started."""
        if parallel == "none" and self.world > 1:
            raise UserError(
                f"--parallel: torchrun started {self.world} processes, and without it each would train the whole run; "
                "give --parallel ddp or fsdp"
            )
        if parallel != "none" and self.control is None:
            raise UserError(
                f"--parallel {parallel}: found one process without torchrun; start the script by "
                f"torchrun --nproc-per-node N {sys.argv[0]}, or leave out --parallel"
            )

    def divide(self, accumulation: int, batch_size: int) -> tuple[int, int]:
        """Micro-batches a rank, and sequences in each, such that all ranks together take what one process would."""
        common = math.gcd(accumulation, self.world)
        if batch_size % (self.world // common):
            raise UserError(
                f"--accumulation {accumulation}, --batch-size {batch_size}: the {accumulation * batch_size} sequences "
                f"of a step do not divide by {self.world} ranks; make their product a multiple of {self.world}"
            )
        return accumulation // common, batch_size * common // self.world

    def device(self, device: torch.device) -> torch.device:
        """The GPU of this rank's own, where there are several; on CPUs all share the device."""
        if self.control is None or device.type == "cpu":
            return device
        if device.type != "cuda":
            raise UserError(f"--device {device}: ranks can meet on cpu and cuda only; give one of them")
        if device.index is not None:
            raise UserError(f"--device {device}: each rank takes a GPU of its own; give --device cuda")
        if self.local >= torch.cuda.device_count():
            raise UserError(
                f"--parallel: at least {self.local + 1} processes on a machine with {torch.cuda.device_count()} GPUs; "
                "start as many as there are GPUs, by --nproc-per-node"
            )
        torch.cuda.set_device(self.local)
        return torch.device("cuda", self.local)

    def sum(self, values: Tensor) -> Tensor:
        """Over ranks, of numbers on the CPU."""
        if self.control is not None:
            dist.all_reduce(values, group=self.control)
        return values

    def mean(self, value: float) -> float:
        """Over ranks."""
        return value if self.control is None else self.sum(torch.tensor(value, dtype=torch.float64)).item() / self.world

    def any(self, flag: bool) -> bool:
        """Whether it is so on any rank."""
        return flag if self.control is None else bool(self.sum(torch.tensor(int(flag))).item())

    def together(self, work: Callable[[], T]) -> T:
        """Does ``work`` on every rank. What the user has to mend on one is raised on all, so that none waits."""
        result, problem = _tried(work)
        if self.control is None:
            if problem is not None:
                raise problem
        else:
            found: list[UserError | None] = [None] * self.world
            dist.all_gather_object(found, problem, group=self.control)
            for each in found:
                if each is not None:
                    raise each
        return result  # type: ignore[return-value]

    def on_first(self, work: Callable[[], T]) -> T:
        """Does ``work`` on the first rank while the others wait, and gives all of them the result, or its UserError."""
        if self.control is None:
            return work()
        outcome = [_tried(work) if self.first else None]
        dist.broadcast_object_list(outcome, src=0, group=self.control)
        assert outcome[0] is not None
        result, problem = outcome[0]
        if problem is not None:
            raise problem
        return result  # type: ignore[return-value]


ALONE = Ranks()


def _tried(work: Callable[[], T]) -> tuple[T | None, Exception | None]:
    try:
        return work(), None
    except (UserError, ModuleNotFoundError) as error:
        return None, error


def join() -> Ranks:
    """Meets the other processes of this run. Only the first of them prints from then on."""
    if not dist.is_torchelastic_launched():
        return ALONE
    dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")
    control = dist.new_group(backend="gloo", timeout=timedelta(days=7))
    if dist.get_rank() > 0:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115  (as long as the process lives)
    return Ranks(dist.get_rank(), dist.get_world_size(), int(os.environ["LOCAL_RANK"]), control)


def leave(message: str | None = None) -> None:
    """Parts from the other processes, for a reason that all of them have; ``message`` is printed once.

    They leave together: torchrun ends all as soon as one has failed, before another could say why.
    """
    if message is not None and (not dist.is_initialized() or dist.get_rank() == 0):
        print(message, file=sys.stderr, flush=True)
    if dist.is_initialized():
        dist.all_reduce(torch.zeros(1))
        dist.destroy_process_group()


def parallelize(model: nn.Module, parallel: Parallel, device: torch.device, ranks: Ranks) -> nn.Module:
    """The module to call in training. ``model`` stays the one with the plain names; FSDP shards it in place."""
    if parallel == "ddp":
        return DistributedDataParallel(model, gradient_as_bucket_view=True)
    if parallel == "fsdp":
        mesh = init_device_mesh(device.type, (ranks.world,))
        for block in model.get_submodule("transformer.h").children():
            fully_shard(block, mesh=mesh)
        fully_shard(model, mesh=mesh)
    return model


@contextmanager
def gradient_sync(model: nn.Module, enabled: bool) -> Iterator[None]:
    """Whether ranks average their gradients in this backward pass, or keep their own for one where they do."""
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(enabled)
    if isinstance(model, DistributedDataParallel) and not enabled:
        with model.no_sync():
            yield
    else:
        yield


def clip_gradients(model: nn.Module, largest: float) -> None:
    """Scales the gradients down where their norm, of all shards together, is above ``largest``."""
    parameters = [p for p in model.parameters() if p.grad is not None]
    norm = nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
    if isinstance(norm, DTensor):
        norm = norm.full_tensor()
    nn.utils.clip_grads_with_norm_(parameters, largest, norm)
