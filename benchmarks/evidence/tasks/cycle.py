"""Plain training of the text model that measures, every few steps, the angle of loss and entropy gradients.

Several micro-batches a step give the angle its noise: the inner product is that of *different* micro-batches, so that
the noise which both gradients of one micro-batch share does not count, and its error comes from leaving each out.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from gapt_optim import matrix_entropy

from ..measures import watching
from . import text


@dataclass(frozen=True)
class Settings(text.Settings):
    """Of one run."""

    micro_batches: int = 8
    measure_every: int = 5


def train(s: Settings) -> dict[str, Any]:
    """One run: cosine and its standard error over time, under the linear and the centred cosine kernel."""
    if s.method != "plain":
        raise ValueError(f"cycle trains plainly, found method {s.method!r}")
    data, held_out = text.corpus(s.corpus, s.train_bytes, s.evaluate_sequences * (s.context + 1))
    torch.manual_seed(s.seed)
    model = text.build(s)
    blocks = list(model.get_submodule("transformer.h").children())
    parameters = list(model.parameters())
    optimizer = text.adamw(model, s)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: text.schedule(s, step))
    batches = torch.Generator().manual_seed(s.seed + 1_000_003)
    offsets = torch.arange(s.context + 1)
    curve: dict[str, list[float]] = {}
    for step in range(s.steps):
        rows = data[torch.randint(len(data) - s.context - 1, (s.batch, 1), generator=batches) + offsets]
        if step % s.measure_every == 0:
            point = {"step": float(step), **measure(model, blocks, parameters, rows, s)}
            for name, value in point.items():
                curve.setdefault(name, []).append(value)
        else:
            text.loss_of(model, rows).backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
    rows = held_out.view(s.evaluate_sequences, s.context + 1)
    return {"final": text.evaluate(model, blocks, rows, s.window), "best": {}, "curve": curve}


KERNELS: dict[str, dict[str, Any]] = {
    "linear": {"kernel": "linear", "center": False},
    "centred_cosine": {"kernel": "cosine", "center": True},
}


def measure(
    model: nn.Module, blocks: list[nn.Module], parameters: list[nn.Parameter], rows: Tensor, s: Settings
) -> dict[str, float]:
    """Leaves the step's gradient in ``.grad`` and returns cosines with their errors."""
    gradients: list[list[Tensor]] = []  # of the loss, then of each entropy; one flat vector per micro-batch
    for part in rows.chunk(s.micro_batches):
        with watching(blocks, graph=True) as hidden:
            loss = text.loss_of(model, part)
        windows = [text.in_windows(h, s.window) for h in hidden]
        scalars = [loss] + [
            torch.stack([matrix_entropy(w, **kernel).mean() for w in windows]).mean() for kernel in KERNELS.values()
        ]
        gradients.append([flat_gradient(scalar, parameters) for scalar in scalars])
    stacked = [torch.stack(of_kind) for of_kind in zip(*gradients, strict=True)]
    place = 0
    mean = stacked[0].mean(0)
    for p in parameters:
        p.grad = mean[place : place + p.numel()].view_as(p).clone()
        place += p.numel()
    values: dict[str, float] = {}
    for name, entropy in zip(KERNELS, stacked[1:], strict=True):
        values[f"cosine_{name}"], values[f"error_{name}"] = cross_cosine(stacked[0], entropy)
    return values


def flat_gradient(scalar: Tensor, parameters: list[nn.Parameter]) -> Tensor:
    """Zeros where a parameter has no part in it."""
    found = torch.autograd.grad(scalar, parameters, retain_graph=True, allow_unused=True)
    pairs = zip(found, parameters, strict=True)
    return torch.cat([(torch.zeros_like(p) if g is None else g).flatten() for g, p in pairs])


def cross_cosine(g: Tensor, d: Tensor) -> tuple[float, float]:
    """Cosine of the mean rows of (m, p) ``g`` and ``d``, and its error by leaving out one row after the other.

    The inner product is that of different rows, so noise that both gradients of one micro-batch share has mean 0 in it.
    The norms are those of the mean rows, noise included, which makes the cosine smaller but cannot change its sign.
    """

    def cosine(gd: Tensor, gg: Tensor, dd: Tensor) -> float:
        n = len(gd)
        inner = float((gd.sum() - gd.diagonal().sum()) / (n * (n - 1)))
        return inner / math.sqrt(max(float(gg.mean()) * float(dd.mean()), 1e-60))

    products = (g @ d.T, g @ g.T, d @ d.T)
    n = len(g)
    keep = [[j for j in range(n) if j != i] for i in range(n)]
    left_out = [cosine(*(p[k][:, k] for p in products)) for k in keep]
    mean = sum(left_out) / n
    return cosine(*products), math.sqrt((n - 1) / n * sum((x - mean) ** 2 for x in left_out))
