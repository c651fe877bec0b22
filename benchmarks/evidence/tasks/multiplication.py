"""Multiplication of numbers of 1 to 3 digits, tested on longer ones, in three forms.

author    problems packed to a stream, spaces, rotary positions, loss over all tokens, no pair held out
held out  the same, but pairs of factors are held out and only the answer's tokens count in the loss
padded    one problem a row, learned positions, no spaces, pairs held out, loss on the answer
"""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gapt_optim import GAPTOptimizer, Phase, PhaseGate, RepresentationHook, matrix_entropy

from ..measures import mean_measures, watching
from .settings import TaskSettings
from .text import in_windows

for _name in ("torchao", "torch.utils._pytree"):
    logging.getLogger(_name).setLevel(logging.ERROR)

SYMBOLS = "0123456789x= BEP"  # B, E, P: <bos>, <eos>, padding. The author's softmax has 50,304 entries.
IDS = {ord(symbol): number for number, symbol in enumerate(SYMBOLS)}
IGNORED = -100
PADDED_LENGTH = 2 * 6 + 12 + 4
MICRO_BATCHES = 8
UNIFORM = math.log(len(SYMBOLS))


@dataclass(frozen=True)
class Settings(TaskSettings):
    """Of one run."""

    form: str = "author"
    steps: int = 600
    blocks: int = 3
    width: int = 96
    heads: int = 3
    context: int = 128
    """Of the stream; a padded problem has 28."""
    batch: int = 8
    """Sequences of the stream; rows of `padded` hold as many tokens."""
    lr: float = 2e-3
    warmup: int = 30
    weight_decay: float = 0.1
    evaluate_every: int = 100
    evaluate_tokens: int = 8192
    """Of each of the test sets."""


SMALL = Settings(width=64, heads=2, steps=500)
"""For a first look: some 20 seconds a run."""
SETS = {"in": (1, 3), "four": (4, 4), "long": (5, 6), "ood": (4, 6)}
"""Digits of the factors: as in training; for choosing; for testing; the author's."""


def draw(
    count: int, digits: tuple[int, int], held_out: bool | None, generator: torch.Generator
) -> list[tuple[int, int]]:
    """``count`` problems; the length of each factor is drawn evenly, then the factor among those of that length.

    Args:
        held_out: only pairs that are held out, or only the others; None: all. A pair decides in either order.
    """
    found: list[tuple[int, int]] = []
    while len(found) < count:
        length = torch.randint(digits[0], digits[1] + 1, (2, 2 * count + 64), generator=generator)
        least = torch.where(length == 1, 0, 10 ** (length - 1))
        fraction = torch.rand(length.shape, generator=generator, dtype=torch.float64)
        a, b = least + (fraction * (10**length - least)).long()
        if held_out is not None:
            low, high = torch.minimum(a, b), torch.maximum(a, b)
            mixed = (low * 7919 + high * 104_729 + 12_345) % 1_000_003
            keep = ((mixed * mixed) % 1_000_003 % 20 == 0) == held_out
            a, b = a[keep], b[keep]
        found += list(zip(a.tolist(), b.tolist(), strict=True))[: count - len(found)]
    return found


def stream(rows: int, context: int, pairs: list[tuple[int, int]], offset: int) -> Tensor:
    """Problems one behind the other, cut into (rows, context + 1)."""
    text = "".join(f"B{a} x {b} = {a * b}E" for a, b in pairs)
    ids = torch.tensor([IDS[c] for c in text[offset : offset + rows * (context + 1)].encode()])
    return ids.view(rows, context + 1)


def padded(pairs: list[tuple[int, int]]) -> Tensor:
    """A problem a row."""
    texts = [f"B{a}x{b}={a * b}E" for a, b in pairs]
    width = max(map(len, texts))
    return torch.tensor([[IDS[c] for c in text.ljust(width, "P").encode()] for text in texts])


def answer_targets(rows: Tensor, *, with_end: bool) -> Tensor:
    """The next token where it is one of an answer whose problem begins within the row, else ``IGNORED``."""
    place = torch.arange(rows.shape[1]).expand_as(rows)

    def last(symbol: str) -> Tensor:
        return torch.where(rows == SYMBOLS.index(symbol), place, -1).cummax(1).values

    begun, equals, ended = last("B"), last("="), last("E")
    answering = (begun >= 0) & (equals > begun) & (ended < equals)  # from "=" until before <eos>
    following = rows[:, 1:]
    wanted = answering[:, :-1] & (following != SYMBOLS.index(" "))
    if not with_end:
        wanted &= following != SYMBOLS.index("E")
    return torch.where(wanted, following, IGNORED)


class Problems:
    """Draws rows of one form."""

    def __init__(self, s: Settings, generator: torch.Generator) -> None:
        self.s, self.generator = s, generator

    def rows(self, tokens: int, digits: tuple[int, int], held_out: bool | None) -> Tensor:
        """(rows, length) of about ``tokens`` tokens."""
        s = self.s
        if s.form == "author":
            held_out = None
        if s.form == "padded":
            return padded(draw(max(1, tokens // 14), digits, held_out, self.generator))
        count = max(1, tokens // s.context)
        need = count * (s.context + 1)
        offset = int(torch.randint(12, (), generator=self.generator))
        pairs = draw(need // 8 + 8, digits, held_out, self.generator)  # the shortest problem, B1 x 1 = 1E, has 11
        return stream(count, s.context, pairs, offset)


def build(s: Settings) -> nn.Module:
    """A model with random weights, drawn from torch's global generator: Llama, or GPT-2 for `padded`."""
    from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

    if s.form == "padded":
        return GPT2LMHeadModel(
            GPT2Config(
                vocab_size=len(SYMBOLS),
                n_positions=PADDED_LENGTH,
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
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(SYMBOLS),
            hidden_size=s.width,
            intermediate_size=4 * s.width,
            num_hidden_layers=s.blocks,
            num_attention_heads=s.heads,
            max_position_embeddings=s.context,
            pad_token_id=None,
            bos_token_id=None,
            eos_token_id=None,
            use_cache=False,
        )
    )


def loss_of(model: nn.Module, rows: Tensor, targets: Tensor, s: Settings) -> Tensor:
    """Mean cross-entropy of ``targets``, in nats."""
    logits: Tensor = model(input_ids=rows[:, :-1], **mask_of(rows, s)).logits
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORED)


def mask_of(rows: Tensor, s: Settings) -> dict[str, Tensor]:
    """Padding counts in no entropy; a stream has none."""
    if s.form != "padded":
        return {}
    return {"attention_mask": (rows[:, :-1] != SYMBOLS.index("P")).long()}


def training_targets(rows: Tensor, s: Settings) -> Tensor:
    """All tokens in the author's task; in the others the answer's, with its end."""
    return rows[:, 1:] if s.form == "author" else answer_targets(rows, with_end=True)


def train(s: Settings) -> dict[str, Any]:
    """One run. The seed alone decides weights, problems and test sets, so methods share them."""
    if s.form not in ("author", "held out", "padded"):
        raise ValueError(f"form must be author, held out or padded, found {s.form!r}")
    testing = Problems(s, torch.Generator().manual_seed(s.seed + 2_000_003))
    tests = {
        name: testing.rows(s.evaluate_tokens, digits, True if name == "in" else None) for name, digits in SETS.items()
    }
    problems = Problems(s, torch.Generator().manual_seed(s.seed + 1_000_003))
    torch.manual_seed(s.seed)
    model = build(s)
    layers = "transformer.h" if s.form == "padded" else "model.layers"
    blocks = list(model.get_submodule(layers).children())
    base = torch.optim.AdamW(model.parameters(), lr=s.lr, betas=(0.9, 0.98), weight_decay=s.weight_decay, fused=True)
    hook = RepresentationHook(model, f"{layers}.*")
    optimizer = None if s.method == "published often" else GAPTOptimizer(base, hook, s.config())
    gate = PhaseGate(s.config().gate)
    stepper: torch.optim.Optimizer = base if optimizer is None else optimizer
    scheduler = torch.optim.lr_scheduler.LambdaLR(
        stepper,
        lambda step: min((step + 1) / (s.warmup + 1), 0.55 + 0.45 * math.cos(math.pi * min(1.0, step / s.steps))),
    )
    curve: dict[str, list[float]] = {}
    compressed = 0.0
    model.train()
    for step in range(s.steps):
        rows = problems.rows(s.batch * s.context, SETS["in"], False)
        targets = training_targets(rows, s)
        if optimizer is not None:
            compressed += optimizer.phase is Phase.COMPRESSION
            loss = loss_of(model, rows, targets, s)
            optimizer.backward(loss)
        else:
            parts = min(MICRO_BATCHES, len(rows))
            for part, wanted in zip(rows.chunk(parts), targets.chunk(parts), strict=True):
                loss, share = often(model, blocks, part, wanted, gate, s, parts)
                compressed += share
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        stepper.step()
        scheduler.step()
        stepper.zero_grad()
        if (step + 1) % s.evaluate_every == 0 or step + 1 == s.steps:
            point = {"step": step + 1.0, "train_loss": loss.item(), **evaluate(model, blocks, tests, s)}
            for name, value in point.items():
                curve.setdefault(name, []).append(value)
    hook.remove()
    switches = gate.switches if optimizer is None or optimizer.metrics is None else optimizer.metrics.switches
    chosen = min(range(len(curve["four_loss"])), key=lambda i: curve["four_loss"][i])
    return {
        "final": {
            **{name: values[-1] for name, values in curve.items() if name != "step"},
            "compression": compressed / s.steps,
            "switches": switches,
        },
        "best": {name: values[chosen] for name, values in curve.items()},
        "curve": curve,
    }


def often(
    model: nn.Module, blocks: list[nn.Module], rows: Tensor, targets: Tensor, gate: PhaseGate, s: Settings, parts: int
) -> tuple[Tensor, float]:
    """A micro-batch that the gate judges: its loss, and 1 / parts if it ran in compression."""
    with watching(blocks, graph=True) as hidden:
        loss = loss_of(model, rows, targets, s)
    windows = [in_windows(h, s.window) for h in hidden]
    live = None
    if s.form == "padded":
        live = in_windows((rows[:, :-1, None] != SYMBOLS.index("P")), s.window).squeeze(-1)
    entropy = torch.stack([matrix_entropy(w, mask=live, **s.kernel_settings()).mean() for w in windows]).mean()
    compressing = gate.phase is Phase.COMPRESSION
    ((loss + s.weight * entropy if compressing else loss) / parts).backward()  # type: ignore[no-untyped-call]
    gate.update(loss.item(), entropy.item())
    return loss.detach(), compressing / parts


@torch.no_grad()
def evaluate(model: nn.Module, blocks: list[nn.Module], tests: dict[str, Tensor], s: Settings) -> dict[str, float]:
    """Loss of the answer's tokens on every test set, and all measures on that in distribution."""
    model.eval()
    values: dict[str, float] = {}
    for name, rows in tests.items():
        with watching(blocks) as hidden:
            values[f"{name}_loss"] = loss_of(model, rows, answer_targets(rows, with_end=False), s).item()
        if name == "in":
            if s.form == "padded":  # windows of whole problems, cut where the shortest ends
                length = int((rows[:, :-1] != SYMBOLS.index("P")).sum(1).min())
                hidden = [h[:, : max(length, s.window)] for h in hidden]
            values |= mean_measures(hidden, s.window)
    model.train()
    values["loss"] = values["in_loss"]
    return values
