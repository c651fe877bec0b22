"""Statistics on cases whose answers are known."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats as scipy_stats

from benchmarks.evidence.stats import compare, holm, mean_interval, over_seeds_and_text


def test_mean_interval_is_the_t_interval() -> None:
    interval = mean_interval([1.0, 2.0, 3.0, 4.0])
    half = 3.182446 * math.sqrt(5 / 3) / 2  # t quantile of 3 degrees of freedom, from a table
    assert interval.mean == 2.5
    assert interval.high - interval.mean == pytest.approx(half, rel=1e-5)
    assert interval.mean - interval.low == pytest.approx(half, rel=1e-5)


def test_pairs_take_out_what_seeds_share() -> None:
    """Seeds differ by 10, the method by 0.1: only a paired comparison sees it."""
    baseline = [1.0, 11.0, 21.0, 31.0, 41.0]
    values = [b + 0.1 + 0.01 * (-1) ** i for i, b in enumerate(baseline)]
    c = compare(values, baseline)
    assert c.p_t < 0.001
    assert c.difference.low < 0.1 < c.difference.high
    assert scipy_stats.ttest_ind(values, baseline).pvalue > 0.9


def test_wilcoxon_of_five_seeds_cannot_be_smaller_than_it_says() -> None:
    assert compare([1.1, 2.2, 3.3, 4.4, 5.5], [1.0, 2.0, 3.0, 4.0, 5.0]).p_wilcoxon == pytest.approx(2 ** (1 - 5))


def test_equal_runs_do_not_differ() -> None:
    c = compare([1.0, 2.0, 3.0], [1.0, 2.0, 3.0])
    assert (c.change.mean, c.change.low, c.change.high) == (0.0, 0.0, 0.0)
    assert c.p_t == 1.0


def test_one_seed_has_no_interval() -> None:
    c = compare([1.1], [1.0])
    assert c.change.mean == pytest.approx(0.1)
    assert math.isnan(c.change.low)
    assert math.isnan(c.p_t)


def test_other_seeds_are_refused() -> None:
    with pytest.raises(ValueError, match="as many"):
        compare([1.0, 2.0], [1.0])


@settings(max_examples=5, deadline=None)
@given(
    st.lists(st.tuples(st.floats(0.5, 2.0), st.floats(0.5, 2.0)), min_size=3, max_size=8),
    st.floats(0.1, 10.0),
)
def test_a_relative_change_has_no_unit(pairs: list[tuple[float, float]], unit: float) -> None:
    a, b = (list(column) for column in zip(*pairs, strict=True))
    one, other = compare(a, b), compare([unit * x for x in a], [unit * x for x in b])
    assert one.change.mean == pytest.approx(other.change.mean, abs=1e-9)
    assert one.change.low == pytest.approx(other.change.low, abs=1e-6)
    assert one.change.low - 1e-9 <= one.change.mean <= one.change.high + 1e-9


def test_the_interval_of_a_change_covers_as_often_as_it_says() -> None:
    """Of 100 experiments of 6 seeds, about 95 % hold the true change; a bootstrap of few seeds falls a little short."""
    generator = np.random.default_rng(0)
    held = 0
    for _ in range(100):
        b = generator.normal(2.0, 0.2, 6)
        a = 1.1 * b + generator.normal(0.0, 0.1, 6)
        change = compare(list(a), list(b)).change
        held += change.low <= 0.1 <= change.high
    assert 0.86 <= held / 100 <= 0.99


def test_an_interval_over_seeds_and_text_holds_both() -> None:
    generator = np.random.default_rng(0)
    of_seed, of_piece = generator.normal(0, 1.0, (6, 1)), generator.normal(0, 1.0, (1, 30))
    halves = []
    for d in (of_seed + 0 * of_piece, 0 * of_seed + of_piece, of_seed + of_piece):
        interval = over_seeds_and_text(d)
        assert interval.mean == pytest.approx(d.mean())
        assert interval.low < d.mean() < interval.high
        halves.append((interval.high - interval.low) / 2)
    assert halves[0] == pytest.approx(1.96 * of_seed.std(ddof=1) / math.sqrt(6), rel=0.1)
    assert halves[1] == pytest.approx(1.96 * of_piece.std() / math.sqrt(30) * math.sqrt(6 / 5), rel=0.1)
    assert halves[2] == pytest.approx(math.hypot(*halves[:2]), rel=0.1)


def test_one_seed_has_no_interval_over_text() -> None:
    assert math.isnan(over_seeds_and_text(np.array([[1.0, 2.0]])).low)


@pytest.mark.parametrize("p", [[0.01, 0.04, 0.03], [0.5], [], [0.2, 0.001, 0.2, 0.9, 0.012]])
@pytest.mark.parametrize("level", [0.005, 0.02, 0.06, 0.5])
def test_holm_rejects_what_its_steps_reject(p: list[float], level: float) -> None:
    """Smallest first, each against level over how many are left, until one is not below."""
    rejected = set()
    for left, place in zip(range(len(p), 0, -1), sorted(range(len(p)), key=p.__getitem__), strict=True):
        if p[place] > level / left:
            break
        rejected.add(place)
    assert {i for i, corrected in enumerate(holm(p)) if corrected <= level} == rejected


def test_holm_of_known_values() -> None:
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.9, 0.8]) == [1.0, 1.0]
