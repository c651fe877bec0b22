"""Which gate: settings x weights under the default kernel, on tuning seeds. What alternates, costs, collapses."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..harness import Record, Run
from ..markdown import change_cell, compression_cell, group, mean_cell, seeds_line, table, versus
from ..tasks import conflict, multiplication, text
from .kernels import _by_task

GATES: tuple[dict[str, Any], ...] = (
    {},
    {"patience_memorization": 8},
    {"patience_memorization": 25},
    {"patience_compression": 12},
    {"patience_compression": 50},
    {"min_improvement": 0.02},
    {"min_improvement": 0.05},
    {"patience_compression": 12, "min_improvement": 0.02},
    {"smoothing": 0.8},
    {"spike_tolerance": 0.05},
)
WEIGHTS = {"text": (0.02, 0.05, 0.1), "multiplication": (0.02, 0.05, 0.1), "conflict": (1.0, 0.3)}
COLLAPSED = 0.1
"""Of plain's centred cosine entropy."""


def runs(first_look: bool, seeds: Sequence[int] | None) -> list[Run]:
    """Gates x weights on each task; a first look has two weights and two seeds of the text alone."""
    tasks = {"text": text.SMALL, "multiplication": multiplication.SMALL, "conflict": conflict.Settings()}
    found = []
    for seed in seeds or ([0] if first_look else range(5)):
        for task, settings in tasks.items():
            found.append(Run(task, replace(settings, seed=seed)))
            for weight in WEIGHTS[task][: 2 if first_look else None]:
                for gate in GATES:
                    found.append(Run(task, replace(settings, method="gapt", seed=seed, weight=weight, gate=gate)))
    return found


def tables(records: list[Record]) -> dict[str, str]:
    """A table per task."""
    return {f"gate-{task}": _table(task, found) for (task,), found in _by_task(records).items()}


def _table(task: str, records: list[Record]) -> str:
    plain = [r for r in records if r.settings["method"] == "plain"]
    rest = group([r for r in records if r.settings["method"] != "plain"], "weight", "gate")
    extra = ["separation"] if task == "conflict" else []
    header = ["gate, besides the defaults", "weight", "loss", "centred cosine", "cosine", "linear", "norm ratio",
              "mean share", *extra, "compression", "switches", "verdict"]  # fmt: skip
    rows = [
        ["plain", "", mean_cell(plain, "loss"), mean_cell(plain, "centred_cosine"), mean_cell(plain, "cosine"),
         mean_cell(plain, "linear"), mean_cell(plain, "norm_ratio", digits=1),
         mean_cell(plain, "mean_share", digits=2), *(mean_cell(plain, e, digits=2) for e in extra), "", "", ""]
    ]  # fmt: skip
    for (weight, gate), found in sorted(rest.items(), key=lambda item: (item[0][0], item[0][1])):
        rows.append(
            [
                gate or "defaults",
                f"{weight:g}",
                change_cell(versus(found, plain, "loss")),
                *(change_cell(versus(found, plain, c), digits=0) for c in ("centred_cosine", "cosine", "linear")),
                mean_cell(found, "norm_ratio", digits=1),
                mean_cell(found, "mean_share", digits=2),
                *(change_cell(versus(found, plain, e), digits=0) for e in extra),
                compression_cell(found),
                mean_cell(found, "switches", digits=0),
                verdict(found, plain),
            ]
        )
    return f"{task.capitalize()}, {seeds_line(records)}.\n\n" + table(header, rows)


def verdict(found: list[Record], plain: list[Record]) -> str:
    """What the default must hold and this setting does not: switches, no collapse, half of the entropy, 0.5 % loss."""
    wrong = []
    entropy, loss = versus(found, plain, "centred_cosine"), versus(found, plain, "loss")
    if min(r.result["final"]["switches"] for r in found) < 3:
        wrong.append("hardly alternates")
    if entropy is not None and entropy.change.mean < COLLAPSED - 1:
        wrong.append("collapses")
    if entropy is not None and entropy.change.mean > -0.5:
        wrong.append("presses little")
    if loss is not None and loss.change.mean > 0.005:
        wrong.append("costs")
    return ", ".join(wrong) or "holds"


def pictures(records: list[Record], folder: Path) -> list[Path]:
    """None: the table is the result."""
    return []
