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


@pytest.mark.parametrize(
    ("path", "how"),
    [
        (("param_groups", 0, "amsgrad"), "= True"),  # a step would ask for moments that were not saved
        (("param_groups", 0, "foreach"), "= tensor([])"),
        (("param_groups", 0, "betas", 0), "= True"),
        (("param_groups", 0, "weight_decay"), "= None"),
        (("param_groups", 0, "eps"), f"= {str(10**400)[:60]}"),
        (("state", 3, "step"), "= -1"),
        (("state", 3, "exp_avg"), "= None"),
        (("state", 3, "exp_avg"), "removed"),
        (("state", 3, "exp_avg"), "another shape"),
        (("gapt", "unjudged_validation"), "= [1e+308, 1e+308]"),  # whose sum is no float
    ],
)
@pytest.mark.parametrize("fresh", [False, True], ids=["used", "fresh"])
def test_what_was_once_taken_and_failed_later(path: tuple[str | int, ...], how: str, fresh: bool) -> None:
    walk = Walk("memorization", fresh=fresh, steps=3)
    (case,) = (case for case in cases(walk.saved) if case.path == path and case.how == how)
    walk.load(case)
    assert walk.faults == []


@pytest.mark.slow
@pytest.mark.parametrize("fresh", [False, True], ids=["used", "fresh"])
@pytest.mark.parametrize("kind", RUNS)
def test_every_hostile_dictionary(kind: str, fresh: bool) -> None:
    walk = walked(kind, fresh=fresh, steps=30)
    assert walk.faults == []
    assert walk.counts["dictionaries"] > 702
    print(f"{kind}, {'fresh' if fresh else 'used'}: {dict(walk.counts)}")
