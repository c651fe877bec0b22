"""Multiplication by a model that learned it: does compression help on factors longer than in training?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..harness import Record, Run
from ..markdown import by_seed, change_cell, interval_cell, mean_cell, p_cell, seeds_line, table, versus
from ..stats import corrected
from ..tasks import multiplication

SEEDS = range(300, 305)
METHODS: dict[str, dict[str, Any]] = {
    "plain": {},
    "gate, defaults": {"method": "gapt", "weight": 0.03},
    "late penalty": {"method": "penalty", "weight": 0.05, "objective": {"start": 100}},
}
COLUMNS = {
    "loss": "loss, trained lengths",
    "right": "right answers",
    "longer_loss": "loss, longer",
    "longer_right": "right answers, longer",
    "longer_digits": "right digits, longer",
}
JUDGED = ("loss", "longer_loss", "longer_digits")
"""Columns that are compared."""


def runs(first_look: bool, seeds: Sequence[int] | None) -> list[Run]:
    """Every method on every seed."""
    return [
        Run("multiplication", replace(multiplication.Settings(), seed=seed, **method))
        for seed in (SEEDS if seeds is None else seeds)
        for method in METHODS.values()
    ]


def of_method(records: Sequence[Record], name: str) -> list[Record]:
    """Records of a method, in the order of seeds."""
    method = METHODS[name].get("method", "plain")
    return by_seed(r for r in records if r.settings["method"] == method)


def tables(records: list[Record]) -> dict[str, str]:
    """A row per method."""
    by_method = {name: found for name in METHODS if (found := of_method(records, name))}
    plain = by_method["plain"]
    compared = {
        (name, column): change
        for name, found in by_method.items()
        for column in JUDGED
        if name != "plain" and (change := versus(found, plain, column)) is not None
    }
    p_values = corrected(compared)
    rows = []
    for name, found in by_method.items():
        cells = []
        for column in COLUMNS:
            change = compared.get((name, column))
            shown = mean_cell(found, column)
            if change is not None:
                shown += f" ({interval_cell(change.difference, 3)}, p {p_cell(p_values[name, column])})"
            cells.append(shown)
        entropy = mean_cell(found, "centred_cosine")
        rows.append(
            [name, *cells, entropy if name == "plain" else change_cell(versus(found, plain, "centred_cosine"), 0)]
        )
    s = plain[0].settings
    title = (
        f"Factors of 1 to {s['longest']} digits times one digit in training, of {s['longest'] + 1} and "
        f"{s['longest'] + 2} when longer; {s['steps']} steps of {s['batch']} problems, {seeds_line(plain)}. Loss in "
        f"nats per token of the answer; p-values are corrected by Holm for {len(compared)} comparisons with plain.\n\n"
    )
    return {"multiplication": title + table(["method", *COLUMNS.values(), "centred cosine entropy"], rows)}


def pictures(records: list[Record], folder: Path) -> list[Path]:
    """Loss along training, on trained lengths and longer."""
    from ..pictures import band, figure, save

    made, axes = figure(2, width=5.0)
    for axis, column in zip(axes, ("loss", "longer_loss"), strict=True):
        for i, name in enumerate(METHODS):
            if found := of_method(records, name):
                curves = [r.result["curve"] for r in found]
                band(axis, curves[0]["step"], [c[column] for c in curves], f"C{i}", name)
        axis.set(xlabel="step", ylabel="nats per token of the answer", title=COLUMNS[column])
    axes[0].legend(frameon=False, fontsize=8)
    return [save(made, folder / "multiplication.png")]
