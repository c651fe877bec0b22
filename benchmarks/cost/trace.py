"""What one step runs: files, named functions of ours, library calls, and lines by room.

    python -m benchmarks.cost.trace
    python -m benchmarks.cost.trace --functions    # each function, and how often it was called

The third step of a model of four small layers is traced with `sys.setprofile`, in memorization and in compression, so
that what is decided once, at the first, does not count. Angles and measures are taken at the first step and not at the
third, as at nine steps of ten. *Named functions* are ours, without lambdas and comprehensions. *Library calls* are
calls that our code makes of functions written in C: torch's operations, and Python's own. Needs Python 3.11.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

import torch
import tyro
from torch import nn

import gapt_optim
from gapt_optim import GAPTConfig, GAPTOptimizer, GateConfig, RepresentationHook

from .narrow import PHASES, Phase

PACKAGE = Path(gapt_optim.__file__).parent
LAYERS = 4


@dataclass
class Options:
    """What one step runs: files, named functions of ours, library calls, and lines by room."""

    functions: bool = False
    """List the functions, with how often each was called."""


class Traced(NamedTuple):
    """What ran of a step."""

    files: Counter[str]
    """Calls by file of ours, as ``layout/reading.py``."""
    functions: Counter[str]
    """Calls by named function of ours, as ``watching.py Watch.__call__``."""
    library_calls: int


class Tracer:
    """Counts what runs while it is open."""

    def __init__(self) -> None:
        self.traced = Traced(Counter(), Counter(), 0)
        self.library_calls = 0

    def __enter__(self) -> Tracer:
        sys.setprofile(self._saw)
        return self

    def __exit__(self, *exception: object) -> None:
        sys.setprofile(None)
        self.traced = self.traced._replace(library_calls=self.library_calls)

    def _saw(self, frame: FrameType, event: str, argument: Any) -> None:
        if event == "c_call":
            self.library_calls += file_of(frame) is not None
        elif event == "call":
            own = file_of(frame)
            if own is not None:
                self.traced.files[own] += 1
                name = frame.f_code.co_qualname.replace(".<locals>", "")
                if "<" not in name:
                    self.traced.functions[f"{own} {name}"] += 1


def file_of(frame: FrameType) -> str | None:
    """The file of ours that a frame is in."""
    path = Path(frame.f_code.co_filename)
    return str(path.relative_to(PACKAGE)) if path.is_relative_to(PACKAGE) else None


def step_of(phase: Phase) -> Callable[[], None]:
    """A step of four linear layers, all of them watched."""
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(16, 16) for _ in range(LAYERS)))
    config = GAPTConfig(gate=GateConfig(initial_phase=phase, frozen=True))
    optimizer = GAPTOptimizer(torch.optim.SGD(model.parameters(), lr=0.0), RepresentationHook(model, "*"), config)
    inputs = torch.randn(4, 16, 16)

    def step() -> None:
        optimizer.backward(model(inputs).square().mean())
        optimizer.step()
        optimizer.zero_grad()

    return step


def traced_step(phase: Phase) -> Traced:
    """The third step."""
    step = step_of(phase)
    for _ in range(2):
        step()
    with Tracer() as tracer:
        step()
    return tracer.traced


def lines_by_room() -> Counter[str]:
    """Lines of each module or folder of the package."""
    found: Counter[str] = Counter()
    for path in sorted(PACKAGE.rglob("*.py")):
        room = path.relative_to(PACKAGE).parts[0]
        found[room] += len(path.read_text(encoding="utf-8").splitlines())
    return found


def main(argv: list[str] | None = None) -> int:
    """Print the tables."""
    options = tyro.cli(Options, args=argv, prog="python -m benchmarks.cost.trace")
    print(f"| the third step of {LAYERS} layers | files | named functions | their calls | library calls |")
    print("|---|---:|---:|---:|---:|")
    traced = {phase: traced_step(phase) for phase in PHASES}
    for phase, found in traced.items():
        numbers = len(found.files), len(found.functions), found.functions.total(), found.library_calls
        print(f"| {phase} | {' | '.join(map(str, numbers))} |")
    print("\n| room | lines | in a step |\n|---|---:|---|")
    for room, lines in lines_by_room().most_common():
        ran = [phase for phase, found in traced.items() if any(Path(file).parts[0] == room for file in found.files)]
        print(f"| {room} | {lines:,} | {', '.join(ran)} |")
    for phase, found in traced.items() if options.functions else ():
        print(f"\n{phase}:")
        for name, times in sorted(found.functions.items()):
            print(f"{times:5} {name}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
