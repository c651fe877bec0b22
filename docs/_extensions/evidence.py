"""The tables and pictures that `python -m benchmarks.evidence` has made of one experiment's committed results.

```{evidence} kernels
```
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

GENERATED = Path(__file__).parents[1] / "generated"
FIRST_LOOK = "-first-look"


class Evidence(SphinxDirective):
    required_arguments = 1

    def run(self) -> list[nodes.Node]:
        experiment = self.arguments[0]
        self.env.note_dependency(str(GENERATED))
        parts: list[str] = []
        for table in chosen(experiment):
            self.env.note_dependency(str(table))
            if FIRST_LOOK in table.stem:
                parts.append("*A first look: one seed, a smaller setting. It shows the order of magnitude, no more.*")
            parts.append(re.sub(r"<!--.*?-->", "", table.read_text(encoding="utf-8"), flags=re.DOTALL).strip())
        parts += [
            f"![{picture.stem.replace('-', ' ')}](/generated/{picture.name})"
            for picture in sorted(GENERATED.glob("*.png"))
            if re.fullmatch(rf"{re.escape(experiment)}(-.*)?", picture.stem)
        ]
        if not parts:
            parts = ["No results of this experiment are committed yet."]
        first_look = " --first-look" if any(FIRST_LOOK in table.stem for table in chosen(experiment)) else ""
        command = f"python -m benchmarks.evidence run {experiment}{first_look}"
        parts.append(f"Run it again: `{command}` (`--estimate` says how long it takes).")
        return self.parse_text_to_nodes("\n\n".join(parts))


def chosen(experiment: str) -> list[Path]:
    """The tables of the whole experiment; those of its first look where it was not run yet."""
    pattern = re.compile(rf"evidence-{re.escape(experiment)}(-.*)?")
    tables = [path for path in sorted(GENERATED.glob("evidence-*.md")) if pattern.fullmatch(path.stem)]
    whole = [path for path in tables if not path.stem.endswith(FIRST_LOOK)]
    return whole or tables


def setup(app: Sphinx) -> dict[str, Any]:
    app.add_directive("evidence", Evidence)
    return {"parallel_read_safe": True}
