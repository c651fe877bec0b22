"""FSDP2: every rank holds a part of weights and optimizer state, and all are in the same phase.

torchrun --nproc-per-node 2 examples/by_feature/fsdp2.py
"""

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard

from gapt_optim import GAPTOptimizer, RepresentationHook


def main() -> None:
    cuda = torch.cuda.is_available()
    dist.init_process_group("nccl" if cuda else "gloo")
    rank = dist.get_rank()
    device = torch.device("cuda", rank % torch.cuda.device_count()) if cuda else torch.device("cpu")
    torch.manual_seed(0)  # the same weights on all ranks
    teacher = nn.Linear(16, 5).to(device)
    blocks = [nn.Sequential(nn.Linear(width, 64), nn.ReLU()) for width in (16, 64)]
    model = nn.Sequential(*blocks, nn.Linear(64, 5)).to(device)
    for block in (*model, model):
        fully_shard(block)
    hook = RepresentationHook(model, ["0", "1"])  # new: place the hook after fully_shard
    optimizer = GAPTOptimizer(torch.optim.AdamW(model.parameters(), lr=3e-3), hook)

    torch.manual_seed(1 + rank)  # each rank its own part of the batch
    for step in range(1, 41):
        x = torch.randn(32, 16, device=device)
        loss = nn.functional.cross_entropy(model(x), teacher(x).argmax(-1))
        optimizer.backward(loss)  # new: was loss.backward()
        optimizer.step()  # new: the gate judges the mean over ranks, by one small all-reduce
        optimizer.zero_grad()
        if step % 10 == 0 and rank == 0 and optimizer.metrics is not None:
            metrics = optimizer.metrics
            print(f"step {step}: loss {metrics.loss:.3f}, entropy {metrics.entropy:.3f}, {optimizer.phase.value}")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
