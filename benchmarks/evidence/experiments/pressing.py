"""Ways to press, on tuning seeds: does any lie beyond the curve of constant penalties?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..harness import Record, Run
from ..markdown import change_cell, compression_cell, difference_cell, group, mean_cell, seeds_line, table, versus
from ..stats import compare
from ..tasks import text
from . import curves

WAYS: dict[str, dict[str, Any]] = {
    "defaults": {},
    "without the first layer": {"layers": {"skip_first": 1}},
    "without the last layer": {"layers": {"skip_last": 1}},
    "one layer in turn": {"layers": {"schedule": "rotate"}},
    "down to 0.6 nats": {"objective": {"target": 0.6}},
    "memorization in the last fifth": {"cooldown": 0.2},
    "short phases": {"gate": {"patience_memorization": 8, "patience_compression": 12}},
}
GONE: dict[str, dict[str, Any]] = {
    "the layer of highest entropy": {"layers": {"reduce": "max"}},
    "without what opposes the loss": {"objective": {"combine": "project"}},
}
"""Ways that were no better than the others, so that the library no longer has them. Their results stay."""
WEIGHTS = (0.03, 0.08)


def runs(first_look: bool, seeds: Sequence[int] | None) -> list[Run]:
    """Plain, constant penalties, and the gate pressing in each way."""
    base = text.SMALL if first_look else text.PAPER
    found = []
    for seed in seeds or range(2 if first_look else 5):
        found.append(Run("text", replace(base, seed=seed)))
        for weight in curves.WEIGHTS["penalty"]:
            found.append(Run("text", replace(base, method="penalty", weight=weight, seed=seed)))
        for weight in WEIGHTS:
            for way in WAYS.values():
                found.append(Run("text", replace(base, method="gapt", weight=weight, seed=seed, **way)))
    return found


def way_of(record: Record) -> str:
    """Its name."""
    changed = {name: record.settings[name] for name in ("layers", "objective", "gate", "cooldown")}
    changed = {name: value for name, value in changed.items() if value}
    if "floor" in record.settings["objective"]:  # as the target was called
        changed["objective"] = {"target": record.settings["objective"]["floor"]}
    return next(name for name, way in (WAYS | GONE).items() if way == changed)


def tables(records: list[Record]) -> dict[str, str]:
    """A row per way and weight."""
    plain = [r for r in records if r.settings["method"] == "plain"]
    penalties = [r for r in records if r.settings["method"] != "gapt"]
    header = ["pressing", "weight", "seeds", "loss", "centred cosine", "norm ratio", "mean share", "compression",
              "switches", "against a penalty at equal entropy (nats)"]  # fmt: skip
    rows = []
    gated = group([r for r in records if r.settings["method"] == "gapt"], "weight")
    for name in WAYS | GONE:
        for (weight,), of_weight in gated.items():
            found = [r for r in of_weight if way_of(r) == name]
            if not found:
                continue
            ours, theirs = curves.at_equal_entropy(found, penalties)
            lead = compare(ours, theirs) if len(ours) > 1 else None
            rows.append(
                [
                    name,
                    f"{weight:g}",
                    str(len(found)),
                    change_cell(versus(found, plain, "loss")),
                    change_cell(versus(found, plain, "centred_cosine"), digits=0),
                    mean_cell(found, "norm_ratio", digits=1),
                    mean_cell(found, "mean_share", digits=2),
                    compression_cell(found),
                    mean_cell(found, "switches", digits=0),
                    "" if lead is None else difference_cell(lead),
                ]
            )
    first = f"Bytes of text, {seeds_line(records)}, {records[0].settings['steps']} steps.\n\n"
    return {"pressing": first + table(header, rows)}


def pictures(records: list[Record], folder: Path) -> list[Path]:
    """None: the table says it."""
    return []
