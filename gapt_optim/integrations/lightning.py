"""Lightning: one callback joins a GAPTOptimizer to automatic optimization and logs its phase and entropies."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import wraps
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from ..layout import Layers
from ..optimizer import GAPTOptimizer
from ..profiling import Monitor
from .common import Replacement, unwrapped


class GAPTCallback(Callback):
    """Connects the :class:`GAPTOptimizer` that ``configure_optimizers`` returns to Lightning's training.

    >>> import torch
    >>> from gapt_optim import RepresentationHook
    >>> class Module(LightningModule):
    ...     def __init__(self):
    ...         super().__init__()
    ...         self.model = torch.nn.Sequential(torch.nn.Linear(4, 16), torch.nn.ReLU(), torch.nn.Linear(16, 2))
    ...
    ...     def training_step(self, batch, index):
    ...         return self.model(batch).square().mean()
    ...
    ...     def configure_optimizers(self):
    ...         hook = RepresentationHook(self.model, "1")
    ...         return GAPTOptimizer(torch.optim.AdamW(self.parameters(), lr=3e-4), hook)
    >>> quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    >>> callback = GAPTCallback()  # Trainer(callbacks=[callback], **quiet).fit(Module(), loader)

    In automatic optimization the loss of ``training_step`` goes through ``optimizer.objective`` on its way to the
    backward pass. In manual optimization, call ``objective`` yourself: ``self.manual_backward(opt.objective(loss))``.
    In both, ``gapt/loss``, ``gapt/entropy``, ``gapt/compression`` and more of the optimizer step are logged at every
    ``log_every_n_steps``-th one; with several GAPTOptimizers, under ``gapt0/``, ``gapt1/`` and so on. A gate with
    ``signal="validation"`` judges ``metric``.

    Args:
        layers: also log the entropy of each layer.
        metric: name under which the module logs its held-out loss.

    Raises:
        TypeError, ValueError: at the beginning of training, if the module does not fit the optimizer; the
            message says what to do instead.
    """

    def __init__(self, *, layers: bool = True, metric: str = "val_loss") -> None:
        self.layers, self.metric = layers, metric
        self._replaced: list[Replacement] = []
        self._logged: dict[str, int] = {}  # the last step, by prefix: none is taken while gradients accumulate

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """In automatic optimization, replace the module's training step."""
        self._restore()
        self._logged.clear()
        optimizers = _wrapped(trainer)
        if not optimizers:
            raise TypeError(
                "configure_optimizers returned no GAPTOptimizer; return GAPTOptimizer(optimizer, hook) or leave out "
                "GAPTCallback"
            )
        if not pl_module.automatic_optimization:
            return
        optimizer = optimizers[0]
        if optimizer.config.alignment.parameter_every:
            raise ValueError(
                "parameter alignment needs a backward pass of its own, which automatic optimization does not give; set "
                "AlignmentConfig(parameter_every=0), or optimize manually and call optimizer.backward(loss)"
            )
        self._replaced = [Replacement(pl_module, "training_step", lambda step: _joined(optimizer, step))]

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Log the last optimizer step."""
        optimizers = _wrapped(trainer)
        for i, optimizer in enumerate(optimizers):
            prefix = "gapt" if len(optimizers) == 1 else f"gapt{i}"
            metrics = optimizer.metrics
            if metrics is None:
                continue
            scalars = metrics.scalars(layers=self.layers, prefix=prefix)
            pl_module.log_dict(scalars, logger=False)  # for other callbacks: a logger would repeat what is not measured
            every: int = trainer.log_every_n_steps  # type: ignore[attr-defined]  # made by its logger connector
            if every and metrics.step % every == 0 and self._logged.get(prefix) != metrics.step:
                self._logged[prefix] = metrics.step
                for logger in trainer.loggers:
                    logger.log_metrics(scalars, step=metrics.step - 1)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Give the held-out loss to the gate."""
        judging = [o for o in _wrapped(trainer) if o.config.gate.signal == "validation"]
        if trainer.sanity_checking or not judging:
            return
        if self.metric not in trainer.callback_metrics:
            raise ValueError(
                f'the gate judges metric="{self.metric}", which the module does not log; log it in validation_step, or '
                f"name one of {sorted(trainer.callback_metrics)}: GAPTCallback(metric=...)"
            )
        for optimizer in judging:
            optimizer.record_validation(trainer.callback_metrics[self.metric])

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Put the module's training step back."""
        self._restore()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Put the module's training step back."""
        self._restore()

    def _restore(self) -> None:
        for replacement in self._replaced:
            replacement.undo()
        self._replaced = []


class MonitorCallback(Callback):
    """A :func:`gapt_optim.monitor` of a module that Lightning trains, with any optimizer.

    >>> callback = MonitorCallback("model.1", every=50)  # Trainer(callbacks=[callback])

    The numbers of each report are logged too.

    Args:
        layers, options: as for :func:`gapt_optim.monitor`; names begin at the LightningModule.
    """

    def __init__(self, layers: Layers = None, **options: Any) -> None:
        self.layers, self.options = layers, options
        self.monitor: Monitor | None = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Place the monitor."""
        self.on_train_end(trainer, pl_module)
        log: Any = lambda metrics: pl_module.log_dict(metrics.scalars())  # noqa: E731
        observers = [*self.options.get("observers", ()), log]
        self.monitor = Monitor(pl_module, self.layers, **{**self.options, "observers": observers}).__enter__()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Remove it."""
        if self.monitor is not None:
            self.monitor.__exit__(None, None, None)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Remove it."""
        self.on_train_end(trainer, pl_module)


def _wrapped(trainer: Trainer) -> list[GAPTOptimizer]:
    found = (unwrapped(optimizer) for optimizer in trainer.optimizers)
    return [optimizer for optimizer in found if optimizer is not None]


def _joined(optimizer: GAPTOptimizer, step: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(step)
    def joined(*args: Any, **kwargs: Any) -> Any:
        output = step(*args, **kwargs)
        if output is None:  # Lightning skips this batch
            return None
        if isinstance(output, Mapping):
            return {**output, "loss": optimizer.objective(output["loss"])}
        return optimizer.objective(output)

    return joined
