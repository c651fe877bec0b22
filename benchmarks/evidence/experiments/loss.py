"""What it does to loss: gate, late penalty, penalty and plain on text, all tuned."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..harness import Record, Run
from ..markdown import (
    by_seed,
    change_cell,
    compression_cell,
    interval_cell,
    mean_cell,
    p_cell,
    paired,
    seeds_line,
    table,
    values,
    versus,
)
from ..stats import over_seeds_and_text
from ..tasks import cut, text

SEEDS = range(300, 305)
TUNING_SEEDS = (0, 1, 2)
RATE = 0.06
"""Of Muon, where methods are compared: the best of `CLOSER_RATES` on the tuning seeds."""
RATES = {"adamw": (3e-3, 6e-3, 12e-3), "muon": (0.01, 0.02, 0.04, 0.08, 0.16)}
"""Tried on seed 0, where they differ by ten times what seeds do."""
CLOSER_RATES = (0.04, 0.06, 0.09)


def _gate(weight: float) -> dict[str, Any]:
    return {"method": "gapt", "weight": weight}


def _penalty(weight: float, start: int = 0) -> dict[str, Any]:
    return {"method": "penalty", "weight": weight} | ({"objective": {"start": start}} if start else {})


TRIED: dict[str, list[dict[str, Any]]] = {
    "gate": [_gate(weight) for weight in (0.03, 0.1, 0.3)],
    "penalty": [_penalty(weight) for weight in (0.01, 0.03, 0.1)],
    "late penalty": [_penalty(0.03, 100), _penalty(0.1, 100), _penalty(0.1, 200)],
}
"""Points of each method, on the tuning seeds."""
ENTROPY_LEFT = 0.5
"""Share of plain's entropy that a point has to reach: loss alone would choose the smallest weight."""
METHODS: dict[str, dict[str, Any]] = {
    "plain": {},
    "gate, defaults": _gate(0.03),
    "gate": _gate(0.1),
    "penalty": _penalty(0.03),
    "late penalty": _penalty(0.1, 200),
}
"""All but the first two are what `choice` chooses of `TRIED`."""


def runs(first_look: bool, seeds: Sequence[int] | None) -> list[Run]:
    """Rates, points of each method, then the comparison."""
    tuning = replace(text.Settings(), **text.TUNING)
    rates = [(optimizer, rate) for optimizer, of_optimizer in RATES.items() for rate in of_optimizer]
    found = [Run("text", replace(tuning, optimizer=optimizer, lr=rate)) for optimizer, rate in rates]
    points: list[dict[str, Any]] = [{"lr": rate} for rate in CLOSER_RATES]
    points += [point | {"lr": RATE} for tried in TRIED.values() for point in tried]
    found += [Run("text", replace(tuning, seed=seed, **point)) for seed in TUNING_SEEDS for point in points]
    compared = [method | {"lr": RATE} for method in METHODS.values()]
    found += [Run("text", replace(text.Settings(), seed=seed, **method)) for seed in SEEDS for method in compared]
    return [run for run in found if seeds is None or run.settings.seed in seeds]


NAMED = ("method", "weight", "alpha", "objective", "layers", "optimizer", "lr", "weight_decay")
"""Settings that tell methods apart."""


def of_method(records: Sequence[Record], method: dict[str, Any], seeds: Sequence[int] = SEEDS) -> list[Record]:
    """The records of a method, in the order of seeds."""
    own = {name: getattr(cut.Settings(**method), name) for name in NAMED}
    found = [r for r in records if r.settings["seed"] in seeds and all(r.settings[k] == v for k, v in own.items())]
    return by_seed(found)


def tables(records: list[Record]) -> dict[str, str]:
    """A row per method, against plain over seeds and text."""
    by_method = {name: of_method(records, method | {"lr": RATE}) for name, method in METHODS.items()}
    plain = by_method["plain"]
    header = ["method", "weight", "held-out loss", "against plain (nats)", "p", "centred cosine entropy", "change",
              "longest token / median", "steps pressed", "switches"]  # fmt: skip
    rows = []
    for name, found in by_method.items():
        if not found:
            continue
        same = not METHODS[name]
        loss = versus(found, plain, "loss")
        rows.append(
            [
                name,
                f"{METHODS[name].get('weight', 0.0):g}",
                mean_cell(found, "loss"),
                "" if same else interval_cell(over_seeds_and_text(difference(found, plain)), 3),
                "" if same or loss is None else p_cell(loss.p_t),
                mean_cell(found, "centred_cosine"),
                "" if same else change_cell(versus(found, plain, "centred_cosine"), 0),
                mean_cell(found, "norm_ratio", digits=1),
                compression_cell(found),
                mean_cell(found, "switches", digits=0),
            ]
        )
    size = text.Settings().evaluate_sequences * text.Settings().context / 1000
    title = (
        f"Bytes of text, Muon at {RATE:g}, {seeds_line(plain)}, {plain[0].settings['steps']} steps, {size:.0f} kB of "
        "held-out text. "
    )
    lead = _from_penalty(by_method)
    return {"loss": title + lead + "\n\n" + table(header, rows) + _tuning(records)}


def pieces(records: Sequence[Record]) -> NDArray[Any]:
    """Losses (seeds, pieces of the held-out text)."""
    return np.array([record.result["final"]["chunks"] for record in records])


def difference(records: list[Record], baseline: list[Record]) -> NDArray[Any]:
    """The same of two methods, on the seeds that both have."""
    ours, theirs = paired(records, baseline)
    less: NDArray[Any] = pieces(ours) - pieces(theirs)
    return less


def _from_penalty(by_method: dict[str, list[Record]]) -> str:
    """Losses of the gate and of the late penalty less that of the penalty, each at its chosen point."""
    penalty = by_method["penalty"]
    lines = []
    for name in ("gate", "late penalty"):
        if (loss := versus(by_method[name], penalty, "loss")) is not None:
            less = interval_cell(over_seeds_and_text(difference(by_method[name], penalty)), 3)
            lines.append(f"The {name} ends {less} nats from the penalty (p {p_cell(loss.p_t)}).")
    return " ".join(lines)


def choice(records: Sequence[Record], name: str) -> dict[str, Any] | None:
    """The point of a method with the lowest loss on the tuning seeds, of those that leave at most `ENTROPY_LEFT`."""

    def mean(point: dict[str, Any], column: str) -> float:
        return statistics.fmean(values(of_method(records, point | {"lr": RATE}, TUNING_SEEDS), column))

    most = ENTROPY_LEFT * mean({}, "centred_cosine")
    reaching = [point for point in TRIED[name] if mean(point, "centred_cosine") <= most]
    return min(reaching, key=lambda point: mean(point, "loss"), default=None)


def _tuning(records: list[Record]) -> str:
    """Plain at each rate, and the points of each method, on the tuning seeds."""
    plain = of_method(records, {"lr": RATE}, TUNING_SEEDS)
    tried: list[tuple[str, dict[str, Any]]] = [("plain", {"lr": rate}) for rate in CLOSER_RATES]
    tried += [(name, point | {"lr": RATE}) for name, points in TRIED.items() for point in points]
    rows = []
    for name, point in tried:
        if not (found := of_method(records, point, TUNING_SEEDS)):
            continue
        loss = None if found == plain else versus(found, plain, "loss")
        entropy = None if found == plain else versus(found, plain, "centred_cosine")
        chosen = name != "plain" and choice(records, name) == {k: v for k, v in point.items() if k != "lr"}
        rows.append(
            [
                f"{name}, chosen" if chosen else name,
                f"{point['lr']:g}",
                f"{point.get('weight', 0.0):g}",
                f"{point.get('objective', {}).get('start', 0)}",
                mean_cell(found, "loss"),
                "" if loss is None else interval_cell(loss.difference, 3),
                change_cell(entropy, 0),
            ]
        )
    if not rows:
        return ""
    header = ["method", "rate", "weight", "from step", "held-out loss", f"against plain at {RATE:g} (nats)",
              "centred cosine entropy"]  # fmt: skip
    return f"\n\nWhat was tried on the tuning {seeds_line(plain)}:\n\n{table(header, rows)}"


def pictures(records: list[Record], folder: Path) -> list[Path]:
    """Loss over entropy, a point per seed."""
    from ..pictures import figure, save

    made, (axis,) = figure(1, width=6.2, height=4.2)
    for name, method in METHODS.items():
        found = of_method(records, method | {"lr": RATE})
        points = [(r.result["final"]["centred_cosine"], r.result["final"]["loss"]) for r in found]
        if points:
            axis.plot(*zip(*points, strict=True), ls="", marker="o", label=name)
    axis.set(xlabel="centred cosine entropy (nats)", ylabel="held-out loss (nats)", title="Bytes of text, Muon")
    axis.legend(frameon=False, fontsize=8)
    return [save(made, folder / "loss.png")]
