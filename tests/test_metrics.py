"""What a step reports, and the observers that write it down."""

from __future__ import annotations

import io
import itertools
import json
import math
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from gapt_optim import (
    Alignment,
    AlignmentConfig,
    Angle,
    GAPTConfig,
    JSONLines,
    LayerConfig,
    Measures,
    ObjectiveConfig,
    ProgressBar,
    StepMetrics,
    TensorBoard,
)

from .loops import RESTLESS, make_net, run, train, wrap


def metrics(step: int = 1, **changes: Any) -> StepMetrics:
    values: dict[str, Any] = {
        "step": step,
        "phase": "compression",
        "next_phase": "memorization",
        "reason": "spike",
        "loss": 2.34567,
        "entropy": 0.98765,
        "layer_entropy": {"layers.0": 1.5, "layers.1": 0.5},
    }
    return StepMetrics(**(values | changes))


BOTH: dict[str, Any] = {
    "measures": Measures(1.5, 1.0, 2.0, 0.25),
    "layer_measures": {"layers.0": Measures(2.0, 1.25, 1.5, 0.5), "layers.1": Measures(1.0, 0.75, 2.5, 0.0)},
}


def records(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line, parse_constant=pytest.fail) for line in path.read_text().splitlines()]


# The step's own numbers


def test_the_share_of_the_entropy_is_that_of_the_objective() -> None:
    weight = 0.3
    for phase in ("memorization", "compression"):
        gate = RESTLESS.model_copy(update={"initial_phase": phase})
        model = make_net()
        optimizer = wrap(model, config=GAPTConfig(gate=gate, objective=ObjectiveConfig(weight=weight)))
        run(model, optimizer, range(1))
        found = optimizer.metrics
        assert found is not None
        penalty = weight * found.entropy
        share = None if phase == "memorization" else pytest.approx(penalty / (found.loss + penalty), rel=1e-5)
        assert found.entropy_share == share


# JSON lines


def test_each_record_can_be_read_while_the_file_is_open(tmp_path: Path) -> None:
    path = tmp_path / "new folder" / "metrics.jsonl"
    with JSONLines(path) as observer:
        for step in range(1, 4):
            observer(metrics(step))
            assert [record["step"] for record in records(path)] == list(range(1, step + 1))


def test_record_holds_every_value(tmp_path: Path) -> None:
    angle = Angle(cosine=0.5, projection=0.25, loss_norm=1.0, entropy_norm=2.0)
    alignment = Alignment(0.1, 0.2, 0.3, 0.4, {"layers.0": angle})
    with JSONLines(tmp_path / "m.jsonl") as observer:
        observer(metrics(alignment=alignment, validation_loss=3.0, switches=2, entropy_share=0.125, **BOTH))
    (record,) = records(tmp_path / "m.jsonl")
    assert record["layer_entropy"] == {"layers.0": 1.5, "layers.1": 0.5}
    assert record["alignment"]["layers"]["layers.0"]["cosine"] == 0.5
    assert (record["reason"], record["validation_loss"], record["switches"]) == ("spike", 3.0, 2)
    assert record["measures"] == {
        "linear_entropy": 1.5,
        "centered_cosine_entropy": 1.0,
        "norm_ratio": 2.0,
        "mean_share": 0.25,
    }
    assert record["layer_measures"]["layers.1"]["norm_ratio"] == 2.5
    assert record["entropy_share"] == 0.125


def test_measures_are_read_back_as_they_were_written(tmp_path: Path) -> None:
    with JSONLines(tmp_path / "m.jsonl") as observer:
        observer(metrics(**BOTH))
    (record,) = records(tmp_path / "m.jsonl")
    assert Measures(**record["measures"]) == BOTH["measures"]
    assert {name: Measures(**each) for name, each in record["layer_measures"].items()} == BOTH["layer_measures"]


def test_a_mean_of_measures_is_that_of_each() -> None:
    assert Measures.mean(BOTH["layer_measures"].values()) == Measures(1.5, 1.0, 2.0, 0.25)
    assert Measures.mean(each for each in [Measures(1.0, 2.0, 3.0, 0.5)]) == Measures(1.0, 2.0, 3.0, 0.5)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_non_finite_numbers_become_null_everywhere(tmp_path: Path, bad: float) -> None:
    angle = Angle(cosine=None, projection=None, loss_norm=bad, entropy_norm=bad)
    alignment = Alignment(None, bad, bad, bad, {"layers.0": angle})
    with JSONLines(tmp_path / "m.jsonl") as observer:
        layers = {"layers.0": Measures(bad, 1.0, bad, 0.5)}
        observer(
            metrics(loss=bad, entropy=bad, layer_entropy={"layers.0": bad}, layer_measures=layers, alignment=alignment)
        )
    (record,) = records(tmp_path / "m.jsonl")
    assert record["loss"] is record["entropy"] is record["layer_entropy"]["layers.0"] is None
    assert record["alignment"]["layers"]["layers.0"]["loss_norm"] is None
    assert list(record["layer_measures"]["layers.0"].values()) == [None, 1.0, None, 0.5]


def test_a_second_run_does_not_mix_with_the_first(tmp_path: Path) -> None:
    path = tmp_path / "m.jsonl"
    with JSONLines(path) as observer:
        observer(metrics(1))
    before = path.read_bytes()
    with pytest.raises(FileExistsError, match=r"m\.jsonl.*resume=True.*overwrite=True"):
        JSONLines(path)
    with pytest.raises(ValueError, match=r"resume=True.*overwrite=True"):
        JSONLines(path, resume=True, overwrite=True)
    assert path.read_bytes() == before

    with JSONLines(path, resume=True) as observer:
        observer(metrics(2))
    assert [record["step"] for record in records(path)] == [1, 2]
    with JSONLines(path, overwrite=True) as observer:
        assert records(path) == []
        observer(metrics(7))
    assert [record["step"] for record in records(path)] == [7]


@pytest.mark.parametrize("choice", [{}, {"resume": True}, {"overwrite": True}])
@pytest.mark.parametrize("there", [False, True])
def test_an_empty_or_missing_file_holds_no_run(tmp_path: Path, choice: dict[str, bool], there: bool) -> None:
    if there:
        (tmp_path / "m.jsonl").touch()
    with JSONLines(tmp_path / "m.jsonl", **choice) as observer:
        observer(metrics(1))
    assert [record["step"] for record in records(tmp_path / "m.jsonl")] == [1]


def test_a_half_written_line_does_not_spoil_the_next(tmp_path: Path) -> None:
    path = tmp_path / "m.jsonl"
    path.write_text('{"step": 1}\n{"step": 2, "lo')
    with JSONLines(path, resume=True) as observer:
        observer(metrics(3))
    first, half, third = path.read_text().splitlines()
    assert json.loads(first) == {"step": 1}
    assert half == '{"step": 2, "lo'
    assert json.loads(third)["step"] == 3


def test_path_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    (tmp_path / "m.jsonl").mkdir()
    with pytest.raises(OSError, match=r"m\.jsonl"):
        JSONLines(tmp_path / "m.jsonl")


WRITER = """
import sys
from gapt_optim import JSONLines, StepMetrics
observer, step = JSONLines(sys.argv[1]), 0
layers = {f"layer.{i}": 1 / 3 for i in range(99)}
while True:
    step += 1
    observer(StepMetrics(step, "memorization", "memorization", None, 1.0, 1.0, layers))
    print(step, flush=True)
"""


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="needs SIGKILL")
def test_a_kill_loses_at_most_the_last_line(tmp_path: Path) -> None:
    path = tmp_path / "m.jsonl"
    writer = subprocess.Popen([sys.executable, "-c", WRITER, str(path)], stdout=subprocess.PIPE, text=True)
    assert writer.stdout is not None
    for line in writer.stdout:
        if int(line) >= 200:
            break
    os.kill(writer.pid, signal.SIGKILL)
    reported = [int(line) for line in writer.stdout if line.endswith("\n")]
    writer.wait()
    writer.stdout.close()
    lines = path.read_text().split("\n")
    steps = [json.loads(line)["step"] for line in lines[:-1]]
    assert steps == list(range(1, len(steps) + 1))
    assert len(steps) >= max([200, *reported])


# Scalars


def test_scalars_leave_out_what_is_missing_or_not_finite() -> None:
    found = metrics(3, loss=math.nan, alignment=Alignment(None, None, 0.0, 0.4)).scalars(prefix="a")
    expected = metrics(3)
    assert found == {
        "a/entropy": expected.entropy,
        "a/compression": float(expected.phase == "compression"),
        "a/switches": float(expected.switches),
        **{f"a/entropy/{name}": entropy for name, entropy in expected.layer_entropy.items() if math.isfinite(entropy)},
    }


def test_scalars_with_everything_there() -> None:
    both = {"alignment": Alignment(0.25, 0.2, 0.3, 0.4), "parameter_alignment": Alignment(-0.5, 0.2, 0.3, 0.4)}
    found = metrics(3, validation_loss=4.0, **both).scalars(layers=False)
    rest = {"gapt/loss", "gapt/entropy", "gapt/compression", "gapt/switches"}
    assert found.keys() == rest | {"gapt/validation_loss", "gapt/activation_cosine", "gapt/parameter_cosine"}
    assert (found["gapt/validation_loss"], found["gapt/parameter_cosine"]) == (4.0, -0.5)


def test_scalars_of_measures_are_named_by_measure_and_layer() -> None:
    found = metrics(3, entropy_share=0.125, **BOTH).scalars()
    assert found["gapt/entropy_share"] == 0.125
    assert found["gapt/linear_entropy"] == 1.5
    assert found["gapt/centered_cosine_entropy"] == 1.0
    assert found["gapt/norm_ratio"] == 2.0
    assert found["gapt/mean_share"] == 0.25
    assert found["gapt/norm_ratio/layers.1"] == 2.5
    assert found["gapt/linear_entropy/layers.0"] == 2.0
    of_layers = {name for name in found if name.endswith(("layers.0", "layers.1"))}
    assert len(of_layers) == 2 * 5  # of each layer its entropy and four measures
    assert not {name for name in metrics(3, **BOTH).scalars(layers=False) if "layers" in name}
    hidden = metrics(3, measures=Measures(math.nan, 1.0, math.inf, 0.5)).scalars(layers=False)
    assert not {"gapt/linear_entropy", "gapt/norm_ratio"} & set(hidden)
    assert hidden["gapt/mean_share"] == 0.5


# Progress bar and TensorBoard


def test_progress_bar_shows_phase_loss_and_entropy() -> None:
    out = io.StringIO()
    with ProgressBar(total=5, file=out, mininterval=0, ncols=120) as bar:
        bar(metrics())
        bar(metrics(2, phase="memorization", loss=None))
    shown = out.getvalue()
    assert "phase=compression, loss=2.346, entropy=0.988" in shown
    assert "2/5" in shown
    assert "phase=memorization, entropy=0.988" in shown


def test_tensorboard_writes_readable_events(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    alignment = Alignment(0.25, 0.2, 0.3, 0.4)
    with TensorBoard(tmp_path) as board:
        board(metrics(1, alignment=alignment))
        board(metrics(2, loss=math.nan, phase="memorization", validation_loss=4.0))
    events = EventAccumulator(str(tmp_path)).Reload()

    def read(tag: str) -> list[tuple[int, float]]:
        return [(event.step, event.value) for event in events.Scalars(tag)]

    assert read("gapt/loss") == [(1, pytest.approx(2.34567))]
    assert read("gapt/compression") == [(1, 1.0), (2, 0.0)]
    assert read("gapt/entropy/layers.1") == [(1, 0.5), (2, 0.5)]
    assert read("gapt/activation_cosine") == [(1, 0.25)]
    assert read("gapt/validation_loss") == [(2, 4.0)]


# In training


def test_observers_are_called_once_a_step_with_its_metrics() -> None:
    seen: list[StepMetrics] = []
    model = make_net()
    optimizer = wrap(model, config=GAPTConfig(gate=RESTLESS), observers=[seen.append])
    for i, _ in enumerate(train(model, optimizer, range(20)), start=1):
        assert len(seen) == i
        assert seen[-1] is optimizer.metrics
    assert [m.step for m in seen] == list(range(1, 21))
    for before, after in itertools.pairwise(seen):
        assert after.phase == before.next_phase
        assert (before.reason is not None) == (before.phase != before.next_phase)
        assert after.compression_steps == before.compression_steps + (after.phase == "compression")
    assert seen[-1].switches == sum(m.reason is not None for m in seen) > 2
    assert all(set(m.layer_entropy) == {"layers.0", "layers.1", "layers.2"} for m in seen)
    assert all(m.entropy == pytest.approx(sum(m.layer_entropy.values()) / 3) for m in seen)


def test_measures_of_a_step_are_means_over_the_layers_that_count() -> None:
    every = AlignmentConfig(every=1)
    config = GAPTConfig(gate=RESTLESS, layers=LayerConfig(skip_first=1), alignment=every)
    model = make_net()
    seen: list[StepMetrics] = []
    run(model, wrap(model, config=config, observers=[seen.append]), range(6))
    for step in seen:
        assert set(step.layer_measures) == set(step.layer_entropy)
        counted = [step.layer_measures[name] for name in ("layers.1", "layers.2")]
        assert step.measures == Measures.mean(counted)
        # The default kernel is one of those measured.
        for name, entropy in step.layer_entropy.items():
            assert step.layer_measures[name].centered_cosine_entropy == pytest.approx(entropy, rel=1e-6)


def test_entropy_share_is_the_part_of_the_objective_that_is_entropy() -> None:
    weight = 0.3
    seen: list[StepMetrics] = []
    config = GAPTConfig(gate=RESTLESS, objective=ObjectiveConfig(weight=weight))
    model = make_net()
    run(model, wrap(model, config=config, observers=[seen.append]), range(12))
    assert {step.phase for step in seen} == {"memorization", "compression"}
    for step in seen:
        penalty = weight * step.entropy
        share = penalty / (step.loss + penalty) if step.phase == "compression" else None
        assert step.entropy_share == (share if share is None else pytest.approx(share, rel=1e-5))


def test_nothing_is_observed_without_a_loss() -> None:
    seen: list[StepMetrics] = []
    optimizer = wrap(make_net(), observers=[seen.append])
    optimizer.step()
    assert seen == []
    assert optimizer.metrics is None


def test_an_observer_that_raises_is_dropped_and_training_goes_on() -> None:
    calls: list[str] = []

    def full_disk(metrics: StepMetrics) -> None:
        calls.append("full disk")
        raise OSError("no space left")

    model = make_net()
    optimizer = wrap(model, observers=[full_disk, lambda m: calls.append(f"step {m.step}")])
    with pytest.warns(UserWarning, match=r"function.*OSError: no space left.*dropped") as warned:
        run(model, optimizer, range(3))
    assert len(warned) == 1
    assert warned[0].filename == run.__code__.co_filename
    assert calls == ["full disk", "step 1", "step 2", "step 3"]
