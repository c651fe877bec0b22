"""Multiplication, trained on factors of 1-3 digits and tested on 4-6 digits, with and without compression.

    python examples/arithmetic.py                                  # three seeds of four methods, in 20 minutes
    python examples/arithmetic.py --preset minutes                 # a first look in three minutes
    python examples/arithmetic.py --preset paper --device cuda     # 12 layers of width 768
    python examples/arithmetic.py --methods plain gapt --weight 3  # any setting can be changed

What is written to --out: results.json, table.md, report.html, pictures, and a file per run in runs/, so that an
interrupted command goes on where it was.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import gpt2
import sweep
import torch
from errors import UserError, exit_code
from methods import cosine, gapt_config
from multiplication import (
    CONTEXT,
    SYMBOLS,
    TEST,
    TRAINING,
    UNIFORM,
    VALIDATION,
    Problems,
    answer_loss,
    draw,
    evaluate,
)
from results_page import write_page
from run_folder import versions, write_json
from seed_statistics import compare, summarize, table
from speedups import keep_freed_memory
from sweep_pictures import draw_curves, draw_paths
from torch import nn

from gapt_optim import EntropyConfig, GAPTOptimizer, GateConfig, ObjectiveConfig, RepresentationHook

METRICS = (
    "id_loss", "ood_loss", "id_accuracy", "ood_accuracy", "id_calibration", "ood_calibration", "entropy",
    "best_id_loss", "best_ood_loss", "best_id_accuracy", "best_ood_accuracy", "best_entropy", "ood_loss_area",
    "compression_share", "switches",
)  # fmt: skip


@dataclass(frozen=True)
class Settings:
    """Everything that decides how a run goes, besides method and seed."""

    layers: int = 4
    width: int = 128
    heads: int = 4
    steps: int = 700
    batch: int = 128
    lr: float = 1e-3
    warmup: int = 50
    weight_decay: float = 0.1
    weight: float = 1.0
    combine: str = ObjectiveConfig().combine
    max_ratio: float = ObjectiveConfig().max_ratio
    floor: float = 0.4
    """Nats. Pressed down to 0, layers paid 7 % of the loss in distribution on a tuning seed; down to 0.4, 1 %."""
    window: int = 8
    patience_memorization: int = GateConfig().patience_memorization
    patience_compression: int = GateConfig().patience_compression
    min_improvement: float = GateConfig().min_improvement
    spike_tolerance: float = GateConfig().spike_tolerance
    smoothing: float = GateConfig().smoothing
    positions: str = "first"
    """Where in the context a training problem begins: at the first position, or at a random one, which trains the
    embeddings of the positions that only longer factors reach."""
    evaluate_every: int = 50
    problems: int = 512
    """Problems in each of the validation and test sets."""
    device: str = "cpu"


PRESETS = {
    "minutes": Settings(layers=2, width=96, steps=300, problems=256),
    "small": Settings(),
    "paper": Settings(
        layers=12, width=768, heads=12, steps=20_000, batch=512, lr=3e-4, warmup=1000, evaluate_every=500
    ),
}


# One run


def build(s: Settings) -> nn.Module:
    """GPT-2 with random weights, drawn from torch's global generator."""
    separator = SYMBOLS.index("E")
    return gpt2.build(
        s.layers, s.width, s.heads, vocabulary=len(SYMBOLS), separator=separator, context=CONTEXT, dropout=0.0
    )


def train(job: dict[str, Any]) -> dict[str, Any]:
    """One run. The seed alone decides weights, problems and test sets, so methods share them."""
    method, seed, s = job["method"], job["seed"], Settings(**job["settings"])
    device = torch.device(s.device)
    generator = torch.Generator().manual_seed(seed)
    sets = {
        "validation": Problems.of(draw(s.problems, (1, 3), VALIDATION, generator), device),
        "id": Problems.of(draw(s.problems, (1, 3), TEST, generator), device),
        "ood": Problems.of(draw(s.problems, (4, 6), None, generator), device),
    }
    if device.type == "cpu":
        keep_freed_memory()
    torch.manual_seed(seed)
    model = build(s).to(device)
    base = torch.optim.AdamW(model.parameters(), lr=s.lr, betas=(0.9, 0.98), weight_decay=s.weight_decay, fused=True)
    history: list[dict[str, Any]] = []
    switches: list[dict[str, Any]] = []
    compression_steps = 0
    with RepresentationHook(model, "transformer.h.*") as hook:
        config = gapt_config(method, s)
        gapt = None if config is None else GAPTOptimizer(base, hook, config)
        optimizer: torch.optim.Optimizer = base if gapt is None else gapt
        schedule = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: min((step + 1) / (s.warmup + 1), cosine(step / s.steps))
        )
        model.train()
        starts = torch.Generator().manual_seed(seed + 1_000_003) if s.positions == "random" else None
        for step in range(s.steps):
            loss = answer_loss(model, Problems.of(draw(s.batch, (1, 3), TRAINING, generator), device, starts))
            if gapt is None:
                loss.backward()  # type: ignore[no-untyped-call]
            else:
                gapt.backward(loss)
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            if gapt is not None:
                assert gapt.metrics is not None
                compression_steps = gapt.metrics.compression_steps
                if gapt.metrics.reason is not None:
                    switches.append({"step": step + 1, "reason": gapt.metrics.reason})
            sweep.advance()
            if (step + 1) % s.evaluate_every == 0 or step + 1 == s.steps:
                entropy = EntropyConfig(window=s.window)
                measured = {name: evaluate(model, hook, problems, entropy) for name, problems in sets.items()}
                history.append({"step": step + 1, **measured})
    return {
        **scores(history[-1]),
        **{f"best_{name}": value for name, value in scores(best(history)).items()},
        "ood_loss_area": sum(record["ood"]["loss"] for record in history) / len(history),
        "compression_share": compression_steps / s.steps,
        "switches": len(switches),
        "switch_list": switches,
        "history": history,
    }


def best(history: list[dict[str, Any]]) -> dict[str, Any]:
    """The evaluation at which the loss on validation problems, in distribution, was lowest."""
    return min(history, key=lambda record: float(record["validation"]["loss"]))


def scores(record: dict[str, Any]) -> dict[str, float]:
    """The metrics of one evaluation. Entropy is that of the in-distribution test problems, mean over layers."""
    measures = ("loss", "accuracy", "calibration")
    return {
        **{f"{name}_{measure}": record[name][measure] for measure in measures for name in ("id", "ood")},
        "entropy": record["id"]["entropy"],
    }


# All runs


def run(argv: list[str] | None = None) -> dict[str, Any]:
    """The script, from the command line to the results."""
    options = parse(argv)
    settings = Settings(**{name: getattr(options, name) for name in asdict(Settings())})
    check(options, settings)
    sweep.claim(options.out)
    seeds = list(range(options.first_seed, options.first_seed + options.seeds))
    label = sweep.fingerprint(asdict(settings))
    jobs = {
        (method, seed): sweep.Job(
            f"{method}-{label}-{seed}", {"method": method, "seed": seed, "settings": asdict(settings)}, settings.steps
        )
        for seed in seeds  # seed by seed, so that an interrupted sweep has whole comparisons
        for method in options.methods
    }
    done = sweep.run_jobs(
        train, list(jobs.values()), options.out / "runs", workers=options.workers, quiet=options.quiet
    )
    by_method = {method: [done[jobs[method, seed].name] for seed in seeds] for method in options.methods}
    runs, changes = compare(by_method, METRICS)
    layers = list(by_method[options.methods[0]][0]["history"][-1]["id"]["layer_entropy"])
    for method, rows in by_method.items():
        ends = {"layer_entropy": [row["history"][-1] for row in rows]}
        ends["best_layer_entropy"] = [best(row["history"]) for row in rows]
        for name, records in ends.items():
            runs[method][name] = {
                layer: summarize([record["id"]["layer_entropy"][layer] for record in records]) for layer in layers
            }
        for name in ("id", "ood"):
            for measure in ("digits", "digit_losses"):
                runs[method][f"{name}_{measure}"] = mean_over_seeds([row["history"][-1][name][measure] for row in rows])

    def over_training(part: str, metric: str) -> dict[str, list[list[float]]]:
        return {m: [[point[part][metric] for point in row["history"]] for row in rows] for m, rows in by_method.items()}

    curves = {
        "answer CE in distribution (nats)": over_training("id", "loss"),
        "answer CE on 4-6 digits (nats)": over_training("ood", "loss"),
        "exact answers in distribution": over_training("id", "accuracy"),
        "matrix entropy, mean over layers (nats)": over_training("id", "entropy"),
        "calibration error in distribution": over_training("id", "calibration"),
        "calibration error on 4-6 digits": over_training("ood", "calibration"),
    }
    by_layer = {
        f"matrix entropy of {layer} (nats)": {
            method: [[point["id"]["layer_entropy"][layer] for point in row["history"]] for row in rows]
            for method, rows in by_method.items()
        }
        for layer in layers
    }
    steps = [point["step"] for point in by_method[options.methods[0]][0]["history"]]
    level = {"answer CE on 4-6 digits (nats)": (UNIFORM, f"uniform guessing {UNIFORM:.2f}")}
    tables = [
        ("multiplication", table(runs, changes, METRICS)),
        ("right digits, 1-3 digit factors", digit_table(runs, "id")),
        ("right digits, 4-6 digit factors", digit_table(runs, "ood")),
    ]
    results = {
        "experiment": "arithmetic",
        "seeds": seeds,
        "runs": runs,
        "relative": changes,
        "uniform_loss": UNIFORM,
        "configuration": {
            **asdict(settings),
            "gapt": {m: c.model_dump(mode="json") for m in options.methods if (c := gapt_config(m, settings))},
        },
        "versions": versions(),
    }
    # A model that has learned less is less sure of itself, which lowers the loss on lengths it never saw: so the two
    # losses are shown against each other, and methods compared at equal loss in distribution.
    paths = {m: (over_training("id", "loss")[m], over_training("ood", "loss")[m]) for m in options.methods}
    labels = ("answer CE in distribution (nats); training goes left", "answer CE on 4-6 digits (nats)")
    pictures = [
        draw_curves(curves, steps, options.out / "curves.png", levels=level),
        draw_curves(by_layer, steps, options.out / "layers.png"),
        draw_paths(
            paths, options.out / "paths.png", labels=labels, title="Longer factors, at equal loss on short ones"
        ),
    ]
    write_page(options.out, "Multiplication", tables, pictures, results)
    write_json(options.out / "results.json", results)  # last: a folder with results is a finished sweep
    print(f"{len(seeds)} seeds:\n{tables[0][1]}\n\nWritten to {options.out}.")
    return results


def mean_over_seeds(rows: Sequence[Sequence[float]]) -> list[float]:
    """A measure of each digit from the front; test sets of different seeds may differ in their longest answer."""
    length = min(map(len, rows))
    return [sum(row[i] for row in rows) / len(rows) for i in range(length)]


def digit_table(runs: Mapping[str, Any], part: str) -> str:
    """Markdown: how often each token of the answer is right, from the front, given the right ones before it."""
    lines = ["| token of the answer | " + " | ".join(runs) + " |", "|---|" + "---:|" * len(runs)]
    for place, shares in enumerate(zip(*(run[f"{part}_digits"] for run in runs.values()), strict=True), start=1):
        lines.append(f"| {place} | " + " | ".join(f"{share:.0%}" for share in shares) + " |")
    return "\n".join(lines)


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Multiplication beyond the lengths trained on, with and without GAPT.")
    parser.add_argument("--preset", default="small", choices=list(PRESETS), help="(default: small)")
    sweep.add_arguments(parser, seeds=3, out="runs/arithmetic")
    sweep.add_settings(parser, asdict(Settings()))
    preset, _ = parser.parse_known_args(argv)
    parser.set_defaults(**asdict(PRESETS[preset.preset]))
    return parser.parse_args(argv)


def check(options: argparse.Namespace, s: Settings) -> None:
    """Refuses what cannot work before anything is trained."""
    sweep.check_arguments(options)
    for name in ("layers", "width", "heads", "steps", "batch", "problems", "evaluate_every"):
        if getattr(s, name) < 1:
            raise UserError(f"--{name.replace('_', '-')}: needs at least 1, found {getattr(s, name)}")
    if s.width % s.heads:
        raise UserError(f"--width: must be a multiple of --heads {s.heads}, found {s.width}")
    if s.positions not in ("first", "random"):
        raise UserError(f"--positions: must be first or random, found {s.positions}")
    if not 0 < s.lr < math.inf:
        raise UserError(f"--lr: must be positive and finite, found {s.lr}")
    for name in ("warmup", "weight_decay"):
        if not 0 <= getattr(s, name) < math.inf:
            raise UserError(f"--{name.replace('_', '-')}: must be finite and not negative, found {getattr(s, name)}")
    try:
        torch.empty(1, device=s.device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device {s.device}: cannot be used here; try --device cpu") from error
    for method in options.methods:
        gapt_config(method, s)


if __name__ == "__main__":
    sys.exit(exit_code(run))
