"""From a module's output to Gram matrices: which modules, which tensor, which mask, which windows, and the taps."""

from .entropies import NUMBERS, Factors, entropies_of
from .grams import Grams
from .graph import nodes_behind
from .measurement import Measurement
from .outputs import hidden_rows, puts_sequence_first
from .representation import RepresentationHook, store_of
from .selection import Layers, select_layers
from .store import CaptureStore
from .tap import PROBE_SIZE, link

__all__ = [
    "NUMBERS",
    "PROBE_SIZE",
    "CaptureStore",
    "Factors",
    "Grams",
    "Layers",
    "Measurement",
    "RepresentationHook",
    "entropies_of",
    "hidden_rows",
    "link",
    "nodes_behind",
    "puts_sequence_first",
    "select_layers",
    "store_of",
]
