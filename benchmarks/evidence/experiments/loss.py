"""What it does to loss: gate, late penalty, penalty and plain on text, all tuned."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..harness import Record, Run
from ..markdown import (
    change_cell,
    compression_cell,
    interval_cell,
    mean_cell,
    p_cell,
    paired,
    seeds_line,
    table,
    versus,
)
from ..stats import compare, over_seeds_and_text
from ..tasks import cut, text

SEEDS = range(300, 305)
TUNING_SEEDS = (0, 1, 2)
RATE = 0.06
"""Of Muon, the best of plain's on the tuning seeds."""
RATES = {"adamw": (3e-3, 6e-3, 12e-3), "muon": (0.01, 0.02, 0.04, RATE, 0.08, 0.16)}
"""Tried on seed 0, where they differ by ten times what seeds do."""
CLOSE = (0.04, RATE, 0.08)
"""Rates of Muon that are tried on all tuning seeds, for plain and, at its chosen point, for every method."""
GATE, PENALTY = {"method": "gapt"}, {"method": "penalty"}
GRIDS: dict[str, list[dict[str, Any]]] = {
    "gate": [{**GATE, "weight": weight} for weight in (0.05, 0.1, 0.2)],
    "late penalty": [
        {**PENALTY, "weight": weight, "objective": {"start": start}}
        for start in (50, 100, 200)
        for weight in (0.05, 0.1, 0.2)
    ],
    "penalty": [{**PENALTY, "weight": weight} for weight in (0.01, 0.02, 0.05)],
}
"""Tried on the tuning seeds."""
SHARE = 0.5
"""What is chosen has the lowest loss of the points that take at least so much of plain's entropy: the lowest loss of
all would be that of weight 0."""
METHODS: dict[str, dict[str, Any]] = {
    "plain": {"lr": RATE},
    "gate, defaults": {**GATE, "weight": 0.03, "lr": RATE},
    "gate": {**GATE, "weight": 0.05, "lr": RATE},
    "late penalty": {**PENALTY, "weight": 0.05, "objective": {"start": 50}, "lr": RATE},
    "penalty": {**PENALTY, "weight": 0.05, "lr": RATE},
}
"""Those of a grid have its chosen point."""


def runs(first_look: bool, seeds: Sequence[int] | None) -> list[Run]:
    """Rates, points, then the comparison."""
    tuning = replace(text.Settings(), **text.TUNING)
    rates = [(optimizer, rate) for optimizer, of_optimizer in RATES.items() for rate in of_optimizer]
    found = [Run("text", replace(tuning, optimizer=optimizer, lr=rate)) for optimizer, rate in rates]
    for seed in TUNING_SEEDS:
        points = [point | {"lr": RATE} for grid in GRIDS.values() for point in grid]
        points += [METHODS[name] | {"lr": rate} for name in ("plain", *GRIDS) for rate in CLOSE]
        found += [Run("text", replace(tuning, seed=seed, **point)) for point in points]
    for seed in SEEDS:
        found += [Run("text", replace(text.Settings(), seed=seed, **method)) for method in METHODS.values()]
    return [run for run in found if seeds is None or run.settings.seed in seeds]


NAMED = ("method", "weight", "alpha", "objective", "layers", "optimizer", "lr", "weight_decay")
"""Settings that tell methods apart."""


def of_method(records: Sequence[Record], method: dict[str, Any], seeds: Sequence[int] = SEEDS) -> list[Record]:
    """The records of a method, in the order of seeds."""
    own = {name: getattr(cut.Settings(**method), name) for name in NAMED}
    found = [r for r in records if r.settings["seed"] in seeds and all(r.settings[k] == v for k, v in own.items())]
    return sorted(found, key=lambda r: int(r.settings["seed"]))


def tables(records: list[Record]) -> dict[str, str]:
    """A row per method, against plain over seeds and text."""
    by_method = {name: of_method(records, method) for name, method in METHODS.items()}
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
    title = f"Bytes of text, {seeds_line(plain)}, {plain[0].settings['steps']} steps, {size:.0f} kB of held-out text. "
    leads = "".join(_gate_at_equal_entropy(by_method, other) for other in ("late penalty", "penalty"))
    return {"loss": title.strip() + leads + "\n\n" + table(header, rows) + _tuned(records)}


def pieces(records: Sequence[Record]) -> NDArray[Any]:
    """Losses (seeds, pieces of the held-out text)."""
    return np.array([record.result["final"]["chunks"] for record in records])


def difference(records: list[Record], baseline: list[Record]) -> NDArray[Any]:
    """The same of two methods, on the seeds that both have."""
    ours, theirs = paired(records, baseline)
    less: NDArray[Any] = pieces(ours) - pieces(theirs)
    return less


def _gate_at_equal_entropy(by_method: dict[str, list[Record]], other: str) -> str:
    """The tuned gate's loss less that of another method at the gate's entropy: on the straight line between plain,
    which is that method at weight 0, and the other, seed by seed."""
    seeds = [{r.settings["seed"]: r for r in by_method[name]} for name in ("plain", other, "gate")]
    shared = sorted(seeds[0].keys() & seeds[1].keys() & seeds[2].keys())
    if len(shared) < 2:
        return ""
    plain, late, gate = ([of[seed] for seed in shared] for of in seeds)
    s = [np.array([[r.result["final"]["centred_cosine"]] for r in found]) for found in (plain, late, gate)]
    if not (s[1] < s[0]).all():
        return ""  # the other took nothing: there is no line
    there = pieces(plain) + (pieces(late) - pieces(plain)) * (s[2] - s[0]) / (s[1] - s[0])
    lead = over_seeds_and_text(pieces(gate) - there)
    p = compare(list(pieces(gate).mean(1)), list(there.mean(1))).p_t
    return (
        f" At equal entropy the tuned gate's loss is {interval_cell(lead, 3)} nats from the {other}'s (p {p_cell(p)})."
    )


def _tuned(records: list[Record]) -> str:
    """Loss and what is left of the entropy, at each point, on the tuning seeds."""
    plain = of_method(records, METHODS["plain"], TUNING_SEEDS)
    rows = []
    for name, grid in {"plain": [METHODS["plain"]], **GRIDS}.items():
        for point in [*(p | {"lr": RATE} for p in grid), *(METHODS[name] | {"lr": r} for r in CLOSE if r != RATE)]:
            if not (found := of_method(records, point, TUNING_SEEDS)):
                continue
            start = point.get("objective", {}).get("start", "")
            rows.append([name, f"{point['lr']:g}", f"{point.get('weight', 0):g}", str(start), mean_cell(found, "loss"),
                         "" if name == "plain" else change_cell(versus(found, plain, "centred_cosine"), 0),
                         "chosen" if point == METHODS[name] else ""])  # fmt: skip
    header = ["method", "rate of Muon", "weight", "from step", "held-out loss", "centred cosine entropy", ""]
    lines = table(header, rows)
    return f"\n\n<details>\n<summary>What was tuned, on seeds 0 to 2</summary>\n\n{lines}\n\n</details>" if rows else ""


def pictures(records: list[Record], folder: Path) -> list[Path]:
    """Loss over entropy, a point per seed."""
    from ..pictures import figure, save

    made, (axis,) = figure(1, width=6.2, height=4.2)
    for name, method in METHODS.items():
        found = of_method(records, method)
        points = [(r.result["final"]["centred_cosine"], r.result["final"]["loss"]) for r in found]
        if points:
            axis.plot(*zip(*points, strict=True), ls="", marker="o", label=name)
    axis.set(xlabel="centred cosine entropy (nats)", ylabel="held-out loss (nats)", title="Bytes of text, Muon")
    axis.legend(frameon=False, fontsize=8)
    return [save(made, folder / "loss.png")]
