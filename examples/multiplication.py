"""The multiplication task: its problems, which set each belongs to, and what a model makes of them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from gapt_optim import EntropyConfig, RepresentationHook

SYMBOLS = "0123456789x=BEP"  # B, E and P stand for <bos>, <eos> and padding
IDS = {ord(symbol): number for number, symbol in enumerate(SYMBOLS)}
PADDING = SYMBOLS.index("P")
CONTEXT = 2 * 6 + 12 + 4  # two factors of six digits and their product, between <bos>, x, = and <eos>
IGNORED = -100
TRAINING, VALIDATION, TEST = range(3)
UNIFORM = math.log(len(SYMBOLS))


def part(a: Tensor, b: Tensor) -> Tensor:
    """Which set a problem belongs to: a twentieth of all pairs is for validation, a twentieth for tests.

    The pair alone decides, in either order, so no drawing of training problems can meet a test problem.
    """
    low, high = torch.minimum(a, b), torch.maximum(a, b)
    mixed = (low * 7919 + high * 104_729 + 12_345) % 1_000_003
    bucket = (mixed * mixed) % 1_000_003 % 20
    return torch.where(bucket == 0, VALIDATION, torch.where(bucket == 1, TEST, TRAINING))


def draw(count: int, digits: tuple[int, int], wanted: int | None, generator: torch.Generator) -> list[tuple[int, int]]:
    """``count`` problems whose factors each have a number of digits drawn evenly from ``digits``."""
    found: list[tuple[int, int]] = []
    while len(found) < count:
        length = torch.randint(digits[0], digits[1] + 1, (2, 32 * count), generator=generator)
        least = torch.where(length == 1, 0, 10 ** (length - 1))
        fraction = torch.rand(length.shape, generator=generator, dtype=torch.float64)
        factors = least + (fraction * (10**length - least)).long()
        if wanted is not None:
            factors = factors[:, part(factors[0], factors[1]) == wanted]
        found += [(a, b) for a, b in factors.T[: count - len(found)].tolist()]
    return found


@dataclass(frozen=True)
class Problems:
    """Problems as the model sees them, padded on the right."""

    ids: Tensor
    mask: Tensor
    """1 where a token is not padding."""
    targets: Tensor
    """The next token within the answer, <eos> included; ``IGNORED`` elsewhere."""
    positions: Tensor
    """Place of each token in the context."""

    @classmethod
    def of(
        cls, pairs: Sequence[tuple[int, int]], device: torch.device, starts: torch.Generator | None = None
    ) -> Problems:
        """``starts`` draws where in the context each problem begins; without it that is its first position."""
        texts = [f"B{a}x{b}={a * b}E" for a, b in pairs]
        width = max(map(len, texts))
        ids = torch.tensor([[IDS[ord(c)] for c in text.ljust(width, "P")] for text in texts])
        start = torch.tensor([[text.index("=")] for text in texts])
        place = torch.arange(width)
        answered = (place[:-1] >= start) & (ids[:, 1:] != PADDING)
        targets = torch.where(answered, ids[:, 1:], IGNORED)
        first = torch.zeros(len(ids), 1, dtype=torch.long)
        if starts is not None:
            first = torch.randint(CONTEXT - width + 1, first.shape, generator=starts)
        return cls(*(tensor.to(device) for tensor in (ids, (ids != PADDING).long(), targets, first + place)))


def forward(model: nn.Module, problems: Problems) -> Tensor:
    """Logits of every answer token (answer tokens, symbols)."""
    output = model(input_ids=problems.ids, attention_mask=problems.mask, position_ids=problems.positions)
    logits: Tensor = output.logits[:, :-1]
    return logits[problems.targets != IGNORED].float()


def answer_loss(model: nn.Module, problems: Problems) -> Tensor:
    """Mean cross-entropy of the answer's tokens, in nats."""
    return nn.functional.cross_entropy(forward(model, problems), problems.targets[problems.targets != IGNORED])


@torch.no_grad()
def evaluate(model: nn.Module, hook: RepresentationHook, problems: Problems, entropy: EntropyConfig) -> dict[str, Any]:
    """Loss, exact-match accuracy, calibration, loss and accuracy of each digit, and entropy per layer."""
    model.eval()
    with hook.measuring(entropy) as measured:
        logits = forward(model, problems)
    model.train()
    answered = problems.targets != IGNORED
    targets = problems.targets[answered]
    probability, guess = logits.softmax(-1).max(-1)
    right = torch.ones_like(answered)
    right[answered] = guess == targets
    # Greedy decoding writes the exact answer if and only if every token is right given the right ones before it.
    exact = right.all(-1).float().mean().item()
    position = (answered.cumsum(-1) - 1)[answered]
    hits = (guess == targets).float()
    losses = nn.functional.cross_entropy(logits, targets, reduction="none")
    counts = torch.bincount(position)
    return {
        "loss": losses.mean().item(),
        "accuracy": exact,
        "calibration": calibration_error(probability, hits),
        "digits": (torch.bincount(position, hits) / counts).tolist(),
        "digit_losses": (torch.bincount(position, losses) / counts).tolist(),
        "layer_entropy": measured.entropies,
        "entropy": measured.mean,
    }


def calibration_error(probability: Tensor, hits: Tensor, bins: int = 10) -> float:
    """Mean gap between how sure the model is of its best symbol and how often that is right."""
    bucket = (probability * bins).long().clamp(max=bins - 1)
    gap = torch.bincount(bucket, probability - hits, minlength=bins).abs()
    return (gap.sum() / len(hits)).item()
