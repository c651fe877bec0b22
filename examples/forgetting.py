"""Conflicting experience: does compression keep apart what contradicts, and forget less of it?

    python examples/forgetting.py                                      # half and half: seconds
    python examples/forgetting.py --setting sequential --methods plain penalty published gapt

A random network, shifted both ways along a random direction, gives two teachers that disagree; a student learns both.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from typing import Annotated, Any, Literal, NamedTuple

import tyro
from pydantic import BaseModel, ConfigDict, Field

Method = Literal["plain", "penalty", "published", "gapt"]
NAME = tyro.conf.arg(metavar="NAME")  # keeps --help short


class Config(BaseModel):
    """Two teachers that disagree, with and without GAPT. GAPTConfig's settings are flags too:
    --gapt.objective.weight 0.3 and so on; --gapt.help lists them."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    setting: Annotated[Literal["mixed", "interleaved", "sequential", "finetune"], NAME] = (
        "mixed"  # Or interleaved, sequential, finetune.
    )
    methods: Annotated[tuple[Method, ...], NAME] = ("plain", "gapt")  # Also penalty and published.
    out: str = "runs/forgetting"  # Folder for everything that is written.
    overwrite: bool = False  # Replace the run in --out.
    quiet: bool = False  # No progress bars.
    seed: int = Field(
        100, ge=0, lt=2**62
    )  # Of weights, teachers, data and their order; tuned on 0 to 9.
    steps: int = Field(2000, ge=2)  # Optimizer steps.
    batch: int = Field(32, ge=2)  # Samples in a step.
    lr: float = Field(0.01, gt=0, allow_inf_nan=False)  # Learning rate.
    schedule: Literal["constant", "cosine"] = (
        "constant"  # Of the learning rate; cosine ends at a tenth.
    )


if __name__ == "__main__" and {"-h", "--help"} & set(
    sys.argv
):  # answers before torch, which takes seconds to load
    tyro.cli(Config, config=(tyro.conf.FlagCreatePairsOff,))

import torch
from torch import Tensor, nn

from gapt_optim import (
    EntropyConfig,
    GAPTConfig,
    GAPTOptimizer,
    Measures,
    ObjectiveConfig,
    RepresentationHook,
    runs,
)
from gapt_optim import viewing as view

INPUTS, HIDDEN, OUTPUTS, TRAINING, TEST = 10, 20, 10, 500, 100
# A window holds samples of one experience. What they share is that experience, so their mean must not be subtracted.
GAPT = GAPTConfig(entropy=EntropyConfig(center=False), objective=ObjectiveConfig(weight=1.0))


class Network(nn.Module):
    """10-20-10. What comes out of ``hidden`` is the representation."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden = nn.Sequential(nn.Linear(INPUTS, HIDDEN), nn.ReLU())
        self.readout = nn.Linear(HIDDEN, OUTPUTS)

    def forward(self, x: Tensor) -> Tensor:
        return self.readout(self.hidden(x))  # type: ignore[no-any-return]


class Experience(NamedTuple):
    inputs: Tensor
    answers: Tensor
    test_inputs: Tensor
    test_answers: Tensor


def make_task() -> tuple[Network, Experience, Experience]:
    """The student as it starts, and experiences P and N, drawn from torch's global generator."""
    student, shifts, experiences = Network(), [], []
    for weights in student.parameters():
        if weights.ndim == 1:
            direction = torch.randn_like(weights)
        else:
            direction = torch.randn(weights.shape[0], 3) @ torch.randn(3, weights.shape[1])
        size = torch.empty(()).uniform_(0.5, 5.0) * weights.norm()
        shifts.append((direction / direction.norm() * size).detach())
    for sign, half in ((1, slice(0, INPUTS // 2)), (-1, slice(INPUTS // 2, INPUTS))):
        teacher = Network()
        with torch.no_grad():
            for weights, start, shift in zip(
                teacher.parameters(), student.parameters(), shifts, strict=True
            ):
                weights.copy_(start + sign * shift)
            inputs = 0.25 * torch.randn(TRAINING + TEST, INPUTS)
            inputs[:, half] += 1.0
            answers = teacher(inputs)
        experiences.append(
            Experience(inputs[:TRAINING], answers[:TRAINING], inputs[TRAINING:], answers[TRAINING:])
        )
    return student, experiences[0], experiences[1]


def batch_order(config: Config, generator: torch.Generator) -> Tensor:
    """Rows of a step's batch (steps, batch), where experience P is rows 0 to 499 and N the 500 after them.

    A batch of both holds P first and then N, so that a window of the entropy holds one experience.
    """
    p = torch.randint(TRAINING, (config.steps, config.batch), generator=generator)
    n = TRAINING + torch.randint(TRAINING, (config.steps, config.batch), generator=generator)
    both = torch.cat([p[:, : config.batch // 2], n[:, config.batch // 2 :]], dim=1)
    step = torch.arange(config.steps)[:, None]
    first_half = step < config.steps // 2
    return {
        "mixed": both,
        "interleaved": torch.where(step % 2 == 0, p, n),
        "sequential": torch.where(first_half, p, n),
        "finetune": torch.where(first_half, both, p),
    }[config.setting]


def train(
    config: Config,
    gapt: GAPTConfig,
    method: str,
    record: Callable[[Any], None] = lambda metrics: None,
) -> dict[str, Any]:
    """One run. The seed alone decides weights, teachers, data and their order, so methods share them."""
    torch.manual_seed(config.seed)
    student, p, n = make_task()
    order = batch_order(config, torch.Generator().manual_seed(config.seed + 1_000_003))
    inputs, answers = (
        torch.cat([p.inputs, n.inputs])[order],
        torch.cat([p.answers, n.answers])[order],
    )
    old, learned = (
        {"sequential": p, "finetune": n}.get(config.setting),
        math.nan,
    )  # not seen in the second half

    def rate(step: int) -> float:
        return (
            1.0
            if config.schedule == "constant"
            else 0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * step / config.steps))
        )

    with RepresentationHook(student, "hidden") as hook:
        adam = torch.optim.Adam(student.parameters(), lr=config.lr, fused=True)
        optimizer = GAPTOptimizer(adam, hook, runs.config_of(method, gapt))  # plain: a frozen gate
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
        for step in range(config.steps):
            if old is not None and step == config.steps // 2:
                learned = held_out_loss(student, old)
            loss = (student(inputs[step]) - answers[step]).abs().mean()
            optimizer.backward(loss)  # was: loss.backward()
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            record(optimizer.metrics)
        result = evaluate(student, hook, p, n, gapt)
    if old is not None:
        result["forgotten_loss"] = held_out_loss(student, old)
        result["forgetting"] = result["forgotten_loss"] - learned
    last: Any = optimizer.metrics
    return {
        **result,
        "compression_share": last.compression_steps / config.steps,
        "switches": last.switches,
    }


@torch.no_grad()
def held_out_loss(student: Network, experience: Experience) -> float:
    """L1 on test data."""
    loss: Tensor = (student.eval()(experience.test_inputs) - experience.test_answers).abs().mean()
    student.train()
    return loss.item()


@torch.no_grad()
def evaluate(
    student: Network, hook: RepresentationHook, p: Experience, n: Experience, gapt: GAPTConfig
) -> dict[str, Any]:
    """Losses, how far the two experiences lie apart in units of their spread, entropies and their measures."""
    clouds, losses, entropies, measures = [], [], [], []
    for experience in (p, n):
        with hook.measuring(gapt.entropy) as measured:
            losses.append(held_out_loss(student, experience))
        entropies.append(measured.mean)
        measures.append(measured.measures["hidden"])
        clouds.append(student.hidden(experience.test_inputs))
    within = torch.stack([cloud.var(0, unbiased=False).sum() for cloud in clouds]).mean()
    entropy, distance = sum(entropies) / 2, (clouds[0].mean(0) - clouds[1].mean(0)).norm()
    return {
        "separation": (distance / within.sqrt()).item(),
        "loss": sum(losses) / 2,
        "loss_p": losses[0],
        "loss_n": losses[1],
        "entropy": entropy,
        "layer_entropy": {"hidden": entropy},
        "measures": Measures.mean(measures),
        "layer_measures": {"hidden": Measures.mean(measures)},
        "clouds": [[[round(x, 4) for x in row] for row in cloud.tolist()] for cloud in clouds],
    }


def main() -> None:
    config, gapt, folder = runs.open_run(Config, sys.argv[1:], gapt_default=lambda config: GAPT)
    settings, results = {"config": config.model_dump(), "gapt": gapt.model_dump()}, {}
    folder.begin(settings, children=config.methods, replace=config.overwrite)
    for method in config.methods:
        child = folder.child(method)
        with child.recording(0, config.steps, name=method, quiet=config.quiet) as record:
            results[method] = train(config, gapt, method, record)
        child.append("validation.jsonl", {"step": config.steps, **results[method]})
    view.conclude(folder, config.methods, settings)
    for method, result in results.items():
        forgotten = (
            f", of the old experience forgotten {result['forgetting']:.3f}"
            if "forgetting" in result
            else ""
        )
        print(f"{method}: separation {result['separation']:.2f}{forgotten}")


if __name__ == "__main__":
    runs.run_script(main)
