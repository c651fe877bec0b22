"""What the frameworks' callbacks share: finding the wrapper inside a framework's own, and replacing methods."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ..optimizer import GAPTOptimizer


def unwrapped(optimizer: Any) -> GAPTOptimizer | None:
    """The GAPTOptimizer in ``optimizer``, through the wrappers of Accelerate and Lightning; None if there is none."""
    # Lightning's wrapper is an instance of the class it wraps, so the search goes to the innermost. What we wrap may
    # have an optimizer in it too, as Lookahead has, so it does not end with what has none.
    found = None
    while optimizer is not None:
        found = optimizer if isinstance(optimizer, GAPTOptimizer) else found
        optimizer = getattr(optimizer, "optimizer", None)
    return found


class Replacement:
    """Replaces a method of one object until :meth:`undo`."""

    def __init__(self, owner: Any, name: str, make: Callable[[Callable[..., Any]], Callable[..., Any]]) -> None:
        self.owner, self.name = owner, name
        self.before: dict[str, Any] = {name: vars(owner)[name]} if name in vars(owner) else {}
        setattr(owner, name, make(getattr(owner, name)))

    def undo(self) -> None:
        vars(self.owner).pop(self.name, None)
        vars(self.owner).update(self.before)
