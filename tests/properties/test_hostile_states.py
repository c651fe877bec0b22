"""Every entry of a real state dict against a list of hostile values: refused as a whole by name, or gone on from."""

from __future__ import annotations

import itertools

import pytest

from .hostile_states import RUNS, Walk, cases


def walked(kind: str, *, fresh: bool, steps: int, first: int = 0, every: int = 1) -> Walk:
    walk = Walk(kind, fresh=fresh, steps=steps)
    for case in itertools.islice(cases(walk.saved), first, None, every):
        walk.load(case)
    return walk


@pytest.mark.parametrize("fresh", [False, True], ids=["used", "fresh"])
@pytest.mark.parametrize("kind", RUNS)
def test_some_hostile_dictionaries(kind: str, fresh: bool) -> None:
    walk = walked(kind, fresh=fresh, steps=3, first=11 + 40 * fresh, every=97)
    assert walk.faults == []
    assert walk.counts["refused"] > 10
    assert walk.counts["accepted"] > 0


@pytest.mark.slow
@pytest.mark.parametrize("fresh", [False, True], ids=["used", "fresh"])
@pytest.mark.parametrize("kind", RUNS)
def test_every_hostile_dictionary(kind: str, fresh: bool) -> None:
    walk = walked(kind, fresh=fresh, steps=30)
    assert walk.faults == []
    assert walk.counts["dictionaries"] > 702
    print(f"{kind}, {'fresh' if fresh else 'used'}: {dict(walk.counts)}")
