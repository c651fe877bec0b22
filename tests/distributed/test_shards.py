"""Ranks that share one loss and have parts of its hidden tensors do what one process does."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.distributed.tensor import Replicate, Shard

from gapt_optim import EntropyConfig
from tests.distributed.parallel import (
    Split,
    along_batch,
    by_dtensors,
    by_loss_parallel,
    replicated,
    sequence_parallel,
    train,
)
from tests.distributed.ranks import Ranks
from tests.distributed.test_training_over_ranks import assert_equal_metrics
from tests.training import distance

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
