"""A small transformer-like model, whole or over ranks that share its loss, and what its training shows."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_module
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    PrepareModuleInput,
    RowwiseParallel,
    SequenceParallel,
    loss_parallel,
    parallelize_module,
)
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from gapt_optim import EntropyConfig, GAPTConfig, GAPTOptimizer, GateConfig, RepresentationHook
from tests.distributed.runs import Seen, full

RESTLESS = GateConfig(patience_memorization=2, patience_compression=2, min_improvement=0.5, spike_tolerance=10.0)
BATCH, LENGTH, WIDTH, HIDDEN, WORDS = 4, 16, 8, 16, 12


class Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(WIDTH, HIDDEN)
        self.down = nn.Linear(HIDDEN, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(torch.tanh(self.up(x)))


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.mlp = Mlp()

    def forward(self, x: Tensor) -> Tensor:
        return x + self.mlp(self.norm(x))


class Tiny(nn.Module):
    def __init__(self, depth: int = 2, *, recompute: bool = False) -> None:
        super().__init__()
        self.embed = nn.Embedding(WORDS, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(depth))
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, WORDS)
        self.recompute = recompute

    def forward(self, ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        x = self.embed(ids)
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False) if self.recompute else block(x)
        return 1.0 * self.head(self.norm(x))  # not a view, of which fully_shard warns


def sequence_parallel(model: Tiny, mesh: Any, *, axis: int = 1, head: Any = None, local: bool = True) -> None:
    """As torchtitan's plan: blocks return plain parts of the sequence; with ``local=False`` DTensors of them."""
    part = Shard(axis)
    plan: dict[str, Any] = {
        "embed": RowwiseParallel(input_layouts=Replicate(), output_layouts=part, use_local_output=local),
        "norm": SequenceParallel(sequence_dim=axis),
        "head": head or ColwiseParallel(input_layouts=part, output_layouts=Replicate()),
    }
    for i in range(len(model.blocks)):
        plan |= {
            f"blocks.{i}.norm": SequenceParallel(sequence_dim=axis),
            f"blocks.{i}.mlp": PrepareModuleInput(input_layouts=(part,), desired_input_layouts=(Replicate(),)),
            f"blocks.{i}.mlp.up": ColwiseParallel(use_local_output=local),
            f"blocks.{i}.mlp.down": RowwiseParallel(output_layouts=part, use_local_output=local),
        }
    parallelize_module(model, mesh, plan)


def by_loss_parallel(model: Tiny, mesh: Any) -> None:
    head = ColwiseParallel(input_layouts=Shard(1), output_layouts=Shard(-1), use_local_output=False)
    sequence_parallel(model, mesh, head=head)


def along_batch(model: Tiny, mesh: Any) -> None:
    sequence_parallel(model, mesh, axis=0)


def by_dtensors(model: Tiny, mesh: Any, axis: int = 1) -> None:
    sequence_parallel(model, mesh, axis=axis, local=False)


def replicated(model: Tiny, mesh: Any) -> None:
    """Tensor parallel inside of blocks, whose outputs are DTensors that each rank has all of."""
    whole = {"output_layouts": Replicate(), "use_local_output": False}
    plan: dict[str, Any] = {"embed": RowwiseParallel(input_layouts=Replicate(), **whole)}
    for i in range(len(model.blocks)):
        distribute_module(model.blocks[i].norm, mesh)
        plan[f"blocks.{i}.mlp.up"] = ColwiseParallel(use_local_output=False)
        plan[f"blocks.{i}.mlp.down"] = RowwiseParallel(**whole)
    distribute_module(model.norm, mesh)
    plan["head"] = ColwiseParallel(output_layouts=Replicate())
    parallelize_module(model, mesh, plan)


@dataclass(frozen=True)
class Split:
    """How a model is spread over ranks, and what is watched."""

    way: Callable[..., None] | None = None
    layers: Any = "blocks.*"
    placement: Any = None
    """Of plain parts, over the mesh."""
    entropy: EntropyConfig = field(default_factory=lambda: EntropyConfig(window=4))
    gate: GateConfig = RESTLESS
    shards: int = 1
    """Ranks of FSDP2 beside those that share a loss."""
    steps: int = 5
    micro_batches: int = 1
    masked: bool = False
    recompute: bool = False
    first: bool = False
    """The sequence is the first axis."""
    dtype: torch.dtype = torch.float64


def batch_of(step: int, masked: bool) -> tuple[Tensor, Tensor | None]:
    generator = torch.Generator().manual_seed(step)
    ids = torch.randint(WORDS, (BATCH, LENGTH + 1), generator=generator)
    if not masked:
        return ids, None
    starts = torch.randint(LENGTH // 2, (BATCH, 1), generator=generator)
    return ids, (torch.arange(LENGTH) >= starts).long()  # padded on the left


def made(run: Split) -> tuple[nn.Module, GAPTOptimizer, Any]:
    torch.manual_seed(0)
    model = Tiny(recompute=run.recompute).to(run.dtype)
    placements, data_ranks = None, None
    if run.way is not None:
        meshes = init_device_mesh(
            "cpu", (run.shards, dist.get_world_size() // run.shards), mesh_dim_names=("data", "tensor")
        )
        run.way(model, meshes["tensor"])
        if run.placement is not None:
            placements = (meshes["tensor"], run.placement)
        if run.shards > 1:
            data_ranks = meshes["data"]
            for block in model.blocks:
                fully_shard(block, mesh=data_ranks)
            fully_shard(model, mesh=data_ranks)
    mask = (lambda call: call["attention_mask"]) if run.masked else None
    layout = "length batch features" if run.first else None
    hook = RepresentationHook(model, run.layers, mask=mask, layout=layout, placements=placements)
    config = GAPTConfig(gate=run.gate, entropy=run.entropy)
    base = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, foreach=False)
    return model, GAPTOptimizer(base, hook, config), data_ranks


def train(run: Split) -> list[Seen]:
    """Steps of one process, or of this rank."""
    model, optimizer, data_ranks = made(run)
    return [train_step(run, step, model, optimizer, data_ranks) for step in range(run.steps)]


def train_step(run: Split, step: int, model: nn.Module, optimizer: GAPTOptimizer, data_ranks: Any) -> Seen:
    rank, world = (0, 1) if data_ranks is None else (data_ranks.get_local_rank(), data_ranks.size())
    rows = slice(rank * BATCH // world, (rank + 1) * BATCH // world)
    for micro in range(run.micro_batches):
        ids, mask = batch_of(step * run.micro_batches + micro, run.masked)
        ids, mask = ids[rows], None if mask is None else mask[rows]
        ids, target = ids[:, :-1], ids[:, 1:]
        if run.first:
            ids, target = ids.T, target.T
        with loss_parallel():
            scores = model(ids) if mask is None else model(ids, attention_mask=mask)
            loss = F.cross_entropy(scores.flatten(0, 1), target.flatten())
            assert isinstance(loss, DTensor) == (run.way is by_loss_parallel)
            optimizer.backward(loss, scale=1 / run.micro_batches)
    gradients = {name: full(p.grad) for name, p in model.named_parameters() if p.grad is not None}
    optimizer.step()
    optimizer.zero_grad()
    assert optimizer.metrics is not None
    return Seen(optimizer.metrics, gradients, 0.0)
