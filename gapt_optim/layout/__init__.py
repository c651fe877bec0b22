"""What the outputs of a model's modules mean: which tensor, which axes, which rows count, where documents end.

The other parts of the library know :class:`Layout`, its :class:`Reading`, and which modules are meant. How axes and
tokens are found stands in the files here, from ``following`` (what a pass shows) on.
"""

from .axes import View
from .outputs import Reading, replaced
from .reading import Calls, Layout, Pick
from .selection import Candidates, Layers, by_layer, choose_layers, has_forward, select_layers

__all__ = [
    "Calls",
    "Candidates",
    "Layers",
    "Layout",
    "Pick",
    "Reading",
    "View",
    "by_layer",
    "choose_layers",
    "has_forward",
    "replaced",
    "select_layers",
]
