"""What a training step costs with the wrapper, beside a bare AdamW step and other ways to do the same.

    python -m benchmarks.cost.table                      # the small model, every row
    python -m benchmarks.cost.table --wide               # windows at 1,024 tokens of width 768
    python -m benchmarks.cost.table --entropy            # matrix_entropy alone, against eigenvalues

One thread, process CPU time. The steps of all rows are taken in turn, in random order within a round, and each is
divided by the bare step of its round, so that what else the machine does cancels out. The interval is that of the
median of these ratios, by scipy's bootstrap. Memory is the peak of live tensor bytes over three steps, model and
optimizer state included.
"""

from __future__ import annotations

import random
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tyro
from scipy import stats
from torch.profiler import ProfilerActivity, profile

from gapt_optim import matrix_entropy

from .figures import write_figures
from .workloads import BARE, SELDOM, SMALL, STEPS, WIDE, WINDOWS, Build, Size, Step, entropy_by_eigenvalues

WARM_UP = 2
_TIMES = ("cpu", "low", "high", "ms")


@dataclass
class Options:
    """What a step costs, as a table of ratios with intervals."""

    rounds: int = 40
    """Rounds per repeat."""
    repeats: int = 2
    """Times that all rows are built anew: where a row's memory happens to lie changes its speed by a few per cent."""
    wide: bool = False
    """Windows at 1,024 tokens of width 768, instead of the small model."""
    entropy: bool = False
    """matrix_entropy with its gradient at (64, 1024, 768) against eigenvalues, instead of training steps."""
    matrices: int = 64
    """With --entropy: matrices of 1,024 x 768. Both ways take them one by one, so few give the same ratio."""
    only: tuple[str, ...] = ()
    """Only rows whose names hold one of these."""
    memory: bool = True
    """Measure memory too."""
    json: Path | None = None
    """Write the figures to this file."""


def time_rounds(steps: dict[str, Step], rounds: int, seed: int) -> dict[str, list[float]]:
    """CPU seconds per step; the first rounds warm up."""
    order = list(steps)
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    shuffle = random.Random(seed)
    for i in range(rounds + WARM_UP):
        shuffle.shuffle(order)
        for name in order:
            start = time.process_time()
            steps[name]()
            if i >= WARM_UP:
                seconds[name].append(time.process_time() - start)
    return seconds


def ratio_with_interval(ours: list[float], bare: list[float]) -> tuple[float, float, float]:
    """Median of the paired ratios and its 95 % interval."""
    ratios = np.asarray(ours) / np.asarray(bare)
    if len(ratios) < 2 or np.ptp(ratios) == 0:
        return (float(np.median(ratios)),) * 3
    interval = stats.bootstrap(
        (ratios,), np.median, n_resamples=2000, method="percentile", rng=np.random.default_rng(0)
    ).confidence_interval
    return float(np.median(ratios)), float(interval.low), float(interval.high)


def peak_bytes(step: Callable[[], object], times: int = 3) -> int:
    """Peak of live tensor bytes over so many steps, above what lives now."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recording:
        for _ in range(times):
            step()
    live = peak = 0
    for event in recording.profiler.kineto_results.events():
        if event.name() == "[memory]":
            live += event.nbytes()
            peak = max(peak, live)
    return peak


def peak_of(build: Build, size: Size) -> int:
    """Peak of live tensor bytes while a row is built and takes three steps."""
    built: list[Step] = []

    def build_and_step() -> None:
        if not built:
            built.append(build(size))
        built[0]()

    return peak_bytes(build_and_step)


def measure(rows: dict[str, Build], size: Size, options: Options) -> dict[str, dict[str, Any]]:
    """Ratios of CPU time and memory to the bare step."""
    names = [n for n in rows if n == BARE or not options.only or any(part in n for part in options.only)]
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for repeat in range(options.repeats):
        taken = time_rounds({name: rows[name](size) for name in names}, options.rounds, repeat)
        for name in names:
            seconds[name] += taken[name]
    memory = {name: peak_of(rows[name], size) for name in names} if options.memory else {}
    figures: dict[str, dict[str, Any]] = {}
    for name in names:
        ratio, low, high = ratio_with_interval(seconds[name], seconds[BARE])
        figures[name] = {"cpu": ratio, "low": low, "high": high, "ms": 1000 * statistics.median(seconds[name])}
        if memory:
            figures[name]["memory"] = memory[name] / memory[BARE]
    for name, (never, always, period) in SELDOM.items():
        if {name, never, always} <= figures.keys():
            figures[name].update(
                {k: figures[never][k] + (figures[always][k] - figures[never][k]) / period for k in _TIMES}
            )
    return figures


def entropy_alone(rounds: int = 5, shape: tuple[int, int, int] = (64, 1024, 768)) -> dict[str, dict[str, Any]]:
    """Seconds of an entropy with its gradient, ours and by eigenvalues."""
    z = torch.randn(shape, generator=torch.Generator().manual_seed(0)).requires_grad_()

    def ours() -> None:
        matrix_entropy(z).mean().backward()  # type: ignore[no-untyped-call]

    def eigenvalues() -> None:
        entropy_by_eigenvalues(z, None).backward()  # type: ignore[no-untyped-call]

    ways: dict[str, Callable[[], None]] = {"matrix_entropy": ours, "by eigenvalues": eigenvalues}
    figures: dict[str, dict[str, Any]] = {}
    for name, way in ways.items():
        taken = []
        for _ in range(rounds):
            z.grad = None
            start = time.process_time()
            way()
            taken.append(time.process_time() - start)
        figures[name] = {"ms": 1000 * min(taken)}
    for figure in figures.values():
        figure["cpu"] = figure["ms"] / figures["matrix_entropy"]["ms"]
    return figures


def markdown(figures: dict[str, dict[str, Any]]) -> str:
    """The table."""
    lines = ["| step | CPU time | 95 % interval | ms | memory |", "|---|---:|---:|---:|---:|"]
    for name, f in figures.items():
        interval = f"{f['low']:.3f} to {f['high']:.3f}" if "low" in f and name != BARE else ""
        memory = f"{f['memory']:.3f}" if "memory" in f else ""
        lines.append(f"| {name} | {f['cpu']:.3f} | {interval} | {f['ms']:.1f} | {memory} |")
    return "\n".join(lines)


def show(figures: dict[str, Any], path: Path | None) -> None:
    """Print the table, and write the figures where a file is named."""
    print(markdown(figures))
    write_figures(figures, path)


def main(argv: list[str] | None = None) -> int:
    """Print the table."""
    options = tyro.cli(Options, args=argv, prog="python -m benchmarks.cost.table")
    torch.set_num_threads(1)
    if options.entropy:
        figures = entropy_alone(min(options.rounds, 3), (options.matrices, 1024, 768))
    elif options.wide:
        figures = measure(WINDOWS, WIDE, options)
    else:
        figures = measure(STEPS, SMALL, options)
    show(figures, options.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
