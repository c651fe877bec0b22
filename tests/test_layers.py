"""Schedules, reductions and skipping, against the values that their descriptions promise."""

from __future__ import annotations

import pytest
import torch
from gapt_optim._objective.layers import REDUCTIONS, SCHEDULES, counted_layers, reduction_coefficients, schedule_shares

from tests.reference import REFERENCE_REDUCTIONS, REFERENCE_SHARES

schedules = pytest.mark.parametrize("name", SCHEDULES)
reductions = pytest.mark.parametrize("name", REDUCTIONS)
depths = pytest.mark.parametrize("n", [1, 2, 3, 4, 5, 8, 13])


@depths
@schedules
def test_shares_are_shares(name: str, n: int) -> None:
    for step in range(40):
        shares = schedule_shares(name, n, step, 3)
        assert len(shares) == n
        assert min(shares) >= 0
        assert sum(shares) == pytest.approx(1)
        assert shares == pytest.approx(REFERENCE_SHARES[name](n, step, 3))


@depths
@schedules
def test_every_layer_has_its_turn(name: str, n: int) -> None:
    pressed = {i for step in range(3 * n) for i, share in enumerate(schedule_shares(name, n, step, 3)) if share > 0}
    assert pressed == set(range(n))


@pytest.mark.parametrize(
    ("name", "step", "weights"),
    [
        ("all", 7, [1, 1, 1, 1, 1]),
        ("rotate", 0, [1, 0, 0, 0, 0]),
        ("rotate", 6, [0, 1, 0, 0, 0]),
        ("alternate", 0, [1, 0, 1, 0, 1]),
        ("alternate", 1, [0, 1, 0, 1, 0]),
        ("blocks", 0, [1, 1, 0, 0, 0]),
        ("blocks", 9, [1, 1, 0, 0, 0]),
        ("blocks", 10, [0, 0, 1, 1, 0]),
        ("blocks", 20, [0, 0, 0, 0, 1]),
        ("blocks", 30, [1, 1, 0, 0, 0]),
        ("progressive", 0, [0, 0, 0, 0, 1]),
        ("progressive", 10, [0, 0, 0, 1, 1]),
        ("progressive", 1000, [1, 1, 1, 1, 1]),
        ("valley", 0, [1, 2, 3, 2, 1]),
        ("valley", 0, [1, 2, 2, 1]),
        ("mountain", 0, [3, 2, 1, 2, 3]),
        ("mountain", 0, [2, 1, 1, 2]),
        ("mountain", 0, [1]),
        ("slope", 0, [1, 2, 3, 4, 5]),
    ],
)
def test_shape_of_each_schedule(name: str, step: int, weights: list[int]) -> None:
    shares = schedule_shares(name, len(weights), step, 10)
    assert shares == pytest.approx([weight / sum(weights) for weight in weights])


@pytest.mark.parametrize(
    ("name", "entropies", "expected"),
    [
        ("mean", [1.0, 3.0, 2.0, 4.0], 2.5),
        ("max", [1.0, 3.0, 2.0, 4.0], 4.0),
        ("min", [2.0, 3.0, 1.0, 4.0], 1.0),
        ("largest_drop", [4.0, 3.5, 1.0, 0.5], 1.0),
        ("largest_drop", [1.0, 2.0, 4.0], 2.0),  # the smallest rise, where nothing falls
        ("largest_drop", [3.0], 3.0),
    ],
)
def test_value_of_each_reduction(name: str, entropies: list[float], expected: float) -> None:
    values = torch.tensor(entropies)
    shares = torch.full_like(values, 1 / len(values))
    assert float((reduction_coefficients(name, values, shares) * values).sum()) == pytest.approx(expected)


@depths
@reductions
def test_coefficients_are_the_gradient(name: str, n: int) -> None:
    for _ in range(20):
        entropies = torch.rand(n, dtype=torch.float64, requires_grad=True)
        value = REFERENCE_REDUCTIONS[name](list(entropies.unbind()))
        (gradient,) = torch.autograd.grad(value, entropies)
        shares = torch.full((n,), 1 / n, dtype=torch.float64)
        coefficients = reduction_coefficients(name, entropies.detach(), shares)
        torch.testing.assert_close(coefficients, gradient)
        torch.testing.assert_close((coefficients * entropies.detach()).sum(), value.detach())
        assert value >= 0


@pytest.mark.parametrize(("name", "expected"), [("mean", 1.75), ("max", 2.0), ("min", 1.0)])
def test_layers_without_a_share_take_no_part(name: str, expected: float) -> None:
    entropies, shares = torch.tensor([0.5, 1.0, 2.0, 4.0]), torch.tensor([0, 0.25, 0.75, 0])
    coefficients = reduction_coefficients(name, entropies, shares)
    assert float((coefficients * entropies).sum()) == pytest.approx(expected)
    assert (coefficients[shares == 0] == 0).all()


@pytest.mark.parametrize(
    ("n", "first", "last", "expected"),
    [
        (5, 0, 0, [True] * 5),
        (5, 1, 0, [False, True, True, True, True]),
        (5, 0, 2, [True, True, True, False, False]),
        (5, 2, 2, [False, False, True, False, False]),
        (4, 2, 2, [True] * 4),
        (1, 3, 0, [True]),
    ],
)
def test_skipping_applies_only_where_it_leaves_a_layer(n: int, first: int, last: int, expected: list[bool]) -> None:
    names = [f"h.{i}" for i in range(n)]
    assert counted_layers(names, first, last) == [name for name, kept in zip(names, expected, strict=True) if kept]
