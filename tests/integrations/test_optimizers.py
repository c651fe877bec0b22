"""Optimizers and averages of other libraries, wrapped."""

from __future__ import annotations

import contextlib
import copy
import io
from collections.abc import Callable
from typing import Any

import pytest
import pytorch_optimizer
import schedulefree
import torch
import torchao.optim
from torch import nn
from torch.nn import functional as F
from torch.optim import Optimizer
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from gapt_optim import GAPTConfig, GAPTOptimizer, GateConfig, ObjectiveConfig, RepresentationHook
from tests.loops import (
    RESTLESS,
    Net,
    adamw,
    assert_same,
    batch,
    loss_of,
    make_net,
    run,
    weights,
    wrap,
)
from tests.models import VOCABULARY, gpt2

CYCLES = GAPTConfig(gate=RESTLESS)
MEMORIZING = GAPTConfig(gate=GateConfig(frozen=True))

SCHEDULE_FREE: dict[str, Callable[[nn.Module], Any]] = {
    "AdamWScheduleFree": lambda model: schedulefree.AdamWScheduleFree(model.parameters(), lr=0.01, warmup_steps=3),
    "SGDScheduleFree": lambda model: schedulefree.SGDScheduleFree(model.parameters(), lr=0.1),
    "RAdamScheduleFree": lambda model: schedulefree.RAdamScheduleFree(model.parameters(), lr=0.01),
}
OTHERS: dict[str, Callable[[nn.Module], Optimizer]] = {
    name: lambda model, name=name: getattr(pytorch_optimizer, name)(model.parameters(), lr=0.01)  # type: ignore[misc]
    for name in ("Lion", "AdEMAMix", "SOAP", "Adan", "StableAdamW", "CAME", "ScheduleFreeAdamW")
}
# torchao quantizes matrices of 4096 numbers and more, and compiles its step once per shape: only 64 x 64 here.
LOW_BIT: dict[str, Callable[[nn.Module], Optimizer]] = {
    name: lambda model, name=name: getattr(torchao.optim, name)(model.layers.parameters(), lr=0.01)  # type: ignore[misc]
    for name in ("AdamW8bit", "AdamW4bit", "AdamWFp8")
}


def saved_and_loaded(state: dict[str, Any]) -> Any:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def built(base: Callable[[nn.Module], Any], model: nn.Module, config: GAPTConfig | None) -> Any:
    """The base or its wrapper, ready to train."""
    optimizer = base(model) if config is None else wrap(model, base, config)
    if hasattr(optimizer, "train"):
        optimizer.train()
    return optimizer


def trains_and_resumes(base: Callable[[nn.Module], Any], net: Callable[[], Net]) -> None:
    """In memorization as the bare optimizer; through both phases; and from a file as without stopping."""
    bare, model = net(), net()
    run(bare, built(base, bare, None), range(5))
    run(model, built(base, model, MEMORIZING), range(5))
    assert_same(weights(model), weights(bare))

    whole, resumed = net(), net()
    optimizer = built(base, whole, CYCLES)
    run(whole, optimizer, range(5))
    states = saved_and_loaded({"model": whole.state_dict(), "optimizer": optimizer.state_dict()})
    rest = run(whole, optimizer, range(5, 12))
    resumed.load_state_dict(states["model"])
    again = built(base, resumed, CYCLES)
    again.load_state_dict(states["optimizer"])
    assert run(resumed, again, range(5, 12)) == rest
    assert {metrics["phase"] for metrics in rest if metrics} == {"memorization", "compression"}
    assert_same(weights(resumed), weights(whole))


@pytest.mark.parametrize("name", [*SCHEDULE_FREE, *OTHERS])
def test_trains_and_resumes(name: str) -> None:
    trains_and_resumes((SCHEDULE_FREE | OTHERS)[name], lambda: make_net(bias=True))


@pytest.mark.parametrize("name", [*SCHEDULE_FREE, "ScheduleFreeAdamW"])
def test_train_and_eval_reach_the_base(name: str) -> None:
    model, bare = make_net(), make_net()
    base = (SCHEDULE_FREE | OTHERS)[name]
    optimizer, plain = built(base, model, MEMORIZING), built(base, bare, None)
    for net, each in ((model, optimizer), (bare, plain)):
        run(net, each, range(12))
        training = weights(net)
        each.eval()
        assert not torch.equal(training["head.weight"], net.head.weight)
    assert_same(weights(model), weights(bare))
    optimizer.train()
    torch.testing.assert_close(weights(model), training, rtol=1e-4, atol=1e-6)


def test_optimizers_without_modes_get_none() -> None:
    assert not hasattr(wrap(make_net()), "train")
    assert not hasattr(wrap(make_net()), "eval")


def wide() -> Net:
    return make_net(features=64)


@pytest.mark.parametrize("name", LOW_BIT)
@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.filterwarnings("ignore:.torch.jit.script_method. is deprecated:DeprecationWarning")  # inductor's import
def test_low_bit_optimizers_train_and_resume(name: str, compiled: bool) -> None:
    """torchao compiles its step, which takes a minute; uncompiled it does the same."""
    base = LOW_BIT[name]
    with contextlib.nullcontext() if compiled else torch.compiler.set_stance("force_eager"):
        trains_and_resumes(base, wide)
    model = wide()
    optimizer = wrap(model, base)
    with torch.compiler.set_stance("force_eager"):
        run(model, optimizer, range(1))
    state = optimizer.state[model.layers[0][0].weight]
    assert type(state["exp_avg"]).__name__.startswith("OptimState")


class Offloading(torch.optim.SGD):
    """Its state dict has a form of its own, like that of torchao's CPUOffloadOptimizer, which needs a GPU."""

    def state_dict(self) -> dict[str, Any]:
        return {"offloaded": [super().state_dict()]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        (inner,) = state_dict["offloaded"]
        super().load_state_dict(inner)


def offloading(model: nn.Module) -> Optimizer:
    return Offloading(model.parameters(), lr=0.1, momentum=0.9)


def test_a_state_dict_of_another_form() -> None:
    trains_and_resumes(offloading, make_net)
    model = make_net()
    fresh = wrap(model, offloading)
    with pytest.warns(UserWarning, match="bare optimizer"):
        fresh.load_state_dict(offloading(model).state_dict())
    whole, resumed = make_net(), make_net(seed=1)
    first, again = (wrap(each, lambda m: [offloading(m.layers), adamw(m.head)]) for each in (whole, resumed))
    run(whole, first, range(3))
    resumed.load_state_dict(whole.state_dict())
    again.load_state_dict(saved_and_loaded(first.state_dict()))
    run(whole, first, range(3, 6))
    run(resumed, again, range(3, 6))
    assert_same(weights(resumed), weights(whole))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="torchao's CPUOffloadOptimizer needs a GPU")
def test_cpu_offload_trains_and_resumes() -> None:
    def offload(model: nn.Module) -> Optimizer:
        return torchao.optim.CPUOffloadOptimizer(model.parameters(), torch.optim.AdamW, lr=0.01)

    def steps(model: nn.Module, optimizer: GAPTOptimizer, which: range) -> None:
        for i in which:
            tokens, target = (each.cuda() for each in batch(i))
            optimizer.backward(F.cross_entropy(model(tokens), target))
            optimizer.step()
            optimizer.zero_grad()

    whole, resumed = wide().cuda(), wide().cuda()
    optimizer = wrap(whole, offload, CYCLES)
    steps(whole, optimizer, range(5))
    states = saved_and_loaded({"model": whole.state_dict(), "optimizer": optimizer.state_dict()})
    resumed.load_state_dict(states["model"])  # before the base is built, which copies the parameters
    again = wrap(resumed, offload, CYCLES)
    again.load_state_dict(states["optimizer"])
    steps(whole, optimizer, range(5, 12))
    steps(resumed, again, range(5, 12))
    assert again.metrics is not None
    assert again.metrics.switches > 0
    torch.testing.assert_close(weights(resumed), weights(whole))


def test_muon_and_adamw_train_a_gpt2() -> None:
    """The matrices of the blocks by Muon, everything else by AdamW, as language-model speed runs do."""
    model = gpt2()
    inner = [p for p in model.transformer.h.parameters() if p.ndim == 2]
    rest = [p for p in model.parameters() if not any(p is other for other in inner)]
    muon, adamw = torch.optim.Muon(inner, lr=0.05), torch.optim.AdamW(rest, lr=0.05)
    config = GAPTConfig(gate=RESTLESS, objective=ObjectiveConfig(weight=0.1))
    optimizer = GAPTOptimizer([muon, adamw], RepresentationHook(model), config)
    tokens = torch.randint(VOCABULARY, (4, 16))
    phases, losses = set(), []
    for _ in range(30):
        loss = model(input_ids=tokens, labels=tokens).loss
        optimizer.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        assert optimizer.metrics is not None
        phases.add(optimizer.metrics.phase)
        losses.append(optimizer.metrics.loss)
    assert phases == {"memorization", "compression"}
    assert losses[-1] < 0.5 * losses[0]
    assert len(muon.state) == len(inner)
    assert len(adamw.state) == len(rest)


def test_averaged_model_in_mid_training() -> None:
    """The average follows the trained model and neither feeds nor disturbs its taps."""
    plain, model = make_net(), make_net()
    alone, optimizer = wrap(plain, config=CYCLES), wrap(model, config=CYCLES)
    run(plain, alone, range(4))
    run(model, optimizer, range(4))
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.5), use_buffers=True)
    expected = weights(model)
    for i in range(4, 12):
        run(plain, alone, range(i, i + 1))
        run(model, optimizer, range(i, i + 1))
        average.update_parameters(model)
        loss_of(average, i)  # in training mode: its taps are inert
        for name, value in weights(model).items():
            expected[name] = value if i == 4 else 0.5 * expected[name] + 0.5 * value
        assert optimizer.metrics == alone.metrics
    assert_same(weights(model), weights(plain))
    torch.testing.assert_close(weights(average.module), expected)
    assert optimizer.metrics.switches > 0
    copied = copy.deepcopy(average)
    assert_same(weights(copied.module), weights(average.module))
