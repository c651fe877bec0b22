"""What `gapt-optim doctor` can find, in its own words: a section each."""

from __future__ import annotations

import re

from gapt_optim.reporting.findings import FINDINGS, Finding


def findings() -> str:
    """All of them."""
    return "\n\n".join(section(finding) for finding in FINDINGS.values())


def section(finding: Finding) -> str:
    """With the figures of an example."""
    change = re.sub(r"\b((?:gate|objective|entropy|layers|alignment)\.[a-z_]+)", r"`\1`", finding.change)
    shown = finding.what.format(**finding.example)
    return "\n\n".join(
        [
            f"### {finding.title}",
            finding.why,
            f"**Change:** {change}",
            f"The doctor says, for example: *{shown}*",
        ]
    )
