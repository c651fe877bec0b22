"""Closed form against autograd through the same matrix algebra: pytest benchmarks -n 0 --benchmark-enable"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from gapt_optim import matrix_entropy


def through_autograd(z: Tensor) -> Tensor:
    gram = z @ z.mT
    purity: Tensor = gram.square().sum((-2, -1)) / gram.diagonal(dim1=-2, dim2=-1).sum(-1).square()
    return -purity.log()


def through_eigenvalues(z: Tensor) -> Tensor:
    p: Tensor = torch.linalg.eigvalsh(z @ z.mT)
    return (p / p.sum(-1, keepdim=True)).square().sum(-1).log().neg()


@pytest.mark.parametrize("way", [matrix_entropy, through_autograd, through_eigenvalues])
@pytest.mark.parametrize("shape", [(256, 8, 256), (4, 128, 256)], ids=["windows of 8", "whole sequences"])
@pytest.mark.benchmark(group="entropy and gradient")
def test_entropy_and_gradient(benchmark: Any, way: Any, shape: tuple[int, ...]) -> None:
    torch.set_num_threads(1)
    z = torch.randn(shape, requires_grad=True)

    def run() -> None:
        z.grad = None
        way(z).sum().backward()

    benchmark(run)
    assert z.grad is not None
    assert z.grad.isfinite().all()
