"""The README: short, and its two commands are the ones that are run. Its code and its links are tried in tests/docs."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_fits_on_a_few_screens() -> None:
    assert len(README.splitlines()) <= 120


def test_costs_are_those_that_were_measured() -> None:
    figures = json.loads((ROOT / "benchmarks" / "cost" / "results" / "step.json").read_text(encoding="utf-8"))
    rows = {
        "memorization": "memorization",
        "compression": "compression",
        "two backward passes, the plain way": "by hand: two retained backward passes",
    }
    for row, measured in rows.items():
        assert f"| {row} | {figures[measured]['cpu']:.2f} | {figures[measured]['memory']:.2f} |" in README


@pytest.mark.parametrize(
    "command",
    [
        'python3 -m venv .venv && .venv/bin/pip install -q torch==2.13.0 -e ".[examples]"'
        " && .venv/bin/python examples/gpt2_fineweb.py",
        'python3 -m venv .venv && .venv/bin/pip install -q -e ".[dev]" && .venv/bin/python -m pytest',
    ],
)
def test_has_the_two_commands(command: str) -> None:
    assert README.splitlines().count(command) == 1


def test_ci_runs_the_test_command_of_the_readme() -> None:
    lines = [line for line in README.splitlines() if line.endswith("pytest")]
    assert len(lines) == 1
    assert "grep -m 1 'pytest$' README.md" in (ROOT / ".ci" / "run").read_text(encoding="utf-8")


def test_first_command_installs_the_torch_that_development_pins() -> None:
    pinned = re.findall(r'^  "torch==([\d.]+)",$', (ROOT / "pyproject.toml").read_text(encoding="utf-8"), re.MULTILINE)
    assert pinned == re.findall(r"torch==([\d.]+) ", README)
