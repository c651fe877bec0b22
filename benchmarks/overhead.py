"""What a training step costs with the wrapper, side by side with a bare AdamW step and the plain ways.

    python benchmarks/overhead.py [--steps 60] [--repeats 3] [--json FILE]

One thread, process CPU time. The steps of all workloads are taken in turn, in random order within a round, and
each is divided by the bare step of its round, so that what else the machine does cancels out.
Memory is the peak of live tensor bytes over three steps, model and optimizer state included.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile
from workloads import STEPS, Step

BARE = "bare AdamW"
PARAMETER_EVERY = 50


def time_rounds(steps: dict[str, Step], rounds: int, seed: int) -> dict[str, list[float]]:
    """CPU seconds per step; the first two rounds warm up."""
    order = list(steps)
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    shuffle = random.Random(seed)
    for i in range(rounds + 2):
        shuffle.shuffle(order)
        for name in order:
            start = time.process_time()
            steps[name]()
            if i >= 2:
                seconds[name].append(time.process_time() - start)
    return seconds


def ratio_with_interval(ours: list[float], bare: list[float], samples: int = 1000) -> tuple[float, float, float]:
    """Median of the paired ratios and its 95 % bootstrap interval."""
    ratios = [a / b for a, b in zip(ours, bare, strict=True)]
    shuffle = random.Random(0)
    medians = sorted(statistics.median(shuffle.choices(ratios, k=len(ratios))) for _ in range(samples))
    return statistics.median(ratios), medians[int(0.025 * samples)], medians[int(0.975 * samples)]


def peak_bytes(build: str) -> int:
    """Peak of live tensor bytes while a workload is built and runs three steps."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recording:
        step = STEPS[build]()
        for _ in range(3):
            step()
    live = peak = 0
    for event in recording.profiler.kineto_results.events():
        if event.name() == "[memory]":
            live += event.nbytes()
            peak = max(peak, live)
    return peak


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=60, help="rounds per repeat")
    parser.add_argument("--repeats", type=int, default=3, help="times that all workloads are built anew")
    parser.add_argument("--only", nargs="*", default=list(STEPS), help="names of workloads")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    options = parser.parse_args()

    torch.set_num_threads(1)
    names = [name for name in STEPS if name in options.only or name == BARE]
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for repeat in range(options.repeats):
        # Built anew, because where a workload's memory happens to lie changes its speed by a few per cent.
        rounds = time_rounds({name: STEPS[name]() for name in names}, options.steps, repeat)
        for name in names:
            seconds[name] += rounds[name]
    memory = {name: peak_bytes(name) for name in names}

    figures: dict[str, dict[str, Any]] = {}
    print("| step | CPU time against bare | 95 % interval | peak memory against bare |")
    print("|---|---|---|---|")
    for name in names:
        ratio, low, high = ratio_with_interval(seconds[name], seconds[BARE])
        share = memory[name] / memory[BARE]
        figures[name] = {"cpu": ratio, "cpu_ci95": [low, high], "memory": share}
        print(f"| {name} | {ratio:.3f} | {low:.3f} to {high:.3f} | {share:.3f} |")
    measured, silent = "compression, parameter alignment every step", "compression, activation alignment"
    if measured in figures and silent in figures:
        cost = (figures[measured]["cpu"] - figures[silent]["cpu"]) / PARAMETER_EVERY + figures[silent]["cpu"]
        figures[f"parameter alignment every {PARAMETER_EVERY} steps"] = {"cpu": cost}
        print(f"| parameter alignment every {PARAMETER_EVERY} steps, amortized | {cost:.3f} | | |")
    if options.json:
        options.json.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
