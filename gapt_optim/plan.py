"""What the step under way does: decided once before its forward pass, and read by the hooks and the objective."""

from __future__ import annotations

from typing import NamedTuple

from .config import GAPTConfig
from .entropy import Order


class Plan(NamedTuple):
    """Of one step."""

    config: GAPTConfig
    order: Order
    """The entropy that the configuration names."""
    counted: tuple[str, ...] = ()
    """Layers that count."""
    layers: tuple[str, ...] = ()
    """Those whose entropy is in the objective: all that count, or the one whose turn it is."""
    pressed: bool = False
    """The step compresses: the entropy is part of what is differentiated, and what cannot be done is refused. In
    memorization it is told."""
    compared: bool = False
    """Parameter alignment is due: the gradient of the mean entropy is wanted by itself."""
    differentiated: bool = False
    """Either of these: entropies of layers that count have a graph."""
    due: bool = False
    """Angles and measures are taken."""
    angles: bool = False
    """Angles are taken at some steps: a compiled model has a place for them at every step."""
    targets: dict[str, float] | None = None
    """Where pressing stops, by layer; None where it has no end."""
    among: int | None = None
    """Layers that the mean is over, where stages on other ranks have some of them; None where they are all here."""
