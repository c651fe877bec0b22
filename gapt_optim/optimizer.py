"""The wrapper: one training step, from the loss to the phase of the next step."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import Any, SupportsFloat

import torch
import torch.distributed as dist
from torch import Tensor
from torch.optim import Optimizer

from ._tell import tell
from .config import GAPTConfig
from .gate import Phase
from .hook import RepresentationHook
from .metrics import Observer, StepMetrics
from .notices import tell_of_another_model
from .objective import check_loss
from .progress import checked_state
from .several import OptimizerWrapper, Several
from .step import Step
from .sums import StepNumbers


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
        several = Several(optimizer)
        if any(isinstance(base, GAPTOptimizer) for base in several.all):
            raise TypeError("optimizer is a GAPTOptimizer already; wrap its .base, with one hook for all layers")
        if not isinstance(observers, Sequence) or not all(map(callable, observers)):
            raise TypeError(f"observers must be a sequence of callables, found {observers!r}")
        if hook.removed:
            raise ValueError("hook was removed; make a new RepresentationHook")
        if hook.watching.plan is not None:
            raise ValueError("hook already serves another GAPTOptimizer; make a second RepresentationHook on the model")
        config = config if config is not None else GAPTConfig()
        self._build(several, hook, config, process_group, observers)
        tell_of_another_model(hook.watching.model(), self.param_groups, several.all)

    def _build(
        self,
        several: Several,
        hook: RepresentationHook,
        config: GAPTConfig,
        process_group: dist.ProcessGroup | None,
        observers: Sequence[Observer],
    ) -> None:
        self._wrap(several)
        self._config, self._hook, self._observers = config, hook, list(observers)
        watching = hook.watching
        try:
            self._step = Step(config, watching, several, process_group)
            self._step.refuse_incomparable()
        except BaseException:
            watching.release()
            raise
        watching.entropy = config.entropy
        weakref.finalize(self, watching.release)  # a hook outlives its optimizer; what it captures then would be kept

    @property
    def phase(self) -> Phase:
        """Phase of the current step."""
        return self._step.progress.phase

    @property
    def metrics(self) -> StepMetrics | None:
        """Metrics of the last step, None before the first."""
        return self._step.metrics

    @property
    def config(self) -> GAPTConfig:
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
            RuntimeError: in compression, no watched module ran for this loss; the message says why. Or the loss does
                not require grad.
        """
        return self._record(loss, scaled_by)

    def backward(
        self, loss: Tensor, *, scale: float | Tensor = 1.0, scaled_by: float = 1.0, **backward_options: Any
    ) -> None:
        """``(objective(loss) * scale).backward(**backward_options)``.

        Args:
            loss, scaled_by: as for :meth:`objective`.
            scale: factor on what is differentiated, such as 1 / micro-batches. With a GradScaler, use
                ``scaler.scale(optimizer.objective(loss)).backward()`` instead.
            backward_options: of ``Tensor.backward``, such as ``retain_graph``, ``create_graph`` and ``inputs``.
        """
        if not isinstance(scale, (int, float, Tensor, SupportsFloat)):
            raise TypeError(f"scale must be a number or a tensor of one, found {type(scale).__name__}")
        if isinstance(scale, (int, float)) and not scale > 0:  # nor nan
            raise ValueError(f"scale must be above 0, found {scale}; it multiplies the loss and the entropy")
        total, part = self._record(loss, scaled_by), loss
        if not (isinstance(scale, float) and scale == 1.0):
            total, part = total * scale, loss * scale
        self._step.differentiate(total, part, scale * scaled_by, backward_options)

    def _record(self, loss: Tensor, scaled_by: float) -> Tensor:
        # Called by both of the above, so that a warning points at the line of the user's own that called either.
        check_loss(loss, scaled_by)
        self._step.forget_dropped(loss)
        total = self._step.objective(loss, scaled_by)
        self._step.note_gradients()  # whether a backward left anything shows by what they are then
        return total

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
            ValueError: ranks differ in settings, layers or state.
        """
        step = self._step
        if self._join_config is not None and self._join_config.enable:
            from torch.distributed.algorithms.join import Join

            Join.notify_join_context(self)  # type: ignore[arg-type]
        step.meet_ranks()
        reading = None
        if closure is None:
            step.look_at_gradients()
            reading = step.start_reading()
        step.within_step = True
        try:
            result = self._step_bases(closure, **options)
        finally:
            step.within_step = False
        if self._skipped_by_scaler():
            self.discard_step()
            return result
        if closure is not None:
            reading = step.start_reading()
        self._finish(reading)
        return result

    def _begin_reading(self) -> Callable[[], StepNumbers] | None:
        """Compare ranks if that is due, and begin to sum over them."""
        self._step.meet_ranks()
        return self._step.start_reading()

    def _finish(self, reading: Callable[[], StepNumbers] | None) -> None:
        """Let the gate judge a step, and plan the next."""
        step = self._step
        step.forget()
        numbers = None if reading is None else reading()
        if numbers is None or not numbers.micro_batches:
            step.note_silence()
            return
        metrics = step.finish(numbers)
        self._notify(metrics)
        step.refuse_nonfinite(metrics)

    # Engines and pipelines: gapt_optim.integrations connects them

    def stepped_elsewhere(self) -> Callable[[Callable[[], bool]], None]:
        """An engine steps the wrapped optimizer itself, and keeps gradients to itself.

        Returns:
            What to call in place of each step, with a function that takes it and says whether it did: then the gate
            judges it. A step that was left out is discarded.
        """
        self._step.gradients.shown = False

        def judged(take: Callable[[], bool]) -> None:
            reading = self._begin_reading()
            if take():
                self._finish(reading)
            else:
                self.discard_step()

        return judged

    def join_stages(self, names: Sequence[str], ranks: int) -> None:
        """This rank has some stages of a pipeline over ``ranks``; ``names`` are the layers of all, in their order."""
        self._step.join_stages(list(names), ranks)

    def press_stage(self, output: Tensor) -> Tensor | None:
        """An earlier stage of a pipeline made ``output``: record its entropies.

        Returns:
            A scalar to differentiate with the output, or None where this step presses nothing.
        """
        return self._step.press_stage(output)

    # Ranks whose data ends before that of others: ``with Join([model, optimizer]):`` of torch.distributed

    _join_config: Any = None

    @property
    def join_device(self) -> torch.device:
        """Where ranks meet."""
        return self._step.device()

    @property
    def join_process_group(self) -> Any:
        """The ranks that meet."""
        return self._step.process_group if self._step.process_group is not None else dist.group.WORLD

    def join_hook(self, **kwargs: Any) -> _Follows:
        """What a rank does in the steps of others, once its own data has ended: it follows the gate."""
        return _Follows(self, [base.join_hook(**kwargs) for base in self._several.all if hasattr(base, "join_hook")])

    def _notify(self, metrics: StepMetrics) -> None:
        """Call each observer; one that raises is dropped with a warning."""
        for observer in list(self._observers):
            try:
                observer(metrics)
            except Exception as error:  # a full disk must not end a training run
                self._observers.remove(observer)
                tell(f"observer {type(observer).__name__} raised {type(error).__name__}: {error}; it is dropped")

    def discard_step(self) -> None:
        """Discard what was recorded since the last step, because its gradients were dropped and no step is taken.

        For loops that skip a step, for example after an overflow in half precision.
        """
        self._step.discard()
        self._step.watching.clear()

    def record_validation(self, loss: float | Tensor) -> None:
        """Record a held-out loss, at any cadence; a gate with ``signal="validation"`` judges it at the next step.

        Several before one step are averaged, also over ranks; not every rank needs to record one. A loss that is not
        finite is ignored with a warning.

        Raises:
            TypeError, ValueError: ``loss`` is not one number.
        """
        self._step.record_validation(loss)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """As on the wrapped optimizer."""
        self._several.zero_grad(set_to_none)
        self._step.forget_gradients()

    # State

    def _own_state(self) -> dict[str, Any]:
        return self._step.state_dict()

    def _check_own_state(self, own: Any) -> tuple[dict[str, Any], str | None]:
        if not self._hook.names and isinstance(own, dict) and own.get("layers"):  # layers=None waits for a forward pass
            self._hook.choose(own["layers"])
        return checked_state(own, self._step.names or self._hook.names, self.config)

    def _load_own_state(self, own: dict[str, Any] | None) -> None:
        self._step.load_state_dict(own)

    def __getstate__(self) -> dict[str, Any]:
        # Observers hold files and process groups live in one process: neither goes along.
        return {"base": self.base, "hook": self._hook, "config": self.config, "own": self._own_state()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._build(Several(state["base"]), state["hook"], state["config"], None, ())
        self._load_own_state(state["own"])

    def __copy__(self) -> GAPTOptimizer:
        raise TypeError("two optimizers cannot share a hook; use copy.deepcopy((model, optimizer))")

    def __repr__(self) -> str:
        bases = ", ".join(repr(base) for base in self._several.all)
        return f"GAPTOptimizer(phase={self.phase.value!r}, layers={len(self._hook.names)}, {bases})"


class _Follows:
    """A ``JoinHook``: takes part in the collectives of a step of the other ranks."""

    def __init__(self, optimizer: GAPTOptimizer, of_bases: list[Any]) -> None:
        self.optimizer, self.of_bases = optimizer, of_bases

    def main_hook(self) -> None:
        reading = self.optimizer._begin_reading()
        for hook in self.of_bases:
            hook.main_hook()
        self.optimizer._finish(reading)

    def post_hook(self, is_last_joiner: bool) -> None:
        for hook in self.of_bases:
            hook.post_hook(is_last_joiner)
