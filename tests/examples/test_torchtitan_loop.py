"""The loop in three dimensions against one process: gradients, entropies, phases, and going on from a checkpoint."""

from __future__ import annotations

import importlib.util
import tempfile
import warnings
from contextlib import closing
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh

from gapt_optim import GAPTConfig, GAPTOptimizer, RepresentationHook
from tests.distributed.loop import Loop, resume, run_and_resume
from tests.distributed.ranks import Ranks
from tests.distributed.runs import RESTLESS, Seen, full
from tests.distributed.table import HALF, STEPS, Engine, assert_right, figures
from tests.examples.conftest import EXAMPLES, shards_on_a_cpu
from tests.training import distance

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


class Whole(Loop):
    """The whole model and the batches of all ranks, in as many micro-batches."""

    def __init__(self, parts: int) -> None:
        self.loop, self.parts = script(), parts
        torch.manual_seed(0)
        self.model = self.loop.Llama()
        base = torch.optim.AdamW(self.model.parameters(), lr=3e-3, foreach=False)
        self.optimizer = GAPTOptimizer(base, RepresentationHook(self.model, "layers.*"), CONFIG)

    def step(self, step: int) -> Seen:
        for rows in cut(self.loop, step, self.parts):
            loss = self.loop.cross_entropy(self.model(rows[:, :-1]), rows[:, 1:])
            self.optimizer.backward(loss, scale=1 / (self.parts * self.loop.MICRO_BATCHES))
        gradients = {name: p.grad.clone() for name, p in self.model.named_parameters()}
        self.optimizer.step()
        self.optimizer.zero_grad()
        return Seen(self.optimizer.metrics, gradients, 0.0)


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


ENGINES = {"FSDP2 x TP x 1F1B": Engine(8, partial(Rank, (2, 2, 2)), partial(Whole, 2))}


def test_two_by_two_by_two_equal_one_process() -> None:
    """And a checkpoint goes on over four ranks, without tensor parallelism."""
    (name,) = ENGINES
    torch.manual_seed(0)
    whole = Whole(2)
    expected = [whole.step(step) for step in range(STEPS)]
    with tempfile.TemporaryDirectory() as folder:
        with closing(Ranks(8)) as eight:
            found = eight(run_and_resume, ENGINES[name].make, folder, STEPS, HALF, timeout=500)
        assert_right(figures(found, expected), name)
        with closing(Ranks(4)) as four:
            resumed = four(resume, partial(Rank, (2, 2, 1)), folder, STEPS, HALF, timeout=300)
        for of_rank in resumed:
            for here, there in zip(of_rank, expected[HALF:], strict=True):
                assert distance(here.gradients, {n: there.gradients[n] for n in here.gradients}) < 1e-5
                assert here.metrics.phase == there.metrics.phase
                assert here.metrics.loss == pytest.approx(there.metrics.loss, rel=1e-5)
                assert here.metrics.layer_entropy == pytest.approx(there.metrics.layer_entropy, rel=1e-5)
