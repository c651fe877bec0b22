"""Markdown tables of means over seeds."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from .harness import Record
from .stats import Comparison, Interval, compare, mean_interval

Groups = dict[tuple[Any, ...], list[Record]]


def by_seed(records: Iterable[Record]) -> list[Record]:
    """Records in the order of their seeds."""
    return sorted(records, key=lambda r: int(r.settings["seed"]))


def group(records: Iterable[Record], *names: str) -> Groups:
    """Records by the values of some settings, each list in the order of seeds."""
    groups: Groups = {}
    for record in records:
        groups.setdefault(tuple(group_name(record.settings[name]) for name in names), []).append(record)
    return {key: by_seed(found) for key, found in groups.items()}


def group_name(value: Any) -> Any:
    """What stands for a setting's value in the keys of `group`: itself, or the fields of a dictionary as text."""
    if not isinstance(value, dict):
        return value
    return ", ".join(
        f"{name} {item:g}" if isinstance(item, float | int) else f"{name} {item}" for name, item in value.items()
    )


def values(records: Sequence[Record], name: str, part: str = "final") -> list[float]:
    """One number of each record."""
    return [float(record.result[part][name]) for record in records]


def paired(records: Sequence[Record], baseline: Sequence[Record]) -> tuple[list[Record], list[Record]]:
    """The records of the seeds that both have, in one order."""
    ours = {r.settings["seed"]: r for r in records}
    theirs = {r.settings["seed"]: r for r in baseline}
    seeds = sorted(ours.keys() & theirs.keys())
    return [ours[s] for s in seeds], [theirs[s] for s in seeds]


def versus(records: Sequence[Record], baseline: Sequence[Record], name: str, part: str = "final") -> Comparison | None:
    """A comparison over the seeds that both have; None where there is none."""
    ours, theirs = paired(records, baseline)
    if not ours:
        return None
    return compare(values(ours, name, part), values(theirs, name, part))


def mean_cell(records: Sequence[Record], name: str, part: str = "final", digits: int = 3) -> str:
    """Mean over seeds; half the 95 % interval behind it from three seeds on."""
    found = [v for v in values(records, name, part) if math.isfinite(v)]
    if not found:
        return ""
    interval = mean_interval(found)
    text = f"{interval.mean:.{digits}f}"
    return text + (f" ± {interval.high - interval.mean:.{digits}f}" if len(found) > 2 else "")


def change_cell(comparison: Comparison | None, digits: int = 1) -> str:
    """Relative change, with its interval from three seeds on."""
    if comparison is None or math.isnan(comparison.change.mean):
        return ""
    c = comparison.change
    text = f"{100 * c.mean:+.{digits}f} %"
    return text + (f" [{100 * c.low:+.{digits}f}, {100 * c.high:+.{digits}f}]" if comparison.seeds > 2 else "")


def compression_cell(records: Sequence[Record]) -> str:
    """Mean share of the steps in compression."""
    shares = values(records, "compression")
    return f"{100 * sum(shares) / len(shares):.0f} %"


def interval_cell(interval: Interval, digits: int = 4) -> str:
    """A difference with its interval."""
    return f"{interval.mean:+.{digits}f} [{interval.low:+.{digits}f}, {interval.high:+.{digits}f}]"


def p_cell(p: float) -> str:
    """A p-value."""
    return "" if math.isnan(p) else ("< 0.001" if p < 0.001 else f"{p:.3f}")


def table(header: Sequence[str], rows: Iterable[Sequence[str]], *, text_columns: int = 1) -> str:
    """A markdown table; all but the first ``text_columns`` are numbers, set to the right."""
    lines = [
        "| " + " | ".join(header) + " |",
        "|" + "---|" * text_columns + "---:|" * (len(header) - text_columns),
    ]
    lines += ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join(lines)


def kernel_name(settings: Mapping[str, Any]) -> str:
    """`cosine, centred`."""
    return f"{settings['kernel']}{', centred' if settings['center'] else ''}"


def seeds_line(records: Sequence[Record]) -> str:
    """Which seeds a table holds."""
    seeds = sorted({int(r.settings["seed"]) for r in records})
    if seeds == list(range(seeds[0], seeds[-1] + 1)) and len(seeds) > 1:
        return f"seeds {seeds[0]} to {seeds[-1]}"
    return f"seed{'s' if len(seeds) > 1 else ''} {', '.join(map(str, seeds))}"
