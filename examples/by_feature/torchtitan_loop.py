"""FSDP2, tensor and sequence parallelism and a loss over all tokens, as torchtitan puts them together.

torchrun --nproc-per-node 4 examples/by_feature/torchtitan_loop.py
"""

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor import parallel as tp
from torch.distributed.tensor.parallel import ParallelStyle
from torch.nn import functional as F

from gapt_optim import GAPTOptimizer, RepresentationHook

BATCH, LENGTH, WORDS, WIDTH, HEAD = 8, 32, 64, 32, 8


class Block(nn.Module):
    """Attention and MLP, as in a Llama but for rotary positions; ``PLAN`` cuts both into heads and columns."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.RMSNorm(WIDTH), nn.RMSNorm(WIDTH)
        self.qkv, self.out = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(3)), nn.Linear(WIDTH, WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm1(x)
        q, k, v = (linear(h).unflatten(-1, (-1, HEAD)).transpose(1, 2) for linear in self.qkv)
        x = x + self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))
        found: Tensor = x + self.down(F.silu(self.up(self.norm2(x))))
        return found


SEQUENCE = Shard(1)  # what is between the parallel parts of a block, each rank has for its part of the sequence
INTO, OUT = tp.ColwiseParallel(input_layouts=SEQUENCE), tp.RowwiseParallel(output_layouts=SEQUENCE)
NORM = tp.SequenceParallel()
PLAN: dict[str, ParallelStyle] = {f"*.{name}": INTO for name in ("qkv.0", "qkv.1", "qkv.2", "up")}
PLAN |= {"*.out": OUT, "*.down": OUT, "*.norm1": NORM, "*.norm2": NORM}
PLAN |= {
    "embed": tp.RowwiseParallel(input_layouts=Replicate(), output_layouts=SEQUENCE),
    "head": tp.ColwiseParallel(input_layouts=SEQUENCE, output_layouts=Shard(-1), use_local_output=False),
}


def main() -> None:
    cuda = torch.cuda.is_available()
    dist.init_process_group("nccl" if cuda else "gloo")
    device = torch.device("cuda", dist.get_rank() % torch.cuda.device_count()) if cuda else torch.device("cpu")
    torch.manual_seed(0)  # the same weights on all ranks
    parts: dict[str, nn.Module] = {"embed": nn.Embedding(WORDS, WIDTH)} | {f"block{i}": Block() for i in range(3)}
    parts["head"] = nn.Linear(WIDTH, WORDS)
    model = nn.Sequential()
    for name, part in parts.items():
        model.add_module(name, part.to(device))
    mesh = init_device_mesh(device.type, (dist.get_world_size() // 2, 2), mesh_dim_names=("dp", "tp"))
    tp.parallelize_module(model, mesh["tp"], PLAN)
    for part in (*list(model)[1:-1], model):
        fully_shard(part, mesh=mesh["dp"])
    for part in model.modules():
        if isinstance(part, FSDPModule):
            part.set_gradient_divide_factor(1.0)  # gradients are summed: the loss is divided by all tokens
            part.set_force_sum_reduction_for_comms(True)  # gloo knows no other
    # new: blocks return plain tensors that hold a part of the sequence
    hook = RepresentationHook(model, "block*", placements=(mesh["tp"], SEQUENCE))
    optimizer = GAPTOptimizer(torch.optim.AdamW(model.parameters(), lr=3e-3, foreach=False), hook)

    torch.manual_seed(1 + mesh["dp"].get_local_rank())  # batches of its own for each part of the data
    for step in range(1, 41):
        start = torch.randint(WORDS, (BATCH, 1), device=device)
        tokens = (start + 3 * torch.arange(LENGTH + 1, device=device)) % WORDS
        with tp.loss_parallel():
            scores, target = model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten()
            share = 1 / mesh["dp"].size()  # own tokens / all tokens
            loss = F.cross_entropy(scores, target, reduction="sum") / (len(target) / share)
            optimizer.backward(loss, scaled_by=share)  # new: was loss.backward()
        optimizer.step()  # new: the gate judges sums over all ranks
        optimizer.zero_grad()
        if step % 10 == 0 and dist.get_rank() == 0 and optimizer.metrics is not None:
            metrics = optimizer.metrics
            print(f"step {step}: loss {metrics.loss:.3f}, entropy {metrics.entropy:.3f}, {metrics.phase}")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
