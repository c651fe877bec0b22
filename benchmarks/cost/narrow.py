"""What a step of a model with narrow layers costs with the wrapper, beside bare AdamW and the same done by hand.

    python -m benchmarks.cost.narrow --json benchmarks/cost/results/narrow.json

The library's work on a layer is mostly a fixed number of small operations, so it weighs most where the layer itself is
small. One thread, process CPU time; bare and wrapped steps of a model are taken in turn, in random order within a
round, and divided by the bare step of the round. All settings are the defaults, but for a gate that is frozen. By hand
means what one writes in twenty lines: hooks that keep the outputs, the entropy of windows of 8 by autograd (centred
cosine kernel, order 2), and numbers read with `.item()` for a gate.
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
import tyro
from torch import Tensor, nn

from gapt_optim import GAPTConfig, GAPTOptimizer, GateConfig, ObjectiveConfig, Observer, RepresentationHook

from .table import ratio_with_interval, show, time_rounds
from .workloads import BARE, Step, entropy_by_autograd

Phase = Literal["memorization", "compression"]
PHASES: tuple[Phase, ...] = ("memorization", "compression")
WEIGHT = ObjectiveConfig().weight


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
    """A model with random weights, the activations to watch, and a batch."""

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


def wrapped(narrow: Narrow, phase: Phase, observers: Sequence[Observer] = ()) -> Step:
    """Ours, with the gate frozen in ``phase``."""
    config = GAPTConfig(gate=GateConfig(initial_phase=phase, frozen=True))
    hook = RepresentationHook(narrow.model, narrow.layers)
    optimizer = GAPTOptimizer(torch.optim.AdamW(narrow.model.parameters(), lr=1e-4), hook, config, observers=observers)

    def step() -> None:
        optimizer.backward(nn.functional.cross_entropy(narrow.model(narrow.inputs), narrow.targets))
        optimizer.step()
        optimizer.zero_grad()

    return step


def by_hand(narrow: Narrow, phase: Phase) -> Callable[[], dict[str, float]]:
    """The same without the library."""
    optimizer = torch.optim.AdamW(narrow.model.parameters(), lr=1e-4)
    outputs: dict[str, Tensor] = {}
    for name in narrow.layers:
        module = narrow.model.get_submodule(name)
        module.register_forward_hook(lambda _, args, output, name=name: outputs.__setitem__(name, output))

    def entropy_of(output: Tensor) -> Tensor:
        rows = output if output.ndim == 2 else output.flatten(2).mT  # of an image, the positions are the rows
        return entropy_by_autograd(rows)

    def step() -> dict[str, float]:
        loss = nn.functional.cross_entropy(narrow.model(narrow.inputs), narrow.targets)
        with torch.set_grad_enabled(phase == "compression"):
            entropies = {name: entropy_of(output) for name, output in outputs.items()}
            entropy = torch.stack(list(entropies.values())).mean()
        (loss + WEIGHT * entropy if phase == "compression" else loss).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        optimizer.zero_grad()
        return {"loss": loss.item(), **{name: value.item() for name, value in entropies.items()}}

    return step


def measure(options: Options) -> dict[str, dict[str, Any]]:
    """Ratios of CPU time to the bare step of the same model; of ours, also to the same by hand."""
    figures: dict[str, dict[str, Any]] = {}
    for name, build in MODELS.items():
        seconds: dict[str, list[float]] = {}
        for repeat in range(options.repeats):
            steps: dict[str, Step] = {BARE: bare(build())}
            for phase in PHASES:
                steps[phase] = wrapped(build(), phase)
                steps[f"{phase} by hand"] = by_hand(build(), phase)
            for row, taken in time_rounds(steps, options.rounds, repeat).items():
                seconds.setdefault(row, []).extend(taken)
        for row, taken in seconds.items():
            ratio, low, high = ratio_with_interval(taken, seconds[BARE])
            ms = 1000 * statistics.median(taken)
            figures[f"{name}, {row}"] = {"cpu": ratio, "low": low, "high": high, "ms": ms}
        for phase in PHASES:
            figures[f"{name}, {phase}"]["over_by_hand"] = statistics.median(seconds[phase]) / statistics.median(
                seconds[f"{phase} by hand"]
            )
    return figures


def main(argv: list[str] | None = None) -> int:
    """Print the table."""
    options = tyro.cli(Options, args=argv, prog="python -m benchmarks.cost.narrow")
    torch.set_num_threads(1)
    figures = measure(options)
    show(figures, options.json)
    for row, figure in figures.items():
        if "over_by_hand" in figure:
            print(f"{row}: {figure['over_by_hand']:.2f} times the same by hand")
    return 0


if __name__ == "__main__":
    sys.exit(main())
