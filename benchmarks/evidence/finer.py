"""Whether the floor's lead on top of a remedy is a lead over a remedy that was tuned too coarsely.

    python -m benchmarks.evidence.finer

On digits, L2 toward the initial weights is tuned in finer steps than in the experiment `trainability` (1.5 for rates, 2
for strengths, where that has 3), on the same tuning seeds; then a floor of order 1/2 on top of the best point found,
over its weight alone. Both are run on the experiment's ten seeds. Takes five minutes on one core.
"""

from __future__ import annotations

import json
import statistics
from dataclasses import replace
from typing import Any

import torch

from .experiments.trainability import METHODS, SEEDS, SETTINGS, TUNING_SEEDS
from .harness import RESULTS, Run, train_run

RATES, STRENGTHS, WEIGHTS = (0.003, 0.0045, 0.0065, 0.009, 0.013), (0.0125, 0.025, 0.05, 0.1), (0.5, 1.0, 2.0, 4.0)
L2 = METHODS["toward start"].fields
FLOOR_ON_L2 = {**METHODS["floor, order 1/2"].fields, **L2}
PATH = RESULTS / "finer" / "trainability.json"


def accuracies(fields: dict[str, Any], seeds: Any) -> list[float]:
    """Held out, of each seed."""
    runs = [Run("trainability", replace(SETTINGS["digits"], **fields, seed=seed)) for seed in seeds]
    return [float(train_run(run).result["final"]["accuracy"]) for run in runs]


def best(points: list[dict[str, Any]]) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The point of the highest mean on the tuning seeds, and all with theirs."""
    tried = [{**point, "accuracy": statistics.fmean(accuracies(point, TUNING_SEEDS))} for point in points]
    return max(zip(points, tried, strict=True), key=lambda pair: float(pair[1]["accuracy"]))[0], tried


def main() -> None:
    """Train, and write the results."""
    torch.set_num_threads(1)
    l2, of_l2 = best([{**L2, "lr": rate, "strength": strength} for rate in RATES for strength in STRENGTHS])
    floor, of_floor = best([{**FLOOR_ON_L2, **l2, "weight": weight} for weight in WEIGHTS])
    found = {
        "command": "python -m benchmarks.evidence.finer",
        "tuning_seeds": list(TUNING_SEEDS),
        "tuned": {"toward start": of_l2, "floor, order 1/2 on toward start": of_floor},
        "seeds": list(SEEDS),
        "toward start": {**l2, "accuracy": accuracies(l2, SEEDS)},
        "floor, order 1/2 on toward start": {**floor, "accuracy": accuracies(floor, SEEDS)},
    }
    PATH.parent.mkdir(exist_ok=True)
    PATH.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
