"""`examples/gpt2_fineweb.py` as a reader runs it, on one thread."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gapt_optim import GAPTConfig

from .settings import TaskSettings

EXAMPLE = Path(__file__).resolve().parents[3] / "examples" / "gpt2_fineweb.py"
MEASURES = {
    "linear": "linear_entropy",
    "centred_cosine": "centered_cosine_entropy",
    "norm_ratio": "norm_ratio",
    "mean_share": "mean_share",
}
"""Names of the evidence, and those that the example writes."""


@dataclass(frozen=True)
class Settings(TaskSettings):
    """Of one run: what is not named here is the example's own."""

    preset: str = "demo"
    corpus: str = "sotu"
    weight: float = GAPTConfig().objective.weight


def train(s: Settings) -> dict[str, Any]:
    """One run, and the figures that the example ends with."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "run"
        flags = {
            "preset": s.preset,
            "data": s.corpus,
            "methods": s.method,
            "seed": s.seed,
            "steps": s.steps,
            "weight": s.weight,
            "out": out,
        }
        words = [word for name, value in flags.items() for word in (f"--{name}", str(value))]
        command = [sys.executable, str(EXAMPLE), *words]
        offline = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, env={**os.environ, **offline}, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)} ended with {done.returncode}: {done.stderr[-2000:]}")
        run = json.loads((out / "results.json").read_text(encoding="utf-8"))["runs"][s.method]
        validations = [json.loads(line) for line in (out / s.method / "validation.jsonl").read_text().splitlines()]
    return {
        "final": {
            "loss": run["loss"],
            **{ours: run["measures"][theirs] for ours, theirs in MEASURES.items()},
            "compression": run["compression_share"],
            "switches": run["switches"],
        },
        "best": {},
        "curve": {
            "step": [held_out["step"] for held_out in validations],
            "loss": [held_out["loss"] for held_out in validations],
            **{ours: [held_out["measures"][theirs] for held_out in validations] for ours, theirs in MEASURES.items()},
        },
    }
