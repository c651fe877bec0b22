"""Data that change: does a floor under the entropy keep a network trainable, alone and on top of known remedies?"""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

from .. import harness
from ..harness import Record, Run
from ..tasks.trainability import Settings

NAME = "trainability"
TUNING_SEEDS = (0, 1, 2)
SEEDS = range(300, 310)
MOVES = 4
"""Of the fine search, at most."""

_WHOLE: Any = None
"""Window: the whole batch, or sequence, as one matrix."""
SETTINGS = {
    "digits": Settings(setting="digits", tasks=20, steps=800, window=_WHOLE),
    "alphabets": Settings(setting="alphabets", tasks=5, steps=250, batch=16, width=32, window=_WHOLE),
    "warm": Settings(setting="warm", tasks=2, steps=800, samples=200, window=_WHOLE),
}
RATES = {"digits": (-5, -4), "alphabets": (-4,), "warm": (-5, -4)}
"""Levels of the learning rate in the coarse search."""
SCORES = {"digits": "accuracy", "alphabets": "loss", "warm": "accuracy"}
FLOOR = {"direction": "up", "target_share": 1.0}


@dataclass(frozen=True)
class Method:
    """A way to train, and what of it is tuned beside the learning rate."""

    fields: dict[str, Any] = field(default_factory=dict)
    tuned: str | None = None
    first: int = 0
    """Level of the smallest value in the coarse search, which has four, a decade apart."""
    most: int | None = None
    """The largest level that has a meaning."""
    rate: int | None = None
    """Level of the learning rate, where it is not tuned."""


def remedy(name: str, first: int, most: int | None = None) -> Method:
    """One that is known."""
    return Method({"remedy": name}, "strength", first, most)


def pressing(press: str, objective: dict[str, Any], **more: Any) -> Method:
    """One that presses the entropy."""
    return Method({"method": "penalty", "press": press, "objective": objective, **more}, "weight", -2)


REMEDIES = {
    "weight decay": remedy("weight decay", -4),
    "toward start": remedy("toward start", -8),
    "shrink and perturb": remedy("shrink and perturb", -6, 0),
    "continual backpropagation": remedy("continual backpropagation", -8, -2),
    "spectral": remedy("spectral", -8),
    "vcreg": remedy("vcreg", -6),
}
TOLD = ("shrink and perturb",)
"""Remedies that are told where the data change."""
METHODS = {
    "plain": Method({"norm": False}),
    "LayerNorm": Method(),
    "fresh": Method({"fresh": True}),
    **REMEDIES,
    "floor": pressing("floor", FLOOR),
    "floor, order 1/2": pressing("floor", FLOOR, alpha=0.5),
}
FLOORS = ("floor", "floor, order 1/2")
"""What is tried on top of remedies."""
CONTROLS = {
    "up": pressing("up", {"direction": "up"}),
    "down": pressing("down", {}),
    "noise": pressing("noise", FLOOR),
    "rank": pressing("rank", {"direction": "up"}),
    "floor, windows of 8": pressing("floor", FLOOR, window=8),
}
"""Tuned over the weight alone, at the floor's learning rate."""
SLOW = ("floor, order 1/2", "rank", "floor, windows of 8")
LEFT_OUT: dict[str, tuple[str, ...]] = {
    "digits": ("fresh",),
    "alphabets": ("plain", "fresh", "vcreg", "continual backpropagation", *SLOW),
    "warm": ("vcreg", "spectral", "continual backpropagation", *SLOW, *CONTROLS),
}
"""Methods that a setting does without."""

Point = tuple[int, int]
"""Levels of the learning rate and of what else is tuned."""


def at(level: int) -> float:
    """1 or 3 times a power of ten: half a decade from one level to the next."""
    return float(f"{3 if level % 2 else 1}e{level // 2}")


def level_of(value: float) -> int:
    """The level of a value."""
    mantissa, exponent = f"{value:e}".split("e")
    return 2 * int(exponent) + (float(mantissa) > 2)


def run_at(setting: str, method: Method, point: Point, seed: int) -> Run:
    """Of a method with its settings at a point."""
    tuned = {} if method.tuned is None else {method.tuned: at(point[1])}
    changes = {**method.fields, "lr": at(point[0]), **tuned, "seed": seed, "keep_curve": seed in SEEDS}
    return Run("trainability", replace(SETTINGS[setting], **changes))


class Tuned(NamedTuple):
    """How far the search of a method is."""

    runs: list[Run]
    """All that it has asked for, those that are there included."""
    best: Point | None
    """None while it goes on."""
    inside: bool
    """No neighbour of the best is better."""


Scores = Mapping[str, float]
"""By the settings of a run; higher is better."""


def tune(setting: str, method: Method, scores: Scores) -> Tuned:
    """Coarse on the first tuning seed, then uphill from its best in half decades, on all of them, until the middle of
    a cross of five points is its best."""
    strengths = [0] if method.tuned is None else [method.first + 2 * i for i in range(4)]
    rates = RATES[setting] if method.rate is None else (method.rate,)
    coarse = [(rate, strength) for rate in rates for strength in strengths]
    runs = [run_at(setting, method, point, TUNING_SEEDS[0]) for point in coarse]
    if not all(_key(run) in scores for run in runs):
        return Tuned(runs, None, False)
    middle = max(coarse, key=lambda point: scores[_key(run_at(setting, method, point, TUNING_SEEDS[0]))])
    for _ in range(MOVES):
        cross = [middle, *_neighbours(middle, method)]
        of_points = {point: [run_at(setting, method, point, seed) for seed in TUNING_SEEDS] for point in cross}
        runs += [run for of_point in of_points.values() for run in of_point]
        if not all(_key(run) in scores for run in runs):
            return Tuned(runs, None, False)
        best = max(cross, key=lambda point: statistics.fmean(scores[_key(run)] for run in of_points[point]))
        if best == middle:
            return Tuned(runs, middle, True)
        middle = best
    return Tuned(runs, middle, False)


def _neighbours(point: Point, method: Method) -> list[Point]:
    rate, strength = point
    found = [(rate - 1, strength), (rate + 1, strength)] if method.rate is None else []
    if method.tuned is not None:
        found += [(rate, strength - 1), (rate, strength + 1)]
    return [p for p in found if method.most is None or p[1] <= method.most]


def _key(run: Run) -> str:
    return json.dumps(run.described, sort_keys=True)


def scores_of(records: Sequence[Record]) -> dict[str, float]:
    """Of each run; higher is better."""
    found = {}
    for record in records:
        name = SCORES[record.settings["setting"]]
        value = record.result["final"][name]
        found[json.dumps(record.settings, sort_keys=True)] = value if name == "accuracy" else -value
    return found


class Plan(NamedTuple):
    """What one setting needs, as far as its results tell."""

    methods: dict[str, Method]
    tuned: dict[str, Tuned]


def plan(setting: str, scores: Scores) -> Plan:
    """Tune each method; when the remedies are tuned, also the floor on top of the best of them, and on top of the
    best that is not told where the data change; when the floor is tuned, also its controls."""
    methods = {name: method for name, method in METHODS.items() if name not in LEFT_OUT[setting]}
    tuned = {name: tune(setting, method, scores) for name, method in methods.items()}
    later = {}
    for name in best_remedies(setting, tuned, scores):
        point = tuned[name].best
        assert point is not None
        for floor in (f for f in FLOORS if f in methods):
            fields = {**METHODS[floor].fields, **REMEDIES[name].fields, "strength": at(point[1])}
            later[f"{floor} on {name}"] = replace(METHODS[floor], fields=fields)
    at_floor = tuned["floor"].best
    if at_floor is not None:
        controls = {name: method for name, method in CONTROLS.items() if name not in LEFT_OUT[setting]}
        later |= {name: replace(method, rate=at_floor[0]) for name, method in controls.items()}
    tuned |= {name: tune(setting, method, scores) for name, method in later.items()}
    return Plan(methods | later, tuned)


def best_remedies(setting: str, tuned: Mapping[str, Tuned], scores: Scores) -> list[str]:
    """The best on the tuning seeds, and the best that is not told where the data change; none before they are tuned."""
    found: dict[str, float] = {}
    for name, method in REMEDIES.items():
        if name in LEFT_OUT[setting]:
            continue
        point = tuned[name].best
        if point is None:
            return []
        keys = [_key(run_at(setting, method, point, seed)) for seed in TUNING_SEEDS]
        found[name] = statistics.fmean(scores[key] for key in keys)
    untold = {name: score for name, score in found.items() if name not in TOLD}
    return list(dict.fromkeys((max(found, key=found.__getitem__), max(untold, key=untold.__getitem__))))


def runs(first_look: bool, seeds: Sequence[int] | None) -> list[Run]:
    """What is known to be needed: each call of the whole goes on from the results that are there, until tuning has
    ended. First look: each method in the middle of its coarse search."""
    found: list[Run] = []
    if first_look:
        for setting in SETTINGS:
            for name, method in {**METHODS, **CONTROLS}.items():
                if name not in LEFT_OUT[setting]:
                    point = (RATES[setting][-1], method.first + 4)
                    found += [run_at(setting, method, point, seed) for seed in seeds or SEEDS[:3]]
        return found
    scores = scores_of(_records())
    for setting in SETTINGS:
        methods, tuned = plan(setting, scores)
        for name, state in tuned.items():
            found += state.runs
            if state.best is not None:
                found += [run_at(setting, methods[name], state.best, seed) for seed in seeds or SEEDS]
    return found


def _records() -> list[Record]:
    there = (harness.RESULTS / f"{NAME}.json").exists()
    return harness.read_results(NAME) if there else []


def tables(records: list[Record]) -> dict[str, str]:
    """None yet."""
    return {}


def pictures(records: list[Record], folder: Path) -> list[Path]:
    """None yet."""
    return []
