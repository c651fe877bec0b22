"""Parameter alignment during training: the angle between the gradients of loss and entropy.

A step that compares takes one more gradient, that of the mean entropy, and compares it with what the step's own
backward leaves in ``.grad``. That backward is the one of any other step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .._capture import nodes_behind
from .._plan import StepPlan
from ..alignment import Alignment, dot, parameter_alignment, refuse_sharded, stacked
from .ranks import HostCopy, mean_over_ranks


@dataclass(frozen=True)
class Compared:
    """What a comparison is of."""

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

    @classmethod
    def of(cls, plan: StepPlan, model: nn.Module | None, groups: list[dict[str, Any]]) -> Compared:
        """For the step that ``plan`` describes, of ``model`` and an optimizer's parameter groups."""
        config = plan.config
        weight = config.objective.weight if plan.compressing else 0.0
        return cls(
            parameters=named_parameters(model, groups),
            layers=list(plan.layers),
            weight=weight,
            separable=config.plain_objective or not plan.compressing,
            streaming=config.alignment.parameter_streaming,
            project=config.alignment.project_parameters and weight > 0,
            group=plan.group,
        )


class GradientComparison:
    """The comparison of one step: its micro-batches' backward passes, then the alignment.

    By default the entropy's gradient is kept, one buffer of the parameters' size, and summed over
    micro-batches. Across ranks it is averaged as DistributedDataParallel averages ``.grad``.
    With ``streaming`` only one parameter's entropy gradient exists at a time, and the first micro-batch is compared.

    Raises:
        RuntimeError: parameters are sharded, the model is compiled with donated buffers, or streaming is not possible.
    """

    def __init__(self, compared: Compared) -> None:
        refuse_incomparable(compared)  # parameters may have been sharded or hooked since the last comparison
        self.compared = compared
        self._parameters = list(compared.parameters.values())
        n = len(self._parameters)
        self._entropy: list[Tensor | None] = [None] * n
        self._loss: list[Tensor | None] = [None] * n
        self._behind_loss = [False] * n
        self._reached: list[tuple[bool, bool]] = []
        self._statistics: HostCopy | None = None

    @property
    def begun(self) -> bool:
        """A backward was compared, and its gradients are still in ``.grad``."""
        return self._statistics is not None and any(p.grad is not None for p in self._parameters)

    def backward(self, total: Tensor, loss: Tensor, entropy: Tensor) -> None:
        """Differentiate ``total`` into ``.grad``, and compare ``loss`` with ``entropy``, all scaled alike."""
        if self.compared.streaming:
            self._stream(total, loss, entropy)
            return
        self._add_gradient(entropy, self._entropy)
        if not self.compared.separable:
            self._add_gradient(loss, self._loss)
        self._note_parameters_of(loss)
        total.backward()  # type: ignore[no-untyped-call]
        self._average_over_ranks()
        statistics = self._compare([self._row(i) for i in range(len(self._parameters))])
        if self.compared.project:
            self._project(statistics)

    def finish(self) -> Callable[[], Alignment] | None:
        """A reader of the alignment, None if no backward was compared."""
        statistics, reached, compared = self._statistics, self._reached, self.compared
        if statistics is None:
            return None

        def read() -> Alignment:
            values = statistics.read()
            rows = [values[i : i + 3] for i in range(0, len(values), 3)]
            return parameter_alignment(list(compared.parameters), reached, rows, compared.layers)

        return read

    def _add_gradient(self, value: Tensor, sums: list[Tensor | None]) -> None:
        def add(i: int, gradient: Tensor) -> None:
            held = sums[i]
            # Not in place: autograd may give one tensor to several parameters.
            sums[i] = gradient if held is None else held + gradient

        self._visit_gradients(value, add, retain_graph=True)

    def _visit_gradients(self, value: Tensor, visit: Callable[[int, Tensor], None], *, retain_graph: bool) -> None:
        """Call ``visit`` with each parameter's gradient of ``value``, as it comes; autograd keeps none of them."""

        def hook(i: int) -> Callable[[Tensor | None], Tensor | None]:
            def seen(gradient: Tensor | None) -> Tensor | None:
                if gradient is None:  # autograd came by without one
                    return None
                visit(i, gradient.detach())
                # What autograd collects in its place takes no memory.
                return None if gradient.is_sparse else gradient.new_zeros(()).expand_as(gradient)

            return seen

        handles = [p.register_hook(hook(i)) for i, p in enumerate(self._parameters)]  # type: ignore[no-untyped-call]
        try:
            with _donated_buffers_explained():
                torch.autograd.grad(value, self._parameters, retain_graph=retain_graph, allow_unused=True)
        finally:
            for handle in handles:
                handle.remove()

    def _note_parameters_of(self, loss: Tensor) -> None:
        """Which parameters the loss depends on. In compression ``.grad`` does not tell: it is the entropy's too."""
        leaves = {getattr(node, "variable", None) for node in nodes_behind(loss)}
        self._behind_loss = [noted or p in leaves for noted, p in zip(self._behind_loss, self._parameters, strict=True)]

    def _average_over_ranks(self) -> None:
        """In place. A mean that is averaged again stays what it is, so later micro-batches add to it."""
        group = self.compared.group
        if group is None:
            return
        # A parameter may be out of reach on some of the ranks.
        both = (self._entropy, self._loss)
        flags = [[g is not None for g in gradients] for gradients in both] + [self._behind_loss]
        here = torch.tensor(flags, dtype=torch.float32, device=self._parameters[0].device)
        *anywhere, self._behind_loss = (mean_over_ranks(here, group) > 0).tolist()
        for gradients, reached in zip(both, anywhere, strict=True):
            for i in [i for i, flag in enumerate(reached) if flag]:
                gradient = gradients[i]
                dense = torch.zeros_like(self._parameters[i]) if gradient is None else gradient.to_dense()
                gradients[i] = mean_over_ranks(dense, group)

    def _own(self, i: int) -> Tensor | None:
        """The loss's part of what the backward left in ``.grad``."""
        return (
            self._loss[i] if not self.compared.separable else self._without(self._parameters[i].grad, self._entropy[i])
        )

    def _without(self, gradient: Tensor | None, entropy: Tensor | None) -> Tensor | None:
        if gradient is None or entropy is None or self.compared.weight == 0:
            return gradient
        dtype = torch.promote_types(gradient.dtype, torch.float32)
        return torch.sub(gradient.to_dense().to(dtype), entropy.to_dense(), alpha=self.compared.weight)

    def _row(self, i: int) -> tuple[bool, bool, Tensor | None]:
        own, entropy = self._own(i) if self._behind_loss[i] else None, self._entropy[i]
        row = None if own is None or entropy is None else dot(own, entropy)
        return own is not None, entropy is not None, row

    def _compare(self, rows: list[tuple[bool, bool, Tensor | None]]) -> Tensor:
        self._reached = [(by_loss, by_entropy) for by_loss, by_entropy, _ in rows]
        statistics = stacked([row for *_, row in rows])
        self._statistics = HostCopy(statistics.reshape(-1))
        return statistics

    def _project(self, statistics: Tensor) -> None:
        """Remove from ``.grad`` the part of the entropy gradient that points against the loss gradient."""
        gd, gg, _ = statistics.sum(0).unbind()
        removed = -torch.where(gg > 0, self.compared.weight * gd / gg, 0).clamp(max=0)
        for i, parameter in enumerate(self._parameters):
            own, entropy = self._own(i) if self._behind_loss[i] else None, self._entropy[i]
            if parameter.grad is None or own is None or entropy is None:
                continue
            # Kept in step with .grad, so that the next micro-batch tells the two parts apart.
            self._entropy[i] = entropy + (own * (removed / self.compared.weight).to(own)).to(entropy.dtype)
            parameter.grad.add_(own.mul_(removed.to(own)))

    def _stream(self, total: Tensor, loss: Tensor, entropy: Tensor) -> None:
        if self._statistics is not None:  # later micro-batches: .grad already holds a sum
            total.backward()  # type: ignore[no-untyped-call]
            return
        self._note_parameters_of(loss)
        with _donated_buffers_explained():
            total.backward(retain_graph=True)  # type: ignore[no-untyped-call]
        rows = [self._row(i) for i in range(len(self._parameters))]

        def compare(i: int, gradient: Tensor) -> None:
            self._entropy[i] = gradient
            rows[i] = self._row(i)
            self._entropy[i] = None

        self._visit_gradients(entropy, compare, retain_graph=False)
        self._compare(rows)


def refuse_incomparable(compared: Compared) -> None:
    """Raises RuntimeError where the gradients to compare do not exist, with advice."""
    refuse_sharded(
        compared.parameters, "Set AlignmentConfig.parameter_every=0; activation alignment works on sharded models"
    )
    if not compared.streaming:
        return
    busy = [name for name, p in compared.parameters.items() if getattr(p, "_post_accumulate_grad_hooks", None)]
    if busy or compared.group is not None:
        what = f'parameter "{busy[0]}" has a post-accumulate hook' if busy else "several ranks average them"
        raise RuntimeError(
            "parameter_streaming=True compares with the gradients in .grad while the entropy is "
            f"differentiated, but {what}; use parameter_streaming=False"
        )


@contextmanager
def _donated_buffers_explained() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        if "donated" not in str(error):
            raise
        raise RuntimeError(
            "parameter alignment differentiates a compiled model twice, which donated buffers do not allow; set "
            "torch._functorch.config.donated_buffer = False before compiling, or AlignmentConfig.parameter_every=0"
        ) from error


def named_parameters(model: nn.Module | None, groups: list[dict[str, Any]]) -> dict[str, Tensor]:
    """The trainable parameters of ``groups`` under their names in ``model``, or their place where it has none."""
    names = {} if model is None else {parameter: name for name, parameter in model.named_parameters()}
    return {
        names.get(parameter, f"param_groups[{i}].params[{j}]"): parameter
        for i, group in enumerate(groups)
        for j, parameter in enumerate(group["params"])
        if parameter.requires_grad
    }
