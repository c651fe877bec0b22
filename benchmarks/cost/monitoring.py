"""What `monitor(model, every=50)` costs beside a bare AdamW step.

    python -m benchmarks.cost.monitoring

One thread, process CPU time. A bare step, one that a monitor reports and one between two reports are taken in turn,
each with a model of its own; over `every` steps one reports and the others do not.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro

from gapt_optim import monitor

from .figures import write_figures
from .table import ratio_with_interval, time_rounds
from .workloads import SMALL, Size, Step, batch, build_model


@dataclass
class Options:
    """What a monitor costs."""

    rounds: int = 60
    """Steps of each kind."""
    every: int = 50
    """Steps from one report to the next."""
    json: Path | None = None
    """Write the figures to this file."""


def step_of(size: Size, every: int | None) -> Step:
    """A step, monitored or not (None)."""
    model, tokens = build_model(size), batch(size)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    if every is not None:
        monitor(model, "transformer.h.*", every=every).__enter__()

    def step() -> None:
        model(tokens, labels=tokens).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def measure(options: Options, size: Size = SMALL) -> dict[str, dict[str, float]]:
    """Ratios of CPU time to the bare step."""
    kinds = {"bare AdamW": None, "a step between two reports": 10**9, "a step that reports": 1}
    seconds = time_rounds({name: step_of(size, every) for name, every in kinds.items()}, options.rounds, seed=0)
    bare, between, reports = seconds.values()
    figures = {}
    for name, times in seconds.items():
        ratio, low, high = ratio_with_interval(times, bare)
        figures[name] = {"cpu": ratio, "low": low, "high": high}
    share = 1 / options.every
    mixed = [share * a + (1 - share) * b for a, b in zip(reports, between, strict=True)]
    ratio, low, high = ratio_with_interval(mixed, bare)
    figures[f"every={options.every}"] = {"cpu": ratio, "low": low, "high": high}
    return figures


def main(argv: list[str] | None = None) -> int:
    """Print the ratios."""
    options = tyro.cli(Options, args=argv, prog="python -m benchmarks.cost.monitoring")
    torch.set_num_threads(1)
    figures = measure(options)
    for name, figure in figures.items():
        print(f"{name}: {json.dumps(figure)}")
    write_figures(figures, options.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
