"""What it does to forgetting: the author's two tests, beside L2 toward the old weights and rehearsal."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..harness import Record, Run
from ..markdown import by_seed, change_cell, interval_cell, mean_cell, p_cell, seeds_line, table, versus
from ..tasks import conflict

SEEDS = range(300, 310)
GATE: dict[str, Any] = {"method": "gapt", "weight": 1.0, "center": False}
GRID: list[dict[str, Any]] = [
    *({"toward_old": strength} for strength in (0.1, 1.0, 10.0, 100.0)),
    *({"rehearsed": samples} for samples in (2, 4, 16)),
    *({**GATE, "weight": weight} for weight in (0.3, 1.0)),
]
"""Tried on seed 0."""
METHODS: dict[str, dict[str, Any]] = {
    "plain": {},
    "gate": GATE,
    "rehearsal of 4 samples": {"rehearsed": 4},
    "L2 toward the old weights": {"toward_old": 10.0},
    "gate, and L2": {**GATE, "toward_old": 10.0},
}


def runs(first_look: bool, seeds: Sequence[int] | None) -> list[Run]:
    """A look at strengths, then the comparison."""
    found = [Run("conflict", conflict.Settings(**point)) for point in GRID]
    found += [Run("conflict", conflict.Settings(seed=seed, **m)) for seed in SEEDS for m in METHODS.values()]
    return [run for run in found if seeds is None or run.settings.seed in seeds]


def _of_method(records: Sequence[Record], method: dict[str, Any]) -> list[Record]:
    names = ("method", "weight", "center", "toward_old", "rehearsed")
    own = {name: getattr(conflict.Settings(**method), name) for name in names}
    found = [r for r in records if r.settings["seed"] in SEEDS and all(r.settings[k] == v for k, v in own.items())]
    return by_seed(found)


def tables(records: list[Record]) -> dict[str, str]:
    """Both tests, against plain."""
    plain = _of_method(records, {})
    header = ["method", "separation", "change", "p", "loss on both, before", "forgotten of N (loss)",
              "against plain", "p", "loss on both, after"]  # fmt: skip
    rows = []
    for name, method in METHODS.items():
        if not (found := _of_method(records, method)):
            continue
        separation, forgotten = versus(found, plain, "separation"), versus(found, plain, "forgotten")
        assert separation is not None
        assert forgotten is not None
        same = not method
        apart = not same and "method" in method
        rows.append(
            [
                name,
                mean_cell(found, "separation", digits=2),
                change_cell(separation, 0) if apart else "",
                p_cell(separation.p_t) if apart else "",
                mean_cell(found, "loss"),
                mean_cell(found, "forgotten"),
                "" if same else interval_cell(forgotten.difference, 3),
                "" if same else p_cell(forgotten.p_t),
                mean_cell(found, "both_after"),
            ]
        )
    s = plain[0].settings
    title = (
        f"Two experiences, {seeds_line(plain)}: {s['steps']} steps on both, then {s['finetune_steps']} on P alone. "
        "*Forgotten*: how much the loss on N rose.\n\n"
    )
    return {"forgetting": title + table(header, rows)}


def pictures(records: list[Record], folder: Path) -> list[Path]:
    """The loss on N while the network is fine-tuned on P."""
    from ..pictures import band, figure, save

    made, (axis,) = figure(1, width=6.2, height=4.2)
    for i, (name, method) in enumerate(METHODS.items()):
        if found := _of_method(records, method):
            curves = [record.result["curve"] for record in found]
            late = [j for j, step in enumerate(curves[0]["step"]) if step >= 1500]
            band(axis, [curves[0]["step"][j] for j in late],
                 [[curve["loss_other"][j] for j in late] for curve in curves], f"C{i}", name)  # fmt: skip
    axis.axvline(records[0].settings["steps"], color="gray", ls=":")
    axis.set(xlabel="step; right of the dotted line on P alone", ylabel="loss on N", ylim=(0, None))
    axis.legend(frameon=False, fontsize=8)
    return [save(made, folder / "forgetting.png")]
