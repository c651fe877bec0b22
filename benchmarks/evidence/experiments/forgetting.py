"""What it does to forgetting: the author's two tests, beside L2 toward the old weights and rehearsal."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..harness import Record, Run
from ..tasks import conflict

TUNING_SEEDS, SEEDS = range(3), range(300, 310)
L2 = (0.1, 1.0, 10.0, 100.0)
REHEARSED = (2, 4, 8, 16)
WEIGHTS = (0.1, 0.3, 1.0, 3.0)
TUNED: dict[str, dict[str, Any]] = {}


def runs(first_look: bool, seeds: Sequence[int] | None) -> list[Run]:
    """Tuning of each method over its strength, then the comparison."""
    s = conflict.Settings()
    grids: list[dict[str, Any]] = [{}]
    grids += [{"toward_old": strength} for strength in L2]
    grids += [{"rehearsed": samples} for samples in REHEARSED]
    for method in ("penalty", "gapt"):
        grids += [{"method": method, "weight": w, "center": False} for w in WEIGHTS]
    found = [Run("conflict", replace(s, seed=seed, **point)) for seed in TUNING_SEEDS for point in grids]
    found += [Run("conflict", replace(s, seed=seed, **point)) for seed in SEEDS for point in TUNED.values()]
    return [run for run in found if seeds is None or run.settings.seed in seeds]


def tables(records: list[Record]) -> dict[str, str]:
    """None yet."""
    return {}


def pictures(records: list[Record], folder: Path) -> list[Path]:
    """None yet."""
    return []
