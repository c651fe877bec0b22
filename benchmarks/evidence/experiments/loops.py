"""The defaults in ordinary loops: what they cost, and whether the phases alternate."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from ..harness import Record, Run
from ..markdown import change_cell, compression_cell, mean_cell, seeds_line, table, versus
from ..tasks import loops

NAMES = {
    "characters": "`nn.TransformerEncoder` on bytes",
    "llama": "Llama under the `Trainer`",
    "cnn": "convolutions on digits",
    "mlp": "three layers, regression",
    "lora": "LoRA on a GPT-2",
}


def runs(first_look: bool, seeds: Sequence[int] | None) -> list[Run]:
    """Each loop, plain and with the defaults."""
    settings = loops.Settings(steps=300 if first_look else 600)
    return [
        Run("loops", replace(settings, loop=loop, method=method, seed=seed))
        for seed in seeds or range(300, 305)
        for loop in loops.LOOPS
        for method in ("plain", "gapt")
    ]


def tables(records: list[Record]) -> dict[str, str]:
    """A row per loop."""
    header = ["loop", "held-out loss, plain", "with the defaults", "centred cosine entropy, plain", "with the defaults",
              "norm ratio, plain", "with the defaults", "compression", "switches"]  # fmt: skip
    rows = []
    for loop, name in NAMES.items():
        plain, gapt = (
            [r for r in records if r.settings["loop"] == loop and r.settings["method"] == method]
            for method in ("plain", "gapt")
        )
        if not (plain and gapt):
            continue
        rows.append(
            [
                name,
                mean_cell(plain, "loss"),
                change_cell(versus(gapt, plain, "loss")),
                mean_cell(plain, "centred_cosine"),
                change_cell(versus(gapt, plain, "centred_cosine"), digits=0),
                mean_cell(plain, "norm_ratio", digits=1),
                mean_cell(gapt, "norm_ratio", digits=1),
                compression_cell(gapt),
                mean_cell(gapt, "switches", digits=0),
            ]
        )
    first = f"`GAPTConfig()` in five loops, {seeds_line(records)}, {records[0].settings['steps']} steps.\n\n"
    return {"loops": first + table(header, rows)}


def pictures(records: list[Record], folder: Path) -> list[Path]:
    """None: the table says it."""
    return []
