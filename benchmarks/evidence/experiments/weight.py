"""Which weight: what each costs and takes on text, and what the default does in five ordinary loops."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from gapt_optim import ObjectiveConfig

from ..harness import Record, Run
from ..markdown import change_cell, compression_cell, group, mean_cell, seeds_line, table, versus
from ..stats import Interval
from ..tasks import loops, text

WEIGHTS = {"gapt": (0.01, 0.02, 0.035, 0.05, 0.1, 0.2), "penalty": (0.005, 0.01, 0.02, 0.05, 0.1)}
METHODS = {"gapt": "gate", "penalty": "penalty"}
LOOPS = {
    "characters": "`nn.TransformerEncoder` on bytes",
    "llama": "Llama under the `Trainer`",
    "cnn": "convolutions on digits",
    "mlp": "three layers, regression",
    "lora": "LoRA on a GPT-2",
}


def runs(first_look: bool, seeds: Sequence[int] | None) -> list[Run]:
    """Gate and penalty at their weights on text; each loop plain and with the defaults."""
    base = text.Settings(optimizer="adamw", lr=3e-3, steps=700, train_bytes=300_000)
    found = []
    for seed in seeds or range(300, 305):
        found.append(Run("text", replace(base, seed=seed)))
        for method, weights in WEIGHTS.items():
            found += [Run("text", replace(base, seed=seed, method=method, weight=w)) for w in weights]
        for loop in loops.LOOPS:
            found += [
                Run("loops", loops.Settings(steps=600, loop=loop, method=method, seed=seed))
                for method in ("plain", "gapt")
            ]
    return found


def tables(records: list[Record]) -> dict[str, str]:
    """A row per weight on text, then one per loop."""
    header = ["loop", "by", "weight", "held-out loss, plain", "change", "centred cosine entropy, plain", "change",
              "steps pressed", "switches"]  # fmt: skip
    rows = []
    for (method, weight), (found, plain) in _on_text(records).items():
        rows.append(_row("bytes of text", METHODS[method], weight, found, plain))
    for loop, name in LOOPS.items():
        of_loop = [r for r in records if r.settings.get("loop") == loop]
        plain, found = ([r for r in of_loop if r.settings["method"] == m] for m in ("plain", "gapt"))
        if plain and found:
            rows.append(_row(name, "gate", ObjectiveConfig().weight, found, plain))
    return {"weight": f"AdamW, {seeds_line(records)}.\n\n" + table(header, rows, text_columns=2)}


def _on_text(records: list[Record]) -> dict[tuple[str, float], tuple[list[Record], list[Record]]]:
    """Runs and plain runs of the text task, by method and weight."""
    by_setting = group([r for r in records if r.task == "text"], "method", "weight")
    plain = by_setting.get(("plain", 0.0), [])
    keys = [(method, weight) for method, weights in WEIGHTS.items() for weight in weights]
    return {key: (by_setting[key], plain) for key in keys if key in by_setting}


def _row(loop: str, by: str, weight: float, found: list[Record], plain: list[Record]) -> list[str]:
    return [
        loop,
        by,
        f"{weight:g}",
        mean_cell(plain, "loss"),
        change_cell(versus(found, plain, "loss")),
        mean_cell(plain, "centred_cosine"),
        change_cell(versus(found, plain, "centred_cosine"), digits=0),
        compression_cell(found),
        mean_cell(found, "switches", digits=0),
    ]


def pictures(records: list[Record], folder: Path) -> list[Path]:
    """What a weight takes of the entropy, and what of the loss."""
    from ..pictures import curves_of_methods, percent

    points: dict[str, list[tuple[Interval, Interval]]] = {}
    for (method, _), (found, plain) in _on_text(records).items():
        x, y = versus(found, plain, "centred_cosine"), versus(found, plain, "loss")
        if x is not None and y is not None:
            points.setdefault(method, []).append((percent(x.change, of_whole=True), percent(y.change)))
    labels = ("centred cosine entropy, of plain's (%)", "held-out loss against plain (%)")
    path = folder / "weight.png"
    return [curves_of_methods(points, path, labels=labels, title="Bytes of text, AdamW: a point per weight")]
