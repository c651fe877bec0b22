"""Runs beside each other: a table in Markdown, and relative changes against plain training."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

Runs = Mapping[str, Mapping[str, Any]]


def changes(runs: Runs) -> dict[str, dict[str, float]]:
    """Relative change of every run against ``plain``: -0.05 is 5 % lower. Empty without a plain run."""
    if "plain" not in runs:
        return {}
    plain = runs["plain"]
    return {
        method: {name: run[name] / plain[name] - 1 for name in ("val_loss", "entropy") if plain[name]}
        for method, run in runs.items()
        if method != "plain"
    }


def table(runs: Runs) -> str:
    """One column per run, with the change against ``plain`` behind losses and entropies."""

    def row(name: str, read: Callable[[Mapping[str, Any]], float], compared: bool = True) -> list[str]:
        cells = [name]
        for method, run in runs.items():
            value = read(run)
            change = ""
            if compared and method != "plain" and "plain" in runs and read(runs["plain"]):
                change = f" ({value / read(runs['plain']) - 1:+.1%})"
            cells.append(f"{value:.3f}{change}")
        return cells

    rows = [["", *runs], row("validation CE (nats)", lambda run: run["val_loss"])]
    rows.append(row("mean MBE (nats)", lambda run: run["entropy"]))
    for layer in next(iter(runs.values()))["layer_entropy"]:
        rows.append(row(f"MBE {layer}", lambda run, layer=layer: run["layer_entropy"][layer]))  # type: ignore[misc]
    rows.append(["steps in compression", *(f"{run['compression_share']:.0%}" for run in runs.values())])
    rows.append(["phase switches", *(str(run["switches"]) for run in runs.values())])
    rows.append(["optimizer state (MB)", *(f"{run['optimizer_state_mb']:.1f}" for run in runs.values())])
    rows.append(["tokens/s", *(f"{run['tokens_per_second']:,.0f}" for run in runs.values())])

    widths = [max(len(cells[column]) for cells in rows) for column in range(len(rows[0]))]

    def line(cells: list[str]) -> str:
        padded = [cells[0].ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(cells[1:], widths[1:], strict=True))]
        return "| " + " | ".join(padded) + " |"

    rule = "|".join(["", "-" * (widths[0] + 2), *("-" * (w + 1) + ":" for w in widths[1:]), ""])
    return "\n".join([line(rows[0]), rule, *(line(cells) for cells in rows[1:])])
