"""Trackers against the real libraries, each with a store on this machine."""

from __future__ import annotations

import json
import math
import os
import re
import subprocess
import sys
import textwrap
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from gapt_optim import StepMetrics
from gapt_optim.integrations.trackers import MLflow, TensorBoard, WandB, _mlflow_name


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


# What the trackers are told, without them: a stand-in takes what the tests above show that the real one takes, and
# refuses what that refuses.


class Run:
    """Of Weights & Biases. That of Trackio has no axes, and takes the step beside the values."""

    def __init__(self, **settings: Any) -> None:
        self.settings, self.axes, self.records, self.finished = settings, dict[str, str](), list[Any](), False

    def define_metric(self, name: str, step_metric: str) -> None:
        self.axes[name] = step_metric

    def log(self, values: dict[str, Any]) -> None:
        assert not self.finished
        self.records.append(values)

    def finish(self) -> None:
        self.finished = True


class TrackioRun:
    def __init__(self, **settings: Any) -> None:
        self.settings, self.records, self.alerts, self.finished = settings, list[Any](), list[Any](), False

    def log(self, values: dict[str, float], step: int) -> None:
        self.records.append((step, values))

    def alert(self, title: str, text: str, level: str) -> None:
        self.alerts.append((title, text, level))

    def finish(self) -> None:
        self.finished = True


class OldTrackioRun(TrackioRun):
    """Of a release before alerts."""

    alert = None  # type: ignore[assignment]


def module(name: str, **members: Any) -> ModuleType:
    made = ModuleType(name)
    made.__dict__.update(members)
    return made


def test_wandb_gets_an_axis_of_steps_and_the_reason_of_a_switch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", module("wandb", init=Run))
    with WandB(project="p", every=2, layers=False, prefix="x") as board:
        for step in STEPS:
            board(step)
    run = board._run
    assert (run.settings, run.axes, run.finished) == ({"project": "p"}, {"x/*": "x/step"}, True)
    assert [record["x/step"] for record in run.records] == [2, 4]  # both are switches
    assert [record["x/switch"] for record in run.records] == [1, 0]
    assert run.records[1]["x/switch_reason"] == "compressed: memorization from step 5"
    assert not any("h.0" in name for record in run.records for name in record)


def test_a_run_of_the_users_own_is_joined_and_left_open() -> None:
    run = Run()
    with WandB(run) as board:
        board(STEPS[0])
    assert not run.finished
    assert [record["gapt/step"] for record in run.records] == [1]
    assert "gapt/switch_reason" not in run.records[0]
    with pytest.raises(TypeError, match=r"run is begun already, so \['name', 'project'\] cannot be set"):
        WandB(run, project="p", name="n")


@pytest.mark.parametrize("kind", [TrackioRun, OldTrackioRun])
def test_trackio_gets_the_step_and_an_alert_at_a_switch(monkeypatch: pytest.MonkeyPatch, kind: Any) -> None:
    trackio = module("trackio", init=kind, AlertLevel=SimpleNamespace(INFO="info"))
    monkeypatch.setitem(sys.modules, "trackio", trackio)
    with WandB(module=trackio, project="p") as board:
        for step in STEPS:
            board(step)
    assert [(step, values["gapt/compression"]) for step, values in board._run.records] == list(
        enumerate((0, 0, 1, 1, 0), 1)
    )
    alerts = [
        ("gapt: compression", "plateau: compression from step 3", "info"),
        ("gapt: memorization", "compressed: memorization from step 5", "info"),
    ]
    assert board._run.alerts == (alerts if kind is TrackioRun else [])
    assert board._run.finished


class MlflowStore:
    """What a server of MLflow keeps, with its limits: 1,000 metrics a request, 5,000 characters a tag."""

    def __init__(self, *experiments: str) -> None:
        self.experiments = {name: str(number) for number, name in enumerate(experiments)}
        self.runs: dict[str, SimpleNamespace] = {}
        self.active: str | None = None

    def installed(self, monkeypatch: pytest.MonkeyPatch) -> MlflowStore:
        metric = lambda key, value, timestamp, step: SimpleNamespace(**locals())  # noqa: E731
        named = lambda run: SimpleNamespace(info=SimpleNamespace(run_id=run))  # noqa: E731
        mlflow = module(
            "mlflow",
            MlflowClient=self.client,
            active_run=lambda: self.active and named(self.active),
            entities=SimpleNamespace(Metric=metric),
        )
        monkeypatch.setitem(sys.modules, "mlflow", mlflow)
        return self

    def client(self, tracking_uri: str | None) -> MlflowStore:
        self.uri = tracking_uri
        return self

    def get_experiment_by_name(self, name: str) -> Any:
        return SimpleNamespace(experiment_id=self.experiments[name]) if name in self.experiments else None

    def create_experiment(self, name: str) -> str:
        return self.experiments.setdefault(name, str(len(self.experiments)))

    def create_run(self, experiment_id: str, run_name: str | None) -> Any:
        run = f"run {len(self.runs)}"
        self.runs[run] = SimpleNamespace(
            experiment=experiment_id, name=run_name, status="RUNNING", tags={}, metrics=[], requests=0
        )
        return SimpleNamespace(info=SimpleNamespace(run_id=run))

    def log_batch(self, run: str, metrics: list[Any]) -> None:
        assert 0 < len(metrics) <= 1000
        assert not any(re.search(r"[^\w\-. /:]", each.key) for each in metrics)
        self.runs[run].metrics += metrics
        self.runs[run].requests += 1

    def set_tag(self, run: str, key: str, value: str) -> None:
        assert len(value) <= 5000
        self.runs[run].tags[key] = value

    def set_terminated(self, run: str) -> None:
        self.runs[run].status = "FINISHED"


@pytest.mark.parametrize("experiments", [(), ("Default",), ("Default", "gapt")])
def test_mlflow_begins_a_run_in_an_experiment_that_it_makes_where_it_is_missing(
    monkeypatch: pytest.MonkeyPatch, experiments: tuple[str, ...]
) -> None:
    store = MlflowStore(*experiments).installed(monkeypatch)
    with MLflow(experiment="gapt", name="first", tracking_uri="sqlite:///x", prefix="x") as board:
        for step in STEPS:
            board(step)
    (run,) = store.runs.values()
    assert (store.uri, run.experiment, run.name, run.status) == (
        "sqlite:///x", store.experiments["gapt"], "first", "FINISHED",
    )  # fmt: skip
    assert list(store.experiments) == [*(name for name in experiments if name != "gapt"), "gapt"]
    assert [(each.step, each.value) for each in run.metrics if each.key == "x/switch"] == [(2, 1), (4, 0)]
    assert len([each for each in run.metrics if each.key == "x/layers/entropy/h.0"]) == 5
    reasons = "plateau: compression from step 3; compressed: memorization from step 5"
    assert run.tags == {"x.switches": reasons}


def test_mlflow_joins_the_active_run_or_the_one_that_is_named_and_leaves_it_open(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    store = MlflowStore("Default").installed(monkeypatch)
    first, second = (store.create_run("0", name).info.run_id for name in ("a", "b"))
    store.active = first
    for board in (MLflow(), MLflow(second)):
        board(STEPS[0])
        board.close()
    new = MLflow(name="c")  # more is said than "the active one"
    new.close()
    assert [(run.name, run.status, run.requests) for run in store.runs.values()] == [
        ("a", "RUNNING", 1), ("b", "RUNNING", 1), ("c", "FINISHED", 0),
    ]  # fmt: skip
    with pytest.raises(TypeError, match="run_id names a run that was begun already; leave out experiment and name"):
        MLflow(second, experiment="gapt")


def test_mlflow_keeps_to_the_limits_of_a_request_and_of_a_tag(monkeypatch: pytest.MonkeyPatch) -> None:
    store = MlflowStore().installed(monkeypatch)
    board = MLflow()
    board(metrics(layer_entropy={f"layer {number}": 1.0 for number in range(2500)}))
    run = store.runs[board.run_id]
    assert (run.requests, len({each.key for each in run.metrics})) == (3, len(run.metrics))
    switches = [f"plateau: compression from step {2 * number}" for number in range(1, 301)]
    for number in range(1, 301):
        board(metrics(2 * number - 1, next_phase="compression", reason="plateau"))
    kept = run.tags["gapt.switches"].split("; ")
    assert len(kept) > 100
    assert kept == switches[-len(kept) :]


@pytest.mark.parametrize(
    ("package", "make", "message"),
    [
        ("torch.utils.tensorboard", lambda: TensorBoard("x"), "TensorBoard needs tensorboard: pip install tensorboard"),
        ("wandb", WandB, r"WandB needs wandb: pip install wandb \(or module=trackio\)"),
        ("mlflow", MLflow, r"MLflow needs mlflow: pip install mlflow \(or mlflow-skinny\)"),
    ],
)
def test_a_tracker_that_is_not_installed_is_named(
    monkeypatch: pytest.MonkeyPatch, package: str, make: Any, message: str
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ImportError, match=message):
        make()


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
