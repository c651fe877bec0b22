"""Conflicting experience: does compression keep apart what contradicts, under each kernel?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from ..harness import Record, Run
from ..markdown import change_cell, compression_cell, group, kernel_name, mean_cell, p_cell, seeds_line, table, versus
from ..stats import Interval
from ..tasks import conflict
from ..tasks.settings import method_settings

WEIGHTS = (0.05, 0.3, 1.0)
KERNELS = (("cosine", True), ("cosine", False), ("linear", False))


def runs(first_look: bool, seeds: Sequence[int] | None) -> list[Run]:
    """All methods under the default kernel, the same without centring, and the author's, over weights."""
    found = []
    for seed in seeds or range(300, 303 if first_look else 310):
        settings = replace(conflict.Settings(), seed=seed)
        found.append(Run("conflict", settings))
        for method in ("published", "published often"):
            found.append(Run("conflict", replace(settings, **method_settings(method, 1.0))))
        for kernel, center in KERNELS:
            for weight in WEIGHTS:
                for method in ("penalty", "gapt"):
                    found.append(
                        Run("conflict", replace(settings, method=method, weight=weight, kernel=kernel, center=center))
                    )
    return found


def tables(records: list[Record]) -> dict[str, str]:
    """Against plain: separation, entropies, task loss."""
    plain = [r for r in records if r.settings["method"] == "plain"]
    rest = group([r for r in records if r.settings["method"] != "plain"], "kernel", "center", "method", "weight")
    header = ["method", "pressed", "weight", "seeds", "separation", "task loss", "p", "linear", "cosine",
              "cosine, centred", "norm ratio", "mean share", "compression", "switches"]  # fmt: skip
    columns = ("linear", "cosine", "centred_cosine")
    rows = [
        ["plain", "", "", str(len(plain)), mean_cell(plain, "separation", digits=2),
         mean_cell(plain, "loss", digits=4), "",
         *(mean_cell(plain, c) for c in columns), mean_cell(plain, "norm_ratio", digits=1),
         mean_cell(plain, "mean_share", digits=2), "", ""]
    ]  # fmt: skip
    for (kernel, center, method, weight), found in rest.items():
        loss = versus(found, plain, "loss")
        rows.append(
            [
                method,
                kernel_name({"kernel": kernel, "center": center}),
                f"{weight:g}",
                str(len(found)),
                change_cell(versus(found, plain, "separation"), digits=0),
                change_cell(loss, digits=0),
                p_cell(loss.p_t) if loss else "",
                *(change_cell(versus(found, plain, c), digits=0) for c in columns),
                mean_cell(found, "norm_ratio", digits=1),
                mean_cell(found, "mean_share", digits=2),
                compression_cell(found),
                mean_cell(found, "switches", digits=0),
            ]
        )
    text = f"Conflicting experience, `mixed`, {seeds_line(records)}, {records[0].settings['steps']} steps.\n\n"
    return {"conflict": text + table(header, rows, text_columns=2)}


def pictures(records: list[Record], folder: Path) -> list[Path]:
    """What separation costs."""
    from ..pictures import curves_of_methods, percent

    points: dict[str, list[tuple[Interval, Interval]]] = {}
    plain = [r for r in records if r.settings["method"] == "plain"]
    gated = [r for r in records if r.settings["method"] in ("gapt", "penalty")]
    for (method, kernel, center, _), found in group(gated, "method", "kernel", "center", "weight").items():
        x, y = versus(found, plain, "separation"), versus(found, plain, "loss")
        if x is None or y is None or len(found) < len(plain):
            continue
        name = f"{method}, {kernel_name({'kernel': kernel, 'center': center})}"
        points.setdefault(name, []).append((percent(x.change), percent(y.change)))
    return [
        curves_of_methods(
            points,
            folder / "conflict.png",
            labels=("separation against plain (%)", "task loss against plain (%)"),
            title="Conflicting experience: what separation costs, over weights",
        )
    ]
