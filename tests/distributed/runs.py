"""Short training runs, the same on one process and on several that share its batch."""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer
from torch.utils.checkpoint import checkpoint

from gapt_optim import GAPTConfig, GAPTOptimizer, GateConfig, RepresentationHook, StepMetrics

RESTLESS = GateConfig(patience_memorization=2, patience_compression=2, min_improvement=0.5, spike_tolerance=10.0)
COMPRESSING = GateConfig(initial_phase="compression", frozen=True)
BATCH = 8
SGD = partial(torch.optim.SGD, momentum=0.9)
ADAMW = partial(torch.optim.AdamW, weight_decay=0.1)
_SEEDED = threading.Lock()  # ranks may be threads, which share one generator


class Block(nn.Module):
    """A residual layer."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.tanh(self.linear(x))


class Net(nn.Module):
    """Sequences through tapped blocks to class scores."""

    def __init__(self, recompute: bool = False, depth: int = 3) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(depth))
        self.head = nn.Linear(6, 4)
        self.recompute = recompute

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False) if self.recompute else block(x)
        return self.head(x).log_softmax(-1)  # not a view, of which fully_shard warns


@dataclass(frozen=True)
class Run:
    """What is trained, and how."""

    parallel: str = "none"  # "ddp", "fsdp", "hsdp"
    options: dict[str, Any] = field(default_factory=dict)  # of DDP or fully_shard
    config: GAPTConfig = field(default_factory=lambda: GAPTConfig(gate=RESTLESS))
    steps: int = 6
    micro_batches: int = 1
    build: Callable[[], nn.Module] = Net
    dtype: torch.dtype = torch.float64
    compiled: bool = False
    lr: float = 0.05
    base: Callable[..., Optimizer] = SGD
    validation: bool = False


@dataclass
class Seen:
    """One step."""

    metrics: StepMetrics
    gradients: dict[str, Tensor]
    local_loss: float


def data(step: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """This rank's rows of the step's batch; without ranks, all of them."""
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(BATCH, 10, 6, generator=generator, dtype=torch.float64).to(dtype)
    target = torch.randint(4, (BATCH, 10), generator=generator)
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    rows = slice(rank * BATCH // world, (rank + 1) * BATCH // world)
    return x[rows], target[rows]


def made(run: Run) -> tuple[nn.Module, nn.Module, GAPTOptimizer]:
    """The module to call, the plain module in it, and the optimizer."""
    with _SEEDED:
        torch.manual_seed(0)
        model = called = run.build().to(run.dtype)
    if run.parallel in ("fsdp", "hsdp"):
        sizes = (2, dist.get_world_size() // 2) if run.parallel == "hsdp" else (dist.get_world_size(),)
        mesh = init_device_mesh("cpu", sizes, mesh_dim_names=("copies", "shards")[-len(sizes) :])
        for block in model.blocks:
            fully_shard(block, mesh=mesh, **run.options)
        fully_shard(model, mesh=mesh, **run.options)
    hook = RepresentationHook(model, "blocks.*")
    if run.parallel == "ddp":
        called = DistributedDataParallel(model, **run.options)
    if run.compiled:
        torch._dynamo.reset()
        called = torch.compile(called, backend="aot_eager")
    return called, model, GAPTOptimizer(run.base(model.parameters(), lr=run.lr), hook, run.config)


def train(run: Run) -> list[Seen]:
    called, model, optimizer = made(run)
    return [train_step(run, step, called, model, optimizer) for step in range(run.steps)]


def train_step(run: Run, step: int, called: nn.Module, model: nn.Module, optimizer: GAPTOptimizer) -> Seen:
    local = 0.0
    for micro in range(run.micro_batches):
        last = micro == run.micro_batches - 1
        waits: AbstractContextManager[Any] = called.no_sync() if run.parallel == "ddp" and not last else nullcontext()
        with waits:
            x, target = data(step * run.micro_batches + micro, run.dtype)
            loss = F.cross_entropy(called(x).flatten(0, 1).double(), target.flatten())
            local += float(loss.detach()) / run.micro_batches
            optimizer.backward(loss, scale=1 / run.micro_batches)
    gradients = {name: full(p.grad) for name, p in model.named_parameters() if p.grad is not None}
    if run.validation:
        optimizer.record_validation(loss.detach() + step)
    optimizer.step()
    optimizer.zero_grad()
    assert optimizer.metrics is not None
    return Seen(optimizer.metrics, gradients, local)


def full(tensor: Tensor) -> Tensor:
    whole = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
    return whole.detach().clone()


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: full(parameter) for name, parameter in model.named_parameters()}
