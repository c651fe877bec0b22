"""Conflicting experience: does compression keep apart what contradicts, and forget less of it?

    python examples/forgetting.py                                    # half and half, ten seeds of four methods
    python examples/forgetting.py --settings mixed interleaved sequential finetune --seeds 20
    python examples/forgetting.py --tradeoff                         # separation against task loss, over weights

A random network is shifted both ways along a random low-rank direction, which makes two teachers that disagree. A
student that starts between them learns from both. What is written to --out: results.json, table.md, report.html,
pictures, and a file per run in runs/, so that an interrupted command goes on where it was.
"""

from __future__ import annotations

import argparse
import math
import sys
from dataclasses import asdict, dataclass, replace
from typing import Any

import sweep
import torch
from errors import UserError, exit_code
from methods import cosine, gapt_config
from results_page import write_page
from run_folder import versions, write_json
from seed_statistics import cell, compare, table
from sweep_pictures import draw_clouds, draw_tradeoff
from torch import Tensor, nn

from gapt_optim import EntropyConfig, GAPTOptimizer, GateConfig, ObjectiveConfig, RepresentationHook

INPUTS, HIDDEN, OUTPUTS = 10, 20, 10
TRAINING, TEST = 500, 100
SETTINGS = ("mixed", "interleaved", "sequential", "finetune")
TRADEOFF = ("separation", "entropy", "task_loss")
BOTH_SEEN = (*TRADEOFF, "loss_p", "loss_n", "compression_share", "switches")
ONE_LEFT = (*BOTH_SEEN, "forgetting", "forgotten_loss")
METRICS = {"mixed": BOTH_SEEN, "interleaved": BOTH_SEEN, "sequential": ONE_LEFT, "finetune": ONE_LEFT}
SCHEDULES = {"constant": lambda done: 1.0, "cosine": cosine}
TRADEOFF_WEIGHTS = (0.03, 0.1, 0.3, 1.0, 3.0, 10.0)


@dataclass(frozen=True)
class Settings:
    """Everything that decides how a run goes, besides setting, method and seed."""

    steps: int = 2000
    batch: int = 32
    lr: float = 0.01
    schedule: str = "constant"
    """Of the learning rate: constant, or cosine down to a tenth."""
    weight: float = 1.0
    combine: str = ObjectiveConfig().combine
    max_ratio: float = ObjectiveConfig().max_ratio
    floor: float = ObjectiveConfig().floor
    window: int = 8
    patience_memorization: int = GateConfig().patience_memorization
    patience_compression: int = GateConfig().patience_compression
    min_improvement: float = GateConfig().min_improvement
    spike_tolerance: float = GateConfig().spike_tolerance
    smoothing: float = GateConfig().smoothing


# The task


class Network(nn.Module):
    """10-20-10. What comes out of ``hidden`` is the representation."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden = nn.Sequential(nn.Linear(INPUTS, HIDDEN), nn.ReLU())
        self.readout = nn.Linear(HIDDEN, OUTPUTS)

    def forward(self, x: Tensor) -> Tensor:
        answer: Tensor = self.readout(self.hidden(x))
        return answer


@dataclass(frozen=True)
class Experience:
    """What one teacher answers to its kind of input."""

    inputs: Tensor
    answers: Tensor
    test_inputs: Tensor
    test_answers: Tensor


def make_task() -> tuple[Network, Experience, Experience]:
    """The student as it starts, and experiences P and N, drawn from torch's global generator."""
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
        teacher = Network()
        with torch.no_grad():
            for weights, start, shift in zip(teacher.parameters(), student.parameters(), shifts, strict=True):
                weights.copy_(start + sign * shift)
        inputs = 0.25 * torch.randn(TRAINING + TEST, INPUTS)
        inputs[:, half] += 1.0
        with torch.no_grad():
            answers = teacher(inputs)
        experiences.append(Experience(inputs[:TRAINING], answers[:TRAINING], inputs[TRAINING:], answers[TRAINING:]))
    return student, experiences[0], experiences[1]


def batch_order(setting: str, s: Settings, generator: torch.Generator) -> Tensor:
    """Rows of a step's batch (steps, batch), where experience P is rows 0 to 499 and N the 500 after them.

    A batch of both holds P first and then N, so that a window of the entropy holds one experience.
    """
    p = torch.randint(TRAINING, (s.steps, s.batch), generator=generator)
    n = TRAINING + torch.randint(TRAINING, (s.steps, s.batch), generator=generator)
    both = torch.cat([p[:, : s.batch // 2], n[:, s.batch // 2 :]], dim=1)
    step = torch.arange(s.steps)[:, None]
    first_half = step < s.steps // 2
    return {
        "mixed": both,
        "interleaved": torch.where(step % 2 == 0, p, n),
        "sequential": torch.where(first_half, p, n),
        "finetune": torch.where(first_half, both, p),
    }[setting]


# One run


def train(job: dict[str, Any]) -> dict[str, Any]:
    """One run. The seed alone decides weights, teachers, data and their order, so methods share them."""
    setting, method, seed, s = job["setting"], job["method"], job["seed"], Settings(**job["settings"])
    torch.manual_seed(seed)
    student, p, n = make_task()
    order = batch_order(setting, s, torch.Generator().manual_seed(seed + 1_000_003))
    batches = zip(torch.cat([p.inputs, n.inputs])[order], torch.cat([p.answers, n.answers])[order], strict=True)
    old = {"sequential": p, "finetune": n}.get(setting)  # what is no longer seen in the second half
    learned = None
    compression_steps = switches = 0

    base = torch.optim.Adam(student.parameters(), lr=s.lr, fused=True)
    with RepresentationHook(student, "hidden") as hook:
        config = gapt_config(method, s)
        gapt = None if config is None else GAPTOptimizer(base, hook, config)
        optimizer: torch.optim.Optimizer = base if gapt is None else gapt
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: SCHEDULES[s.schedule](step / s.steps))
        for step, (inputs, answers) in enumerate(batches):
            if old is not None and step == s.steps // 2:
                learned = held_out_loss(student, old)
            loss = (student(inputs) - answers).abs().mean()
            if gapt is None:
                loss.backward()
            else:
                gapt.backward(loss)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            if step % 100 == 99:
                sweep.advance(100)
        sweep.advance(s.steps % 100)
        if gapt is not None and gapt.metrics is not None:
            compression_steps, switches = gapt.metrics.compression_steps, gapt.metrics.switches
        result = measure(student, hook, p, n, EntropyConfig(window=s.window))
    if old is not None and learned is not None:
        result["forgotten_loss"] = held_out_loss(student, old)
        result["forgetting"] = result["forgotten_loss"] - learned
    return {**result, "compression_share": compression_steps / s.steps, "switches": switches}


@torch.no_grad()
def held_out_loss(student: Network, experience: Experience) -> float:
    """L1 on test data."""
    student.eval()
    loss: float = (student(experience.test_inputs) - experience.test_answers).abs().mean().item()
    student.train()
    return loss


@torch.no_grad()
def measure(
    student: Network, hook: RepresentationHook, p: Experience, n: Experience, entropy: EntropyConfig
) -> dict[str, Any]:
    """Metrics on test data, and the hidden representations of both experiences for the picture."""
    student.eval()
    clouds, losses, entropies = [], [], []
    for experience in (p, n):
        with hook.measuring(entropy) as measured:
            losses.append(held_out_loss(student, experience))
        entropies.append(measured.mean)
        clouds.append(student.hidden(experience.test_inputs))
    student.train()
    within = torch.stack([cloud.var(0, unbiased=False).sum() for cloud in clouds]).mean()
    distance = (clouds[0].mean(0) - clouds[1].mean(0)).norm()
    return {
        "separation": (distance / within.sqrt()).item(),
        "entropy": sum(entropies) / 2,
        "task_loss": sum(losses) / 2,
        "loss_p": losses[0],
        "loss_n": losses[1],
        "clouds": [[[round(x, 4) for x in row] for row in cloud.tolist()] for cloud in clouds],
    }


# All runs


def run(argv: list[str] | None = None) -> dict[str, Any]:
    """The script, from the command line to the results."""
    options = parse(argv)
    settings = Settings(**{name: getattr(options, name) for name in asdict(Settings())})
    check(options, settings)
    sweep.claim(options.out)
    seeds = list(range(options.first_seed, options.first_seed + options.seeds))

    def job(setting: str, method: str, seed: int, s: Settings) -> sweep.Job:
        label = f"{setting}-{method}-{sweep.fingerprint(asdict(s))}-{seed}"
        return sweep.Job(label, {"setting": setting, "method": method, "seed": seed, "settings": asdict(s)}, s.steps)

    jobs = {
        (setting, method, settings.weight, seed): job(setting, method, seed, settings)
        for setting in options.settings
        for method in options.methods
        for seed in seeds
    }
    weights = TRADEOFF_WEIGHTS if options.tradeoff else ()
    for weight in weights:
        for method in (method for method in options.methods if method != "plain"):
            for seed in seeds:
                jobs["mixed", method, weight, seed] = job("mixed", method, seed, replace(settings, weight=weight))
    done = sweep.run_jobs(
        train, list(jobs.values()), options.out / "runs", workers=options.workers, quiet=options.quiet
    )

    def results_of(setting: str, method: str, weight: float = settings.weight) -> list[dict[str, Any]]:
        return [done[jobs[setting, method, weight, seed].name] for seed in seeds]

    runs, changes, tables, pictures = {}, {}, [], []
    for setting in options.settings:
        by_method = {method: results_of(setting, method) for method in options.methods}
        runs[setting], changes[setting] = compare(by_method, METRICS[setting])
        tables.append((setting, table(runs[setting], changes[setting], METRICS[setting])))
        clouds = {method: results[0]["clouds"] for method, results in by_method.items()}
        title = f"Hidden representations of {setting} experience (seed {seeds[0]})"
        pictures.append(draw_clouds(clouds, options.out / f"clouds_{setting}.png", title=title))
    tradeoff: dict[str, list[dict[str, Any]]] = {}
    if weights:
        plain = results_of("mixed", "plain")
        for method in (method for method in options.methods if method != "plain"):
            tradeoff[method] = []
            for weight in weights:
                summaries, change = compare({"plain": plain, method: results_of("mixed", method, weight)}, TRADEOFF)
                tradeoff[method].append({"weight": weight, **summaries[method], "relative": change[method]})
        tables.append(("trade-off", tradeoff_table(tradeoff)))
        title = f"What separation costs, over weights of the entropy ({len(seeds)} seeds)"
        pictures.append(draw_tradeoff(tradeoff, options.out / "tradeoff.png", title=title))

    alone = options.settings[0] if len(options.settings) == 1 else None
    results = {
        "experiment": "forgetting",
        "settings": options.settings,
        "seeds": seeds,
        "runs": runs[alone] if alone else runs,
        "relative": changes[alone] if alone else changes,
        **({"tradeoff": tradeoff} if tradeoff else {}),
        "configuration": {
            **asdict(settings),
            "gapt": {m: c.model_dump(mode="json") for m in options.methods if (c := gapt_config(m, settings))},
        },
        "versions": versions(),
    }
    write_page(options.out, "Conflicting experience", tables, pictures, results)
    write_json(options.out / "results.json", results)  # last: a folder with results is a finished sweep
    for name, text in tables:
        print(f"{name}, {len(seeds)} seeds:\n{text}\n")
    print(f"Written to {options.out}.")
    return results


def tradeoff_table(tradeoff: dict[str, list[dict[str, Any]]]) -> str:
    """Markdown: a row per method and weight."""
    lines = [f"| method, weight | {' | '.join(TRADEOFF)} |", "|---|" + "---:|" * len(TRADEOFF)]
    for method, points in tradeoff.items():
        for point in points:
            summaries, changes = {method: point}, {method: point["relative"]}
            cells = [cell(method, metric, summaries, changes) for metric in TRADEOFF]
            lines.append(f"| {method}, {point['weight']:g} | {' | '.join(cells)} |")
    return "\n".join(lines)


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Learning from two teachers that disagree, with and without GAPT.")
    parser.add_argument("--settings", nargs="+", default=["mixed"], choices=SETTINGS, help="(default: mixed)")
    parser.add_argument("--tradeoff", action="store_true", help="also train mixed with weights from 0.03 to 10")
    sweep.add_arguments(parser, seeds=10, out="runs/forgetting")
    sweep.add_settings(parser, asdict(Settings()))
    return parser.parse_args(argv)


def check(options: argparse.Namespace, s: Settings) -> None:
    """Refuses what cannot work before anything is trained."""
    sweep.check_arguments(options)
    for name, least in (("steps", 2), ("batch", 2)):
        if getattr(s, name) < least:
            raise UserError(f"--{name}: needs at least {least}, found {getattr(s, name)}")
    if options.tradeoff and "plain" not in options.methods:
        raise UserError("--tradeoff: compares with plain; add it to --methods")
    if not 0 < s.lr < math.inf:
        raise UserError(f"--lr: must be positive and finite, found {s.lr}")
    if s.schedule not in SCHEDULES:
        raise UserError(f"--schedule: must be one of {', '.join(SCHEDULES)}, found {s.schedule}")
    for method in options.methods:
        gapt_config(method, s)


if __name__ == "__main__":
    sys.exit(exit_code(run))
