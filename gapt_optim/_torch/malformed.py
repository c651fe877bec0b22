"""State dicts that a wrapped optimizer would take, and fail with in a step to come.

torch loads a learning rate of "abc" or a moment of another shape without a word. What is refused here is refused before
anything is changed, by the name of its entry. Of an optimizer of ``torch.optim`` the settings are tried on its own
constructor, and the state is compared with what one step of it makes; of any other, saved values are compared with
those of now.

Of a tensor only its shape is read, unless it is one number: the state of a large model is twice its size, infinite
entries are no mistake (a second moment in half precision), and to read a DTensor takes all ranks.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from numbers import Real
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import LBFGS, Optimizer, SparseAdam

AS_IT_WAS = "nothing was changed. Load a state_dict that the same optimizer has saved"
_SHAPE = (2, 3, 5, 7, 11, 13)
"""Of a parameter to try an optimizer on: sizes by which its state tells which tensors have the parameter's shape."""

_ROUNDING = 1e-12
_HOW = {"capturable": False, "fused": None, "foreach": False, "differentiable": False}
"""Settings of how a step is computed, as it is tried: what was saved on a GPU may be loaded where there is none."""


def malformed(path: str, expected: str, found: Any) -> str:
    """What a refusal says."""
    return f"state_dict: {path} must be {expected}, found {_short(found)} ({type(found).__name__}); {AS_IT_WAS}"


def refuse_malformed(state_dict: Mapping[str, Any], base: Optimizer, where: str = "") -> None:
    """Raise ValueError where a state dict is not built as ``base`` builds its own.

    Args:
        state_dict: with an entry ``param_groups``.
        base: the optimizer that is to load it.
        where: begins the message.
    """
    groups, state = state_dict["param_groups"], state_dict.get("state")
    if not isinstance(groups, list | tuple):
        raise ValueError(where + malformed("param_groups", "a list", groups))
    if not isinstance(state, Mapping):
        raise ValueError(where + malformed("state", "a mapping", state))
    if len(groups) != len(base.param_groups):
        raise ValueError(
            f"{where}state_dict: param_groups must be {len(base.param_groups)}, found {len(groups)}; {AS_IT_WAS}"
        )
    names: list[Any] = []
    for i, (group, live) in enumerate(zip(groups, base.param_groups, strict=True)):
        path = f"param_groups[{i}]"
        if not isinstance(group, Mapping):
            raise ValueError(where + malformed(path, "a mapping", group))
        params = group.get("params")
        if not isinstance(params, list | tuple) or len(params) != len(live["params"]):
            raise ValueError(where + malformed(f"{path}.params", f"a list of {len(live['params'])}", params))
        names.extend(params)
        if not all(isinstance(name, int | str) for name in params) or len(set(names)) != len(names):
            raise ValueError(where + malformed(f"{path}.params", "a number or name of its own for each", params))
        for key, value in group.items():
            if not isinstance(key, str):
                raise ValueError(where + malformed(path, "names as keys", key))
            if key != "params" and key in live and not _alike(live[key], value):
                raise ValueError(where + malformed(f"{path}.{key}", f"a value like {_short(live[key])}", value))
        if _from_torch(base):
            _refuse_settings(group, live, type(base), where + path)
    _refuse_states(state, names, groups, base, where)


def _from_torch(base: Optimizer) -> bool:
    return f"{type(base).__module__}.".startswith("torch.optim.")


# Settings


def _refuse_settings(group: Mapping[str, Any], live: dict[str, Any], kind: type[Optimizer], path: str) -> None:
    """The constructor knows which settings it takes. One that the live group has too is not tried."""
    taken = inspect.signature(kind).parameters
    now = {key: value for key, value in live.items() if key in taken and key != "params"}
    given = {key: _rounded(group[key]) for key in now if key in group and not _equal(group[key], now[key])}
    if not given or not live["params"] or _problem(kind, live, now) is not None:
        return
    found = _problem(kind, live, now | given)
    if found is None:
        return
    alone = {key: problem for key in given if (problem := _problem(kind, live, now | {key: given[key]})) is not None}
    key, problem = next(iter(alone.items()), (", ".join(given), found))
    expected = f"what {kind.__name__} takes ({type(problem).__name__}: {problem})"
    raise ValueError(malformed(f"{path}.{key}", expected, group.get(key)))


def _rounded(value: Any) -> Any:
    """A schedule that ends at 0, such as LinearLR's, may end a rounding below, which constructors refuse."""
    return 0.0 * value if _number(value) and -_ROUNDING < value < 0 else value


def _problem(kind: type[Optimizer], live: dict[str, Any], settings: dict[str, Any]) -> Exception | None:
    """What ``kind`` says of settings for a parameter like the first of the live group's."""
    try:
        for key, value in settings.items():
            if isinstance(value, float) and not torch.isfinite(torch.tensor(value, dtype=_real(live))):
                raise OverflowError(f"{key} is not a finite number in the parameters' type")
            if live[key] is None and not isinstance(value, bool | int | float | str | None):
                raise TypeError(f"{key} is a {type(value).__name__}")
            if value is None and not isinstance(live[key], bool | str | None):
                raise TypeError(f"{key} is None")
        _state_after_a_step(kind, live["params"][0], settings)
    except Exception as problem:
        return problem
    return None


def _real(live: dict[str, Any]) -> torch.dtype:
    dtype: torch.dtype = live["params"][0].dtype
    return dtype.to_real() if dtype.is_complex else dtype if dtype.is_floating_point else torch.float32


def _state_after_a_step(kind: type[Optimizer], like: Tensor, settings: Mapping[str, Any]) -> dict[str, Any]:
    """What ``kind`` keeps of one small parameter; empty for those that want a closure, or sparse gradients."""
    make: Callable[..., Optimizer] = kind
    # With a dimension at least: without one, moments would look like counts.
    parameter = nn.Parameter(torch.zeros(_SHAPE[: max(like.ndim, 1)], dtype=like.dtype, device=like.device))
    how = {key: _HOW[key] for key in _HOW.keys() & settings.keys() if isinstance(settings[key], bool | None)}
    tried = make([parameter], **{**settings, **how})
    if not isinstance(tried, LBFGS | SparseAdam):
        parameter.grad = torch.zeros_like(parameter)
        with torch.no_grad():
            inspect.unwrap(kind.step)(tried)  # it is no step of the user's: hooks on all optimizers do not see it
    return dict(tried.state[parameter])


# State


def _refuse_states(
    state: Mapping[Any, Any], names: Sequence[Any], groups: Sequence[Mapping[str, Any]], base: Optimizer, where: str
) -> None:
    """The state of each parameter: its kinds, against those of now and those that a step makes."""
    parameters = [p for group in base.param_groups for p in group["params"]]
    group_of = [i for i, group in enumerate(base.param_groups) for _ in group["params"]]
    typical: dict[tuple[int, int], dict[str, Any]] = {}
    kinds: dict[str, bool] = {}
    for name, parameter, number in zip(names, parameters, group_of, strict=True):
        if name not in state:
            continue
        path, saved = f"state[{name!r}]", state[name]
        now = base.state.get(parameter, {})
        if not isinstance(saved, Mapping):
            if not isinstance(now, Mapping):  # an optimizer with a form of its own
                continue
            raise ValueError(where + malformed(path, "a mapping", saved))
        for key, live in now.items() if isinstance(now, Mapping) else ():
            if key in saved and not _alike(live, saved[key]):
                raise ValueError(where + malformed(f"{path}.{key}", f"a value like {_short(live)}", saved[key]))
        if not _from_torch(base) or not saved:
            continue
        at = (number, parameter.ndim)
        if at not in typical:
            typical[at] = _typical(base, base.param_groups[number] | dict(groups[number]), parameter)
        for key, made in typical[at].items():
            if key not in saved:
                live, given = base.param_groups[number], groups[number]
                other = [k for k in live if k != "params" and k in given and not _equal(given[k], live[k])]
                asked = f", and the saved group has another {', '.join(other)} than this one" if other else ""
                raise ValueError(f"{where}state_dict: {path}.{key} is missing{asked}; {AS_IT_WAS}")
            found = saved[key]
            if not _as_made(made, found, parameter):
                raise ValueError(where + malformed(f"{path}.{key}", _expected(made, parameter), found))
            # torch looks at the first to know whether all are tensors
            if kinds.setdefault(key, isinstance(found, Tensor)) != isinstance(found, Tensor):
                raise ValueError(where + malformed(f"{path}.{key}", "of the same type for all parameters", found))


def _typical(base: Optimizer, group: Mapping[str, Any], parameter: Tensor) -> dict[str, Any]:
    """What ``base`` keeps of a parameter; empty where that cannot be tried."""
    taken = inspect.signature(type(base)).parameters
    try:
        return _state_after_a_step(
            type(base), parameter, {k: v for k, v in group.items() if k in taken and k != "params"}
        )
    except Exception:  # settings that are told of elsewhere
        return {}


def _as_made(made: Any, saved: Any, parameter: Tensor) -> bool:
    if not isinstance(made, Tensor):
        return _alike(made, saved) and (saved is None) == (made is None)
    if made.numel() == 1:
        number = _number(saved) and _finite(saved)
        return number and (made.shape != () or float(saved) >= 0)  # counts, rates and averages of rates
    if not isinstance(saved, Tensor):
        return False
    return saved.shape == parameter.shape if made.shape == _SHAPE[: made.ndim] else saved.ndim == made.ndim


def _expected(made: Any, parameter: Tensor) -> str:
    if not isinstance(made, Tensor):
        return f"a value like {_short(made)}"
    if made.numel() == 1:
        return "a finite number that is not negative"
    shape = f" of shape {tuple(parameter.shape)}" if made.shape == _SHAPE[: made.ndim] else ""
    return f"a tensor{shape}"


# Values


def _alike(live: Any, saved: Any) -> bool:
    """``saved`` can stand where ``live`` is: None is settled later, a tensor of one number is a number."""
    if live is None or saved is None:
        return True
    if isinstance(live, Tensor) and isinstance(saved, Tensor) and not _number(live):
        return live.shape == saved.shape
    if isinstance(live, bool):
        return isinstance(saved, bool) or (_number(saved) and _finite(saved) and float(saved) in (0.0, 1.0))
    if _number(live) or _number(saved):
        return _number(live) and _number(saved) and (_finite(saved) or not _finite(live))
    if isinstance(live, list | tuple) and isinstance(saved, list | tuple):
        if len(live) != len(saved):
            return isinstance(live, list)
        return all(_alike(a, b) for a, b in zip(live, saved, strict=True))
    return isinstance(saved, type(live)) or isinstance(live, type(saved))


def _equal(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor) or isinstance(b, Tensor):
        return isinstance(a, Tensor) and isinstance(b, Tensor) and a.shape == b.shape and bool((a == b).all())
    return type(a) is type(b) and bool(a == b)


def _number(value: Any) -> bool:
    return isinstance(value, Real) or (type(value) is Tensor and value.numel() == 1)


def _finite(value: Any) -> bool:
    if isinstance(value, Tensor):
        return bool(torch.isfinite(value).all())
    try:
        return math.isfinite(value)
    except OverflowError:  # an integer that no float can hold
        return False


def _short(value: Any) -> str:
    text = f"a tensor {tuple(value.shape)}" if isinstance(value, Tensor) else repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
