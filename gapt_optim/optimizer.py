"""The wrapper: one training step, from the loss to the phase of the next step."""

from __future__ import annotations

import math
import warnings
import weakref
from collections.abc import Callable, Sequence
from typing import Any, SupportsFloat

import torch
import torch.distributed as dist
from torch import Tensor
from torch.optim import Optimizer

from .alignment import activation_alignment
from .bases import Bases
from .config import GAPTConfig
from .distributed import group_of
from .gate import Phase
from .layers import counted, schedule_shares
from .metrics import Measures, Observer, StepMetrics
from .objective import build_objective
from .parameter_alignment import ParameterMeasurement, Plan, named_parameters, refuse_unmeasurable
from .progress import Progress, refuse_other_state
from .record import Reading, StepRecord, mean_or_nan
from .representation import RepresentationHook
from .tap import TapMode
from .wrapper import OptimizerWrapper

_SILENT_STEPS = 10


class GAPTOptimizer(OptimizerWrapper):
    """Wraps an optimizer and alternates training between memorization and compression.

    In memorization a step follows the task loss alone, bit for bit as the wrapped optimizer would. In
    compression it follows loss + weight * entropy of the representations that ``hook`` watches. After
    each step a gate judges loss and entropy, averaged over micro-batches and ranks, and names the
    phase of the next step. Method: Gated Phase Transition, arXiv 2505.08727.

        loss = model(batch).loss
        optimizer.backward(loss)        # was: loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    Args:
        optimizer: any ``torch.optim.Optimizer``, or a sequence of them with parameters of their own.
        hook: the layers to watch; a hook serves one optimizer.
        config: settings, by default ``GAPTConfig()``.
        process_group: ranks to average loss and entropy over, by default all of them.
        observers: called with :class:`StepMetrics` after each step. One that raises is dropped with a warning.

    Raises:
        TypeError, ValueError: an argument does not fit; the message names it and says what to do.

    Warns:
        UserWarning: the optimizer trains none of the parameters of the hook's model.
    """

    def __init__(
        self,
        optimizer: Optimizer | Sequence[Optimizer],
        hook: RepresentationHook,
        config: GAPTConfig | None = None,
        *,
        process_group: dist.ProcessGroup | None = None,
        observers: Sequence[Observer] = (),
    ) -> None:
        if not isinstance(hook, RepresentationHook):
            raise TypeError(
                f"hook must be a RepresentationHook, found {type(hook).__name__}; one hook watches any number of "
                "layers: RepresentationHook(model, [...])"
            )
        if not isinstance(config, GAPTConfig | None):
            raise TypeError(f"config must be a GAPTConfig, found {type(config).__name__}: GAPTConfig(...)")
        bases = Bases(optimizer)
        if any(isinstance(base, GAPTOptimizer) for base in bases.all):
            raise TypeError("optimizer is a GAPTOptimizer already; wrap its .base, with one hook for all layers")
        unusable = (
            [observer for observer in observers if not callable(observer)] if isinstance(observers, Sequence) else 1
        )
        if unusable:
            raise TypeError(f"observers must be a sequence of callables, found {observers!r}")
        if hook.removed:
            raise ValueError("hook was removed; make a new RepresentationHook")
        if hook._attached:
            raise ValueError("hook already serves another GAPTOptimizer; make a second RepresentationHook on the model")
        self._build(bases, hook, config if config is not None else GAPTConfig(), process_group, observers)
        self._warn_of_another_model()

    def _build(
        self,
        bases: Bases,
        hook: RepresentationHook,
        config: GAPTConfig,
        process_group: dist.ProcessGroup | None,
        observers: Sequence[Observer],
    ) -> None:
        self._wrap(bases)
        self._config = config
        self._hook = hook
        self._process_group = process_group
        self._observers = list(observers)
        keep = counted(len(hook.names), config.layers.skip_first, config.layers.skip_last)
        self._counted = [name for name, kept in zip(hook.names, keep, strict=True) if kept]
        self._silent_steps = 0
        self._warned_unmeasured = False
        self._zeroed = False  # zero_grad was called since the last objective
        self._metrics: StepMetrics | None = None
        self._record = StepRecord(hook.names)
        self._measurement: ParameterMeasurement | None = None  # from the first backward of a step that measures
        self._mean_entropy: Tensor | None = None  # of the micro-batch whose parameter alignment is measured
        self._progress = Progress(config.gate)
        if config.alignment.parameter_every:
            refuse_unmeasurable(self._plan())
        self._load_own_state(None)  # attaches the hook: nothing may be refused from here on
        # A hook outlives its optimizer; what it captures then would be kept forever.
        weakref.finalize(self, hook._release)

    def _warn_of_another_model(self) -> None:
        """The hook was made on a copy of the model: a mistake that trains as if nothing was wrong."""
        model = self._hook._model()
        watched = set() if model is None else {p for p in model.parameters() if p.requires_grad}
        # One that has none yet, or is frozen as a whole, may pass gradients on to what is trained in front of it.
        if watched and not any(p in watched for group in self.param_groups for p in group["params"]):
            warnings.warn(
                f"optimizer ({', '.join(type(base).__name__ for base in self._wrapped.all)}) has none of the "
                f"{len(watched)} trainable parameters of the hook's model ({type(model).__name__}): the entropy's "
                "gradients may go nowhere. Make the hook on the model whose parameters the optimizer has; where that "
                "model is frozen on purpose, say so with model.requires_grad_(False)",
                UserWarning,
                stacklevel=3,
            )

    # What a training loop calls

    @property
    def phase(self) -> Phase:
        """Phase of the step that is being computed."""
        return self._progress.phase

    @property
    def metrics(self) -> StepMetrics | None:
        """What the last step reported, None before the first."""
        return self._metrics

    @property
    def config(self) -> GAPTConfig:
        """The settings; to change them, make a new optimizer."""
        return self._config

    @property
    def hook(self) -> RepresentationHook:
        """The hook whose layers are watched."""
        return self._hook

    def objective(self, loss: Tensor) -> Tensor:
        """What to differentiate: the loss, plus the weighted entropy in compression.

        Call it once per forward pass, with the loss before any scaling, and scale what it returns.

        Args:
            loss: scalar, the task loss of the forward pass just run (nats for cross-entropy).

        Returns:
            A scalar of the loss's dtype. Its value in memorization is the loss's own.

        Raises:
            TypeError, ValueError: ``loss`` is no floating-point scalar.
            RuntimeError: a tapped module did not run, or DDP leaves it out; the message names it.
        """
        if not isinstance(loss, Tensor):
            raise TypeError(f"loss must be a tensor, found {type(loss).__name__}")
        if loss.numel() != 1 or not loss.is_floating_point():
            raise ValueError(
                f"loss must be one floating-point number, found shape {tuple(loss.shape)} of {loss.dtype}; "
                "reduce it first, for example with loss.mean()"
            )
        self._forget_skipped_step()
        objective = build_objective(
            loss,
            self._hook._take(loss),
            self.config,
            self._counted,
            self._shares,
            compressing=self.phase is Phase.COMPRESSION,
            flows=self._mode.compress or self._mode.measure,
            measured=self._measures,
        )
        self._mean_entropy = objective.mean_entropy
        self._record.add(loss, objective, self._group)
        return objective.total

    def backward(self, loss: Tensor, *, scale: float | Tensor = 1.0) -> None:
        """``(objective(loss) * scale).backward()``.

        Args:
            loss: as for :meth:`objective`.
            scale: factor on what is differentiated, such as 1 / micro-batches. With a GradScaler, use
                ``scaler.scale(optimizer.objective(loss)).backward()``: it must see what it scales.
        """
        total = self.objective(loss)
        total = total if isinstance(scale, float) and scale == 1.0 else total * scale
        self._differentiate(total, loss, scale)

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Step the wrapped optimizer, then let the gate choose the phase of the next step.

        Args:
            closure: evaluates the model, calls :meth:`backward` and returns the loss. It runs once, with
                gradients on (LBFGS runs it as often as it needs).

        Returns:
            What the closure returned, or what the wrapped optimizer's step did.

        Raises:
            FloatingPointError: loss or entropy was not finite for ``max_nonfinite`` steps in a row.
        """
        reading = self._start_reading() if closure is None else None
        result = self._step_bases(closure)
        if self._skipped_by_scaler():
            self._abandon_step()
            return result
        if closure is not None:
            reading = self._start_reading()
        self._forget_step()
        if reading is None:
            self._note_silent_step()
        else:
            self._finish_step(reading())
        return result

    def record_validation(self, loss: float | Tensor) -> None:
        """Give a held-out loss, at any cadence; a gate with ``signal="validation"`` judges it at the next step.

        Several before one step are averaged, and so are those of several ranks; not every rank needs to have one. One
        that is not finite is left out, with a warning.

        Raises:
            TypeError, ValueError: ``loss`` is not one number.
        """
        if isinstance(loss, Tensor):
            if loss.numel() != 1:
                raise ValueError(f"loss must be one number, found shape {tuple(loss.shape)}; give its mean")
            loss = loss.item()
        if not isinstance(loss, SupportsFloat):
            raise TypeError(f"loss must be a number or a tensor of one, found {type(loss).__name__}")
        value = float(loss)
        if math.isfinite(value):
            self._progress.validation.append(value)
        else:
            warnings.warn(
                f"a held-out loss of {value} is left out: the gate cannot judge it", UserWarning, stacklevel=2
            )

    def zero_grad(self, set_to_none: bool = True) -> None:
        """As on the wrapped optimizer."""
        self._wrapped.zero_grad(set_to_none)
        self._zeroed = True
        self._measurement = None  # it compares with gradients that are gone

    # One step, in order

    def _differentiate(self, total: Tensor, loss: Tensor, scale: float | Tensor) -> None:
        """One backward pass of ``total``, which holds ``loss * scale``, and the parameter alignment when it is due."""
        if self._measures and self._mean_entropy is not None:
            if self._measurement is None or not self._measurement.begun:
                self._measurement = ParameterMeasurement(self._plan())
            self._measurement.backward(total, loss * scale, self._mean_entropy * scale)
            self._mean_entropy = None
        else:
            total.backward()  # type: ignore[no-untyped-call]

    def _start_reading(self) -> Callable[[], Reading] | None:
        """Begin to bring this step's numbers to the host, before the step itself keeps the device busy."""
        if self._record.sums is None:
            return None
        validation = mean_or_nan(self._progress.validation)
        self._group = group_of(self._process_group)  # ranks may have met after this optimizer was made
        statistics = self._hook._take_statistics(self._record.sums.device) if self._mode.measure else None
        return self._record.start_reading(statistics, validation, self._group)

    def _forget_skipped_step(self) -> None:
        """GradScaler does not call ``step`` on an overflow: what was recorded for it went with its gradients."""
        gone = self._zeroed and self._record.sums is not None
        self._zeroed = False
        if gone and all(p.grad is None for group in self.param_groups for p in group["params"]):
            self._hook._drop_statistics()
            self._record.clear()
            self._prepare_step()

    def _forget_step(self) -> None:
        self._hook._drop()
        self._hook._drop_statistics()
        self._record.clear()

    def _abandon_step(self) -> None:
        """The step was not taken: its record goes, and its statistics, which may have overflowed."""
        self._forget_step()
        self._prepare_step()

    def _finish_step(self, reading: Reading) -> None:
        """Gate, metrics and observers, from the numbers of one step."""
        loss, penalty, entropies, measures, validation, statistics = reading
        judged = [name for name in self._counted if name in entropies] or list(entropies)
        entropy = math.fsum(entropies[name] for name in judged) / len(judged)

        phase = self.phase
        self._silent_steps = 0
        reason = self._progress.advance(loss, entropy, validation)
        parameter_alignment = self._measurement.finish() if self._measurement is not None else None
        if self._measures and parameter_alignment is None and not self._warned_unmeasured:
            self._warned_unmeasured = True
            warnings.warn(
                "parameter alignment was due, but only optimizer.backward(loss) measures it, not objective(loss)",
                UserWarning,
                stacklevel=4,
            )
        self._prepare_step()
        counts = self._progress.counts
        self._metrics = StepMetrics(
            step=counts.steps,
            phase=phase.value,
            next_phase=self.phase.value,
            reason=reason,
            loss=loss,
            entropy=entropy,
            layer_entropy=entropies,
            measures=Measures.mean(measures[name] for name in judged),
            layer_measures=measures,
            entropy_share=penalty / (loss + penalty) if phase is Phase.COMPRESSION and loss + penalty else None,
            alignment=activation_alignment(self._hook.names, statistics) if statistics else None,
            parameter_alignment=parameter_alignment() if parameter_alignment is not None else None,
            validation_loss=None if math.isnan(validation) else validation,
            switches=self._progress.gate.switches,
            compression_steps=counts.compression_steps,
            nonfinite_steps=counts.nonfinite_steps,
        )
        self._notify(self._metrics)
        if counts.nonfinite_run >= self.config.objective.max_nonfinite:
            raise FloatingPointError(
                f"loss or entropy was not finite for {counts.nonfinite_run} steps in a row (loss {loss}, "
                f"entropy {entropy}); lower the learning rate, or raise ObjectiveConfig.max_nonfinite to go on longer"
            )

    def _prepare_step(self) -> None:
        """Tell the taps what the next step does."""
        config = self.config
        every = config.alignment.parameter_every
        self._measures = every > 0 and self._progress.counts.steps % every == 0
        self._measurement = self._mean_entropy = None
        self._mode = TapMode(
            entropy=config.entropy,
            compress=self.phase is Phase.COMPRESSION or self._measures,
            measure=config.alignment.activation,
            combine=config.objective.combine,
            max_ratio=config.objective.max_ratio,
        )
        layers = config.layers
        shares = schedule_shares(
            layers.schedule, len(self._counted), self._progress.counts.compression_steps, layers.period
        )
        self._shares = torch.tensor(shares, dtype=torch.float64)
        self._group = group_of(self._process_group)
        self._hook._set_mode(self._mode, self._counted)

    def _plan(self) -> Plan:
        config = self.config
        return Plan(
            parameters=named_parameters(self._hook._model(), self.param_groups),
            layers=self._hook.names,
            weight=config.objective.weight if self.phase is Phase.COMPRESSION else 0.0,
            separable=config.plain_objective or self.phase is Phase.MEMORIZATION,
            streaming=config.alignment.parameter_streaming,
            project=config.alignment.project_parameters and self.phase is Phase.COMPRESSION,
            group=group_of(self._process_group),
        )

    def _note_silent_step(self) -> None:
        self._silent_steps += 1
        if self._silent_steps == _SILENT_STEPS:
            warnings.warn(
                f"{_SILENT_STEPS} optimizer steps in a row had no loss: the gate does not move. Call "
                "optimizer.backward(loss) instead of loss.backward(), or differentiate optimizer.objective(loss)",
                UserWarning,
                stacklevel=4,
            )

    def _notify(self, metrics: StepMetrics) -> None:
        for observer in list(self._observers):
            try:
                observer(metrics)
            except Exception as error:  # a full disk must not end a training run
                self._observers.remove(observer)
                warnings.warn(
                    f"observer {type(observer).__name__} raised {type(error).__name__}: {error}; it is dropped",
                    UserWarning,
                    stacklevel=2,
                )

    # State

    def _own_state(self) -> dict[str, Any]:
        return {
            **self._progress.state_dict(),
            "layers": list(self._hook.names),
            "ran": sorted(self._hook._capture.ever_ran),
            "config": self.config.model_dump(),
        }

    def _check_own_state(self, own: dict[str, Any]) -> None:
        refuse_other_state(own, self._own_state(), self.config.gate)

    def _load_own_state(self, own: dict[str, Any] | None) -> None:
        self._progress = Progress(self.config.gate)
        if own is not None:
            self._progress.load_state_dict(own)
        self._hook._capture.ever_ran = set() if own is None else set(own["ran"])
        self._forget_step()
        self._prepare_step()

    def __getstate__(self) -> dict[str, Any]:
        # Observers hold files and process groups live in one process: neither goes along.
        return {"base": self.base, "hook": self._hook, "config": self.config, "own": self._own_state()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._build(Bases(state["base"]), state["hook"], state["config"], None, ())
        self._load_own_state(state["own"])

    def __copy__(self) -> GAPTOptimizer:
        raise TypeError("two optimizers cannot share a hook; use copy.deepcopy((model, optimizer))")

    def __repr__(self) -> str:
        bases = ", ".join(repr(base) for base in self._wrapped.all)
        return f"GAPTOptimizer(phase={self.phase.value!r}, layers={len(self._hook.names)}, {bases})"
