"""What ranks do with each other's numbers, on threads; distributed/ has it over processes."""

from __future__ import annotations

import copy
import math
from dataclasses import replace
from functools import partial

import pytest
import torch
import torch.distributed as dist

from gapt_optim import AlignmentConfig, GAPTConfig, ObjectiveConfig
from gapt_optim.ranks import HostCopy, difference_between, group_of, mean_over_ranks, refuse_different_ranks
from tests.distributed.runs import COMPRESSING, RESTLESS, Net, Run, train
from tests.distributed.test_training_over_ranks import assert_equal_runs
from tests.distributed.threads import on_threads

SAME = {"layers": "['h.0']", "steps": "3", "weight": "0.1"}


def test_the_group_is_the_one_given_or_all() -> None:
    def groups() -> tuple[bool, bool, bool]:
        pair, alone = dist.new_group([0, 1]), [dist.new_group([rank]) for rank in range(3)][dist.get_rank()]
        both = dist.get_rank() == 2 or group_of(pair) is pair
        return group_of(None) is dist.group.WORLD, both, group_of(alone) is None

    assert on_threads(groups, world=3) == [(True, True, True)] * 3
    assert on_threads(group_of, None, world=1) == [None]
    assert group_of(None) is None


def test_means_are_the_same_on_every_rank() -> None:
    def mean() -> tuple[list[list[float]], bool]:
        values = (torch.arange(6.0).reshape(2, 3) + 6 * dist.get_rank()).mT  # not contiguous
        before = values.clone()
        found = mean_over_ranks(values, dist.group.WORLD)
        return found.tolist(), torch.equal(values, before)

    expected = [[6.0, 9.0], [7.0, 10.0], [8.0, 11.0]]
    assert on_threads(mean, world=3) == [(expected, True)] * 3
    values = torch.ones(2)
    assert mean_over_ranks(values, None) is values


@pytest.mark.parametrize(
    ("other", "named"),
    [
        ({}, ""),
        ({"weight": "0.2"}, "weight (rank 0: 0.1, rank 2: 0.2)"),
        ({"phase": "x", "steps": "4"}, "steps (rank 0: 3, rank 2: 4), phase (rank 0: nothing, rank 2: x)"),
    ],
)
@pytest.mark.parametrize("order", [1, -1])
def test_all_ranks_raise_where_one_differs(other: dict[str, str], named: str, order: int) -> None:
    def compare() -> str:
        here = SAME | (other if dist.get_rank() == 2 else {})
        try:
            refuse_different_ranks(dict(list(here.items())[:: order if dist.get_rank() == 1 else 1]), dist.group.WORLD)
        except ValueError as error:
            return str(error)
        return ""

    first, *others = on_threads(compare, world=3)
    assert others == [first] * 2
    assert first.startswith(f"ranks differ in {named}; give all ranks") if named else first == ""


@pytest.mark.parametrize(("count", "more"), [(5, ""), (6, " and 1 more"), (11, " and 6 more")])
def test_five_differences_are_named(count: int, more: str) -> None:
    text = difference_between([{str(i): "a" for i in range(count)}, {str(i): "b" for i in range(count)}])
    assert f"(rank 0: a, rank 1: b){more}; " in text
    assert text.count("rank 1") == 5


def test_what_is_on_its_way_to_the_host_stays_what_it_was() -> None:
    values = torch.tensor([1.0, math.inf], requires_grad=True)
    assert HostCopy(values * 2).read() == [2.0, math.inf]


def net(depth: int = 2) -> Net:
    torch.manual_seed(0)
    return Net(depth=depth)


@pytest.mark.parametrize(
    ("options", "config", "parts"),
    [
        ({}, {}, {"validation": True, "micro_batches": 2}),
        ({"find_unused_parameters": True}, {"alignment": AlignmentConfig(parameter_every=2)}, {}),
        (
            {},
            {
                "gate": COMPRESSING,
                "alignment": AlignmentConfig(parameter_every=1),
                "objective": ObjectiveConfig(target=0.01),
            },
            {"micro_batches": 2},
        ),
    ],
    ids=["micro-batches", "aligned", "aligned otherwise"],
)
def test_threads_that_share_a_batch_train_as_one(
    options: dict[str, bool], config: dict[str, object], parts: dict[str, object]
) -> None:
    build = partial(copy.deepcopy, net())
    settings = GAPTConfig(**({"gate": RESTLESS} | config))  # type: ignore[arg-type]
    run = Run("ddp", options, settings, steps=3, build=build, **parts)  # type: ignore[arg-type]
    assert_equal_runs(on_threads(train, run), train(replace(run, parallel="none")))
