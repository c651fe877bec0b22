"""From a module's output to Gram matrices: which modules, which tensor, which mask, which windows, and the taps."""

from .entropies import Entropies, entropies_of
from .grams import Grams
from .graph import nodes_behind
from .measurement import Measurement
from .representation import RepresentationHook, store_of
from .store import CaptureStore
from .tap import PROBE_SIZE, link

__all__ = [
    "PROBE_SIZE",
    "CaptureStore",
    "Entropies",
    "Grams",
    "Measurement",
    "RepresentationHook",
    "entropies_of",
    "link",
    "nodes_behind",
    "store_of",
]
