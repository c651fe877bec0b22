"""One training step per row of the table: pytest benchmarks/cost -n 0 --benchmark-enable"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from benchmarks.cost.workloads import SMALL, STEPS


@pytest.mark.parametrize("name", STEPS)
@pytest.mark.benchmark(group="step")
def test_step(benchmark: Any, name: str) -> None:
    torch.set_num_threads(1)
    if "TorchJD" in name:
        pytest.importorskip("torchjd")
    benchmark.pedantic(STEPS[name](SMALL), rounds=10, warmup_rounds=2)
