"""Several seeds of the main example, at a size that takes a second a run."""

from __future__ import annotations

import json
import math
import signal
from pathlib import Path
from typing import Any

import pytest
import training
from corpus import Batches
from errors import StoppedError, UserError
from gpt2_fineweb import run
from seed_statistics import relative


def read_results(folder: Path) -> dict[str, Any]:
    results: dict[str, Any] = json.loads((folder / "results.json").read_text())
    return results


def test_seeds_are_compared_in_pairs(tiny: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    run([*tiny, "--compare", "--seeds", "3", "--workers", "1", "--out", str(out)])
    results = read_results(out)
    assert results["seeds"] == [100, 101, 102]
    assert set(results["runs"]) == {"plain", "penalty", "published", "gapt"}
    for method, entry in results["runs"].items():
        for metric in ("val_loss", "best_val_loss", "entropy", "train_loss"):
            values = entry[metric]["values"]
            assert len(values) == 3
            assert entry[metric]["mean"] == pytest.approx(sum(values) / 3)
            assert entry[metric]["ci95"][0] <= entry[metric]["mean"] <= entry[metric]["ci95"][1]
            if method != "plain":
                change = relative(values, results["runs"]["plain"][metric]["values"])
                assert results["relative"][method][metric] == change
        assert all(b <= f for b, f in zip(entry["best_val_loss"]["values"], entry["val_loss"]["values"], strict=True))
    assert results["runs"]["penalty"]["compression_share"]["mean"] == 1
    assert 0 < results["runs"]["gapt"]["compression_share"]["mean"] < 1
    assert results["configuration"]["steps"] == 12
    assert set(results["configuration"]["gapt"]) == {"penalty", "published", "gapt"}

    page = (out / "report.html").read_text()
    assert page.count("<img") == 2
    assert "95 % interval" in page
    assert (out / "curves_all.png").stat().st_size > 10_000
    assert "| best_val_loss |" in (out / "table.md").read_text()
    assert "3 seeds:" in capsys.readouterr().out
    assert not list(out.glob("runs/**/checkpoint.pt"))


def test_a_seed_of_the_sweep_is_the_run_of_that_seed(tiny: list[str], tmp_path: Path) -> None:
    run([*tiny, "--compare", "--seeds", "1", "--first-seed", "7", "--workers", "1", "--out", str(tmp_path / "sweep")])
    run([*tiny, "--method", "gapt", "--seed", "7", "--out", str(tmp_path / "alone")])
    alone = read_results(tmp_path / "alone")["runs"]["gapt"]
    swept = read_results(tmp_path / "sweep")["runs"]["gapt"]
    assert swept["val_loss"]["values"] == [alone["val_loss"]]
    assert swept["entropy"]["values"] == [alone["entropy"]]
    assert swept["val_loss"]["ci95"] is None


def test_lengths_of_text_are_settings(tiny: list[str], tmp_path: Path) -> None:
    out = tmp_path / "out"
    sizes = ["--train-tokens", "100", "400", "--methods", "plain", "gapt", "--seeds", "2", "--workers", "1"]
    run([*tiny, "--compare", *sizes, "--steps", "30", "--out", str(out)])
    results = read_results(out)
    assert results["settings"] == ["100", "400"]
    assert set(results["relative"]) == {"100", "400"}
    short, long = (results["runs"][length]["plain"]["train_loss"]["mean"] for length in ("100", "400"))
    assert short < long  # seen more often, remembered better
    assert (out / "report.html").read_text().count("<img") == 4


def test_a_sweep_does_not_replace_a_run_of_one_seed(tiny: list[str], tmp_path: Path) -> None:
    run([*tiny, "--out", str(tmp_path / "out")])
    before = read_results(tmp_path / "out")
    with pytest.raises(UserError, match=r"--out .*: holds a run of one seed; choose another folder"):
        run([*tiny, "--compare", "--seeds", "2", "--out", str(tmp_path / "out")])
    assert read_results(tmp_path / "out") == before


def test_a_run_that_diverges_at_its_end_is_refused_and_kept(
    tiny: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    token_loss = training.token_loss
    monkeypatch.setattr(training, "token_loss", lambda *batch: token_loss(*batch) * math.nan)
    flags = ["--compare", "--methods", "gapt", "--seeds", "1", "--workers", "1", "--out", str(tmp_path / "out")]
    with pytest.raises(UserError, match="the validation loss is nan; try a smaller --lr"):
        run([*tiny, *flags])
    assert list(tmp_path.glob("out/runs/**/checkpoint.pt"))


def test_sweeps_in_one_folder_share_the_plain_runs(
    tiny: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flags = [*tiny, "--compare", "--methods", "plain", "gapt", "--seeds", "1", "--workers", "1"]
    run([*flags, "--out", str(tmp_path / "out")])
    first = read_results(tmp_path / "out")["runs"]
    drawn: list[int] = []
    draw = Batches.__call__
    monkeypatch.setattr(Batches, "__call__", lambda self, index: (drawn.append(index), draw(self, index))[1])
    run([*flags, "--weight", "3", "--out", str(tmp_path / "out")])
    second = read_results(tmp_path / "out")["runs"]
    assert drawn == list(range(12))  # one run
    assert first["plain"] == second["plain"]
    assert first["gapt"]["entropy"] != second["gapt"]["entropy"]


def test_an_interrupted_sweep_goes_on_inside_a_run(
    tiny: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flags = [*tiny, "--compare", "--methods", "plain", "gapt", "--seeds", "1", "--workers", "1"]
    run([*flags, "--out", str(tmp_path / "whole")])
    drawn: list[int] = []
    draw = Batches.__call__

    def interrupted(self: Batches, index: int) -> Any:
        drawn.append(index)
        if len(drawn) == 12 + 8:  # the eighth step of the second run
            signal.raise_signal(signal.SIGINT)
        return draw(self, index)

    monkeypatch.setattr(Batches, "__call__", interrupted)
    with pytest.raises(StoppedError, match="same command goes on"):
        run([*flags, "--out", str(tmp_path / "parts")])
    run([*flags, "--out", str(tmp_path / "parts")])
    assert drawn == [*range(12), *range(8), *range(8, 12)]
    whole, parts = (read_results(tmp_path / name) for name in ("whole", "parts"))
    for method in ("plain", "gapt"):
        assert whole["runs"][method] == parts["runs"][method]


CONTRADICTIONS = {
    "--seeds 2": "--seeds: compares methods; give --compare",
    "--methods plain": "--methods: compares methods; give --compare",
    "--compare --seeds 2 --resume": "--resume: a comparison of seeds goes on",
    "--compare --seeds 2 --overwrite": "--overwrite: a comparison of seeds goes on",
    "--compare --seeds 2 --seed 3": "--seed: --seeds counts from --first-seed",
    "--compare --seeds 0": "--seeds: needs at least 1, found 0",
    "--compare --seeds 1 --workers 0": "--workers: needs at least 1, found 0",
    "--compare --seeds 1 --first-seed -1": "--first-seed: must not be negative, found -1",
    "--compare --first-seed 1": "--first-seed: is of use with --seeds only",
    "--compare --seeds 1 --threads 1": "--threads: with --seeds each process has one thread",
    "--compare --seeds 1 --parallel ddp": "--parallel: --seeds trains a run in each of its processes",
    "--compare --seeds 1 --signal validation --methods penalty": "--methods penalty: the weight of 30 suits",
    "--compare --signal validation --methods published": "--methods published: the weight of 30 suits",
    "--train-tokens -5": "--train-tokens: needs at least 1, found -5",
    "--train-tokens 100 200": "--train-tokens: several numbers need --seeds",
    "--train-tokens 100000000": "--train-tokens: .* has [0-9,]+ training tokens, found 100,000,000",
    "--train-tokens 10": "10 training tokens are fewer than one sequence",
}


@pytest.mark.parametrize("flags", CONTRADICTIONS)
def test_flags_that_contradict_each_other_are_refused(tiny: list[str], tmp_path: Path, flags: str) -> None:
    with pytest.raises(UserError, match=CONTRADICTIONS[flags]):
        run([*tiny, *flags.split(), "--out", str(tmp_path / "out")])
    assert not (tmp_path / "out" / "runs").exists()
