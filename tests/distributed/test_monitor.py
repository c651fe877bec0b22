"""The monitor over ranks: what it reports is of all ranks' rows, the same on each."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from gapt_optim import StepMetrics, monitor


def batches() -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(32, 4, generator=generator) for _ in range(3)]


def trained(rank: int, world: int) -> list[StepMetrics]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 2))
    called = DistributedDataParallel(model) if world > 1 else model
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    seen: list[StepMetrics] = []
    with monitor(model, ["0", "1"], every=2, observers=[seen.append]):
        for x in batches():
            called(x.chunk(world)[rank]).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
    return seen


def on_rank() -> list[StepMetrics]:
    return trained(dist.get_rank(), dist.get_world_size())


def test_reports_are_of_all_ranks(ranks: Callable[..., list[Any]]) -> None:
    if os.environ.get("GAPT_TEST_RANKS") == "threads":
        pytest.skip("hooks on all optimizers are of a process")
    alone = trained(0, 1)
    assert [metrics.step for metrics in alone] == [1, 2]
    first, second = ranks(on_rank)
    assert first == second
    for metrics, expected in zip(first, alone, strict=True):
        assert metrics.layer_entropy == pytest.approx(expected.layer_entropy, rel=1e-5)
        assert metrics.measures.norm_ratio == pytest.approx(expected.measures.norm_ratio, rel=1e-5)
