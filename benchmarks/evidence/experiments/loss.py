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

SEEDS, FRESH_SEEDS = range(300, 305), range(305, 307)
TUNING_SEEDS = (0, 1, 2)
RATE = 0.04
"""Of Muon, where methods are compared: the best of `RATES` on seed 0. `CLOSE` was tried later, and is better."""
RATES = {"adamw": (3e-3, 6e-3, 12e-3), "muon": (0.01, 0.02, 0.04, 0.08, 0.16)}
"""Tried on seed 0, where they differ by ten times what seeds do."""
CLOSE = 0.06
"""Between the two best of them. `CLOSER` are tried at it on the tuning seeds."""
CLOSER = ("plain", "gate, defaults", "penalty")
METHODS: dict[str, dict[str, Any]] = {
    "plain": {},
    "gate, defaults": {"method": "gapt", "weight": 0.03},
    "late penalty": {"method": "penalty", "weight": 0.05, "objective": {"start": 100}},
    "penalty": {"method": "penalty", "weight": 0.05},
}
"""Start and weight of the late penalty are one guess."""


def runs(first_look: bool, seeds: Sequence[int] | None) -> list[Run]:
    """Rates, then the comparison."""
    tuning = replace(text.Settings(), **text.TUNING)
    rates = [(optimizer, rate) for optimizer, of_optimizer in RATES.items() for rate in of_optimizer]
    found = [Run("text", replace(tuning, optimizer=optimizer, lr=rate)) for optimizer, rate in rates]
    for seed in TUNING_SEEDS:
        points = [{"lr": RATE}, *(METHODS[name] | {"lr": CLOSE} for name in CLOSER)]
        found += [Run("text", replace(tuning, seed=seed, **point)) for point in points]
    for seed in (*SEEDS, *FRESH_SEEDS):
        of_seed = METHODS if seed in SEEDS else ("plain", "penalty")
        found += [Run("text", replace(text.Settings(), seed=seed, lr=RATE, **METHODS[name])) for name in of_seed]
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
    lead = _gate_at_equal_entropy(by_method) + _on_fresh_seeds(records)
    return {"loss": title + lead + "\n\n" + table(header, rows) + _rates(records)}


def pieces(records: Sequence[Record]) -> NDArray[Any]:
    """Losses (seeds, pieces of the held-out text)."""
    return np.array([record.result["final"]["chunks"] for record in records])


def difference(records: list[Record], baseline: list[Record]) -> NDArray[Any]:
    """The same of two methods, on the seeds that both have."""
    ours, theirs = paired(records, baseline)
    less: NDArray[Any] = pieces(ours) - pieces(theirs)
    return less


def _gate_at_equal_entropy(by_method: dict[str, list[Record]]) -> str:
    """The gate's loss less that of the late penalty at the gate's entropy: on the straight line between plain, which is
    a penalty of weight 0, and the late penalty, seed by seed."""
    seeds = [{r.settings["seed"]: r for r in by_method[name]} for name in ("plain", "late penalty", "gate, defaults")]
    shared = sorted(seeds[0].keys() & seeds[1].keys() & seeds[2].keys())
    if len(shared) < 2:
        return ""
    plain, late, gate = ([of[seed] for seed in shared] for of in seeds)
    s = [np.array([[r.result["final"]["centred_cosine"]] for r in found]) for found in (plain, late, gate)]
    if not (s[1] < s[0]).all():
        return ""  # the late penalty took nothing: there is no line
    there = pieces(plain) + (pieces(late) - pieces(plain)) * (s[2] - s[0]) / (s[1] - s[0])
    lead = over_seeds_and_text(pieces(gate) - there)
    p = compare(list(pieces(gate).mean(1)), list(there.mean(1))).p_t
    return f"At equal entropy the gate's loss is {interval_cell(lead, 3)} nats from the late penalty's (p {p_cell(p)})."


def _on_fresh_seeds(records: list[Record]) -> str:
    """What the penalty from the first step costs on seeds that nothing was chosen on."""
    plain, penalty = (of_method(records, METHODS[name] | {"lr": RATE}, FRESH_SEEDS) for name in ("plain", "penalty"))
    loss = versus(penalty, plain, "loss")
    if loss is None or loss.seeds < 2:
        return ""
    change = interval_cell(over_seeds_and_text(difference(penalty, plain)), 3)
    shared = sorted({r.settings["seed"] for r in penalty} & {r.settings["seed"] for r in plain})
    return f" On seeds {shared[0]} to {shared[-1]}, the penalty's is {change} nats from plain's (p {p_cell(loss.p_t)})."


def _rates(records: list[Record]) -> str:
    """Every method at the closer rate, and plain at both, on the tuning seeds."""
    rows = []
    for rate in (RATE, CLOSE):
        plain = of_method(records, {"lr": rate}, TUNING_SEEDS)
        for name, method in METHODS.items():
            if not (found := of_method(records, method | {"lr": rate}, TUNING_SEEDS)):
                continue
            loss = None if name == "plain" else versus(found, plain, "loss")
            entropy = None if name == "plain" else versus(found, plain, "centred_cosine")
            cells = ["" if loss is None else interval_cell(loss.difference, 3), change_cell(entropy, 0)]
            rows.append([f"{rate:g}", name, mean_cell(found, "loss"), *cells])
    if not rows:
        return ""
    lines = table(["rate of Muon", "method", "held-out loss", "against plain (nats)", "centred cosine entropy"], rows)
    return f"\n\nThe same at a closer rate, on the tuning seeds 0 to 2:\n\n{lines}"


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
