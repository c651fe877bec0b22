"""The figures that `python -m benchmarks.cost.table --json FILE` has measured, as a table.

```{cost} step
```
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

RESULTS = Path(__file__).parents[2] / "benchmarks" / "cost" / "results"


class Cost(SphinxDirective):
    required_arguments = 1

    def run(self) -> list[nodes.Node]:
        path = RESULTS / f"{self.arguments[0]}.json"
        self.env.note_dependency(str(path))
        return self.parse_text_to_nodes(table(json.loads(path.read_text(encoding="utf-8"))))


def table(figures: dict[str, dict[str, float]]) -> str:
    """Ratios to the first row."""
    lines = ["| | CPU time | 95 % interval | memory |", "|---|---:|---:|---:|"]
    for i, (name, f) in enumerate(figures.items()):
        interval = f"{f['low']:.2f} to {f['high']:.2f}" if i and "low" in f else ""
        memory = f"{f['memory']:.3f}" if "memory" in f else ""
        lines.append(f"| {name} | {f['cpu']:.2f} | {interval} | {memory} |")
    return "\n".join(lines)


def setup(app: Sphinx) -> dict[str, Any]:
    app.add_directive("cost", Cost)
    return {"parallel_read_safe": True}
