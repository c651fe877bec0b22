"""GPT-2 with several seeds of every method: means with intervals, curves with bands, and one page of them.

Each run keeps its records in a folder of its own and goes on from its last checkpoint: Ctrl-C loses nothing, a kill
what came after that. Two sweeps at the same time need folders of their own.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import sweep
from corpus import Corpus, first_tokens, load
from errors import UserError
from methods import of_method
from results_page import write_page
from run_folder import versions, write_json
from seed_statistics import compare, summarize, table
from sweep_pictures import draw_curves, draw_paths
from training import TrainConfig, train

from gapt_optim import GAPTConfig
from gapt_optim._step.record import mean_or_nan
from gapt_optim.viewing import read_metrics

METRICS = ("val_loss", "best_val_loss", "entropy", "train_loss", "compression_share", "switches")


def run_sweep(
    config: TrainConfig,
    corpus: Corpus,
    folder: Path,
    *,
    methods: Sequence[str],
    seeds: Sequence[int],
    lengths: Sequence[int],
    out: Path,
    workers: int,
    quiet: bool,
) -> dict[str, Any]:
    """Trains what is missing in ``out``, and writes results.json, table.md, report.html and pictures there.

    Args:
        folder: where ``corpus`` was prepared, for the training processes to read.
        lengths: numbers of training tokens, a setting each; empty for all there are.
    """
    settings = [str(length) for length in lengths] or ["all"]
    jobs = {}
    for seed in seeds:  # seed by seed, so that an interrupted sweep has whole comparisons
        for setting in settings:
            for method in methods:
                # Only what makes a difference to the method, so that sweeps in one folder share its runs.
                wrapper = of_method(method, config.gapt) or GAPTConfig(entropy=config.gapt.entropy)
                what = {
                    "method": method,
                    "seed": seed,
                    "corpus": [corpus.name, corpus.vocabulary, len(corpus.train), len(corpus.validation)],
                    "tokens": None if setting == "all" else int(setting),
                    "config": config.model_copy(update={"gapt": wrapper}).model_dump_json(),
                }
                jobs[setting, method, seed] = sweep.Job(run_name(what), what, config.steps)
    done = sweep.run_jobs(
        functools.partial(train_one, folder, out / "runs"),
        list(jobs.values()),
        out / "runs",
        workers=workers,
        quiet=quiet,
    )

    runs, changes, tables, pictures = {}, {}, [], []
    for setting in settings:
        by_method = {method: [done[jobs[setting, method, seed].name] for seed in seeds] for method in methods}
        runs[setting], changes[setting] = compare(by_method, METRICS)
        for method, rows in by_method.items():
            runs[setting][method]["best_step"] = [row["best_step"] for row in rows]
            runs[setting][method]["layer_entropy"] = {
                layer: summarize([row["layer_entropy"][layer] for row in rows]) for layer in rows[0]["layer_entropy"]
            }
        name = Path(corpus.name).name + (f", {int(setting):,} training tokens" if setting != "all" else "")
        tables.append((name, table(runs[setting], changes[setting], METRICS)))
        curves = {
            title: {method: [row["history"][key] for row in rows] for method, rows in by_method.items()}
            for title, key in (
                ("validation CE (nats)", "val_loss"),
                ("training CE (nats)", "train_loss"),
                ("matrix entropy on validation text (nats)", "entropy"),
                ("share of steps in compression", "compression"),
            )
        }
        steps = done[jobs[setting, methods[0], seeds[0]].name]["history"]["step"]
        pictures.append(draw_curves(curves, steps, out / f"curves_{setting}.png", title=name))
        # A model that is held back has learned less by heart: what a method adds to that shows at equal training loss.
        paths = {
            method: ([row["history"]["train_loss"] for row in rows], [row["history"]["val_loss"] for row in rows])
            for method, rows in by_method.items()
        }
        labels = ("training CE since the last validation (nats); training goes left", "validation CE (nats)")
        title = f"{name}: validation at equal training CE"
        pictures.append(draw_paths(paths, out / f"paths_{setting}.png", labels=labels, title=title))

    alone = settings[0] if len(settings) == 1 else None
    results = {
        "experiment": "gpt2_fineweb",
        "corpus": corpus.name,
        "unigram_entropy": corpus.unigram_entropy,
        "vocabulary": corpus.vocabulary,
        "settings": settings,
        "seeds": list(seeds),
        "tokens_seen": config.steps * config.accumulation * config.batch_size * config.context,
        "runs": runs[alone] if alone else runs,
        "relative": changes[alone] if alone else changes,
        "configuration": {
            **config.model_dump(mode="json"),
            "gapt": {m: c.model_dump(mode="json") for m in methods if (c := of_method(m, config.gapt))},
        },
        "versions": versions(),
    }
    write_page(out, "GPT-2 on web text", tables, pictures, results)
    write_json(out / "results.json", results)  # last: a folder with results is a finished sweep
    for name, text in tables:
        print(f"{name}, {len(seeds)} seeds:\n{text}\n")
    print(f"Unigram entropy of the corpus: {corpus.unigram_entropy:.3f} nats. Written to {out}.")
    return results


def run_name(job: dict[str, Any]) -> str:
    """The name of a run's folder and result, different for different settings."""
    shared = sweep.fingerprint({**job, "seed": None})
    return f"{job['tokens'] or 'all'}-{job['method']}-{shared}-{job['seed']}"


def train_one(corpus_folder: Path, folder: Path, job: dict[str, Any]) -> dict[str, Any]:
    """One run, on in its folder from where an interruption left it."""
    config = TrainConfig.model_validate_json(job["config"])
    corpus = load(corpus_folder)
    corpus = corpus if job["tokens"] is None else first_tokens(corpus, job["tokens"])
    place = folder / run_name(job)
    result = train(
        config,
        corpus,
        seed=job["seed"],
        method=job["method"],
        folder=place,
        resume=True,
        progress=False,
        on_step=sweep.advance,
    )
    steps, validations = read_metrics(place / "metrics.jsonl"), read_metrics(place / "validation.jsonl")
    history: dict[str, list[float]] = {"step": [], "val_loss": [], "entropy": [], "train_loss": [], "compression": []}
    start = 0
    for validation in validations:
        between = steps[start : validation["step"]]
        start = validation["step"]
        history["step"].append(validation["step"])
        history["val_loss"].append(validation["loss"])
        history["entropy"].append(validation["entropy"])
        history["train_loss"].append(mean_or_nan([step["loss"] for step in between if step["loss"] is not None]))
        history["compression"].append(sum(step["phase"] == "compression" for step in between) / len(between))
    if not math.isfinite(result["val_loss"]):
        raise UserError(f"{run_name(job)}: the validation loss is {result['val_loss']}; try a smaller --lr")
    best = min(validations, key=lambda validation: float(validation["loss"]))
    (place / "checkpoint.pt").unlink(missing_ok=True)  # a sweep would leave gigabytes of them
    return {
        **result,
        "train_loss": history["train_loss"][-1],
        "best_val_loss": best["loss"],
        "best_step": best["step"],
        "history": history,
    }
