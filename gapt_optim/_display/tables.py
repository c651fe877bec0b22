"""Tables: a DataFrame as HTML, and in a terminal that may be narrow. The index names the rows."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from itertools import accumulate
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pandas import DataFrame

MISSING = "\N{EN DASH}"
_GAP = 2
_LONGEST_NAME = 30
"""Characters in a line of a row's name; the rest of it goes on in the next line."""


def number(value: float | None, digits: int = 3) -> str:
    """A number for people: so many significant digits, an en dash for none.

    >>> number(1234.5), number(0.000123456)
    ('1,234', '0.000123')
    >>> number(1.8), number(120.0)
    ('1.80', '120')
    """
    if value is None or not math.isfinite(value):
        return MISSING
    if 10**digits <= abs(value) < 1e9:
        return with_minus(f"{value:,.0f}")
    return with_minus(f"{value:#.{digits}g}".removesuffix("."))  # "#" keeps zeros at the end: 1.80 below 1.75


def with_minus(text: str) -> str:
    """A number's hyphen as the minus sign, which is as wide as a digit."""
    return text.replace("-", "\N{MINUS SIGN}")


def html_table(frame: DataFrame, caption: str = "") -> str:
    """Every text is escaped. A table that is wider than the page scrolls by itself."""
    import html

    import pandas as pd

    said = html.escape(caption)
    with pd.option_context("display.max_colwidth", None):
        table = frame.map(_cell).to_html(border=0, index_names=False)
    about = f'<p class="caption">{said}</p>' if caption else ""
    return f'{about}<div class="scroll" tabindex="0" role="region" aria-label="{said or "table"}">{table}</div>'


def print_table(frame: DataFrame, title: str, *, wide: bool = False) -> None:
    """Print numbers or texts so that none is ever broken: what all names begin with goes, then columns on the right.

    ``wide`` prints all columns, however narrow the terminal is.
    """
    from rich.console import Console
    from rich.text import Text

    prefix, names = common_prefix([str(name) for name in frame.index]), short_names(frame.index)
    corner = f"{prefix}*" if prefix else ""
    first = min(max(map(len, [corner, *names])), _LONGEST_NAME)
    cells = [[_cell(value) for value in row] for row in frame.itertuples(index=False)]
    headers = [str(column) for column in frame.columns]
    widths = [max(map(len, (*header.split(), *(row[i] for row in cells)))) for i, header in enumerate(headers)]
    room, ends = _room(wide), accumulate(_GAP + width for width in widths)
    shown = max(1, sum(first + end <= room for end in ends))
    table = _bare_table()
    table.add_column(Text(corner), overflow="fold", width=first)
    for header, width in zip(headers[:shown], widths, strict=False):
        table.add_column(Text(header), justify="right", width=width)
    for name, row in zip(names, cells, strict=True):
        table.add_row(Text(name), *map(Text, row[:shown]))
    console = Console()
    console.print(Text(title))
    Console(width=max(console.width, first + sum(width + _GAP for width in widths[:shown]))).print(table)
    if shown < len(headers):
        console.print(Text(f"Not shown for want of room: {'; '.join(headers[shown:])} (--wide shows all)"))


def print_texts(rows: Sequence[Sequence[str]], *, wide: bool = False) -> None:
    """Print texts in columns. Where they do not fit, dotted names in the first are shown as a tree, and all fold."""
    from rich.console import Console
    from rich.text import Text

    needed = sum(max(map(len, column)) + _GAP for column in zip(*rows, strict=True)) - _GAP
    if needed > _room(wide):
        rows = [("  " * name.count(".") + name.rpartition(".")[2], *rest) for name, *rest in rows]
    table = _bare_table()
    table.show_header = False
    for _ in rows[0]:
        table.add_column(overflow="fold")
    for row in rows:
        table.add_row(*map(Text, row))
    Console(width=min(needed, _room(wide))).print(table)


def _bare_table() -> Any:
    from rich.table import Table

    return Table(box=None, pad_edge=False, padding=(0, _GAP, 0, 0))


def _room(wide: bool) -> int:
    """Columns that a table may take: those of a terminal, unless it is to be wide. A file takes any width."""
    from rich.console import Console

    console = Console()
    return console.width if not wide and (console.is_terminal or "COLUMNS" in os.environ) else 1 << 20


def common_prefix(names: Sequence[str]) -> str:
    """What dotted names begin with in common, up to a dot; empty for a single name.

    >>> common_prefix(["transformer.h.0", "transformer.h.1"])
    'transformer.h.'
    """
    parts = [name.split(".")[:-1] for name in names] if len(names) > 1 else []
    return "".join(f"{part}." for part in os.path.commonprefix(parts))  # noqa: RUF071, of lists


def short_names(names: Sequence[object]) -> list[str]:
    """Dotted names without what all of them begin with."""
    texts = [str(name) for name in names]
    return [text.removeprefix(common_prefix(texts)) for text in texts]


def shared_start(names: Sequence[str]) -> str:
    """What names begin with in common, up to a mark between words; empty where that is all of one.

    >>> shared_start(["checkpoint-100", "checkpoint-150"])
    'checkpoint-'
    """
    start = os.path.commonprefix(list(names)) if len(names) > 1 else ""  # noqa: RUF071, of characters
    start = start[: 1 + max(start.rfind(mark) for mark in "-_./ ")]
    return "" if start in names else start


def _cell(value: Any) -> str:
    return number(value) if isinstance(value, float) or value is None else str(value)
