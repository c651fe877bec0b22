"""Data that change: does a floor under the entropy keep a network trainable, alone and on top of known remedies?"""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

from .. import harness
from ..harness import Record, Run
from ..markdown import interval_cell, mean_cell, p_cell, seeds_line, table, values, versus
from ..stats import Comparison, holm
from ..tasks.trainability import Settings

NAME = "trainability"
TUNING_SEEDS = (0, 1, 2)
SEEDS = range(300, 310)
MORE_SEEDS = {"poles": range(300, 320)}
"""Of a setting whose scores vary so much from seed to seed that ten tell little."""
MOVES = 4
"""Of the fine search, at most."""

SETTINGS = {
    "digits": Settings(setting="digits", tasks=20, steps=800),
    "alphabets": Settings(setting="alphabets", tasks=5, steps=250, batch=16, width=32),
    "warm": Settings(setting="warm", tasks=2, steps=800, samples=200),
    "poles": Settings(setting="poles", tasks=10, steps=1200, batch=256),
}
RATES = {"digits": (-5, -4), "alphabets": (-4,), "warm": (-5, -4), "poles": (-5,)}
"""Levels of the learning rate in the coarse search."""
SCORES = {"digits": "accuracy", "alphabets": "loss", "warm": "accuracy", "poles": "return"}
DIGITS = {"poles": 1}
"""Behind the point, of a score; 4 where nothing is said."""
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
LEFT_OUT: dict[str, tuple[str, ...]] = {
    "digits": ("fresh",),
    "alphabets": ("plain", "floor, order 1/2", *CONTROLS),
    "warm": ("plain", "floor, order 1/2", *CONTROLS),
    "poles": (
        *("vcreg", "up", "rank", "floor, windows of 8"),
        *(f"floor, order 1/2 on {name}" for name in REMEDIES if name != "toward start"),
    ),
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
    tuned: dict[str, Any] = {} if method.tuned is None else {method.tuned: at(point[1])}
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
    a block of nine points is its best. A cross would miss the ridge of a rate and a strength that trade for another."""
    strengths = [0] if method.tuned is None else [method.first + 2 * i for i in range(4)]
    rates = RATES[setting] if method.rate is None else (method.rate,)
    coarse = [(rate, strength) for rate in rates for strength in strengths]
    runs = [run_at(setting, method, point, TUNING_SEEDS[0]) for point in coarse]
    if not all(_key(run) in scores for run in runs):
        return Tuned(runs, None, False)
    middle = max(coarse, key=lambda point: scores[_key(run_at(setting, method, point, TUNING_SEEDS[0]))])
    for _ in range(MOVES):
        block = [middle, *_neighbours(middle, method)]
        of_points = {point: [run_at(setting, method, point, seed) for seed in TUNING_SEEDS] for point in block}
        runs += [run for of_point in of_points.values() for run in of_point]
        if not all(_key(run) in scores for run in runs):
            return Tuned(runs, None, False)
        best = max(block, key=lambda point: statistics.fmean(scores[_key(run)] for run in of_points[point]))
        if best == middle:
            return Tuned(runs, middle, True)
        middle = best
    return Tuned(runs, middle, False)


def _neighbours(point: Point, method: Method) -> list[Point]:
    rates = [point[0] + step for step in ((-1, 0, 1) if method.rate is None else (0,))]
    strengths = [point[1] + step for step in ((-1, 0, 1) if method.tuned is not None else (0,))]
    found = [(rate, strength) for rate in rates for strength in strengths]
    return [p for p in found if p != point and (method.most is None or p[1] <= method.most)]


def _key(run: Run) -> str:
    return json.dumps(run.described, sort_keys=True)


def scores_of(records: Sequence[Record]) -> dict[str, float]:
    """Of each run; higher is better."""
    found = {}
    for record in records:
        name = SCORES[record.settings["setting"]]
        value = record.result["final"][name]
        found[json.dumps(record.settings, sort_keys=True)] = -value if name == "loss" else value
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
        for floor in FLOORS:
            fields = {**METHODS[floor].fields, **REMEDIES[name].fields, "strength": at(point[1])}
            if floor in methods and f"{floor} on {name}" not in LEFT_OUT[setting]:
                later[f"{floor} on {name}"] = replace(METHODS[floor], fields=fields)
    at_floor = tuned["floor"].best
    if at_floor is not None:
        controls = {name: method for name, method in CONTROLS.items() if name not in LEFT_OUT[setting]}
        later |= {name: replace(method, rate=at_floor[0]) for name, method in controls.items()}
    tuned |= {name: tune(setting, method, scores) for name, method in later.items()}
    return Plan(methods | later, tuned)


def best_remedies(setting: str, tuned: Mapping[str, Tuned], scores: Scores) -> list[str]:
    """The best on the tuning seeds, the best that is not told where the data change, and L2 toward the initial weights,
    so that settings can be compared; none before they are tuned."""
    found: dict[str, float] = {}
    for name, method in REMEDIES.items():
        if name in LEFT_OUT[setting]:
            continue
        point = tuned[name].best
        if point is None:
            return []
        keys = [_key(run_at(setting, method, point, seed)) for seed in TUNING_SEEDS]
        found[name] = statistics.fmean(scores[key] for key in keys)
    if not found:
        return []
    untold = {name: score for name, score in found.items() if name not in TOLD}
    best = (max(found, key=found.__getitem__), max(untold, key=untold.__getitem__))
    return list(dict.fromkeys((*best, "toward start")))


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
                found += [
                    run_at(setting, methods[name], state.best, seed) for seed in seeds or MORE_SEEDS.get(setting, SEEDS)
                ]
    return found


def _records() -> list[Record]:
    there = (harness.RESULTS / f"{NAME}.json").exists()
    return harness.read_results(NAME) if there else []


def name_of(settings: Mapping[str, Any]) -> str:
    """Of the method with these settings."""
    press = settings["press"]
    if press == "floor" and settings["alpha"] == 0.5:
        press = "floor, order 1/2"
    elif press == "floor" and settings["window"] is not None:
        press = "floor, windows of 8"
    if settings["remedy"] == "none" and press == "none":
        return "fresh" if settings["fresh"] else "LayerNorm" if settings["norm"] else "plain"
    if settings["remedy"] == "none":
        return str(press)
    return settings["remedy"] if press == "none" else f"{press} on {settings['remedy']}"


Compared = dict[str, list[Record]]
"""Records of the seeds that are not tuned on, by method."""


def compared(records: Sequence[Record], setting: str) -> Compared:
    """Of one setting, in the order of `METHODS`, remedies with a floor behind them, controls last."""
    found: Compared = {}
    for record in records:
        if record.settings["setting"] == setting and record.settings["seed"] not in TUNING_SEEDS:
            found.setdefault(name_of(record.settings), []).append(record)
    order = [*METHODS, *(f"{floor} on {name}" for name in REMEDIES for floor in FLOORS), *CONTROLS]
    return {name: found[name] for name in order if name in found}


def tables(records: list[Record]) -> dict[str, str]:
    """All methods on fresh seeds; the questions, with p-values corrected for their number; grids."""
    by_setting = {setting: compared(records, setting) for setting in SETTINGS}
    by_setting = {setting: found for setting, found in by_setting.items() if found}
    if not by_setting:
        return {}
    return {
        f"{NAME}-methods": _methods_table(by_setting),
        f"{NAME}-ranks": _ranks_table(by_setting),
        f"{NAME}-questions": _questions_table(by_setting),
        f"{NAME}-tuned": _grids_table(records, by_setting),
    }


def _methods_table(by_setting: Mapping[str, Compared]) -> str:
    header = ["method", *(f"{setting}: {SCORES[setting]}" for setting in by_setting)]

    def cell(setting: str, records: list[Record]) -> str:
        return mean_cell(records, SCORES[setting], digits=DIGITS.get(setting, 4))

    seeds: dict[str, list[str]] = {}
    for setting, found in by_setting.items():
        seeds.setdefault(seeds_line([r for records in found.values() for r in records]), []).append(setting)
    listed = "; ".join(f"{', '.join(of_settings)}: {line}" for line, of_settings in seeds.items())
    first = (
        f"Held out, mean over tasks (of warm: at the end); {listed}. Of losses (nats) lower is better, of the rest "
        "higher. Behind a mean stands half of its 95 % interval; differences over paired seeds are below.\n\n"
    )
    return first + table(header, _by_method(by_setting, cell))


def _ranks_table(by_setting: Mapping[str, Compared]) -> str:
    def cell(setting: str, records: list[Record]) -> str:
        rank, dormant = (statistics.fmean(values(records, name)) for name in ("rank", "dormant"))
        return f"{rank:.1f}, {100 * dormant:.0f} %"

    text = table(["method", *by_setting], _by_method(by_setting, cell))
    return (
        "<details>\n<summary>Effective rank and dormant units, mean over hidden layers</summary>\n\n"
        f"{text}\n\n</details>"
    )


def _by_method(by_setting: Mapping[str, Compared], cell: Callable[[str, list[Record]], str]) -> list[list[str]]:
    names = dict.fromkeys(name for found in by_setting.values() for name in found)
    return [
        [name, *(cell(setting, found[name]) if name in found else "" for setting, found in by_setting.items())]
        for name in names
    ]


def _versus(found: Compared, name: str, other: str, score: str) -> Comparison | None:
    return versus(found[name], found[other], score) if name in found and other in found else None


def questions(found: Compared) -> list[tuple[str, str]]:
    """Pairs of methods that are compared in a setting: the floor alone, on top of remedies, and its controls."""
    remedied = [name.split(" on ") for name in found if " on " in name]
    pairs = [("floor", "LayerNorm"), ("floor, order 1/2", "LayerNorm")]
    pairs += [(f"{floor} on {name}", name) for floor, name in remedied]
    pairs += [("floor", name) for floor, name in remedied if floor == "floor"]
    pairs += [("floor", "floor, order 1/2"), *(("floor", control) for control in CONTROLS)]
    pairs += [("LayerNorm", "fresh"), ("floor", "fresh")]
    return [(a, b) for a, b in pairs if a in found and b in found]


def _questions_table(by_setting: Mapping[str, Compared]) -> str:
    asked = []
    for setting, found in by_setting.items():
        for name, other in questions(found):
            comparison = _versus(found, name, other, SCORES[setting])
            if comparison is not None and comparison.seeds > 1:
                asked.append((setting, name, other, comparison))
    corrected = holm([comparison.p_t for *_, comparison in asked])
    header = ["setting", "method", "against", "difference", "p", "p, corrected"]
    rows = [
        [
            *(setting, name, other, interval_cell(comparison.difference, DIGITS.get(setting, 4))),
            *(p_cell(comparison.p_t), p_cell(p)),
        ]
        for (setting, name, other, comparison), p in zip(asked, corrected, strict=True)
    ]
    first = (
        f"The questions: {len(asked)} comparisons, p-values of paired t-tests, corrected by Holm for all of them.\n\n"
    )
    return first + table(header, rows, text_columns=3)


def _grids_table(records: Sequence[Record], by_setting: Mapping[str, Compared]) -> str:
    scores = scores_of(records)
    header = ["setting", "method", "tuning runs", "learning rates", "strengths or weights", "chosen", "optimum"]
    rows = []
    for setting, found in by_setting.items():
        tuned = plan(setting, scores).tuned
        for name, of_method in found.items():
            tried = [
                r.settings
                for r in records
                if r.settings["setting"] == setting and r.settings["seed"] in TUNING_SEEDS
                and name_of(r.settings) == name
            ]  # fmt: skip
            chosen = of_method[0].settings
            varied = "weight" if chosen["press"] != "none" else "strength"
            settled = name in tuned and tuned[name].best is not None
            rows.append(
                [
                    setting,
                    name,
                    str(len(tried)),
                    _listed(s["lr"] for s in tried),
                    _listed(s[varied] for s in tried if s[varied]),
                    f"{chosen['lr']:g}" + (f", {chosen[varied]:g}" if chosen[varied] else ""),
                    "" if not settled else "inside" if tuned[name].inside else "at an edge",
                ]
            )
    text = table(header, rows, text_columns=2)
    return f"<details>\n<summary>What was tuned, on seeds 0 to 2</summary>\n\n{text}\n\n</details>"


def _listed(values: Iterable[float]) -> str:
    return ", ".join(f"{value:g}" for value in sorted(set(values)))


COLORS = {
    "LayerNorm": "#6b6b6b",
    "fresh": "#b5483a",
    "toward start": "#d1741f",
    "floor": "#3b6fc4",
    "floor on toward start": "#2f9e77",
}
"""Of the methods that are drawn."""


def pictures(records: list[Record], folder: Path) -> list[Path]:
    """Over tasks, a row per setting that has many: what is held out, effective rank, dormant units."""
    from ..pictures import band, figure, save

    rows = {setting: compared(records, setting) for setting in SETTINGS if setting != "warm"}
    rows = {setting: found for setting, found in rows.items() if found}
    if not rows:
        return []
    made, axes = figure(3, len(rows), width=4.2, height=3.2)
    for i, (setting, found) in enumerate(rows.items()):
        shown = [name for name in COLORS if name in found]
        labels = {SCORES[setting]: f"held-out {SCORES[setting]}", "rank": "effective rank", "dormant": "dormant units"}
        for axis, (quantity, label) in zip(axes[3 * i : 3 * i + 3], labels.items(), strict=True):
            for name in shown:
                series = [r.result["curve"][quantity] for r in found[name] if r.result["curve"]]
                if series:
                    x = range(1, len(series[0]) + 1)
                    band(axis, list(x), series, COLORS[name], name)
            axis.set(xlabel="task", ylabel=label, title=setting)
        axes[3 * i].legend(frameon=False, fontsize=7)
    return [save(made, folder / f"{NAME}.png")]
