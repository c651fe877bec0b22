"""What viewing takes from the rest of the library beyond its public names, in one place."""

from __future__ import annotations

from .._capture import Layers, hidden_rows, puts_sequence_first, select_layers
from ..entropy import Kernel, KernelMatrix, entropy_of_gram, window_weights, windows_last

__all__ = [
    "Kernel",
    "KernelMatrix",
    "Layers",
    "entropy_of_gram",
    "hidden_rows",
    "puts_sequence_first",
    "select_layers",
    "window_weights",
    "windows_last",
]
