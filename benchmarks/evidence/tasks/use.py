"""A text model, and what is left of it after rounding, projecting and truncating, along its training."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..measures import watching
from . import text

BITS = (8, 4)
DIRECTIONS = (32, 16, 8, 4)
RANKS = (32, 16, 8)


@dataclass(frozen=True)
class Settings(text.Settings):
    """Those of the text task; every evaluation measures everything, so plain can be read at any loss."""

    evaluate_every: int = 70


def train(s: Settings) -> dict[str, Any]:
    """One run."""
    data, _ = text.corpus(s.corpus, s.train_bytes, s.evaluate_sequences * (s.context + 1))
    sample = data[: 32 * (s.context + 1)].view(32, s.context + 1)
    return text.train(s, partial(battery, sample=sample))


@torch.no_grad()
def battery(model: nn.Module, rows: Tensor, *, sample: Tensor) -> dict[str, Any]:
    """Losses on held-out ``rows`` after each operation; ``sample`` is training text, for the leading directions."""
    blocks = list(model.get_submodule("transformer.h").children())
    losses: dict[str, Any] = {}
    for bits in BITS:
        for per in ("token", "tensor"):
            with replaced(blocks, [partial(rounded, bits=bits, per=per)] * len(blocks)):
                losses[f"round_{bits}_{per}"] = text.evaluate_loss(model, rows)
    bases = [leading_directions(h) for h in outputs(model, blocks, sample)]
    for r in DIRECTIONS:
        with replaced(blocks, [partial(projected, mean=mean, basis=basis[:, :r]) for mean, basis in bases]):
            losses[f"project_{r}"] = text.evaluate_loss(model, rows)
    for r in RANKS:
        smaller = copy.deepcopy(model)
        for weights in smaller.get_submodule("transformer.h").parameters():
            if weights.ndim == 2:
                weights.copy_(truncated(weights, r))
        losses[f"rank_{r}"] = text.evaluate_loss(smaller, rows)
    return losses


def rounded(h: Tensor, *, bits: int, per: str) -> Tensor:
    """Symmetric rounding to 2^bits - 1 levels, with one scale for each token or for all."""
    levels = 2 ** (bits - 1) - 1
    scale = (h.abs().amax(-1, keepdim=True) if per == "token" else h.abs().max()).clamp(min=1e-12) / levels
    near: Tensor = (h / scale).round() * scale
    return near


def projected(h: Tensor, *, mean: Tensor, basis: Tensor) -> Tensor:
    """About ``mean``, on the columns of ``basis``."""
    return mean + (h - mean) @ basis @ basis.T


def leading_directions(h: Tensor) -> tuple[Tensor, Tensor]:
    """Mean, and principal directions as columns, the largest first."""
    tokens = h.flatten(0, -2)
    mean = tokens.mean(0)
    centred = tokens - mean
    _, vectors = torch.linalg.eigh(centred.T @ centred)
    return mean, vectors.flip(-1)


def truncated(weights: Tensor, r: int) -> Tensor:
    """The best approximation of rank r."""
    u, sizes, v = torch.linalg.svd(weights, full_matrices=False)
    smaller: Tensor = (u[:, :r] * sizes[:r]) @ v[:r]
    return smaller


def outputs(model: nn.Module, blocks: list[nn.Module], rows: Tensor) -> list[Tensor]:
    """Of every block."""
    with watching(blocks) as hidden:
        model(input_ids=rows[:, :-1])
    return list(hidden)


@contextmanager
def replaced(blocks: list[nn.Module], changes: list[Any]) -> Iterator[None]:
    """While it lasts, each block's output is changed before the next sees it."""

    def hook(change: Any) -> Any:
        def changed(module: nn.Module, inputs: Any, output: Any) -> Any:
            return change(output) if isinstance(output, Tensor) else (change(output[0]), *output[1:])

        return changed

    handles = [block.register_forward_hook(hook(change)) for block, change in zip(blocks, changes, strict=True)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
