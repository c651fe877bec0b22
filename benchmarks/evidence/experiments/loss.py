"""What it does to loss: gate, late penalty, penalty and plain on text, under a tuned optimizer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..harness import Record, Run
from ..tasks import text

TUNING_SEEDS, SEEDS = range(3), range(300, 305)
RATES = {"adamw": (3e-3, 6e-3, 12e-3), "muon": (0.01, 0.02, 0.04)}
STARTS = (100, 200, 300)


def runs(first_look: bool, seeds: Sequence[int] | None) -> list[Run]:
    """Tuning, then the comparison."""
    base = text.Settings()
    tuning = replace(base, **text.TUNING)
    found = []
    for seed in TUNING_SEEDS:
        for optimizer, rates in RATES.items():
            found += [Run("text", replace(tuning, seed=seed, optimizer=optimizer, lr=lr)) for lr in rates]
        for weight in (0.03, 0.1):
            found.append(Run("text", replace(tuning, seed=seed, method="gapt", weight=weight)))
        for start in STARTS:
            late: dict[str, Any] = {"method": "penalty", "weight": 0.1, "objective": {"start": start}}
            found.append(Run("text", replace(tuning, seed=seed, **late)))
    return [run for run in found if seeds is None or run.settings.seed in seeds]


def tables(records: list[Record]) -> dict[str, str]:
    """None yet."""
    return {}


def pictures(records: list[Record], folder: Path) -> list[Path]:
    """None yet."""
    return []
