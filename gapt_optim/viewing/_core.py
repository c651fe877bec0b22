"""What viewing takes from the rest of the library beyond its public names, in one place."""

from __future__ import annotations

from ..entropy import entropy_of_gram
from ..outputs import hidden_tensor, padded
from ..selection import Layers, select_layers

__all__ = ["Layers", "entropy_of_gram", "hidden_tensor", "padded", "select_layers"]
