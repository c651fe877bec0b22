"""The README: its examples run, its table is the configuration, its files exist."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from gapt_optim import GAPTConfig

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = [block for block in re.findall(r"```python\n(.*?)```", README, re.DOTALL) if block.startswith("import torch")]


@pytest.mark.parametrize("block", BLOCKS)
def test_self_contained_examples_run(block: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    exec(compile(block, "README.md", "exec"), {"__name__": "readme"})


def test_there_are_examples_to_run() -> None:
    assert len(BLOCKS) == 2


def test_table_names_every_setting_with_its_default() -> None:
    rows = dict(re.findall(r"^\| (`.*?) \| (.*?) \|", README, re.MULTILINE))
    named = {name: default for cell, value in rows.items() for name, default in _pairs(cell, value)}
    expected = {
        f"{section}.{name}": str(value)
        for section, values in GAPTConfig().model_dump().items()
        for name, value in values.items()
    }
    assert named == expected


def _pairs(cell: str, value: str) -> list[tuple[str, str]]:
    return list(zip(re.findall(r"`([a-z_.]+)`", cell), value.replace("`", "").split(", "), strict=True))


def test_links_and_pictures_exist() -> None:
    targets = [target for target in re.findall(r"\]\(([^)]+)\)", README) if "://" not in target]
    assert targets
    assert all((ROOT / target).exists() for target in targets)


def test_ci_runs_the_test_command_of_the_readme() -> None:
    lines = [line for line in README.splitlines() if line.endswith("pytest")]
    assert len(lines) == 1
    assert "grep -m 1 'pytest$' README.md" in (ROOT / ".ci" / "run").read_text(encoding="utf-8")
