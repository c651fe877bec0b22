"""Tables for a page and for a terminal of any width."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pandas import DataFrame

from gapt_optim._display.tables import common_prefix, html_table, number, print_table

from .reporting.runs import HOSTILE

COLUMNS = [*(f"{kind} S" for kind in ("cosine, centred", "cosine", "linear, centred", "linear")), "rank", "norm ratio",
           "mean share", "first token", "curvature", "RankMe", "tail"]  # fmt: skip
TABLE = DataFrame(
    [[-0.0906 - layer + 111.11 * i for i in range(len(COLUMNS))] for layer in range(3)],
    index=[f"transformer.h.{layer}" for layer in range(3)],
    columns=COLUMNS,
)


@pytest.mark.parametrize("columns", [40, 80, 120])
def test_no_number_is_ever_broken(
    columns: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    print_table(TABLE, "three layers")
    lines = capsys.readouterr().out.splitlines()
    assert all(len(line) <= columns for line in lines)
    assert lines[0].rstrip() == "three layers"
    assert any(line.startswith("transformer.h.*") for line in lines)
    for layer, values in enumerate(TABLE.to_numpy()):
        (row,) = [line.split() for line in lines if line.startswith(f"{layer} ")]
        assert 2 <= len(row) <= len(COLUMNS) + 1
        assert row[1:] == [number(value) for value in values][: len(row) - 1]
    left_out = " ".join(lines).partition("Not shown for want of room: ")[2]
    assert left_out == "" or "tail" in left_out
    assert bool(left_out) == (columns < 120)

    print_table(TABLE, "three layers", wide=True)
    wide = capsys.readouterr().out
    assert "Not shown" not in wide
    assert number(TABLE.iloc[0, -1]) in wide


def test_a_file_takes_any_width(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.delenv("COLUMNS", raising=False)
    print_table(TABLE, "three layers")
    assert "tail" in capsys.readouterr().out


@given(st.lists(st.lists(st.sampled_from(["h", "block", "0", "1"]), min_size=1, max_size=4).map(".".join), max_size=5))
def test_a_common_prefix_is_whole_and_leaves_names(names: list[str]) -> None:
    prefix = common_prefix(names)
    assert all(name.startswith(prefix) and name != prefix for name in names)
    assert prefix == "" or prefix.endswith(".")


def test_cells_of_a_page_are_escaped() -> None:
    shown = html_table(DataFrame({HOSTILE: [HOSTILE, 1.0, None]}, index=[HOSTILE, "a", "b"]), HOSTILE)
    assert "<script>" not in shown
    assert "<img" not in shown
    assert shown.count("&lt;script&gt;") == 5  # caption, its name for a reader, column, row and cell
