"""Closed form against autograd and eigenvalues: pytest benchmarks/cost -n 0 --benchmark-enable"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from benchmarks.cost.workloads import entropy_by_autograd, entropy_by_eigenvalues
from gapt_optim import matrix_entropy

WAYS: dict[str, Any] = {
    "closed form": lambda z: matrix_entropy(z).mean(),
    "autograd": lambda z: entropy_by_autograd(z, None),
    "eigenvalues": lambda z: entropy_by_eigenvalues(z, None),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("shape", [(256, 8, 256), (4, 128, 256)], ids=["windows of 8", "whole sequences"])
@pytest.mark.benchmark(group="entropy and gradient")
def test_entropy_and_gradient(benchmark: Any, way: str, shape: tuple[int, ...]) -> None:
    torch.set_num_threads(1)
    z = torch.randn(shape, requires_grad=True)

    def run() -> None:
        z.grad = None
        WAYS[way](z).backward()

    benchmark(run)
    assert z.grad is not None
    assert z.grad.isfinite().all()
