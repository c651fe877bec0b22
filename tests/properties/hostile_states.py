"""Every entry of a real state dict, replaced by each of a list of hostile values, removed, or joined by another."""

from __future__ import annotations

import copy
import json
import math
import warnings
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gapt_optim import AlignmentConfig, GAPTConfig, GAPTOptimizer, GateConfig, LayerConfig
from tests.loops import (
    RESTLESS,
    Base,
    Net,
    adamw,
    assert_same,
    loss_of,
    make_net,
    matrices_and_rest,
    run,
    sgd,
    weights,
    wrap,
)

PARAMETER = AlignmentConfig(parameter_every=2)
VALIDATION = RESTLESS.model_copy(update={"signal": "validation"})
RUNS: dict[str, tuple[Base | Any, GAPTConfig, int]] = {
    "memorization": (adamw, GAPTConfig(gate=RESTLESS), 2),
    "compression": (adamw, GAPTConfig(gate=RESTLESS), 4),
    "published": (sgd, GAPTConfig(gate=GateConfig.published(patience_memorization=2, patience_compression=2)), 3),
    "held out": (adamw, GAPTConfig(gate=VALIDATION, layers=LayerConfig(schedule="rotate")), 3),
    "several, aligned": (matrices_and_rest, GAPTConfig(gate=RESTLESS, alignment=PARAMETER), 4),
}
"""The wrapped optimizers, the settings, and the steps before the state is saved."""

PLAIN = (None, "banana", -1, 0, 0.5, 3, 2**63, 1e308, math.nan, math.inf, True, [], {}, 10**400)
NESTED = ([None], [1e308, 1e308], ["layers.0", "layers.0"], {"layers.0": None})
TENSORS = (torch.zeros(0), torch.ones(2, 3, 5), torch.ones(6, 6, dtype=torch.complex64), torch.full((6, 6), math.inf))


@dataclass(frozen=True)
class Case:
    """A state dict, where it was damaged, and how."""

    path: tuple[Any, ...]
    how: str
    state_dict: dict[str, Any]

    @property
    def names(self) -> tuple[str, ...]:
        """One of these is in a good refusal: the entry, or the list that holds it."""
        named = [str(key) for key in self.path if isinstance(key, str)]
        return (named[-1],) if named else ("state", "param_groups")


def trained(kind: str, steps: int | None = None) -> tuple[Net, GAPTOptimizer]:
    """A run of its own."""
    base, config, usual = RUNS[kind]
    model = make_net()
    optimizer = wrap(model, base, config, announce=False)
    for i in range(usual if steps is None else steps):
        run(model, optimizer, range(i, i + 1))
        optimizer.record_validation(2.0 + i % 3)
    return model, optimizer


def places(value: Any, here: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Every entry in a nest of dicts, lists and tuples, itself first."""
    yield here
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list | tuple) else ()
    for key, item in items:
        yield from places(item, (*here, key))


def damaged(value: Any, path: tuple[Any, ...], change: Any) -> Any:
    """A copy in which ``change``, given a copy of what holds the entry, says what holds it now."""
    if len(path) == 1:
        return change(copy.copy(value))
    inner = damaged(value[path[0]], path[1:], change)
    if isinstance(value, tuple):
        return (*value[: path[0]], inner, *value[path[0] + 1 :])
    changed = copy.copy(value)
    changed[path[0]] = inner
    return changed


def changes(entry: Any, key: Any, values: tuple[Any, ...]) -> Iterator[tuple[tuple[Any, ...], str, Any]]:
    """What is added to the path, words, and the change of what holds ``entry``."""

    def replaced(by: Any) -> Any:
        def change(holder: Any) -> Any:
            if isinstance(holder, tuple):
                return (*holder[:key], by, *holder[key + 1 :])
            holder[key] = by
            return holder

        return change

    def removed(holder: Any) -> Any:
        if isinstance(holder, tuple):
            return (*holder[:key], *holder[key + 1 :])
        del holder[key]
        return holder

    for value in values:
        if not (type(value) is type(entry) and not isinstance(value, Tensor) and (value == entry)):
            yield (), f"= {value!r:.60}", replaced(value)
    yield (), "removed", removed
    if isinstance(entry, dict):
        yield ("surplus",), "added", replaced({**entry, "surplus": 1})
    if isinstance(entry, list):
        yield (), "one more", replaced([*entry, entry[0] if entry else 1])
    if isinstance(entry, Tensor) and entry.ndim:
        yield (), "another shape", replaced(torch.cat([entry, entry]))
        yield (), "another type", replaced(entry.to(torch.float16))


def cases(saved: dict[str, Any]) -> Iterator[Case]:
    """Of one state dict: first of what is ours in it, then of the rest."""
    own = json.loads(saved["param_groups"][0]["gapt"])
    for path in places(own):
        if path:
            entry = at(own, path)
            for more, how, change in changes(entry, path[-1], (*PLAIN, *NESTED)):
                text = json.dumps(damaged(own, path, change))
                yield Case(("gapt", *path, *more), how, damaged(saved, OWN, lambda _, text=text: with_own(saved, text)))
    for path in places(saved):
        if path:
            for more, how, change in changes(at(saved, path), path[-1], (*PLAIN, *NESTED, *TENSORS)):
                yield Case((*path, *more), how, damaged(saved, path, change))


OWN = ("param_groups", 0, "gapt")
HOW = ("capturable", "fused", "foreach", "differentiable")
"""Settings of how a step is computed. A state from a GPU may be loaded, and these set, before a step is taken."""


def with_own(saved: dict[str, Any], text: str) -> dict[str, Any]:
    """The first parameter group with another text of ours."""
    return {**saved["param_groups"][0], "gapt": text}


def at(value: Any, path: tuple[Any, ...]) -> Any:
    for key in path:
        value = value[key]
    return value


def everything(model: Net, optimizer: GAPTOptimizer) -> Any:
    """What a load could change, as it is now."""
    bases = optimizer.base if isinstance(optimizer.base, tuple) else (optimizer.base,)
    own = [optimizer.state_dict(), optimizer.metrics, optimizer.phase.value, optimizer.config.model_dump()]
    return [*own, [base.state_dict() for base in bases], dict(model.state_dict())]


class Walk:
    """Loads state dicts of one run into an optimizer that has trained on, or into one that has not begun.

    It is made anew after each that was accepted.
    """

    def __init__(self, kind: str, *, fresh: bool, steps: int = 30) -> None:
        self.steps = steps
        self.pristine = trained(kind)
        self.saved = copy.deepcopy(self.pristine[1].state_dict())
        if fresh:
            self.pristine = trained(kind, steps=0)
        else:
            run(*self.pristine, range(7, 9))
        self.counts: Counter[str] = Counter()
        self.faults: list[str] = []
        self._anew()

    def _anew(self) -> None:
        self.model, self.optimizer = copy.deepcopy(self.pristine)
        self.before = copy.deepcopy(everything(self.model, self.optimizer))

    def load(self, case: Case) -> None:
        """Refused as a whole with the entry's name, or taken and gone on from; anything else is a fault."""
        self.counts["dictionaries"] += 1
        groups, states = list(self.optimizer.param_groups), dict(self.optimizer.state)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                self.optimizer.load_state_dict(copy.deepcopy(case.state_dict))  # torch keeps the tensors
        except ValueError as refusal:
            self.counts["refused"] += 1
            if not any(name in str(refusal) for name in case.names):
                self._fault("refused without the name", case, refusal)
            try:
                assert_same(everything(self.model, self.optimizer), self.before)
                assert all(a is b for a, b in zip(self.optimizer.param_groups, groups, strict=True))
                assert all(self.optimizer.state[p] is state for p, state in states.items())
            except AssertionError as difference:
                self._fault("refused with a change", case, difference)
                self._anew()
        except Exception as error:
            self._fault("refused without the name", case, error)
            self._anew()
        else:
            self.counts["accepted"] += 1
            try:
                self._goes_on()
            except Exception as error:
                self._anew()
                if case.path[-1] in HOW and case.how == "= True":
                    self.counts["left to torch"] += 1  # as on a GPU
                elif case.path[0] in ("param_groups", "state") and self._bare_diverges(case):
                    self.counts["diverged as without us"] += 1
                else:
                    self._fault("accepted and failed later", case, error)
            self._anew()

    def _goes_on(self) -> None:
        for i in range(self.steps):
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message="the entropy of layer")  # of the levels that were loaded
                (metrics,) = run(self.model, self.optimizer, range(i, i + 1))
            self.optimizer.record_validation(2.0 + i % 3)
        assert metrics is not None
        assert metrics["loss"] is not None, "the loss is not finite"
        assert metrics["entropy"] is not None, "the entropy is not finite"
        json.dumps(metrics, allow_nan=False)
        assert all(bool(w.isfinite().all()) for w in weights(self.model).values()), "the weights are not finite"
        saved = copy.deepcopy(self.optimizer.state_dict())
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            self.optimizer.load_state_dict(saved)
        run(self.model, self.optimizer, range(2))

    def _bare_diverges(self, case: Case) -> bool:
        """A weight decay of 2**63 is one: the wrapped optimizers, by themselves, lose the weights too."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self.optimizer.load_state_dict(copy.deepcopy(case.state_dict))
        bases = self.optimizer.base if isinstance(self.optimizer.base, tuple) else (self.optimizer.base,)
        self.optimizer.hook.remove()
        try:
            for i in range(self.steps):
                loss_of(self.model, i).backward()
                for base in bases:
                    base.step()
                    base.zero_grad()
        except Exception:
            return False
        return not math.isfinite(loss_of(self.model, 0).item())

    def _fault(self, kind: str, case: Case, error: BaseException) -> None:
        self.counts[kind] += 1
        path = ".".join(map(str, case.path))
        self.faults.append(f"{kind}: {path} {case.how}: {type(error).__name__}: {str(error)[:150]}")
