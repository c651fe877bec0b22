"""Mistakes that train as if nothing was wrong, each told once."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .._capture import Grams
from .._plan import StepPlan
from .._tell import tell
from .record import Reading

_SHARE_STEPS = 20
_LEAST_SHARE = 1e-3
_PERCENT = 1 / 99  # of the loss is a percent of the objective
_DIVIDED_STEPS = 3


class ZeroEntropyHint:
    """Layers whose windows have one direction at most, so that their entropy is 0 whatever happens.

    Judged by the shapes of a layer's first call alone: a last batch that is short is a tail, and nothing waits for the
    device.
    """

    def __init__(self) -> None:
        self._seen: set[str] = set()
        self._warned = False

    def look(self, plan: StepPlan, calls: dict[str, list[Grams]]) -> None:
        """Take what the layers of one forward pass left.

        Warns:
            UserWarning: once, naming the layer and what to do.
        """
        if self._warned or self._seen.issuperset(calls) or torch.compiler.is_compiling():
            return
        new = {name: of_layer for name, of_layer in calls.items() if name not in self._seen}
        self._seen.update(new)
        reasons = {name: _why_zero(of_layer, center=plan.entropy.center) for name, of_layer in new.items()}
        zero = [name for name, reason in reasons.items() if reason is not None]
        if zero:
            self._warned = True
            more = f" (and of {len(zero) - 1} more)" if len(zero) > 1 else ""
            tell(f'the entropy of layer "{zero[0]}"{more} is 0 whatever happens: {reasons[zero[0]]}')


def _why_zero(calls: list[Grams], *, center: bool) -> str | None:
    """Why the windows of all calls have an entropy of 0, and what to do; None where one has another."""
    # The windows of an empty batch are none, and those of a short call beside a long one are a tail.
    rows = max(call.shape[0] for call in calls)
    features = max(call.shape[1] for call in calls)
    if rows == 0 or features == 0:
        return None
    if features == 1:
        return "it has one feature. Leave it out of layers"
    if rows == 1:
        return (
            "its windows have one row, the only one of a batch or sequence. Call the model on a batch, or on whole "
            "episodes or sequences at once, or leave the layer out of layers"
        )
    if center and rows == 2:
        return (
            "its windows have two rows, which center=True leaves one direction. Give it batches or sequences of three "
            "or more, or EntropyConfig(center=False)"
        )
    return None


class FrozenHint:
    """Layers below which everything is frozen: no training changes their entropy."""

    def __init__(self) -> None:
        self.told = False

    def look(self, plan: StepPlan, calls: dict[str, list[Grams]]) -> None:
        """Take what the layers of one forward pass left, where their entropies are differentiated.

        Warns:
            UserWarning: once, where that is so of all layers that count.
        """
        if self.told or not (plan.compressing or plan.parameter_alignment) or torch.compiler.is_compiling():
            return
        counted = [call for name in plan.shares for call in calls.get(name, ())]
        if counted and all(call.carrier is None for call in counted):
            self.told = True
            first, *rest = plan.shares
            more = f" (and of {len(rest)} more)" if rest else ""
            tell(
                f'the entropy of layer "{first}"{more} has no gradient, as everything below is frozen: compression '
                "changes nothing and parameter alignment is not measured. Tap layers above trainable parameters, or "
                "set requires_grad_() on some below"
            )


class SmallShareHint:
    """An entropy that is next to nothing in the objective, over the first steps of compression."""

    def __init__(self) -> None:
        self._steps = 0
        self._loss = self._penalty = 0.0

    def look(self, plan: StepPlan, reading: Reading) -> None:
        """Take the numbers of one step.

        Warns:
            UserWarning: once, with the share and the weight that would make it a percent.
        """
        finite = math.isfinite(reading.loss) and math.isfinite(reading.penalty)
        if not plan.compressing or not finite or self._steps == _SHARE_STEPS:
            return
        self._steps += 1
        self._loss += abs(reading.loss)
        self._penalty += abs(reading.penalty)
        # Nothing at all is meant so, a floor that is reached, or an entropy of 0, which no weight changes.
        if self._steps < _SHARE_STEPS or self._penalty == 0:
            return
        share = self._penalty / (self._loss + self._penalty)
        if share < _LEAST_SHARE:
            wanted = plan.config.objective.weight * _PERCENT * self._loss / self._penalty
            tell(
                f"in the first {_SHARE_STEPS} steps of compression the entropy was {share:.1e} of the objective (loss "
                f"{self._loss / _SHARE_STEPS:.4g}, weight * entropy {self._penalty / _SHARE_STEPS:.2g}), too little to "
                'change anything. Where the loss is a sum over the batch (reduction="sum"), take its mean; otherwise '
                f"ObjectiveConfig(weight={wanted:.2g}) makes it one percent"
            )


class DividedLossHint:
    """Losses that were divided by the number of micro-batches before us, without a word to us.

    What several backward passes of one step add up to may be meant, so that their number tells nothing. It is a mistake
    where the last operation of each loss is a division by just as many. A division of a sum is not counted: halves of
    two losses that are each differentiated are common, as in CycleGAN's discriminators.
    """

    def __init__(self) -> None:
        self._divisors: list[float | None] = []
        self._run = 0

    def add(self, loss: Tensor, scaled_by: float) -> None:
        """The loss of one micro-batch."""
        if self._run < _DIVIDED_STEPS:
            self._divisors.append(_divisor(loss) if scaled_by == 1.0 else None)

    def forget(self) -> None:
        """The losses so far are of no step."""
        self._divisors.clear()

    def look(self) -> None:
        """At the end of a step.

        Warns:
            UserWarning: once, after some steps in a row that look so.
        """
        count, divisors = len(self._divisors), set(self._divisors)
        self.forget()
        if self._run == _DIVIDED_STEPS:
            return
        self._run = self._run + 1 if count > 1 and divisors == {float(count)} else 0
        if self._run == _DIVIDED_STEPS:
            tell(
                f"each step has {count} losses, each divided by {count} before optimizer.backward(loss): the gate "
                f"takes 1 / {count} of the loss for the loss, and the entropy gets {count} times its weight. Say so: "
                f"optimizer.backward(loss / {count}, scaled_by=1 / {count}), or give the whole loss: "
                f"optimizer.backward(loss, scale=1 / {count}); the same arguments go to optimizer.objective"
            )


def _divisor(loss: Tensor) -> float | None:
    """n, where the last operation of ``loss`` is a division by a number n, or the multiplication by its inverse."""
    node = loss.grad_fn
    if node is None or torch.compiler.is_compiling():
        return None
    name, other = node.name(), getattr(node, "_saved_other", None)
    if name not in ("DivBackward0", "MulBackward0") or not isinstance(other, Tensor):
        return None
    behind = node.next_functions[0][0]
    if other.device.type != "cpu" or behind is None or behind.name() == "AddBackward0":
        return None  # a number on a device would have to be waited for
    value = float(other)
    if name == "MulBackward0":
        value = 1 / value if value else math.nan
    nearest = float(round(value)) if math.isfinite(value) else math.nan
    return nearest if math.isclose(value, nearest, rel_tol=1e-6) else None


def warn_of_another_model(model: nn.Module | None, groups: list[dict[str, Any]], bases: Sequence[object]) -> None:
    """The hook was made on a copy of the model: a mistake that trains as if nothing was wrong."""
    watched = set() if model is None else {p for p in model.parameters() if p.requires_grad}
    # One that has none yet, or is frozen as a whole, may pass gradients on to what is trained in front of it.
    if watched and not any(p in watched for group in groups for p in group["params"]):
        tell(
            f"optimizer ({', '.join(type(base).__name__ for base in bases)}) has none of the {len(watched)} trainable "
            f"parameters of the hook's model ({type(model).__name__}): the entropy's gradients may go nowhere. Make "
            "the hook on the model whose parameters the optimizer has; where that model is frozen on purpose, say so "
            "with model.requires_grad_(False)"
        )
