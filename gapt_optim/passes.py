"""Forward passes, and what the watched modules leave in them until a loss takes it.

A loss uses the captures of the passes whose graph it is made of. A pass whose graph is gone is gone too, so that
nothing of a batch that was skipped reaches the gate or the weights. Nothing here refers to a module, so that it never
keeps a model alive.
"""

from __future__ import annotations

import dataclasses
import sys
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from types import FrameType
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from .windows import Windows, windows_of

if TYPE_CHECKING:
    from .shards import Shards

MOST_COMPILED = 9
"""Calls of a layer in a compiled model that are kept for a loss to come: its forward is traced, and cannot count. A
loss of as many may be of more, and is refused."""
MOST_LOOSE = 64
"""Calls of a watched module by itself that are kept for a loss to come."""


class Capture:
    """What one call of a watched module leaves for the objective."""

    def __init__(
        self,
        name: str,
        gram: Tensor | None = None,
        live: Tensor | None = None,
        shape: tuple[int, int] = (0, 0),
        dtype: torch.dtype = torch.float32,
        measures: tuple[Tensor, Tensor] | None = None,
        shards: Shards | None = None,
    ) -> None:
        self.name = name
        self.gram = gram
        """(windows, m, m); None once it was taken, or its pass is gone."""
        self.live = live
        """(windows,) rows that count; None where the matrices or the shape tell."""
        self.shape = shape
        """(rows, features) of a window."""
        self.dtype = dtype
        """Of the hidden tensor."""
        self.measures = measures
        """Where rows outnumber features, what :func:`gapt_optim.kernels.measures_of_rows` gives."""
        self.shards = shards
        """Sums over ranks that it takes part in; None where this rank has the whole output."""
        self.nodes: tuple[Any, ...] = ()
        """Of autograd's graph, that made the module's output; none above frozen layers, and in a compiled model."""
        self.saved: Any = None
        """A node behind the Gram node, for the rows that it saved, where an angle is due. It holds it: torch 2.6 frees
        what a node of Python saved once no node and no tensor of C++ leads to it, as in memorization."""
        self.angled = False
        """The angle at this call is taken."""
        self.pressed = False
        """Its entropy is part of what is differentiated."""
        self.factor: Tensor | None = None
        """(windows, m, m), from the objective on, where it is."""


class Repeat(NamedTuple):
    """What was decided for one call of a watched module, for activation checkpointing to do again."""

    place: int
    """Address of the module's input, by which a recomputed call is known."""
    rows: Callable[[Tensor], Tensor]
    """From the hidden tensor to its rows."""
    windows: Windows
    differentiated: bool


class Pass:
    """One forward pass of the watched model; a ``loose`` one is of modules that are called by themselves."""

    def __init__(self, *, loose: bool = False) -> None:
        self.loose = loose
        self.captures: list[Capture] = []
        self.repeats: dict[str, list[Repeat]] = {}
        self.used = False
        """A loss used some of its captures."""
        self._graph: weakref.ref[_Graph] | None = None
        self._windows: dict[Any, tuple[Any, Windows]] = {}

    def windows_of(
        self, batch: int, length: int, size: int | None, live: Tensor | None, segments: Tensor | None
    ) -> Windows:
        """:func:`gapt_optim.windows.windows_of`, once for all layers that have the same mask."""
        if live is None and segments is None:
            return windows_of(batch, length, size, None, None)
        key = batch, length, id(live), id(segments)
        if key not in self._windows:
            self._windows[key] = (live, segments), windows_of(batch, length, size, live, segments)
        return self._windows[key][1]

    def follow(self, output: Any) -> None:
        """Forget everything once the graph behind the model's ``output`` is gone."""
        nodes = [tensor.grad_fn for tensor in tensors_in(output) if tensor.grad_fn is not None]
        if not nodes:
            return
        graph = _Graph()
        for node in nodes:
            metadata: Any = node.metadata
            metadata.setdefault("gapt_optim", []).append(graph)  # lives as long as the node
        forget = weakref.WeakMethod(self.forget)

        def gone(_: Any) -> None:
            method = forget()
            if method is not None:
                method()

        self._graph = weakref.ref(graph, gone)

    @property
    def gone(self) -> bool:
        """Its graph is gone, or it left none."""
        return self._graph is None or self._graph() is None

    def made(self, behind: set[Any]) -> bool:
        """The model's output is among the nodes ``behind`` a loss."""
        graph = None if self._graph is None else self._graph()
        return graph is not None and any(graph in node.metadata.get("gapt_optim", ()) for node in behind)

    def add(self, capture: Capture, repeat: Repeat) -> None:
        """A call of a watched module ended."""
        self.captures.append(capture)
        self.repeats.setdefault(capture.name, []).append(repeat)
        if self.loose:
            self.trim(capture.name)

    def take_over(self, ended: Pass) -> None:
        """What a pass left whose own graph is not known: the nodes of its captures tell which loss they are of."""
        self.captures += [capture for capture in ended.captures if capture.nodes]
        ended.captures = []
        for name, repeats in ended.repeats.items():
            self.repeats.setdefault(name, []).extend(repeats)
            self.trim(name)

    def trim(self, name: str) -> None:
        """Keep the last calls of a layer, where no graph tells when they are gone."""
        self.repeats[name] = self.repeats[name][-MOST_LOOSE:]
        own = [capture for capture in self.captures if capture.name == name]
        for capture in own[:-MOST_LOOSE]:
            self.captures.remove(capture)
        if len(self._windows) > MOST_LOOSE:
            self._windows.clear()

    def forget(self) -> None:
        for capture in self.captures:
            capture.gram = capture.live = capture.measures = capture.saved = None
            capture.nodes = ()
        self.captures, self.repeats, self._windows = [], {}, {}


class _Graph:
    """Stands in autograd's nodes, and goes with them."""


class Passes:
    """The passes that one hook knows of."""

    def __init__(self) -> None:
        self.loose = Pass(loose=True)
        """Of watched modules that are called by themselves, outside of any call of the model."""
        self.current = self.loose
        """Where a capture belongs that is made now: the model's call that is under way, if one is."""
        self.kept: list[Pass] = []

    def begin(self) -> None:
        """The model is called."""
        self.current = Pass()

    def end(self, output: Any) -> None:
        """The model returned ``output``; None where it raised."""
        ended, self.current = self.current, self.loose
        if ended.loose:
            return
        ended.follow(output)
        self.kept = [each for each in self.kept if not each.gone]
        if not ended.gone:
            self.kept.append(ended)
            return
        raised = output is None and sys.exc_info()[0] is not None
        if not raised:  # an output of a kind that hides its tensors, or a loss that the model keeps
            self.loose.take_over(ended)
        ended.forget()

    def all(self) -> Iterator[Pass]:
        yield from self.kept
        yield self.loose
        if not self.current.loose:
            yield self.current

    def take(self, behind: set[Any]) -> list[Capture]:
        """Captures of the passes in the graph of a loss, given the nodes ``behind`` it; they are no longer here."""
        taken: list[Capture] = []
        for each in self.all():
            # Above frozen layers a capture has no nodes: it belongs to the loss if its pass does.
            own = {capture for capture in each.captures if not behind.isdisjoint(capture.nodes)}
            free = {capture for capture in each.captures if not capture.nodes}
            if free and (own or each is self.loose or each.made(behind)):
                own |= free
            if own:
                each.used = True
                taken += [capture for capture in each.captures if capture in own]
                each.captures = [capture for capture in each.captures if capture not in own]
        return taken

    def had_a_loss(self, behind: set[Any]) -> bool:
        """A loss was already taken of the pass that the nodes ``behind`` another one are of."""
        return any(each.used and each.made(behind) for each in self.kept)

    def unused(self) -> set[str]:
        """Layers whose outputs no loss used, though their pass was."""
        return {capture.name for each in self.all() if each.used for capture in each.captures}

    def clear(self) -> None:
        """Forget what no graph would tell to be gone."""
        self.loose.forget()


def nodes_behind(loss: Tensor) -> set[Any]:
    """Every node of the graph that ``loss`` was computed by.

    DistributedDataParallel passes all that the model returns through one node: behind that, only what the loss uses
    is followed.
    """
    found: set[Any] = set()
    waiting: list[tuple[Any, int]] = [(loss.grad_fn, loss.output_nr)]
    while waiting:
        node, output = waiting.pop()
        if node is None:
            continue
        if type(node).__name__ == "_DDPSinkBackward":
            needed = [i for i, needs in enumerate(node.needs_input_grad[1:]) if needs]
            edges = [edge for edge in node.next_functions if edge[0] is not None]
            waiting.append(edges[needed.index(output)])
            found.add(node)
        elif node not in found:
            found.add(node)
            waiting.extend(node.next_functions)
    return found


def nodes_of(output: Any, h: Tensor) -> tuple[Any, ...]:
    """What made ``h``; or all of the module's output, where ``output=`` gave another tensor, such as a view."""
    if output is h:
        return () if h.grad_fn is None else (h.grad_fn,)
    within = list(tensors_in(output))
    made = [h] if any(tensor is h for tensor in within) else within
    return tuple(tensor.grad_fn for tensor in made if tensor.grad_fn is not None)


def is_of(gram: Tensor | None, behind: set[Any]) -> bool:
    """A compiled call is one node of the graph; with a backend that compiles nothing, it is what it is without."""
    node: Any = None if gram is None else gram.grad_fn
    for _ in range(4):
        if node is None or node in behind:
            return True
        node = next((each for each, _ in node.next_functions if each is not None and each.next_functions), None)
        if node is None:  # parameters are behind every loss
            return False
    return False


def tensors_in(value: Any) -> Iterable[Tensor]:
    """The tensors in what a module returned, however deep."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from tensors_in(item)
    elif isinstance(value, Mapping):
        yield from tensors_in(list(value.values()))
    elif dataclasses.is_dataclass(value):
        yield from tensors_in([getattr(value, field.name) for field in dataclasses.fields(value)])


def recomputing() -> bool:
    """Activation checkpointing runs a part of the forward again, in its form that is not reentrant."""
    frame: FrameType | None = sys._getframe()
    while frame is not None:
        if frame.f_code.co_name == "recompute_fn" and frame.f_globals.get("__name__") == "torch.utils.checkpoint":
            return True
        frame = frame.f_back
    return False


def in_backward() -> bool:
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1


def transformed() -> bool:
    """Inside a transform of torch.func, whose gradients are no part of a step; of code that is not compiled."""
    return torch._C._functorch.maybe_current_level() is not None
