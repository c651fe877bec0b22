"""The numbers of a step: sums over weights, however a batch is cut into micro-batches and calls."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from gapt_optim import GAPTOptimizer, Measures
from gapt_optim.objective import Objective
from gapt_optim.sums import StepSums

from .models import MLP
from .training import wrapped


def objective(layers: list[str], totals: list[float], weights: list[float], penalty: float | None = None) -> Objective:
    sums = torch.tensor([totals, weights], dtype=torch.float64)
    return Objective(torch.zeros(()), layers, sums, None, None if penalty is None else torch.tensor(penalty), None)


def read(sums: StepSums, validation: list[float] | None = None) -> object:
    reading = sums.start_reading(None, validation or [], torch.device("cpu"), None)
    return None if reading is None else reading()


def test_sums_over_weights() -> None:
    sums = StepSums(["a", "b", "c"])
    sums.add(torch.tensor(1.0), objective(["a", "c"], [6.0, 2.0], [4.0, 1.0], 0.5), alone=True)
    sums.add(torch.tensor(3.0), objective(["a"], [1.0], [1.0]), alone=True)
    found = read(sums, [2.0, 4.0])
    assert found.loss == 2.0
    assert found.penalty == 0.25
    assert found.entropies == {"a": pytest.approx(7 / 5), "c": 2.0}
    assert found.ran == ["a", "c"]
    assert found.validation == 3.0
    assert found.measures == found.angles == {}


def test_a_layer_without_a_window_that_counts_ran_and_has_no_entropy() -> None:
    sums = StepSums(["a", "b"])
    sums.add(torch.tensor(1.0), objective(["a", "b"], [0.0, 3.0], [0.0, 2.0]), alone=True)
    found = read(sums)
    assert found.entropies == {"b": 1.5}
    assert found.ran == ["a", "b"]
    assert math.isnan(found.validation)


def test_nothing_was_added() -> None:
    sums = StepSums(["a"])
    assert read(sums) is None
    sums.add(torch.tensor(1.0), objective([], [], []), alone=True)
    assert read(sums).loss == 1.0
    sums.clear()
    assert read(sums) is None


@given(
    st.lists(st.integers(0, 4), min_size=1, max_size=4), st.booleans(), st.sampled_from(["memorization", "compression"])
)
def test_how_a_batch_is_cut_changes_no_number(cuts: list[int], one_loss: bool, phase: str) -> None:
    """Sequences of 13 tokens: every cut lies between windows."""

    def numbers(parts: list[Tensor], together: bool) -> tuple[dict[str, float], Measures]:
        torch.manual_seed(0)
        model = MLP(depth=2)
        optimizer: GAPTOptimizer = wrapped(model, "blocks.*", phase, objective={"weight": 0.1})
        losses = [model(part).square().mean() for part in parts]
        if together:
            optimizer.backward(torch.stack(losses).sum())
        else:
            for loss in losses:
                optimizer.backward(loss)
        optimizer.step()
        assert optimizer.metrics is not None
        assert optimizer.metrics.measures is not None
        return optimizer.metrics.layer_entropy, optimizer.metrics.measures

    torch.manual_seed(1)
    batch = torch.randn(max(1, sum(cuts)), 13, 6)
    sizes = cuts if sum(cuts) else [1]
    whole, apart = numbers([batch], True), numbers(list(batch.split(sizes)), one_loss)
    assert apart[0] == pytest.approx(whole[0], rel=1e-5)
    assert vars(apart[1]) == pytest.approx(vars(whole[1]), rel=1e-4)


def test_layers_that_can_have_no_entropy_dilute_nothing() -> None:
    """Neither the mean, nor the weight of the others: 1 x 1 maps beside larger ones."""
    found = []
    for layers in (["0"], ["0", "2"]):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(3, 6, 3), nn.AdaptiveAvgPool2d(1), nn.Conv2d(6, 6, 1)).double()
        optimizer = wrapped(model, layers)
        with (
            pytest.warns(UserWarning, match="can have no entropy") if len(layers) > 1 else pytest.MonkeyPatch.context()
        ):
            optimizer.backward(model(torch.randn(2, 3, 6, 6).double()).square().mean())
        optimizer.step()
        assert optimizer.metrics is not None
        found.append((optimizer.metrics.entropy, model[0].weight.grad))
    assert found[0][0] == found[1][0]
    torch.testing.assert_close(found[0][1], found[1][1])
