from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from tests.distributed.ranks import Ranks
from tests.distributed.threads import on_threads


@pytest.fixture(scope="session")
def ranks() -> Iterator[Callable[..., list[Any]]]:
    """Runs a function on two ranks: processes, or with ``GAPT_TEST_RANKS=threads`` threads of this one."""
    if os.environ.get("GAPT_TEST_RANKS") == "threads":
        yield on_threads
        return
    pool = Ranks()
    yield pool
    pool.close()


@pytest.fixture(scope="session")
def four() -> Iterator[Ranks]:
    """Four processes."""
    pool = Ranks(4)
    yield pool
    pool.close()
