"""Parameter alignment during training: the angle between the gradients of loss and entropy.

A step that compares takes one more gradient, that of the mean entropy, and compares it with what the step's own
backward leaves in ``.grad``. That backward is the one of any other step.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .alignment import Alignment, dot, parameter_alignment, refuse_sharded, stacked
from .passes import nodes_behind
from .ranks import HostCopy, mean_over_ranks


class GradientComparison:
    """The comparison of one step: its micro-batches' backward passes, then the alignment.

    The entropy's gradient is kept, one buffer of the parameters' size, and summed over micro-batches. Across ranks it
    is averaged as DistributedDataParallel averages ``.grad``.

    Args:
        parameters: trainable ones, by name.
        layers: names of the watched modules.
        weight: how much of the mean entropy's gradient is in ``.grad``: 0 in memorization. None where its part is not a
            multiple of it; the loss's own gradient then takes one more pass and buffer.
        group: ranks that average gradients; None for a single process.

    Raises:
        RuntimeError: parameters are sharded, or the model is compiled with donated buffers.
    """

    def __init__(
        self,
        parameters: dict[str, Tensor],
        layers: Sequence[str],
        weight: float | None,
        group: dist.ProcessGroup | None,
    ) -> None:
        refuse_incomparable(parameters)  # they may have been sharded since the last comparison
        self.names, self.layers, self.weight, self.group = list(parameters), list(layers), weight, group
        self._parameters = list(parameters.values())
        n = len(self._parameters)
        self._entropy: list[Tensor | None] = [None] * n
        self._loss: list[Tensor | None] = [None] * n
        self._behind_loss = [False] * n
        self._left: list[Tensor | None] = []
        self._reached: list[tuple[bool, bool]] = []
        self._statistics: HostCopy | None = None

    @property
    def begun(self) -> bool:
        """A backward was compared, and its gradients are still in ``.grad``."""
        return bool(self._left) and any(p.grad is not None for p in self._parameters)

    def before(self, loss: Tensor, entropy: Tensor) -> None:
        """Take the gradients that ``.grad`` will not show, of a loss and an entropy that are scaled alike."""
        self._add_gradient(entropy, self._entropy)
        if self.weight is None:
            self._add_gradient(loss, self._loss)
        self._note_parameters_of(loss)

    def after(self) -> None:
        """Compare them with what the backward left in ``.grad``; over ranks, when these meet at the step."""
        self._left = [p.grad for p in self._parameters]
        if self.group is None:
            self._compare()
        else:  # the loop may scale or clip .grad before the step
            self._left = [None if gradient is None else gradient.detach().clone() for gradient in self._left]

    def meet(self) -> None:
        """All ranks average what they have, and compare. A rank that has nothing takes part."""
        self._average_over_ranks()
        if self._left:
            self._compare()

    def _compare(self) -> None:
        rows = [self._row(i) for i in range(len(self._parameters))]
        self._reached = [(by_loss, by_entropy) for by_loss, by_entropy, _ in rows]
        self._statistics = HostCopy(stacked([row for *_, row in rows]).reshape(-1))

    def finish(self) -> Callable[[], Alignment] | None:
        """A reader of the alignment, None if no backward was compared."""
        statistics, reached = self._statistics, self._reached
        if statistics is None:
            return None

        def read() -> Alignment:
            values = statistics.read()
            rows = [values[i : i + 3] for i in range(0, len(values), 3)]
            return parameter_alignment(self.names, reached, rows, self.layers)

        return read

    def _add_gradient(self, value: Tensor, sums: list[Tensor | None]) -> None:
        def add(i: int, gradient: Tensor) -> None:
            held = sums[i]
            # Not in place: autograd may give one tensor to several parameters.
            sums[i] = gradient if held is None else held + gradient

        def hook(i: int) -> Callable[[Tensor | None], Tensor | None]:
            def seen(gradient: Tensor | None) -> Tensor | None:
                if gradient is None:  # autograd came by without one
                    return None
                add(i, gradient.detach())
                # What autograd collects in its place takes no memory.
                return None if gradient.is_sparse else gradient.new_zeros(()).expand_as(gradient)

            return seen

        handles = [p.register_hook(hook(i)) for i, p in enumerate(self._parameters)]  # type: ignore[no-untyped-call]
        try:
            with _donated_buffers_explained():
                torch.autograd.grad(value, self._parameters, retain_graph=True, allow_unused=True)
        finally:
            for handle in handles:
                handle.remove()

    def _note_parameters_of(self, loss: Tensor) -> None:
        """Which parameters the loss depends on. In compression ``.grad`` does not tell: it is the entropy's too."""
        leaves = {getattr(node, "variable", None) for node in nodes_behind(loss)}
        self._behind_loss = [noted or p in leaves for noted, p in zip(self._behind_loss, self._parameters, strict=True)]

    def _average_over_ranks(self) -> None:
        """In place."""
        group = self.group
        if group is None:
            return
        # A parameter may be out of reach on some of the ranks, so all have a place in one collective of fixed size.
        averaged = (self._entropy,) if self.weight is not None else (self._entropy, self._loss)
        flags = [[g is not None for g in self._entropy], [g is not None for g in self._loss], self._behind_loss]
        dtype = functools.reduce(torch.promote_types, (p.dtype for p in self._parameters), torch.float32)
        sent = [torch.tensor(flags, dtype=dtype, device=self._parameters[0].device).reshape(-1)]
        for gradients in averaged:
            for parameter, gradient in zip(self._parameters, gradients, strict=True):
                dense = torch.zeros_like(parameter) if gradient is None else gradient.to_dense()
                sent.append(dense.reshape(-1).to(sent[0]))
        n = len(self._parameters)
        received = mean_over_ranks(torch.cat(sent), group)
        *anywhere, self._behind_loss = (received[: 3 * n].reshape(3, n) > 0).tolist()
        sizes = [p.numel() for p in self._parameters] * len(averaged)
        means = torch.split(received[3 * n :], sizes)
        for k, gradients in enumerate(averaged):
            for i, reached in enumerate(anywhere[k]):
                if reached:
                    gradients[i] = means[k * n + i].reshape(self._parameters[i].shape).to(self._parameters[i])

    def _own(self, i: int) -> Tensor | None:
        """The loss's part of what the backward left in ``.grad``."""
        if self.weight is None:
            return self._loss[i]
        return self._without(self._left[i], self._entropy[i], self.weight)

    @staticmethod
    def _without(gradient: Tensor | None, entropy: Tensor | None, weight: float) -> Tensor | None:
        if gradient is None or entropy is None or weight == 0:
            return gradient
        dtype = torch.promote_types(gradient.dtype, torch.float32)
        return torch.sub(gradient.to_dense().to(dtype), entropy.to_dense(), alpha=weight)

    def _row(self, i: int) -> tuple[bool, bool, Tensor | None]:
        own, entropy = self._own(i) if self._behind_loss[i] else None, self._entropy[i]
        row = None if own is None or entropy is None else dot(own, entropy)
        return own is not None, entropy is not None, row


def refuse_incomparable(parameters: dict[str, Tensor]) -> None:
    """Raises RuntimeError where the gradients to compare do not exist, with advice."""
    refuse_sharded(parameters, "Set AlignmentConfig.parameter_every=0; angles at layers work on sharded models")


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
