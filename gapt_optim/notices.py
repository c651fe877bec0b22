"""Mistakes that train as if nothing was wrong, each told once.

Every notice is a method that looks at what the step under way has in its hands.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ._tell import tell
from .metrics import Measures
from .passes import Capture

_SHARE_STEPS = 20
_LEAST_SHARE = 1e-3
_PERCENT = 1 / 99  # of the loss is a percent of the objective
_DIVIDED_STEPS = 3
_SILENT_STEPS = 10
_UNSTEPPED = 20
_ALIKE = 4e-6  # of their squared length; what is below half of that counts as rounding
_NOTHING = 0.01
_ABSENT_STEPS = 100


class Notices:
    """What was said already, and what is counted to say it."""

    def __init__(self) -> None:
        self._said: set[str] = set()
        self._silent = self._unstepped = 0
        self._share_steps, self._loss, self._penalty = 0, 0.0, 0.0
        self._divisors: list[float | None] = []
        self._divided = 0
        self._steps = 0
        self._absent: dict[str, int] = {}
        self._empty: dict[str, int] = {}

    def once(self, about: str, message: str) -> None:
        """Warn, unless something was said about this before."""
        if about not in self._said:
            self._said.add(about)
            tell(message)

    def said(self, about: str) -> bool:
        return about in self._said

    # Of a loss

    def no_entropy(self, taken: dict[str, list[Capture]], *, center: bool) -> None:
        """Layers whose windows have one direction at most, judged by the shapes of their first call."""
        if "no entropy" in self._said:
            return
        new = [name for name in taken if f"shape {name}" not in self._said]
        self._said.update(f"shape {name}" for name in new)
        reasons = {name: _why_none(taken[name], center=center) for name in new}
        none = [name for name, reason in reasons.items() if reason]
        if none:
            more = f" (and {len(none) - 1} more)" if len(none) > 1 else ""
            self.once("no entropy", f'layer "{none[0]}"{more} can have no entropy: {reasons[none[0]]}')

    def no_gradient(self, taken: dict[str, list[Capture]], pressed: Sequence[str]) -> None:
        """Everything below all layers that count is frozen."""
        of_counted = [call for name in pressed for call in taken.get(name, ())]
        if of_counted and not any(call.gram is not None and call.gram.requires_grad for call in of_counted):
            more = f" (and of {len(pressed) - 1} more)" if len(pressed) > 1 else ""
            self.once(
                "frozen",
                f'the entropy of layer "{pressed[0]}"{more} has no gradient, as everything below is frozen: '
                "compression changes nothing and parameter alignment is not measured. Watch layers above trainable "
                "parameters, or set requires_grad_() on some below",
            )

    def divided(self, loss: Tensor, scaled_by: float) -> None:
        """The loss of a micro-batch, which may have been divided by their number before us, without a word."""
        if self._divided < _DIVIDED_STEPS:
            self._divisors.append(_divisor(loss) if scaled_by == 1.0 else None)

    def forget_losses(self) -> None:
        """The losses so far are of no step."""
        self._divisors.clear()

    def unstepped(self) -> None:
        """Gradients were made and dropped without a step of ours."""
        self._unstepped += 1
        if self._unstepped == _UNSTEPPED:
            self.once(
                "unstepped",
                f"{_UNSTEPPED} times in a row gradients were made and zeroed without optimizer.step(): the gate does "
                "not move. Step this optimizer, not its base: optimizer.step(), or scaler.step(optimizer)",
            )

    # Of a step

    def silent(self) -> None:
        """A step without a loss."""
        self._silent += 1
        if self._silent == _SILENT_STEPS:
            self.once(
                "silent",
                f"{_SILENT_STEPS} optimizer steps in a row had no loss: the gate does not move. Call "
                "optimizer.backward(loss) instead of loss.backward(), or differentiate optimizer.objective(loss)",
            )

    def stepped(self) -> None:
        """A step with a loss: look whether its losses were divided as many times as there were of them."""
        self._silent = self._unstepped = 0
        count, divisors = len(self._divisors), set(self._divisors)
        self._divisors.clear()
        if self._divided == _DIVIDED_STEPS:
            return
        self._divided = self._divided + 1 if count > 1 and divisors == {float(count)} else 0
        if self._divided == _DIVIDED_STEPS:
            self.once(
                "divided",
                f"each step has {count} losses, each divided by {count} before optimizer.backward(loss): the gate "
                f"takes 1 / {count} of the loss for the loss, and the entropy gets {count} times its weight. Say so: "
                f"optimizer.backward(loss / {count}, scaled_by=1 / {count}), or give the whole loss: "
                f"optimizer.backward(loss, scale=1 / {count}); the same arguments go to optimizer.objective",
            )

    def small_share(self, loss: float, penalty: float, weight: float) -> None:
        """The numbers of a step of compression, in which the entropy may be next to nothing."""
        if not (math.isfinite(loss) and math.isfinite(penalty)) or self._share_steps == _SHARE_STEPS:
            return
        self._share_steps += 1
        self._loss += abs(loss)
        self._penalty += abs(penalty)
        # Nothing at all is meant so, a target that is reached, or an entropy of 0, which no weight changes.
        if self._share_steps < _SHARE_STEPS or self._penalty == 0:
            return
        share = self._penalty / (self._loss + self._penalty)
        if share < _LEAST_SHARE:
            wanted = weight * _PERCENT * self._loss / self._penalty
            self.once(
                "share",
                f"in the first {_SHARE_STEPS} steps of compression the entropy was {share:.1e} of the objective (loss "
                f"{self._loss / _SHARE_STEPS:.4g}, weight * entropy {self._penalty / _SHARE_STEPS:.2g}). If it does not"
                ' fall, that is too little: where the loss is a sum over the batch (reduction="sum"), take its mean; '
                f"otherwise ObjectiveConfig(weight={wanted:.2g}) makes it one percent",
            )

    def absent(
        self, ran: Sequence[str], names: Sequence[str], model: nn.Module | None, watched: dict[str, Any]
    ) -> None:
        """Layers that did not run in this step, though others did."""
        if not ran:
            return
        self._steps += 1
        if self._steps % _ABSENT_STEPS == 0 and model is not None:
            self._wrapped(ran, dict(model.named_modules()), watched)
        for name in names:
            self._absent[name] = 0 if name in ran else self._absent.get(name, 0) + 1
            if self._absent[name] == _ABSENT_STEPS:
                self.once(
                    f"absent {name}",
                    f'layer "{name}" has not run for {_ABSENT_STEPS} steps{_where_it_went(name, model, watched)}: its '
                    "entropy is not known. Make the hook on the layers that are trained",
                )

    def _wrapped(self, ran: Sequence[str], modules: dict[str, nn.Module], watched: dict[str, Any]) -> None:
        """Layers that run inside of something that was put around them since, and adds to their outputs."""
        for name in ran:
            now, module = modules.get(name), watched.get(name)
            if now is None or module is None or now is module:
                continue
            own = set(module.parameters())
            if any(parameter not in own for parameter in now.parameters()):
                self.once(
                    f"wrapped {name}",
                    f'layer "{name}" is now a {type(now).__name__}, and the hook watches the {type(module).__name__} '
                    "inside of it: the entropy is of its output alone. Make the hook when the model is complete",
                )

    def empty(self, ran: Sequence[str], entropies: Mapping[str, float]) -> None:
        """Layers that ran in this step, and had no window with an entropy."""
        for name in ran:
            self._empty[name] = 0 if name in entropies else self._empty.get(name, 0) + 1
            if self._empty[name] == _ABSENT_STEPS and "no entropy" not in self._said:
                self.once(
                    f"empty {name}",
                    f'layer "{name}" ran and had no entropy for {_ABSENT_STEPS} steps: no window had enough rows that '
                    "count and differ. hook.explain(...) shows which rows count; see mask= and EntropyConfig(window=)",
                )

    def alike(self, measures: Mapping[str, Measures], entropies: Mapping[str, float]) -> None:
        """Layers whose rows hardly differ, where entropies are about their mean."""
        for name, found in measures.items():
            if 1 - found.mean_share < _ALIKE and entropies.get(name, 1.0) < _NOTHING:
                self.once(
                    f"alike {name}",
                    f'the rows of layer "{name}" differ by less than {_ALIKE**0.5:.1%} of their length, which float32 '
                    "does not tell from rounding: its entropy reads 0 and has no gradient. Leave it out of layers, or "
                    "watch one whose rows differ, as behind a batch norm",
                )

    def unused(self, names: set[str]) -> None:
        """Layers whose outputs were in a pass of which no loss used them."""
        if names:
            first, *others = sorted(names)
            more = f" (and {len(others)} more)" if others else ""
            self.once(
                "unused",
                f'the loss does not use the output of layer "{first}"{more}, so that its entropy is neither judged nor '
                "pressed; leave it out of layers, or make it part of the loss",
            )


def _why_none(calls: list[Capture], *, center: bool) -> str | None:
    """Why the windows of all calls can have no entropy, and what to do; None where one can."""
    # The windows of an empty batch are none, and those of a short call beside a long one are a tail.
    rows = max(call.shape[0] for call in calls)
    features = max(call.shape[1] for call in calls)
    if rows == 0 or features == 0:
        return None
    if features == 1:
        return "it has one feature. Leave it out of layers"
    if rows == 1:
        return (
            "its windows have one row, the only one of a batch or sequence, or of an image behind a global pooling. "
            "Call the model on a batch, or on whole episodes or sequences at once; watch the module that flattens what "
            "was pooled; or leave the layer out of layers"
        )
    if center and rows == 2:
        return (
            "its windows have two rows, which center=True leaves one direction. Give it batches or sequences of three "
            "or more, or EntropyConfig(center=False)"
        )
    return None


def _where_it_went(name: str, model: nn.Module | None, watched: dict[str, Any]) -> str:
    """What is known of a layer that no longer runs."""
    module = watched.get(name)
    if model is None:
        return ""
    now = dict(model.named_modules()).get(name)
    if module is None:
        return " (it is gone)" if now is None else f" (the model now has another {type(now).__name__} there)"
    if now is not None and now is not module:
        return f" (the model now has a {type(now).__name__} there, the hook watches a {type(module).__name__})"
    if now is None and not any(each is module for each in model.modules()):
        return f" (the {type(module).__name__} is no longer part of the model)"
    return " (it is in evaluation mode)" if not module.training and model.training else ""


def _divisor(loss: Tensor) -> float | None:
    """n, where the last operation of ``loss`` is a division by a number n, or the multiplication by its inverse.

    A division of a sum is not counted: halves of two losses that are each differentiated are common, as in CycleGAN's
    discriminators.
    """
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


def tell_of_another_model(model: nn.Module | None, groups: list[dict[str, Any]], bases: Sequence[object]) -> None:
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
