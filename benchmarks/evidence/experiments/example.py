"""The main example as it is, over seeds: what its defaults change, and more weight."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from ..harness import Record, Run
from ..markdown import change_cell, compression_cell, group, mean_cell, seeds_line, table, versus
from ..tasks import example

STRONGER = 0.05
"""A weight above the default."""


def runs(first_look: bool, seeds: Sequence[int] | None) -> list[Run]:
    """Plain, the defaults, and more weight. A first look has everything."""
    found = []
    for seed in seeds or range(300, 305):
        s = replace(example.Settings(), seed=seed)
        found.append(Run("example", s))
        found += [Run("example", replace(s, method="gapt", weight=w)) for w in (s.weight, STRONGER)]
    return found


def tables(records: list[Record]) -> dict[str, str]:
    """A row per method and weight."""
    plain = [r for r in records if r.settings["method"] == "plain"]
    header = ["method", "weight", "loss", "change", "centred cosine", "change", "linear", "change", "norm ratio",
              "mean share", "compression", "switches"]  # fmt: skip
    rows = []
    for (method, weight), found in group(records, "method", "weight").items():
        pressed = method != "plain"
        rows.append(
            [
                method,
                f"{weight:g}" if pressed else "",
                mean_cell(found, "loss"),
                change_cell(versus(found, plain, "loss")) if pressed else "",
                mean_cell(found, "centred_cosine"),
                change_cell(versus(found, plain, "centred_cosine"), digits=0) if pressed else "",
                mean_cell(found, "linear"),
                change_cell(versus(found, plain, "linear"), digits=0) if pressed else "",
                mean_cell(found, "norm_ratio", digits=1),
                mean_cell(found, "mean_share", digits=2),
                compression_cell(found),
                mean_cell(found, "switches", digits=0),
            ]
        )
    s = records[0].settings
    title = f"`examples/gpt2_fineweb.py --data {s['corpus']}` on one thread, {seeds_line(records)}, {s['steps']} steps."
    return {"example": title + "\n\n" + table(header, rows)}


def pictures(records: list[Record], folder: Path) -> list[Path]:
    """None: the example draws its own."""
    return []
