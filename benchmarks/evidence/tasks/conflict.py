"""Conflicting experience: one small network learns from two teachers that disagree."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from gapt_optim import GAPTOptimizer, Phase, PhaseGate, RepresentationHook, matrix_entropy

from ..measures import measures
from .settings import TaskSettings

INPUTS, HIDDEN, OUTPUTS = 10, 20, 10
TRAINING, TEST = 500, 100
MICRO_BATCHES = 2
"""In which `published often` cuts a batch: one of each experience, two windows of each."""


@dataclass(frozen=True)
class Settings(TaskSettings):
    """Of one run."""

    steps: int = 2000
    batch: int = 32
    lr: float = 0.01


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
    """One run. The seed alone decides weights, teachers, data and their order, so methods share them."""
    torch.manual_seed(s.seed)
    student, experiences = make_task()
    (x1, y1), (x2, y2) = experiences
    base = torch.optim.Adam(student.parameters(), lr=s.lr, fused=True)
    optimizer = None
    hook = RepresentationHook(student, "hidden")
    if s.method != "published often":
        optimizer = GAPTOptimizer(base, hook, s.config())
    gate = PhaseGate(s.config().gate)
    order = torch.Generator().manual_seed(s.seed + 1_000_003)
    half = s.batch // 2
    compressed = 0.0
    curve: dict[str, list[float]] = {"step": [], "train_loss": [], "train_entropy": []}
    for step in range(s.steps):
        i, j = torch.randint(TRAINING, (2, half), generator=order)
        # One experience after the other, so that a window of the entropy holds one.
        inputs, answers = torch.cat([x1[i], x2[j]]), torch.cat([y1[i], y2[j]])
        if optimizer is not None:
            loss = (student(inputs) - answers).abs().mean()
            compressed += optimizer.phase is Phase.COMPRESSION
            optimizer.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
        else:
            for part, target in zip(inputs.chunk(MICRO_BATCHES), answers.chunk(MICRO_BATCHES), strict=True):
                hidden = student.hidden(part)
                loss = (student.readout(hidden) - target).abs().mean()
                entropy = matrix_entropy(hidden.unflatten(0, (-1, s.window)), **s.kernel_settings()).mean()
                compressing = gate.phase is Phase.COMPRESSION
                compressed += compressing / MICRO_BATCHES
                ((loss + s.weight * entropy if compressing else loss) / MICRO_BATCHES).backward()
                gate.update(loss.item(), entropy.item())
            base.step()
            base.zero_grad()
        if step % 50 == 49 or step + 1 == s.steps:
            curve["step"].append(step + 1)
            curve["train_loss"].append(loss.item())
            curve["train_entropy"].append(
                entropy.item() if optimizer is None else optimizer.metrics.entropy  # type: ignore[union-attr, arg-type]
            )
    hook.remove()
    switches = gate.switches if optimizer is None or optimizer.metrics is None else optimizer.metrics.switches
    final = {**evaluate(student, experiences, s.window), "compression": compressed / s.steps, "switches": switches}
    return {"final": final, "best": {}, "curve": curve}


@torch.no_grad()
def evaluate(student: Network, experiences: list[tuple[Tensor, Tensor]], window: int) -> dict[str, float]:
    """On test data: separation, loss, and all measures of the hidden layer as the mean of both experiences."""
    student.eval()
    clouds = [student.hidden(inputs[TRAINING:]) for inputs, _ in experiences]
    losses = [
        (student.readout(cloud) - answers[TRAINING:]).abs().mean().item()
        for cloud, (_, answers) in zip(clouds, experiences, strict=True)
    ]
    within = torch.stack([cloud.var(0, unbiased=False).sum() for cloud in clouds]).mean()
    distance = (clouds[0].mean(0) - clouds[1].mean(0)).norm()
    measured = [measures(cloud, window) for cloud in clouds]
    return {
        "loss": sum(losses) / 2,
        "separation": (distance / within.sqrt()).item(),
        **{name: (measured[0][name] + measured[1][name]) / 2 for name in measured[0]},
    }
