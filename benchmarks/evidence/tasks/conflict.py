"""Conflicting experience: a small network learns from two teachers that disagree, then is fine-tuned on one."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from gapt_optim import GAPTOptimizer, Phase, RepresentationHook

from ..measures import measures
from .settings import TaskSettings

INPUTS, HIDDEN, OUTPUTS = 10, 20, 10
TRAINING, TEST = 500, 100


@dataclass(frozen=True)
class Settings(TaskSettings):
    """Of one run."""

    steps: int = 2000
    finetune_steps: int = 500
    batch: int = 32
    lr: float = 0.01
    toward_old: float = 0.0
    """In fine-tuning: half of this, times the squared distance to the weights before it, is added to the loss."""
    rehearsed: int = 0
    """In fine-tuning: samples of the other experience in a batch, of its training data."""


class Network(nn.Module):
    """10-20-10."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden = nn.Sequential(nn.Linear(INPUTS, HIDDEN), nn.ReLU())
        self.readout = nn.Linear(HIDDEN, OUTPUTS)

    def forward(self, x: Tensor) -> Tensor:
        answer: Tensor = self.readout(self.hidden(x))
        return answer


def make_task() -> tuple[Network, list[tuple[Tensor, Tensor]]]:
    """The student at its start, and inputs and answers of both teachers, from torch's global generator.

    A teacher is the student shifted by plus or minus a change of rank <= 3 and 0.5 to 5 times each parameter's norm.
    """
    student = Network()
    shifts = []
    for weights in student.parameters():
        if weights.ndim == 1:
            direction = torch.randn_like(weights)
        else:
            direction = torch.randn(weights.shape[0], 3) @ torch.randn(3, weights.shape[1])
        size = torch.empty(()).uniform_(0.5, 5.0) * weights.norm()
        shifts.append((direction / direction.norm() * size).detach())
    experiences = []
    for sign, half in ((1, slice(0, INPUTS // 2)), (-1, slice(INPUTS // 2, INPUTS))):
        teacher = copy.deepcopy(student)
        with torch.no_grad():
            for weights, shift in zip(teacher.parameters(), shifts, strict=True):
                weights.add_(sign * shift)
            inputs = 0.25 * torch.randn(TRAINING + TEST, INPUTS)
            inputs[:, half] += 1.0
            experiences.append((inputs, teacher(inputs)))
    return student, experiences


def train(s: Settings) -> dict[str, Any]:
    """One run. The seed alone decides weights, teachers, data and their order, so methods share them.

    What is pressed while both are learned is pressed in fine-tuning too.
    """
    torch.manual_seed(s.seed)
    student, experiences = make_task()
    (x1, y1), (x2, y2) = experiences
    hook = RepresentationHook(student, "hidden")
    optimizer = GAPTOptimizer(torch.optim.Adam(student.parameters(), lr=s.lr, fused=True), hook, s.config())
    order = torch.Generator().manual_seed(s.seed + 1_000_003)
    compressed = 0.0
    curve: dict[str, list[float]] = {"step": [], "loss_kept": [], "loss_other": []}
    before: dict[str, float] = {}
    old: list[Tensor] = []
    for step in range(s.steps + s.finetune_steps):
        if step == s.steps:
            before = evaluate(student, experiences, s.window or s.batch)
            old = [p.detach().clone() for p in student.parameters()]
        other = s.batch // 2 if step < s.steps else s.rehearsed
        i, j = torch.randint(TRAINING, (2, s.batch), generator=order)
        # One experience after the other, so that a window of the entropy holds one.
        inputs = torch.cat([x1[i[other:]], x2[j[:other]]])
        answers = torch.cat([y1[i[other:]], y2[j[:other]]])
        loss = (student(inputs) - answers).abs().mean()
        if old and s.toward_old:
            moved = sum((p - o).square().sum() for p, o in zip(student.parameters(), old, strict=True))
            loss = loss + s.toward_old / 2 * moved
        compressed += step < s.steps and optimizer.phase is Phase.COMPRESSION
        optimizer.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        if (step + 1) % 50 == 0 or step + 1 == s.steps + s.finetune_steps:
            losses = experience_losses(student, experiences)
            for name, value in zip(curve, (step + 1, *losses), strict=True):
                curve[name].append(value)
    hook.remove()
    kept, other_loss = experience_losses(student, experiences)
    final = {
        **before,
        "kept_after": kept,
        "other_after": other_loss,
        "both_after": (kept + other_loss) / 2,
        "forgotten": other_loss - before["other"],
        "compression": compressed / s.steps,
        "switches": 0 if optimizer.metrics is None else optimizer.metrics.switches,
    }
    return {"final": final, "best": {}, "curve": curve}


@torch.no_grad()
def experience_losses(student: Network, experiences: list[tuple[Tensor, Tensor]]) -> list[float]:
    """Mean absolute error on test data: of the experience that is fine-tuned on, and of the other."""
    return [(student(x[TRAINING:]) - y[TRAINING:]).abs().mean().item() for x, y in experiences]


@torch.no_grad()
def evaluate(student: Network, experiences: list[tuple[Tensor, Tensor]], window: int) -> dict[str, float]:
    """On test data: separation, losses, and all measures of the hidden layer as the mean of both experiences."""
    clouds = [student.hidden(inputs[TRAINING:]) for inputs, _ in experiences]
    within = torch.stack([cloud.var(0, unbiased=False).sum() for cloud in clouds]).mean()
    distance = (clouds[0].mean(0) - clouds[1].mean(0)).norm()
    measured = [measures(cloud, window) for cloud in clouds]
    losses = experience_losses(student, experiences)
    return {
        "loss": sum(losses) / 2,
        "other": losses[1],
        "separation": (distance / within.sqrt()).item(),
        **{name: (measured[0][name] + measured[1][name]) / 2 for name in measured[0]},
    }
