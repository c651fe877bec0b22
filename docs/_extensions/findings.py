"""What `gapt-optim doctor` can find, in its own words: a section each.

```{findings}
```
"""

from __future__ import annotations

import re
from typing import Any

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

from gapt_optim.viewing.findings import FINDINGS, Finding


class Findings(SphinxDirective):
    def run(self) -> list[nodes.Node]:
        text = "\n\n".join(section(finding) for finding in FINDINGS.values())
        return self.parse_text_to_nodes(text, allow_section_headings=True)


def section(finding: Finding) -> str:
    """With the figures of an example."""
    change = re.sub(r"\b((?:gate|objective|entropy|layers|alignment)\.[a-z_]+)", r"`\1`", finding.change)
    shown = finding.filled(**finding.example)
    return "\n\n".join(
        [
            f"### {finding.title}",
            finding.why,
            f"**Change:** {change}",
            f"The doctor says, for example: *{shown}*",
        ]
    )


def setup(app: Sphinx) -> dict[str, Any]:
    app.add_directive("findings", Findings)
    return {"parallel_read_safe": True}
