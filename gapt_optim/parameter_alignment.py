"""Parameter alignment during training: the angle between the gradients of loss and entropy.

A measured step takes one more gradient, that of the mean entropy, and compares it with what the step's own
backward leaves in ``.grad``. That backward is the one of a step that does not measure.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from .alignment import Alignment, dots, parameter_alignment
from .distributed import HostCopy, mean_over_ranks


@dataclass(frozen=True)
class Plan:
    """What a measured step has to know."""

    parameters: dict[str, Tensor]
    """Trainable parameters, by name."""
    layers: list[str]
    weight: float
    """Of the mean entropy in the objective; 0 in memorization."""
    separable: bool
    """The entropy's part of ``.grad`` is ``weight`` times the gradient of the mean entropy. Where it is not
    (another reduction or combination), the loss's own gradient takes one more pass and buffer."""
    streaming: bool
    project: bool
    group: dist.ProcessGroup | None


class ParameterMeasurement:
    """One measured step: its micro-batches' backward passes, then the alignment.

    By default the entropy's gradient is kept, one buffer of the parameters' size, and summed over
    micro-batches. Across ranks the entropy's gradient is averaged as DistributedDataParallel averages ``.grad``.
    With ``streaming`` only one parameter's entropy gradient exists at a time, and the first micro-batch is measured.

    Raises:
        RuntimeError: parameters are sharded, the model is compiled with donated buffers, or streaming is not possible.
    """

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self._entropy: list[Tensor | None] = [None] * len(plan.parameters)
        self._loss: list[Tensor | None] = [None] * len(plan.parameters)
        self._reached: list[tuple[bool, bool]] = []
        self._statistics: HostCopy | None = None
        sharded = [name for name, p in plan.parameters.items() if type(p).__name__ == "DTensor"]
        if sharded:
            raise RuntimeError(
                f'parameter "{sharded[0]}" is sharded (DTensor): FSDP2 gathers it for the forward pass, so its entropy '
                "gradient cannot be taken by itself. Set AlignmentConfig.parameter_every=0; activation alignment works"
            )

    def backward(self, total: Tensor, loss: Tensor, entropy: Tensor) -> None:
        """Differentiate ``total`` into ``.grad``, and measure ``loss`` against ``entropy``, all scaled alike."""
        if self.plan.streaming:
            self._stream(total, entropy)
            return
        _accumulate(self._entropy, self._gradient(entropy))
        if not self.plan.separable:
            _accumulate(self._loss, self._gradient(loss))
        total.backward()  # type: ignore[no-untyped-call]
        parameters = self.plan.parameters.values()
        losses = [self._loss_gradient(i, p.grad) for i, p in enumerate(parameters)] if self.plan.project else None
        rows = []
        self._reached = []
        for i, parameter in enumerate(parameters):
            mine = self._entropy[i]
            shared = None if mine is None else mean_over_ranks(mine, self.plan.group)
            own = losses[i] if losses is not None else self._loss_gradient(i, parameter.grad, shared)
            self._reached.append((own is not None, shared is not None))
            rows.append(dots([own], [shared]))
        statistics = torch.cat([row.to(rows[0]) for row in rows])
        self._statistics = HostCopy(statistics.reshape(-1))
        if losses is not None:
            self._project(losses, statistics)

    def finish(self) -> Callable[[], Alignment] | None:
        """A reader of the alignment, None if no backward was measured."""
        statistics, reached, plan = self._statistics, self._reached, self.plan
        if statistics is None:
            return None

        def read() -> Alignment:
            values = statistics.read()
            rows = [values[i : i + 3] for i in range(0, len(values), 3)]
            return parameter_alignment(list(plan.parameters), reached, rows, plan.layers)

        return read

    def _gradient(self, value: Tensor) -> tuple[Tensor | None, ...]:
        try:
            return torch.autograd.grad(value, list(self.plan.parameters.values()), retain_graph=True, allow_unused=True)
        except RuntimeError as error:
            if "donated" not in str(error):
                raise
            raise RuntimeError(
                "parameter alignment differentiates a compiled model twice, which donated buffers do not allow; set "
                "torch._functorch.config.donated_buffer = False before compiling, or AlignmentConfig.parameter_every=0"
            ) from error

    def _loss_gradient(self, i: int, gradient: Tensor | None, entropy: Tensor | None = None) -> Tensor | None:
        """The loss's part of what the backward left in ``.grad``."""
        if not self.plan.separable:
            return self._loss[i]
        entropy = self._entropy[i] if entropy is None else entropy
        if gradient is None or entropy is None or self.plan.weight == 0:
            return gradient
        return gradient - self.plan.weight * entropy.to(gradient.dtype)

    def _project(self, losses: list[Tensor | None], statistics: Tensor) -> None:
        """Remove from ``.grad`` the part of the entropy gradient that points against the loss gradient."""
        gd, gg, _ = statistics.sum(0).unbind()
        opposing = torch.where(gg > 0, self.plan.weight * gd / gg, 0).clamp(max=0)
        for i, (parameter, own) in enumerate(zip(self.plan.parameters.values(), losses, strict=True)):
            entropy = self._entropy[i]
            if parameter.grad is None or own is None or entropy is None:
                continue
            # Kept in step with .grad, so that the next micro-batch tells the two parts apart.
            parameter.grad.addcmul_(own, -opposing.to(own))
            if self.plan.weight != 0:
                entropy.addcmul_(own.to(entropy), -opposing.to(entropy) / self.plan.weight)

    def _stream(self, total: Tensor, entropy: Tensor) -> None:
        parameters = self.plan.parameters
        if self._statistics is not None:  # later micro-batches: .grad already holds a sum
            total.backward()  # type: ignore[no-untyped-call]
            return
        busy = [name for name, p in parameters.items() if getattr(p, "_post_accumulate_grad_hooks", None)]
        if busy or self.plan.group is not None:
            what = f'parameter "{busy[0]}" has a post-accumulate hook' if busy else "several ranks average gradients"
            raise RuntimeError(
                f"parameter_streaming=True runs a second backward into .grad, but {what}; use parameter_streaming=False"
            )
        total.backward(retain_graph=True)  # type: ignore[no-untyped-call]
        kept = {parameter: parameter.grad for parameter in parameters.values()}
        rows: dict[Tensor, Tensor] = {}

        def compare(parameter: Tensor) -> None:
            mine, gradient = parameter.grad, kept[parameter]
            if gradient is not None and mine is not None:
                own = gradient if self.plan.weight == 0 else gradient - self.plan.weight * mine.to(gradient.dtype)
                rows[parameter] = dots([own], [mine])
            else:
                rows[parameter] = torch.zeros(1, 3, device=parameter.device)
            parameter.grad = None

        handles: list[RemovableHandle] = []
        try:
            for parameter in parameters.values():
                parameter.grad = None
                handles.append(parameter.register_post_accumulate_grad_hook(compare))  # type: ignore[no-untyped-call]
            entropy.backward(inputs=list(parameters.values()))  # type: ignore[no-untyped-call]
        finally:
            for handle in handles:
                handle.remove()
            for parameter, gradient in kept.items():
                parameter.grad = gradient
        self._reached = [(kept[p] is not None, p in rows) for p in parameters.values()]
        device = next(iter(rows.values())).device if rows else torch.device("cpu")
        table = [rows.get(p, torch.zeros(1, 3)).to(device=device, dtype=torch.float64) for p in parameters.values()]
        self._statistics = HostCopy(torch.cat(table).reshape(-1))


def _accumulate(sums: list[Tensor | None], gradients: tuple[Tensor | None, ...]) -> None:
    for i, gradient in enumerate(gradients):
        held = sums[i]
        sums[i] = gradient if held is None else held if gradient is None else held.add_(gradient)
