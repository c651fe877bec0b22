"""A tiny Llama in three dimensions, put together as in torchtitan: FSDP2, tensor and sequence parallel, pipeline.

torchrun --nproc-per-node 8 examples/by_feature/torchtitan_loop.py
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.pipelining import PipelineStage, Schedule1F1B
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor import parallel as tp
from torch.nn import functional as F

from gapt_optim import GAPTOptimizer, RepresentationHook
from gapt_optim.integrations.pipelining import pipelined

BATCH, MICRO_BATCHES, LENGTH, WORDS, WIDTH, HEAD, DEPTH = 8, 4, 32, 64, 32, 8, 4


def rotated(x: Tensor) -> Tensor:
    """Queries or keys (batch, heads, length, features), each pair of features turned by its position."""
    angle = torch.arange(x.shape[2], device=x.device)[:, None] / 100 ** torch.linspace(0, 1, HEAD // 2, device=x.device)
    a, b = x.chunk(2, -1)
    return torch.cat((a * angle.cos() - b * angle.sin(), a * angle.sin() + b * angle.cos()), -1)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.RMSNorm(WIDTH), nn.RMSNorm(WIDTH)
        self.wq, self.wk, self.wv, self.wo = (nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(4))
        self.w1, self.w3 = (nn.Linear(WIDTH, 2 * WIDTH, bias=False) for _ in range(2))
        self.w2 = nn.Linear(2 * WIDTH, WIDTH, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm1(x)
        q, k, v = (linear(h).unflatten(-1, (-1, HEAD)).transpose(1, 2) for linear in (self.wq, self.wk, self.wv))
        mixed = F.scaled_dot_product_attention(rotated(q), rotated(k), v, is_causal=True)
        x = x + self.wo(mixed.transpose(1, 2).flatten(2))
        h = self.norm2(x)
        found: Tensor = x + self.w2(F.silu(self.w1(h)) * self.w3(h))
        return found


class Llama(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed: nn.Module = nn.Embedding(WORDS, WIDTH)
        self.layers = nn.ModuleDict({str(i): Block() for i in range(DEPTH)})
        self.norm: nn.Module = nn.RMSNorm(WIDTH)
        self.head: nn.Module = nn.Linear(WIDTH, WORDS, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        for layer in self.layers.values():
            x = layer(x)
        found: Tensor = self.head(self.norm(x))
        return found


SEQUENCE = Shard(1)  # what is between the parallel parts of a block, each rank has for its part of the sequence
INTO, OUT = tp.ColwiseParallel(input_layouts=SEQUENCE), tp.RowwiseParallel(output_layouts=SEQUENCE)
OF_BLOCK: Any = dict.fromkeys(("wq", "wk", "wv", "w1", "w3"), INTO) | dict.fromkeys(("wo", "w2"), OUT)
OF_BLOCK |= dict.fromkeys(("norm1", "norm2"), tp.SequenceParallel())
EMBED = tp.RowwiseParallel(input_layouts=Replicate(), output_layouts=SEQUENCE)
HEAD_PLAN = tp.ColwiseParallel(input_layouts=SEQUENCE, output_layouts=Shard(-1), use_local_output=False)


def parallelized(model: Llama, mesh: DeviceMesh) -> Llama:
    """This rank's part of the model: the layers of its stage, of these its columns, of these its shard."""
    stages, stage = mesh["pp"].size(), mesh["pp"].get_local_rank()
    for i in range(DEPTH):
        if i * stages // DEPTH != stage:
            del model.layers[str(i)]
    if stage == 0:
        tp.parallelize_module(model, mesh["tp"], {"embed": EMBED})
    else:
        model.embed = nn.Identity()
    if stage == stages - 1:
        tp.parallelize_module(model, mesh["tp"], {"norm": tp.SequenceParallel(), "head": HEAD_PLAN})
    else:
        model.norm, model.head = nn.Identity(), nn.Identity()
    for layer in model.layers.values():
        tp.parallelize_module(layer, mesh["tp"], OF_BLOCK)
    for part in (*model.layers.values(), model):
        fully_shard(part, mesh=mesh["dp"], reshard_after_forward=False)
    for part in model.modules():
        if isinstance(part, FSDPModule):
            part.set_gradient_divide_factor(1.0)  # gradients are summed: each loss is a share of the mean
            part.set_force_sum_reduction_for_comms(True)  # gloo knows no other
    return model


def cross_entropy(scores: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(scores.flatten(0, 1), target.flatten())


def prepared(model: Llama, mesh: DeviceMesh, device: torch.device) -> tuple[Schedule1F1B, GAPTOptimizer]:
    """Schedule and optimizer of a part of the model."""
    stage = PipelineStage(model, mesh["pp"].get_local_rank(), mesh["pp"].size(), device, group=mesh.get_group("pp"))
    # new: blocks return plain tensors that hold a part of the sequence
    hook = RepresentationHook(model, "layers.*", placements=(mesh["tp"], SEQUENCE))
    optimizer = GAPTOptimizer(torch.optim.AdamW(model.parameters(), lr=3e-3, foreach=False), hook)
    share = 1 / (MICRO_BATCHES * mesh["dp"].size())  # tokens of a micro-batch / all tokens of a step
    loss_fn = pipelined(optimizer, stage, cross_entropy, scale=share)  # new: was the cross-entropy times the share
    return Schedule1F1B(stage, MICRO_BATCHES, loss_fn=loss_fn, scale_grads=False), optimizer


def train_step(schedule: Schedule1F1B, tokens: Tensor, stage: int, stages: int) -> None:
    """Forward and backward passes of all micro-batches. The first stage takes tokens, the last one those to predict."""
    with tp.loss_parallel():
        if stage == 0:
            schedule.step(tokens[:, :-1])
        elif stage == stages - 1:
            schedule.step(target=tokens[:, 1:].contiguous())
        else:
            schedule.step()


def main() -> None:
    cuda = torch.cuda.is_available()
    dist.init_process_group("nccl" if cuda else "gloo")
    device = torch.device("cuda", dist.get_rank() % torch.cuda.device_count()) if cuda else torch.device("cpu")
    mesh = init_device_mesh(device.type, (2, dist.get_world_size() // 4, 2), mesh_dim_names=("pp", "dp", "tp"))
    torch.manual_seed(0)  # the same weights on all ranks
    schedule, optimizer = prepared(parallelized(Llama().to(device), mesh), mesh, device)

    torch.manual_seed(1 + mesh["dp"].get_local_rank())  # batches of its own for each part of the data
    for step in range(1, 41):
        start = torch.randint(WORDS, (BATCH, 1), device=device)
        tokens = (start + 3 * torch.arange(LENGTH + 1, device=device)) % WORDS
        train_step(schedule, tokens, mesh["pp"].get_local_rank(), mesh["pp"].size())
        optimizer.step()  # new: the gate judges sums over all ranks
        optimizer.zero_grad()
        if step % 10 == 0 and dist.get_rank() == 0 and optimizer.metrics is not None:
            metrics = optimizer.metrics
            print(f"step {step}: loss {metrics.loss:.3f}, entropy {metrics.entropy:.3f}, {metrics.phase}")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
