"""A text model whose inner blocks keep a few directions: cut at the end, or cut earlier and trained on.

All ways have the same number of steps and the same schedule, which ends where they end.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from gapt_optim import GAPTConfig

from ..measures import watching
from . import text

DIRECTIONS = (16, 8, 4)
TRAINED_ON = 8
"""Directions that are kept where training goes on after the cut."""
JUDGED = 6 * text.CHUNK
"""Held-out sequences on which cut models are judged, whole ones too (`uncut`)."""


@dataclass(frozen=True)
class Settings(text.Settings):
    """Those of the text task. `method` may also be `nuclear`: a penalty on the singular values of the outputs of the
    blocks that are cut, which are all but the last."""

    cuts: tuple[int, ...] = (200, 350)
    """Steps after which a copy is cut. From there on it trains on the loss alone."""

    def config(self) -> GAPTConfig:
        """The wrapper's part of it."""
        return replace(self, method="plain").config() if self.method == "nuclear" else super().config()


def train(s: Settings) -> dict[str, Any]:
    """One run: the losses of the text task, and of all ways of cutting."""
    data, held_out = text.held_out_rows(s)
    sample = data[: 32 * (s.context + 1)].view(32, s.context + 1)
    early: dict[str, float] = {}
    final: dict[str, Any] = {}
    held_out = held_out[:JUDGED]

    def each_step(step: int, model: nn.Module, several: Any) -> None:
        if step in s.cuts:
            early[f"from_{step}"] = cut_and_train_on(s, step, model, several, data, sample, held_out)
        if step == s.steps:
            final["uncut"] = _mean(text.chunk_losses(model, held_out))
            for r in DIRECTIONS:
                with cut(model, sample, r):
                    final[f"cut_{r}"] = _mean(text.chunk_losses(model, held_out))

    def penalty(hidden: list[Tensor]) -> Tensor:
        return s.weight * nuclear_norm(hidden[:-1])

    result = text.train(s, each_step, penalty if s.method == "nuclear" else None)
    result["final"] |= early | final
    return result


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)


def nuclear_norm(hidden: list[Tensor]) -> Tensor:
    """Mean over layers and sequences (batch, tokens, features) of the sum of singular values, over the root of the
    number of entries: at most the root of the rank times the root mean square of an entry."""
    sums = [torch.linalg.svdvals(h).sum(-1).mean() / math.sqrt(h.shape[-2] * h.shape[-1]) for h in hidden]
    return torch.stack(sums).mean()


def cut_and_train_on(
    s: Settings, cut_at: int, model: nn.Module, several: Any, data: Tensor, sample: Tensor, held_out: Tensor
) -> float:
    """Held-out loss of a copy that is cut now, and trains on the loss alone to the end of the run."""
    branch = text.build(s)
    branch.load_state_dict(model.state_dict())
    copied = text.bases(branch, s)
    for ours, theirs in zip(copied, several, strict=True):
        ours.load_state_dict(deepcopy(theirs.state_dict()))  # torch would share its tensors
    rates = [[group["initial_lr"] for group in base.param_groups] for base in several]
    next_batch = text.batches(data, s)
    for _ in range(cut_at):
        next_batch()
    with cut(branch, sample, TRAINED_ON):
        branch.train()
        for step in range(cut_at, s.steps):
            text.loss_of(branch, next_batch()).backward()  # type: ignore[no-untyped-call]
            text.step_at(branch, copied, rates, text.schedule(s, step))
        return _mean(text.chunk_losses(branch, held_out))


@contextmanager
def cut(model: nn.Module, sample: Tensor, r: int) -> Iterator[None]:
    """While it lasts, the outputs of all blocks but the last are projected on their first ``r`` principal directions,
    as ``sample`` has them now."""
    blocks = text.blocks_of(model)[:-1]
    with torch.no_grad(), watching(blocks) as hidden:
        model(input_ids=sample[:, :-1])
    handles = []
    for block, h in zip(blocks, hidden, strict=True):
        mean, basis = leading_directions(h)
        handles.append(block.register_forward_hook(partial(_projected, mean=mean, basis=basis[:, :r])))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _projected(module: nn.Module, inputs: Any, output: Any, *, mean: Tensor, basis: Tensor) -> Any:
    h = output if isinstance(output, Tensor) else output[0]
    kept = mean + (h - mean) @ basis @ basis.T
    return kept if isinstance(output, Tensor) else (kept, *output[1:])


def leading_directions(h: Tensor) -> tuple[Tensor, Tensor]:
    """Mean, and principal directions as columns, the largest first."""
    tokens = h.flatten(0, -2)
    mean = tokens.mean(0)
    centred = tokens - mean
    _, vectors = torch.linalg.eigh(centred.T @ centred)
    return mean, vectors.flip(-1)
