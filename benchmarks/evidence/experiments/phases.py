"""Entropies as a measure: the phases of one plain pretraining, with the profile tool."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from ..harness import Record, Run
from ..markdown import table
from ..tasks import phases

MEASURES = {"cosine": "entropy (nats)", "rankme": "RankMe"}


def runs(first_look: bool, seeds: Sequence[int] | None) -> list[Run]:
    """A plain run per seed."""
    return [Run("phases", replace(phases.Settings(), seed=seed)) for seed in seeds or (300,)]


def tables(records: list[Record]) -> dict[str, str]:
    """Loss, and of each block the entropy and RankMe, at a few steps."""
    s, curve = records[0].settings, records[0].result["curve"]
    names = [f"{measure}_{i}" for measure in MEASURES for i in range(s["blocks"])]
    header = ["step", "held-out loss", *(f"{'entropy' if m == 'cosine' else 'RankMe'}, block {i + 1}"
                                         for m in MEASURES for i in range(s["blocks"]))]  # fmt: skip
    steps = curve["step"]
    rows = []
    for wanted in (0, 10, 20, 40, 80, 150, 300, 500, 800):
        at = min(range(len(steps)), key=lambda i: abs(steps[i] - wanted))
        cells = [f"{curve[name][at]:.2f}" if name.startswith("cosine") else f"{curve[name][at]:.1f}" for name in names]
        rows.append([f"{steps[at]:.0f}", f"{curve['loss'][at]:.3f}", *cells])
    title = f"Plain training on {s['train_bytes'] // 1_000_000} MB of bytes, seed {s['seed']}, {s['steps']} steps.\n\n"
    return {"phases": title + table(header, rows)}


def pictures(records: list[Record], folder: Path) -> list[Path]:
    """Loss, entropy and RankMe over steps."""
    from ..pictures import figure, save

    curve = records[0].result["curve"]
    made, axes = figure(3)
    axes[0].plot(curve["step"][1:], curve["loss"][1:], color="#6b6b6b")
    axes[0].set(ylabel="held-out loss (nats)")
    for axis, (measure, label) in zip(axes[1:], MEASURES.items(), strict=True):
        for i in range(records[0].settings["blocks"]):
            axis.plot(curve["step"][1:], curve[f"{measure}_{i}"][1:], label=f"block {i + 1}")
        axis.set(ylabel=label)
    for axis in axes:
        axis.set(xlabel="step", xscale="log")
    axes[1].legend(frameon=False, fontsize=8)
    return [save(made, folder / "phases.png")]
