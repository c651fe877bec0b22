"""Multiplication by a small GPT-2 under Muon: digits from the last to the first, so that each digit of an answer
follows from what is there already. Judged on held-out problems, and on factors longer than in training.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..measures import mean_measures, watching
from . import text

IGNORED = -100


@dataclass(frozen=True)
class Settings(text.Settings):
    """Of one run. A problem is `7x321=168` and an end, read from the right: 7 times 123 is 861."""

    steps: int = 600
    context: int = 40
    batch: int = 128
    """Problems in a step."""
    longest: int = 4
    """Digits of the second factor in training, at most; longer ones have one and two more."""
    second: int = 1
    """Digits of the first factor, at most."""
    problems: int = 1024
    """In each set that is judged."""
    lr: float = 0.06


class Problems(NamedTuple):
    """A batch, padded on the right."""

    ids: Tensor
    mask: Tensor
    positions: Tensor
    """From an arbitrary one on, so that those of longer problems are trained too."""
    targets: Tensor
    """The next byte within the answer, its end included."""


def is_held_out(a: int, b: int) -> bool:
    """A tenth of all problems."""
    return (a * 7919 + b * 104_729) * 31 % 1009 < 101


def draw(s: Settings, count: int, digits: tuple[int, int], generator: torch.Generator, *, held_out: bool) -> Problems:
    """Problems whose second factor has evenly so many digits."""
    texts: list[str] = []
    while len(texts) < count:
        lengths = torch.randint(digits[0], digits[1] + 1, (count,), generator=generator).tolist()
        seconds = torch.randint(1, s.second + 1, (count,), generator=generator).tolist()
        shares = torch.rand(2, count, generator=generator, dtype=torch.float64).tolist()
        for length, second, share, other in zip(lengths, seconds, *shares, strict=True):
            a, b = (10 ** (n - 1) + int(x * 9 * 10 ** (n - 1)) for n, x in ((second, other), (length, share)))
            if is_held_out(a, b) == held_out:
                texts.append(f"{str(a)[::-1]}x{str(b)[::-1]}={str(a * b)[::-1]}\n")
    return encode(s, texts[:count], generator)


def encode(s: Settings, texts: list[str], generator: torch.Generator) -> Problems:
    """As tensors (problems, tokens)."""
    width = max(map(len, texts))
    ids = torch.tensor([list(text.ljust(width, "\0").encode()) for text in texts])
    mask = ids != 0
    first = torch.randint(0, s.context - width + 1, (len(texts), 1), generator=generator)
    equals = torch.tensor([[text.index("=")] for text in texts])
    in_answer = (torch.arange(width - 1) >= equals) & mask[:, 1:]
    targets = torch.where(in_answer, ids[:, 1:], IGNORED)
    return Problems(ids, mask.long(), first + torch.arange(width), targets)


def logits_of(model: nn.Module, problems: Problems) -> Tensor:
    """(problems, tokens - 1, bytes)."""
    found: Tensor = model(
        input_ids=problems.ids[:, :-1],
        attention_mask=problems.mask[:, :-1],
        position_ids=problems.positions[:, :-1],
    ).logits
    return found


def loss_of(model: nn.Module, problems: Problems) -> Tensor:
    """Mean over the tokens of the answers, in nats."""
    logits = logits_of(model, problems)
    return F.cross_entropy(logits.flatten(0, 1), problems.targets.flatten(), ignore_index=IGNORED)


@torch.no_grad()
def judged(model: nn.Module, problems: Problems) -> dict[str, float]:
    """Loss, share of answers that are right to the last digit, and share of their tokens."""
    model.eval()
    logits = logits_of(model, problems)
    model.train()
    loss = F.cross_entropy(logits.flatten(0, 1), problems.targets.flatten(), ignore_index=IGNORED)
    answered = problems.targets != IGNORED
    right = (logits.argmax(-1) == problems.targets) | ~answered
    return {
        "loss": loss.item(),
        "right": right.all(-1).float().mean().item(),
        "digits": right[answered].float().mean().item(),
    }


def train(s: Settings) -> dict[str, Any]:
    """One run. The seed alone decides weights, problems and sets."""
    generator = torch.Generator().manual_seed(s.seed + 1_000_003)
    sets = {
        "": draw(s, s.problems, (1, s.longest), generator, held_out=True),
        "longer_": draw(s, s.problems, (s.longest + 1, s.longest + 2), generator, held_out=True),
    }
    torch.manual_seed(s.seed)
    model = text.build(s)

    def losses() -> tuple[Tensor, Tensor]:
        loss = loss_of(model, draw(s, s.batch, (1, s.longest), generator, held_out=False))
        return loss, loss

    def measured() -> dict[str, float]:
        return {
            f"{name}{measure}": value
            for name, problems in sets.items()
            for measure, value in judged(model, problems).items()
        }

    trained = text.fit(s, model, losses, measured)
    longest = draw(s, 256, (s.longest, s.longest), generator, held_out=True)  # whose windows of 8 hold no padding
    model.eval()
    with torch.no_grad(), watching(text.blocks_of(model)) as hidden:
        logits_of(model, longest)
    final = {**trained.last, **mean_measures(list(hidden), s.window or 8), **trained.phases}
    return {"final": final, "best": {}, "curve": trained.curve}
