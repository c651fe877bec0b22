"""What each engine does against one process, as the table of the documentation shows it.

python -m tests.distributed.table            # measures every engine that is installed: docs/generated/engines.json
python -m tests.distributed.table "FSDP2"    # one of them
"""

from __future__ import annotations

import importlib.util
import json
import sys
import tempfile
from collections.abc import Callable
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import Replicate, Shard
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel

from gapt_optim import EntropyConfig, GAPTConfig, GAPTOptimizer, RepresentationHook
from tests.distributed import parallel, runs
from tests.distributed.loop import Loop, Run, run_and_resume
from tests.distributed.parallel import Split
from tests.distributed.ranks import Ranks
from tests.distributed.runs import RESTLESS, Net, Seen, data
from tests.distributed.test_pipeline import Piped, Staged, Whole
from tests.distributed.test_shards import Spread
from tests.distributed.test_uneven_ranks import Experts, mean_gradients
from tests.training import distance

FIGURES = Path(__file__).parents[2] / "docs" / "generated" / "engines.json"
STEPS, HALF = 20, 9
PLAIN = 12
"""A step at which no angles are due."""
SINGLE = torch.float32


class OfRun(Loop):
    """Data parallel engines."""

    def __init__(self, run: runs.Run) -> None:
        self.run = run
        self.called, self.model, self.optimizer = runs.made(run)

    def step(self, step: int) -> Seen:
        return runs.train_step(self.run, step, self.called, self.model, self.optimizer)


class OfSplit(Loop):
    """Ranks that share a loss."""

    def __init__(self, run: Split) -> None:
        self.run = run
        self.model, self.optimizer, self.data_ranks = parallel.made(run)

    def step(self, step: int) -> Seen:
        return parallel.train_step(self.run, step, self.model, self.optimizer, self.data_ranks)


class Small(Loop):
    """A small model that subclasses call in their way."""

    def __init__(self, model: nn.Module, layers: str, layout: str | None = None) -> None:
        self.model = model
        hook = RepresentationHook(model, layers, layout=layout)
        config = GAPTConfig(gate=RESTLESS, entropy=EntropyConfig(window=4))
        self.optimizer = GAPTOptimizer(torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9), hook, config)

    def end(self) -> Seen:
        gradients = {name: p.grad.clone() for name, p in self.model.named_parameters()}
        self.optimizer.step()
        self.optimizer.zero_grad()
        return Seen(self.optimizer.metrics, gradients, 0.0)


class Chunks(Small):
    """Context parallel: each rank has a chunk of every sequence."""

    def __init__(self, parts: bool) -> None:
        torch.manual_seed(0)
        super().__init__(Net(), "blocks.*")
        self.called: nn.Module = DistributedDataParallel(self.model) if parts else self.model
        self.own = slice(8 * dist.get_rank(), 8 * dist.get_rank() + 8) if parts else slice(16)

    def step(self, step: int) -> Seen:
        generator = torch.Generator().manual_seed(step)
        x = torch.randn(4, 16, 6, generator=generator)[:, self.own]
        target = torch.randint(4, (4, 16), generator=generator)[:, self.own]
        self.optimizer.backward(cross_entropy(self.called(x).flatten(0, 1), target.flatten()))
        return self.end()


class Shares(Small):
    """Losses that are sums over own tokens, divided by all."""

    def __init__(self, parts: bool) -> None:
        torch.manual_seed(0)
        super().__init__(Net(), "blocks.*")
        self.parts = parts

    def step(self, step: int) -> Seen:
        x, target = data(step, SINGLE)
        total = cross_entropy(self.model(x).flatten(0, 1), target.flatten(), reduction="sum")
        share = 1 / dist.get_world_size() if self.parts else 1.0
        self.optimizer.backward(total / (target.numel() / share), scaled_by=share)
        if self.parts:
            for p in self.model.parameters():
                dist.all_reduce(p.grad)
        return self.end()


class Meshes(Small):
    """A hidden tensor that is spread along two dimensions of a mesh."""

    def __init__(self, placements: Any) -> None:
        torch.manual_seed(0)
        super().__init__(Spread(placements), "spread", "batch length features")

    def step(self, step: int) -> Seen:
        x = torch.randn(4, 8, 6, generator=torch.Generator().manual_seed(step))
        self.optimizer.backward(self.model(x).square().mean())
        return self.end()


class Routed(Small):
    """Experts, of which one gets no tokens on the second rank; one process does both ranks' halves in turn."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        super().__init__(Experts(), "experts.*")

    def step(self, step: int) -> Seen:
        x, target = data(step, SINGLE)
        halves = range(2) if not dist.is_initialized() else [dist.get_rank()]
        for rank in halves:
            own = slice(None) if dist.is_initialized() else slice(4 * rank, 4 * rank + 4)
            self.model.rank = rank
            loss = cross_entropy(self.model(x[own]), target[own].flatten())
            self.optimizer.backward(loss, scale=1 / len(halves))
        if dist.is_initialized():
            mean_gradients(self.model)
        return self.end()


class Absent(Small):
    """The second rank has no loss in every third step."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        super().__init__(Net(), "blocks.*")

    def step(self, step: int) -> Seen:
        x, target = data(step, SINGLE)
        spread, absent = dist.is_initialized(), step % 3 == 2
        if not spread and absent:
            x, target = x[: len(x) // 2], target[: len(x) // 2]
        if not (spread and absent and dist.get_rank() == 1):
            loss = cross_entropy(self.model(x).flatten(0, 1), target.flatten())
            self.optimizer.backward(loss, scale=0.5 if absent and not spread else 1.0)
        if spread:
            mean_gradients(self.model)
        return self.end()


class Engine(NamedTuple):
    """A row of the table."""

    ranks: int
    make: Callable[[], Loop]
    whole: Callable[[], Loop]
    """The same on one process."""


def of_run(ranks: int, name: str) -> Engine:
    run = runs.Run(name, dtype=SINGLE, steps=STEPS)
    return Engine(ranks, partial(OfRun, run), partial(OfRun, replace(run, parallel="none")))


def of_split(ranks: int, **options: Any) -> Engine:
    run = Split(dtype=SINGLE, steps=STEPS, **options)
    return Engine(ranks, partial(OfSplit, run), partial(OfSplit, replace(run, way=None, placement=None)))


def of_stages(ranks: int, schedule: str, **options: Any) -> Engine:
    run = Piped(schedule, dtype=SINGLE, **options)
    return Engine(ranks, partial(Staged, run), partial(Whole, run))


UP = "blocks.*.mlp.up"
ENGINES = {
    "DDP": of_run(2, "ddp"),
    "FSDP2": of_run(2, "fsdp"),
    "HSDP": of_run(4, "hsdp"),
    "context parallel": Engine(2, partial(Chunks, True), partial(Chunks, False)),
    "a share of a loss": Engine(2, partial(Shares, True), partial(Shares, False)),
    "declared Shard(1)": of_split(2, way=parallel.sequence_parallel, placement=Shard(1)),
    "declared Shard(0)": of_split(2, way=parallel.along_batch, placement=Shard(0)),
    "declared Shard(-1)": of_split(2, way=parallel.sequence_parallel, layers=UP, placement=Shard(-1)),
    "DTensor Replicate": of_split(2, way=parallel.replicated),
    "DTensor Shard(0)": of_split(2, way=partial(parallel.by_dtensors, axis=0)),
    "DTensor Shard(1)": of_split(2, way=parallel.by_dtensors),
    "DTensor Shard(-1)": of_split(2, way=parallel.by_dtensors, layers=UP),
    "two dimensions of a mesh": Engine(4, partial(Meshes, (Shard(1), Shard(-1))), partial(Meshes, None)),
    "a copied dimension": Engine(4, partial(Meshes, (Replicate(), Shard(1))), partial(Meshes, None)),
    "sequence first": of_split(2, way=parallel.along_batch, placement=Shard(0), first=True),
    "loss_parallel": of_split(2, way=parallel.by_loss_parallel, placement=Shard(1)),
    "FSDP2 x TP": of_split(4, way=parallel.sequence_parallel, placement=Shard(1), shards=2),
    "windows across parts": of_split(
        2, way=parallel.sequence_parallel, placement=Shard(1), entropy=EntropyConfig(window=5)
    ),
    "masked parts": of_split(2, way=parallel.sequence_parallel, placement=Shard(1), masked=True),
    "GPipe": of_stages(2, "GPipe"),
    "1F1B": of_stages(2, "1F1B"),
    "interleaved 1F1B": of_stages(2, "interleaved"),
    "zero bubble": of_stages(2, "zero bubble"),
    "zero bubble in a V": of_stages(2, "ZBV"),
    "1F1B x data": of_stages(4, "1F1B", data=2),
    "experts without tokens": Engine(2, Routed, Routed),
    "a rank without a loss": Engine(2, Absent, Absent),
}


@dataclass(frozen=True)
class Figures:
    """Of one engine, the largest over ranks and steps."""

    ranks: int
    gradients: float
    """Distance from those of one process, relative to their norm."""
    entropies: float
    """Relative."""
    phases: bool
    """The same as in one process at all steps, and of both kinds."""
    resumed: bool
    """From a checkpoint at step 9, metrics are the same bit for bit."""
    collectives: int
    """Of a step."""
    numbers: int
    bytes: int


def assert_right(here: Figures, name: str, tolerance: float = 1e-5) -> None:
    """As good as one process, and what the page says of it."""
    assert here.gradients < tolerance
    assert here.entropies < tolerance
    assert here.phases
    assert here.resumed
    known = json.loads(FIGURES.read_text(encoding="utf-8"))[name]
    assert (here.ranks, here.collectives, here.bytes) == (known["ranks"], known["collectives"], known["bytes"])


def measure(ranks: Ranks, engine: Engine) -> Figures:
    torch.manual_seed(0)
    whole = engine.whole()
    expected = [whole.step(step) for step in range(STEPS)]
    with tempfile.TemporaryDirectory() as folder:
        found = ranks(run_and_resume, engine.make, folder, STEPS, HALF, timeout=500)
    return figures(found, expected)


def figures(found: list[Run], expected: list[Seen]) -> Figures:
    gradients = [
        distance(bare(here.gradients), {name: there.gradients[name] for name in bare(here.gradients)})
        for of_rank in found
        for here, there in zip(of_rank.seen, expected, strict=True)
    ]
    entropies = [
        abs(value / there.metrics.layer_entropy[name] - 1)
        for of_rank in found
        for here, there in zip(of_rank.seen, expected, strict=True)
        for name, value in bare(here.metrics.layer_entropy).items()
    ]
    phases = [seen.metrics.phase for seen in expected]
    same = all([seen.metrics.phase for seen in of_rank.seen] == phases for of_rank in found)
    resumed = all(
        [seen.metrics for seen in of_rank.resumed] == [seen.metrics for seen in of_rank.seen[HALF:]]
        for of_rank in found
    )
    sent = max((of_rank.sent[PLAIN] for of_rank in found), key=len)
    return Figures(
        ranks=len(found),
        gradients=max(gradients),
        entropies=max(entropies),
        phases=same and set(phases) == {"memorization", "compression"},
        resumed=resumed,
        collectives=len(sent),
        numbers=sum(numbers for numbers, _ in sent),
        bytes=sum(size for _, size in sent),
    )


def bare(named: dict[str, Any]) -> dict[str, Any]:
    """By the names that one process has: several stages of a rank are in a list."""
    return {name.split(".", 1)[1] if name[0].isdigit() else name: value for name, value in named.items()}


def all_engines() -> dict[str, Engine]:
    """Also of packages that not everybody has."""
    found = dict(ENGINES)
    for needed, module in (
        (("deepspeed",), "tests.distributed.test_deepspeed"),
        (("torchtitan", "triton"), "tests.distributed.test_torchtitan"),
        (("megatron",), "tests.distributed.test_megatron"),
        ((), "tests.examples.test_torchtitan_loop"),
    ):
        if all(importlib.util.find_spec(name) for name in needed):
            found |= importlib.import_module(module).ENGINES
    return found


def main(names: list[str]) -> None:
    known: dict[str, Any] = json.loads(FIGURES.read_text(encoding="utf-8")) if FIGURES.exists() else {}
    engines = all_engines()
    for world in sorted({engine.ranks for engine in engines.values()}):
        with closing(Ranks(world)) as ranks:
            for name, engine in engines.items():
                if engine.ranks == world and (not names or name in names):
                    known[name] = asdict(measure(ranks, engine))
                    print(name, known[name], flush=True)
                    FIGURES.write_text(json.dumps(known, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
