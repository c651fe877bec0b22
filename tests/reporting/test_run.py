"""Runs read back: whole, cut off, empty, resumed, with measures on some steps only, and very long."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gapt_optim import JSONLines, StepMetrics
from gapt_optim.reporting import Run, compression_spans, diagnose, find_runs, read_run
from gapt_optim.reporting import records as module
from gapt_optim.reporting.records import MEASURES
from gapt_optim.reporting.report import report_page
from gapt_optim.reporting.run import is_pressed, last_value, pressed_entropy, smoothed, switches

from .runs import records, write_lines, write_run


def test_a_whole_run_has_no_notes(tmp_path: Path) -> None:
    run = read_run(write_run(tmp_path / "run", {"lr": 1e-3}))
    assert (len(run.steps), len(run.held_out), run.settings) == (200, 10, {"lr": 1e-3})
    assert run.notes == ()
    made = records(200)
    assert run.steps.loss.tolist() == [record["loss"] for record in made]
    assert run.steps.norm_ratio[7] == made[6]["measures"]["norm_ratio"]
    assert run.steps.alignment[7] == made[6]["alignment"]["cosine"]
    assert run.layers["entropy"].loc[7].to_dict() == made[6]["layer_entropy"]
    assert {*run.layers} == {"entropy", *MEASURES, "cosine"}
    assert all(frame.shape == (200, 3) for frame in run.layers.values())


def test_reads_what_the_observer_writes(tmp_path: Path) -> None:
    with JSONLines(tmp_path / "metrics.jsonl") as observer:
        for step in (1, 2):
            observer(StepMetrics(step, "memorization", "memorization", None, 2.0, math.nan, {"h.0": 0.5}))
    run = read_run(tmp_path)
    assert run.steps.index.tolist() == [1, 2]
    assert run.steps.entropy.isna().all()
    assert run.layers["entropy"]["h.0"].tolist() == [0.5, 0.5]


def test_measures_of_some_steps_only(tmp_path: Path) -> None:
    rows = records(100)
    for record in rows:
        if record["step"] % 10:
            del record["measures"], record["layer_measures"]
            record["alignment"] = None
    write_lines(tmp_path / "metrics.jsonl", rows)
    run = read_run(tmp_path)
    assert run.steps.norm_ratio.dropna().index.tolist() == [*range(10, 101, 10)]
    assert run.layers["norm_ratio"].shape == run.layers["cosine"].shape == (10, 3)
    assert run.layers["entropy"].shape == (100, 3)
    assert len(smoothed(run.steps.alignment)) == 10


def test_a_last_line_that_is_cut_off_is_said(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "metrics.jsonl", records(5))
    path.write_text(path.read_text()[:-40])
    run = read_run(tmp_path)
    assert len(run.steps) == 4
    assert run.notes == (
        "metrics.jsonl: the last line is cut off and left out; the run is still writing, or was ended",
    )
    path.write_bytes(b'{"step": 1}\n{"step": 2, "name": "\xc3')
    assert read_run(tmp_path).steps.index.tolist() == [1]
    path.write_text('{"st')  # a run that was killed in its first step
    assert read_run(tmp_path).steps.empty


def test_an_empty_file_is_said(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").touch()
    run = read_run(tmp_path)
    assert run.steps.empty
    assert run.notes == ("metrics.jsonl: nothing was written yet",)


def test_lines_that_are_no_records_are_counted(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "metrics.jsonl", records(3))
    path.write_text("oops\n" + path.read_text() + '{"loss": 1}\n')
    assert read_run(tmp_path).notes == ("metrics.jsonl: 2 unreadable lines left out",)


def test_other_files_are_refused(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text("these are\nnot metrics\n")
    with pytest.raises(ValueError, match=r"metrics\.jsonl holds no metrics"):
        read_run(tmp_path)
    with pytest.raises(FileNotFoundError):
        read_run(tmp_path / "nothing")


def test_a_resumed_run_loses_the_branch_that_ended(tmp_path: Path) -> None:
    before, after = records(20), records(13, seed=1)[10:]
    for record in before[4::5]:
        record["validation_loss"] = 3.0
    after[-1]["validation_loss"] = 2.0
    write_lines(tmp_path / "metrics.jsonl", before + after)
    run = read_run(tmp_path)
    assert run.steps.loss.tolist() == [record["loss"] for record in before[:10] + after]
    assert run.layers["entropy"].index.tolist() == run.steps.index.tolist() == [*range(1, 14)]
    assert list(run.held_out.loss.items()) == [(4, 3.0), (9, 3.0), (12, 2.0)]
    note = "the run was resumed at step {}; what was written before from there on, {}, is left out"
    assert run.notes == ("metrics.jsonl: " + note.format(11, "10 records"),)
    write_lines(tmp_path / "validation.jsonl", [{"step": step, "loss": 3.0} for step in (5, 10, 15, 20, 15)])
    run = read_run(tmp_path)
    assert run.held_out.index.tolist() == [5, 10, 15]
    assert run.notes[1] == "validation.jsonl: " + note.format(15, "2 records")


def test_a_run_that_was_resumed_several_times(tmp_path: Path) -> None:
    rows = records(20)
    write_lines(tmp_path / "metrics.jsonl", [*rows[:10], *rows[5:8], *rows[7:20], *rows[19:]])
    run = read_run(tmp_path)
    assert run.steps.loss.tolist() == [record["loss"] for record in rows]
    assert "resumed 3 times, last at step 20" in run.notes[0]


def test_files_beside_the_metrics_that_are_broken_are_said(tmp_path: Path) -> None:
    write_run(tmp_path)
    (tmp_path / "settings.json").write_text("{")
    assert read_run(tmp_path).notes == ("settings.json could not be read",)
    (tmp_path / "settings.json").unlink()
    (tmp_path / "validation.jsonl").write_text("")
    assert read_run(tmp_path).held_out.empty
    (tmp_path / "validation.jsonl").write_text("no\nmetrics\n")
    with pytest.raises(ValueError, match=r"validation\.jsonl holds no metrics"):
        read_run(tmp_path)


def test_runs_are_found_in_folders_and_by_name(tmp_path: Path) -> None:
    for seed in (0, 1):
        for name in ("plain", "gapt", "other"):
            write_run(tmp_path / f"seed{seed}" / name, steps=20)
    one, two = tmp_path / "seed0", tmp_path / "seed1"
    found = find_runs([str(one), str(two), f"mine={one / 'gapt'}", f"both={two}"])
    assert [(name, len(seeds)) for name, seeds in found.items()] == [
        ("plain", 2), ("gapt", 2), ("other", 2), ("mine", 1), ("both/plain", 1), ("both/gapt", 1), ("both/other", 1),
    ]  # fmt: skip


json_values = st.recursive(
    st.none() | st.booleans() | st.floats() | st.integers() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.sampled_from(["cosine", "layers", "h.0"]), inner),
    max_leaves=6,
)
NUMBERS = ["loss", "entropy", "validation_loss", "entropy_share"]
TABLES = ["layer_entropy", "layer_measures", "measures", "alignment", "parameter_alignment"]
fields = st.sampled_from([*NUMBERS, *TABLES, "phase", "next_phase", "reason"])


@given(st.lists(st.dictionaries(fields, json_values, max_size=5), max_size=4))
def test_values_of_any_kind_do_no_harm(rows: list[dict[str, Any]]) -> None:
    run = Run.of([{**row, "step": i} for i, row in enumerate(rows, 1)])
    assert len(run.steps) == len(rows)
    diagnose(run)
    for _, content, charts in report_page({"odd": run}).sections:
        assert isinstance(content, str)
        assert all(chart.traces for chart in charts)


def test_long_runs_keep_what_is_per_layer_for_some_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_MOST_LAYER_ROWS", 100)
    run = Run.of(records(2000))
    assert all(100 <= len(frame) <= 200 for frame in run.layers.values())
    assert run.layers["entropy"].index.to_series().diff().dropna().nunique() == 1  # evenly spaced
    assert run.steps.norm_ratio.count() == run.steps.loss.count() == 2000


def test_without_entropies_of_training_those_of_validation_are_taken() -> None:
    bare = [{"step": step, "loss": 1.0} for step in (1, 2, 3)]
    assert Run.of(bare, [{"step": 2, "layer_entropy": {"a": 1.0}}]).layers["entropy"].loc[2, "a"] == 1.0


def test_compression_spans_and_switches() -> None:
    run = Run.of(records(200, period=50))
    assert compression_spans(run.steps) == [(26, 50), (76, 100), (126, 150), (176, 200)]
    assert compression_spans(Run.of(records(20, plain=True)).steps) == compression_spans(Run.of([]).steps) == []
    assert list(switches(run.steps).reason[:2].items()) == [(25, "plateau"), (50, "compressed")]


def test_the_last_value_is_held_out_where_there_is_one() -> None:
    run = Run.of(records(60), [{"step": 60, "loss": 9.0}])
    assert last_value(run, "loss") == 9.0
    assert last_value(run, "entropy") == pytest.approx(float(run.steps.entropy[-1:].iloc[0]), rel=0.2)
    assert math.isnan(last_value(Run.of([]), "loss"))


def test_which_entropy_is_pressed() -> None:
    rows = records(40, layers=1)
    assert is_pressed(Run.of(rows), "linear_entropy")
    assert pressed_entropy(Run.of(rows)) == "linear kernel"
    assert not is_pressed(Run.of(rows), "centered_cosine_entropy")
    for record in rows:
        record["measures"] = {**record["measures"], "centered_cosine_entropy": record["entropy"], "linear_entropy": 1.0}
    assert pressed_entropy(Run.of(rows)) == "cosine kernel, centred"
    assert not is_pressed(Run.of(records(40, measures=False)), "linear_entropy")
    entropy: dict[str, Any] = {"kernel": "linear", "center": False, "alpha": 1.0, "window": 16}
    run = Run.of(rows, settings={"gapt": {"entropy": entropy}})
    assert pressed_entropy(run) == "linear kernel, order 1.0, windows of 16"
    run = Run.of(rows, settings={"gapt": {"entropy": entropy | {"alpha": 2.0, "window": None}}})
    assert pressed_entropy(run) == "linear kernel, whole sequences"
