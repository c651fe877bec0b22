"""Experiment trackers: observers for TensorBoard, Weights & Biases, Trackio and MLflow.

Each is one line, ``observers=[WandB(project="gapt")]``, and imports its tracker only when it is made. All write the
numbers of :meth:`gapt_optim.StepMetrics.scalars`: ``gapt/compression`` is the phase as a series of 0 and 1, and
``gapt/switch`` has a point at each switch of phase alone, 1 into compression and 0 into memorization, with the reason
as a text beside it. An observer that raises is dropped by the optimizer with a warning; training goes on.
"""

from __future__ import annotations

import os
import re
from types import ModuleType
from typing import Any

from ..metrics import StepMetrics


class _Tracker:
    """What all have in common: which numbers, and when.

    Args:
        layers: also log the values of each layer.
        every: steps between two logs. A switch of phase and a held-out loss are always logged.
        prefix: of the names.
    """

    def __init__(self, layers: bool, every: int, prefix: str) -> None:
        if every < 1:
            raise ValueError(f"every must be at least 1 step, found {every}")
        self._layers, self._every, self._prefix = layers, every, prefix

    def __call__(self, metrics: StepMetrics) -> None:
        told = metrics.reason is not None or metrics.validation_loss is not None
        if metrics.step % self._every and not told:
            return
        values = metrics.scalars(layers=self._layers, prefix=self._prefix)
        text = None
        if metrics.reason is not None:
            values[f"{self._prefix}/switch"] = float(metrics.next_phase == "compression")
            text = f"{metrics.reason}: {metrics.next_phase} from step {metrics.step + 1}"
        self._log(values, text, metrics)

    def _log(self, values: dict[str, float], switch: str | None, metrics: StepMetrics) -> None:
        raise NotImplementedError

    def close(self) -> None:
        """Close what this observer opened."""

    def __enter__(self) -> Any:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


class TensorBoard(_Tracker):
    """Writes the numbers as TensorBoard scalars under ``folder``, and each switch as a text.

    >>> with TensorBoard("runs/tensorboard") as board:  # GAPTOptimizer(base, hook, observers=[board])
    ...     pass

    Args:
        folder: where the event file is written.
        layers: also log the values of each layer.
        every: steps between two logs; a switch of phase and a held-out loss are always logged.
        prefix: of the names.

    Raises:
        ImportError: tensorboard is not installed.
    """

    def __init__(
        self, folder: str | os.PathLike[str], *, layers: bool = True, every: int = 1, prefix: str = "gapt"
    ) -> None:
        super().__init__(layers, every, prefix)
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise ImportError("TensorBoard needs tensorboard: pip install tensorboard") from error
        self._writer: Any = SummaryWriter(os.fspath(folder))

    def _log(self, values: dict[str, float], switch: str | None, metrics: StepMetrics) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, metrics.step)
        if switch is not None:
            self._writer.add_text(f"{self._prefix}/switches", switch, metrics.step)

    def close(self) -> None:
        self._writer.close()


class WandB(_Tracker):
    """Logs to Weights & Biases, or to Trackio, which has the same interface.

    In Weights & Biases the numbers have ``gapt/step`` as their x-axis, so they fit beside your own logs in the same
    run; ``gapt/switch_reason`` has the reason of each switch. In Trackio a switch is an alert of level "info", which
    its charts mark.

    >>> board = WandB(project="gapt")  # begins a run                                  # doctest: +SKIP
    >>> board = WandB(run)  # joins one of yours                                      # doctest: +SKIP
    >>> board = WandB(module=trackio, project="gapt")  # Trackio, kept on this machine  # doctest: +SKIP

    Args:
        run: an existing run. :meth:`close` leaves it open.
        module: ``wandb`` (the default) or ``trackio``.
        layers: also log the values of each layer.
        every: steps between two logs; a switch of phase and a held-out loss are always logged.
        prefix: of the names.
        init: passed to ``module.init`` if no run is given, such as ``project``, ``name`` and ``config``.

    Raises:
        ImportError: wandb is not installed.
        TypeError: both a run and settings for a new one are given.
    """

    def __init__(
        self,
        run: Any = None,
        *,
        module: ModuleType | None = None,
        layers: bool = True,
        every: int = 1,
        prefix: str = "gapt",
        **init: Any,
    ) -> None:
        super().__init__(layers, every, prefix)
        if run is not None and init:
            raise TypeError(
                f"run is begun already, so {sorted(init)} cannot be set; pass run or settings for a new one"
            )
        if module is None and run is None:
            try:
                import wandb as module  # type: ignore[no-redef]
            except ImportError as error:
                raise ImportError("WandB needs wandb: pip install wandb (or module=trackio)") from error
        self._module = module
        self._owned = run is None
        self._run: Any = module.init(**init) if module is not None and run is None else run
        self._own_axis = hasattr(self._run, "define_metric")
        if self._own_axis:
            self._run.define_metric(f"{prefix}/*", step_metric=f"{prefix}/step")

    def _log(self, values: dict[str, float], switch: str | None, metrics: StepMetrics) -> None:
        if self._own_axis:
            record: dict[str, Any] = {**values, f"{self._prefix}/step": metrics.step}
            if switch is not None:
                record[f"{self._prefix}/switch_reason"] = switch
            self._run.log(record)
            return
        self._run.log(values, step=metrics.step)
        alert = getattr(self._run, "alert", None)
        if switch is not None and alert is not None:
            from trackio import AlertLevel

            alert(title=f"{self._prefix}: {metrics.next_phase}", text=switch, level=AlertLevel.INFO)

    def close(self) -> None:
        if self._owned:
            self._run.finish()


class MLflow(_Tracker):
    """Logs to an MLflow run; the tag ``gapt.switches`` lists the switches with their reasons.

    Values of each layer are under ``gapt/layers/``, such as ``gapt/layers/entropy/h.0``.

    >>> board = MLflow(experiment="gapt")  # begins a run; MLflow() joins the active one  # doctest: +SKIP

    Args:
        run_id: an existing run; by default the active one, if no other argument is given. :meth:`close` leaves it
            open.
        experiment: name of the experiment of a new run, created if it is missing; by default "Default".
        name: of a new run.
        tracking_uri: where to log; by default what MLflow is set to.
        layers: also log the values of each layer.
        every: steps between two logs; a switch of phase and a held-out loss are always logged.
        prefix: of the names.

    Raises:
        ImportError: mlflow is not installed.
        TypeError: both a run and an experiment or name for a new one are given.
    """

    _LONGEST_TAG = 4500  # what every store takes

    def __init__(
        self,
        run_id: str | None = None,
        *,
        experiment: str | None = None,
        name: str | None = None,
        tracking_uri: str | None = None,
        layers: bool = True,
        every: int = 1,
        prefix: str = "gapt",
    ) -> None:
        super().__init__(layers, every, prefix)
        if run_id is not None and (experiment is not None or name is not None):
            raise TypeError("run_id names a run that was begun already; leave out experiment and name")
        try:
            import mlflow
        except ImportError as error:
            raise ImportError("MLflow needs mlflow: pip install mlflow (or mlflow-skinny)") from error
        self._client: Any = mlflow.MlflowClient(tracking_uri=tracking_uri)
        active = mlflow.active_run()
        if active is not None and not (run_id or experiment or name or tracking_uri):
            run_id = active.info.run_id
        self._owned = run_id is None
        self.run_id = self._begin(experiment or "Default", name) if run_id is None else run_id
        self._entities = mlflow.entities
        self._switches: list[str] = []

    def _begin(self, experiment: str, name: str | None) -> str:
        found = self._client.get_experiment_by_name(experiment)
        number = found.experiment_id if found is not None else self._client.create_experiment(experiment)
        return str(self._client.create_run(number, run_name=name).info.run_id)

    def _log(self, values: dict[str, float], switch: str | None, metrics: StepMetrics) -> None:
        import time

        now = int(time.time() * 1000)
        points = [self._entities.Metric(_mlflow_name(key), value, now, metrics.step) for key, value in values.items()]
        for start in range(0, len(points), 1000):  # the most that one request takes
            self._client.log_batch(self.run_id, metrics=points[start : start + 1000])
        if switch is not None:
            self._switches.append(switch)
            while sum(map(len, self._switches)) + 2 * len(self._switches) > self._LONGEST_TAG:
                del self._switches[0]
            self._client.set_tag(self.run_id, f"{self._prefix}.switches", "; ".join(self._switches))

    def close(self) -> None:
        if self._owned:
            self._client.set_terminated(self.run_id)


def _mlflow_name(name: str) -> str:
    """A metric's name in the characters that MLflow takes.

    What is per layer gets a place of its own: a store of files cannot have gapt/entropy beside gapt/entropy/h.0.
    """
    prefix, *rest = re.sub(r"[^\w\-. /:]", "_", name).split("/")
    return "/".join([prefix, *(["layers"] if len(rest) > 1 else []), *rest])
