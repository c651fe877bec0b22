"""The folder that a script writes to, and the table and sentences at its end."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import comparison
import pytest

from gapt_optim import GAPTConfig

CONFIGS = {"plain": GAPTConfig.plain(), "gapt": GAPTConfig()}


def begun(out: Path) -> Path:
    """A folder with all that a run of ours writes."""
    comparison.check_folder(out)
    comparison.begin_folder(out, {"methods": list(CONFIGS), "lr": 0.1}, CONFIGS, ["tokens/train.bin"])
    for name in comparison.read_settings(out)["files"]:
        path = out / name
        path.parent.mkdir(exist_ok=True)
        if path.name != "settings.json":
            path.write_text("ours")
    return out


def files(out: Path) -> set[str]:
    return {path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_file()}


def refusal(out: Path, **flags: bool) -> str:
    with pytest.raises(SystemExit) as ended:
        comparison.check_folder(out, **flags)
    return str(ended.value)


def test_new_and_empty_folders_are_taken(tmp_path: Path) -> None:
    comparison.check_folder(tmp_path / "new")
    comparison.check_folder(tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("flags", [{}, {"resume": True}, {"overwrite": True}])
@pytest.mark.parametrize("name", ["thesis.tex", "gapt/metrics.jsonl", "settings.json"])
def test_a_folder_with_files_of_somebody_else_is_refused_and_left_alone(
    tmp_path: Path, name: str, flags: dict[str, bool]
) -> None:
    mine = tmp_path / name
    mine.parent.mkdir(exist_ok=True)
    mine.write_text('{"files": ["settings.json"]}')
    assert f"holds what no run of ours wrote ({name})" in refusal(tmp_path, **flags)
    assert files(tmp_path) == {name}
    assert mine.read_text() == '{"files": ["settings.json"]}'


@pytest.mark.parametrize("name", ["thesis.tex", "gapt/thesis.tex"])
def test_what_somebody_adds_to_a_run_is_not_deleted(tmp_path: Path, name: str) -> None:
    out = begun(tmp_path / "out")
    (out / name).write_text("mine")
    assert f"({name})" in refusal(out, overwrite=True)
    assert (out / name).read_text() == "mine"


def test_overwriting_deletes_what_the_run_lists_and_nothing_else(tmp_path: Path) -> None:
    out, outside = begun(tmp_path / "out"), tmp_path / "outside.txt"
    outside.write_text("mine")
    settings = json.loads((out / "settings.json").read_text())
    settings["files"] += ["../outside.txt", str(outside)]
    (out / "settings.json").write_text(json.dumps(settings))
    comparison.check_folder(out, overwrite=True)
    comparison.begin_folder(out, {"methods": ["gapt"]}, {"gapt": GAPTConfig()})
    assert outside.read_text() == "mine"
    assert files(out) == {"settings.json", "gapt/settings.json"}


def test_a_run_is_kept_unless_told_otherwise(tmp_path: Path) -> None:
    out = begun(tmp_path / "out")
    assert "holds a run; give --resume, --overwrite or another folder" in refusal(out)
    assert "give one of them" in refusal(out, resume=True, overwrite=True)
    assert "holds no run to resume" in refusal(tmp_path / "new", resume=True)
    assert "is a file" in refusal(out / "results.json")
    before = files(out)
    comparison.check_folder(out, resume=True)
    comparison.begin_folder(out, {"methods": list(CONFIGS)}, CONFIGS, ["tokens/train.bin"], keep=True)
    assert files(out) == before


def test_the_settings_are_those_that_the_tools_read(tmp_path: Path) -> None:
    """The command looks for the methods of a folder, and the doctor for the gate of a method."""
    out = begun(tmp_path / "out")
    assert json.loads((out / "settings.json").read_text())["methods"] == ["plain", "gapt"]
    of_plain = json.loads((out / "plain" / "settings.json").read_text())
    assert of_plain["method"] == "plain"
    assert GAPTConfig(**of_plain["gapt"]) == CONFIGS["plain"]


def result(**changes: Any) -> dict[str, Any]:
    numbers = {
        "loss": 2.0, "entropy": 1.3, "linear_entropy": 1.1, "centered_cosine_entropy": 1.3, "norm_ratio": 2.0,
        "mean_share": 0.3, "compression_share": 0.5, "switches": 3,
    }  # fmt: skip
    return {**numbers, **changes}


def test_the_table_has_a_column_for_each_method() -> None:
    results = {"plain": result(compression_share=0.0, switches=0), "gapt": result(loss=2.1)}
    lines = comparison.table(results, comparison.ROWS).splitlines()
    assert lines[0].split() == ["plain", "gapt"]
    assert lines[1].split() == ["held-out", "loss", "2.000", "2.100", "(+5.0%)"]
    assert lines[-2].split()[-2:] == ["0%", "50%"]
    assert lines[-1].split()[-2:] == ["0", "3"]
    assert len({len(line) for line in lines}) == 1


@pytest.mark.parametrize(
    ("gapt", "said"),
    [
        (result(compression_share=0.0), "The gate never started compression"),
        (result(loss=2.1), "loss 5.0% above plain training's. Its layers are hardly compressed"),
        (result(loss=1.9), "loss 5.0% below plain"),
        (result(loss=2.0001), "loss within 0.05% of plain"),
        (result(centered_cosine_entropy=0.7), "Its layers are compressed: a window spreads over 2.01 directions"),
        (result(centered_cosine_entropy=0.7), "neither long tokens nor a vector"),
        (result(linear_entropy=0.2, norm_ratio=20.0), "That is no compression, though the linear entropy fell"),
        (result(linear_entropy=0.2, norm_ratio=20.0), "the longest token of a window grew"),
        (result(linear_entropy=0.2, mean_share=0.9), "one vector that all tokens share grew"),
    ],
)
def test_the_sentences_say_what_the_numbers_mean(gapt: dict[str, Any], said: str) -> None:
    assert said in comparison.meaning({"plain": result(compression_share=0.0), "gapt": gapt})


def test_one_method_alone_has_nothing_to_be_compared_with() -> None:
    assert comparison.meaning({"gapt": result()}).startswith("Train plain and gapt in one run")
