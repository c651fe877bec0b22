"""What optimizers are at a moment, to come back to."""

from __future__ import annotations

import inspect
from collections import deque
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer


class Snapshot:
    """Optimizers as they are, with every dict, list and object that they hold, each kept in its place.

    ``torch.optim.Optimizer.load_state_dict`` makes new tensors, so those of now are kept by reference and cost nothing.
    An optimizer that loads in a way of its own may write into them: of its tensors there are copies.
    """

    def __init__(self, optimizers: Sequence[Optimizer]) -> None:
        self._undo: list[Callable[[], None]] = []
        self._seen: dict[int, Any] = {}  # the objects are kept, so that their ids stay theirs
        for optimizer in optimizers:
            parameters = {id(p) for group in optimizer.param_groups for p in group["params"]}
            self._visit(optimizer, parameters, type(optimizer).load_state_dict is not Optimizer.load_state_dict)

    def restore(self) -> None:
        for undo in reversed(self._undo):
            undo()

    def _visit(self, value: Any, parameters: set[int], writes: bool) -> None:
        waiting = [value]
        while waiting:
            each = waiting.pop()
            if id(each) in self._seen:
                continue
            self._seen[id(each)] = each
            if isinstance(each, Tensor):
                if writes and id(each) not in parameters:
                    self._undo.append(_tensor(each))
            elif isinstance(each, dict):
                self._undo.append(_mapping(each))
                waiting.extend(each.values())
            elif isinstance(each, list | deque):
                self._undo.append(_sequence(each))
                waiting.extend(each)
            elif isinstance(each, set):
                self._undo.append(_set(each))
            elif isinstance(each, tuple):
                waiting.extend(each)
            elif not _opaque(each) and isinstance(getattr(each, "__dict__", None), dict):
                waiting.append(each.__dict__)


def _opaque(value: Any) -> bool:
    """Not part of an optimizer's state, whatever refers to it."""
    return isinstance(value, nn.Module | type | ModuleType) or inspect.isroutine(value)


def _tensor(tensor: Tensor) -> Callable[[], None]:
    try:
        kept, version = tensor.detach().clone(), tensor._version
    except (NotImplementedError, RuntimeError):  # a kind of tensor that cannot be copied is not written into, either
        return lambda: None

    def undo() -> None:
        if tensor._version != version:
            tensor.detach().copy_(kept)

    return undo


def _mapping(mapping: dict[Any, Any]) -> Callable[[], None]:
    kept = dict(mapping)

    def undo() -> None:
        mapping.clear()
        mapping.update(kept)

    return undo


def _sequence(sequence: list[Any] | deque[Any]) -> Callable[[], None]:
    kept = list(sequence)

    def undo() -> None:
        sequence.clear()
        sequence.extend(kept)

    return undo


def _set(values: set[Any]) -> Callable[[], None]:
    kept = set(values)

    def undo() -> None:
        values.clear()
        values.update(kept)

    return undo
