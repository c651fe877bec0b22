"""Several optimizers seen as one."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import LBFGS, SGD, AdamW

from gapt_optim._torch.bases import Bases

from .loops import adamw, assert_same, loss_of, make_net, matrices_and_rest, run, sgd, wrap


@pytest.mark.parametrize("wrong", [None, 3, "adam", nn.Linear(2, 2), AdamW])
def test_what_is_no_optimizer_is_refused(wrong: Any) -> None:
    with pytest.raises(TypeError, match="Optimizer"):
        Bases(wrong)
    with pytest.raises(TypeError, match=r"optimizer\[1\]"):
        Bases([adamw(make_net()), wrong])


def test_empty_sequence_is_refused() -> None:
    with pytest.raises(ValueError, match="empty"):
        Bases([])


def test_shared_parameter_is_refused() -> None:
    model = make_net()
    with pytest.raises(ValueError, match=r"optimizer\[0\] and optimizer\[1\] share"):
        Bases([adamw(model), sgd(model)])
    base = adamw(model)
    with pytest.raises(ValueError, match="share"):
        Bases([base, base])


def test_lbfgs_must_be_alone() -> None:
    model = make_net()
    Bases(LBFGS(model.head.parameters()))
    with pytest.raises(ValueError, match=r"optimizer\[1\] is LBFGS"):
        Bases([SGD(model.layers.parameters(), lr=0.1), LBFGS(model.head.parameters())])


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
    with pytest.raises(ValueError, match="2 parameter groups"):
        optimizer.load_state_dict({**saved, "param_groups": saved["param_groups"][:1]})
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
