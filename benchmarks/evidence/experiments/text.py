"""GPT-2 on text where it underfits and where it overfits, every method tuned first on two seeds.

The plan has three stages, each due when the one before it is on record. `tuning` runs every method over weight decay x
dropout on seeds 0 and 1, then half and twice the learning rate at each method's best point. The comparison then takes
each method's best setting, the gate on top of plain's best, and plain with averaged weights, on seeds from 300 on and
another piece of the held-out text. What is best is read from `results/text-tuning.json`, so the choice is on record.
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
TUNED_AS = {"published often": "published"}
"""Not tuned by itself: it hardly ever compresses, and takes eight times as many calls."""
GRID = {"weight_decay": (0.1, 0.3, 1.0, 3.0), "dropout": (0.0, 0.1, 0.2)}
RATES = (0.5, 2.0)
"""Times the learning rate."""
TUNING_SEEDS = (0, 1)
TUNED = ("weight_decay", "dropout", "lr")
CORPORA = ("sotu", "fineweb")
AVERAGES = (0.99, 0.998)


def settings(first_look: bool) -> dict[str, Settings]:
    """The regimes: few bytes many times, and many bytes less than once; both end 1 nat below single bytes."""
    base = text.TUNED if first_look else replace(text.PAPER, lr=text.TUNED.lr)
    return {
        "underfits": replace(base, train_bytes=1_500_000),
        "overfits": replace(base, train_bytes=20_000 if first_look else 60_000),
    }


def runs(first_look: bool, seeds: Sequence[int] | None) -> list[Run]:
    """The comparison, with each method's tuned settings; before there are any, the tuning."""
    if stage(first_look) == "text-tuning":
        return tuning_runs(first_look)
    tuned = best_settings(first_look) or {}
    found = []
    for seed in seeds or range(300, 305):
        for regime, base in settings(first_look).items():
            for corpus in CORPORA if regime == "underfits" or not first_look else CORPORA[:1]:
                s = replace(base, corpus=corpus, seed=seed)
                best = tuned if regime == "overfits" else {}
                plain = best.get("plain", {})
                for method, weight in METHODS.items():
                    own = best.get(TUNED_AS.get(method, method), {})
                    found.append(Run("text", replace(s, **method_settings(method, weight), **own)))
                found.append(Run("text", replace(s, **method_settings("gapt", METHODS["gapt"]), **plain)))
                if regime == "overfits":
                    found += [Run("text", replace(s, **plain, ema=decay)) for decay in AVERAGES]
                    found.append(Run("text", s))  # plain as it is before tuning
    return found


def stage(first_look: bool) -> str:
    """What the results of the runs that are due are called."""
    return "text" if len(_tuned_points(first_look)) == len(tuning_runs(first_look)) else "text-tuning"


def tuning_runs(first_look: bool, seeds: Sequence[int] = TUNING_SEEDS) -> list[Run]:
    """Every method over the grid, where it overfits; when that is on record, also over the learning rate."""
    base = replace(settings(first_look)["overfits"], held_out_at=0.25)
    points = [dict(zip(GRID, values, strict=True)) for values in itertools.product(*GRID.values())]
    grid = [r for r in _tuned_points(first_look) if r.settings["lr"] == base.lr]
    found = []
    for method, weight in METHODS.items():
        if method in TUNED_AS:
            continue
        of_method = [r for r in grid if r.settings["method"] == method]
        whole = len(of_method) == len(points) * len(seeds)
        rates = [_best(of_method) | {"lr": base.lr * factor} for factor in RATES] if whole else []
        for changes, seed in itertools.product([*points, *rates], seeds):
            found.append(Run("text", replace(base, seed=seed, **method_settings(method, weight), **changes)))
    return found


def _tuned_points(first_look: bool) -> list[Record]:
    name = "text-tuning" + ("-first-look" if first_look else "")
    return harness.read_results(name) if (harness.RESULTS / f"{name}.json").exists() else []


def best_settings(first_look: bool) -> dict[str, dict[str, Any]] | None:
    """Of each method, the point with the lowest final loss on the tuning seeds; None before tuning."""
    records = _tuned_points(first_look)
    return {method: _best(found) for (method,), found in group(records, "method").items()} or None


def _best(records: list[Record]) -> dict[str, Any]:
    points = group(records, *TUNED)
    best = min(points, key=lambda point: statistics.fmean(r.result["final"]["loss"] for r in points[point]))
    return dict(zip(TUNED, best, strict=True))


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
        for (method, *_, ema), of_setting in group(found, "method", *TUNED, "ema").items():
            if not ema:
                by_method.setdefault(method, of_setting)  # its tuned setting, which is the first
        series = {
            label: {m: [r.result["curve"][name] for r in records_] for m, records_ in by_method.items()}
            for name, label in (("loss", "held-out loss (nats)"), ("centred_cosine", "centred cosine entropy (nats)"))
        }
        x = {m: records_[0].result["curve"]["step"] for m, records_ in by_method.items()}
        path = folder / f"text-{corpus}-{size // 1000}k.png"
        made.append(lines_of_methods(x, series, path, x_label="step"))
    return made
