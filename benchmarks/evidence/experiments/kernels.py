"""Which kernel, and why: each is pressed on text, and every entropy is measured."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from ..harness import Record, Run
from ..markdown import change_cell, group, kernel_name, mean_cell, seeds_line, table, values, versus
from ..tasks import text

KERNELS = (("cosine", True), ("cosine", False), ("linear", True), ("linear", False))
METHODS = {"gapt": "gate", "penalty": "penalty"}
COLUMNS = {"linear": "linear entropy", "cosine": "cosine entropy", "centred_cosine": "centred cosine entropy"}


def runs(first_look: bool, seeds: Sequence[int] | None) -> list[Run]:
    """Plain, and every kernel under a gate and a penalty of weight 0.05."""
    base = text.Settings(optimizer="adamw", lr=3e-3, steps=700, train_bytes=300_000)
    found = []
    for seed in seeds or range(300, 305):
        found.append(Run("text", replace(base, seed=seed)))
        for kernel, center in KERNELS:
            for method in METHODS:
                pressed = replace(base, seed=seed, method=method, weight=0.05, kernel=kernel, center=center)
                found.append(Run("text", pressed))
    return found


def tables(records: list[Record]) -> dict[str, str]:
    """What each kernel does to every measure."""
    plain, groups = _groups(records)
    header = ["pressed", "by", "loss", *COLUMNS.values(), "longest token / median", "mean share"]
    rows = [["nothing", "", mean_cell(plain, "loss"), *(mean_cell(plain, c) for c in COLUMNS),
             mean_cell(plain, "norm_ratio", digits=1), mean_cell(plain, "mean_share", digits=2)]]  # fmt: skip
    for (name, method), found in groups.items():
        rows.append(
            [
                name,
                METHODS[method],
                change_cell(versus(found, plain, "loss")),
                *(change_cell(versus(found, plain, c), digits=0) for c in COLUMNS),
                mean_cell(found, "norm_ratio", digits=1),
                mean_cell(found, "mean_share", digits=2),
            ]
        )
    title = f"Bytes of text, AdamW, weight 0.05, {seeds_line(records)}, {records[0].settings['steps']} steps.\n\n"
    return {"kernels": title + table(header, rows, text_columns=2)}


def _groups(records: list[Record]) -> tuple[list[Record], dict[tuple[str, str], list[Record]]]:
    """Plain runs; the others by kernel and method, the default kernel first."""
    plain = [r for r in records if r.settings["method"] == "plain"]
    found = group([r for r in records if r.settings["method"] != "plain"], "kernel", "center", "method")
    order = [(kernel, center, method) for kernel, center in KERNELS for method in METHODS]
    return plain, {
        (kernel_name({"kernel": key[0], "center": key[1]}), key[2]): found[key] for key in order if key in found
    }


def pictures(records: list[Record], folder: Path) -> list[Path]:
    """What is left of each entropy, and the norm of the longest token, by what the gate pressed."""
    from ..pictures import figure, save

    plain, groups = _groups(records)
    gates = {name: found for (name, method), found in groups.items() if method == "gapt"}
    made, (left, right) = figure(2, width=5.4)
    for i, (column, label) in enumerate(COLUMNS.items()):
        shares = [
            100 * (1 + change.change.mean) for found in gates.values() if (change := versus(found, plain, column))
        ]
        left.bar([x + 0.27 * (i - 1) for x in range(len(gates))], shares, width=0.25, label=label)
    left.set(ylabel="left of plain's (%)", title="entropies")
    left.legend(frameon=False, fontsize=8)
    ratios = [sum(values(found, "norm_ratio")) / len(found) for found in [plain, *gates.values()]]
    right.bar(range(len(ratios)), ratios, color="#6b6b6b", width=0.5)
    right.set(title="longest token / median")
    left.set_xticks(range(len(gates)), [name.replace(", ", ",\n") for name in gates])
    right.set_xticks(range(len(ratios)), ["plain", *(name.replace(", ", ",\n") for name in gates)])
    left.set_xlabel("what the gate pressed")
    right.set_xlabel("what the gate pressed")
    return [save(made, folder / "kernels.png")]
