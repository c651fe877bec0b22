"""What a step learns from the optimizer's parameter groups: their gradients, and their learning rate."""

from __future__ import annotations

import math
from typing import Any, TypeGuard

from torch import Tensor


class ZeroedGradients:
    """Tells whether anything was differentiated since ``zero_grad``.

    A GradScaler does not call ``step`` on an overflow. What shows it is that gradients were zeroed after a loss was
    recorded, and are still as ``zero_grad`` left them when the next loss comes.
    """

    def __init__(self) -> None:
        self._noted: dict[Tensor, tuple[Tensor, int]] | None = None
        """By parameter, its gradient and the version of that; None where there is nothing to compare with."""

    def note(self, groups: list[dict[str, Any]]) -> None:
        """Gradients are as ``zero_grad`` leaves them."""
        gradients = {p: p.grad for group in groups for p in group["params"] if p.grad is not None}
        self._noted = {p: (gradient, gradient._version) for p, gradient in gradients.items()}

    def untouched(self, groups: list[dict[str, Any]]) -> bool:
        """Gradients were noted and have not changed since. What was noted is forgotten."""
        noted, self._noted = self._noted, None
        if noted is None:
            return False
        return all(_is_as_noted(p.grad, noted.get(p)) for group in groups for p in group["params"])


def _is_as_noted(gradient: Tensor | None, noted: tuple[Tensor, int] | None) -> bool:
    """There is no gradient, or the one that was noted, and nothing has been added to it."""
    return gradient is None or (noted is not None and noted[0] is gradient and noted[1] == gradient._version)


def largest_learning_rate(groups: list[dict[str, Any]]) -> float | None:
    """None where no group has one that is known here: a tensor on a device would have to be waited for."""
    rates = [group.get("lr") for group in groups]
    known = [float(lr) for lr in rates if isinstance(lr, int | float) or (_is_number(lr) and lr.device.type == "cpu")]
    return max((lr for lr in known if math.isfinite(lr)), default=None)


def _is_number(value: Any) -> TypeGuard[Tensor]:
    return isinstance(value, Tensor) and value.numel() == 1
