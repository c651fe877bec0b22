"""The step under way: what it does, what was recorded of it, and how the next one is decided."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, SupportsFloat

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .._capture import CaptureStore
from .._objective import build_objective, counted_layers, schedule_shares
from .._plan import StepPlan
from .._tell import tell
from ..metrics import StepMetrics
from .announce import announce_switch
from .evasion import EvasionWatch
from .groups import ZeroedGradients, largest_learning_rate
from .hints import DividedLossHint, FrozenHint, SmallShareHint, ZeroEntropyHint
from .parameter_alignment import Compared, GradientComparison, refuse_incomparable
from .progress import Progress, flat_state
from .ranks import group_of, refuse_different_ranks
from .record import Reading, StepRecord, mean_or_nan
from .report import judged_layers, mean_entropy, step_metrics

if TYPE_CHECKING:
    from ..config import GAPTConfig

_SILENT_STEPS = 10
_UNSTEPPED = 20


class StepState:
    """Everything of the wrapper's own that changes from step to step.

    It is one object that is changed in place: a framework may call some methods of the optimizer on a proxy, which
    shares it.

    Args:
        config: the optimizer's settings.
        store: of the optimizer's hook.
        process_group: ranks to average over; None for all.
        announce: log the first switch to each phase.
    """

    def __init__(
        self,
        config: GAPTConfig,
        store: CaptureStore,
        process_group: dist.ProcessGroup | None,
        *,
        announce: bool = True,
    ) -> None:
        self.config, self.store, self.process_group, self.announce = config, store, process_group, announce
        self.counted = counted_layers(store.names, config.layers.skip_first, config.layers.skip_last)
        self.progress = Progress(config.gate)
        self.record = StepRecord(store.names)
        self.metrics: StepMetrics | None = None
        self._zeroed = ZeroedGradients()
        self._evasion = EvasionWatch()
        self._zero_entropy, self._small_share, self._divided = ZeroEntropyHint(), SmallShareHint(), DividedLossHint()
        self._frozen = FrozenHint()
        self._comparison: GradientComparison | None = None  # from the first backward of a step that compares
        self._mean_entropy: Tensor | None = None  # of the micro-batch whose gradients are compared
        self._silent_steps = 0
        self.within_step = False  # LBFGS evaluates its closure, and zeroes gradients in it, as often as it likes
        self._unstepped = 0  # times in a row that gradients were made and zeroed without a step
        self._warned_uncompared = False
        self._ranks_compared = False
        self.plan = self._next_plan()

    # The plan

    def begin(self) -> None:
        """Make the plan of the next step and have the taps follow it."""
        self._comparison = self._mean_entropy = None
        self.plan = self._next_plan()
        self.store.follow(self.plan)

    def _next_plan(self) -> StepPlan:
        config, counts = self.config, self.progress.counts
        every = config.alignment.parameter_every
        shares = schedule_shares(
            config.layers.schedule, len(self.counted), counts.compression_steps, config.layers.period
        )
        return StepPlan(
            config=config,
            phase=self.progress.phase,
            layers=tuple(self.store.names),
            shares=dict(zip(self.counted, shares, strict=True)),
            parameter_alignment=every > 0 and counts.steps % every == 0,
            group=group_of(self.process_group),  # ranks may have met after the optimizer was made
        )

    def compare_ranks(self, device: torch.device) -> None:
        """Before the first step, and after loading: all ranks have the same settings, layers and state.

        Raises:
            ValueError: on all ranks, where they differ; the message names the field and the values.
        """
        if not self._ranks_compared:
            group = group_of(self.process_group)  # ranks may have met since the plan was made
            if group is not None:
                refuse_different_ranks(flat_state(self.state_dict()), group, device)
            self._ranks_compared = True

    # What a step records

    def objective(self, loss: Tensor, scaled_by: float) -> Tensor:
        """One micro-batch: records it, and returns what to differentiate."""
        calls = self.store.take(loss)
        if not loss.requires_grad:  # the taps have a graph all the same: the entropy alone would train, or nothing
            raise RuntimeError(
                "loss does not require grad, so it would train nothing; give the loss that the forward pass made, not "
                "a copy of it by detach(), item() or torch.tensor(...), and not one computed under torch.no_grad()"
            )
        self._zero_entropy.look(self.plan, calls)
        self._frozen.look(self.plan, calls)
        self._divided.add(loss, scaled_by)
        objective = build_objective(loss, calls, self.plan, scaled_by)
        self._mean_entropy = objective.mean_entropy
        self.record.add(loss if scaled_by == 1.0 else loss.detach() / scaled_by, objective, self.plan.group)
        return objective.total

    def differentiate(self, total: Tensor, loss: Tensor, scale: float | Tensor, groups: list[dict[str, Any]]) -> None:
        """One backward pass of ``total``, and the parameter alignment of the loss and entropy in it when it is due.

        Args:
            total: what is differentiated.
            loss: the loss's part of it.
            scale: factor on the entropy's part.
            groups: the optimizer's parameter groups.
        """
        if self._mean_entropy is None:
            total.backward()  # type: ignore[no-untyped-call]
            return
        if self._comparison is None or not self._comparison.begun:
            self._comparison = GradientComparison(self._compared(groups))
        self._comparison.backward(total, loss, self._mean_entropy * scale)
        self._mean_entropy = None

    def refuse_incomparable(self, groups: list[dict[str, Any]]) -> None:
        """Raises RuntimeError where parameter alignment is wanted and cannot be."""
        if self.config.alignment.parameter_every:
            refuse_incomparable(self._compared(groups))

    def _compared(self, groups: list[dict[str, Any]]) -> Compared:
        model: nn.Module | None = self.store.model()
        return Compared.of(self.plan, model, groups)

    def forget_gradients(self, groups: list[dict[str, Any]]) -> None:
        """Gradients were zeroed: what was compared with them is gone."""
        self._comparison = None
        if self.record.sums is not None:
            self._zeroed.note(groups)

    def forget_skipped(self, groups: list[dict[str, Any]]) -> None:
        """GradScaler does not call ``step`` on an overflow: what was recorded for it went with its gradients."""
        if self._zeroed.untouched(groups) and self.record.sums is not None:
            self.store.clear_statistics()
            self.record.clear()
            self._divided.forget()
            self.begin()
            self._unstepped += not self.within_step
            if self._unstepped == _UNSTEPPED:
                tell(
                    f"{_UNSTEPPED} times in a row gradients were made and zeroed without optimizer.step(): the gate "
                    "does not move. Step this optimizer, not its base: optimizer.step(), or scaler.step(optimizer)"
                )

    def forget(self) -> None:
        """The step is over: what was captured and recorded for it goes."""
        self.store.clear()
        self.store.clear_statistics()
        self.record.clear()

    def discard(self) -> None:
        """No step is taken: what was captured and recorded for it goes, and its plan is made anew."""
        self.forget()
        self._divided.forget()
        self.begin()

    def record_validation(self, loss: float | Tensor) -> None:
        """One held-out loss.

        Raises:
            TypeError, ValueError: it is not one number.
        """
        if isinstance(loss, Tensor):
            if loss.numel() != 1:
                raise ValueError(f"loss must be one number, found shape {tuple(loss.shape)}; give its mean")
            loss = loss.item()
        if not isinstance(loss, SupportsFloat):
            raise TypeError(f"loss must be a number or a tensor of one, found {type(loss).__name__}")
        value = float(loss)
        if math.isfinite(value):
            self.progress.validation.append(value)
        else:
            tell(f"a held-out loss of {value} is left out: the gate cannot judge it")

    # How a step ends

    def start_reading(self) -> Callable[[], Reading] | None:
        """Begin to bring this step's numbers to the host, before the step itself keeps the device busy."""
        sums = self.record.sums
        if sums is None:
            return None
        statistics = self.store.take_statistics(sums.device) if self.plan.activation_alignment else None
        group = group_of(self.process_group)
        return self.record.start_reading(statistics, mean_or_nan(self.progress.validation), group)

    def finish(self, reading: Reading, groups: list[dict[str, Any]]) -> StepMetrics:
        """Let the gate judge the numbers of one step, and plan the next. ``groups`` are the optimizer's."""
        plan, progress = self.plan, self.progress
        judged = judged_layers(self.counted, reading)
        self._silent_steps = self._unstepped = 0
        entropy = mean_entropy(judged, reading)
        reason = progress.advance(reading.loss, entropy, reading.validation, largest_learning_rate(groups))
        compared = self._comparison.finish() if self._comparison is not None else None
        self.begin()
        alignment = compared() if compared is not None else None
        self.metrics = step_metrics(plan, reading, judged, self.counted, progress, reason, alignment)
        if self.announce:
            announce_switch(plan, self.metrics)
        # Last, so that a warning that is made an error leaves a step that is complete.
        self._warn_uncompared(missing=plan.parameter_alignment and compared is None)
        self._evasion.look(plan, reading)
        self._small_share.look(plan, reading)
        self._divided.look()
        return self.metrics

    def refuse_nonfinite(self, metrics: StepMetrics) -> None:
        """Raises FloatingPointError after too many steps in a row that were not finite."""
        run = self.progress.counts.nonfinite_run
        if run >= self.config.objective.max_nonfinite:
            raise FloatingPointError(
                f"loss or entropy was not finite for {run} steps in a row (loss {metrics.loss}, entropy "
                f"{metrics.entropy}); lower the learning rate, or raise ObjectiveConfig.max_nonfinite to go on longer"
            )

    def note_silence(self) -> None:
        """A step without a loss; several in a row are a mistake."""
        self._silent_steps += 1
        if self._silent_steps == _SILENT_STEPS:
            tell(
                f"{_SILENT_STEPS} optimizer steps in a row had no loss: the gate does not move. Call "
                "optimizer.backward(loss) instead of loss.backward(), or differentiate optimizer.objective(loss)"
            )

    def _warn_uncompared(self, *, missing: bool) -> None:
        if missing and not (self._warned_uncompared or self._frozen.told):
            self._warned_uncompared = True
            tell("parameter alignment was due, but only optimizer.backward(loss) measures it, not objective(loss)")

    # What a checkpoint holds

    def state_dict(self) -> dict[str, Any]:
        """Plain values."""
        return {
            **self.progress.state_dict(),
            "evasion": self._evasion.state_dict(),
            "layers": list(self.store.names),
            "ran": sorted(self.store.ran),
            "config": self.config.model_dump(),
        }

    def load_state_dict(self, state: dict[str, Any] | None) -> None:
        """Go on from a checked state, or start fresh."""
        self.progress, self._evasion = Progress(self.config.gate), EvasionWatch()
        if state is not None:
            self.progress.load_state_dict(state)
            self._evasion.load_state_dict(state["evasion"])
        self.store.ran = set() if state is None else set(state["ran"])
        self._ranks_compared = False
        self.discard()
