"""Whether 100,000 steps of a small model leave anything behind: memory, live objects, open files, slower steps.

    python -m benchmarks.cost.endurance --json benchmarks/cost/results/endurance.json

A loop as people write it: default settings with a gate that alternates, parameter alignment every 50 steps, a
scheduler, a log of every step, and every 10,000 steps a checkpoint that is written and loaded. Every tenth step, a bare
AdamW step of the same model is timed too, so that what else the machine does falls on both alike. One thread, process
CPU time. Linux only: memory and open files are read from /proc.
"""

from __future__ import annotations

import gc
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch
import tyro
from torch import Tensor, nn
from torch.nn import functional as F

from gapt_optim import AlignmentConfig, GAPTConfig, GAPTOptimizer, RepresentationHook
from gapt_optim.metrics import JSONLines

from .figures import write_figures

BLOCKS = 100
"""Rows of the figures: each is of a hundredth of the steps."""
BARE_EVERY = 10


@dataclass
class Options:
    """Memory, live objects, open files and step time over a long run."""

    steps: int = 100_000
    """A multiple of 100."""
    checkpoint_every: int = 10_000
    json: Path | None = None
    """Write the figures to this file."""
    picture: Path | None = None
    """Draw them to this file."""


class Small(nn.Module):
    """A residual block on sequences of 16 tokens."""

    def __init__(self, width: int = 16, vocabulary: int = 32) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width)
        self.block = nn.Sequential(nn.Linear(width, width), nn.Tanh())
        self.head = nn.Linear(width, vocabulary)

    def forward(self, tokens: Tensor) -> Tensor:
        h: Tensor = self.embedding(tokens)
        logits: Tensor = self.head(h + self.block(h))
        return logits


def batches(seed: int) -> Callable[[], tuple[Tensor, Tensor]]:
    """Tokens, and what follows each: a fixed table, with every fourth token at random."""
    generator = torch.Generator().manual_seed(seed)
    table = torch.randperm(32, generator=generator)

    def draw() -> tuple[Tensor, Tensor]:
        tokens, noise = torch.randint(32, (2, 4, 16), generator=generator)
        return tokens, torch.where(torch.rand(tokens.shape, generator=generator) < 0.25, noise, table[tokens])

    return draw


def loss_of(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    tokens, following = batch
    return F.cross_entropy(model(tokens).flatten(0, 1), following.flatten())


def left_behind() -> dict[str, float]:
    """What the process holds now beside what it held before the run, garbage collected."""
    gc.collect()
    objects = gc.get_objects()
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return {
        "mb": pages * os.sysconf("SC_PAGE_SIZE") / 1e6,
        "tensors": sum(issubclass(type(each), Tensor) for each in objects),
        "objects": len(objects),
        "handles": len(os.listdir("/proc/self/fd")),
    }


def measure(options: Options, folder: Path) -> dict[str, Any]:
    """Train, and look after each hundredth of the steps."""
    gc.collect()
    gc.freeze()  # modules and their functions are many, and stay
    try:
        return _trained(options, folder)
    finally:
        gc.unfreeze()


def _trained(options: Options, folder: Path) -> dict[str, Any]:
    torch.manual_seed(0)
    model, twin = Small(), Small()
    draw = batches(1)
    bare = torch.optim.AdamW(twin.parameters(), lr=3e-3)
    log = JSONLines(folder / "metrics.jsonl")
    optimizer = GAPTOptimizer(
        torch.optim.AdamW(model.parameters(), lr=3e-3),
        RepresentationHook(model, "block"),
        GAPTConfig(alignment=AlignmentConfig(parameter_every=50)),
        observers=[log],
    )
    scheduler = torch.optim.lr_scheduler.CosineAnnealingWarmRestarts(optimizer, T_0=1000)
    kept: dict[str, Any] = {"model": model, "optimizer": optimizer, "scheduler": scheduler}
    rows: list[dict[str, float]] = []
    ours: list[float] = []
    others: list[float] = []
    checkpoints = 0
    for step in range(1, options.steps + 1):
        batch = draw()
        start = time.process_time()
        optimizer.backward(loss_of(model, batch))
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step()
        ours.append(time.process_time() - start)
        if step % BARE_EVERY == 0:
            start = time.process_time()
            loss_of(twin, batch).backward()  # type: ignore[no-untyped-call]
            bare.step()
            bare.zero_grad()
            others.append(time.process_time() - start)
        if step % options.checkpoint_every == 0:
            checkpoints += 1
            torch.save({name: part.state_dict() for name, part in kept.items()}, folder / "checkpoint.pt")
            saved = torch.load(folder / "checkpoint.pt", weights_only=True)
            for name, part in kept.items():
                part.load_state_dict(saved[name])
            del saved
        if step % (options.steps // BLOCKS) == 0:
            medians = {"ms": 1000 * statistics.median(ours), "bare_ms": 1000 * statistics.median(others)}
            ours.clear()
            others.clear()
            rows.append({"step": step, **medians, **left_behind()})
    log.close()
    assert optimizer.metrics is not None
    return {
        "steps": options.steps,
        "switches": optimizer.metrics.switches,
        "checkpoints": checkpoints,
        "log_bytes": (folder / "metrics.jsonl").stat().st_size,
        "rows": rows,
    }


def tenths(figures: dict[str, Any]) -> dict[str, tuple[float, float]]:
    """Medians over the second and over the last tenth of the run. The first warms up.

    ``ratio`` is the time of a step over that of a bare one.
    """
    rows = [row | {"ratio": row["ms"] / row["bare_ms"]} for row in figures["rows"]]
    size = len(rows) // 10
    early, late = rows[size : 2 * size], rows[-size:]
    return {
        name: (statistics.median(row[name] for row in early), statistics.median(row[name] for row in late))
        for name in rows[0]
        if name != "step"
    }


def draw_picture(figures: dict[str, Any], path: Path) -> None:
    """A panel each for the time of a step, the memory, and what lives."""
    made, axes = plt.subplots(1, 3, figsize=(12, 3.4), layout="constrained")
    rows = figures["rows"]
    x = [row["step"] / 1000 for row in rows]

    def line(axis: Any, name: str, label: str, color: str, style: str = "-") -> None:
        axis.plot(x, [row[name] for row in rows], color=color, linestyle=style, label=label)

    line(axes[0], "ms", "with the wrapper", "#3b6fc4")
    line(axes[0], "bare_ms", "bare AdamW", "#6b6b6b")
    axes[0].set_ylabel("CPU time of a step (ms)")
    line(axes[1], "mb", "resident memory", "#3b6fc4")
    axes[1].set_ylabel("resident memory (MB)")
    line(axes[2], "objects", "Python objects", "#6b6b6b")
    line(axes[2], "tensors", "tensors", "#3b6fc4")
    line(axes[2], "handles", "open files", "#3b6fc4", ":")
    axes[2].set(yscale="log", ylabel="alive")
    for axis in axes[:2]:
        axis.set_ylim(0, 1.25 * axis.get_ylim()[1])
    axes[2].set_ylim(1, None)
    for axis in axes:
        axis.set_xlabel("thousand steps")
        axis.spines[["top", "right"]].set_visible(False)
        axis.legend(frameon=False, fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    made.savefig(path, dpi=130, metadata={"Software": None})
    plt.close(made)


def main(argv: list[str] | None = None) -> int:
    """Print the figures."""
    options = tyro.cli(Options, args=argv, prog="python -m benchmarks.cost.endurance")
    if options.steps < BLOCKS * BARE_EVERY or options.steps % BLOCKS:
        print(f"error: --steps {options.steps}: take a multiple of {BLOCKS}, at least 1000", file=sys.stderr)
        return 2
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        figures = measure(options, Path(folder))
    print(f"{options.steps} steps, {figures['switches']} switches, {figures['checkpoints']} checkpoints")
    for name, (early, late) in tenths(figures).items():
        print(f"{name:10} {early:12.3f} {late:12.3f} {late / early - 1:+.2%}")
    write_figures(figures, options.json)
    if options.picture is not None:
        draw_picture(figures, options.picture)
    return 0


if __name__ == "__main__":
    sys.exit(main())
