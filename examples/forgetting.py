"""Conflicting experience: does compression keep apart what contradicts, and forget less of it?

python examples/forgetting.py                                   # seconds
python examples/forgetting.py --order interleaved --methods plain penalty published gapt

A random network, shifted both ways along a random direction, gives two teachers that disagree. A
student learns from both of them, P and N. How far apart does it keep them? Then it is fine-tuned
on P alone. How much of N does it forget?
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
import tyro
from torch import Tensor, nn

import comparison
from gapt_optim import (
    EntropyConfig,
    GAPTConfig,
    GAPTOptimizer,
    GateConfig,
    JSONLines,
    Measures,
    ObjectiveConfig,
    ProgressBar,
    RepresentationHook,
)

# ------------------------------------------------------------------------------------------------
# Settings


@dataclass
class Settings:
    """Two teachers that disagree: what is kept apart, and what fine-tuning on one forgets."""

    methods: tuple[Literal["plain", "penalty", "published", "gapt"], ...] = ("plain", "gapt")
    order: Literal["mixed", "interleaved"] = "mixed"  # both in each batch, or in turns
    out: str = "runs/forgetting"  # folder for everything that is written
    overwrite: bool = False  # replace the run in --out
    seed: int = 100  # of weights, teachers, data and order; these settings were tuned on 0 to 9

    steps: int = 2000  # of learning from both
    finetune_steps: int = 500  # of fine-tuning on P afterwards
    batch_size: int = 32  # samples in a step
    eval_every: int = 100  # steps between evaluations
    lr: float = 0.01

    # GAPT: the settings that people change first; GAPTConfig has them all
    weight: float = 1.0  # of the entropy in compression, per nat
    kernel: Literal["cosine", "linear"] = "cosine"  # linear is the paper's
    patience_memorization: int = 15  # steps in which the loss does not fall before compression
    patience_compression: int = 25  # steps in which the entropy does not fall before memorization


def config_of(s: Settings, method: str) -> GAPTConfig:
    """One loop trains all methods, which differ in this alone."""
    # A window holds samples of one experience. What they share is that experience, so their mean
    # must not be subtracted.
    entropy = EntropyConfig(kernel=s.kernel, center=False)
    objective = ObjectiveConfig(weight=s.weight)
    if method == "plain":  # never compresses: the bare optimizer, bit for bit
        return GAPTConfig.plain(entropy=entropy, objective=objective)
    if method == "penalty":  # always compresses
        return GAPTConfig.penalty(entropy=entropy, objective=objective)
    if method == "published":  # the author's late protocol
        return GAPTConfig.published()
    gate = GateConfig(
        patience_memorization=s.patience_memorization, patience_compression=s.patience_compression
    )
    return GAPTConfig(entropy=entropy, objective=objective, gate=gate)


# ------------------------------------------------------------------------------------------------
# The task

INPUTS, HIDDEN, OUTPUTS = 10, 20, 10
TRAINING, TEST = 500, 100  # samples of an experience


class Network(nn.Module):
    """What comes out of `hidden` is the representation."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden = nn.Sequential(nn.Linear(INPUTS, HIDDEN), nn.ReLU())
        self.readout = nn.Linear(HIDDEN, OUTPUTS)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.readout(self.hidden(x))
        return y


class Experience(NamedTuple):
    inputs: Tensor
    answers: Tensor
    test_inputs: Tensor
    test_answers: Tensor


def make_task() -> tuple[Network, Experience, Experience]:
    """The student as it starts, and experiences P and N."""
    student = Network()
    shifts = []
    for weights in student.parameters():
        if weights.ndim == 1:
            direction = torch.randn_like(weights)
        else:  # of rank 3
            direction = torch.randn(weights.shape[0], 3) @ torch.randn(3, weights.shape[1])
        size = torch.empty(()).uniform_(0.5, 5.0) * weights.norm()
        shifts.append((direction / direction.norm() * size).detach())
    p = make_experience(student, shifts, sign=1, raised=slice(0, INPUTS // 2))
    n = make_experience(student, shifts, sign=-1, raised=slice(INPUTS // 2, INPUTS))
    return student, p, n


@torch.no_grad()
def make_experience(student: Network, shifts: list[Tensor], sign: int, raised: slice) -> Experience:
    """What a teacher answers, who is the student shifted to one side."""
    teacher = Network()
    for weights, start, shift in zip(
        teacher.parameters(), student.parameters(), shifts, strict=True
    ):
        weights.copy_(start + sign * shift)
    inputs = 0.25 * torch.randn(TRAINING + TEST, INPUTS)
    inputs[:, raised] += 1.0
    answers = teacher(inputs)
    return Experience(inputs[:TRAINING], answers[:TRAINING], inputs[TRAINING:], answers[TRAINING:])


def batch_order(s: Settings, generator: torch.Generator) -> Tensor:
    """Rows of each step's batch (steps, batch): P is rows 0 to 499, and N the 500 after them.

    A batch of both holds P first and then N, so that a window of the entropy holds one experience.
    """
    shape = (s.steps + s.finetune_steps, s.batch_size)
    p = torch.randint(TRAINING, shape, generator=generator)
    n = TRAINING + torch.randint(TRAINING, shape, generator=generator)
    half = s.batch_size // 2
    if s.order == "mixed":
        both = torch.cat([p[:, :half], n[:, half:]], dim=1)
    else:
        both = p.clone()
        both[1::2] = n[1::2]
    return torch.cat([both[: s.steps], p[s.steps :]])


# ------------------------------------------------------------------------------------------------
# Evaluation


@torch.no_grad()
def held_out_loss(student: Network, experience: Experience) -> float:
    """Mean absolute error on test data."""
    errors = student(experience.test_inputs) - experience.test_answers
    return float(errors.abs().mean())


@torch.no_grad()
def evaluate(
    s: Settings, student: Network, hook: RepresentationHook, p: Experience, n: Experience
) -> dict[str, Any]:
    """Losses, entropies, and how far P and N lie apart in units of their spread."""
    clouds, losses, entropies, measures = [], [], [], []
    student.eval()
    for experience in (p, n):
        with hook.measuring(config_of(s, "plain").entropy) as measured:
            losses.append(held_out_loss(student, experience))
        entropies.append(measured.mean)
        measures.append(measured.measures["hidden"])
        clouds.append(student.hidden(experience.test_inputs))
    student.train()
    distance = (clouds[0].mean(0) - clouds[1].mean(0)).norm()
    spread = torch.stack([cloud.var(0, unbiased=False).sum() for cloud in clouds]).mean().sqrt()
    entropy, measure = sum(entropies) / 2, asdict(Measures.mean(measures))
    return {
        "separation": (distance / spread).item(),
        "loss": sum(losses) / 2,
        "loss_p": losses[0],
        "loss_n": losses[1],
        "entropy": entropy,
        "measures": measure,
        "layer_entropy": {"hidden": entropy},
        "layer_measures": {"hidden": measure},
    }


# ------------------------------------------------------------------------------------------------
# Training


def train(s: Settings, method: str, folder: Path) -> dict[str, Any]:
    """One method. The seed decides weights, teachers, data and order, for all of them alike."""
    torch.manual_seed(s.seed)
    student, p, n = make_task()
    order = batch_order(s, torch.Generator().manual_seed(s.seed + 1_000_003))
    inputs = torch.cat([p.inputs, n.inputs])[order]
    answers = torch.cat([p.answers, n.answers])[order]

    log = JSONLines(folder / "metrics.jsonl")
    bar = ProgressBar(len(order), desc=method, leave=False, disable=None)
    hook = RepresentationHook(student, "hidden")
    adam = torch.optim.Adam(student.parameters(), lr=s.lr, fused=True)
    optimizer = GAPTOptimizer(adam, hook, config_of(s, method), observers=[log, bar])
    held_out: dict[int, dict[str, Any]] = {}

    def write(step: int) -> None:
        held_out[step] = evaluate(s, student, hook, p, n)
        with (folder / "validation.jsonl").open("a") as file:
            file.write(json.dumps({"step": step, **held_out[step]}) + "\n")

    with log, bar:
        for step in range(len(order)):
            if step % s.eval_every == 0 or step == s.steps:
                write(step)
            loss = (student(inputs[step]) - answers[step]).abs().mean()
            optimizer.backward(loss)  # was: loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        write(len(order))
    learned, finetuned = held_out[s.steps], held_out[len(order)]
    return {**learned, "forgotten": finetuned["loss_n"] - learned["loss_n"]}


def draw(s: Settings, path: Path) -> None:
    """What each method loses on P and on N, and how far apart it keeps them."""
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(3, 1, figsize=(8, 8), sharex=True, layout="constrained")
    shown = {"loss_p": "loss on P", "loss_n": "loss on N", "separation": "separation of P and N"}
    for method in s.methods:
        with (path.parent / method / "validation.jsonl").open() as file:
            records = [json.loads(line) for line in file][1:]  # without that of the first weights
        for panel, key in zip(panels, shown, strict=True):
            steps, values = [r["step"] for r in records], [r[key] for r in records]
            panel.plot(steps, values, label=method)
    for panel, title in zip(panels, shown.values(), strict=True):
        panel.set_ylabel(title)
        panel.set_ylim(bottom=0)
        panel.axvline(s.steps, color="gray", linestyle=":")
    panels[0].set_title("Learning from P and N, then (right of the dotted line) from P alone")
    panels[0].legend()
    panels[-1].set_xlabel("step")
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def main() -> None:
    s = tyro.cli(Settings)
    if min(s.steps, s.finetune_steps, s.eval_every) < 1 or s.batch_size < 2:
        raise SystemExit(
            "--steps, --finetune-steps and --eval-every must be at least 1, and --batch-size 2"
        )
    configs: dict[str, GAPTConfig] = {method: config_of(s, method) for method in s.methods}
    out = Path(s.out)
    comparison.check_folder(out, overwrite=s.overwrite)
    comparison.begin_folder(out, asdict(s), configs)
    results: dict[str, dict[str, Any]] = {}
    for method in s.methods:
        print(f"Two teachers that disagree, {method}, {s.steps} + {s.finetune_steps} steps.")
        learned = train(s, method, out / method)
        results[method] = comparison.result_of(out / method, learned)
    more = {"separation of P and N": "separation", "N forgotten, tuned on P": "forgotten"}
    comparison.conclude(out, results, more, draw=partial(draw, s))


if __name__ == "__main__":
    main()
