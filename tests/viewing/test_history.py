"""Runs read back: whole, cut off, empty, of several versions, and while they are written."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gapt_optim.viewing import diagnose, read_metrics, read_run
from gapt_optim.viewing import history as module
from gapt_optim.viewing.history import changes_of_sign, layer_rows, values_of

from .runs import records, write_lines, write_run


def test_a_whole_run_has_no_notes(tmp_path: Path) -> None:
    run = read_run(write_run(tmp_path / "run", {"lr": 1e-3}))
    assert (len(run.steps), len(run.validations), run.settings, run.version) == (200, 10, {"lr": 1e-3}, "1.2.3")
    assert run.notes == ()


def test_a_last_line_that_is_cut_off_is_said(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "metrics.jsonl", records(5))
    path.write_text(path.read_text()[:-40])
    run = read_run(tmp_path)
    assert len(run.steps) == 4
    assert run.notes == (
        "metrics.jsonl: the last line is cut off and left out; the run is still writing, or was ended",
    )


def test_an_empty_file_is_said(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").touch()
    run = read_run(tmp_path)
    assert run.steps == []
    assert run.notes == ("metrics.jsonl is empty: no step was written yet",)


def test_lines_that_are_no_records_are_counted(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "metrics.jsonl", records(3))
    path.write_text("oops\n" + path.read_text() + '{"loss": 1}\n')
    assert read_run(tmp_path).notes == ("metrics.jsonl: 2 lines could not be read and are left out",)


def test_a_resumed_run_loses_the_branch_that_ended(tmp_path: Path) -> None:
    before, after = records(20), records(13, seed=1)[10:]
    for record in before[4::5]:
        record["validation_loss"] = 3.0
    after[-1]["validation_loss"] = 2.0
    write_lines(tmp_path / "metrics.jsonl", before + after)
    note = "the run was resumed at step {}; {} that were written before, from there on, are left out"
    run = read_run(tmp_path)
    assert run.steps == before[:10] + after
    assert [(record["step"], record["loss"]) for record in run.validations] == [(4, 3.0), (9, 3.0), (12, 2.0)]
    assert run.notes == ("metrics.jsonl: " + note.format(11, "10 records"),)
    assert "All 20 steps" not in " ".join(found.what for found in diagnose(run))
    write_lines(tmp_path / "validation.jsonl", [{"step": step, "loss": 3.0} for step in (5, 10, 15, 20, 15)])
    run = read_run(tmp_path)
    assert [record["step"] for record in run.validations] == [5, 10, 15]
    assert run.notes[1] == "validation.jsonl: " + note.format(15, "2 records")


def test_a_run_that_was_resumed_several_times(tmp_path: Path) -> None:
    rows = records(20)
    path = write_lines(tmp_path / "metrics.jsonl", [*rows[:10], *rows[5:8], *rows[7:20], *rows[19:]])
    assert read_metrics(path) == rows
    assert read_run(tmp_path).notes == (
        "metrics.jsonl: the run was resumed 3 times, last at step 20; 7 records that were written before, from there "
        "on, are left out",
    )


def test_steps_twice_missing_and_without_phase_are_said(tmp_path: Path) -> None:
    rows = records(4)
    del rows[1]["phase"]
    write_lines(tmp_path / "metrics.jsonl", [rows[0], rows[1], rows[1], rows[3]])
    assert read_run(tmp_path).notes == (
        "metrics.jsonl: the run was resumed at step 2; 1 record that was written before, from there on, is left out",
        "metrics.jsonl: 1 step is missing between the first and the last",
        "metrics.jsonl: 1 record without a phase is shown as memorization",
    )


def test_mixed_versions_are_said(tmp_path: Path) -> None:
    write_lines(tmp_path / "metrics.jsonl", [*records(10, measures=False), *records(20)[10:]])
    (note,) = read_run(tmp_path).notes
    assert "10 of 20 steps do not hold the other kernel's entropies" in note


def test_settings_that_are_broken_are_said(tmp_path: Path) -> None:
    write_run(tmp_path)
    (tmp_path / "settings.json").write_text("{")
    (tmp_path / "run.json").write_text("[]")
    run = read_run(tmp_path)
    assert run.notes == ("settings.json could not be read", "run.json could not be read")
    assert (run.settings, run.version) == ({}, None)


def test_validations_that_are_broken_are_said(tmp_path: Path) -> None:
    write_run(tmp_path)
    (tmp_path / "validation.jsonl").write_text("no\nmetrics\n")
    run = read_run(tmp_path)
    assert run.validations == []
    assert "holds no metrics" in run.notes[-1]


json_values = st.recursive(
    st.none() | st.booleans() | st.floats() | st.integers() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.sampled_from(["cosine", "layers", "h.0"]), inner),
    max_leaves=6,
)
NUMBERS = ["loss", "entropy", "validation_loss", "entropy_share"]
TABLES = ["layer_entropy", "layer_measures", "measures", "alignment", "parameter_alignment"]
fields = st.sampled_from([*NUMBERS, *TABLES, "phase", "next_phase", "reason"])


@given(st.lists(st.dictionaries(fields, json_values, max_size=5), max_size=4))
def test_values_of_any_kind_do_no_harm(tmp_path_factory: pytest.TempPathFactory, rows: list[dict[str, Any]]) -> None:
    from gapt_optim.viewing.report import report_page

    folder = tmp_path_factory.mktemp("odd")
    lines = [json.dumps({**row, "step": i}) for i, row in enumerate(rows, 1)]
    (folder / "metrics.jsonl").write_text("\n".join(lines))
    run = read_run(folder)
    assert len(run.steps) == len(rows)
    diagnose(run)
    page = report_page({"odd": run})
    assert page.sections
    if rows:
        for _, _, content, charts in page.sections:
            assert isinstance(content, str)
            json.dumps([chart.data for chart in charts], allow_nan=False)


def test_large_files_keep_what_is_per_layer_for_some_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_lines(tmp_path / "metrics.jsonl", records(2000))
    monkeypatch.setattr(module, "MANY_BYTES", 1000)
    monkeypatch.setattr(module, "_MOST_LAYER_ROWS", 100)
    run = read_run(tmp_path)
    rows = layer_rows(run)
    assert 50 <= len(rows) <= 150
    assert len(values_of(run.steps, "measures.norm_ratio")) == len(values_of(run.steps, "loss")) == 2000
    assert len(layer_rows(run, "cosine")) == len(rows)
    assert "what is shown per layer is of every" in run.notes[-1]


def test_layer_rows_of_every_measure(tmp_path: Path) -> None:
    run = read_run(write_run(tmp_path))
    for measure in ("entropy", "linear_entropy", "centered_cosine_entropy", "norm_ratio", "mean_share", "cosine"):
        rows = layer_rows(run, measure)
        assert len(rows) == 200
        assert list(rows[0][1]) == ["h.0", "h.1", "h.2"]


def test_metrics_are_plain_records(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "m.jsonl", records(3))
    assert read_metrics(path) == records(3)


def test_a_method_of_a_comparison_has_its_settings(tmp_path: Path) -> None:
    write_run(tmp_path / "plain", plain=True, steps=400)
    (tmp_path / "plain" / "settings.json").unlink()
    (tmp_path / "settings.json").write_text(json.dumps({"methods": ["plain", "gapt"], "lr": 1}))
    run = read_run(tmp_path / "plain")
    assert run.settings == {"methods": ["plain", "gapt"], "lr": 1, "method": "plain"}
    assert diagnose(run) == []  # plain training is not blamed for having no phases
    (tmp_path / "settings.json").write_text(json.dumps({"methods": ["gapt"]}))
    assert read_run(tmp_path / "plain").settings == {}


def test_sign_changes() -> None:
    assert changes_of_sign([(1, 0.5), (2, -0.1), (3, -0.2), (5, 0.1)]) == [2, 5]
