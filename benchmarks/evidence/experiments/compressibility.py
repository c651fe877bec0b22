"""What it does to compressibility: inner blocks cut to few directions, at the end or before training goes on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..harness import Record, Run
from ..markdown import interval_cell, mean_cell, p_cell, seeds_line, table, versus
from ..stats import Comparison, corrected
from ..tasks import cut, text
from . import loss

METHODS: dict[str, dict[str, Any]] = {
    "plain": {},
    "gate, order 1/2": {"method": "gapt", "alpha": 0.5, "window": 64, "layers": {"skip_last": 1}, "weight": 0.1},
    "nuclear norm": {"method": "nuclear", "weight": 0.03},
    "gate, defaults": {"method": "gapt", "weight": 0.03, "cuts": (350,)},
    "late penalty, order 2": {"method": "penalty", "weight": 0.05, "objective": {"start": 100}, "cuts": (350,)},
}
"""Order 1/2 is over whole sequences, on the blocks that are cut, and its weight is one guess. So is that of the nuclear
norm: it costs as much uncut, on the seed of the looks."""
LOOKS: dict[str, dict[str, Any]] = {
    "plain": {},
    "weight decay of 1": {"weight_decay": 1.0},
    "weight decay of 3": {"weight_decay": 3.0},
    "nuclear norm": METHODS["nuclear norm"],
}
"""On one tuning seed alone."""
COLUMNS = {
    "uncut": "uncut",
    "cut_16": "16 directions at the end",
    "cut_8": "8 at the end",
    "cut_4": "4 at the end",
    "from_350": "8 from step 350 on",
    "from_200": "8 from step 200 on",
}


def runs(first_look: bool, seeds: Sequence[int] | None) -> list[Run]:
    """Looks, and every method on every seed."""
    found = [Run("cut", replace(cut.Settings(), **text.TUNING, **method)) for method in LOOKS.values()]
    for seed in loss.SEEDS:
        found += [Run("cut", replace(cut.Settings(), seed=seed, **method)) for method in METHODS.values()]
    return [run for run in found if seeds is None or run.settings.seed in seeds]


def tables(records: list[Record]) -> dict[str, str]:
    """Held-out loss after each cut, and its difference from plain's after the same one; looks."""
    by_method = {name: found for name, method in METHODS.items() if (found := loss.of_method(records, method))}
    plain = by_method["plain"]
    columns = {name: label for name, label in COLUMNS.items() if name in plain[0].result["final"]}
    compared = {
        (name, column): change
        for name, found in by_method.items()
        for column in columns
        if name != "plain"
        and all(column in record.result["final"] for record in found)
        and (change := versus(found, plain, column)) is not None
    }
    p_values = corrected(compared)
    rows = [["plain", "", *(mean_cell(plain, column) for column in columns)]]
    for name in by_method:
        if name == "plain":
            continue
        cells = [_cell(compared[key], p_values[key]) if (key := (name, c)) in compared else "" for c in columns]
        rows.append([name, f"{METHODS[name]['weight']:g}", *cells])
    title = (
        f"Bytes of text, Muon at {plain[0].settings['lr']:g}, {seeds_line(plain)}, {plain[0].settings['steps']} steps. "
        "Plain's held-out loss, and what each other model has more or less after the same cut of the two inner blocks "
        f"(nats). p-values are corrected by Holm for all {len(compared)} comparisons.\n\n"
    )
    lines = table(["model", "weight", *columns.values()], rows)
    return {"compressibility": title + lines + _looks(records)}


def _cell(change: Comparison, p: float) -> str:
    return f"{interval_cell(change.difference, 3)}, p {p_cell(p)}"


def _looks(records: list[Record]) -> str:
    """Losses on one tuning seed."""
    found = {name: of for name, method in LOOKS.items() if (of := loss.of_method(records, method, [0]))}
    if not found:
        return ""
    rows = [[name, *(mean_cell(of, column) for column in COLUMNS)] for name, of in found.items()]
    return f"\n\nHeld-out losses of looks, on seed 0:\n\n{table(['model', *COLUMNS.values()], rows)}"


def pictures(records: list[Record], folder: Path) -> list[Path]:
    """Held-out loss over what is kept, and where training went on after the cut."""
    from ..pictures import band, figure, save

    made, (axis,) = figure(1, width=6.4, height=4.2)
    at_end = [column for column in COLUMNS if not column.startswith("from")]
    for i, (name, method) in enumerate(METHODS.items()):
        if not (found := loss.of_method(records, method)):
            continue
        band(axis, range(4), [[r.result["final"][c] for c in at_end] for r in found], f"C{i}", name)
        if halfway := [r.result["final"]["from_200"] for r in found if "from_200" in r.result["final"]]:
            axis.plot([2 + 0.07 * i], [sum(halfway) / len(halfway)], ls="", marker="*", ms=11, color=f"C{i}")
    axis.set_xticks(range(4), ["all", "16", "8", "4"])
    axis.set(xlabel="directions kept by the inner blocks (a star: cut halfway, and trained on)")
    axis.set(ylabel="held-out loss (nats)")
    axis.legend(frameon=False, fontsize=8)
    return [save(made, folder / "compressibility.png")]
