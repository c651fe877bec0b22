"""What it is to be a ``torch.optim.Optimizer`` that is made of one or several others.

A language model is often trained by two optimizers, Muon for its matrices and AdamW for the rest. :class:`Several` puts
their parameter groups one after another, and their state dicts too, so that schedulers and checkpoint tools see one
optimizer. :class:`OptimizerWrapper` is the shell around it: hooks, state dicts, copies, gradient scalers.

Nothing is copied: parameter groups, state and defaults are those of the wrapped optimizers at every access.
"""

from __future__ import annotations

import functools
import json
from abc import abstractmethod
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import LBFGS, Optimizer

from ._tell import tell

STATE_KEY = "gapt"
"""In every parameter group of a state dict, where checkpoint tools carry it along."""
START_FRESH = f'to start the gate fresh, remove "{STATE_KEY}" from each group of state_dict["param_groups"]'
"""Ends the errors about what is under it."""
PARTS_KEY = "parts"
"""In the state dict of several optimizers: what each saves besides parameter groups and the state of parameters."""


class Several:
    """One or several optimizers, seen as one.

    Args:
        optimizer: one, or a sequence of them with disjoint parameters.

    Raises:
        TypeError: something is not a torch.optim.Optimizer, or was prepared by Accelerate.
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
            self._check(base, "optimizer" if self.single else f"optimizer[{i}]")
            for parameter in (p for group in base.param_groups for p in group["params"]):
                if owner.setdefault(parameter, i) != i:
                    raise ValueError(f"optimizer[{owner[parameter]}] and optimizer[{i}] share a parameter")

    def _check(self, base: Any, name: str) -> None:
        if not isinstance(base, Optimizer):
            raise TypeError(f"{name} must be a torch.optim.Optimizer, found {type(base).__name__}")
        if any(cls.__name__ == "AcceleratedOptimizer" for cls in type(base).__mro__):
            raise TypeError(
                f"{name} was prepared by Accelerate, whose skipped steps would not be seen; wrap first, then prepare: "
                "optimizer = GAPTOptimizer(...), then accelerator.prepare(model, optimizer)"
            )
        if not self.single and isinstance(base, LBFGS):
            raise ValueError(f"{name} is LBFGS, which evaluates its closure again and must be the only one")

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The optimizers' own dicts; of several, in a list of its own, which changes nothing when it is changed."""
        return self.all[0].param_groups if self.single else [g for base in self.all for g in base.param_groups]

    @param_groups.setter
    def param_groups(self, groups: list[dict[str, Any]]) -> None:
        counts = [len(base.param_groups) for base in self.all]
        if not self.single and len(groups) != sum(counts):
            raise ValueError(
                f"expected {sum(counts)} parameter groups for optimizers of {counts}, found {len(groups)}; set as many "
                "as there are"
            )
        for base, part in zip(self.all, [groups] if self.single else _cut(groups, counts), strict=True):
            base.param_groups = part

    @property
    def state(self) -> Any:
        return self.all[0].state if self.single else MergedState(self.all)

    @state.setter
    def state(self, state: Any) -> None:
        if self.single:
            self.all[0].state = state
            return
        items = list(state.items())
        for base in self.all:
            base.state = defaultdict(dict)
        MergedState(self.all).update(items)

    @property
    def defaults(self) -> dict[str, Any]:
        """With several, only what all of them have: what a scheduler may rely on in every group."""
        if self.single:
            return self.all[0].defaults
        first, *rest = (base.defaults for base in self.all)
        return {key: value for key, value in first.items() if all(key in other for other in rest)}

    @defaults.setter
    def defaults(self, defaults: dict[str, Any]) -> None:
        for base in self.all:
            base.defaults = defaults if self.single else base.defaults | defaults

    def step(self, closure: Callable[[], Any] | None, **options: Any) -> Any:
        """Step each once, with the same options. Several share one evaluation of the closure."""
        if self.single:
            step: Callable[..., Any] = self.all[0].step
            return step(**options) if closure is None else step(closure, **options)
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for base in self.all:
            base.step(**options)
        return loss

    def zero_grad(self, set_to_none: bool) -> None:
        for base in self.all:
            base.zero_grad(set_to_none=set_to_none)

    def add_param_group(self, group: dict[str, Any]) -> None:
        if not self.single:
            raise ValueError("several optimizers are wrapped; add the group to one of them: .base[i].add_param_group()")
        self.all[0].add_param_group(group)

    def state_dict(self) -> dict[str, Any]:
        """The optimizer's own, or those of several merged into one, with parameters numbered through.

        ``"parts"`` has one mapping for each of several: ``groups``, how many are its own; ``entries``, what else its
        state dict holds; ``state``, those entries of its state that belong to no parameter.
        """
        if self.single:
            return dict(self.all[0].state_dict())
        state: dict[Any, Any] = {}
        param_groups: list[dict[str, Any]] = []
        parts = []
        for base in self.all:
            groups, of_parameters, part = _taken_apart(base)
            numbers = _numbered(groups, first=sum(len(group["params"]) for group in param_groups))
            state.update({numbers[name]: value for name, value in of_parameters.items()})
            param_groups.extend(_renamed(groups, numbers))
            parts.append(part)
        return {"state": state, "param_groups": param_groups, PARTS_KEY: parts}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Parameters go by position: checkpoint tools name them. What a part is worth, its optimizer judges.

        Raises:
            ValueError: the parameter groups of several are not as many, or not of as many parameters.
        """
        parts = [dict(state_dict)] if self.single else self._parts_of(state_dict)
        for base, part in zip(self.all, parts, strict=True):
            base.load_state_dict(part)

    def _parts_of(self, state_dict: Mapping[str, Any]) -> list[dict[str, Any]]:
        """What each would have saved alone."""
        groups, state = state_dict["param_groups"], state_dict["state"]
        extras = state_dict.get(PARTS_KEY)
        if extras is None:  # torch.distributed.checkpoint carries groups and the state of parameters, and nothing else
            extras = [_taken_apart(base)[2] for base in self.all]
            if lost := [key for extra in extras for key in (*extra["entries"], *extra["state"])]:
                raise ValueError(
                    f"state_dict has no {PARTS_KEY!r}, which held {lost}: a checkpoint tool has dropped it. Save "
                    "state_dict() itself, with torch.save, and load that"
                )
        counts = [extra["groups"] for extra in extras]
        if len(counts) != len(self.all) or sum(counts) != len(groups):
            raise ValueError(
                f"state_dict has {len(groups)} parameter groups for optimizers of {counts}, expected "
                f"{[len(base.param_groups) for base in self.all]}; {_SAME}"
            )
        parts = []
        for i, (base, own, extra) in enumerate(zip(self.all, _cut(groups, counts), extras, strict=True)):
            if not own and extra["entries"]:  # a form of its own
                parts.append(dict(extra["entries"]))
                continue
            here, there = ([len(group["params"]) for group in each] for each in (base.param_groups, own))
            if here != there:
                raise ValueError(
                    f"state_dict: groups of optimizer[{i}] have {there} parameters, this one's {here}; {_SAME}"
                )
            numbers = _numbered(own, first=0)
            of_parameters = {number: state[name] for name, number in numbers.items() if name in state}
            saved = {"state": of_parameters | extra["state"], "param_groups": _renamed(own, numbers)}
            parts.append({**extra["entries"], **saved})
        return parts


_SAME = "nothing was changed. Load one that a wrapper of the same optimizers has saved"


class MergedState(MutableMapping[Any, Any]):
    """The states of several optimizers as one live mapping.

    A parameter's state is in the optimizer that owns it. What is not a parameter, such as the string keys that some
    optimizers put there, is in the first optimizer that has it, and a new one in the first of all.
    """

    def __init__(self, bases: Sequence[Optimizer]) -> None:
        self.bases = bases

    def _of(self, key: Any) -> Any:
        for base in self.bases:
            if key in base.state:
                return base.state
        if not isinstance(key, Tensor):
            return self.bases[0].state
        for base in self.bases:
            if any(key is parameter for group in base.param_groups for parameter in group["params"]):
                return base.state
        raise KeyError(key)

    def __getitem__(self, key: Any) -> Any:
        return self._of(key)[key]

    def __setitem__(self, key: Any, value: Any) -> None:
        self._of(key)[key] = value

    def __delitem__(self, key: Any) -> None:
        del self._of(key)[key]

    def __contains__(self, key: object) -> bool:  # not by __getitem__, which makes entries as on any optimizer
        return any(key in base.state for base in self.bases)

    def __iter__(self) -> Iterator[Any]:
        return iter(dict.fromkeys(key for base in self.bases for key in base.state))

    def __len__(self) -> int:
        return len({key for base in self.bases for key in base.state})

    def __repr__(self) -> str:
        return f"{type(self).__name__}({dict(self)})"


class OptimizerWrapper(Optimizer):
    """An optimizer made of others. Call :meth:`_wrap` in place of ``Optimizer.__init__``.

    Where torch leaves a choice:

    - Public attributes that a single wrapped optimizer has and we have not are found here too, as ``is_second_order``,
      for which training scripts ask. That includes methods: one that steps or evaluates the model by itself, such as
      ``first_step`` of SAM, does so past us, and no phase is judged by it. ``step(closure)`` does the same with us. Of
      several optimizers, only ``train`` and ``eval`` are found, for all that have them; others are on ``base[i]``.
    - Hooks on all optimizers (``torch.optim.optimizer.register_optimizer_step_pre_hook`` and ``..._post_hook``) are
      called with the wrapped optimizer, once for each of its steps, as without the wrapper. Those that are registered
      on the wrapper are called with the wrapper, before and after.
    - Names that loggers make of a class, such as Lightning's ``LearningRateMonitor``, say ``GAPTOptimizer``; ``repr``
      shows the wrapped optimizers within.
    - ``step(**options)`` hands its options to the wrapped optimizers.
    - ``param_groups`` of several is a new list at every access: groups are changed in place, and added to one of
      ``base``.
    """

    _several: Several

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        if "step" in cls.__dict__:
            cls.step = _with_own_hooks(cls.__dict__["step"])  # type: ignore[method-assign]

    def _wrap(self, several: Several) -> None:
        # Gives us torch's step and state-dict hooks without Optimizer.__init__, which would make param_groups
        # and state of our own. It sets a default, so it comes before the optimizers do.
        self.__dict__["_several"] = None
        Optimizer.__setstate__(self, {})
        self._several = several

    @abstractmethod
    def _own_state(self) -> dict[str, Any]:
        """What a state dict holds beside the wrapped optimizers' own: plain values."""

    @abstractmethod
    def _check_own_state(self, own: Any) -> tuple[dict[str, Any], str | None]:
        """What was saved, checked, and what to tell of it. Raises ValueError where it does not fit; changes nothing."""

    @abstractmethod
    def _load_own_state(self, own: dict[str, Any] | None) -> None:
        """Go on from ``own``, or start fresh."""

    @property
    def base(self) -> Any:
        """The wrapped optimizer, or a tuple of them."""
        return self._several.all[0] if self._several.single else self._several.all

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The wrapped optimizer's own groups; of several, one after another in a new list.

        Each has an entry ``"gapt"`` of None, as schedulers put an ``"initial_lr"`` there: where a checkpoint was
        flattened, torch.distributed.checkpoint looks up those entries that the groups have, and no others.
        """
        groups = self._several.param_groups
        for group in groups:
            group.setdefault(STATE_KEY, None)
        return groups

    @param_groups.setter
    def param_groups(self, groups: list[dict[str, Any]]) -> None:
        self._several.param_groups = groups

    @property
    def state(self) -> Any:
        """The wrapped optimizer's own state; of several, a mapping that looks up the right one."""
        return self._several.state

    @state.setter
    def state(self, state: Any) -> None:
        self._several.state = state

    @property
    def defaults(self) -> dict[str, Any]:
        """The wrapped optimizer's own defaults; of several, what all of them have."""
        several: Several | None = self.__dict__["_several"]
        return {} if several is None else several.defaults

    @defaults.setter
    def defaults(self, defaults: dict[str, Any]) -> None:
        self._several.defaults = defaults

    @property
    def _step_supports_amp_scaling(self) -> bool:
        # Read by GradScaler. Every base must be able to skip a step with infinite gradients by itself.
        return all(getattr(base, "_step_supports_amp_scaling", False) for base in self._several.all)

    def __getattr__(self, name: str) -> Any:
        missing = f"'{type(self).__name__}' object has no attribute '{name}'"
        several: Several | None = self.__dict__.get("_several")
        if name.startswith("_") or several is None:
            raise AttributeError(missing)
        having = [i for i, base in enumerate(several.all) if hasattr(base, name)]
        if not having:
            raise AttributeError(missing)
        if several.single:
            return getattr(several.all[0], name)
        if name not in ("train", "eval"):  # the modes of schedule-free optimizers
            remedy = " or ".join(f".base[{i}].{name}" for i in having)
            raise AttributeError(f"{missing}; of the wrapped optimizers, use {remedy}")
        methods = [getattr(several.all[i], name) for i in having]

        def all_of_them(*args: Any, **kwargs: Any) -> None:
            for method in methods:
                method(*args, **kwargs)

        return all_of_them

    def state_dict(self) -> dict[str, Any]:
        """The wrapped optimizer's state dict, with the gate and counters in its parameter groups.

        Plain values and tensors only: it loads with ``torch.load(weights_only=True)``. Our part is one JSON string, as
        checkpoint tools of ranks take nested values apart and lose some of them, and it is in every group: a flattened
        checkpoint is read at the first parameter, and on another split of the model that may be any.
        """
        for pre_hook in self._optimizer_state_dict_pre_hooks.values():
            pre_hook(self)
        state_dict = self._several.state_dict()
        own = {STATE_KEY: json.dumps(self._own_state())}
        if state_dict.get("param_groups"):
            state_dict["param_groups"] = [{**group, **own} for group in state_dict["param_groups"]]
        else:  # a form of its own, as torchao's CPUOffloadOptimizer has
            state_dict |= own
        for post_hook in self._optimizer_state_dict_post_hooks.values():
            replaced = post_hook(self, state_dict)
            state_dict = state_dict if replaced is None else replaced
        return state_dict

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from :meth:`state_dict`, or from that of a bare optimizer, with a fresh gate and a warning.

        Our part is checked whole before anything is touched. The rest is the wrapped optimizer's to load or to refuse.

        Raises:
            ValueError: our part is damaged, or of other layers or settings; the message names the field, what was
                found and what to do. Or several optimizers have other parameter groups.

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
        if notice is not None:
            tell(notice)  # first, so that where warnings are errors nothing is changed
        self._several.load_state_dict(state_dict)
        self._load_own_state(own)
        for post_hook in self._optimizer_load_state_dict_post_hooks.values():
            post_hook(self)

    def _own_part(self, state_dict: dict[str, Any]) -> tuple[dict[str, Any] | None, str | None]:
        """Take our own part out of ``state_dict``; checked, with what to tell of it."""
        groups = state_dict.get("param_groups")
        if isinstance(groups, list) and all(isinstance(group, Mapping) for group in groups):
            state_dict["param_groups"] = groups = [dict(group) for group in groups]
        else:  # a form of its own, or damaged, which the wrapped optimizer will say
            groups = []
        found = [part.pop(STATE_KEY, None) for part in (*groups, state_dict)]
        text = next((each for each in found if each is not None), None)
        if text is None:
            return None, "the state dict is of a bare optimizer: the gate starts fresh"
        try:
            own = json.loads(text)
        except (TypeError, ValueError, RecursionError) as error:
            raise ValueError(
                f'"{STATE_KEY}" in the state_dict is not what state_dict() has put there ({error}); {START_FRESH}'
            ) from error
        return self._check_own_state(own)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As on the wrapped optimizer; of several, add to one of ``base``."""
        self._several.add_param_group(param_group)

    def _step_bases(self, closure: Callable[[], Any] | None, **options: Any) -> Any:
        # GradScaler leaves these two on an optimizer whose fused kernel unscales and skips by itself.
        passed: dict[str, Any] = {
            name: self.__dict__[name] for name in ("grad_scale", "found_inf") if name in self.__dict__
        }
        for base in self._several.all:
            base.__dict__.update(passed)
        try:
            return self._several.step(closure, **options)
        finally:
            for base in self._several.all:
                for name in passed:
                    base.__dict__.pop(name, None)

    def _skipped_by_scaler(self) -> bool:
        found_inf: Tensor | None = self.__dict__.get("found_inf")
        return found_inf is not None and bool(found_inf)


def _with_own_hooks(step: Callable[..., Any]) -> Callable[..., Any]:
    """What torch makes of an optimizer's ``step``, less global hooks and the profiler's record, which the
    wrapped ones have."""

    @functools.wraps(step)
    def hooked(self: OptimizerWrapper, *args: Any, **kwargs: Any) -> Any:
        args = (self, *args)
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


def _cut(groups: list[dict[str, Any]], counts: Iterable[int]) -> list[list[dict[str, Any]]]:
    rest = iter(groups)
    return [[next(rest) for _ in range(count)] for count in counts]


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
