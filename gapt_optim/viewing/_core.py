"""What viewing takes from the rest of the library beyond its public names, in one place."""

from __future__ import annotations

from .._capture.outputs import hidden_tensor, padded
from .._capture.selection import Layers, select_layers
from ..entropy import Kernel, entropy_of_gram

__all__ = ["Kernel", "Layers", "entropy_of_gram", "hidden_tensor", "padded", "select_layers"]
