"""Layers of Megatron-Core with sequence parallelism, whose tensors are (length, batch, features), on CPU processes."""

from __future__ import annotations

import warnings
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard
from torch.nn import functional as F

from gapt_optim import EntropyConfig, GAPTConfig, GAPTOptimizer, RepresentationHook
from tests.distributed import table
from tests.distributed.loop import Loop
from tests.distributed.ranks import Ranks
from tests.distributed.runs import RESTLESS, Seen

pytest.importorskip("megatron.core", reason="Megatron-Core is not installed")
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]

WIDTH, HIDDEN, WORDS, BATCH, LENGTH = 8, 16, 64, 4, 16


class Pair(nn.Module):
    """Column- and row-parallel layers of Megatron, or the same as plain ones."""

    def __init__(self, up: nn.Module, down: nn.Module) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(WIDTH), up, down

    def forward(self, x: Tensor) -> Tensor:
        h = self.up(self.norm(x))
        h = self.down(torch.tanh(h[0] if isinstance(h, tuple) else h))
        return x + (h[0] if isinstance(h, tuple) else h)


class Model(nn.Module):
    def __init__(self, blocks: list[Pair], enter: Any, leave: Any) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(WORDS, WIDTH), nn.Linear(WIDTH, WORDS)
        self.blocks = nn.ModuleList(blocks)
        self.enter, self.leave = enter, leave

    def forward(self, ids: Tensor) -> Tensor:
        x = self.enter(self.embed(ids))
        for block in self.blocks:
            x = block(x)
        return self.head(self.leave(x))


def parallel_blocks() -> tuple[list[Pair], Any, Any]:
    warnings.simplefilter("ignore")
    torch.cuda.current_device = lambda: "cpu"  # where its buffers are
    from megatron.core import parallel_state, tensor_parallel
    from megatron.core.model_parallel_config import ModelParallelConfig

    if not parallel_state.model_parallel_is_initialized():
        parallel_state.initialize_model_parallel(tensor_model_parallel_size=2, create_gloo_process_groups=False)
    config = ModelParallelConfig(
        tensor_model_parallel_size=2, sequence_parallel=True, use_cpu_initialization=True, params_dtype=torch.float32
    )
    options: Any = {"config": config, "init_method": nn.init.zeros_, "bias": False, "skip_bias_add": False}
    blocks = [
        Pair(
            tensor_parallel.ColumnParallelLinear(WIDTH, HIDDEN, gather_output=False, **options),
            tensor_parallel.RowParallelLinear(HIDDEN, WIDTH, input_is_parallel=True, **options),
        )
        for _ in range(2)
    ]
    leave = partial(tensor_parallel.gather_from_sequence_parallel_region, tensor_parallel_output_grad=False)
    return blocks, tensor_parallel.scatter_to_sequence_parallel_region, leave


def own(name: str, whole: Tensor) -> Tensor:
    """This rank's part of a weight: rows of the first layer, columns of the second."""
    if not dist.is_initialized() or not name.endswith(("up.weight", "down.weight")):
        return whole
    return whole.chunk(2, 0 if "up" in name else 1)[dist.get_rank()]


class Megatron(Loop):
    def __init__(self, layers: str, placement: Shard | None) -> None:
        placements = None
        if placement is None:
            plain = [Pair(nn.Linear(WIDTH, HIDDEN, False), nn.Linear(HIDDEN, WIDTH, False)) for _ in range(2)]
            self.model: nn.Module = Model(plain, nn.Identity(), nn.Identity())
        else:
            self.model = Model(*parallel_blocks())
            placements = (init_device_mesh("cpu", (2,)), placement)
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for name, p in self.model.named_parameters():
                shape = list(p.shape)
                if own(name, torch.empty(2, 2)).numel() < 4:
                    shape[0 if "up" in name else 1] *= 2
                p.copy_(own(name, 0.4 * torch.randn(shape, generator=generator)))
        hook = RepresentationHook(self.model, layers, layout="length batch features", placements=placements)
        config = GAPTConfig(gate=RESTLESS, entropy=EntropyConfig(window=4))
        base = torch.optim.SGD(self.model.parameters(), lr=0.02)
        self.optimizer = GAPTOptimizer(base, hook, config)

    def step(self, step: int) -> Seen:
        ids = torch.randint(WORDS, (LENGTH + 1, BATCH), generator=torch.Generator().manual_seed(step))
        loss = F.cross_entropy(self.model(ids[:-1]).flatten(0, 1), ids[1:].flatten())
        self.optimizer.backward(loss)
        gradients = {}
        for name, p in self.model.named_parameters():
            whole = p.grad
            if dist.is_initialized() and "norm" in name:  # as its finalize_model_grads does
                dist.all_reduce(p.grad)
            if dist.is_initialized() and own(name, torch.empty(2, 2)).numel() < 4:
                parts = [torch.empty_like(p.grad) for _ in range(2)]
                dist.all_gather(parts, p.grad.contiguous())
                whole = torch.cat(parts, 0 if "up" in name else 1)
            gradients[name] = whole.clone()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return Seen(self.optimizer.metrics, gradients, 0.0)

    def save(self, folder: str) -> None:
        state = {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()}
        torch.save(state, f"{folder}/{dist.get_rank()}.pt")

    def load(self, folder: str) -> None:
        state = torch.load(f"{folder}/{dist.get_rank()}.pt", weights_only=False)
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])


ENGINES = {
    f"Megatron-Core, {what}": table.Engine(2, partial(Megatron, layers, placement), partial(Megatron, layers, None))
    for what, layers, placement in (
        ("sequence parallel", "blocks.*", Shard(0)),
        ("column-parallel", "blocks.*.up", Shard(-1)),
    )
}


@pytest.mark.parametrize("name", ENGINES)
def test_an_engine_is_one_process(ranks: Ranks, name: str) -> None:
    table.assert_right(table.measure(ranks, ENGINES[name]), name)
