"""Made-up runs with everything that a run can write down."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path
from typing import Any

from gapt_optim.reporting import Run

HOSTILE = '<script>window.hacked=1</script><img src=x onerror="window.hacked=1"> %{x} $a$ </table>&amp; "quoted"'


def records(
    steps: int = 200,
    *,
    layers: int = 3,
    seed: int = 0,
    period: int = 50,
    plain: bool = False,
    prefix: str = "h.",
    norms: bool = False,
    measures: bool = True,
) -> list[dict[str, Any]]:
    """Compression in the second half of each period; with ``norms``, it lowers the linear entropy alone."""
    noise = random.Random(seed)
    found: list[dict[str, Any]] = []
    entropy = cosine = 1.6
    for step in range(1, steps + 1):
        phase, following = (
            "compression" if not plain and (at % period) >= period // 2 else "memorization" for at in (step - 1, step)
        )
        if phase == "compression":
            entropy += (0.3 - entropy) * 0.1
            cosine += 0 if norms else (0.6 - cosine) * 0.1
        names = [f"{prefix}{i}" for i in range(layers)]
        values = {name: entropy * (1 + 0.1 * i) for i, name in enumerate(names)}
        record: dict[str, Any] = {
            "step": step,
            "phase": phase,
            "next_phase": following,
            "reason": None if phase == following else "plateau" if following == "compression" else "compressed",
            "loss": 2 + 5 * math.exp(-5 * step / steps) + noise.gauss(0, 0.05),
            "entropy": sum(values.values()) / layers,
            "layer_entropy": values,
            "entropy_share": 0.05 if phase == "compression" else None,
            "alignment": {
                "cosine": math.sin(step / 7),
                "layers": {name: {"cosine": math.sin(step / 7 + i)} for i, name in enumerate(names)},
            },
            "parameter_alignment": {"cosine": math.cos(step / 9)} if step % 10 == 0 else None,
            "nonfinite_steps": 0,
        }
        if measures:
            one = {
                "linear_entropy": entropy,
                "centered_cosine_entropy": cosine,
                "norm_ratio": 20.0 if norms and entropy < 1 else 1.5,
                "mean_share": 0.2,
            }
            record |= {"measures": one, "layer_measures": dict.fromkeys(names, one)}
        found.append(record)
    return found


def held_out(steps: list[dict[str, Any]]) -> list[dict[str, Any]]:
    kept = ("step", "loss", "entropy", "layer_entropy", "measures", "layer_measures")
    return [{key: record[key] for key in kept if key in record} for record in steps[19::20]]


def history(settings: dict[str, Any] | None = None, **changes: Any) -> Run:
    steps = records(**changes)
    return Run.of(steps, held_out(steps), settings)


def write_lines(path: Path, lines: list[dict[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return path


def write_run(folder: Path, settings: dict[str, Any] | None = None, **changes: Any) -> Path:
    """A run's folder."""
    steps = records(**changes)
    write_lines(folder / "metrics.jsonl", steps)
    write_lines(folder / "validation.jsonl", held_out(steps))
    (folder / "settings.json").write_text(json.dumps(settings or {"lr": 1e-3}))
    return folder
