"""What a step of a model with narrow layers costs with the wrapper, beside bare AdamW.

    python -m benchmarks.cost.narrow --json benchmarks/cost/results/narrow.json

The library's work on a layer is mostly a fixed number of small operations, so it weighs most where the layer itself is
small. One thread, process CPU time; bare and wrapped steps of a model are taken in turn, in random order within a
round, and divided by the bare step of the round. All settings are the defaults, but for a gate that is frozen.
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
import tyro
from torch import Tensor, nn

from gapt_optim import GAPTConfig, GAPTOptimizer, GateConfig, RepresentationHook

from .table import ratio_with_interval, show, time_rounds
from .workloads import BARE, Step

Phase = Literal["memorization", "compression"]
PHASES: tuple[Phase, ...] = ("memorization", "compression")


@dataclass
class Options:
    """What a step of a narrow model costs, as a table of ratios with intervals."""

    rounds: int = 60
    """Rounds per repeat."""
    repeats: int = 5
    """Times that all models are built anew."""
    json: Path | None = None
    """Write the figures to this file."""


class Narrow(NamedTuple):
    """A model with random weights, the activations to tap, and a batch."""

    model: nn.Module
    layers: list[str]
    inputs: Tensor
    targets: Tensor


def cnn() -> Narrow:
    """Two convolutions of 16 and 32 channels on 16 images of 32 x 32."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10),
    )  # fmt: skip
    return Narrow(model, ["1", "4"], torch.randn(16, 3, 32, 32), torch.randint(10, (16,)))


def mlp() -> Narrow:
    """Three layers of width 64 on 64 samples."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
    return Narrow(model, ["1", "3"], torch.randn(64, 64), torch.randint(10, (64,)))


MODELS: dict[str, Callable[[], Narrow]] = {"CNN of 16 and 32 channels": cnn, "MLP of width 64": mlp}


def bare(narrow: Narrow) -> Step:
    """AdamW as torch has it."""
    optimizer = torch.optim.AdamW(narrow.model.parameters(), lr=1e-4)

    def step() -> None:
        nn.functional.cross_entropy(narrow.model(narrow.inputs), narrow.targets).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        optimizer.zero_grad()

    return step


def wrapped(narrow: Narrow, phase: Phase) -> Step:
    """Ours, with the gate frozen in ``phase``."""
    config = GAPTConfig(gate=GateConfig(initial_phase=phase, frozen=True))
    hook = RepresentationHook(narrow.model, narrow.layers)
    optimizer = GAPTOptimizer(torch.optim.AdamW(narrow.model.parameters(), lr=1e-4), hook, config)

    def step() -> None:
        optimizer.backward(nn.functional.cross_entropy(narrow.model(narrow.inputs), narrow.targets))
        optimizer.step()
        optimizer.zero_grad()

    return step


def measure(options: Options) -> dict[str, dict[str, Any]]:
    """Ratios of CPU time to the bare step of the same model."""
    figures: dict[str, dict[str, Any]] = {}
    for name, build in MODELS.items():
        seconds: dict[str, list[float]] = {}
        for repeat in range(options.repeats):
            steps = {BARE: bare(build())} | {phase: wrapped(build(), phase) for phase in PHASES}
            for row, taken in time_rounds(steps, options.rounds, repeat).items():
                seconds.setdefault(row, []).extend(taken)
        for row, taken in seconds.items():
            ratio, low, high = ratio_with_interval(taken, seconds[BARE])
            ms = 1000 * statistics.median(taken)
            figures[f"{name}, {row}"] = {"cpu": ratio, "low": low, "high": high, "ms": ms}
    return figures


def main(argv: list[str] | None = None) -> int:
    """Print the table."""
    options = tyro.cli(Options, args=argv, prog="python -m benchmarks.cost.narrow")
    torch.set_num_threads(1)
    show(measure(options), options.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
