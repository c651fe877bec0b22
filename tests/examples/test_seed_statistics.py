"""Intervals that cover, and changes that pair seeds."""

from __future__ import annotations

import json

import numpy as np
from seed_statistics import compare, relative, summarize, table


def test_the_interval_covers_the_true_mean() -> None:
    generator = np.random.default_rng(1)
    intervals = [summarize(generator.normal(3.0, 1.0, size=10).tolist())["ci95"] for _ in range(150)]
    covered = np.mean([low <= 3.0 <= high for low, high in intervals])
    assert 0.88 <= covered <= 0.99


def test_the_interval_of_a_change_covers_it() -> None:
    generator = np.random.default_rng(2)
    covered = 0
    for _ in range(150):
        plain = generator.normal(2.0, 0.4, size=10)  # seeds differ much, and methods share them
        change = relative((plain * 0.9 + generator.normal(0, 0.02, size=10)).tolist(), plain.tolist())
        assert change is not None
        low, high = change["ci95"]
        assert high - low < 0.05
        covered += low <= -0.1 <= high
    assert 0.88 <= covered / 150 <= 0.99


def test_pairs_of_the_same_values_do_not_differ() -> None:
    assert relative([1.0, 2.0, 3.0], [1.0, 2.0, 3.0]) == {"mean": 0.0, "ci95": [0.0, 0.0], "values": [0.0] * 3}


def test_one_seed_has_no_interval() -> None:
    assert summarize([2.0]) == {"mean": 2.0, "ci95": None, "values": [2.0]}
    change = relative([1.0], [2.0])
    assert change is not None
    assert (change["mean"], change["ci95"]) == (-0.5, None)


def test_nothing_falls_by_more_than_all_of_it() -> None:
    """Few seeds that differ much: the widened interval would go below -100 %."""
    change = relative([0.001, 0.1], [0.1, 0.1])
    assert change is not None
    assert change["ci95"][0] == -1.0
    signed = relative([-0.5, 0.1], [0.1, 0.1])
    assert signed is not None
    assert signed["ci95"][0] < -1.0


def test_there_is_no_ratio_to_nothing() -> None:
    assert relative([1.0, 2.0], [0.0, 0.0]) is None
    assert relative([1.0, 2.0], [-1.0, 0.5]) is None


def test_intervals_are_the_same_every_time() -> None:
    values = [1.0, 2.0, 4.0]
    assert summarize(values) == summarize(values)


def test_the_table_shows_changes_and_intervals() -> None:
    runs = {"plain": [{"x": 1.0}, {"x": 2.0}], "gapt": [{"x": 0.5}, {"x": 1.0}]}
    summaries, changes = compare(runs, ["x"])
    lines = table(summaries, changes, ["x"]).splitlines()
    assert lines[0] == "| | plain | gapt |"
    assert lines[2] == "| x | 1.5 | 0.75 (-50.0%; -50.0% to -50.0%) |"
    assert json.loads(json.dumps(changes)) == changes
