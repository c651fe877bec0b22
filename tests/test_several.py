"""One or several optimizers, seen as one."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import LBFGS, SGD, AdamW, Optimizer

from gapt_optim.several import Several

from .loops import (
    adamw,
    assert_same,
    loss_of,
    make_net,
    matrices_and_rest,
    run,
    sgd,
    without_ours,
    wrap,
)


@pytest.mark.parametrize("wrong", [None, 3, "adam", nn.Linear(2, 2), AdamW])
def test_what_is_no_optimizer_is_refused(wrong: Any) -> None:
    with pytest.raises(TypeError, match="Optimizer"):
        Several(wrong)
    with pytest.raises(TypeError, match=r"optimizer\[1\]"):
        Several([adamw(make_net()), wrong])


def test_empty_sequence_is_refused() -> None:
    with pytest.raises(ValueError, match="empty"):
        Several([])


def test_shared_parameter_is_refused() -> None:
    model = make_net()
    with pytest.raises(ValueError, match=r"optimizer\[0\] and optimizer\[1\] share"):
        Several([adamw(model), sgd(model)])
    base = adamw(model)
    with pytest.raises(ValueError, match="share"):
        Several([base, base])


def test_lbfgs_must_be_alone() -> None:
    model = make_net()
    Several(LBFGS(model.head.parameters()))
    with pytest.raises(ValueError, match=r"optimizer\[1\] is LBFGS"):
        Several([SGD(model.layers.parameters(), lr=0.1), LBFGS(model.head.parameters())])


def test_base_is_what_was_given() -> None:
    model = make_net()
    base, bases, single = adamw(model), matrices_and_rest(model), [sgd(model)]
    assert wrap(model, lambda model: base).base is base
    assert wrap(model, lambda model: bases).base == tuple(bases)
    assert wrap(model, lambda model: single).base == tuple(single)


def test_several_step_as_each_would_by_itself() -> None:
    bare, model = make_net(), make_net()
    bases, optimizer = matrices_and_rest(bare), wrap(model, matrices_and_rest)
    for i in range(20):
        loss_of(bare, i).backward()
        for base in bases:
            base.step()
            base.zero_grad()
        run(model, optimizer, range(i, i + 1))
        assert_same(model.state_dict(), bare.state_dict())


def test_groups_are_those_of_all_in_order() -> None:
    model = make_net()
    bases = matrices_and_rest(model)
    optimizer = wrap(model, lambda _: bases)
    assert [id(g) for g in optimizer.param_groups] == [id(g) for base in bases for g in base.param_groups]
    optimizer.param_groups = [{**group, "lr": 7.0} for group in optimizer.param_groups]
    assert [group["lr"] for base in bases for group in base.param_groups] == [7.0, 7.0]
    with pytest.raises(ValueError, match="2 parameter groups"):
        optimizer.param_groups = optimizer.param_groups[:1]
    optimizer.param_groups.clear()  # of a list that was made for this line
    assert len(optimizer.param_groups) == 2


def test_defaults_are_those_that_all_have() -> None:
    optimizer = wrap(make_net(), matrices_and_rest)
    assert {"lr", "weight_decay"} <= optimizer.defaults.keys()
    assert not {"betas", "momentum"} & optimizer.defaults.keys()


def test_state_is_one_live_view_of_all() -> None:
    model = make_net()
    optimizer = wrap(model, matrices_and_rest)
    state = optimizer.state
    assert not state
    run(model, optimizer, range(2))
    parameters = list(model.parameters())
    assert len(state) == len(parameters)
    assert {id(p) for p in state} == {id(p) for p in parameters}
    muon, rest = optimizer.base
    inner = muon.param_groups[0]["params"][0]
    assert state[inner] is muon.state[inner]
    assert inner not in rest.state
    state[inner]["note"] = 1
    assert muon.state[inner]["note"] == 1
    del state[inner]
    assert inner not in muon.state
    assert state[inner] == {}  # as on any optimizer
    assert inner in muon.state
    with pytest.raises(KeyError):
        state[torch.zeros(2)]


def test_state_can_be_set() -> None:
    model = make_net()
    optimizer = wrap(model, matrices_and_rest)
    run(model, optimizer, range(2))
    before = copy.deepcopy(optimizer.state_dict())
    optimizer.state = optimizer.state
    assert_same(optimizer.state_dict(), before)
    optimizer.state = {}
    assert not optimizer.base[0].state
    assert not optimizer.base[1].state
    run(model, optimizer, range(2))  # fresh state is made as needed


def test_merged_state_dict_numbers_all_parameters_through_and_loads() -> None:
    model, other = make_net(), make_net(seed=1)
    optimizer, resumed = wrap(model, matrices_and_rest), wrap(other, matrices_and_rest)
    run(model, optimizer, range(3))
    saved = optimizer.state_dict()
    numbers = [number for group in saved["param_groups"] for number in group["params"]]
    assert numbers == list(range(len(list(model.parameters()))))
    assert saved["state"].keys() == set(numbers)
    resumed.load_state_dict(copy.deepcopy(saved))
    assert_same(resumed.state_dict(), saved)
    for base, loaded in zip(optimizer.base, resumed.base, strict=True):
        assert_same(loaded.state_dict()["state"], base.state_dict()["state"])


def test_named_parameters_of_checkpoint_tools_load_by_position() -> None:
    """torch.distributed.checkpoint gives names where a state dict has numbers."""
    model, other = make_net(), make_net(seed=1)
    optimizer, resumed = wrap(model, matrices_and_rest), wrap(other, matrices_and_rest)
    run(model, optimizer, range(3))
    saved = optimizer.state_dict()
    named = {
        "state": {f"p{key}": value for key, value in saved["state"].items()},
        "param_groups": [{**g, "params": [f"p{key}" for key in g["params"]]} for g in saved["param_groups"]],
    }
    resumed.load_state_dict(named)
    assert_same(resumed.state_dict(), saved)


@pytest.mark.parametrize("part", [0, 1])
def test_state_dict_that_fits_one_of_two_changes_neither(part: int) -> None:
    model = make_net()
    optimizer = wrap(model, matrices_and_rest)
    run(model, optimizer, range(3))
    saved = copy.deepcopy(optimizer.state_dict())
    run(model, optimizer, range(3, 5))
    before = copy.deepcopy(optimizer.state_dict())
    saved["param_groups"][part]["params"].pop()
    with pytest.raises(ValueError, match=rf"optimizer\[{part}\]"):
        optimizer.load_state_dict(saved)
    assert_same(optimizer.state_dict(), before)
    one = {**saved, "param_groups": saved["param_groups"][:1]}
    fewer = r"has 1 parameter groups for optimizers of \[1, 1\], expected \[1, 1\]"
    with pytest.raises(ValueError, match=fewer):
        optimizer.load_state_dict(one)
    del one["parts"]  # as after a checkpoint tool
    with pytest.raises(ValueError, match=fewer):
        optimizer.load_state_dict(one)
    alone = {**saved, "parts": saved["parts"][:1], "param_groups": saved["param_groups"][:1]}
    with pytest.raises(ValueError, match=r"has 1 parameter groups for optimizers of \[1\], expected \[1, 1\]"):
        optimizer.load_state_dict(alone)
    assert_same(optimizer.state_dict(), before)


def test_group_is_added_to_one_of_them() -> None:
    model = make_net(bias=True)
    matrices = [p for p in model.parameters() if p.ndim == 2]
    bases = [torch.optim.Muon(matrices[1:4], lr=0.02), AdamW([matrices[0], *matrices[4:]], lr=0.01)]
    optimizer = wrap(model, lambda _: bases)
    vectors = {"params": [p for p in model.parameters() if p.ndim == 1]}
    with pytest.raises(ValueError, match=r"\.base\[i\]\.add_param_group"):
        optimizer.add_param_group(vectors)
    optimizer.base[1].add_param_group(vectors)
    before = copy.deepcopy(model.state_dict())
    run(model, optimizer, range(1))
    assert len(optimizer.param_groups) == 3
    assert all(not torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_zero_grad_reaches_all() -> None:
    model = make_net()
    optimizer = wrap(model, matrices_and_rest)
    optimizer.backward(loss_of(model, 0))
    optimizer.zero_grad(set_to_none=False)
    assert all(p.grad is not None and not p.grad.any() for p in model.parameters())
    optimizer.zero_grad()
    assert all(p.grad is None for p in model.parameters())


def test_closure_runs_once_for_all() -> None:
    model = make_net()
    optimizer = wrap(model, matrices_and_rest)
    calls = []

    def closure() -> torch.Tensor:
        calls.append(torch.is_grad_enabled())
        loss = loss_of(model, 0)
        optimizer.backward(loss)
        return loss

    before = copy.deepcopy(model.state_dict())
    with torch.no_grad():
        loss = optimizer.step(closure)
    assert calls == [True]
    assert torch.equal(loss, loss_of(make_net(), 0))
    assert all(not torch.equal(value, before[name]) for name, value in model.state_dict().items())


# What only some optimizers keep


class Keeping(SGD):
    """Keeps a count in its state dict, a string key in its state, and takes an option in its step."""

    def __init__(self, parameters: Any, lr: float) -> None:
        super().__init__(parameters, lr=lr, momentum=0.9)
        self.state["total"] = 0
        self.warmup: dict[str, Any] = {"left": 3}
        self.told: list[float] = []

    @torch.no_grad()
    def step(self, closure: Any = None, *, told: float | None = None) -> Any:
        self.state["total"] += 1
        self.warmup["left"] -= 1
        if told is not None:
            self.told.append(told)
        return super().step(closure)

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "warmup": dict(self.warmup)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        state_dict = dict(state_dict)
        self.warmup = dict(state_dict.pop("warmup"))
        super().load_state_dict(state_dict)


class FormOfItsOwn(SGD):
    def state_dict(self) -> dict[str, Any]:
        return {"inner": super().state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict["inner"])


def two_that_keep(model: nn.Module) -> list[Optimizer]:
    rest = [*model.embedding.parameters(), *model.head.parameters()]
    return [Keeping(model.layers.parameters(), lr=0.1), Keeping(rest, lr=0.05)]


def one_of_a_form_of_its_own(model: nn.Module) -> list[Optimizer]:
    rest = [*model.embedding.parameters(), *model.head.parameters()]
    return [FormOfItsOwn(model.layers.parameters(), lr=0.1, momentum=0.9), AdamW(rest, lr=0.01)]


@pytest.mark.parametrize("bases", [two_that_keep, one_of_a_form_of_its_own])
def test_each_saves_and_loads_what_it_would_alone(bases: Any) -> None:
    bare_model, model, other = make_net(), make_net(), make_net(seed=1)
    bare, optimizer, resumed = bases(bare_model), wrap(model, bases), wrap(other, bases)
    for i in range(3):
        loss_of(bare_model, i).backward()
        for each in bare:
            each.step()
            each.zero_grad()
    run(model, optimizer, range(3))
    saved = copy.deepcopy(optimizer.state_dict())
    other.load_state_dict(model.state_dict())
    resumed.load_state_dict(saved)
    for mine, alone in zip(resumed.base, bare, strict=True):
        assert_same(without_ours(mine.state_dict()), alone.state_dict())
        assert_same({k: v for k, v in mine.state.items() if isinstance(k, str)}, _strings(alone))
    run(model, optimizer, range(3, 6))
    run(other, resumed, range(3, 6))
    assert_same(dict(other.state_dict()), dict(model.state_dict()))


def _strings(optimizer: Optimizer) -> dict[str, Any]:
    return {key: value for key, value in optimizer.state.items() if isinstance(key, str)}


def test_what_a_checkpoint_tool_has_dropped_is_named() -> None:
    model = make_net()
    optimizer = wrap(model, two_that_keep)
    run(model, optimizer, range(2))
    saved = copy.deepcopy(optimizer.state_dict())
    before = copy.deepcopy(saved)
    del saved["parts"]
    with pytest.raises(ValueError, match=r"no 'parts', which held \['warmup', 'total', 'warmup', 'total'\]"):
        optimizer.load_state_dict(saved)
    assert_same(optimizer.state_dict(), before)


def test_state_takes_keys_that_are_no_parameters() -> None:
    model = make_net()
    optimizer = wrap(model, two_that_keep)
    optimizer.state["x"] = 1
    first, second = optimizer.base
    assert (optimizer.state["x"], first.state["x"], "x" in second.state) == (1, 1, False)
    optimizer.state["total"] = 9  # of both: the first has it
    assert (first.state["total"], second.state["total"]) == (9, 0)
    assert len(optimizer.state) == len(list(optimizer.state)) == 2
    del optimizer.state["x"]
    assert "x" not in first.state
    assert "total" in repr(optimizer.state)


def test_state_that_is_set_goes_to_the_owners_of_the_parameters() -> None:
    model = make_net()
    optimizer = wrap(model, two_that_keep)
    run(model, optimizer, range(2))
    saved = {key: {**value, "mine": 1} for key, value in optimizer.state.items() if isinstance(key, nn.Parameter)}
    optimizer.state = saved
    for base in optimizer.base:
        own = [p for group in base.param_groups for p in group["params"]]
        assert list(base.state) == own
        assert all(base.state[p]["mine"] == 1 for p in own)
    with pytest.raises(ValueError, match=r"add the group to one of them: \.base\[i\]\.add_param_group\(\)"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(2))]})


def test_options_of_a_step_go_to_all() -> None:
    model = make_net()
    optimizer = wrap(model, two_that_keep)
    optimizer.backward(loss_of(model, 0))
    optimizer.step(told=1.5)
    assert [base.told for base in optimizer.base] == [[1.5], [1.5]]
    single = wrap(make_net(), lambda m: Keeping(m.parameters(), lr=0.1))
    single.step(told=2.5)
    assert single.base.told == [2.5]
    with pytest.raises(TypeError, match="asked"):
        single.step(asked=1)


def test_attributes_of_several_are_named() -> None:
    several = wrap(make_net(), lambda m: [AdamW(m.head.parameters()), Keeping(m.layers.parameters(), lr=0.1)])
    with pytest.raises(AttributeError, match=r"'warmup'; of the wrapped optimizers, use \.base\[1\]\.warmup$"):
        _ = several.warmup
    assert not hasattr(several, "train")
    for wrong in ("wormup", "_private"):
        with pytest.raises(AttributeError, match=rf"no attribute '{wrong}'$"):
            getattr(several, wrong)
