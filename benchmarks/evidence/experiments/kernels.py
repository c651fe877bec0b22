"""Which kernel: the one whose fall nothing else explains.

{linear, cosine} x {as it is, centred} x {gate, penalty} x three weights, on text, multiplication and conflicting
experience, each against plain training of the same seed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from ..harness import Record, Run
from ..markdown import change_cell, compression_cell, group, kernel_name, mean_cell, seeds_line, table, versus
from ..tasks import conflict, multiplication, text
from ..tasks.settings import TaskSettings

KERNELS = (("linear", False), ("linear", True), ("cosine", False), ("cosine", True))
WEIGHTS = {"text": (0.05, 0.02, 0.1), "multiplication": (0.05, 0.02, 0.1), "conflict": (1.0, 0.3, 0.1)}
METHODS = ("gapt", "penalty")


def runs(first_look: bool, seeds: Sequence[int] | None) -> list[Run]:
    """Plain, and every kernel, method and weight."""
    found = []
    for seed in seeds or ([300] if first_look else [300, 301, 302]):
        for task, settings in _bases(first_look).items():
            found.append(_run(task, settings, method="plain", seed=seed))
            # Weight by weight, so that an interrupted sweep has whole comparisons.
            for weight in WEIGHTS[task]:
                for method in METHODS:
                    for kernel, center in KERNELS:
                        found.append(
                            _run(task, settings, method=method, seed=seed, weight=weight, kernel=kernel, center=center)
                        )
    return found


def _bases(first_look: bool) -> dict[str, TaskSettings]:
    if first_look:
        return {
            "text": text.SMALL,
            "multiplication": multiplication.SMALL,
            "conflict": conflict.Settings(),
        }
    return {
        "text": text.PAPER,
        "multiplication": multiplication.Settings(blocks=4, width=128, heads=4, steps=1200, context=256),
        "conflict": conflict.Settings(),
    }


def _run(task: str, settings: TaskSettings, **changes: object) -> Run:
    return Run(task, replace(settings, **changes))  # type: ignore[arg-type]


COLUMNS = ("linear", "cosine", "centred_cosine")


def tables(records: list[Record]) -> dict[str, str]:
    """A table per task: what each kernel does to every measure."""
    return {f"kernels-{task}": _table(task, found) for (task,), found in _by_task(records).items()}


def _by_task(records: list[Record]) -> dict[tuple[str], list[Record]]:
    groups: dict[tuple[str], list[Record]] = {}
    for record in records:
        groups.setdefault((record.task,), []).append(record)
    return groups


def _table(task: str, records: list[Record]) -> str:
    plain = [r for r in records if r.settings["method"] == "plain"]
    rest = group([r for r in records if r.settings["method"] != "plain"], "kernel", "center", "method", "weight")
    extra = ["separation"] if task == "conflict" else []
    header = ["pressed", "by", "weight", "loss", *(f"{c.replace('_', ' ')} entropy" for c in COLUMNS), "norm ratio",
              "in a window", "mean share", *extra, "compression", "switches"]  # fmt: skip
    rows = [
        ["nothing", "plain", "", mean_cell(plain, "loss"), *(mean_cell(plain, c) for c in COLUMNS),
         mean_cell(plain, "norm_ratio", digits=1), mean_cell(plain, "window_norm_ratio", digits=1),
         mean_cell(plain, "mean_share", digits=2), *(mean_cell(plain, e, digits=2) for e in extra), "", ""]
    ]  # fmt: skip
    order = {name: i for i, name in enumerate(KERNELS)}
    for (kernel, center, method, weight), found in sorted(
        rest.items(), key=lambda item: (order[item[0][0], item[0][1]], item[0][2], item[0][3])
    ):
        gated = method == "gapt"
        rows.append(
            [
                kernel_name({"kernel": kernel, "center": center}),
                "gate" if gated else "penalty",
                f"{weight:g}",
                change_cell(versus(found, plain, "loss")),
                *(change_cell(versus(found, plain, c), digits=0) for c in COLUMNS),
                mean_cell(found, "norm_ratio", digits=1),
                mean_cell(found, "window_norm_ratio", digits=1),
                mean_cell(found, "mean_share", digits=2),
                *(change_cell(versus(found, plain, e), digits=0) for e in extra),
                compression_cell(found),
                mean_cell(found, "switches", digits=0) if gated else "",
            ]
        )
    return f"{task.capitalize()}, {seeds_line(records)}.\n\n" + table(header, rows, text_columns=2)


def pictures(records: list[Record], folder: Path) -> list[Path]:
    """Loss over centred cosine entropy, a panel per task."""
    from ..pictures import scatter_by_kernel

    return [scatter_by_kernel(records, folder / "kernels.png")]
