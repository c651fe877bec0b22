"""Trackers against the real libraries, each with a store on this machine."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest

from gapt_optim import StepMetrics
from gapt_optim.integrations.trackers import TensorBoard, _mlflow_name


def metrics(step: int = 1, **changes: Any) -> StepMetrics:
    values: dict[str, Any] = {
        "step": step,
        "phase": "memorization",
        "next_phase": "memorization",
        "reason": None,
        "loss": 2.5,
        "entropy": 0.75,
        "layer_entropy": {"h.0": 1.5, "h.1": 0.5},
    }
    return StepMetrics(**(values | changes))


STEPS = (
    metrics(1),
    metrics(2, next_phase="compression", reason="plateau"),
    metrics(3, phase="compression", loss=math.nan),
    metrics(4, phase="compression", reason="compressed", validation_loss=3.0),
    metrics(5),
)


def test_tensorboard_has_series_and_markers(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with TensorBoard(tmp_path) as board:
        for step in STEPS:
            board(step)
    events = EventAccumulator(str(tmp_path)).Reload()
    scalars = {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}
    assert scalars["gapt/compression"] == [(1, 0), (2, 0), (3, 1), (4, 1), (5, 0)]
    assert scalars["gapt/switch"] == [(2, 1), (4, 0)]
    assert [step for step, _ in scalars["gapt/loss"]] == [1, 2, 4, 5]
    texts = [(e.step, e.tensor_proto.string_val[0].decode()) for e in events.Tensors("gapt/switches/text_summary")]
    assert texts == [(2, "plateau: compression from step 3"), (4, "compressed: memorization from step 5")]


def test_every_leaves_steps_out_but_no_switch(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with TensorBoard(tmp_path, every=5, layers=False, prefix="x") as board:
        for step in STEPS:
            board(step)
    events = EventAccumulator(str(tmp_path)).Reload()
    assert [e.step for e in events.Scalars("x/compression")] == [2, 4, 5]
    assert "x/entropy/h.0" not in events.Tags()["scalars"]
    with pytest.raises(ValueError, match="every must be at least 1 step, found 0"):
        TensorBoard(tmp_path, every=0)


# The others in a process of their own: they start threads and servers, and warn of things that are not ours.


def python_with(package: str) -> str:
    """A Python that has the tracker: this one, or that of GAPT_TRACKERS_PYTHON; else the test is skipped."""
    for python in (os.environ.get("GAPT_TRACKERS_PYTHON"), sys.executable):
        if python and subprocess.run([python, "-c", f"import {package}"], capture_output=True).returncode == 0:
            return python
    pytest.skip(f"{package} is not installed, neither here nor for GAPT_TRACKERS_PYTHON")


def run(package: str, code: str, folder: Path) -> Any:
    """What the code leaves in ``found``, run with the steps above."""
    header = """
    import json, math, os, sys
    from gapt_optim import StepMetrics
    from gapt_optim.integrations.trackers import MLflow, WandB
    steps = [StepMetrics(**{**values, "loss": values["loss"] or math.nan}) for values in json.loads(sys.argv[1])]
    """
    keep = ("step", "phase", "next_phase", "reason", "loss", "entropy", "layer_entropy", "validation_loss")
    steps = [{key: value for key, value in step.as_dict().items() if key in keep} for step in STEPS]
    script = textwrap.dedent(header) + textwrap.dedent(code) + "\nprint('FOUND ' + json.dumps(found))"
    environment = os.environ | {
        "WANDB_MODE": "offline",
        "WANDB_SILENT": "true",
        "WANDB_DIR": str(folder),
        "TRACKIO_DIR": str(folder / "trackio"),
        "MLFLOW_TRACKING_URI": f"sqlite:///{folder}/mlflow.db",
        "MLFLOW_ALLOW_FILE_STORE": "true",
        "HF_HUB_OFFLINE": "1",
        "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
    }
    if environment.get("GAPT_TRACKERS_PYTHON"):  # whose own packages come first
        environment["PYTHONPATH"] = str(Path(__file__).parents[2])
    result = subprocess.run(
        [python_with(package), "-c", script, json.dumps(steps)],
        capture_output=True, text=True, cwd=folder, env=environment, timeout=240,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr[-3000:]
    (line,) = [line for line in result.stdout.splitlines() if line.startswith("FOUND ")]
    return json.loads(line.removeprefix("FOUND "))


def test_wandb(tmp_path: Path) -> None:
    code = """
    import wandb
    seen = []
    with WandB(project="p") as tracker:
        original = tracker._run.log
        tracker._run.log = lambda record: (seen.append(record), original(record))
        for step in steps:
            tracker(step)
        summary = dict(tracker._run.summary)
    run = wandb.init(project="p")                      # one of the user's own, with logs of its own
    joined = WandB(run)
    run.log({"mine": 1}); joined(steps[0]); run.log({"mine": 2}); joined.close()
    found = {"seen": seen, "summary": summary, "open": not run._is_finished}
    run.finish()
    """
    found = run("wandb", code, tmp_path)
    assert [record["gapt/compression"] for record in found["seen"]] == [0, 0, 1, 1, 0]
    assert [record["gapt/step"] for record in found["seen"]] == [1, 2, 3, 4, 5]
    assert [record.get("gapt/switch") for record in found["seen"]] == [None, 1, None, 0, None]
    assert found["seen"][1]["gapt/switch_reason"] == "plateau: compression from step 3"
    assert (found["summary"]["gapt/step"], found["summary"]["gapt/validation_loss"]) == (5, 3.0)
    assert found["open"]
    assert list(tmp_path.rglob("*.wandb"))  # the offline store


def test_trackio(tmp_path: Path) -> None:
    code = """
    import trackio
    with WandB(module=trackio, project="p", name="r", embed=False) as tracker:
        for step in steps:
            tracker(step)
    rows = trackio.SQLiteStorage.get_logs("p", "r")
    alerts = trackio.SQLiteStorage.get_alerts("p", "r")
    found = {"rows": rows, "alerts": alerts}
    """
    found = run("trackio", code, tmp_path)
    assert [(row["step"], row["gapt/compression"]) for row in found["rows"]] == list(enumerate((0, 0, 1, 1, 0), 1))
    assert [row.get("gapt/switch") for row in found["rows"]] == [None, 1, None, 0, None]
    said = sorted(alert["text"] for alert in found["alerts"])
    assert said == ["compressed: memorization from step 5", "plateau: compression from step 3"]


def test_mlflow(tmp_path: Path) -> None:
    code = """
    import mlflow
    uri = "file:" + os.getcwd() + "/mlruns"
    with MLflow(experiment="gapt", name="first", tracking_uri=uri) as tracker:
        for step in steps:
            tracker(step)
    client = mlflow.MlflowClient(tracking_uri=uri)
    run = client.get_run(tracker.run_id)
    series = lambda key: [(m.step, m.value) for m in client.get_metric_history(tracker.run_id, key)]
    mlflow.set_tracking_uri(uri)
    with mlflow.start_run() as own:
        joined = MLflow()
        joined(steps[0])
        joined.close()
        status = client.get_run(own.info.run_id).info.status
    found = {
        "compression": series("gapt/compression"), "switch": series("gapt/switch"), "loss": series("gapt/loss"),
        "layer": series("gapt/layers/entropy/h.0"), "tags": run.data.tags,
        "status": run.info.status, "name": run.info.run_name,
        "joined": joined.run_id == own.info.run_id, "open": status,
    }
    """
    found = run("mlflow", code, tmp_path)
    assert found["compression"] == [[1, 0], [2, 0], [3, 1], [4, 1], [5, 0]]
    assert found["switch"] == [[2, 1], [4, 0]]
    assert [step for step, _ in found["loss"]] == [1, 2, 4, 5]
    assert len(found["layer"]) == 5
    switches = "plateau: compression from step 3; compressed: memorization from step 5"
    assert found["tags"]["gapt.switches"] == switches
    assert (found["status"], found["name"], found["joined"], found["open"]) == ("FINISHED", "first", True, "RUNNING")


def test_mlflow_names() -> None:
    assert _mlflow_name("gapt/entropy/h.0[a]*") == "gapt/layers/entropy/h.0_a__"
    assert _mlflow_name("gapt/entropy") == "gapt/entropy"


def test_a_notebook_shows_the_live_bar(tmp_path: Path) -> None:
    """In a notebook the bar is a widget, which the notebook keeps with its last state."""
    code = """
    import nbformat
    from nbclient import NotebookClient
    cell = '''
    from gapt_optim import ProgressBar, StepMetrics
    with ProgressBar(total=3) as bar:
        for step in range(1, 4):
            bar(StepMetrics(step, "compression", "compression", None, 2.0, 0.5, {}))
    '''
    import textwrap
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(textwrap.dedent(cell))])
    NotebookClient(notebook, timeout=200, kernel_name="python3").execute()
    widgets = notebook.metadata.get("widgets", {}).get("application/vnd.jupyter.widget-state+json", {}).get("state", {})
    found = [widget["state"].get("value") for widget in widgets.values() if "value" in widget["state"]]
    """
    found = run("nbclient, ipykernel, ipywidgets", code, tmp_path)
    assert 3.0 in found
    said = [str(value).replace("\N{FIGURE SPACE}", " ") for value in found]
    assert any("phase=compression, loss=2.000, entropy=0.500" in text for text in said), said


def test_trackers_are_not_imported_before_they_are_made() -> None:
    code = (
        "import sys, gapt_optim, gapt_optim.integrations.trackers as t;"
        "assert (gapt_optim.TensorBoard, gapt_optim.WandB, gapt_optim.MLflow) == (t.TensorBoard, t.WandB, t.MLflow);"
        "names = {'wandb', 'mlflow', 'trackio', 'tensorboard', 'torch.utils.tensorboard'} & set(sys.modules);"
        "assert not names, names"
    )
    subprocess.run([sys.executable, "-c", code], check=True, env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)})
