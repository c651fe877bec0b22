"""A step of GPT-2 (124M) on a GPU: bfloat16, compiled, with and without the wrapper.

    python -m benchmarks.cost.gpu

Prints milliseconds per step and the ratio to bare AdamW with its interval, peak memory, graph breaks, and whether
anything of ours makes the host wait (`torch.cuda.set_sync_debug_mode("error")` between forward and the end of
backward). `--profile DIR` keeps a trace. It has been run by us on a CPU only, at a tiny size (`--tiny --device cpu`),
which tells that it works and nothing of speed.
"""

from __future__ import annotations

import contextlib
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import tyro
from torch import Tensor, nn
from torch.nn import functional as F

from gapt_optim import AlignmentConfig, GAPTConfig, GAPTOptimizer, GateConfig, ObjectiveConfig, RepresentationHook

from .figures import write_figures
from .table import ratio_with_interval

Way = Literal["bare", "memorization", "compression"]
PHASES: tuple[Way, ...] = ("bare", "memorization", "compression")


@dataclass
class Options:
    """What a compiled bfloat16 step of GPT-2 costs with the wrapper."""

    batch: int = 16
    """Sequences of a step."""
    context: int = 1024
    """Tokens of a sequence."""
    steps: int = 30
    """Timed steps of each way, taken in turn."""
    device: str = "cuda"
    """Where."""
    compile: bool = True
    """Compile the model."""
    tiny: bool = False
    """Two layers of width 64, 2 x 32 tokens: to see that the script works."""
    profile: Path | None = None
    """Folder for a trace of three steps in compression."""
    json: Path | None = None
    """Write the figures to this file."""


@dataclass
class Trained:
    """A model with its optimizer, and what a step is."""

    forward_backward: Callable[[], None]
    finish: Callable[[], None]

    def step(self) -> None:
        self.forward_backward()
        self.finish()


def build(phase: Way, o: Options) -> Trained:
    """A model of its own, with random weights."""
    from transformers import GPT2Config, GPT2LMHeadModel

    size: dict[str, Any] = {"n_layer": 2, "n_embd": 64, "n_head": 2, "vocab_size": 256} if o.tiny else {}
    config = GPT2Config(
        **size, n_positions=o.context, use_cache=False, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
        activation_function="gelu_pytorch_tanh", bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    torch.manual_seed(0)
    model: nn.Module = GPT2LMHeadModel(config)
    model.to(o.device)
    tokens = torch.randint(config.vocab_size, (o.batch, o.context + 1), device=o.device)
    inputs, targets = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
    base = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    gapt = None
    if phase != "bare":
        settings = GAPTConfig(
            gate=GateConfig(initial_phase=phase, frozen=True),
            objective=ObjectiveConfig(weight=0.05),
            alignment=AlignmentConfig(every=1),
        )
        gapt = GAPTOptimizer(base, RepresentationHook(model, "transformer.h.*"), settings)
    if o.compile:
        model.compile()

    def loss_of() -> Tensor:
        with torch.autocast(torch.device(o.device).type, torch.bfloat16):
            logits = model(input_ids=inputs).logits
        return F.cross_entropy(logits.float().flatten(0, 1), targets.flatten())

    def forward_backward() -> None:
        loss = loss_of()
        if gapt is None:
            loss.backward()  # type: ignore[no-untyped-call]
        else:
            gapt.backward(loss)

    def finish() -> None:
        optimizer: torch.optim.Optimizer = base if gapt is None else gapt
        optimizer.step()
        optimizer.zero_grad()

    return Trained(forward_backward, finish)


@contextlib.contextmanager
def no_waiting(device: str) -> Iterator[None]:
    """An error where the host waits for the device."""
    if torch.device(device).type != "cuda":
        yield
        return
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def timed(step: Callable[[], None], device: str) -> float:
    """Seconds, the device's work included."""
    if torch.device(device).type != "cuda":
        start = time.perf_counter()
        step()
        return time.perf_counter() - start
    first: Any = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
    last: Any = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
    first.record()
    step()
    last.record()
    torch.cuda.synchronize()
    return float(first.elapsed_time(last)) / 1000


def main(argv: list[str] | None = None) -> int:
    """Print the figures."""
    o = tyro.cli(Options, args=argv, prog="python -m benchmarks.cost.gpu")
    if o.tiny:
        o.batch, o.context = 2, 32
    if torch.device(o.device).type == "cuda" and not torch.cuda.is_available():
        print("error: --device cuda: this torch finds no GPU; --tiny --device cpu tries the script", file=sys.stderr)
        return 2
    torch.set_float32_matmul_precision("high")
    ways: dict[Way, Trained] = {}
    figures: dict[Way, dict[str, Any]] = {}
    for phase in PHASES:
        torch._dynamo.utils.counters.clear()
        held = 0  # by the ways built before
        if torch.device(o.device).type == "cuda":
            torch.cuda.reset_peak_memory_stats()
            held = torch.cuda.memory_allocated()
        way = build(phase, o)
        for _ in range(3):  # compiles, and lets the allocator settle
            way.step()
        with no_waiting(o.device):
            way.forward_backward()
        way.finish()
        ways[phase] = way
        breaks = sum(torch._dynamo.utils.counters["graph_break"].values())
        figures[phase] = {"graph_breaks": breaks, "waits": False}
        if torch.device(o.device).type == "cuda":
            figures[phase]["peak_gib"] = (torch.cuda.max_memory_allocated() - held) / 2**30
    seconds: dict[Way, list[float]] = {phase: [] for phase in ways}
    for _ in range(o.steps):
        for phase, way in ways.items():
            seconds[phase].append(timed(way.step, o.device))
    print("| step | ms | against bare | 95 % interval | graph breaks | peak GiB |")
    print("|---|---:|---:|---:|---:|---:|")
    for phase, figure in figures.items():
        ratio, low, high = ratio_with_interval(seconds[phase], seconds["bare"])
        figure |= {"ms": 1000 * statistics.median(seconds[phase]), "ratio": ratio, "low": low, "high": high}
        print(
            f"| {phase} | {figure['ms']:.2f} | {ratio:.3f} | {low:.3f} to {high:.3f} | {figure['graph_breaks']} | "
            f"{figure.get('peak_gib', float('nan')):.2f} |"
        )
    if o.profile is not None:
        o.profile.mkdir(parents=True, exist_ok=True)
        with torch.profiler.profile() as recording:
            for _ in range(3):
                ways["compression"].step()
        recording.export_chrome_trace(str(o.profile / "compression.json"))
    name = torch.cuda.get_device_name() if torch.device(o.device).type == "cuda" else o.device
    write_figures({"device": name, "torch": torch.__version__, "figures": figures}, o.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
