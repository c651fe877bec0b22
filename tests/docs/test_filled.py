"""What pages show of the code and the results is what code and results say now."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from benchmarks.evidence.experiments import NAMES
from gapt_optim import GAPTConfig

from .pages import ROOT

sys.path.insert(0, str(ROOT / "docs"))
import fill


@pytest.mark.parametrize("page", fill.pages(), ids=lambda page: str(page.relative_to(ROOT)))
def test_page_is_filled(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert fill.filled(text) == text, "run python docs/fill.py"


def test_every_setting_is_on_its_page() -> None:
    page = (ROOT / "docs" / "configuration.md").read_text(encoding="utf-8")
    for section, values in GAPTConfig().model_dump().items():
        assert f"<!-- filled: settings {type(getattr(GAPTConfig(), section)).__name__} -->" in page
        assert all(f"- **`{name}`** = " in page for name in values)


def test_every_experiment_has_a_page() -> None:
    index = (ROOT / "docs" / "evidence" / "index.md").read_text(encoding="utf-8")
    for name in NAMES:
        page = ROOT / "docs" / "evidence" / f"{name}.md"
        assert f"<!-- filled: evidence {name} -->" in page.read_text(encoding="utf-8")
        assert f"]({name}.md) |" in index


def test_a_page_that_is_behind_is_named_and_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    page = tmp_path / "page.md"
    page.write_text("# Page\n\n<!-- filled: settings GateConfig -->\nold\n<!-- end -->\n\nAfter.\n", encoding="utf-8")
    monkeypatch.setattr(fill, "DOCS", tmp_path)
    assert fill.main(["--check"]) == 1
    assert capsys.readouterr().out == "page.md: differs; run python docs/fill.py\n"
    assert fill.main([]) == 0
    assert fill.main(["--check"]) == 0
    text = page.read_text(encoding="utf-8")
    assert "patience_memorization" in text
    assert "old" not in text
    assert text.endswith("After.\n")


def test_an_unknown_block_is_refused() -> None:
    with pytest.raises(ValueError, match="no block is called 'setings'"):
        fill.filled("<!-- filled: setings GateConfig -->\n<!-- end -->")
