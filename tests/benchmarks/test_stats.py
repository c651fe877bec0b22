"""Statistics on cases whose answers are known."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats as scipy_stats

from benchmarks.evidence.stats import at_equal, compare, holm, mean_interval, swings


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


def test_at_equal_is_a_straight_line_between_points() -> None:
    assert at_equal(2.5, [3.0, 2.0], [30.0, 20.0]) == 25.0
    assert math.isnan(at_equal(3.5, [3.0, 2.0], [30.0, 20.0]))


def noise(n: int, seed: int) -> np.ndarray:  # type: ignore[type-arg]
    return np.random.default_rng(seed).normal(size=n)


def test_noise_is_no_cycle() -> None:
    """At the 5 % level, noise is called a cycle about once in twenty."""
    found = [swings(list(0.1 * noise(80, seed)), [0.1] * 80) for seed in range(40)]
    assert sum(s.p_autocorrelation < 0.05 for s in found) <= 6
    assert sum(s.p_beyond_noise < 0.05 for s in found) <= 6
    assert sum(s.p_runs < 0.05 for s in found) <= 6
    assert sum(s.reversals for s in found) / 40 < 2


def test_a_cycle_is_found_in_noise() -> None:
    time = np.arange(80)
    found = swings(list(np.sin(time / 3) + 0.2 * noise(80, 0)), [0.2] * 80)
    assert found.p_runs < 0.001
    assert found.runs < found.expected_runs / 2
    assert found.autocorrelation > 0.5
    assert found.p_autocorrelation < 0.001
    assert found.beyond_noise > 3
    assert found.reversals >= 6


def test_a_slow_drift_is_no_cycle() -> None:
    found = swings(list(np.linspace(-1, 1, 80) + 0.1 * noise(80, 1)), [0.1] * 80)
    assert found.p_autocorrelation > 0.01
    assert found.beyond_noise < 1.5
    assert found.reversals <= 1


def test_too_few_measurements_are_refused() -> None:
    with pytest.raises(ValueError, match="at least 10"):
        swings([0.1] * 5, [0.1] * 5)


def test_alignment_in_both_spaces_is_related_phase_by_phase() -> None:
    from benchmarks.evidence.alignment_spaces import relation

    pairs = [(0.1, 0.2), (0.2, 0.4), (-0.1, -0.2), (0.3, -0.6)]
    rows: list[dict[str, object]] = [
        {"phase": "memorization", "alignment": {"cosine": a}, "parameter_alignment": {"cosine": b}} for a, b in pairs
    ]
    rows.append({"phase": "compression", "alignment": {"cosine": 0.5}})  # not measured in both
    lines = relation(rows).splitlines()
    assert [line.split(" | ")[0] for line in lines[2:]] == ["| memorization", "| both"]
    assert "| 4 |" in lines[2]
    assert "75%" in lines[2]


@pytest.mark.parametrize("truth", [-0.6, 0.0, 0.6])
def test_the_cosine_of_noisy_gradients(truth: float) -> None:
    """Noise that both gradients of a micro-batch share is not taken for agreement; the error is about the scatter."""
    import torch

    from benchmarks.evidence.tasks.cycle import cross_cosine

    generator = torch.Generator().manual_seed(0)
    u, v = torch.linalg.qr(torch.randn(400, 2, generator=generator)).Q.T
    found = []
    for _ in range(60):
        shared = 0.1 * torch.randn(8, 400, generator=generator)
        found.append(cross_cosine(u + shared, truth * u + math.sqrt(1 - truth**2) * v + shared))
    cosines, errors = np.array(found).T
    assert (np.abs(cosines) <= 1).all()
    assert abs(cosines.mean() - truth * 2 / 3) < 0.05  # the noise adds half to both squared norms
    assert 0.5 < errors.mean() / cosines.std() < 2
    if truth:
        assert (np.sign(cosines) == np.sign(truth)).all()


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
