"""Ranks that were given different settings, layers or checkpoints say so, all of them, naming the field."""

from __future__ import annotations

from typing import Any
from unittest import mock

import pytest
import torch.distributed as dist
from torch import Tensor

from gapt_optim import GAPTConfig, GateConfig, ObjectiveConfig
from gapt_optim.progress import flat_state
from gapt_optim.ranks import (
    difference_between,
    group_of,
    refuse_different_ranks,
)
from tests.distributed.ranks import Ranks
from tests.loops import make_net, run, wrap

SAME = {"config.objective.weight": "0.1", "layers": "['h.0', 'h.1']", "steps": "3"}


def compared(of_ranks: list[dict[str, str]]) -> tuple[str, list[tuple[int, str]]]:
    """What this rank raised, and the collectives that it took."""
    taken: list[tuple[int, str]] = []
    real_reduce, real_gather = dist.all_reduce, dist.all_gather_object

    def reduce(tensor: Tensor, *args: Any, **options: Any) -> Any:
        taken.append((tensor.numel(), "numbers"))
        return real_reduce(tensor, *args, **options)

    def gather(objects: list[Any], *args: Any, **options: Any) -> Any:
        taken.append((len(objects), "objects"))
        return real_gather(objects, *args, **options)

    with mock.patch.object(dist, "all_reduce", reduce), mock.patch.object(dist, "all_gather_object", gather):
        try:
            refuse_different_ranks(of_ranks[dist.get_rank()], group_of(None))
        except ValueError as error:
            return str(error), taken
    return "", taken


def test_ranks_that_agree_take_one_small_collective(ranks: Ranks) -> None:
    assert ranks(compared, [SAME, dict(reversed(SAME.items()))]) == [("", [(8, "numbers")])] * 2


@pytest.mark.parametrize(
    ("other", "expected"),
    [
        ({"config.objective.weight": "0.2"}, "config.objective.weight (rank 0: 0.1, rank 1: 0.2)"),
        ({"layers": "['h.0']"}, "layers (rank 0: ['h.0', 'h.1'], rank 1: ['h.0'])"),
        ({"steps": "4", "phase": "x"}, "steps (rank 0: 3, rank 1: 4), phase (rank 0: nothing, rank 1: x)"),
    ],
)
def test_all_ranks_name_the_field_and_both_values(ranks: Ranks, other: dict[str, str], expected: str) -> None:
    first, second = ranks(compared, [SAME, SAME | other])
    assert first == second
    assert f"ranks differ in {expected}" in first[0]
    assert "process_group=" in first[0]
    assert [kind for _, kind in first[1]] == ["numbers", "objects"]


def states(of_ranks: list[dict[str, Any]]) -> str:
    """Two wrappers of different settings, after the same steps."""
    here = of_ranks[dist.get_rank()]
    model = make_net()
    optimizer = wrap(model, config=GAPTConfig(**here.get("config", {})))
    with mock.patch("gapt_optim.ranks.group_of", return_value=None):
        for _ in range(here.get("steps", 0)):
            run(model, optimizer, range(1))
    try:
        refuse_different_ranks(flat_state(optimizer._own_state()), group_of(None))
    except ValueError as error:
        return str(error)
    return ""


@pytest.mark.parametrize(
    ("config", "field"),
    [
        ({"objective": ObjectiveConfig(weight=0.37)}, "config.objective.weight"),
        ({"gate": GateConfig(patience_memorization=3)}, "config.gate.patience_memorization"),
        ({"gate": GateConfig(initial_phase="compression")}, "gate.phase"),
    ],
)
def test_each_setting_is_compared(ranks: Ranks, config: dict[str, Any], field: str) -> None:
    answers = ranks(states, [{}, {"config": config}])
    assert answers[0] == answers[1]
    assert f"{field} (rank 0: " in answers[0]
    assert ranks(states, [{"config": config}] * 2) == ["", ""]


def test_many_differences_are_counted() -> None:
    text = difference_between([{str(i): "a" for i in range(9)}, {str(i): "b" for i in range(9)}])
    assert "and 4 more" in text
    assert text.count("rank 1") == 5


def test_one_process_compares_nothing() -> None:
    refuse_different_ranks({"weight": "1"}, None)
