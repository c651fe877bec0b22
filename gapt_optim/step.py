"""The step under way: what it does, what was recorded of it, and how the next one is decided."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from typing import Any, SupportsFloat

import torch
import torch.distributed as dist
from torch import Tensor

from .alignment import activation_alignment, sharded
from .comparison import GradientComparison, named_parameters, refuse_incomparable
from .config import GAPTConfig
from .entropy import order_of
from .gate import REASONS, Phase
from .gradients import Gradients, Groups
from .metrics import Measures, StepMetrics
from .notices import Notices
from .objective import build_objective, counted_layers
from .passes import Capture
from .plan import Plan
from .progress import Progress, flat_state
from .ranks import group_of, meeting_device, refuse_different_ranks
from .several import Several
from .shards import plain
from .sums import StepNumbers, StepSums
from .undeclared import Undeclared
from .watching import Watching

_LOGGER = logging.getLogger("gapt_optim")


class Step:
    """Everything of the wrapper's own that changes from step to step.

    It is one object that is changed in place: a framework may call some methods of the optimizer on a proxy, which
    shares it.

    Args:
        config: the optimizer's settings.
        watching: of the optimizer's hook.
        several: what is wrapped.
        process_group: ranks to average over; None for all.
    """

    def __init__(
        self, config: GAPTConfig, watching: Watching, several: Several, process_group: dist.ProcessGroup | None
    ) -> None:
        self.config, self.watching, self._several, self.process_group = config, watching, several, process_group
        self.progress = Progress(config)
        self.metrics: StepMetrics | None = None
        self.within_step = False
        """LBFGS evaluates its closure, and zeroes gradients in it, as often as it likes."""
        self._undeclared = Undeclared()
        self._of_stages: list[str] | None = None
        self._stages = 1
        self._order = order_of(config.entropy)
        self._know_layers()
        self._notices = Notices()
        self._comparison: GradientComparison | None = None  # from the first backward of a step that compares
        self._mean_entropy: Tensor | None = None  # of the micro-batch whose gradients are compared
        self._uncompared = False  # this rank had losses in this step, and gave none to backward()
        self.gradients = Gradients()
        """As the last loss found them."""
        self._ranks_compared = False
        self.begin()

    def _know_layers(self) -> None:
        """Which layers there are: with ``layers=None``, the first forward pass may choose them."""
        layers = self.config.layers
        self.names = list(self.watching.watches) if self._of_stages is None else self._of_stages
        self.counted = counted_layers(self.names, layers.skip_first, layers.skip_last)
        self.sums = StepSums(self.names)

    def join_stages(self, names: list[str], ranks: int) -> None:
        """This rank has some stages of a pipeline over ``ranks``; ``names`` are the layers of all of them."""
        self._of_stages, self._stages = names, ranks
        self.gradients.shown = False  # a schedule runs forward passes ahead of backward passes
        self._know_layers()
        self.begin()

    # What this step does

    def begin(self) -> None:
        """Decide what the next step does."""
        config, counts = self.config, self.progress.counts
        every, parameter_every = config.alignment.every, config.alignment.parameter_every
        self._comparison = self._mean_entropy = None
        self.group = group_of(self.process_group)  # ranks may have met after the optimizer was made
        self.watching.digest = self._undeclared.wanted and self.group is not None
        compressing = self.progress.phase is Phase.COMPRESSION
        started = counts.steps >= config.objective.start
        pressed, compared = compressing and started, _is_due(counts.steps + 1, parameter_every)
        turn = self.counted
        if config.layers.schedule == "rotate" and self.counted:
            turn = (self.counted[counts.compression_steps % len(self.counted)],)
        self.plan = Plan(
            config,
            self._order,
            counted=self.counted,
            layers=turn,
            pressed=pressed,
            compared=compared,
            differentiated=pressed or compared,
            due=_is_due(counts.steps + 1, every),
            angles=every > 0,
            targets=self._targets(),
            among=None if self._of_stages is None else len(turn),
        )
        self.watching.plan = self.plan

    def _targets(self) -> dict[str, float] | None:
        target = self.config.objective.target
        return self.progress.targets if target is None else dict.fromkeys(self.counted, target)

    # What a step records

    def objective(self, loss: Tensor, scaled_by: float) -> Tensor:
        """One micro-batch: records it, and returns what to differentiate."""
        loss = plain(loss)
        if not loss.requires_grad:  # the captures have a graph all the same: the entropy alone would train, or nothing
            if self.watching.why_not:
                raise RuntimeError(self.watching.why_nothing(loss))
            raise RuntimeError(
                "loss does not require grad, so it would train nothing; give the loss that the forward pass made, not "
                "a copy of it by detach(), item() or torch.tensor(...), and not one computed under torch.no_grad()"
            )
        # A torch without CUDA cannot be asked.
        on_gpu = not torch.compiler.is_compiling() and torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
        if on_gpu and torch.cuda.is_current_stream_capturing():
            self._captured()
            return loss
        if self.plan.due and not self.sums.micro_batches:  # what a backward of something else left
            self.watching.clear_angles()
        if not self.names and self.watching.watches:  # chosen in this forward pass, which captured nothing
            self._know_layers()
            self.begin()
            taken: dict[str, list[Capture]] = {}
        else:
            taken = self.watching.take(loss)
            if not taken and self.watching.had_a_loss(loss):
                self._another_loss(loss, scaled_by)
                return loss
            if not taken:
                self._nothing_taken(loss)
        self._notices.no_entropy(taken, center=self.config.entropy.center)
        if self.plan.differentiated:
            self._notices.no_gradient(taken, self.counted)
        self._notices.divided(loss, scaled_by)
        objective = build_objective(loss, taken, self.plan, scaled_by)
        self._mean_entropy = objective.mean_entropy
        if self._undeclared.wanted and self.group is not None:
            self._undeclared.note(loss, scaled_by, objective, self.watching)
        undivided = loss if scaled_by == 1.0 else loss.detach() / scaled_by
        self.sums.add(undivided, objective, alone=self.group is None)
        return objective.total

    def press_stage(self, output: Tensor) -> Tensor | None:
        """An earlier stage of a pipeline gave ``output``: record its entropies, and return what presses them."""
        taken = self.watching.take(output)
        if not taken:
            return None
        nothing = torch.zeros((), device=output.device)
        objective = build_objective(nothing, taken, self.plan, 1.0)
        self.sums.add(nothing, objective, alone=False, micro_batches=0)
        return objective.total if objective.total.requires_grad else None

    def _captured(self) -> None:
        """A CUDA graph records the step, and plays it without us."""
        problem = (
            "this step is captured into a CUDA graph, whose replays run no Python: no loss would be judged, and the "
            "phase would never change. Capture the forward and backward pass of a part of the model, and leave "
            "objective(loss) and step() outside"
        )
        if self.plan.pressed:
            raise RuntimeError(problem)
        self._notices.once("captured", f"{problem}. Until then the gate stays")

    def _another_loss(self, loss: Tensor, scaled_by: float) -> None:
        """A further loss of a pass, whose entropies went with the first one: it adds to that loss."""
        self._notices.once(
            "another loss",
            "a forward pass has several losses: its entropies go with the first one, and the gate judges their sum. "
            "Together they are cheaper: optimizer.backward(first + second)",
        )
        self.sums.add_loss(loss if scaled_by == 1.0 else loss.detach() / scaled_by, alone=self.group is None)

    def _nothing_taken(self, loss: Tensor) -> None:
        """No watched module ran for this loss."""
        why = self.watching.why_nothing(loss)
        if self.plan.pressed:
            raise RuntimeError(why)
        if self.watching.unread and self.watching.unread == set(self.watching.watches):  # which was told
            return
        self._notices.once("nothing", f"{why}. Until then nothing is known of entropies, and the gate stays")

    def differentiate(self, total: Tensor, loss: Tensor, scale: float | Tensor, options: dict[str, Any]) -> None:
        """One backward pass of ``total``, and the parameter alignment of the loss and entropy in it when it is due.

        Args:
            total: what is differentiated.
            loss: the loss's part of it.
            scale: factor on the entropy's part.
            options: of ``Tensor.backward``.
        """
        mean_entropy, self._mean_entropy = self._mean_entropy, None
        if mean_entropy is None or not mean_entropy.requires_grad:
            total.backward(**options)  # type: ignore[no-untyped-call]
            return
        if self._comparison is None or not self._comparison.begun:
            parameters = self._parameters()
            self._comparison = GradientComparison(parameters, self.names, self._weight(), self.group)
        with self.watching.without_angles():
            self._comparison.before(loss, mean_entropy * scale)
        total.backward(**options)  # type: ignore[no-untyped-call]
        self._comparison.after()

    def _weight(self) -> float | None:
        """Of the mean entropy's gradient in what is differentiated; None where that is no multiple of it."""
        config = self.config
        if not self.plan.pressed:
            return 0.0
        if self.plan.targets is not None or config.layers.reduce != "mean" or config.layers.schedule != "all":
            return None
        return config.objective.weight if config.objective.direction == "down" else -config.objective.weight

    def _parameters(self) -> dict[str, Tensor]:
        return named_parameters(self.watching.model(), self._several.param_groups)

    def refuse_incomparable(self) -> None:
        """Raises RuntimeError where parameter alignment is wanted and cannot be."""
        if self.config.alignment.parameter_every:
            refuse_incomparable(self._parameters())

    def forget_dropped(self, loss: Tensor) -> None:
        """Losses whose gradients are gone, or never came, are of no step: a scaler's overflow, an exception.

        But ``loss`` may be a further one of the same pass, before any backward.
        """
        if self._dropped() and not self.watching.had_a_loss(loss):
            self.discard()
            if not self.within_step:
                self._notices.unstepped()

    def _dropped(self) -> bool:
        return self.sums.micro_batches > 0 and self.gradients.unchanged(self._several.param_groups)

    def look_at_gradients(self) -> None:
        """At a step: where its losses left nothing in ``.grad``, that tells nothing of later ones."""
        if self._dropped():
            self.gradients.shown = False

    def note_gradients(self) -> None:
        """What a backward adds to ``.grad`` from now on is of the losses so far."""
        self.gradients.note(self._several.param_groups)

    def forget_gradients(self) -> None:
        """Gradients were zeroed: what was compared with them is gone."""
        self._comparison = None
        if self.sums.micro_batches:
            self.note_gradients()

    def forget(self) -> None:
        """The step is over: what was captured and recorded for it goes."""
        self.watching.clear()
        self.sums.clear()
        self.gradients.forget()

    def discard(self) -> None:
        """No step is taken: what was recorded for it goes, and its plan is made anew."""
        self.sums.clear()
        self.watching.clear_angles()
        self.gradients.forget()
        self._notices.forget_losses()
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
            self.progress.counts.unjudged_validation.append(value)
        else:
            self._notices.once("validation", f"a held-out loss of {value} is left out: the gate cannot judge it")

    # How a step ends

    def device(self) -> torch.device:
        """Where ranks meet: that of the parameters, if they can meet there."""
        parameters = (p for group in self._several.param_groups for p in group["params"])
        return meeting_device(self.group, next((p.device for p in parameters), torch.device("cpu")))

    def meet_ranks(self) -> None:
        """Before the first step, and after loading: all ranks have the same settings, layers and state. At the first
        steps over ranks, what they have is what they seem to have.

        Raises:
            ValueError: on all ranks, where they differ; the message names the field and the values. Or hidden tensors
                are parts that nobody declared, or the loss is a share.
        """
        if not self._ranks_compared:
            self.group = group_of(self.process_group)  # ranks may have met after the step began
            if self.group is not None:
                refuse_different_ranks(flat_state(self.state_dict()), self.group, self.device())
            self._ranks_compared = True
        if self._undeclared.wanted:
            if self.group is not None:
                self._undeclared.refuse(self.names, self.group, self.device())
            else:
                self._undeclared.wanted = False
            self.watching.digest = self._undeclared.wanted

    def start_reading(self) -> Callable[[], StepNumbers] | None:
        """Begin to bring this step's numbers to the host, before the step itself keeps the device busy."""
        if self.group is None and not self.sums.micro_batches:
            return None
        if self.plan.compared:
            begun = self._comparison is not None and self._comparison.begun
            self._uncompared = self.sums.micro_batches > 0 and not begun
            if self.group is not None and self._of_stages is None:
                self._compare_over_ranks()
        device = self.device()
        angles = self._angles(device) if self.plan.due else None
        return self.sums.start_reading(angles, self.progress.counts.unjudged_validation, device, self.group)

    def _compare_over_ranks(self) -> None:
        """One collective on every rank, whether or not it compared a backward of its own."""
        parameters = self._parameters()
        if not parameters or sharded(parameters) is not None:
            return
        comparison = self._comparison
        if comparison is None:
            comparison = GradientComparison(parameters, self.names, self._weight(), self.group)
        comparison.meet()

    def _angles(self, device: torch.device) -> Tensor:
        """(layers, 3), also of those that stages on other ranks have."""
        taken = self.watching.take_angles(device)
        if self._of_stages is None:
            return taken
        # g is divided by the number of all ranks, of which each has one stage of its own pipeline.
        factors = torch.tensor([[self._stages, self._stages**2, 1.0]]).to(taken)
        found = torch.zeros(len(self.names), 3, dtype=taken.dtype, device=device)
        found[[self.names.index(name) for name in self.watching.watches]] = taken * factors
        return found

    def finish(self, numbers: StepNumbers) -> StepMetrics:
        """Let the gate judge the numbers of one step, and plan the next."""
        progress, counts, phase, plan = self.progress, self.progress.counts, self.progress.phase, self.plan
        judged = [name for name in self.counted if name in numbers.entropies] or list(numbers.entropies)
        entropy = math.fsum(numbers.entropies[name] for name in judged) / len(judged) if judged else None
        compared = self._comparison.finish() if self._comparison is not None else None
        learning_rate = largest_learning_rate(self._several.param_groups)
        reason = progress.advance(numbers.loss, entropy, numbers.entropies, numbers.validation, learning_rate)
        self.begin()
        measured = [numbers.measures[name] for name in judged if name in numbers.measures]
        whole = abs(numbers.loss) + abs(numbers.penalty)
        self.metrics = StepMetrics(
            step=counts.steps,
            phase=phase.value,
            next_phase=progress.phase.value,
            reason=reason,
            loss=numbers.loss,
            entropy=entropy,
            layer_entropy=numbers.entropies,
            measures=Measures.mean(measured) if measured else None,
            layer_measures=numbers.measures,
            entropy_share=abs(numbers.penalty) / whole if phase is Phase.COMPRESSION and whole else None,
            alignment=activation_alignment(
                list(numbers.angles), list(numbers.angles.values()), [n for n in self.counted if n in numbers.angles]
            )
            if plan.due and numbers.angles
            else None,
            parameter_alignment=compared() if compared is not None else None,
            validation_loss=None if math.isnan(numbers.validation) else numbers.validation,
            switches=progress.gate.switches,
            compression_steps=counts.compression_steps,
            nonfinite_steps=counts.nonfinite_steps,
        )
        self._tell(numbers, self.metrics, plan)
        return self.metrics

    def _tell(self, numbers: StepNumbers, metrics: StepMetrics, plan: Plan) -> None:
        """What is said at the end of a step, so that a warning that is made an error leaves a step that is complete."""
        if metrics.reason is not None and (self.group is None or dist.get_rank(self.group) == 0):
            _LOGGER.info(
                "step %d: %s ends, as %s (loss %.4g, entropy %.4g); %s begins",
                metrics.step, metrics.phase, REASONS[metrics.reason], metrics.loss, metrics.entropy, metrics.next_phase,
            )  # fmt: skip
        if plan.compared and self._uncompared and numbers.ran and not self._notices.said("frozen"):
            self._notices.once(
                "uncompared",
                "parameter alignment was due, but only optimizer.backward(loss) measures it, not objective(loss)",
            )
        objective = self.config.objective
        floor = objective.direction == "up" and (objective.target, objective.target_share) != (None, None)
        if plan.pressed and not floor:  # a floor presses little as long as little has fallen under it
            self._notices.small_share(numbers.loss, numbers.penalty, objective.weight)
        watched = {name: watch.module() for name, watch in self.watching.watches.items()}
        self._notices.unused(self.watching.passes.unused())
        self._notices.absent(numbers.ran, self.names, self.watching.model(), watched)
        self._notices.empty(numbers.ran, numbers.entropies)
        if self.config.entropy.center:
            self._notices.alike(numbers.measures, numbers.entropies)
        self._notices.stepped()

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
        self._notices.silent()

    # What a checkpoint holds

    def state_dict(self) -> dict[str, Any]:
        """Plain values."""
        return {**self.progress.state_dict(), "layers": self.names, "config": self.config.model_dump()}

    def load_state_dict(self, state: dict[str, Any] | None) -> None:
        """Go on from a checked state, or start fresh."""
        self.progress = Progress(self.config)
        if state is not None:
            self.progress.load_state_dict(state)
        self._ranks_compared = False
        self._know_layers()
        self.forget()
        self.discard()


def _is_due(step: int, every: int) -> bool:
    """At the first step, and at multiples of ``every``, so that a log which is written at these has the value."""
    return every > 0 and (step == 1 or step % every == 0)


def largest_learning_rate(groups: Groups) -> float | None:
    """None where no group has one that is known here: a tensor on a device would have to be waited for."""
    known = [
        float(lr)
        for lr in (group.get("lr") for group in groups)
        if isinstance(lr, int | float) or (isinstance(lr, Tensor) and lr.numel() == 1 and lr.device.type == "cpu")
    ]
    return max((lr for lr in known if math.isfinite(lr)), default=None)
