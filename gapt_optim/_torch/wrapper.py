"""What torch expects of an optimizer, read from the wrapped one or ones.

Nothing is copied: parameter groups, state and defaults are those of the bases at every access, so that they are never
stale. Subclasses say what of their own goes into a state dict.
"""

from __future__ import annotations

import json
import warnings
from abc import abstractmethod
from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from .bases import Bases

STATE_KEY = "gapt"
START_FRESH = f'to start the gate fresh, remove "{STATE_KEY}" from state_dict["param_groups"][0]'
"""In the first parameter group of a state dict, where checkpoint tools carry it along."""


class OptimizerWrapper(Optimizer):
    """An optimizer made of others. Call :meth:`_wrap` in place of ``Optimizer.__init__``."""

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
    def _check_own_state(self, own: dict[str, Any]) -> None:
        """Raises ValueError where ``own`` does not fit. Nothing is changed."""

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
        raise AttributeError(f"'{type(self).__name__}' object has no attribute '{name}'")

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

        Raises:
            ValueError: the state is of other layers or another configuration. Nothing is changed then.
        """
        state_dict = dict(state_dict)
        for pre_hook in self._optimizer_load_state_dict_pre_hooks.values():
            replaced = pre_hook(self, state_dict)
            state_dict = state_dict if replaced is None else dict(replaced)
        if "param_groups" in state_dict:
            state_dict["param_groups"] = [dict(group) for group in state_dict["param_groups"]]
        saved = (state_dict.get("param_groups") or [state_dict])[0].pop(STATE_KEY, None)
        try:
            own = None if saved is None else json.loads(saved)
        except (TypeError, ValueError) as error:
            raise ValueError(
                f'"{STATE_KEY}" in the state_dict is not what state_dict() has put there ({error}); {START_FRESH}'
            ) from error
        if own is not None:
            self._check_own_state(own)
        self._wrapped.load_state_dict(state_dict)
        if own is None:
            warnings.warn("the state dict is of a bare optimizer: the gate starts fresh", UserWarning, stacklevel=2)
        self._load_own_state(own)
        for post_hook in self._optimizer_load_state_dict_post_hooks.values():
            post_hook(self)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As on the wrapped optimizer; with several, add to one of ``base`` instead."""
        self._wrapped.add_param_group(param_group)

    def _step_bases(self, closure: Callable[[], Any] | None) -> Any:
        # GradScaler leaves these two on an optimizer whose fused kernel unscales and skips by itself.
        passed: dict[str, Any] = {
            name: self.__dict__[name] for name in ("grad_scale", "found_inf") if name in self.__dict__
        }
        for base in self._wrapped.all:
            base.__dict__.update(passed)
        try:
            return self._wrapped.step(closure)
        finally:
            for base in self._wrapped.all:
                for name in passed:
                    base.__dict__.pop(name, None)

    def _skipped_by_scaler(self) -> bool:
        found_inf: Tensor | None = self.__dict__.get("found_inf")
        return found_inf is not None and bool(found_inf)
