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

        def __init__(self, params: Any, lr: float = 1e-3, adjust_lr_fn: str | None = None, **options: Any) -> None:
            super().__init__(params, lr=lr, momentum=0.95, **options)

    torch.optim.Muon = Muon  # type: ignore[misc]

settings.register_profile("same", deadline=None, max_examples=40, derandomize=True, database=None)
settings.register_profile("explore", deadline=None, max_examples=2000, database=None)
settings.load_profile("same")

torch.set_num_threads(1)


_OF_TORCH_2_6 = (  # what it says of its own ways
    "ignore:torch.distributed is unavailable or uninitialized:UserWarning",
    "ignore:TypedStorage is deprecated:UserWarning",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.__version__.startswith("2.6."):
        for item in items:
            for ignored in _OF_TORCH_2_6:
                item.add_marker(pytest.mark.filterwarnings(ignored))
            if "compiled" in item.name and "gpt2" in item.name:
                reason = "transformers calls torch.compiler.is_exporting, which torch 2.6 lacks"
                item.add_marker(pytest.mark.skip(reason))


def pytest_collection_finish() -> None:
    """What modules and tests are made of stays to the end, so collections, and tests that count objects, skip it."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def _same_numbers() -> Iterator[None]:
    torch.manual_seed(0)
    yield
    torch.set_default_dtype(torch.float32)
