"""Ranks that share one loss and have parts of its hidden tensors do what one process does."""

from __future__ import annotations

import itertools
import re
import warnings
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard

from gapt_optim import EntropyConfig, GAPTConfig, GAPTOptimizer, RepresentationHook
from tests.distributed.parallel import (
    BATCH,
    LENGTH,
    RESTLESS,
    Split,
    along_batch,
    by_dtensors,
    by_loss_parallel,
    made,
    replicated,
    sequence_parallel,
    train,
    train_step,
)
from tests.distributed.ranks import Ranks
from tests.distributed.runs import Seen
from tests.distributed.test_over_ranks import counted_collectives, numbers_per_step
from tests.distributed.test_training_over_ranks import assert_equal_metrics
from tests.training import distance

LAYERS = 2
SEQUENCE = Split(sequence_parallel, placement=Shard(1))
FEATURES = Split(sequence_parallel, "blocks.*.mlp.up", Shard(-1))
WAYS = {
    "blocks, Shard(1)": SEQUENCE,
    "blocks, Shard(0)": Split(along_batch, placement=Shard(0)),
    "column-parallel, Shard(-1)": FEATURES,
    "DTensors, Shard(1)": Split(by_dtensors),
    "DTensors, Shard(-1)": Split(by_dtensors, "blocks.*.mlp.up"),
    "DTensors, Replicate": Split(replicated),
    "norms, DTensors": Split(sequence_parallel, "blocks.*.norm"),
    "loss_parallel": Split(by_loss_parallel, placement=Shard(1)),
    "accumulation": replace(SEQUENCE, micro_batches=2),
    "recomputed": replace(SEQUENCE, recompute=True),
    "recomputed, features": replace(FEATURES, recompute=True),
}


def assert_equal(found: list[Any], run: Split, tolerance: float = 1e-9) -> None:
    expected = train(replace(run, way=None, placement=None, recompute=False))
    assert {seen.metrics.phase for seen in expected} == {"memorization", "compression"}
    assert expected[0].metrics.alignment is not None
    for of_rank in found:
        for here, there in zip(of_rank, expected, strict=True):
            assert distance(here.gradients, there.gradients) < tolerance
            assert_equal_metrics(here, there, tolerance)


@pytest.mark.parametrize("run", WAYS.values(), ids=WAYS)
def test_parts_equal_one_process(ranks: Ranks, run: Split) -> None:
    assert_equal(ranks(train, run), run)


@pytest.mark.parametrize("run", [SEQUENCE, FEATURES], ids=["rows", "features"])
@pytest.mark.parametrize("kernel", ["cosine", "linear"])
@pytest.mark.parametrize("center", [True, False])
def test_every_kernel(ranks: Ranks, run: Split, kernel: Any, center: bool) -> None:
    run = replace(run, entropy=EntropyConfig(window=4, kernel=kernel, center=center))
    assert_equal(ranks(train, run), run)


@pytest.mark.parametrize("run", [SEQUENCE, FEATURES], ids=["rows", "features"])
def test_single_precision(ranks: Ranks, run: Split) -> None:
    run = replace(run, dtype=torch.float32)
    assert_equal(ranks(train, run), run, 1e-5)


def train_aloud(run: Split) -> tuple[list[Any], list[str]]:
    """Steps, and what was said of layers that are put together."""
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        seen = train(run)
    return seen, [str(each.message) for each in said if "is put together" in str(each.message)]


@pytest.mark.parametrize("by", [Shard(1), pytest.param(None, marks=pytest.mark.slow)], ids=["plain", "DTensors"])
@pytest.mark.parametrize(
    ("window", "masked", "said"),
    [
        (5, False, "windows of 5 rows cross from one part of 8 rows to the next"),
        (12, False, "(EntropyConfig(window=4) would not)"),
        (None, False, "a window is a whole sequence"),
        (4, True, "its rows are masked or in documents"),
    ],
)
def test_windows_that_cross_parts(ranks: Ranks, by: Any, window: int | None, masked: bool, said: str) -> None:
    way = sequence_parallel if by is not None else by_dtensors
    run = Split(way, placement=by, masked=masked, entropy=EntropyConfig(window=window))
    answers = ranks(train_aloud, run)
    assert_equal([seen for seen, _ in answers], run)
    for _, told in answers:
        assert len(told) == 2  # one for each block
        assert said in told[0]


def test_a_mask_beside_parts_of_a_batch(ranks: Ranks) -> None:
    run = Split(along_batch, placement=Shard(0), masked=True)
    assert_equal(ranks(train, run), run)


@pytest.mark.parametrize("window", [8, None])
def test_windows_of_more_rows_than_a_part_has_features(ranks: Ranks, window: int | None) -> None:
    run = replace(FEATURES, layers="blocks.*.mlp.up", entropy=EntropyConfig(window=window, alpha=1.0))
    assert_equal(ranks(train, run), run, 1e-7)


@pytest.mark.parametrize("way", ["blocks", "features", "loss_parallel", "DTensors"])
def test_sharded_parameters_and_parts(four: Ranks, way: str) -> None:
    """FSDP2 over two, tensor and sequence parallel over two."""
    run = {
        "blocks": SEQUENCE,
        "features": FEATURES,
        "loss_parallel": WAYS["loss_parallel"],
        "DTensors": WAYS["DTensors, Shard(1)"],
    }[way]
    run = replace(run, shards=2)
    assert_equal(four(train, run), run)


@pytest.mark.parametrize("run", [SEQUENCE, FEATURES, WAYS["DTensors, Replicate"]], ids=["rows", "features", "copies"])
def test_four_parts(four: Ranks, run: Split) -> None:
    assert_equal(four(train, run), run)


def train_compiled(run: Split) -> list[Seen]:
    """Each block compiled by itself, as torchtitan does."""
    model, optimizer, data_ranks = made(run)
    torch._dynamo.reset()
    for block in model.blocks:
        block.compile(backend="aot_eager")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return [train_step(run, step, model, optimizer, data_ranks) for step in range(run.steps)]


@pytest.mark.slow
@pytest.mark.parametrize(
    "run",
    [
        Split(by_dtensors),
        Split(by_dtensors, "blocks.*.mlp.up"),
        Split(by_dtensors, "blocks.*.mlp.up", entropy=EntropyConfig(window=None, alpha=1.0, normalize=True)),
        Split(by_dtensors, entropy=EntropyConfig(window=5)),
        Split(replicated),
    ],
    ids=["rows", "features", "whole sequences of features", "put together", "copies"],
)
def test_compiled_blocks(ranks: Ranks, run: Split) -> None:
    """With plain parts torch cannot compile these blocks, with or without entropies."""
    assert_equal(ranks(train_compiled, run), run)


def collectives(run: Split) -> list[list[int]]:
    """Numbers in each collective of ours, by step. Those of DTensors are torch's own functions."""
    found = []
    for steps in range(1, run.steps + 1):
        with counted_collectives() as sizes:
            train(replace(run, steps=steps))
        found.append([numbers for numbers, _ in sizes])
    return [found[0], *[later[len(earlier) :] for earlier, later in itertools.pairwise(found)]]


@pytest.mark.parametrize("micro_batches", [1, 2])
@pytest.mark.parametrize("way", ["rows", "features"])
def test_one_collective_for_all_layers_of_an_objective(ranks: Ranks, way: str, micro_batches: int) -> None:
    """A sum and a weight of each layer, or the Gram matrices of its windows of 4 rows."""
    run = replace({"rows": SEQUENCE, "features": FEATURES}[way], micro_batches=micro_batches, steps=4)
    numbers = {"rows": 2 * LAYERS, "features": LAYERS * (BATCH * LENGTH // 4) * 4 * 4}[way]
    step = [*[numbers] * micro_batches, numbers_per_step(LAYERS)]
    compared = [*step[:-1], 8, step[-1]]
    assert ranks(collectives, run) == [[compared, step, step, step]] * 2


def test_parts_of_a_sequence_that_comes_first(ranks: Ranks) -> None:
    """As in Megatron, whose tensors are (length, batch, features)."""
    run = Split(along_batch, placement=Shard(0), first=True)
    assert_equal(ranks(train, run), run)


class Spread(nn.Module):
    """A hidden tensor that is spread over a mesh between two layers that all ranks have."""

    def __init__(self, placements: Any) -> None:
        super().__init__()
        self.before, self.spread, self.after = nn.Linear(6, 8), nn.Identity(), nn.Linear(8, 3)
        self.placements = placements

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.before(x))
        if self.placements is None:
            return self.after(self.spread(h))
        mesh = init_device_mesh("cpu", (2, 2))
        if any(placement.is_partial() for placement in self.placements):
            return self.after(self.spread(DTensor.from_local(h, mesh, self.placements)).full_tensor())
        whole = DTensor.from_local(h, mesh, [Replicate()] * 2, run_check=False)
        return self.after(self.spread(whole.redistribute(placements=self.placements)).full_tensor())


def train_spread(placements: Any) -> list[Seen]:
    torch.manual_seed(0)
    model = Spread(placements).double()
    hook = RepresentationHook(model, "spread", layout="batch length features")
    config = GAPTConfig(gate=RESTLESS, entropy=EntropyConfig(window=4))
    optimizer = GAPTOptimizer(torch.optim.SGD(model.parameters(), 0.05), hook, config)
    seen = []
    for step in range(5):
        x = torch.randn(4, 8, 6, generator=torch.Generator().manual_seed(step), dtype=torch.float64)
        optimizer.backward(model(x).square().mean())
        gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
        optimizer.step()
        optimizer.zero_grad()
        seen.append(Seen(optimizer.metrics, gradients, 0.0))
    return seen


@pytest.mark.parametrize(
    "placements",
    [
        (Shard(0), Shard(1)),
        (Shard(1), Shard(0)),
        (Shard(1), Shard(-1)),
        (Shard(2), Shard(0)),
        (Replicate(), Shard(1)),
        (Shard(-1), Replicate()),
    ],
    ids=str,
)
def test_two_dimensions_of_a_mesh(four: Ranks, placements: Any) -> None:
    expected = train_spread(None)
    assert {seen.metrics.phase for seen in expected} == {"memorization", "compression"}
    for of_rank in four(train_spread, placements):
        for here, there in zip(of_rank, expected, strict=True):
            assert distance(here.gradients, there.gradients) < 1e-9
            assert_equal_metrics(here, there, 1e-9)


def told_of(placements: Any) -> str:
    """What is said in memorization: the layer is left out, and the gate never compresses."""
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        assert {seen.metrics.entropy for seen in train_spread(placements)} == {None}
    return " ".join(str(each.message) for each in said)


def test_summands_and_doubled_parts_are_told(four: Ranks) -> None:
    for placements, message in (
        ((Partial(), Replicate()), "of which a rank knows a summand only"),
        ((Shard(1), Shard(1)), "is sharded twice along one axis"),
    ):
        for answer in four(told_of, placements):
            assert message in answer


@pytest.mark.parametrize(
    ("value", "error", "message"),
    [
        (Shard(1), TypeError, "placements must be (mesh, placement)"),
        (("tp", Shard(1)), TypeError, "as (mesh, Shard(1))"),
        ({"nothing.*": ()}, ValueError, "matches none of the layers"),
    ],
)
def test_placements_that_say_nothing_are_refused(value: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=re.escape(message)):
        RepresentationHook(Spread(None), "spread", placements=value)
