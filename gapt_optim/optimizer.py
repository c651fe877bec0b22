"""The wrapper: one training step, from the loss to the phase of the next step."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import Any, SupportsFloat

import torch.distributed as dist
from torch import Tensor
from torch.optim import Optimizer

import gapt_optim  # for its configurations: pydantic, which is slow to import, comes with the first one

from ._capture import RepresentationHook, store_of
from ._objective import check_loss
from ._step import StepState, notify, warn_of_another_model
from .gate import Phase
from .metrics import Observer, StepMetrics
from .several import OptimizerWrapper, Several


class GAPTOptimizer(OptimizerWrapper):
    """Wraps an optimizer and alternates training between memorization and compression.

    In memorization a step follows the task loss alone, bit for bit as the wrapped optimizer would. In
    compression it follows loss + weight * entropy of the representations that ``hook`` watches. After
    each step a gate judges loss and entropy, averaged over micro-batches and ranks, and picks the
    phase of the next step. Method: Gated Phase Transition, arXiv 2505.08727.

    >>> import torch
    >>> from gapt_optim import GAPTOptimizer, RepresentationHook
    >>> model = torch.nn.Sequential(torch.nn.Linear(4, 16), torch.nn.ReLU(), torch.nn.Linear(16, 2))
    >>> optimizer = GAPTOptimizer(torch.optim.AdamW(model.parameters(), lr=1e-3), RepresentationHook(model, "1"))
    >>> optimizer.backward(model(torch.randn(64, 4)).square().mean())      # was: loss.backward()
    >>> optimizer.step()
    >>> optimizer.zero_grad()
    >>> optimizer.metrics.phase
    'memorization'

    Args:
        optimizer: any ``torch.optim.Optimizer``, or a sequence of them with disjoint parameters.
        hook: the layers to watch; a hook serves one optimizer.
        config: settings, by default ``GAPTConfig()``.
        process_group: ranks to average loss and entropy over, by default all of them.
        observers: called with :class:`StepMetrics` after each step. One that raises is removed with a warning.
        announce: log the first switch to compression and the first switch back, one line each, through the logger
            ``gapt_optim``.

    Raises:
        TypeError, ValueError: an argument does not fit; the message names it and says what to do.

    Warns:
        UserWarning: the optimizer trains none of the parameters of the hook's model.
    """

    def __init__(
        self,
        optimizer: Optimizer | Sequence[Optimizer],
        hook: RepresentationHook,
        config: gapt_optim.GAPTConfig | None = None,
        *,
        process_group: dist.ProcessGroup | None = None,
        observers: Sequence[Observer] = (),
        announce: bool = True,
    ) -> None:
        if not isinstance(hook, RepresentationHook):
            raise TypeError(
                f"hook must be a RepresentationHook, found {type(hook).__name__}; one hook watches any number of "
                "layers: RepresentationHook(model, [...])"
            )
        if not isinstance(config, gapt_optim.GAPTConfig | None):
            raise TypeError(f"config must be a GAPTConfig, found {type(config).__name__}: GAPTConfig(...)")
        several = Several(optimizer)
        if any(isinstance(base, GAPTOptimizer) for base in several.all):
            raise TypeError("optimizer is a GAPTOptimizer already; wrap its .base, with one hook for all layers")
        if not isinstance(observers, Sequence) or not all(map(callable, observers)):
            raise TypeError(f"observers must be a sequence of callables, found {observers!r}")
        if hook.removed:
            raise ValueError("hook was removed; make a new RepresentationHook")
        if store_of(hook).plan is not None:
            raise ValueError("hook already serves another GAPTOptimizer; make a second RepresentationHook on the model")
        config = config if config is not None else gapt_optim.GAPTConfig()
        self._build(several, hook, config, process_group, observers, announce)
        warn_of_another_model(store_of(hook).model(), self.param_groups, several.all)

    def _build(
        self,
        several: Several,
        hook: RepresentationHook,
        config: gapt_optim.GAPTConfig,
        process_group: dist.ProcessGroup | None,
        observers: Sequence[Observer],
        announce: bool,
    ) -> None:
        self._wrap(several)
        self._config, self._hook, self._observers = config, hook, list(observers)
        store = store_of(hook)
        self._state = StepState(config, store, process_group, announce=announce)
        self._state.refuse_incomparable(self.param_groups)
        self._state.begin()  # attaches the hook: nothing may be refused from here on
        weakref.finalize(self, store.release)  # a hook outlives its optimizer; what it captures then would be kept

    @property
    def phase(self) -> Phase:
        """Phase of the current step."""
        return self._state.progress.phase

    @property
    def metrics(self) -> StepMetrics | None:
        """Metrics of the last step, None before the first."""
        return self._state.metrics

    @property
    def config(self) -> gapt_optim.GAPTConfig:
        """The settings. To change them, make a new optimizer."""
        return self._config

    @property
    def hook(self) -> RepresentationHook:
        """The hook whose layers are watched."""
        return self._hook

    def objective(self, loss: Tensor, *, scaled_by: float = 1.0) -> Tensor:
        """What to differentiate: the loss, plus the weighted entropy in compression.

        Call it once per forward pass, with the loss before any scaling, and scale what it returns.

        Args:
            loss: scalar, the task loss of the last forward pass (nats for cross-entropy).
            scaled_by: factor that the loss was already multiplied by, such as 1 / micro-batches in a loop that divides
                it. The entropy gets the same factor, and the gate judges the loss without it.

        Returns:
            A scalar of the loss's dtype. In memorization its value is that of the loss.

        Raises:
            TypeError, ValueError: an argument has the wrong type or shape.
            RuntimeError: a tapped module did not run, or DDP does not average its gradients; the message names it. Or
                the loss does not require grad.
        """
        return self._record(loss, scaled_by)

    def backward(self, loss: Tensor, *, scale: float | Tensor = 1.0, scaled_by: float = 1.0) -> None:
        """``(objective(loss) * scale).backward()``.

        Args:
            loss, scaled_by: as for :meth:`objective`.
            scale: factor on what is differentiated, such as 1 / micro-batches. With a GradScaler, use
                ``scaler.scale(optimizer.objective(loss)).backward()`` instead.
        """
        if not isinstance(scale, SupportsFloat):
            raise TypeError(f"scale must be a number or a tensor of one, found {type(scale).__name__}")
        total, part = self._record(loss, scaled_by), loss
        if not (isinstance(scale, float) and scale == 1.0):
            total, part = total * scale, loss * scale
        self._state.differentiate(total, part, scale * scaled_by, self.param_groups)

    def _record(self, loss: Tensor, scaled_by: float) -> Tensor:
        # Called by both of the above, so that a warning points at the line of the user's own that called either.
        check_loss(loss, scaled_by)
        self._state.compare_ranks(loss.device)
        self._state.forget_skipped(self.param_groups)
        return self._state.objective(loss, scaled_by)

    def step(self, closure: Callable[[], Any] | None = None, **options: Any) -> Any:
        """Step the wrapped optimizer, then let the gate choose the phase of the next step.

        Args:
            closure: evaluates the model, calls :meth:`backward` and returns the loss. It runs once, with
                gradients on (LBFGS runs it as often as it needs).
            options: passed to the wrapped optimizer, or to each of several.

        Returns:
            The closure's result, or that of the wrapped optimizer's ``step``.

        Raises:
            FloatingPointError: loss or entropy was not finite for ``max_nonfinite`` steps in a row.
        """
        state = self._state
        reading = state.start_reading() if closure is None else None
        state.within_step = True
        try:
            result = self._step_bases(closure, **options)
        finally:
            state.within_step = False
        if self._skipped_by_scaler():
            self.discard_step()
            return result
        if closure is not None:
            reading = state.start_reading()
        state.forget()
        if reading is None:
            state.note_silence()
            return result
        metrics = state.finish(reading(), self.param_groups)
        notify(self._observers, metrics)
        state.refuse_nonfinite(metrics)
        return result

    def discard_step(self) -> None:
        """Discard what was recorded since the last step, because its gradients were dropped and no step is taken.

        For loops that skip a step, for example after an overflow in half precision.
        """
        self._state.discard()

    def record_validation(self, loss: float | Tensor) -> None:
        """Record a held-out loss, at any cadence; a gate with ``signal="validation"`` judges it at the next step.

        Several before one step are averaged, also over ranks; not every rank needs to record one. A loss that is not
        finite is ignored with a warning.

        Raises:
            TypeError, ValueError: ``loss`` is not one number.
        """
        self._state.record_validation(loss)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """As on the wrapped optimizer."""
        self._wrapped.zero_grad(set_to_none)
        self._state.forget_gradients(self.param_groups)

    # State

    def _own_state(self) -> dict[str, Any]:
        return self._state.state_dict()

    def _check_own_state(self, own: Any) -> tuple[dict[str, Any], str | None]:
        from ._step.saved import checked_state

        return checked_state(own, self._hook.names, self.config)

    def _load_own_state(self, own: dict[str, Any] | None) -> None:
        self._state.load_state_dict(own)

    def __getstate__(self) -> dict[str, Any]:
        # Observers hold files and process groups live in one process: neither goes along.
        own = {"announce": self._state.announce, "own": self._own_state()}
        return {"base": self.base, "hook": self._hook, "config": self.config, **own}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._build(Several(state["base"]), state["hook"], state["config"], None, (), state.get("announce", True))
        self._load_own_state(state["own"])

    def __copy__(self) -> GAPTOptimizer:
        raise TypeError("two optimizers cannot share a hook; use copy.deepcopy((model, optimizer))")

    def __repr__(self) -> str:
        bases = ", ".join(repr(base) for base in self._wrapped.all)
        return f"GAPTOptimizer(phase={self.phase.value!r}, layers={len(self._hook.names)}, {bases})"
