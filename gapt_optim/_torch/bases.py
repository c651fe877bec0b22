"""One or several wrapped optimizers, seen as one.

A language model is often trained by two optimizers, Muon for its matrices and AdamW for the rest.
Their parameter groups stand one after another here, and so do their state dicts, with
parameters numbered through, so that schedulers and checkpoint tools see a single optimizer.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, MutableMapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import LBFGS, Optimizer


class Bases:
    """Holds the wrapped optimizers and reads them afresh at every access.

    Raises:
        TypeError: something is not a torch.optim.Optimizer.
        ValueError: none, or two optimizers of the same parameter, or LBFGS among several.
    """

    def __init__(self, optimizer: Optimizer | Sequence[Optimizer]) -> None:
        self.single = isinstance(optimizer, Optimizer)
        if not isinstance(optimizer, Optimizer | Sequence):
            raise TypeError(
                f"optimizer must be a torch.optim.Optimizer or a sequence of them, found {type(optimizer).__name__}"
            )
        self.all: tuple[Optimizer, ...] = (optimizer,) if isinstance(optimizer, Optimizer) else tuple(optimizer)
        if not self.all:
            raise ValueError("optimizer is an empty sequence; pass at least one torch.optim.Optimizer")
        owner: dict[Tensor, int] = {}
        for i, base in enumerate(self.all):
            if not isinstance(base, Optimizer):
                raise TypeError(f"optimizer[{i}] must be a torch.optim.Optimizer, found {type(base).__name__}")
            if not self.single and isinstance(base, LBFGS):
                raise ValueError(f"optimizer[{i}] is LBFGS, which evaluates its closure again and must be the only one")
            for group in base.param_groups:
                for parameter in group["params"]:
                    if owner.setdefault(parameter, i) != i:
                        raise ValueError(f"optimizer[{owner[parameter]}] and optimizer[{i}] share a parameter")

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        if self.single:
            return self.all[0].param_groups
        return [group for base in self.all for group in base.param_groups]

    @param_groups.setter
    def param_groups(self, groups: list[dict[str, Any]]) -> None:
        for base, part in zip(self.all, self._split(groups), strict=True):
            base.param_groups = part

    @property
    def state(self) -> Any:
        return self.all[0].state if self.single else _MergedState(self.all)

    @state.setter
    def state(self, state: Any) -> None:
        if self.single:
            self.all[0].state = state
            return
        items = list(state.items())
        for base in self.all:
            own = {parameter for group in base.param_groups for parameter in group["params"]}
            base.state = defaultdict(dict, {parameter: value for parameter, value in items if parameter in own})

    @property
    def defaults(self) -> dict[str, Any]:
        """With several bases, only what all of them have: what a scheduler may rely on in every group."""
        if self.single:
            return self.all[0].defaults
        first, *rest = (base.defaults for base in self.all)
        return {key: value for key, value in first.items() if all(key in other for other in rest)}

    @defaults.setter
    def defaults(self, defaults: dict[str, Any]) -> None:
        for base in self.all:
            base.defaults = defaults if self.single else base.defaults | defaults

    def step(self, closure: Callable[[], Any] | None) -> Any:
        if self.single:
            return self.all[0].step() if closure is None else self.all[0].step(closure)
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for base in self.all:
            base.step()
        return loss

    def zero_grad(self, set_to_none: bool) -> None:
        for base in self.all:
            base.zero_grad(set_to_none=set_to_none)

    def add_param_group(self, group: dict[str, Any]) -> None:
        if not self.single:
            raise ValueError("several optimizers are wrapped; add the group to one of them: .base[i].add_param_group()")
        self.all[0].add_param_group(group)

    def state_dict(self) -> dict[str, Any]:
        """The base's state dict, or those of several merged into one, with parameters numbered through."""
        if self.single:
            return dict(self.all[0].state_dict())
        merged: dict[str, Any] = {"state": {}, "param_groups": []}
        first = 0
        for i, base in enumerate(self.all):
            part = base.state_dict()
            if "param_groups" not in part:
                raise ValueError(
                    f"optimizer[{i}] ({type(base).__name__}) has a state dict without param_groups, which cannot be "
                    "merged with another; wrap it alone"
                )
            numbers = _numbered(part["param_groups"], first)
            merged["state"].update({numbers.get(key, key): value for key, value in part["state"].items()})
            merged["param_groups"].extend(_renamed(part["param_groups"], numbers))
            first += len(numbers)
        return merged

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Nothing is loaded where a part does not fit. Parameters go by position: checkpoint tools name them."""
        if self.single:
            self.all[0].load_state_dict(state_dict)
            return
        parts = []
        for i, (base, groups) in enumerate(zip(self.all, self._split(state_dict["param_groups"]), strict=True)):
            here, saved = ([len(group["params"]) for group in each] for each in (base.param_groups, groups))
            if here != saved:
                raise ValueError(f"optimizer[{i}] has parameter groups of {here} parameters, found {saved}")
            numbers = _numbered(groups, 0)
            state = {number: state_dict["state"][key] for key, number in numbers.items() if key in state_dict["state"]}
            parts.append({"state": state, "param_groups": _renamed(groups, numbers)})
        for base, part in zip(self.all, parts, strict=True):
            base.load_state_dict(part)

    def _split(self, groups: list[dict[str, Any]]) -> list[list[dict[str, Any]]]:
        sizes = [len(base.param_groups) for base in self.all]
        if self.single:
            return [groups]
        if len(groups) != sum(sizes):
            raise ValueError(f"expected {sum(sizes)} parameter groups for optimizers of {sizes}, found {len(groups)}")
        starts = [sum(sizes[:i]) for i in range(len(sizes))]
        return [groups[start : start + size] for start, size in zip(starts, sizes, strict=True)]


class _MergedState(MutableMapping[Tensor, Any]):
    """The states of several optimizers as one live mapping: each parameter's is in the optimizer that owns it."""

    def __init__(self, bases: Sequence[Optimizer]) -> None:
        self._bases = bases

    def _owner(self, parameter: Tensor) -> Any:
        for base in self._bases:
            if parameter in base.state or any(parameter is p for group in base.param_groups for p in group["params"]):
                return base.state
        raise KeyError(parameter)

    def __getitem__(self, parameter: Tensor) -> Any:
        return self._owner(parameter)[parameter]

    def __setitem__(self, parameter: Tensor, state: Any) -> None:
        self._owner(parameter)[parameter] = state

    def __delitem__(self, parameter: Tensor) -> None:
        del self._owner(parameter)[parameter]

    def __contains__(self, parameter: object) -> bool:
        return any(parameter in base.state for base in self._bases)

    def __iter__(self) -> Iterator[Tensor]:
        return (parameter for base in self._bases for parameter in base.state)

    def __len__(self) -> int:
        return sum(len(base.state) for base in self._bases)


def _numbered(groups: list[dict[str, Any]], first: int) -> dict[Any, int]:
    """What a state dict calls its parameters, and their positions from ``first``."""
    names = (name for group in groups for name in group["params"])
    return {name: i for i, name in enumerate(names, first)}


def _renamed(groups: list[dict[str, Any]], names: dict[Any, int]) -> list[dict[str, Any]]:
    return [{**group, "params": [names[name] for name in group["params"]]} for group in groups]
