"""What the numbers of several seeds say, with scipy: paired comparisons with 95 % intervals and p-values."""

from __future__ import annotations

import math
import warnings
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray
from scipy import stats

LEVEL = 0.95
RESAMPLES = 9999
K = TypeVar("K", bound=Hashable)


@dataclass(frozen=True)
class Interval:
    """A mean over seeds. Without an interval (nan) where there are fewer than two."""

    mean: float
    low: float = math.nan
    high: float = math.nan


@dataclass(frozen=True)
class Comparison:
    """A method against another on the same seeds."""

    change: Interval
    """Of the means, relative (-0.05 is 5 % lower); a paired bootstrap."""
    difference: Interval
    """Of the means, in their unit; a paired t interval."""
    p_t: float
    """Paired t-test, two-sided; nan for fewer than two seeds."""
    p_wilcoxon: float
    """Wilcoxon signed-rank test, two-sided. It cannot be below 2 ** (1 - seeds)."""
    seeds: int


def mean_interval(values: Sequence[float]) -> Interval:
    """Mean and its t interval."""
    x = np.asarray(values, float)
    if len(x) < 2:
        return Interval(float(x.mean()))
    if np.ptp(x) == 0:
        return Interval(float(x[0]), float(x[0]), float(x[0]))
    low, high = stats.t.interval(LEVEL, len(x) - 1, loc=x.mean(), scale=stats.sem(x))
    return Interval(float(x.mean()), float(low), float(high))


def compare(values: Sequence[float], baseline: Sequence[float]) -> Comparison:
    """``values`` against ``baseline``, which are of the same seeds in the same order.

    Raises:
        ValueError: they differ in length, or are empty.
    """
    a, b = np.asarray(values, float), np.asarray(baseline, float)
    if a.shape != b.shape or a.ndim != 1 or not len(a):
        raise ValueError(f"need as many values as baseline values, found {a.shape} and {b.shape}")
    difference = mean_interval(a - b)
    change = Interval(*_relative_change(a, b))
    if len(a) < 2:
        return Comparison(change, difference, math.nan, math.nan, len(a))
    if np.ptp(a - b) == 0:  # no scatter: a test has nothing to divide by
        p = 1.0 if a[0] == b[0] else 0.0
        return Comparison(change, difference, p, 1.0 if a[0] == b[0] else 2.0 ** (1 - len(a)), len(a))
    return Comparison(
        change,
        difference,
        float(stats.ttest_rel(a, b).pvalue),
        float(stats.wilcoxon(a, b).pvalue),
        len(a),
    )


def _relative_change(a: NDArray[Any], b: NDArray[Any]) -> tuple[float, float, float]:
    """Mean of a over mean of b, less 1, with the interval of a bootstrap over pairs.

    Drawing n seeds again from n varies by sqrt((n - 1) / n) less than new seeds would, which matters for a handful:
    the interval is widened about the mean by the inverse of that.
    """
    if not (b > 0).all():
        return math.nan, math.nan, math.nan  # a ratio says nothing there

    def change(x: NDArray[Any], y: NDArray[Any], axis: int = -1) -> Any:
        return x.mean(axis=axis) / y.mean(axis=axis) - 1

    mean = float(change(a, b))
    if len(a) < 2:
        return mean, math.nan, math.nan
    if np.ptp(a / b) == 0:
        return mean, mean, mean
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", stats.DegenerateDataWarning)
        interval = stats.bootstrap(
            (a, b),
            change,
            paired=True,
            vectorized=True,
            confidence_level=LEVEL,
            n_resamples=RESAMPLES,
            method="percentile",
            rng=np.random.default_rng(0),
        ).confidence_interval
    wider = math.sqrt(len(a) / (len(a) - 1))
    low, high = (mean + wider * (bound - mean) for bound in interval)
    return mean, max(float(low), -1.0) if (a >= 0).all() else float(low), float(high)


def holm(p_values: Sequence[float]) -> list[float]:
    """p-values that hold for all of the comparisons together, in the order of ``p_values`` (Holm 1979).

    >>> holm([0.01, 0.04, 0.03])
    [0.03, 0.06, 0.06]
    """
    corrected = [0.0] * len(p_values)
    largest = 0.0
    for i, place in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        largest = max(largest, min(1.0, (len(p_values) - i) * p_values[place]))
        corrected[place] = largest
    return corrected


def corrected(compared: Mapping[K, Comparison]) -> dict[K, float]:
    """:func:`holm` of the paired t-tests of all comparisons, by name."""
    return dict(zip(compared, holm([comparison.p_t for comparison in compared.values()]), strict=True))


def over_seeds_and_text(difference: NDArray[Any]) -> Interval:
    """Mean of (seeds, pieces of text), with the interval of a bootstrap that draws both again: seeds of training, and
    pieces of the held-out text, which all seeds share. Widened for few seeds, as that of `compare`."""
    d = difference
    mean = float(d.mean())
    if len(d) < 2:
        return Interval(mean)
    rng = np.random.default_rng(0)
    seeds, pieces = (rng.multinomial(n, np.full(n, 1 / n), size=RESAMPLES) / n for n in d.shape)
    means = np.einsum("rs,sp,rp->r", seeds, d, pieces)
    wider = math.sqrt(len(d) / (len(d) - 1))
    low, high = (mean + wider * (bound - mean) for bound in np.quantile(means, [(1 - LEVEL) / 2, (1 + LEVEL) / 2]))
    return Interval(mean, float(low), float(high))
