"""What compression buys, at equal task loss: rounding, projecting, truncating text models of each method."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import fields, replace
from pathlib import Path

from ..harness import Record, Run
from ..markdown import group, kernel_name, mean_cell, p_cell, seeds_line, table
from ..stats import at_equal, compare
from ..tasks import text, use
from ..tasks.settings import method_settings

OPERATIONS = {
    "round_8_token": "8 bits, per token",
    "round_8_tensor": "8 bits, per tensor",
    "round_4_token": "4 bits, per token",
    "round_4_tensor": "4 bits, per tensor",
    "project_16": "16 directions",
    "project_8": "8 directions",
    "project_4": "4 directions",
    "rank_32": "weights of rank 32",
    "rank_16": "weights of rank 16",
    "rank_8": "weights of rank 8",
}


def runs(first_look: bool, seeds: Sequence[int] | None) -> list[Run]:
    """Plain; gate and penalty on the default kernel; gate and published gate on the linear one."""
    base = text.SMALL if first_look else text.PAPER
    shared = {f.name: getattr(base, f.name) for f in fields(base) if f.name != "evaluate_every"}
    found = []
    for seed in seeds or range(300, 305):
        s = replace(use.Settings(**shared), seed=seed, evaluate_every=base.steps // 10)
        found.append(Run("use", s))
        for changes in (
            method_settings("gapt", 0.05),
            method_settings("penalty", 0.02),
            method_settings("gapt", 0.1, kernel="linear", center=False),
            method_settings("published", 1.0),
        ):
            found.append(Run("use", replace(s, **changes)))
    return found


def tables(records: list[Record]) -> dict[str, str]:
    """Nats that each operation costs, less what it costs plain training at the loss that the run has."""
    plain = {r.settings["seed"]: r for r in records if r.settings["method"] == "plain"}
    groups = group(records, "method", "kernel", "center", "weight")
    header = ["after", *(_title(key) for key in groups)]
    rows = [["nothing", *(mean_cell(found, "loss") for found in groups.values())]]
    for operation, title in OPERATIONS.items():
        row = [title]
        for (method, *_), found in groups.items():
            costs = [r.result["final"][operation] - r.result["final"]["loss"] for r in found]
            cell = f"+{sum(costs) / len(costs):.3f}"
            if method != "plain":
                ours, theirs = at_equal_loss(found, plain, operation)
                if len(ours) > 1:
                    c = compare(ours, theirs)
                    cell += f" ({c.difference.mean:+.3f}, p {p_cell(c.p_t)})"
                elif ours:
                    cell += f" ({ours[0] - theirs[0]:+.3f})"
            row.append(cell)
        rows.append(row)
    text_ = (
        f"Bytes of text, {seeds_line(records)}, {records[0].settings['steps']} steps. Nats that an operation on the "
        "outputs of all blocks, or on their weights, adds to the held-out loss. In brackets: less what it adds to "
        "plain training at the point of its run where that has the same loss; negative is better than plain.\n\n"
    )
    return {"use": text_ + table(header, rows)}


def _title(key: tuple[object, ...]) -> str:
    method, kernel, center, weight = key
    if method == "plain":
        return "plain"
    return f"{method}, {kernel_name({'kernel': kernel, 'center': center})}, {weight:g}"


def at_equal_loss(found: list[Record], plain: dict[int, Record], operation: str) -> tuple[list[float], list[float]]:
    """What an operation costs each run, and plain training of its seed at the same loss (or at its lowest)."""
    ours, theirs = [], []
    for record in found:
        other = plain.get(record.settings["seed"])
        if other is None:
            continue
        curve = other.result["curve"]
        cost = [a - b for a, b in zip(curve[operation], curve["loss"], strict=True)]
        loss = max(record.result["final"]["loss"], min(curve["loss"]))
        at = at_equal(loss, curve["loss"], cost)
        if not math.isnan(at):
            ours.append(record.result["final"][operation] - record.result["final"]["loss"])
            theirs.append(at)
    return ours, theirs


def pictures(records: list[Record], folder: Path) -> list[Path]:
    """Loss after each operation over the loss before it, along training."""
    from ..pictures import figure, path_of_training, save

    shown = ("round_4_tensor", "project_4", "rank_16")
    made, axes = figure(len(shown))
    groups = group(records, "method", "kernel", "center", "weight")
    palette = ("#6b6b6b", "#3b6fc4", "#d1741f", "#b5483a", "#2f9e77")
    for axis, operation in zip(axes, shown, strict=True):
        for i, (key, found) in enumerate(groups.items()):
            curves = [record.result["curve"] for record in found]
            costs = [[a - b for a, b in zip(c[operation], c["loss"], strict=True)] for c in curves]
            path_of_training(axis, [c["loss"] for c in curves], costs, _title(key), color=palette[i % len(palette)])
        axis.invert_xaxis()
        axis.set(title=OPERATIONS[operation], xlabel="held-out loss; training goes right", ylabel="nats added")
        axis.set_yscale("symlog", linthresh=1e-2)
    axes[0].legend(frameon=False, fontsize=7)
    return [save(made, folder / "use.png")]
