"""One module per experiment: which runs it needs, and what is made of their results.

A module has `runs(first_look, seeds) -> list[Run]`, `tables(records) -> {name: markdown}` and
`pictures(records, folder) -> list[Path]`. Its results are `results/<module>.json`, those of a first look
`results/<module>-first-look.json`.
"""

from __future__ import annotations

import importlib
from typing import Any

NAMES = (
    "loss",
    "published",
    "compressibility",
    "forgetting",
    "kernels",
    "trainability",
    "weight",
    "phases",
    "multiplication",
)


def load(name: str) -> Any:
    """The module of an experiment."""
    if name not in NAMES:
        raise ValueError(f"no experiment {name!r}; there are {', '.join(NAMES)}")
    return importlib.import_module(f".{name}", __package__)
