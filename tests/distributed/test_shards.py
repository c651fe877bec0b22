"""Ranks that share one loss and have parts of its hidden tensors do what one process does."""

from __future__ import annotations

import itertools
import warnings
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.distributed.tensor import Shard

from gapt_optim import EntropyConfig
from tests.distributed.parallel import (
    BATCH,
    LENGTH,
    Split,
    along_batch,
    by_dtensors,
    by_loss_parallel,
    replicated,
    sequence_parallel,
    train,
)
from tests.distributed.ranks import Ranks
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
