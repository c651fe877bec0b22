"""`transformers.Trainer`, unmodified: one callback brings its loss to the gate and the phase into its logs."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

from torch import Tensor
from transformers import Trainer, TrainerCallback

from ..layout import Layers
from ..optimizer import GAPTOptimizer
from ..profiling import Monitor
from .common import Replacement, unwrapped
from .deepspeed import connect


class GAPTCallback(TrainerCallback):
    """Connects a :class:`GAPTOptimizer` to a ``transformers.Trainer`` or a subclass of it.

    >>> import torch
    >>> from gapt_optim import RepresentationHook
    >>> from transformers import GPT2Config, GPT2LMHeadModel, TrainingArguments
    >>> model = GPT2LMHeadModel(GPT2Config(vocab_size=64, n_positions=16, n_embd=8, n_layer=2, n_head=1))
    >>> hook = RepresentationHook(model, "transformer.h.*")
    >>> optimizer = GAPTOptimizer(torch.optim.AdamW(model.parameters(), lr=3e-4), hook)
    >>> row = torch.arange(16)
    >>> trainer = Trainer(
    ...     model,
    ...     TrainingArguments("out", max_steps=1, report_to="none", disable_tqdm=True, use_cpu=True),
    ...     train_dataset=[{"input_ids": row, "labels": row}] * 8,
    ...     optimizers=(optimizer, None),
    ... )
    >>> trainer.add_callback(GAPTCallback(trainer))
    >>> trained = trainer.train()
    {...}
    >>> optimizer.metrics.step
    1

    The gate judges the loss that the Trainer trains on, as a mean over the whole accumulated batch: cross-entropy
    per token, whatever the number of tokens in a micro-batch. A gate with ``signal="validation"`` judges ``metric``
    of the evaluations. Each training log gets ``gapt/loss``, ``gapt/entropy``, ``gapt/compression`` and more, of
    the step that is logged. While training, ``trainer.accelerator.backward`` and ``trainer.log`` are replaced.

    Args:
        trainer: the Trainer that this callback is added to.
        layers: also log the entropy of each layer.
        metric: name of the held-out loss in the Trainer's evaluation metrics.

    Raises:
        TypeError, ValueError, RuntimeError: at the beginning of training, if the Trainer's settings do not fit the
            optimizer; the message says what to do instead.
    """

    def __init__(self, trainer: Trainer, *, layers: bool = True, metric: str = "eval_loss") -> None:
        if not isinstance(trainer, Trainer):
            raise TypeError(
                f"trainer must be a transformers.Trainer, found {type(trainer).__name__}: "
                "trainer.add_callback(GAPTCallback(trainer))"
            )
        self.trainer, self.layers, self.metric = trainer, layers, metric
        self._replaced: list[Replacement] = []

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Replace what carries the loss and the logs."""
        self._restore()  # a run that raised, or that starts again with a smaller batch, never ended
        optimizer = self._find()
        optimizer.discard_step()
        self._replaced = [
            Replacement(self.trainer.accelerator, "backward", lambda backward: self._backward(optimizer, backward)),
            Replacement(self.trainer, "log", lambda log: self._log(optimizer, log)),
        ]

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Put everything back."""
        self._restore()

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """An overflow skips the optimizer; what was recorded for that step must not reach the next."""
        optimizer = unwrapped(self.trainer.optimizer)
        if self._replaced and optimizer is not None and self.trainer.accelerator.optimizer_step_was_skipped:
            optimizer.discard_step()

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Give the held-out loss to the gate."""
        optimizer = unwrapped(self.trainer.optimizer)
        if not self._replaced or optimizer is None or optimizer.config.gate.signal != "validation":
            return
        metrics: dict[str, float] = kwargs.get("metrics") or {}
        if self.metric in metrics:
            optimizer.record_validation(metrics[self.metric])
        elif not isinstance(self.trainer.eval_dataset, dict):  # of several datasets, one has it
            raise ValueError(
                f'the gate judges metric="{self.metric}", which is not among {sorted(metrics)}; name one of these: '
                "GAPTCallback(trainer, metric=...)"
            )

    def _restore(self) -> None:
        for replacement in reversed(self._replaced):
            replacement.undo()
        self._replaced = []

    def _find(self) -> GAPTOptimizer:
        trainer = self.trainer
        optimizer = unwrapped(trainer.optimizer)
        if optimizer is None:
            raise TypeError(
                "this Trainer does not train with a GAPTOptimizer; pass optimizers=(GAPTOptimizer(...), scheduler), "
                "or return one from create_optimizer in a subclass"
            )
        if trainer.args.n_gpu > 1:
            raise RuntimeError(
                f"the Trainer runs nn.DataParallel over {trainer.args.n_gpu} GPUs, whose replicas a RepresentationHook "
                "does not see; start one process per GPU with torchrun, or show one GPU in CUDA_VISIBLE_DEVICES"
            )
        if trainer.is_deepspeed_enabled:
            engine = trainer.accelerator.deepspeed_engine_wrapped.engine
            if "step" not in vars(engine):  # once, though training may start again
                connect(engine)
        if optimizer.config.gate.signal == "validation" and trainer.args.eval_strategy == "no":
            raise ValueError(
                'the gate has signal="validation" and the Trainer never evaluates; set eval_strategy="steps" and an '
                'eval_dataset, or GateConfig(signal="train")'
            )
        datasets = sorted(trainer.eval_dataset) if isinstance(trainer.eval_dataset, dict) else []
        names = [f"eval_{name}_" for name in datasets]
        if optimizer.config.gate.signal == "validation" and names and not self.metric.startswith(tuple(names)):
            raise ValueError(
                f'the gate judges metric="{self.metric}", and the Trainer evaluates on {datasets}; name one: '
                f'GAPTCallback(trainer, metric="{names[0]}loss")'
            )
        if optimizer.config.alignment.parameter_every and trainer.accelerator.scaler is not None:
            raise ValueError(
                "parameter alignment does not go with the Trainer's loss scaling (fp16=True); use bf16=True or "
                "AlignmentConfig(parameter_every=0)"
            )
        return optimizer

    def _backward(self, optimizer: GAPTOptimizer, backward: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(backward)
        def joined(loss: Tensor, **kwargs: Any) -> None:
            # The losses of the micro-batches sum to the mean over the whole batch: each arrives as its share.
            share = 1 / self.trainer.current_gradient_accumulation_steps
            if optimizer.config.alignment.parameter_every:  # measured in a backward pass of the optimizer's own
                optimizer.backward(loss, scaled_by=share)
            else:
                backward(optimizer.objective(loss, scaled_by=share), **kwargs)

        return joined

    def _log(self, optimizer: GAPTOptimizer, log: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(log)
        def joined(logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
            of_training = "loss" in logs  # not an evaluation's, nor the summary at the end
            if of_training and optimizer.metrics is not None:
                logs = {**logs, **optimizer.metrics.scalars(layers=self.layers)}
            log(logs, *args, **kwargs)

        return joined


class MonitorCallback(TrainerCallback):
    """A :func:`gapt_optim.monitor` of the model that a Trainer trains, with any optimizer.

    >>> callback = MonitorCallback("transformer.h.*", every=50)  # Trainer(..., callbacks=[callback])

    Args:
        layers, options: as for :func:`gapt_optim.monitor`.
    """

    def __init__(self, layers: Layers = None, **options: Any) -> None:
        self.layers, self.options = layers, options
        self.monitor: Monitor | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Place the monitor."""
        self.on_train_end(args, state, control)  # of a run that raised
        self.monitor = Monitor(kwargs["model"], self.layers, **self.options).__enter__()

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Remove it."""
        if self.monitor is not None:
            self.monitor.__exit__(None, None, None)
