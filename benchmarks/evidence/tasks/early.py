"""The author's early protocol: while it compresses, steps of the loss alone alternate with steps of one layer's entropy
alone, layers in turn. The library's optimizer adds the two, so this is a loop of its own around `matrix_entropy`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from gapt_optim import GAPTConfig, matrix_entropy

from ..measures import note, watching
from . import text


@dataclass(frozen=True)
class Settings(text.Settings):
    """Those of the text task. `steps` counts all steps, of loss and entropy; `layers` says which layers are pressed."""

    method: str = "early"
    kernel: str = "linear"
    center: bool = False
    patience: int = 125
    """Calls of the gate, in either phase."""
    twin: bool = True
    """Also train a plain model for as many steps as this one had of the loss."""

    def config(self) -> GAPTConfig:
        """The wrapper has no part in it."""
        return replace(self, method="plain").config() if self.method == "early" else super().config()


class Gate:
    """His early gate. Thresholds are absolute; the loss's minimum is forgotten when compression begins, those of the
    entropies when it ends; an improvement of any layer counts.

    Args:
        patience: calls without improvement before the phase changes.
    """

    LOSS_FALL, ENTROPY_FALL, SPIKE = 0.01, 0.002, 1.1

    def __init__(self, patience: int) -> None:
        self.patience = patience
        self.compressing = False
        self.switches = 0
        self.stale = 0
        self.lowest_loss = math.inf
        self.lowest: list[float] = []

    def update(self, loss: float, entropies: Sequence[float]) -> None:
        """Take the values of one call."""
        ended = False
        if self.compressing:
            lowest = self.lowest or [math.inf] * len(entropies)
            gained = any(s < low - self.ENTROPY_FALL for s, low in zip(entropies, lowest, strict=True))
            self.lowest = [min(pair) for pair in zip(entropies, lowest, strict=True)]
            ended = loss >= self.SPIKE * self.lowest_loss
        else:
            gained = loss < self.lowest_loss - self.LOSS_FALL
        self.lowest_loss = min(self.lowest_loss, loss)
        self.stale = 0 if gained else self.stale + 1
        if ended or self.stale >= self.patience:
            self._switch()

    def _switch(self) -> None:
        self.compressing = not self.compressing
        self.switches += 1
        self.stale = 0
        if self.compressing:
            self.lowest_loss = math.inf
        else:
            self.lowest = []


def train(s: Settings) -> dict[str, Any]:
    """One run, and its twin."""
    data, rows_held_out = text.held_out_rows(s)
    torch.manual_seed(s.seed)
    model = text.build(s)
    blocks = text.blocks_of(model)
    pressed = slice(s.layers.get("skip_first", 0), len(blocks) - s.layers.get("skip_last", 0))
    several = text.bases(model, s)
    rates = [[group["lr"] for group in base.param_groups] for base in several]
    next_batch = text.batches(data, s)
    gate = Gate(s.patience)
    entropy_steps = 0
    of_loss = True  # the next step's
    curve: dict[str, list[float]] = {}
    model.train()
    for i in range(s.steps):
        with watching(blocks, graph=True) as hidden:
            loss = text.loss_of(model, next_batch())
        entropies = [entropy_of(h, s) for h in hidden[pressed]]
        followed = loss if of_loss else entropies[entropy_steps % len(entropies)]
        followed.backward()  # type: ignore[no-untyped-call]
        text.step_at(model, several, rates, text.schedule(s, i))
        entropy_steps += not of_loss
        gate.update(loss.item(), [value.item() for value in entropies])
        of_loss = not (gate.compressing and of_loss)
        if (i + 1) % s.evaluate_every == 0 or i + 1 == s.steps:
            measured = text.evaluate(model, blocks, rows_held_out[: text.MEASURED], s.window or s.context)
            note(curve, {"step": i + 1, "train_loss": loss.item(), **measured})
    phases = {"compression": entropy_steps / s.steps, "switches": gate.switches}
    result = text.judged(model, rows_held_out, text.Trained(curve, phases))
    if s.twin:
        own = {name: getattr(s, name) for name in text.Settings.__dataclass_fields__}
        plain = {"method": "plain", "steps": s.steps - entropy_steps, "layers": {}}
        result["final"]["twin"] = text.train(text.Settings(**(own | plain)))["final"]["loss"]
    return result


def entropy_of(hidden: Tensor, s: Settings) -> Tensor:
    """Mean over the windows of one layer."""
    windows = hidden.reshape(-1, s.window or s.context, hidden.shape[-1])
    return matrix_entropy(windows, **s.kernel_settings()).mean()
