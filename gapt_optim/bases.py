"""One or several wrapped optimizers, seen as one.

A language model is often trained by two optimizers, Muon for its matrices and AdamW for the rest.
Their parameter groups stand one after another here, and so do their state dicts, with
parameters numbered through, so that schedulers and checkpoint tools see a single optimizer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
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
        owner: dict[torch.Tensor, int] = {}
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
        if self.single:
            return self.all[0].state
        return {parameter: state for base in self.all for parameter, state in base.state.items()}

    @state.setter
    def state(self, state: Any) -> None:
        if self.single:
            self.all[0].state = state
            return
        for base in self.all:
            own = {parameter for group in base.param_groups for parameter in group["params"]}
            base.state.clear()
            base.state.update({parameter: value for parameter, value in state.items() if parameter in own})

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
        for base in self.all:
            part = base.state_dict()
            merged["state"].update({key + first: value for key, value in part["state"].items()})
            merged["param_groups"].extend(_renumbered(part["param_groups"], first))
            first += sum(len(group["params"]) for group in part["param_groups"])
        return merged

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if self.single:
            self.all[0].load_state_dict(state_dict)
            return
        parts = []
        first = 0
        for groups in self._split(state_dict["param_groups"]):
            keys = [key for group in groups for key in group["params"]]
            state = {key - first: state_dict["state"][key] for key in keys if key in state_dict["state"]}
            parts.append({"state": state, "param_groups": _renumbered(groups, -first)})
            first += len(keys)
        for base, part in zip(self.all, parts, strict=True):
            base.load_state_dict(part)

    def _split(self, groups: list[dict[str, Any]]) -> Iterable[list[dict[str, Any]]]:
        sizes = [len(base.param_groups) for base in self.all]
        if self.single:
            return [groups]
        if len(groups) != sum(sizes):
            raise ValueError(f"expected {sum(sizes)} parameter groups for optimizers of {sizes}, found {len(groups)}")
        starts = [sum(sizes[:i]) for i in range(len(sizes))]
        return [groups[start : start + size] for start, size in zip(starts, sizes, strict=True)]


def _renumbered(groups: list[dict[str, Any]], offset: int) -> list[dict[str, Any]]:
    return [{**group, "params": [key + offset for key in group["params"]]} for group in groups]
