"""Reading metrics and drawing them."""

from __future__ import annotations

import builtins
import json
import math
import sys
from pathlib import Path
from typing import Any

import pytest

from gapt_optim import JSONLines, StepMetrics
from gapt_optim.viewing import (
    RunHistory,
    compression_spans,
    draw_alignment,
    draw_entropy_map,
    draw_training,
    read_metrics,
    read_run,
    sign_changes,
)


def history(steps: int = 60, phases: bool = True, layers: int = 3, held_out: bool = True) -> RunHistory:
    """A made-up run: compression from step 21 to 40."""
    records = []
    for step in range(1, steps + 1):
        compressing = phases and 20 < step <= 40
        entropy = 0.4 if compressing else 1.2
        records.append(
            {
                "step": step,
                "phase": "compression" if compressing else "memorization",
                "reason": {20: "plateau", 40: "spike"}.get(step) if phases else None,
                "loss": 8.0 / math.sqrt(step),
                "entropy": entropy,
                "layer_entropy": {f"h.{i}": entropy * (i + 1) / layers for i in range(layers)},
                "alignment": {"cosine": math.sin(step)},
                "parameter_alignment": {"cosine": math.cos(step)} if step % 10 == 0 else None,
                "validation_loss": 8.0 if step % 20 == 1 else None,
            }
        )
    kept = ("step", "loss", "entropy", "layer_entropy")
    return RunHistory(records, [{key: r[key] for key in kept} for r in records[19::20]] if held_out else [])


def write(path: Path, records: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


def image_size(path: Path) -> tuple[int, int]:
    content = path.read_bytes()
    assert content.startswith(b"\x89PNG")
    return int.from_bytes(content[16:20], "big"), int.from_bytes(content[20:24], "big")


def test_reads_what_the_observer_writes(tmp_path: Path) -> None:
    with JSONLines(tmp_path / "metrics.jsonl") as observer:
        for step in (1, 2):
            observer(StepMetrics(step, "memorization", "memorization", None, 2.0, math.nan, {"h.0": 0.5}))
    records = read_metrics(tmp_path / "metrics.jsonl")
    assert [record["step"] for record in records] == [1, 2]
    assert records[0]["entropy"] is None
    assert records[0]["layer_entropy"] == {"h.0": 0.5}


def test_cut_line_is_left_out_wherever_it_is(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2, "lo\n{"step": 2, "loss": 3}\n{"st')
    assert read_metrics(path) == [{"step": 1}, {"step": 2, "loss": 3}]
    path.write_bytes(b'{"step": 1}\n{"step": 2, "name": "\xc3')
    assert read_metrics(path) == [{"step": 1}]
    path.write_text('{"st')
    assert read_metrics(path) == []
    path.write_text("")
    assert read_metrics(path) == []


def test_a_step_that_comes_again_takes_the_place_of_all_from_there_on(tmp_path: Path) -> None:
    write(tmp_path / "m.jsonl", [{"step": 1}, {"step": 2, "a": 0}, {"step": 3}, {"step": 2, "a": 1}])
    assert read_metrics(tmp_path / "m.jsonl") == [{"step": 1}, {"step": 2, "a": 1}]


def test_other_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "notes.txt"
    path.write_text("these are\nnot metrics\n")
    with pytest.raises(ValueError, match=r"notes\.txt holds no metrics"):
        read_metrics(path)
    with pytest.raises(FileNotFoundError):
        read_metrics(tmp_path / "nothing")


def test_read_run_takes_validations_from_either_file(tmp_path: Path) -> None:
    run = history()
    write(tmp_path / "metrics.jsonl", run.steps)
    assert read_run(tmp_path).validations == [{"step": step, "loss": 8.0} for step in (0, 20, 40)]
    write(tmp_path / "validation.jsonl", run.validations)
    assert read_run(tmp_path) == run


def test_compression_spans() -> None:
    assert compression_spans(history().steps) == [(21, 40)]
    assert compression_spans(history(phases=False).steps) == []
    assert compression_spans([{"step": s, "phase": "compression"} for s in (1, 2, 5)]) == [(1, 2), (5, 5)]


@pytest.mark.parametrize("names", [["gapt"], ["plain", "penalty", "gapt"], ["a", "b", "c", "d", "e", "f"]])
@pytest.mark.parametrize("draw", [draw_training, draw_entropy_map, draw_alignment])
def test_draws_one_run_or_several(tmp_path: Path, draw: Any, names: list[str]) -> None:
    target = draw({name: history(phases=name != "plain") for name in names}, tmp_path / "sub" / "a.png")
    width, height = image_size(target)
    assert width > height > 300


def test_draws_runs_that_lack_something(tmp_path: Path) -> None:
    full = history()
    bare = [{"step": r["step"], "phase": "memorization", "loss": r["loss"], "entropy": None} for r in full.steps]
    for steps in (bare, full.steps[:1], []):
        draw_training({"plain": RunHistory(steps), "gapt": full}, tmp_path / "a.png", main="gapt")
    draw_training({"gapt": RunHistory(full.steps[:1])}, tmp_path / "b.png")
    draw_training({"gapt": RunHistory([])}, tmp_path / "c.png")
    # Without entropies of the training steps, those of the validations are drawn.
    draw_entropy_map({"plain": RunHistory(bare, full.validations), "gapt": full}, tmp_path / "d.png")
    draw_entropy_map({"gapt": RunHistory(full.steps[:1])}, tmp_path / "e.png")
    gap = [{**r, "layer_entropy": {**r["layer_entropy"], "h.1": None}} for r in full.steps]
    draw_entropy_map({"gapt": RunHistory(gap)}, tmp_path / "f.png")
    draw_alignment({"gapt": RunHistory(full.steps, []), "plain": RunHistory(bare)}, tmp_path / "g.png")
    assert len(list(tmp_path.glob("*.png"))) == 7


def test_nothing_to_draw_is_an_error_that_says_why(tmp_path: Path) -> None:
    bare = RunHistory([{"step": 1, "phase": "memorization", "loss": 1.0}])
    with pytest.raises(ValueError, match="runs is empty"):
        draw_training({}, tmp_path / "a.png")
    with pytest.raises(ValueError, match="main='b' is none of the runs"):
        draw_training({"a": bare}, tmp_path / "a.png", main="b")
    with pytest.raises(ValueError, match="no run holds layer entropies"):
        draw_entropy_map({"a": bare}, tmp_path / "a.png")
    with pytest.raises(ValueError, match="no run holds alignment"):
        draw_alignment({"a": bare}, tmp_path / "a.png")
    assert list(tmp_path.iterdir()) == []


def test_missing_matplotlib_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = builtins.__import__

    def without(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.split(".")[0] == "matplotlib":
            raise ImportError(name)
        return original(name, *args, **kwargs)

    for name in [name for name in sys.modules if name.split(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ImportError, match="pip install matplotlib"):
        draw_training({"gapt": history()}, tmp_path / "a.png")


def test_sign_changes_are_where_the_cosine_crosses_zero() -> None:
    cosines = [0.1, -0.2, None, -0.1, 0.3, 0.2, -0.1]
    steps: list[dict[str, Any]] = [{"step": i, "alignment": {"cosine": c}} for i, c in enumerate(cosines, 1)]
    assert sign_changes(steps) == [2, 5, 7]
