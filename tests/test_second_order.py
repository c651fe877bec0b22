"""Second derivatives: in memorization a tap is the identity to any order, in compression they are refused."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.optim import Optimizer

from gapt_optim import AlignmentConfig, GAPTConfig, GAPTOptimizer, RepresentationHook

from .loops import COMPRESSING, adamw, assert_same, loss_of, make_net, pair, weights, wrap
from .models import CASES
from .training import wrapped

pytestmark = pytest.mark.filterwarnings("ignore:Using backward:UserWarning")  # of torch, on create_graph=True

PHASES = pytest.mark.parametrize("phase", ["memorization", "compression"])
ZOO = ["mlp", "sequence mlp", "deep", "cnn", "tied", "tied masked"]
PLAIN = GAPTConfig(alignment=AlignmentConfig(every=0))
MEASURED = GAPTConfig(alignment=AlignmentConfig(every=1))


def products(value: Tensor, parameters: list[Tensor], order: int) -> list[Tensor]:
    """``order`` derivatives of ``value``, each but the last contracted with fixed random vectors."""
    for i in range(order):
        found = torch.autograd.grad(value, parameters, create_graph=True)
        torch.manual_seed(i)
        value = sum((g * torch.randn_like(g)).sum() for g in found)  # type: ignore[assignment]
    return [g.detach() for g in found]


@pytest.mark.parametrize("order", [1, 2, 3])
@pytest.mark.parametrize("activation", [False, True])
@pytest.mark.parametrize("name", ZOO)
def test_derivatives_in_memorization(name: str, activation: bool, order: int) -> None:
    case = CASES[name]
    model, twin, inputs = case.model(torch.float64), case.model(torch.float64), case.inputs(torch.float64)
    optimizer = wrapped(model, case.layers, "memorization", activation=activation)
    found = products(optimizer.objective(case.loss(model, inputs)), list(model.parameters()), order)
    expected = products(case.loss(twin, inputs), list(twin.parameters()), order)
    assert any(bool(value.any()) for value in expected)
    assert_same(found, expected)


@PHASES
def test_transforms_of_torch_func_work_as_without_us(phase: str) -> None:
    """Their gradients are no part of a step, so nothing is captured for one: not in compression either."""
    case = CASES["mlp"]
    model, twin, inputs = case.model(torch.float64), case.model(torch.float64), case.inputs(torch.float64)
    optimizer = wrapped(model, case.layers, phase)

    def transforms(of: nn.Module) -> list[Tensor]:
        def loss(parameters: dict[str, Tensor], x: Tensor) -> Tensor:
            found: Tensor = functional_call(of, parameters, (x,)).square().mean()
            return found

        parameters = {name: p.detach() for name, p in of.named_parameters()}
        (x,) = inputs.values() if isinstance(inputs, dict) else (inputs,)
        last = list(parameters)[-1]
        each = torch.func.vmap(torch.func.grad(loss), (None, 0))(parameters, x.unsqueeze(1))
        second = torch.func.jacrev(torch.func.grad(lambda p: loss({**parameters, last: p}, x)))(parameters[last])
        return [*torch.func.grad(loss)(parameters, x).values(), *each.values(), second]

    assert_same(transforms(model), transforms(twin))
    message = r'"blocks\.0".* ran inside a transform of torch\.func'
    with pytest.raises(RuntimeError, match=message) if phase == "compression" else pytest.warns(match=message):
        optimizer.objective(torch.ones((), requires_grad=True))
    optimizer.discard_step()
    optimizer.backward(case.loss(model, inputs))  # and a step goes on as if nothing had been
    optimizer.step()


@pytest.mark.parametrize("config", [PLAIN, MEASURED], ids=["plain", "measured"])
def test_hessian_vector_products_under_accumulation(config: GAPTConfig) -> None:
    (twin, _), (model, optimizer) = pair(config=config)
    for i in range(3):
        found = products(optimizer.objective(loss_of(model, i)) / 3, list(model.parameters()), 2)
        expected = products(loss_of(twin, i) / 3, list(twin.parameters()), 2)
        assert_same(found, expected)
        optimizer.backward(loss_of(model, i), scale=1 / 3)
        (loss_of(twin, i) / 3).backward()
    assert_same([p.grad for p in model.parameters()], [p.grad for p in twin.parameters()])


@pytest.mark.parametrize("config", [PLAIN, MEASURED], ids=["plain", "measured"])
def test_backward_with_a_graph_under_accumulation(config: GAPTConfig) -> None:
    (twin, bare), (model, optimizer) = pair(config=config)
    for i in range(2):
        for j in range(2):
            optimizer.objective(loss_of(model, 2 * i + j)).backward(create_graph=True)
            loss_of(twin, 2 * i + j).backward(create_graph=True)
        for net in (model, twin):
            penalty = sum(p.grad.square().sum() for p in net.parameters() if p.grad is not None)
            more = torch.autograd.grad(penalty, list(net.parameters()))
            for p, extra in zip(net.parameters(), more, strict=True):
                p.grad = p.grad.detach() + 0.1 * extra  # type: ignore[union-attr]
        for each in (optimizer, bare):
            each.step()
            each.zero_grad()
    assert_same(weights(model), weights(twin))
    assert optimizer.metrics is not None
    assert (optimizer.metrics.alignment is not None) is bool(config.alignment.every)


@pytest.mark.parametrize("config", [PLAIN, MEASURED], ids=["plain", "measured"])
@pytest.mark.parametrize("name", ["AdaHessian", "SophiaH"])
def test_optimizers_of_second_order(name: str, config: GAPTConfig) -> None:
    make = getattr(pytest.importorskip("pytorch_optimizer"), name)

    def base(model: nn.Module) -> Optimizer:
        found: Optimizer = make(model.parameters(), lr=0.01)
        return found

    (twin, bare), (model, optimizer) = pair(base, config)
    for net, each in ((twin, bare), (model, optimizer)):
        torch.manual_seed(5)  # of the random vectors
        for i in range(12):
            loss = loss_of(net, i)
            (each.objective(loss) if isinstance(each, GAPTOptimizer) else loss).backward(create_graph=True)
            each.step()
            each.zero_grad()
    assert_same(weights(model), weights(twin))
    assert not torch.equal(next(model.parameters()), next(make_net().parameters()))


def meta_gradient(net: nn.Module, inner: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
    """MAML: two steps of SGD on one task, then the gradient of another's loss at where they lead."""

    def loss_at(parameters: dict[str, Tensor], i: int) -> Tensor:
        class Called(nn.Module):
            def forward(self, tokens: Tensor) -> Tensor:
                return functional_call(net, parameters, (tokens,))

        return loss_of(Called(), i)

    parameters = dict(net.named_parameters())
    for i in range(2):
        found = torch.autograd.grad(inner(loss_at(parameters, i)), list(parameters.values()), create_graph=True)
        parameters = {n: p - 0.1 * g for (n, p), g in zip(parameters.items(), found, strict=True)}
    inner(loss_at(parameters, 2)).backward()
    return {n: p.grad for n, p in net.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("config", [PLAIN, MEASURED], ids=["plain", "measured"])
def test_meta_learning(config: GAPTConfig) -> None:
    (twin, bare), (model, optimizer) = pair(config=config)
    expected = meta_gradient(twin, lambda loss: loss)
    found = meta_gradient(model, optimizer.objective)
    assert len(expected) > 3
    assert_same(found, expected)
    optimizer.step()
    bare.step()
    assert_same(weights(model), weights(twin))


def test_a_graph_in_compression_is_refused_at_once() -> None:
    model = make_net()
    optimizer = wrap(model, config=COMPRESSING)
    parameters = list(model.parameters())
    refusal = r'module "layers\.2" cannot be differentiated twice.*create_graph=True.*measuring'
    with pytest.raises(RuntimeError, match=refusal):
        torch.autograd.grad(optimizer.objective(loss_of(model, 0)), parameters, create_graph=True)
    assert all(p.grad is None for p in parameters)
    with pytest.raises(RuntimeError, match=refusal):
        optimizer.objective(loss_of(model, 0)).backward(create_graph=True)


@pytest.mark.parametrize("act", ["inside measuring", "loss alone"])
def test_what_the_refusal_advises(act: str) -> None:
    """Second derivatives of the loss itself go on in compression, and the entropy is none of theirs."""
    model, twin = make_net(), make_net()
    optimizer = wrap(model, config=COMPRESSING)
    expected = products(loss_of(twin, 0), list(twin.parameters()), 2)
    if act == "inside measuring":
        with optimizer.hook.measuring():
            loss = loss_of(model, 0)
    else:
        loss = loss_of(model, 0)
    assert_same(products(loss, list(model.parameters()), 2), expected)


def test_training_goes_on_after_second_derivatives() -> None:
    """What a Hessian-vector product captured is not taken for the next step's."""
    (twin, bare), (model, optimizer) = pair()
    records: list[Any] = []
    plain_model = make_net()
    plain = wrap(plain_model, adamw)
    for i in range(4):
        products(loss_of(model, i + 50), list(model.parameters()), 2)
        products(optimizer.objective(loss_of(model, i + 60)), list(model.parameters()), 2)
        optimizer.discard_step()
        for net, each in ((model, optimizer), (plain_model, plain)):
            each.backward(loss_of(net, i))
            each.step()
            each.zero_grad()
        loss_of(twin, i).backward()
        bare.step()
        bare.zero_grad()
        records.append((copy.deepcopy(optimizer.metrics), copy.deepcopy(plain.metrics)))
    assert_same(weights(model), weights(twin))
    assert all(a == b for a, b in records)


def test_one_hook_on_a_model_with_a_graph_kept() -> None:
    """``retain_graph`` alone asks for no second derivative."""
    model = make_net()
    optimizer = GAPTOptimizer(adamw(model), RepresentationHook(model, "layers.*"), COMPRESSING)
    total = optimizer.objective(loss_of(model, 0))
    first = torch.autograd.grad(total, list(model.parameters()), retain_graph=True)
    second = torch.autograd.grad(total, list(model.parameters()))
    assert_same(first, second)
