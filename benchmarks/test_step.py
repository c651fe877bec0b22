"""One training step per workload: pytest benchmarks -n 0 --benchmark-enable"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from workloads import STEPS


@pytest.mark.parametrize("name", STEPS)
@pytest.mark.benchmark(group="step")
def test_step(benchmark: Any, name: str) -> None:
    torch.set_num_threads(1)
    if name == "TorchJD PCGrad":
        pytest.importorskip("torchjd")
    step = STEPS[name]()
    benchmark.pedantic(step, rounds=10, warmup_rounds=2)
