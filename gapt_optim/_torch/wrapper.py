"""What torch expects of an optimizer, read from the wrapped one or ones.

Nothing is copied: parameter groups, state and defaults are those of the bases at every access, so that they are never
stale. Subclasses say what of their own goes into a state dict.
"""

from __future__ import annotations

import functools
import json
from abc import abstractmethod
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor
from torch.autograd.profiler import record_function
from torch.optim import Optimizer

from .._tell import tell
from .bases import Bases

STATE_KEY = "gapt"
"""In the first parameter group of a state dict, where checkpoint tools carry it along."""
START_FRESH = f'to start the gate fresh, remove "{STATE_KEY}" from state_dict["param_groups"][0]'
"""Ends the errors about what is under it."""


class OptimizerWrapper(Optimizer):
    """An optimizer made of others. Call :meth:`_wrap` in place of ``Optimizer.__init__``.

    Where torch leaves a choice:

    - Hooks on all optimizers (``torch.optim.optimizer.register_optimizer_step_pre_hook`` and ``..._post_hook``) are
      called with the wrapped optimizer, once for each of its steps, as without the wrapper. Those that are registered
      on the wrapper are called with the wrapper, before and after.
    - Names that loggers make of a class, such as Lightning's ``LearningRateMonitor``, say ``GAPTOptimizer``; ``repr``
      shows the wrapped optimizers within.
    - ``step(**options)`` hands its options to the wrapped optimizer; of several, to those that take them.
    - Methods that the wrapped optimizer has and torch.optim.Optimizer has not, such as ``first_step`` of SAM, are not
      forwarded, as a gradient scaler would take us for what we are not: call them on ``.base``.
    """

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        if "step" in cls.__dict__:
            cls.step = _with_own_hooks(cls.__dict__["step"])  # type: ignore[method-assign]

    def _wrap(self, bases: Bases) -> None:
        # Gives us torch's step and state-dict hooks without Optimizer.__init__, which would make param_groups
        # and state of our own. It sets a default, so it comes before the bases do.
        self._bases: Bases | None = None
        Optimizer.__setstate__(self, {})
        self._bases = bases

    @abstractmethod
    def _own_state(self) -> dict[str, Any]:
        """What a state dict holds beside the bases' own: plain values."""

    @abstractmethod
    def _check_own_state(self, own: Any) -> tuple[dict[str, Any], str | None]:
        """What was saved, checked, and what to tell of it. Raises ValueError where it does not fit; changes nothing."""

    @abstractmethod
    def _load_own_state(self, own: dict[str, Any] | None) -> None:
        """Go on from ``own``, or start fresh."""

    @property
    def base(self) -> Any:
        """The wrapped optimizer, or a tuple of them."""
        bases = self._wrapped
        return bases.all[0] if bases.single else bases.all

    @property
    def _wrapped(self) -> Bases:
        bases: Bases | None = self.__dict__.get("_bases")
        if bases is None:
            raise AttributeError("this GAPTOptimizer is not built yet")
        return bases

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The wrapped optimizer's own groups."""
        return self._wrapped.param_groups

    @param_groups.setter
    def param_groups(self, groups: list[dict[str, Any]]) -> None:
        self._wrapped.param_groups = groups

    @property
    def state(self) -> Any:
        """The wrapped optimizer's own state."""
        return self._wrapped.state

    @state.setter
    def state(self, state: Any) -> None:
        self._wrapped.state = state

    @property
    def defaults(self) -> dict[str, Any]:
        """The wrapped optimizer's own defaults."""
        return {} if self._bases is None else self._bases.defaults

    @defaults.setter
    def defaults(self, defaults: dict[str, Any]) -> None:
        self._wrapped.defaults = defaults

    @property
    def _step_supports_amp_scaling(self) -> bool:
        # Read by GradScaler. Every base must be able to skip a step with infinite gradients by itself.
        return all(getattr(base, "_step_supports_amp_scaling", False) for base in self._wrapped.all)

    def __getattr__(self, name: str) -> Any:
        # Only the two that schedule-free optimizers have. More would make GradScaler take us for a fused base.
        if name in ("train", "eval"):
            methods = [getattr(base, name) for base in self._wrapped.all if hasattr(base, name)]
            if methods:

                def forward_to_bases(*args: Any, **kwargs: Any) -> None:
                    for method in methods:
                        method(*args, **kwargs)

                return forward_to_bases
        remedy = ""
        if not name.startswith("_") and self.__dict__.get("_bases") is not None:
            having = [f"{owner}.{name}" for owner in self._wrapped.owners_of(name)]
            remedy = f"; the wrapped optimizer has it: use {' or '.join(having)}" if having else ""
        raise AttributeError(f"'{type(self).__name__}' object has no attribute '{name}'{remedy}")

    def state_dict(self) -> dict[str, Any]:
        """The wrapped optimizer's state dict, with the gate and counters in its first parameter group.

        Holds plain values and tensors only, so it loads with ``torch.load(weights_only=True)``. What is the wrapper's
        own is one JSON string: checkpoint tools of ranks take nested values apart and lose some of them.
        """
        for pre_hook in self._optimizer_state_dict_pre_hooks.values():
            pre_hook(self)
        state_dict = self._wrapped.state_dict()
        own = {STATE_KEY: json.dumps(self._own_state())}
        if "param_groups" in state_dict:
            first, *rest = state_dict["param_groups"]
            state_dict["param_groups"] = [{**first, **own}, *rest]
        else:  # a form of its own, as torchao's CPUOffloadOptimizer has
            state_dict |= own
        for post_hook in self._optimizer_state_dict_post_hooks.values():
            replaced = post_hook(self, state_dict)
            state_dict = state_dict if replaced is None else replaced
        return state_dict

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from :meth:`state_dict`, or from that of a bare optimizer, with a fresh gate and a warning.

        All or nothing: where anything is refused, or a wrapped optimizer fails to load its part, everything is as it
        was before.

        Raises:
            ValueError: a part is damaged, or of other layers or settings; the message names the field, what was found
                and what to do.

        Warns:
            UserWarning: the gate starts fresh, or settings differ that may; the message lists old and new values.
        """
        if not isinstance(state_dict, Mapping):
            raise ValueError(f"state_dict must be a mapping, found {type(state_dict).__name__}")
        state_dict = dict(state_dict)
        for pre_hook in self._optimizer_load_state_dict_pre_hooks.values():
            replaced = pre_hook(self, state_dict)
            state_dict = state_dict if replaced is None else dict(replaced)
        own, notice = self._own_part(state_dict)
        before = self._wrapped.load_state_dict(state_dict)
        try:
            if notice is not None:
                tell(notice)
        except BaseException:  # where warnings are errors
            before.restore()
            raise
        self._load_own_state(own)
        for post_hook in self._optimizer_load_state_dict_post_hooks.values():
            post_hook(self)

    def _own_part(self, state_dict: dict[str, Any]) -> tuple[dict[str, Any] | None, str | None]:
        """Take our own part out of ``state_dict``; checked, with what to tell of it."""
        groups = state_dict.get("param_groups")
        if isinstance(groups, list) and all(isinstance(group, Mapping) for group in groups):
            state_dict["param_groups"] = groups = [dict(group) for group in groups]
        else:
            groups = []
        found = [part.pop(STATE_KEY) for part in (*groups, state_dict) if STATE_KEY in part]
        if not found:
            return None, "the state dict is of a bare optimizer: the gate starts fresh"
        if len(found) > 1:
            raise ValueError(f'"{STATE_KEY}" is in the state_dict {len(found)} times, expected once; {START_FRESH}')
        try:
            own = json.loads(found[0])
        except (TypeError, ValueError, RecursionError) as error:
            raise ValueError(
                f'"{STATE_KEY}" in the state_dict is not what state_dict() has put there ({error}); {START_FRESH}'
            ) from error
        return self._check_own_state(own)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As on the wrapped optimizer; with several, add to one of ``base`` instead."""
        self._wrapped.add_param_group(param_group)

    def _step_bases(self, closure: Callable[[], Any] | None, **options: Any) -> Any:
        # GradScaler leaves these two on an optimizer whose fused kernel unscales and skips by itself.
        passed: dict[str, Any] = {
            name: self.__dict__[name] for name in ("grad_scale", "found_inf") if name in self.__dict__
        }
        for base in self._wrapped.all:
            base.__dict__.update(passed)
        try:
            return self._wrapped.step(closure, **options)
        finally:
            for base in self._wrapped.all:
                for name in passed:
                    base.__dict__.pop(name, None)

    def _skipped_by_scaler(self) -> bool:
        found_inf: Tensor | None = self.__dict__.get("found_inf")
        return found_inf is not None and bool(found_inf)


def _with_own_hooks(step: Callable[..., Any]) -> Callable[..., Any]:
    """What torch makes of an optimizer's ``step``, less the hooks on all optimizers: the wrapped ones call those."""

    @functools.wraps(step)
    def hooked(self: OptimizerWrapper, *args: Any, **kwargs: Any) -> Any:
        args = (self, *args)
        with record_function(f"Optimizer.step#{type(self).__name__}.step"):
            for pre_hook in self._optimizer_step_pre_hooks.values():
                replaced = pre_hook(self, args, kwargs)
                if replaced is not None:
                    if not (isinstance(replaced, tuple) and len(replaced) == 2):
                        raise RuntimeError(f"a step pre-hook must return None or (args, kwargs), found {replaced!r}")
                    args, kwargs = replaced
            result = step(*args, **kwargs)
            for post_hook in self._optimizer_step_post_hooks.values():
                post_hook(self, args, kwargs)
        return result

    hooked.hooked = True  # type: ignore[attr-defined]  # torch hooks what is not
    return hooked
