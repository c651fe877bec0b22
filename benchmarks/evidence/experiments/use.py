"""What compression buys, at equal task loss: rounding, projecting, truncating text models of each method."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from ..harness import Record, Run
from ..markdown import change_cell, group, kernel_name, mean_cell, p_cell, seeds_line, table, versus
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


SHOWN = (
    "round_8_tensor",
    "round_4_token",
    "round_4_tensor",
    "project_16",
    "project_8",
    "project_4",
    "rank_16",
    "rank_8",
)
"""In the tables; the others change next to nothing for any model."""


def settings(first_look: bool) -> use.Settings:
    """Those of the text experiments, with ten evaluations, each of which measures every operation."""
    base = text.SMALL if first_look else text.PAPER
    shared = {f.name: getattr(base, f.name) for f in fields(base) if f.name != "evaluate_every"}
    return use.Settings(**shared, evaluate_every=base.steps // 10)


def runs(first_look: bool, seeds: Sequence[int] | None) -> list[Run]:
    """Plain, also with more weight decay; gate and penalty on the default kernel, gate and published gate on the linear
    one; and order 1/2 over whole sequences, beside what changes only the order and only the window."""
    base = settings(first_look)
    found = []
    for seed in seeds or range(300, 305):
        s = replace(base, seed=seed)
        found.append(Run("use", s))
        for changes in (
            method_settings("gapt", 0.05),
            method_settings("penalty", 0.02),
            method_settings("gapt", 0.1, kernel="linear", center=False),
            method_settings("published", 1.0),
            method_settings("gapt", 0.1, alpha=0.5, window=s.context),
            method_settings("penalty", 0.02, alpha=0.5, window=s.context),
            method_settings("gapt", 0.05, alpha=0.5, window=s.context),
            method_settings("gapt", 0.2, window=s.context),
            method_settings("gapt", 0.1, alpha=0.5),
            {"weight_decay": 1.0},
        ):
            found.append(Run("use", replace(s, **changes)))
    return found


def tables(records: list[Record]) -> dict[str, str]:
    """Nats that each operation costs, less what it costs plain training at the loss that the run has."""
    groups = group(records, *COMPARED)
    reference = next(iter(groups.values()))
    plain = {r.settings["seed"]: r for r in reference}
    header = ["model", "loss", *(OPERATIONS[name] for name in SHOWN)]
    added = [
        [_title(key), mean_cell(found, "loss"), *(_added(found, None if found is reference else plain, name)
                                                  for name in SHOWN)]
        for key, found in groups.items()
    ]  # fmt: skip
    after = [
        [_title(key), *(_after(found, reference, name) for name in ("loss", *SHOWN))]
        for key, found in groups.items()
    ]  # fmt: skip
    where = f"Bytes of text, {seeds_line(records)}, {records[0].settings['steps']} steps. "
    return {
        "use": where + "Nats that an operation on the outputs of all blocks, or on their weights, adds to the held-out "
        "loss. In brackets: less what it adds to plain training at the point of its run where that has the same loss; "
        "negative is better than plain.\n\n" + table(header, added),
        "use-after": where + "Held-out loss after each operation, and its change against plain after the same one."
        "\n\n" + table(header, after),
    }


def _added(found: list[Record], plain: dict[int, Record] | None, operation: str) -> str:
    costs = [r.result["final"][operation] - r.result["final"]["loss"] for r in found]
    cell = _signed(sum(costs) / len(costs))
    if plain is None:
        return cell
    ours, theirs = at_equal_loss(found, plain, operation)
    if len(ours) > 1:
        c = compare(ours, theirs)
        return cell + f" ({_signed(c.difference.mean)}, p {p_cell(c.p_t)})"
    return cell + (f" ({_signed(ours[0] - theirs[0])})" if ours else "")


def _after(found: list[Record], plain: list[Record], name: str) -> str:
    change = "" if found is plain else f" ({change_cell(versus(found, plain, name))})"
    return mean_cell(found, name) + change


COMPARED = ("method", "kernel", "center", "weight", "alpha", "window", "weight_decay")


def _signed(value: float) -> str:
    """To three digits; what rounds to zero has no sign."""
    text_ = f"{value:+.3f}"
    return "0.000" if text_ in ("+0.000", "-0.000") else text_


def _title(key: tuple[Any, ...]) -> str:
    method, kernel, center, weight, alpha, window, decay = key
    if method == "plain":
        return "plain" if decay < 1 else f"plain, weight decay {decay:g}"
    parts = (
        [method]
        if (kernel, center) == ("cosine", True)
        else [method, kernel_name({"kernel": kernel, "center": center})]
    )
    parts += [f"order {alpha:g}"] if alpha != 2 else []
    parts += ["whole sequences"] if window > 8 else []
    return ", ".join([*parts, f"weight {weight:g}"])


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


PANELS = {
    "directions kept between blocks": ("project", (32, 16, 8, 4)),
    "rank of the weights": ("rank", (32, 16, 8)),
    "bits between blocks, one scale": ("round", (8, 4)),
}


def pictures(records: list[Record], folder: Path) -> list[Path]:
    """Held-out loss over what is kept of the model."""
    from ..pictures import band, figure, save

    groups = group(records, *COMPARED)
    drawn = {
        "plain": ("plain", "#6b6b6b"),
        "plain, weight decay 1": ("plain, weight decay 1", "#b0b0b0"),
        "gapt, linear, weight 0.1": ("gate, author's kernel", "#b5483a"),
        "gapt, weight 0.05": ("gate, defaults (order 2, windows of 8)", "#8fb3e0"),
        "gapt, order 0.5, whole sequences, weight 0.05": ("gate, order 1/2, whole sequences", "#3b6fc4"),
    }
    made, axes = figure(len(PANELS))
    for axis, (label, (operation, sizes)) in zip(axes, PANELS.items(), strict=True):
        names = ["loss", *(f"{operation}_{n}" + ("_tensor" if operation == "round" else "") for n in sizes)]
        for key, found in groups.items():
            if _title(key) in drawn:
                name, color = drawn[_title(key)]
                losses = [[record.result["final"][n] for n in names] for record in found]
                band(axis, range(len(names)), losses, color, name)
        axis.set_xticks(range(len(names)), ["all", *map(str, sizes)])
        axis.set(xlabel=label, ylabel="held-out loss (nats)")
    axes[0].legend(frameon=False, fontsize=8)
    return [save(made, folder / "use.png")]
