"""What it does to compressibility: inner blocks cut to few directions, at the end or before training goes on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..harness import Record, Run
from ..markdown import interval_cell, mean_cell, p_cell, seeds_line, table, versus
from ..tasks import cut, text
from . import loss

HALF: dict[str, Any] = {"method": "gapt", "alpha": 0.5, "window": 64, "layers": {"skip_last": 1}, "weight": 0.1}
"""Order 1/2 over whole sequences, on the blocks that are cut. The weight is one guess."""
NUCLEAR_WEIGHTS = (0.1, 0.5)
"""Tried on seed 0."""
METHODS: dict[str, dict[str, Any]] = {
    "plain": {},
    "plain, cut at step 200": {"cut_at": 200},
    "gate, order 1/2": HALF,
    "nuclear norm": {"method": "nuclear", "weight": 0.1},
    "gate, defaults": loss.METHODS["gate, defaults"],
    "late penalty, order 2": loss.METHODS["late penalty"],
}
AFTER = {
    "uncut": "uncut",
    "cut_16": "16 directions at the end",
    "cut_8": "8 at the end",
    "cut_4": "4 at the end",
    "trained_on_8": "8, and trained on",
}


def runs(first_look: bool, seeds: Sequence[int] | None) -> list[Run]:
    """Tuning, then the comparison."""
    tuning = replace(cut.Settings(), **text.TUNING)
    found = [Run("cut", replace(tuning, method="nuclear", weight=weight)) for weight in NUCLEAR_WEIGHTS]
    for seed in loss.SEEDS:
        found += [Run("cut", replace(cut.Settings(), seed=seed, **method)) for method in METHODS.values()]
    return [run for run in found if seeds is None or run.settings.seed in seeds]


def tables(records: list[Record]) -> dict[str, str]:
    """Held-out loss after each cut, and its difference from plain's after the same one."""
    plain = loss.of_method(records, {})
    rows = []
    for name, method in METHODS.items():
        if found := loss.of_method(records, method):
            cells = [mean_cell(found, column) if not method else _cell(found, plain, column) for column in AFTER]
            rows.append([name, f"{method.get('weight', 0.0):g}", *cells])
    steps = plain[0].settings["steps"]
    title = (
        f"Bytes of text, Muon, {seeds_line(plain)}, {steps} steps. Plain's held-out loss, and what each other model "
        "has more or less after the same cut of the two inner blocks (nats).\n\n"
    )
    return {"compressibility": title + table(["model", "weight", *AFTER.values()], rows)}


def _cell(found: list[Record], plain: list[Record], column: str) -> str:
    change = versus(found, plain, column)
    return "" if change is None else f"{interval_cell(change.difference, 3)}, p {p_cell(change.p_t)}"


def pictures(records: list[Record], folder: Path) -> list[Path]:
    """Held-out loss over what is kept, and where training went on after the cut."""
    from ..pictures import band, figure, save

    made, (axis,) = figure(1, width=6.4, height=4.2)
    for i, (name, method) in enumerate(METHODS.items()):
        if found := loss.of_method(records, method):
            at_end = [[r.result["final"][column] for column in AFTER if column != "trained_on_8"] for r in found]
            color = f"C{i}"
            band(axis, range(4), at_end, color, name)
            trained_on = [r.result["final"]["trained_on_8"] for r in found]
            axis.plot([2] * len(found), trained_on, ls="", marker="*", ms=9, color=color)
    axis.set_xticks(range(4), ["all", "16", "8", "4"])
    axis.set(xlabel="directions kept by inner blocks; stars: cut to 8 at step 350 and trained on",
             ylabel="held-out loss (nats)")  # fmt: skip
    axis.legend(frameon=False, fontsize=8)
    return [save(made, folder / "compressibility.png")]
