"""Stages of a pipeline do what one process does, and all of them are in the phase that its loss names."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.pipelining import PipelineStage, schedules
from torch.nn import functional as F

from gapt_optim import AlignmentConfig, GAPTConfig, GAPTOptimizer, RepresentationHook
from gapt_optim.integrations.pipelining import pipelined
from tests.distributed.loop import Loop
from tests.distributed.parallel import BATCH, RESTLESS, Block, batch_of
from tests.distributed.ranks import Ranks
from tests.distributed.runs import Seen
from tests.distributed.test_training_over_ranks import assert_equal_metrics
from tests.training import distance

MICRO = 4
SCHEDULES = {
    "GPipe": schedules.ScheduleGPipe,
    "1F1B": schedules.Schedule1F1B,
    "interleaved": schedules.ScheduleInterleaved1F1B,
    "zero bubble": schedules.ScheduleInterleavedZeroBubble,
    "ZBV": schedules.ScheduleZBVZeroBubble,
}
if hasattr(schedules, "ScheduleDualPipeV"):
    SCHEDULES["DualPipeV"] = schedules.ScheduleDualPipeV
SINGLE = ("GPipe", "1F1B")
"""With one stage on a rank."""
V = ("ZBV", "DualPipeV")
"""With the first and the last stage on one rank."""


class Layers(nn.Module):
    """Blocks by their numbers in the whole model, with the ends where they belong."""

    def __init__(self, numbers: range, of: int = 4) -> None:
        super().__init__()
        torch.manual_seed(0)
        whole = nn.ModuleDict({str(i): Block() for i in range(of)})
        embed, head = nn.Embedding(12, 8), nn.Linear(8, 12)
        self.embed = embed if numbers.start == 0 else nn.Identity()
        self.blocks = nn.ModuleDict({str(i): whole[str(i)] for i in numbers})
        self.head = head if numbers.stop == of else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        for block in self.blocks.values():
            x = block(x)
        return self.head(x)


@dataclass(frozen=True)
class Piped:
    schedule: str = ""
    scale: float = 1.0
    config: GAPTConfig = field(default_factory=lambda: GAPTConfig(gate=RESTLESS))
    steps: int = 20
    data: int = 1
    """Pipelines beside each other, each with a share of the batch."""
    connected: bool = True
    dtype: torch.dtype = torch.float64


def cross_entropy(scores: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(scores.flatten(0, 1), target.flatten())


def gradients(model: nn.Module, scale: float, mesh: Any = None) -> dict[str, Tensor]:
    for p in model.parameters():
        if mesh is not None:
            dist.all_reduce(p.grad, group=mesh.get_group())
            p.grad /= mesh.size()
        p.grad /= scale
    return {name: p.grad.clone() for name, p in model.named_parameters()}


def rows_of(step: int, part: int, parts: int) -> Tensor:
    ids = torch.cat([batch_of(MICRO * step + i, masked=False)[0] for i in range(MICRO)])
    return ids[part * len(ids) // parts : (part + 1) * len(ids) // parts]


class Whole(Loop):
    """The model on one process, and the micro-batches of all pipelines."""

    def __init__(self, run: Piped) -> None:
        self.run = run
        self.model = Layers(range(4)).to(run.dtype)
        hook = RepresentationHook(self.model, "blocks.*")
        self.optimizer = GAPTOptimizer(torch.optim.SGD(self.model.parameters(), 0.05), hook, run.config)

    def step(self, step: int) -> Seen:
        for rows in rows_of(step, 0, 1).split(BATCH):
            loss = cross_entropy(self.model(rows[:, :-1]), rows[:, 1:])
            self.optimizer.backward(loss, scale=self.run.scale / MICRO)
        own = gradients(self.model, self.run.scale)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return Seen(self.optimizer.metrics, own, 0.0)


class Staged(Loop):
    """The stages that this rank has."""

    flat = True

    def __init__(self, run: Piped) -> None:
        self.run = run
        sizes = run.data, dist.get_world_size() // run.data
        meshes = init_device_mesh("cpu", sizes, mesh_dim_names=("data", "pipe"))
        pipe, self.data = meshes["pipe"], meshes["data"]
        several = run.schedule not in SINGLE
        count = pipe.size() * (2 if several else 1)
        self.own = list(range(pipe.get_local_rank(), count, pipe.size()))
        if run.schedule in V:
            self.own = [pipe.get_local_rank(), count - 1 - pipe.get_local_rank()]
        parts = [Layers(range(i * 4 // count, (i + 1) * 4 // count)).to(run.dtype) for i in self.own]
        self.stages = [
            PipelineStage(part, i, count, torch.device("cpu"), group=pipe.get_group())
            for part, i in zip(parts, self.own, strict=True)
        ]
        by_number = {str(i): part for part, i in zip(parts, self.own, strict=True)}
        self.model = nn.ModuleDict(by_number) if several else parts[0]
        hook = RepresentationHook(self.model, "*.blocks.*" if several else "blocks.*")
        self.optimizer = GAPTOptimizer(torch.optim.SGD(self.model.parameters(), 0.05), hook, run.config)
        stages: Any = self.stages if several else self.stages[0]
        loss_fn: Any = self.alone
        if run.connected:
            loss_fn = pipelined(self.optimizer, stages, cross_entropy, scale=lambda: run.scale)
        self.schedule = SCHEDULES[run.schedule](stages, MICRO, loss_fn=loss_fn)

    def alone(self, scores: Tensor, target: Tensor) -> Tensor:
        return self.optimizer.objective(cross_entropy(scores, target))

    def step(self, step: int) -> Seen:
        rows = rows_of(step, self.data.get_local_rank(), self.data.size())
        arguments = (rows[:, :-1],) if self.own[0] == 0 else ()
        targets = {"target": rows[:, 1:]} if any(stage.is_last for stage in self.stages) else {}
        self.schedule.step(*arguments, **targets)
        found = gradients(self.model, self.run.scale, self.data)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return Seen(self.optimizer.metrics, found, 0.0)


def train_whole(run: Piped) -> list[Seen]:
    loop = Whole(run)
    return [loop.step(step) for step in range(run.steps)]


def train_stages(run: Piped) -> list[Seen]:
    loop = Staged(run)
    return [loop.step(step) for step in range(run.steps)]


def bare(name: str, several: bool) -> str:
    return name.split(".", 1)[1] if several else name


def assert_stages_equal(found: list[list[Seen]], run: Piped) -> None:
    expected = train_whole(run)
    assert {seen.metrics.phase for seen in expected} == {"memorization", "compression"}
    several = run.schedule not in SINGLE
    for of_rank in found:
        for here, there in zip(of_rank, expected, strict=True):
            own = {bare(name, several): gradient for name, gradient in here.gradients.items()}
            assert distance(own, {name: there.gradients[name] for name in own}) < 1e-9
            layers = {bare(name, several): value for name, value in here.metrics.layer_entropy.items()}
            assert layers == pytest.approx(there.metrics.layer_entropy, rel=1e-9)
            if not several:
                silent = {"alignment": None}
                assert_equal_metrics(
                    replace(here, metrics=replace(here.metrics, **silent)),
                    replace(there, metrics=replace(there.metrics, **silent)),
                    1e-9,
                )
        for here, there in zip(of_rank, found[0], strict=True):
            assert here.metrics == there.metrics


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_stages_equal_one_process(ranks: Ranks, schedule: str) -> None:
    run = Piped(schedule)
    assert_stages_equal(ranks(train_stages, run, timeout=60), run)


def test_the_scale_of_the_loss_reaches_all_stages(ranks: Ranks) -> None:
    run = Piped("1F1B", scale=1024.0, steps=5)
    assert_stages_equal(ranks(train_stages, run, timeout=60), run)


def test_pipelines_beside_each_other(four: Ranks) -> None:
    run = Piped("1F1B", data=2, steps=5)
    assert_stages_equal(four(train_stages, run, timeout=60), run)


@pytest.mark.parametrize("layers", [{"skip_first": 1}, {"skip_last": 1}, {"schedule": "rotate"}], ids=str)
def test_layers_that_count_are_those_of_the_whole_model(ranks: Ranks, layers: dict[str, Any]) -> None:
    run = Piped("1F1B", config=GAPTConfig(gate=RESTLESS, layers=layers), steps=6)
    assert_stages_equal(ranks(train_stages, run, timeout=60), run)


def test_angles_are_those_of_the_whole_model(ranks: Ranks) -> None:
    run = Piped("1F1B", config=GAPTConfig(gate=RESTLESS, alignment=AlignmentConfig(every=1)), steps=4)
    expected = train_whole(run)
    for here, there in zip(ranks(train_stages, run, timeout=60)[0], expected, strict=True):
        for name, angle in there.metrics.alignment.layers.items():
            found = here.metrics.alignment.layers[name]
            assert found.cosine == pytest.approx(angle.cosine, abs=1e-6)
            assert found.loss_norm == pytest.approx(angle.loss_norm * MICRO, rel=1e-6)  # the schedule divides later


def forgotten() -> list[str]:
    """The schedule got the loss without the objective: what is said on this rank, and that no step hangs."""
    loop = Staged(Piped("1F1B"))
    loop.schedule._loss_fn = cross_entropy
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        for step in range(12):
            rows = rows_of(step, 0, 1)
            arguments = (rows[:, :-1],) if loop.own[0] == 0 else ()
            targets = {"target": rows[:, 1:]} if loop.stages[-1].is_last else {}
            loop.schedule.step(*arguments, **targets)
            loop.optimizer.step()
            loop.optimizer.zero_grad()
    assert loop.optimizer.metrics is None
    return [str(each.message) for each in said]


def test_a_schedule_without_the_objective_is_told_on_all_ranks(ranks: Ranks) -> None:
    for said in ranks(forgotten, timeout=60):
        assert any("objective(loss)" in each for each in said)


def list_of_stages() -> str:
    run = Piped("interleaved")
    loop = Staged(run)
    hook = RepresentationHook(nn.ModuleDict({"a": loop.model}), "a.*.blocks.*")
    optimizer = GAPTOptimizer(torch.optim.SGD(loop.model.parameters(), 0.05), hook)
    try:
        pipelined(optimizer, loop.stages, cross_entropy)
    except ValueError as error:
        return str(error)
    return ""


def test_stages_without_numbers_are_refused_on_all_ranks(ranks: Ranks) -> None:
    for message in ranks(list_of_stages, timeout=60):
        assert "nn.ModuleDict({str(stage.stage_index)" in message


def refused(run: Piped) -> str:
    try:
        train_stages(run)
    except ValueError as error:
        return str(error)
    return ""


def test_stages_that_nobody_connected_are_refused_on_all_ranks(ranks: Ranks) -> None:
    first, second = ranks(refused, Piped("1F1B", connected=False, steps=2), timeout=60)
    assert first == second
    assert "ranks differ in layers" in first
    assert "gapt_optim.integrations.pipelining.pipelined" in first


@pytest.mark.parametrize(
    "config",
    [GAPTConfig(alignment=AlignmentConfig(parameter_every=2)), GAPTConfig(layers={"reduce": "largest_drop"})],
    ids=["parameters", "largest_drop"],
)
def test_what_needs_all_layers_on_one_rank_is_refused(ranks: Ranks, config: GAPTConfig) -> None:
    for message in ranks(refused, Piped("1F1B", config=config), timeout=60):
        assert "need all layers on one rank" in message
