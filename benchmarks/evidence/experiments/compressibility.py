"""What it does to compressibility: inner blocks cut to few directions, at the end or before training goes on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..harness import Record, Run
from ..tasks import cut, text

SEEDS = range(300, 305)
HALF: dict[str, Any] = {"method": "gapt", "alpha": 0.5, "window": 64, "layers": {"skip_last": 1}}
"""Order 1/2 over whole sequences, on the blocks that are cut."""
GRIDS: dict[str, list[dict[str, Any]]] = {
    "plain": [{}],
    "weight decay": [{"weight_decay": decay} for decay in (0.3, 1.0, 3.0)],
    "nuclear norm": [{"method": "nuclear", "weight": weight} for weight in (0.1, 0.3, 1.0)],
    "gate, order 1/2": [{**HALF, "weight": weight} for weight in (0.03, 0.1, 0.3)],
}
"""Tried on the first tuning seed."""
TUNED: dict[str, dict[str, Any]] = {}


def runs(first_look: bool, seeds: Sequence[int] | None) -> list[Run]:
    """Tuning, then the comparison."""
    base = cut.Settings(evaluate_sequences=960)
    tuning = replace(base, **text.TUNING, seed=0)
    found = [Run("cut", replace(tuning, **point)) for grid in GRIDS.values() for point in grid]
    found += [Run("cut", replace(base, seed=seed, **point)) for seed in SEEDS for point in TUNED.values()]
    return [run for run in found if seeds is None or run.settings.seed in seeds]


def tables(records: list[Record]) -> dict[str, str]:
    """None yet."""
    return {}


def pictures(records: list[Record], folder: Path) -> list[Path]:
    """None yet."""
    return []
