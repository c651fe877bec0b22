"""What is ours in a state dict, damaged: refused as a whole, naming the field, or training goes on from it."""

from __future__ import annotations

import copy
import json
import math
import warnings
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gapt_optim import GAPTConfig, GAPTOptimizer, GateConfig
from tests.loops import RESTLESS, Net, adamw, assert_same, make_net, matrices_and_rest, run, weights, wrap

BASES: dict[str, Callable[[Any], Any]] = {"one": adamw, "several": matrices_and_rest}
CONFIGS = {
    "smoothed": GAPTConfig(gate=RESTLESS),
    "published": GAPTConfig(gate=GateConfig.published(patience_memorization=2, patience_compression=2)),
    "validation": GAPTConfig(gate=RESTLESS.model_copy(update={"signal": "validation"})),
}
KINDS = [*(("one", config) for config in CONFIGS), ("several", "smoothed")]


def trained(base: str, config: str) -> tuple[Net, GAPTOptimizer]:
    model = make_net()
    optimizer = wrap(model, BASES[base], CONFIGS[config])
    run(model, optimizer, range(3))
    optimizer.record_validation(1.5)
    return model, optimizer


HOSTILE = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 12),
    st.integers(),
    st.just(10**400),
    st.floats(),
    st.text(max_size=8),
    st.sampled_from(["banana", "compression", "memorization", "published", "inf", "\ud800", "layers.0"]),
    st.lists(st.one_of(st.none(), st.integers(-2, 2), st.text(max_size=3)), max_size=3),
    st.dictionaries(st.text(max_size=4), st.integers(), max_size=2),
)


NOT_NONE = HOSTILE.filter(lambda value: value is not None)
"""None is what the groups of a wrapped optimizer have: the state dict is of that one alone."""


def paths(value: Any, here: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Every place in a nest of dicts and lists."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [here, *(path for key, item in items for path in paths(item, (*here, key)))]


def changed(data: st.DataObject, value: Any) -> Any:
    """``value`` with one to three entries replaced, removed, added, or exchanged with another's."""
    value = copy.deepcopy(value)
    for _ in range(data.draw(st.integers(1, 3))):
        everywhere = paths(value)
        path = data.draw(st.sampled_from(everywhere))
        if not path:
            if data.draw(st.integers(0, 9)) == 0:
                return data.draw(HOSTILE)
            continue
        holder = at(value, path[:-1])
        what = data.draw(st.sampled_from(["replace", "remove", "add", "exchange"]))
        if what == "replace":
            holder[path[-1]] = data.draw(HOSTILE)
        elif what == "remove":
            del holder[path[-1]]
        elif what == "exchange":
            holder[path[-1]] = copy.deepcopy(at(value, data.draw(st.sampled_from(everywhere))))
        elif isinstance(holder, dict):
            holder[data.draw(st.text(max_size=5))] = data.draw(HOSTILE)
        else:
            holder.append(data.draw(HOSTILE))
    return value


def at(value: Any, path: tuple[Any, ...]) -> Any:
    for key in path:
        value = value[key]
    return value


def everything(optimizer: GAPTOptimizer) -> Any:
    bases = optimizer.base if isinstance(optimizer.base, tuple) else (optimizer.base,)
    return copy.deepcopy([optimizer.state_dict(), [base.state_dict() for base in bases], optimizer.metrics])


def refused_as_a_whole_or_goes_on(model: Net, optimizer: GAPTOptimizer, saved: Any, fields: tuple[str, ...]) -> bool:
    """Whether it was refused. Objects stay themselves then, too."""
    before, groups, states = everything(optimizer), list(optimizer.param_groups), dict(optimizer.state)
    given_before = copy.deepcopy(saved)
    refused = ""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            optimizer.load_state_dict(saved)
    except ValueError as error:
        refused = str(error)
    assert_same(saved, given_before)
    if refused:
        assert_same(everything(optimizer), before)
        assert all(a is b for a, b in zip(optimizer.param_groups, groups, strict=True))
        assert all(optimizer.state[p] is state for p, state in states.items())
        assert any(name in refused for name in fields), refused
        assert any(remedy in refused for remedy in ("load ", "Load ", "set ", "remove ")), refused
        return True
    run(model, optimizer, range(5, 8))
    assert optimizer.metrics is not None
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))  # what goes on can be saved
    return False


@pytest.mark.parametrize(("base", "config"), KINDS)
@given(data=st.data())
def test_any_change_of_our_part(base: str, config: str, data: st.DataObject) -> None:
    model, optimizer = trained(base, config)
    saved = copy.deepcopy(optimizer.state_dict())
    run(model, optimizer, range(1))
    own = changed(data, json.loads(saved["param_groups"][0]["gapt"]))
    saved["param_groups"][0]["gapt"] = json.dumps(own)
    if not refused_as_a_whole_or_goes_on(model, optimizer, saved, ("gapt", *GAPTConfig.model_fields)):
        assert all(math.isfinite(float(weight.sum())) for weight in weights(model).values())


@pytest.mark.parametrize("base", BASES)
@given(text=st.one_of(NOT_NONE, st.binary(max_size=9), st.just("[" * 200_000), st.just("9" * 10_000)))
def test_our_part_of_another_kind(base: str, text: Any) -> None:
    model, optimizer = trained(base, "smoothed")
    saved = copy.deepcopy(optimizer.state_dict())
    saved["param_groups"][0]["gapt"] = text
    assert refused_as_a_whole_or_goes_on(model, optimizer, saved, ("gapt",))


@pytest.mark.slow
@pytest.mark.parametrize(("base", "config"), KINDS)
@settings(max_examples=300, derandomize=False)
@given(data=st.data())
def test_many_changes_of_our_part(base: str, config: str, data: st.DataObject) -> None:
    model, optimizer = trained(base, config)
    saved = copy.deepcopy(optimizer.state_dict())
    own = changed(data, json.loads(saved["param_groups"][0]["gapt"]))
    saved["param_groups"][0]["gapt"] = json.dumps(own)
    refused_as_a_whole_or_goes_on(model, optimizer, saved, ("gapt", *GAPTConfig.model_fields))
