"""The loop in three dimensions against one process: gradients, entropies, phases, and going on from a checkpoint."""

from __future__ import annotations

import importlib.util
import tempfile
import warnings
from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh

from gapt_optim import GAPTConfig, GAPTOptimizer, RepresentationHook
from tests.distributed.loop import Loop, run_and_resume
from tests.distributed.ranks import Ranks
from tests.distributed.runs import RESTLESS, Seen, full
from tests.distributed.table import HALF, STEPS, figures
from tests.examples.conftest import EXAMPLES, shards_on_a_cpu

pytestmark = [pytest.mark.slow, shards_on_a_cpu]
CONFIG = GAPTConfig(gate=RESTLESS)


def script() -> Any:
    spec = importlib.util.spec_from_file_location("torchtitan_loop", EXAMPLES / "by_feature" / "torchtitan_loop.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.GAPTOptimizer = lambda base, hook: GAPTOptimizer(base, hook, CONFIG)  # a gate that switches soon
    return module


def tokens(loop: Any, step: int, part: int, parts: int) -> Tensor:
    generator = torch.Generator().manual_seed(step)
    ids = torch.randint(loop.WORDS, (parts * loop.BATCH, loop.LENGTH + 1), generator=generator)
    return ids[part * loop.BATCH : (part + 1) * loop.BATCH]


def train_one(parts: int) -> list[Seen]:
    """The whole model and the batches of all ranks, in as many micro-batches."""
    loop = script()
    torch.manual_seed(0)
    model = loop.Llama()
    optimizer = GAPTOptimizer(
        torch.optim.AdamW(model.parameters(), lr=3e-3, foreach=False), RepresentationHook(model, "layers.*"), CONFIG
    )
    seen = []
    for step in range(STEPS):
        for rows in cut(loop, step, parts):
            loss = loop.cross_entropy(model(rows[:, :-1]), rows[:, 1:])
            optimizer.backward(loss, scale=1 / (parts * loop.MICRO_BATCHES))
        gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
        optimizer.step()
        optimizer.zero_grad()
        seen.append(Seen(optimizer.metrics, gradients, 0.0))
    return seen


def cut(loop: Any, step: int, parts: int) -> list[Tensor]:
    own = [tokens(loop, step, part, parts) for part in range(parts)]
    return [rows for batch in own for rows in batch.chunk(loop.MICRO_BATCHES)]


class Rank(Loop):
    """What one rank has."""

    flat = True

    def __init__(self, sizes: tuple[int, int, int]) -> None:
        warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view", UserWarning)  # of the scores
        self.loop = script()
        self.mesh = init_device_mesh("cpu", sizes, mesh_dim_names=("pp", "dp", "tp"))
        torch.manual_seed(0)
        self.model = self.loop.parallelized(self.loop.Llama(), self.mesh)
        self.schedule, self.optimizer = self.loop.prepared(self.model, self.mesh, torch.device("cpu"))

    def step(self, step: int) -> Seen:
        pp, dp = self.mesh["pp"], self.mesh["dp"]
        own = tokens(self.loop, step, dp.get_local_rank(), dp.size())
        self.loop.train_step(self.schedule, own, pp.get_local_rank(), pp.size())
        gradients = {name: full(p.grad) for name, p in self.model.named_parameters()}
        self.optimizer.step()
        self.optimizer.zero_grad()
        return Seen(self.optimizer.metrics, gradients, 0.0)


@pytest.fixture(scope="module")
def eight() -> Iterator[Ranks]:
    pool = Ranks(8)
    yield pool
    pool.close()


def test_two_by_two_by_two_equal_one_process(eight: Ranks) -> None:
    expected = train_one(2)
    with tempfile.TemporaryDirectory() as folder:
        found = eight(run_and_resume, partial(Rank, (2, 2, 2)), folder, STEPS, HALF, timeout=500)
    here = figures(found, expected)
    assert here.gradients < 1e-5
    assert here.entropies < 1e-5
    assert here.phases
    assert here.resumed
