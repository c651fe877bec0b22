"""One self-contained HTML page per experiment: tables, pictures and the configuration. And table.md."""

from __future__ import annotations

import base64
import html
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #1f2328; max-width: 68rem; margin: 2rem auto; padding: 0 1rem }
table { border-collapse: collapse; font-size: 13px; margin: .5rem 0 1.5rem }
th, td { padding: .3rem .7rem; border-bottom: 1px solid #d8dee4; text-align: right; white-space: nowrap }
th:first-child, td:first-child { text-align: left }
img { max-width: 100%; margin: .5rem 0 }
pre { background: #f6f8fa; padding: .8rem; overflow-x: auto; font-size: 12px }
"""


def write_page(
    folder: Path,
    title: str,
    tables: Sequence[tuple[str, str]],
    pictures: Sequence[Path],
    results: Mapping[str, Any],
) -> None:
    """Writes report.html and table.md. ``tables`` are names and tables in Markdown."""
    (folder / "table.md").write_text("\n\n".join(f"## {name}\n\n{text}" for name, text in tables) + "\n")
    seeds = results["seeds"]
    note = f"Seed {seeds[0]}. In parentheses: change against plain."
    if len(seeds) > 1:
        note = (
            f"{len(seeds)} seeds ({seeds[0]} to {seeds[-1]}). In parentheses: change against plain, and its 95 % "
            "interval (bootstrap over seeds, in pairs). Bands around curves: 95 % interval of the mean."
        )
    body = [f"<h1>{html.escape(title)}</h1><p>{note}</p>"]
    body += [f"<h2>{html.escape(name)}</h2>{_html_table(text)}" for name, text in tables]
    body += [f'<img alt="{picture.stem}" src="{_embedded(picture)}">' for picture in pictures]
    details = {name: results[name] for name in ("configuration", "versions")}
    body.append(f"<h2>Configuration</h2><pre>{html.escape(json.dumps(details, indent=2))}</pre>")
    page = f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{html.escape(title)}</title>'
    (folder / "report.html").write_text(f"{page}<style>{STYLE}</style>{''.join(body)}</html>\n", encoding="utf-8")


def _html_table(markdown: str) -> str:
    head, _, *rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in markdown.splitlines()]

    def line(cells: list[str], tag: str) -> str:
        return "<tr>" + "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in cells) + "</tr>"

    return f"<table>{line(head, 'th')}{''.join(line(row, 'td') for row in rows)}</table>"


def _embedded(picture: Path) -> str:
    return "data:image/png;base64," + base64.b64encode(picture.read_bytes()).decode()
