"""Whether what a backward added to ``.grad`` is still there: a loss whose gradients were dropped is of no step."""

from __future__ import annotations

import weakref
from typing import Any, NamedTuple

from torch import Tensor

from .ranks import is_dtensor

Groups = list[dict[str, Any]]
"""Of an optimizer's parameters."""


class Gradients:
    """What ``.grad`` of an optimizer's parameters was at one moment, and whether anything came since."""

    def __init__(self) -> None:
        self.shown = True
        """``.grad`` shows what a backward left. Under DeepSpeed, and in a pipeline's schedule, it does not."""
        self._then: list[_Gradient | None] | None = None

    def note(self, groups: Groups) -> None:
        """Remember what is there now."""
        self._then = [_Gradient.of(p) for group in groups for p in group["params"]]

    def forget(self) -> None:
        self._then = None

    def unchanged(self, groups: Groups) -> bool:
        """Nothing has been added to any gradient since :meth:`note`; False where that is not known.

        Sharded parameters get their gradients when a backward ends that reduces them: they tell nothing.
        """
        if self._then is None or not self.shown:
            return False
        parameters = [p for group in groups for p in group["params"]]
        if len(parameters) != len(self._then) or any(map(is_dtensor, parameters[:1])):
            return False
        return all(_same(p.grad, then) for p, then in zip(parameters, self._then, strict=True))


class _Gradient(NamedTuple):
    tensor: weakref.ref[Tensor]
    version: int

    @classmethod
    def of(cls, parameter: Tensor) -> _Gradient | None:
        gradient = parameter.grad
        return None if gradient is None else cls(weakref.ref(gradient), gradient._version)


def _same(now: Tensor | None, then: _Gradient | None) -> bool:
    if now is None or then is None:
        return now is None
    return then.tensor() is now and then.version == now._version
