"""What `gapt-optim profile` costs beside the forward passes alone, at its default settings.

    python -m benchmarks.cost.profiling --json benchmarks/cost/results/profile.json

One thread, process CPU time, 100,000 random tokens in batches of 8 x 512. Before each batch of the profile, a copy of
the model without hooks runs it too, so that what else the machine does falls on both alike. The time of the profile
includes its end: eigenvalues for RankMe. Memory is the peak of live tensor bytes, weights included.
"""

from __future__ import annotations

import copy
import json
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tyro
from scipy import stats
from torch import Tensor, nn

from gapt_optim.profiling import profile
from gapt_optim.profiling.statistics import MOST_RANKME_ROWS, ROWS_PER_FEATURE

from .table import peak_bytes, show

BATCH, LENGTH = 8, 512
FORWARD = "forward passes alone"


@dataclass
class Options:
    """Time and memory of a profile against the forward passes alone."""

    tokens: int = 100_000
    """What the command reads by default."""
    layers: int = 6
    """Of each model."""
    width: int = 512
    """Of each model."""
    memory: bool = True
    """Measure memory too, at 2 and at 8 batches."""
    json: Path | None = None
    """Write the figures to this file."""


def gpt2(options: Options) -> nn.Module:
    """Random weights, without its head, as the command loads it."""
    from transformers import GPT2Config, GPT2Model

    config = GPT2Config(n_embd=options.width, n_layer=options.layers, n_head=options.width // 64)
    model: nn.Module = GPT2Model(config)
    return model.eval()


def llama(options: Options) -> nn.Module:
    """The same of a Llama, with half as many heads for keys."""
    from transformers import LlamaConfig, LlamaModel

    config = LlamaConfig(
        hidden_size=options.width, intermediate_size=11 * options.width // 4, num_hidden_layers=options.layers,
        num_attention_heads=options.width // 64, num_key_value_heads=options.width // 128,
    )  # fmt: skip
    model: nn.Module = LlamaModel(config)
    return model.eval()


MODELS: dict[str, Callable[[Options], nn.Module]] = {"GPT-2": gpt2, "Llama": llama}


def batches(count: int) -> list[dict[str, Tensor]]:
    """Random tokens."""
    generator = torch.Generator().manual_seed(0)
    shape = (BATCH, LENGTH)
    mask = torch.ones(shape, dtype=torch.long)
    return [
        {"input_ids": torch.randint(1, 30_000, shape, generator=generator), "attention_mask": mask}
        for _ in range(count)
    ]


def forward(model: nn.Module, batch: dict[str, Tensor]) -> None:
    """What a profile cannot do without."""
    with torch.no_grad():
        model(**batch, use_cache=False)


def time_profile(model: nn.Module, count: int) -> tuple[list[float], list[float], float]:
    """CPU seconds of the forward pass and of the profile for each batch, and those of the profile's end."""
    bare = copy.deepcopy(model)
    ours: list[float] = []
    alone: list[float] = []
    now = [0.0]

    def paired() -> Iterator[dict[str, Tensor]]:
        for batch in batches(count):
            start = time.process_time()
            forward(bare, batch)
            now[0] = time.process_time()
            alone.append(now[0] - start)
            yield batch
            ours.append(time.process_time() - now[0])
        now[0] = time.process_time()

    forward(bare, batches(1)[0])
    profile(model, paired())
    return alone, ours, time.process_time() - now[0]


def ratio_of_sums(ours: list[float], alone: list[float], end: float) -> tuple[float, float, float]:
    """The whole profile over all forward passes, and its 95 % interval over batches."""
    spread = np.asarray(ours) + end / len(ours)
    over: Callable[..., Any] = lambda a, b, axis: a.sum(axis) / b.sum(axis)  # noqa: E731
    if len(ours) < 2:
        return (float(spread.sum() / sum(alone)),) * 3
    interval = stats.bootstrap(
        (spread, np.asarray(alone)), over, paired=True, vectorized=True, n_resamples=2000, method="percentile",
        rng=np.random.default_rng(0),
    ).confidence_interval  # fmt: skip
    return float(spread.sum() / sum(alone)), float(interval.low), float(interval.high)


def peak_of_profile(build: Callable[[Options], nn.Module], options: Options, count: int) -> int:
    """Peak of live tensor bytes while a model is built and so many batches are profiled."""
    return peak_bytes(lambda: profile(build(options), batches(count)), times=1)


def peak_of_forward(build: Callable[[Options], nn.Module], options: Options) -> int:
    """The same of two forward passes."""

    def work() -> None:
        model = build(options)
        for batch in batches(2):
            forward(model, batch)

    return peak_bytes(work, times=1)


def measure(options: Options) -> dict[str, dict[str, Any]]:
    """Ratios of CPU time and memory to the forward passes."""
    figures: dict[str, dict[str, Any]] = {FORWARD: {"cpu": 1.0, "low": 1.0, "high": 1.0, "ms": 0.0}}
    if options.memory:
        figures[FORWARD]["memory"] = 1.0
    count = -(-options.tokens // (BATCH * LENGTH))
    for name, build in MODELS.items():
        torch.manual_seed(0)
        alone, ours, end = time_profile(build(options), count)
        ratio, low, high = ratio_of_sums(ours, alone, end)
        found: dict[str, Any] = {"cpu": ratio, "low": low, "high": high, "ms": 1000 * (sum(ours) + end) / count}
        found["end_ms"] = 1000 * end
        rows = min(MOST_RANKME_ROWS, ROWS_PER_FEATURE * options.width)
        early = min(count, -(-rows // (BATCH * LENGTH)))  # batches from which RankMe takes rows
        found["cpu_with_rankme"] = sum(ours[:early]) / sum(alone[:early])
        if options.memory:
            peaks = {n: peak_of_profile(build, options, n) for n in (2, 8)}
            bare = peak_of_forward(build, options)
            found |= {"memory": peaks[2] / bare, "peak_mb": {str(n): peak / 1e6 for n, peak in peaks.items()}}
        figures[f"profile of a {name}, {options.layers} layers of width {options.width}"] = found
        print(name, json.dumps(found), flush=True)
    return figures


def main(argv: list[str] | None = None) -> int:
    """Print the table."""
    options = tyro.cli(Options, args=argv, prog="python -m benchmarks.cost.profiling")
    torch.set_num_threads(1)
    figures = measure(options)
    show(figures, options.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
