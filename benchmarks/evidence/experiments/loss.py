"""What it does to loss: gate, late penalty, penalty and plain on text, under a tuned optimizer."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..harness import Record, Run
from ..markdown import change_cell, compression_cell, group, mean_cell, p_cell, paired, seeds_line, table, values, versus
from ..stats import Interval, compare, mean_interval, over_seeds_and_text
from ..tasks import text

TUNING_SEEDS, SEEDS = range(3), range(300, 305)
RATES = {"adamw": (3e-3, 6e-3, 12e-3), "muon": (0.01, 0.02, 0.04, 0.08, 0.16)}
"""Tried on the first tuning seed, where they differ by ten times what seeds do."""
ADAMW: dict[str, Any] = {"optimizer": "adamw", "lr": 6e-3}
STARTS = (100, 200, 300)
METHODS: dict[str, dict[str, Any]] = {}


def runs(first_look: bool, seeds: Sequence[int] | None) -> list[Run]:
    """Tuning, then the comparison."""
    base = text.Settings()
    tuning = replace(base, **text.TUNING)
    found = []
    for seed in TUNING_SEEDS:
        of_seed = replace(tuning, seed=seed)
        if seed == 0:
            for optimizer, rates in RATES.items():
                found += [Run("text", replace(of_seed, optimizer=optimizer, lr=lr)) for lr in rates]
        found.append(Run("text", of_seed))
        found += [Run("text", replace(of_seed, method="gapt", weight=weight)) for weight in (0.03, 0.1)]
        for start in STARTS:
            late: dict[str, Any] = {"method": "penalty", "weight": 0.1, "objective": {"start": start}}
            found.append(Run("text", replace(of_seed, **late)))
    for seed in SEEDS:
        found += [Run("text", replace(base, seed=seed, **method)) for method in METHODS.values()]
    return [run for run in found if seeds is None or run.settings.seed in seeds]


def tables(records: list[Record]) -> dict[str, str]:
    """None yet."""
    return {}


def pictures(records: list[Record], folder: Path) -> list[Path]:
    """None yet."""
    return []
