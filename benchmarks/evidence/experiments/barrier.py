"""A weight as large as the loss's descent allows, against the curve of constant penalties."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import fields, replace
from pathlib import Path

from ..harness import Record, Run
from ..markdown import change_cell, difference_cell, group, mean_cell, p_cell, seeds_line, table, values, versus
from ..stats import compare
from ..tasks import barrier, text
from . import curves

DESCENT = (0.5, 0.8, 0.9, 0.95, 0.98)
LARGEST = 0.5


def runs(first_look: bool, seeds: Sequence[int] | None) -> list[Run]:
    """Plain, the penalties of `curves`, and the barrier at five shares of descent under both inner products."""
    base = text.SMALL if first_look else text.PAPER
    shared = {f.name: getattr(base, f.name) for f in fields(base)}
    found = []
    for seed in seeds or range(300, 305):
        found.append(Run("text", replace(base, seed=seed)))
        for weight in curves.WEIGHTS["penalty"]:
            found.append(Run("text", replace(base, method="penalty", weight=weight, seed=seed)))
        for preconditioned in (True, False):
            for descent in DESCENT:
                own = {"method": "penalty", "weight": LARGEST, "descent": descent, "preconditioned": preconditioned}
                found.append(Run("barrier", barrier.Settings(**{**shared, **own, "seed": seed})))
    return found


def tables(records: list[Record]) -> dict[str, str]:
    """Each point of the barrier, and its loss less a penalty's at the same entropy."""
    plain = [r for r in records if r.settings["method"] == "plain"]
    penalties = [r for r in records if r.task == "text"]
    header = ["inner product", "descent kept", "seeds", "loss", "centred cosine", "norm ratio", "mean share",
              "mean weight", "against a penalty at equal entropy (nats)", "p"]  # fmt: skip
    rows = []
    for (preconditioned, descent), found in group(
        [r for r in records if r.task == "barrier"], "preconditioned", "descent"
    ).items():
        ours, theirs = curves.at_equal_entropy(found, penalties)
        c = compare(ours, theirs) if len(ours) > 1 else None
        rows.append(
            [
                "of Adam's step" if preconditioned else "of gradients",
                f"{descent:g}",
                str(len(found)),
                change_cell(versus(found, plain, "loss")),
                change_cell(versus(found, plain, "centred_cosine"), digits=0),
                mean_cell(found, "norm_ratio", digits=1),
                mean_cell(found, "mean_share", digits=2),
                f"{LARGEST * statistics.fmean(values(found, 'compression')):.3f}",
                "" if c is None else f"{difference_cell(c)} ({len(ours)})",
                "" if c is None else p_cell(c.p_t),
            ]
        )
    text_ = (
        f"Bytes of text, {seeds_line(records)}, {records[0].settings['steps']} steps, largest weight {LARGEST:g}.\n\n"
    )
    return {"barrier": text_ + table(header, rows)}


def pictures(records: list[Record], folder: Path) -> list[Path]:
    """None: the table says it."""
    return []
