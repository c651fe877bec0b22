"""What it does to compressibility: inner blocks cut to few directions, at the end or before training goes on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..harness import Record, Run
from ..markdown import interval_cell, mean_cell, p_cell, seeds_line, table, versus
from ..tasks import cut
from . import loss

HALF: dict[str, Any] = {"method": "gapt", "alpha": 0.5, "window": 64, "layers": {"skip_last": 1}, "weight": 0.1}
"""Order 1/2 over whole sequences, on the blocks that are cut. The weight is one guess."""
METHODS: dict[str, dict[str, Any]] = {
    "plain": {},
    "plain, cut at step 200": {"cut_at": 200},
    "gate, order 1/2": HALF,
    "gate, defaults": loss.METHODS["gate, defaults"],
    "late penalty, order 2": loss.METHODS["late penalty"],
}
AT_END = {
    "uncut": "uncut",
    "cut_16": "16 directions at the end",
    "cut_8": "8 at the end",
    "cut_4": "4 at the end",
}
TRAINED_ON = {"trained_on_8": "8 from step 350 on"}


def runs(first_look: bool, seeds: Sequence[int] | None) -> list[Run]:
    """Every method on every seed."""
    found = []
    for seed in loss.SEEDS:
        found += [Run("cut", replace(cut.Settings(), seed=seed, **method)) for method in METHODS.values()]
    return [run for run in found if seeds is None or run.settings.seed in seeds]


def tables(records: list[Record]) -> dict[str, str]:
    """Held-out loss after each cut, and its difference from plain's after the same one."""
    plain = loss.of_method(records, {})
    columns = AT_END | TRAINED_ON
    rows = []
    for name, method in METHODS.items():
        if not (found := loss.of_method(records, method)):
            continue
        # One that differs in the step of its cut alone is plain's until there.
        measured = {c: mean_cell(found, c) if not method else _cell(found, plain, c) for c in columns}
        shown = TRAINED_ON if "cut_at" in method else columns
        weight = f"{method['weight']:g}" if "weight" in method else ""
        rows.append([name, weight, *(measured[c] if c in shown else "" for c in columns)])
    title = (
        f"Bytes of text, Muon, {seeds_line(plain)}, {plain[0].settings['steps']} steps. Plain's held-out loss, and "
        "what each other model has more or less after the same cut of the two inner blocks (nats).\n\n"
    )
    return {"compressibility": title + table(["model", "weight", *columns.values()], rows)}


def _cell(found: list[Record], plain: list[Record], column: str) -> str:
    change = versus(found, plain, column)
    return "" if change is None else f"{interval_cell(change.difference, 3)}, p {p_cell(change.p_t)}"


def pictures(records: list[Record], folder: Path) -> list[Path]:
    """Held-out loss over what is kept, and where training went on after the cut."""
    from ..pictures import band, figure, save

    made, (axis,) = figure(1, width=6.4, height=4.2)
    for i, (name, method) in enumerate(METHODS.items()):
        if not (found := loss.of_method(records, method)):
            continue
        if "cut_at" not in method:
            band(axis, range(4), [[r.result["final"][c] for c in AT_END] for r in found], f"C{i}", name)
        trained_on = sum(r.result["final"]["trained_on_8"] for r in found) / len(found)
        label = name if "cut_at" in method else None
        axis.plot([2], [trained_on], ls="", marker="*", ms=11, color=f"C{i}", label=label)
    axis.set_xticks(range(4), ["all", "16", "8", "4"])
    axis.set(xlabel="directions kept by the inner blocks (a star: cut earlier, and trained on)")
    axis.set(ylabel="held-out loss (nats)")
    axis.legend(frameon=False, fontsize=8)
    return [save(made, folder / "compressibility.png")]
