"""Each row of the documentation's table of engines."""

from __future__ import annotations

import pytest

from tests.distributed.ranks import Ranks
from tests.distributed.table import ENGINES, assert_right, measure

QUICK = ("FSDP2", "declared Shard(1)", "1F1B", "a rank without a loss")


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in ENGINES]
)
def test_an_engine_is_one_process(ranks: Ranks, four: Ranks, name: str) -> None:
    assert_right(measure({2: ranks, 4: four}[ENGINES[name].ranks], ENGINES[name]), name)
