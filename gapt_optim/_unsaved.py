"""Hooks that are left out of what is saved or copied of a module.

``torch.save(model)`` and ``copy.deepcopy(model)`` take a module's hooks along. Ours belong to a running training: a
file with them could be loaded only where this package is installed, and not with ``weights_only=True``.
"""

from __future__ import annotations

import contextlib
import weakref
from collections import OrderedDict
from typing import Any

from torch import nn

_GETSTATE = "__getstate__"
_HOOKS = ("_forward_hooks", "_forward_pre_hooks")
_FLAGS = ("_forward_hooks_with_kwargs", "_forward_hooks_always_called", "_forward_pre_hooks_with_kwargs")


class Unsaved:
    """A hook of a module on which :func:`leave_out` was called."""

    def __reduce__(self) -> tuple[Any, ...]:
        # Only where a module's class has a way of its own to be saved, past leave_out: a method of the standard library
        # that takes any arguments and returns None, so that what is loaded calls nothing of ours.
        return getattr, (contextlib.nullcontext(), "__exit__")


class leave_out:  # noqa: N801 - called like a function, it gives a handle
    """Leave every :class:`Unsaved` hook out of what is saved or copied of ``module``, until ``remove()``.

    Pickling asks an object for its ``__getstate__`` before its class, so that one on the module itself is enough, and
    the module's class stays what it is. Handles on one module are counted: the last one removed takes it away. A module
    whose class is saved or copied in a way of its own is left alone: its hooks are saved as ones that do nothing.
    """

    def __init__(self, module: nn.Module) -> None:
        self._module: weakref.ref[nn.Module] | None = None
        cls = type(module)
        standard = cls.__reduce__ is object.__reduce__ and cls.__reduce_ex__ is object.__reduce_ex__
        if not standard or hasattr(cls, "__deepcopy__"):
            return
        self._module = weakref.ref(module)
        present = module.__dict__.get(_GETSTATE)
        if not isinstance(present, _StateWithoutHooks):
            module.__dict__[_GETSTATE] = present = _StateWithoutHooks(module)
        present.handles += 1

    def remove(self) -> None:
        module = None if self._module is None else self._module()
        self._module = None
        present = None if module is None else module.__dict__.get(_GETSTATE)
        if module is not None and isinstance(present, _StateWithoutHooks):
            present.handles -= 1
            if present.handles == 0:
                del module.__dict__[_GETSTATE]


class _StateWithoutHooks:
    """A module's state, less itself and the hooks that are not saved."""

    def __init__(self, module: nn.Module) -> None:
        self._module = weakref.ref(module)
        self.handles = 0

    def __call__(self) -> Any:
        module = self._module()
        assert module is not None  # it asks for its own state
        by_class = getattr(type(module), _GETSTATE, None)  # of every object since Python 3.11
        return self._without_ours(dict(module.__dict__) if by_class is None else by_class(module))

    def _without_ours(self, state: Any) -> Any:
        if type(state) is tuple:  # of a class with a form of its own, or with slots
            return tuple(map(self._without_ours, state))
        if not isinstance(state, dict):
            return state
        state = {name: value for name, value in state.items() if value is not self}
        ours = {key for name in _HOOKS for key, hook in state.get(name, {}).items() if isinstance(hook, Unsaved)}
        for name in (*_HOOKS, *_FLAGS):
            if name in state:
                state[name] = OrderedDict((key, value) for key, value in state[name].items() if key not in ours)
        return state
