"""One or several wrapped optimizers, seen as one.

A language model is often trained by two optimizers, Muon for its matrices and AdamW for the rest. Their parameter
groups stand one after another here, and so do their state dicts, with parameters numbered through, so that schedulers
and checkpoint tools see a single optimizer. What a state dict holds beyond that stays with its optimizer.
"""

from __future__ import annotations

import inspect
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import LBFGS, Optimizer

from .malformed import AS_IT_WAS, malformed, refuse_malformed
from .merged import MergedGroups, MergedState
from .snapshot import Snapshot

PARTS_KEY = "parts"
"""In the state dict of several optimizers: what each saves besides parameter groups and the state of parameters."""


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
        self._groups = MergedGroups(self.all)

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """Changing the list changes the bases' own; what is appended goes to the last of them."""
        return self.all[0].param_groups if self.single else self._groups.refreshed()

    @param_groups.setter
    def param_groups(self, groups: list[dict[str, Any]]) -> None:
        for base, part in zip(self.all, self._split(groups), strict=True):
            base.param_groups = part

    @property
    def state(self) -> Any:
        return self.all[0].state if self.single else MergedState(self.all)

    @state.setter
    def state(self, state: Any) -> None:
        if self.single:
            self.all[0].state = state
        elif not (isinstance(state, MergedState) and state.bases is self.all):
            fresh: list[defaultdict[Any, Any]] = [defaultdict(dict) for _ in self.all]
            merged = MergedState(self.all)
            for key, value in list(state.items()):
                fresh[merged.owner(key)][key] = value
            for base, part in zip(self.all, fresh, strict=True):
                base.state = part

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

    def step(self, closure: Callable[[], Any] | None, **options: Any) -> Any:
        """Step each base once. ``options`` go to those whose ``step`` takes them.

        Raises:
            TypeError: no base takes an option.
        """
        if self.single:
            step: Callable[..., Any] = self.all[0].step
            return step(**options) if closure is None else step(closure, **options)
        taken = [{name: value for name, value in options.items() if _takes(base.step, name)} for base in self.all]
        for name in options:
            if not any(name in each for each in taken):
                raise TypeError(f'step() got "{name}", which none of {_names(self.all)} takes')
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for base, own in zip(self.all, taken, strict=True):
            base.step(**own)
        return loss

    def zero_grad(self, set_to_none: bool) -> None:
        for base in self.all:
            base.zero_grad(set_to_none=set_to_none)

    def add_param_group(self, group: dict[str, Any]) -> None:
        if not self.single:
            raise ValueError("several optimizers are wrapped; add the group to one of them: .base[i].add_param_group()")
        self.all[0].add_param_group(group)

    def owners_of(self, name: str) -> list[str]:
        """Expressions for the bases that have an attribute ``name``, from the wrapper on."""
        having = [i for i, base in enumerate(self.all) if name in base.__dict__ or hasattr(type(base), name)]
        return [".base" if self.single else f".base[{i}]" for i in having]

    def state_dict(self) -> dict[str, Any]:
        """The base's state dict, or those of several merged into one, with parameters numbered through.

        What is neither a parameter group nor the state of a parameter comes under ``"parts"``, one mapping for each
        base: ``groups``, how many of the groups are its own; ``entries``, the other entries of its state dict;
        ``state``, those entries of its state that belong to no parameter.
        """
        if self.single:
            return dict(self.all[0].state_dict())
        merged: dict[str, Any] = {"state": {}, "param_groups": []}
        merged[PARTS_KEY] = parts = []
        for base in self.all:
            groups, state, part = _taken_apart(base)
            first = sum(len(group["params"]) for group in merged["param_groups"])
            numbers = _numbered(groups, first)
            merged["state"].update({numbers[key]: value for key, value in state.items()})
            merged["param_groups"].extend(_renamed(groups, numbers))
            parts.append(part)
        return merged

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> Snapshot:
        """Parameters go by position: checkpoint tools name them. Where a part does not fit, nothing is changed.

        Settings that the saved groups lack, as those of older versions do, stay as they are.

        Returns:
            What the bases were before, to put them back where something else fails.

        Raises:
            ValueError: a part does not fit; the message names it.
        """
        before = Snapshot(self.all)
        parts = [dict(state_dict)] if self.single else self._parts(state_dict)
        for i, (base, part) in enumerate(zip(self.all, parts, strict=True)):
            where = type(base).__name__ if self.single else f"optimizer[{i}] ({type(base).__name__})"
            try:
                if "param_groups" in part:
                    refuse_malformed(part, base, "" if self.single else f"optimizer[{i}]: ")
                had = [dict(group) for group in base.param_groups]
                base.load_state_dict(part)
                for settings, group in zip(had, base.param_groups, strict=True):
                    for key in settings.keys() & base.defaults.keys():
                        group.setdefault(key, settings[key])
            except BaseException as error:
                before.restore()
                if not isinstance(error, Exception) or (isinstance(error, ValueError) and str(error)):
                    raise
                raise ValueError(
                    f"{where} cannot load the state_dict ({type(error).__name__}: {error}); {AS_IT_WAS}"
                ) from error
        return before

    def _parts(self, state_dict: Mapping[str, Any]) -> list[dict[str, Any]]:
        """What each base would have saved alone."""
        for key, kind in (("state", Mapping), ("param_groups", list)):
            if not isinstance(state_dict.get(key), kind):
                raise ValueError(malformed(key, f"a {kind.__name__.lower()}", state_dict.get(key)))
        groups, state = state_dict["param_groups"], state_dict["state"]
        known = {"state", "param_groups", PARTS_KEY}
        if set(state_dict) - known:
            raise ValueError(
                f"state_dict has unknown entries {sorted(map(repr, set(state_dict) - known))}, expected "
                f"{sorted(known)} for several optimizers; nothing was changed. Load one that a wrapper of "
                f"{_names(self.all)} has saved"
            )
        extra = state_dict.get(PARTS_KEY)
        if extra is None:
            self._refuse_loss_of_parts()
            saved: list[Any] = [{"entries": {}, "state": {}} for _ in self.all]
            each = self._split(groups)
        else:
            saved = _checked_parts(extra, len(self.all))
            if sum(part["groups"] for part in saved) != len(groups):
                counts = [part["groups"] for part in saved]
                raise ValueError(
                    f"state_dict: {PARTS_KEY} is of {counts} parameter groups, param_groups has {len(groups)}; "
                    f"{AS_IT_WAS}"
                )
            each = _cut(groups, [part["groups"] for part in saved])
        parts: list[dict[str, Any]] = []
        used: set[Any] = set()
        for i, (base, own, part) in enumerate(zip(self.all, each, saved, strict=True)):
            if not own and part["entries"]:
                parts.append(dict(part["entries"]))
                continue
            for group in own:
                names = group.get("params") if isinstance(group, Mapping) else None
                if not (isinstance(names, list | tuple) and all(isinstance(name, int | str) for name in names)):
                    raise ValueError(
                        malformed("param_groups", f"mappings with lists of params (optimizer[{i}])", group)
                    )
            here, there = ([len(group["params"]) for group in groups_] for groups_ in (base.param_groups, own))
            if here != there:
                raise ValueError(
                    f"state_dict: params of optimizer[{i}] must be {here} in its groups, found {there}; {AS_IT_WAS}"
                )
            numbers = _numbered(own, 0)
            used.update(numbers)
            of_parameters = {number: state[key] for key, number in numbers.items() if key in state}
            parts.append(
                {
                    **part["entries"],
                    "state": of_parameters | part["state"],
                    "param_groups": _renamed(own, numbers),
                }
            )
        if set(state) - used:
            unknown = sorted(map(repr, set(state) - used))
            raise ValueError(
                f"state_dict: state has entries {unknown}, which are in the params of no group; {AS_IT_WAS}"
            )
        return parts

    def _refuse_loss_of_parts(self) -> None:
        """torch.distributed.checkpoint carries on parameter groups and the state of parameters, and nothing else."""
        for i, base in enumerate(self.all):
            _, _, part = _taken_apart(base)
            kept = [*part["entries"], *part["state"]]
            if kept:
                raise ValueError(
                    f"state_dict has no {PARTS_KEY!r}, in which optimizer[{i}] ({type(base).__name__}) keeps {kept}: a "
                    "checkpoint tool has dropped it; nothing was changed. Save state_dict() itself, with torch.save, "
                    "and load that"
                )

    def _split(self, groups: list[dict[str, Any]]) -> list[list[dict[str, Any]]]:
        sizes = [len(base.param_groups) for base in self.all]
        if self.single:
            return [groups]
        if len(groups) != sum(sizes):
            raise ValueError(
                f"expected {sum(sizes)} parameter groups for optimizers of {sizes}, found {len(groups)}; load or "
                "set as many as there are"
            )
        return _cut(groups, sizes)


def _checked_parts(parts: Any, count: int) -> list[dict[str, Any]]:
    if not isinstance(parts, list) or len(parts) != count:
        raise ValueError(malformed(PARTS_KEY, f"a list of {count} mappings, one for each optimizer", parts))
    for i, part in enumerate(parts):
        path = f"{PARTS_KEY}[{i}]"
        if not isinstance(part, Mapping) or part.keys() != {"groups", "entries", "state"}:
            raise ValueError(malformed(path, "a mapping of groups, entries and state", part))
        if not isinstance(part["groups"], int) or isinstance(part["groups"], bool) or part["groups"] < 0:
            raise ValueError(malformed(f"{path}.groups", "a count", part["groups"]))
        for name in ("entries", "state"):
            if not isinstance(part[name], Mapping):
                raise ValueError(malformed(f"{path}.{name}", "a mapping", part[name]))
    return parts


def _takes(step: Callable[..., Any], name: str) -> bool:
    parameters = inspect.signature(step).parameters
    return name in parameters or any(p.kind is p.VAR_KEYWORD for p in parameters.values())


def _names(bases: Iterable[Optimizer]) -> str:
    return ", ".join(type(base).__name__ for base in bases)


def _cut(groups: list[dict[str, Any]], sizes: Sequence[int]) -> list[list[dict[str, Any]]]:
    starts = [sum(sizes[:i]) for i in range(len(sizes))]
    return [groups[start : start + size] for start, size in zip(starts, sizes, strict=True)]


def _taken_apart(base: Optimizer) -> tuple[list[dict[str, Any]], dict[Any, Any], dict[str, Any]]:
    """Parameter groups, the state of parameters, and what else the state dict of ``base`` holds."""
    saved = dict(base.state_dict())
    groups, state = saved.get("param_groups"), saved.get("state")
    if not (isinstance(groups, list) and isinstance(state, Mapping)):  # a form of its own
        return [], {}, {"groups": 0, "entries": saved, "state": {}}
    entries = {key: value for key, value in saved.items() if key not in ("param_groups", "state")}
    named = {name for group in groups for name in group["params"]}
    of_parameters = {key: value for key, value in state.items() if key in named}
    others = {key: value for key, value in state.items() if key not in named}
    return groups, of_parameters, {"groups": len(groups), "entries": entries, "state": others}


def _numbered(groups: list[dict[str, Any]], first: int) -> dict[Any, int]:
    """What a state dict calls its parameters, and their positions from ``first``."""
    names = (name for group in groups for name in group["params"])
    return {name: i for i, name in enumerate(names, first)}


def _renamed(groups: list[dict[str, Any]], names: dict[Any, int]) -> list[dict[str, Any]]:
    return [{**group, "params": [names[name] for name in group["params"]]} for group in groups]
