"""The numbers of a step: means over micro-batches, calls and ranks."""

from __future__ import annotations

import math

import pytest
import torch
import torch.distributed as dist
from gapt_optim._objective import Objective
from gapt_optim._step.record import Reading, StepRecord, mean_or_nan

from gapt_optim import Measures
from tests.distributed.threads import on_threads


def objective(penalty: float | None = None, **entropies: float) -> Objective:
    """Of layers with these entropies; the measures of a layer are its entropy times 10, 100, 1000 and 10,000."""
    tens = torch.tensor([1.0, 10.0, 100.0, 1000.0, 10000.0])
    return Objective(
        total=torch.tensor(0.0),
        layers=list(entropies),
        numbers=torch.stack([value * tens for value in entropies.values()]),
        penalty=None if penalty is None else torch.tensor(penalty),
        mean_entropy=None,
    )


def measures(entropy: float) -> Measures:
    return Measures(entropy * 10, entropy * 100, entropy * 1000, entropy * 10000)


def test_means_are_over_the_micro_batches_in_which_a_layer_ran() -> None:
    record = StepRecord(["a", "b", "c"])
    record.add(torch.tensor(1.0, requires_grad=True), objective(a=1.0, b=4.0, penalty=0.5), None)
    record.add(torch.tensor([3.0]), objective(a=2.0, penalty=1.0), None)
    read = record.start_reading(torch.arange(9.0).reshape(3, 3), 0.5, None)
    record.clear()  # the reading does not depend on what comes next
    assert read is not None
    assert read() == Reading(
        loss=2.0,
        penalty=0.75,
        entropies={"a": 1.5, "b": 4.0},
        measures={"a": measures(1.5), "b": measures(4.0)},
        validation=0.5,
        statistics=[[0, 1, 2], [3, 4, 5], [6, 7, 8]],
    )


def test_memorization_has_no_penalty() -> None:
    record = StepRecord(["a"])
    record.add(torch.tensor(1.0), objective(a=1.0), None)
    read = record.start_reading(None, math.nan, None)
    assert read is not None
    assert read().penalty == 0


def test_nothing_recorded_is_no_reading() -> None:
    record = StepRecord(["a"])
    assert record.start_reading(None, math.nan, None) is None
    record.add(torch.tensor(1.0), objective(a=1.0), None)
    record.clear()
    assert record.start_reading(None, math.nan, None) is None


def test_half_precision_loss_is_summed_in_single_precision() -> None:
    record = StepRecord(["a"])
    for _ in range(1000):
        record.add(torch.tensor(1.001, dtype=torch.float16), objective(a=1.0), None)
    read = record.start_reading(None, math.nan, None)
    assert read is not None
    assert read().loss == pytest.approx(float(torch.tensor(1.001, dtype=torch.float16)), rel=1e-5)


@pytest.mark.parametrize(("values", "mean"), [([], math.nan), ([3.0], 3.0), ([1.0, 2.0], 1.5)])
def test_mean_or_nan(values: list[float], mean: float) -> None:
    assert mean_or_nan(values) == pytest.approx(mean, nan_ok=True)


def test_ranks_agree_even_where_a_layer_ran_on_one_of_them() -> None:
    def read() -> Reading:
        rank, group = dist.get_rank(), dist.group.WORLD
        record = StepRecord(["a", "b", "c"])
        # Layer b rests on rank 0, layer c on both; rank 1 has two micro-batches.
        if rank == 0:
            record.add(torch.tensor(1.0), objective(a=1.0, penalty=0.5), group)
        else:
            record.add(torch.tensor(2.0), objective(a=2.0, b=5.0, penalty=0.25), group)
            record.add(torch.tensor(4.0), objective(a=4.0, penalty=0.75), group)
        found = record.start_reading(torch.full((3, 3), float(rank)), 1.0 + rank, group)
        assert found is not None
        return found()

    expected = Reading(
        loss=2.0,
        penalty=0.5,
        entropies={"a": 2.0, "b": 5.0},
        measures={"a": measures(2.0), "b": measures(5.0)},
        validation=1.5,
        statistics=[[0.25] * 3] * 3,  # of the gradient that all ranks share, the mean of theirs
    )
    assert on_threads(read) == [expected] * 2


@pytest.mark.parametrize("held_out", [(math.nan, math.nan), (2.0, math.nan), (math.inf, 2.0)])
def test_held_out_losses_are_averaged_over_the_ranks_that_have_one(held_out: tuple[float, float]) -> None:
    def read() -> Reading:
        record, group = StepRecord(["a"]), dist.group.WORLD
        record.add(torch.tensor(1.0), objective(a=1.0), group)
        found = record.start_reading(None, held_out[dist.get_rank()], group)
        assert found is not None
        return found()

    for reading in on_threads(read):
        assert reading.validation == pytest.approx(2.0 if 2.0 in held_out else math.nan, nan_ok=True)
        assert reading.statistics == []
