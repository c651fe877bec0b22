"""One thread, fixed seeds and a modest number of generated examples, so that every run is the same run.

`pytest --hypothesis-profile=explore` looks for new examples.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import settings

if not hasattr(torch.optim, "Muon"):  # before torch 2.9

    class Muon(torch.optim.SGD):
        """Stands in for it where a test needs an optimizer for matrices beside another one."""

        def __init__(self, params: Any, lr: float = 1e-3, **options: Any) -> None:
            super().__init__(params, lr=lr, momentum=0.95, **options)

    torch.optim.Muon = Muon  # type: ignore[misc]

settings.register_profile("same", deadline=None, max_examples=40, derandomize=True, database=None)
settings.register_profile("explore", deadline=None, max_examples=2000, database=None)
settings.load_profile("same")

torch.set_num_threads(1)


def pytest_collection_finish() -> None:
    """What modules and tests are made of stays to the end, so collections, and tests that count objects, skip it."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def _same_numbers() -> Iterator[None]:
    torch.manual_seed(0)
    yield
    torch.set_default_dtype(torch.float32)
