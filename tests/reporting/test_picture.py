"""The picture of a run or several."""

from __future__ import annotations

from pathlib import Path

import pytest

from gapt_optim.reporting import Run, draw_runs

from .runs import history, records


def size_of(path: Path) -> tuple[int, int]:
    content = path.read_bytes()
    assert content.startswith(b"\x89PNG")
    return int.from_bytes(content[16:20], "big"), int.from_bytes(content[20:24], "big")


@pytest.mark.parametrize("names", [["gapt"], ["plain", "penalty", "gapt"], ["a", "b", "c", "d", "e", "f"]])
def test_draws_one_run_or_several(tmp_path: Path, names: list[str]) -> None:
    target = draw_runs({name: history(plain=name == "plain") for name in names}, tmp_path / "sub" / "a.png")
    width, height = size_of(target)
    assert height > width > 1000


def test_other_formats(tmp_path: Path) -> None:
    assert draw_runs({"gapt": history()}, tmp_path / "a.pdf").read_bytes().startswith(b"%PDF")
    assert "gapt" in draw_runs({"gapt": history()}, tmp_path / "a.svg").read_text()


def test_each_panel_is_drawn_where_a_run_has_it(tmp_path: Path) -> None:
    bare = [{"step": step, "phase": "memorization", "loss": 2.0} for step in range(1, 50)]
    heights = []
    for rows in (bare, [{**row, "entropy": 1.0} for row in bare], records(50)):
        heights.append(size_of(draw_runs({"a": Run.of(rows)}, tmp_path / "a.png"))[1])
    assert heights[0] < heights[1] < heights[2]
    for steps in (records(1), []):
        draw_runs({"plain": Run.of(steps), "gapt": history()}, tmp_path / "b.png", main="plain")
    gap = [{**record, "layer_entropy": {**record["layer_entropy"], "h.1": None}} for record in records(50)]
    draw_runs({"gapt": Run.of(gap)}, tmp_path / "c.png")


def test_what_cannot_be_drawn_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="runs is empty"):
        draw_runs({}, tmp_path / "a.png")
    with pytest.raises(ValueError, match="main='b' is none of the runs"):
        draw_runs({"a": history()}, tmp_path / "a.png", main="b")
    assert list(tmp_path.iterdir()) == []
