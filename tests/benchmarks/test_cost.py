"""The rows of the cost table do what they say, in miniature."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks.cost import endurance, gpu, monitoring, narrow, page, profiling, scaling, table, trace
from benchmarks.cost.workloads import (
    BARE,
    STEPS,
    WINDOWS,
    Size,
    entropy_by_autograd,
    entropy_by_eigenvalues,
)
from gapt_optim import StepMetrics, matrix_entropy

TINY = Size(layers=2, width=64, tokens=64, vocabulary=32)


@pytest.mark.parametrize("name", [*STEPS, *(name for name in WINDOWS if name not in STEPS)])
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_every_row_takes_steps(name: str) -> None:
    if "TorchJD" in name:
        pytest.importorskip("torchjd")
    step = (STEPS | WINDOWS)[name](TINY)
    for _ in range(2):
        step()


@pytest.mark.parametrize("window", [8, None])
def test_the_other_ways_compute_the_same_entropy(window: int | None) -> None:
    z = torch.randn(2, 64, 96, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    windows = z.reshape(-1, window or 64, 96)
    gradients = []
    values = [matrix_entropy(windows).mean(), entropy_by_autograd(z, window), entropy_by_eigenvalues(z, window)]
    for value in values:
        (gradient,) = torch.autograd.grad(value, z, retain_graph=True)
        gradients.append(gradient)
    for value, gradient in zip(values[1:], gradients[1:], strict=True):
        torch.testing.assert_close(value, values[0])
        torch.testing.assert_close(gradient, gradients[0])


def test_rows_are_taken_in_turn() -> None:
    order: list[str] = []
    table.time_rounds({name: (lambda name=name: order.append(name)) for name in "abc"}, 5, 0)
    rounds = [set(order[i : i + 3]) for i in range(0, len(order), 3)]
    assert rounds == [set("abc")] * (5 + table.WARM_UP)


def test_a_ratio_and_its_interval() -> None:
    bare = [1.0, 2.0, 3.0, 4.0, 5.0] * 4
    assert table.ratio_with_interval([1.5 * b for b in bare], bare) == pytest.approx((1.5, 1.5, 1.5))
    noisy = np.random.default_rng(0).normal(1.1, 0.05, 50)
    ratio, low, high = table.ratio_with_interval(list(noisy), [1.0] * 50)
    assert low < ratio < high
    assert low < 1.1 < high


def test_peak_memory_counts_what_lives_at_once() -> None:
    kept: list[torch.Tensor] = []

    def step() -> None:
        kept.clear()
        kept.append(torch.zeros(1000, 1000))

    assert 4e6 <= table.peak_bytes(step) < 4.5e6


def test_the_table_is_printed_and_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(table, "SMALL", TINY)
    words = [
        "--rounds",
        "2",
        "--repeats",
        "1",
        "--no-memory",
        "--only",
        "compression",
        "--json",
        str(tmp_path / "t.json"),
    ]
    assert table.main(words) == 0
    figures = json.loads((tmp_path / "t.json").read_text())
    assert figures[BARE]["cpu"] == 1.0
    every, fifty = (figures[f"compression, parameter alignment every {k}"]["cpu"] for k in ("step", "50 steps"))
    silent = figures["compression, nothing measured"]["cpu"]
    assert fifty == pytest.approx(silent + (every - silent) / 50)
    assert "| bare AdamW | 1.000 |" in capsys.readouterr().out


@pytest.mark.skipif(sys.version_info < (3, 11), reason="functions have no qualified names")
def test_a_step_is_traced(capsys: pytest.CaptureFixture[str]) -> None:
    before = sys.getprofile()
    assert trace.main(["--functions"]) == 0
    assert sys.getprofile() is before
    printed = capsys.readouterr().out
    assert "| compression |" in printed
    memorization, compression = (trace.traced_step(phase) for phase in narrow.PHASES)
    for found in (memorization, compression):
        assert found.functions["optimizer.py GAPTOptimizer.step"] == 1
        assert found.functions["watching.py Watch.__call__"] == trace.LAYERS
        assert found.library_calls > 0
    assert compression.functions["entropy.py Gram.backward"] == trace.LAYERS
    assert "entropy.py Gram.backward" not in memorization.functions


def test_an_exponent_is_the_slope() -> None:
    slope, error = scaling.exponent([1.0, 2.0, 4.0, 8.0], [3.0, 12.0, 48.0, 192.0])
    assert slope == pytest.approx(2.0)
    assert error == pytest.approx(0.0, abs=1e-9)
    assert np.isnan(scaling.exponent([1.0, 2.0, 4.0], [-1.0, 1.0, 2.0])[0])


def test_scaling_measures_each_size() -> None:
    rows = scaling.measure("layers", (1, 2), 2, TINY)
    assert [row["layers"] for row in rows] == [1, 2]
    assert all(row["bare"] > 0 for row in rows)


def test_narrow_models_are_measured(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert narrow.main(["--rounds", "2", "--repeats", "2", "--json", str(tmp_path / "n.json")]) == 0
    figures = json.loads((tmp_path / "n.json").read_text())
    rows = [BARE, *(row for phase in narrow.PHASES for row in (phase, f"{phase} by hand"))]
    assert list(figures) == [f"{name}, {row}" for name in narrow.MODELS for row in rows]
    assert all(figures[f"{name}, {phase}"]["over_by_hand"] > 0 for name in narrow.MODELS for phase in narrow.PHASES)
    assert all(figures[f"{name}, {BARE}"]["cpu"] == 1.0 for name in narrow.MODELS)
    assert "| MLP of width 64, memorization |" in capsys.readouterr().out


@pytest.mark.parametrize("name", list(narrow.MODELS))
def test_by_hand_is_the_same_step(name: str) -> None:
    """Its loss and entropies are those that the wrapper reports, and so are the weights afterwards."""
    ours, theirs = narrow.MODELS[name](), narrow.MODELS[name]()
    seen: list[StepMetrics] = []
    step, hand = narrow.wrapped(ours, "compression", [seen.append]), narrow.by_hand(theirs, "compression")
    for _ in range(3):
        step()
        found = hand()
        assert {"loss": seen[-1].loss, **seen[-1].layer_entropy} == pytest.approx(found, rel=1e-4)
    for a, b in zip(ours.model.parameters(), theirs.model.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_the_readme_has_what_was_measured_of_narrow_models() -> None:
    root = Path(__file__).parents[2]
    figures = json.loads((root / "benchmarks" / "cost" / "results" / "narrow.json").read_text())
    ratio = figures[f"{next(iter(narrow.MODELS))}, memorization"]["cpu"]
    assert f"{ratio:.1f} times in a small CNN" in (root / "README.md").read_text(encoding="utf-8")


def test_the_script_for_gpus_runs_on_a_cpu(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--tiny", "--device", "cpu", "--no-compile", "--steps", "2", "--json", str(tmp_path / "g.json")]
    assert gpu.main(words) == 0
    assert "| compression |" in capsys.readouterr().out
    assert json.loads((tmp_path / "g.json").read_text())["figures"]["compression"]["graph_breaks"] == 0


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_profile_beside_its_forward_passes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "profile.json"
    flags = ["--tokens", "4096", "--layers", "1", "--width", "128", "--no-memory", "--json", str(path)]
    assert profiling.main(flags) == 0
    assert "| profile of a Llama, 1 layers of width 128 |" in capsys.readouterr().out
    figures = json.loads(path.read_text())
    assert len(figures) == 3
    assert all(figure["cpu"] > 0 for figure in figures.values())


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_monitor_beside_the_bare_step(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "monitor.json"
    assert monitoring.main(["--rounds", "2", "--json", str(path)]) == 0
    assert "every=50: " in capsys.readouterr().out
    figures = json.loads(path.read_text())
    between, reports, mixed = list(figures.values())[1:]
    assert min(between["cpu"], reports["cpu"]) - 0.01 <= mixed["cpu"] <= max(between["cpu"], reports["cpu"]) + 0.01


def test_the_parts_of_a_profile_add_up() -> None:
    ratio, low, high = profiling.ratio_of_sums([1.0, 1.2, 1.1], [1.0, 1.0, 1.0], 0.3)
    assert ratio == pytest.approx(1.2)
    assert low <= ratio <= high


def test_the_page_of_a_long_run_is_measured(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "page.json"
    assert page.main(["--steps", "2000", "--layers", "3", "--times", "0", "--json", str(path)]) == 0
    assert 1 < json.loads(path.read_text())["megabytes"] < 10


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_long_run_is_measured_and_drawn(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, picture = tmp_path / "endurance.json", tmp_path / "endurance.png"
    flags = ["--steps", "1000", "--checkpoint-every", "500", "--json", str(path), "--picture", str(picture)]
    assert endurance.main(flags) == 0
    figures = json.loads(path.read_text())
    assert (figures["checkpoints"], len(figures["rows"])) == (2, 100)
    assert figures["switches"] > 2
    early, late = endurance.tenths(figures)["tensors"]
    assert early == late > 0
    assert picture.stat().st_size > 10_000
    assert "1000 steps" in capsys.readouterr().out


def test_a_long_run_of_an_odd_length_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert endurance.main(["--steps", "1234"]) == 2
    assert capsys.readouterr().err.startswith("error: --steps 1234: take a multiple of 100")


def test_without_a_gpu_it_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu.main([]) == 2
    assert capsys.readouterr().err.startswith("error: --device cuda")
