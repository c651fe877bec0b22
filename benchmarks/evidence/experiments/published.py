"""The author's two protocols as they are: a gate with weight 20 on one layer, and steps of the entropy alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..harness import Record, Run
from ..markdown import (
    by_seed,
    change_cell,
    compression_cell,
    interval_cell,
    mean_cell,
    p_cell,
    seeds_line,
    table,
    versus,
)
from ..stats import corrected, over_seeds_and_text
from ..tasks import early, text
from .loss import SEEDS, difference

LAYERS = {"skip_first": 1, "skip_last": 1}
LARGE: dict[str, Any] = {"blocks": 4, "batch": 64, "steps": 300, "train_bytes": 8_000_000, "lr": 0.06}
"""4,096 tokens in each call of a gate. The rate is the best of the smaller setting of `loss`."""
PATIENCE = (16, 9)
"""Optimizer steps of his 125 and 75 calls, at his 8 micro-batches a step with a call each."""
LATE: dict[str, Any] = {
    "method": "published",
    "kernel": "linear",
    "center": False,
    "weight": 20.0,
    "layers": {**LAYERS, "reduce": "largest_drop"},
    "gate": {"patience_memorization": PATIENCE[0], "patience_compression": PATIENCE[1]},
}
METHODS: dict[str, Run] = {
    "plain": Run("text", replace(text.Settings(), **LARGE)),
    "late protocol": Run("text", replace(text.Settings(), **LARGE, **LATE)),
    "early protocol": Run("early", replace(early.Settings(), **LARGE, layers=LAYERS, patience=PATIENCE[0])),
}
COLUMNS = {"linear": "linear entropy", "centred_cosine": "centred cosine entropy"}


def runs(first_look: bool, seeds: Sequence[int] | None) -> list[Run]:
    """Every method on every seed."""
    return [
        Run(of.task, replace(of.settings, seed=seed))
        for seed in (SEEDS if seeds is None else seeds)
        for of in METHODS.values()
    ]


def of_method(records: Sequence[Record], name: str) -> list[Record]:
    """Records of a method, in the order of seeds."""
    method = METHODS[name].settings.method
    found = [r for r in records if r.settings["seed"] in SEEDS and r.settings["method"] == method]
    return by_seed(found)


def tables(records: list[Record]) -> dict[str, str]:
    """A row per protocol, against plain for as many steps, and against plain for as many steps of the loss."""
    by_method = {name: found for name in METHODS if (found := of_method(records, name))}
    plain = by_method["plain"]
    twins = [r for r in by_method.get("early protocol", []) if "twin" in r.result["final"]]
    as_many = versus(twins, [replace(r, result={"final": {"loss": r.result["final"]["twin"]}}) for r in twins], "loss")
    asked = {name: versus(found, plain, "loss") for name, found in by_method.items() if name != "plain"}
    asked["as many steps of the loss"] = as_many
    p_values = corrected({name: comparison for name, comparison in asked.items() if comparison is not None})
    header = ["method", "held-out loss", "against plain for as many steps (nats)", "p, corrected",
              *COLUMNS.values(), "longest token / median", "mean share", "steps pressed", "switches"]  # fmt: skip
    rows = []
    for name, found in by_method.items():
        same = name == "plain"
        rows.append(
            [
                name,
                mean_cell(found, "loss"),
                "" if same else interval_cell(over_seeds_and_text(difference(found, plain)), 3),
                "" if same else p_cell(p_values[name]),
                *(mean_cell(found, c) if same else change_cell(versus(found, plain, c), 0) for c in COLUMNS),
                mean_cell(found, "norm_ratio", digits=1),
                mean_cell(found, "mean_share", digits=2),
                compression_cell(found),
                mean_cell(found, "switches", digits=0),
            ]
        )
    s = plain[0].settings
    title = (
        f"Bytes of text, {s['blocks']} blocks, Muon at {s['lr']:g}, {seeds_line(plain)}, {s['steps']} steps of "
        f"{s['batch'] * s['context']:,} bytes, each a call of the gate."
    )
    if as_many is not None:
        title += (
            f" The early protocol ends {interval_cell(as_many.difference, 3)} nats from plain for as many steps of the "
            f"loss (p {p_cell(p_values['as many steps of the loss'])}, corrected)."
        )
    return {"published": f"{title}\n\n{table(header, rows)}"}


def pictures(records: list[Record], folder: Path) -> list[Path]:
    """Loss and both entropies along training."""
    from ..pictures import band, figure, save

    made, axes = figure(3, width=4.2)
    panels = {"loss": "held-out loss (nats)", **{c: f"{label} (nats)" for c, label in COLUMNS.items()}}
    for axis, (column, label) in zip(axes, panels.items(), strict=True):
        for i, name in enumerate(METHODS):
            if found := of_method(records, name):
                curves = [r.result["curve"] for r in found]
                band(axis, curves[0]["step"], [c[column] for c in curves], f"C{i}", name)
        axis.set(xlabel="step", ylabel=label)
    axes[0].legend(frameon=False, fontsize=8)
    return [save(made, folder / "published.png")]
