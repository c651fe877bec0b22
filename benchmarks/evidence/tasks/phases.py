"""A plain pretraining whose layers are profiled along the way."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from gapt_optim import profile

from ..measures import note
from . import text


@dataclass(frozen=True)
class Settings(text.Settings):
    """Those of the text task."""

    steps: int = 800
    train_bytes: int = 8_000_000
    warmup: int = 50
    points: int = 25
    """Profiles, at steps whose logarithms are evenly spread."""


def train(s: Settings) -> dict[str, Any]:
    """One run, and at each profile the held-out loss, and of each block the entropies and RankMe."""
    rows = text.held_out_rows(s)[1][: 2 * text.CHUNK]
    due = {0, *(round(s.steps ** (i / (s.points - 1))) for i in range(s.points))}
    curve: dict[str, list[float]] = {}

    def each_step(step: int, model: nn.Module, several: Any) -> None:
        if step not in due:
            return
        seen = profile(model, [{"input_ids": part[:, :-1]} for part in torch.split(rows, 32)], "transformer.h.*")
        point = {"step": float(step), "loss": sum(text.chunk_losses(model, rows)) / 2}
        for i, layer in enumerate(seen.layers):
            point[f"cosine_{i}"] = layer.entropy("cosine", center=True).nats or 0.0
            point[f"linear_{i}"] = layer.entropy("linear", center=False).nats or 0.0
            point[f"rankme_{i}"] = layer.rankme or 0.0
        note(curve, point)

    result = text.train(s, each_step)
    return {**result, "curve": curve}
