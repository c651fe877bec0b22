"""Mistakes that train on without a word, and what is said about them."""

from __future__ import annotations

import json
import linecache
import math
import re
import warnings
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.lr_scheduler import LambdaLR, LRScheduler

from gapt_optim import (
    AlignmentConfig,
    GAPTConfig,
    GAPTOptimizer,
    GateConfig,
    RepresentationHook,
    StepMetrics,
)
from gapt_optim.gradients import Gradients
from gapt_optim.notices import Notices
from gapt_optim.passes import Capture
from gapt_optim.step import largest_learning_rate

from .distributed.threads import on_threads
from .loops import COMPRESSING, RESTLESS, assert_same, loss_of, make_net, run, weights, wrap
from .models import MLP
from .training import wrapped

PHASES = pytest.mark.parametrize("phase", ["memorization", "compression"])

# Steps of the wrapped optimizer


@pytest.mark.parametrize("stepped", ["base", "scaler of the base", "wrapper", "scaler", "at times"])
def test_a_step_of_the_base_alone_is_told_once(stepped: str) -> None:
    model = make_net()
    optimizer = wrap(model)
    scaler = torch.amp.GradScaler("cpu", enabled="scaler" in stepped)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for i in range(50):
            scaler.scale(optimizer.objective(loss_of(model, i))).backward()
            ours = stepped in ("wrapper", "scaler") or (stepped == "at times" and i % 20 == 19)
            scaler.step(optimizer if ours else optimizer.base)
            scaler.update()
            optimizer.zero_grad()
    told = [str(w.message) for w in caught]
    assert len(told) == (stepped.endswith("base"))
    assert all("without optimizer.step(): the gate does not move" in message for message in told)


@PHASES
def test_a_step_in_a_cuda_graph_is_told_once_or_refused(monkeypatch: pytest.MonkeyPatch, phase: str) -> None:
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    model = make_net()
    gate = GateConfig(initial_phase=phase, frozen=True)  # type: ignore[arg-type]
    optimizer = wrap(model, config=GAPTConfig(gate=gate))
    if phase == "compression":
        with pytest.raises(RuntimeError, match="captured into a CUDA graph"):
            optimizer.objective(loss_of(model, 0))
        return
    losses = [loss_of(model, i) for i in range(2)]
    with pytest.warns(UserWarning, match="captured into a CUDA graph") as told:
        assert [optimizer.objective(loss) for loss in losses] == losses
    assert len(told) == 1
    optimizer.step()
    assert optimizer.metrics is None


# In-place activations


def test_evaluations_of_a_closure_are_no_steps_past_us() -> None:
    model = make_net()
    optimizer = wrap(model, lambda m: torch.optim.LBFGS(m.parameters(), lr=0.01, max_iter=25))
    evaluations = []

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = loss_of(model, 0)
        optimizer.backward(loss)
        evaluations.append(loss)
        return loss

    assert said(lambda: optimizer.step(closure)) == []
    assert len(evaluations) > 20


class ResidualBlock(nn.Module):
    """As in every ResNet: the activation works on the output of the BatchNorm in place."""

    def __init__(self, *, inplace: bool = True) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(3, 3, 3, padding=1), nn.Conv2d(3, 3, 3, padding=1)
        self.bn1, self.bn2 = nn.BatchNorm2d(3), nn.BatchNorm2d(3)
        self.relu = nn.ReLU(inplace=inplace)

    def forward(self, x: Tensor) -> Tensor:
        h = self.relu(self.bn1(self.conv1(x)))
        found: Tensor = self.relu(self.bn2(self.conv2(h)) + x)
        return found


@pytest.mark.parametrize("activation", [False, True])
def test_an_inplace_activation_behind_a_watched_layer(activation: bool) -> None:
    x = torch.randn(2, 3, 6, 6)
    optimizer = wrapped(model := ResidualBlock(), "bn1", "memorization", activation=activation)
    optimizer.backward(model(x).square().mean())
    optimizer.step()
    optimizer = wrapped(model := ResidualBlock(), "bn1", activation=activation)
    with pytest.raises(RuntimeError, match=r'"bn1" was changed in place.*inplace=False.*or watch that module instead'):
        optimizer.backward(model(x).square().mean())
    for model, layer in ((ResidualBlock(), "relu"), (ResidualBlock(inplace=False), "bn1")):  # what it advises
        optimizer = wrapped(model, layer, activation=activation, layout="batch channels height width")
        optimizer.backward(model(x).square().mean())
        optimizer.step()


# Entropies that no training changes


@pytest.mark.parametrize("due", ["compression", "parameter alignment"])
def test_layers_above_frozen_parameters_alone_are_told_once(due: str) -> None:
    model = make_net()
    model.embedding.requires_grad_(False)
    model.layers.requires_grad_(False)
    every = AlignmentConfig(parameter_every=1)
    settings = COMPRESSING if due == "compression" else GAPTConfig(gate=GateConfig(frozen=True), alignment=every)
    optimizer = wrap(model, config=settings)
    (only,) = said(lambda: [(optimizer.backward(loss_of(model, i)), optimizer.step()) for i in range(3)])
    assert only.startswith('the entropy of layer "layers.0" (and of 2 more) has no gradient')
    model.layers[0].requires_grad_()  # what it advises
    optimizer = wrap(model, config=settings)
    assert not said(lambda: [(optimizer.backward(loss_of(model, i)), optimizer.step()) for i in range(3)])


def test_a_frozen_backbone_that_is_only_watched_is_no_mistake() -> None:
    model = make_net()
    model.embedding.requires_grad_(False)
    model.layers.requires_grad_(False)
    optimizer = wrap(model, config=GAPTConfig(gate=GateConfig(frozen=True)))
    assert not said(lambda: [(optimizer.backward(loss_of(model, i)), optimizer.step()) for i in range(3)])


# Entropies that are always 0


def said(act: Callable[[], Any]) -> list[str]:
    """Warnings of ``act``, which point at its own lines: those that call the optimizer."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        act()
    for warning in caught:
        assert warning.filename == __file__
        assert re.search(r"\b(backward|optimizer\.step|scaler\.step)\(", linecache.getline(__file__, warning.lineno))
    return [str(warning.message) for warning in caught]


def training(model: nn.Module, optimizer: GAPTOptimizer, batches: Iterable[Tensor]) -> Callable[[], None]:
    def act() -> None:
        for x in batches:
            optimizer.backward(model(x).square().mean())
            optimizer.step()
            optimizer.zero_grad()

    return act


@PHASES
@pytest.mark.parametrize(
    ("shape", "entropy", "reason"),
    [
        ((1, 6), {}, "one row.*batch.*episodes"),
        ((4, 1, 6), {}, "one row"),
        ((1, 6), {"center": False, "kernel": "linear"}, "one row"),
        ((2, 6), {}, "two rows.*center=False"),
        ((5, 2, 6), {"kernel": "linear"}, "two rows"),
    ],
)
def test_windows_without_an_entropy_are_told_once(
    shape: tuple[int, ...], entropy: dict[str, Any], reason: str, phase: str
) -> None:
    model = MLP()
    optimizer = wrapped(model, "blocks.*", phase, entropy=entropy)
    messages = said(training(model, optimizer, [torch.randn(shape) for _ in range(3)]))
    assert len(messages) == 1
    assert re.match(rf'layer "blocks\.0" \(and 2 more\) can have no entropy: .*{reason}', messages[0])
    assert optimizer.metrics is not None
    assert optimizer.metrics.entropy is None


def test_layers_that_come_later_are_looked_at_until_one_is_told_of() -> None:
    notices = Notices()
    some, none = ([Capture("layer", shape=shape)] for shape in ((8, 6), (1, 6)))

    def look(**calls: list[Capture]) -> list[str]:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            notices.no_entropy(calls, center=True)
        return [str(warning.message) for warning in caught]

    assert look(a=some) == look(a=none) == []  # a last batch that is short
    assert ['layer "b" can have no entropy' in message for message in look(a=some, b=none)] == [True]
    assert look(a=some, b=none) == look(c=none) == []


@pytest.mark.parametrize("kernel", ["linear", "cosine"])
@pytest.mark.parametrize("center", [False, True])
def test_a_layer_of_one_feature_is_named(kernel: str, center: bool) -> None:
    model = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 1))
    optimizer = wrapped(model, ["0", "2"], entropy={"kernel": kernel, "center": center})
    messages = said(training(model, optimizer, [torch.randn(3, 9, 6)] * 2))
    assert len(messages) == 1
    assert re.match('layer "2" can have no entropy: .*one feature', messages[0])
    assert optimizer.metrics is not None
    assert optimizer.metrics.layer_entropy.get("2", 0.0) == pytest.approx(0, abs=1e-5)
    assert optimizer.metrics.layer_entropy["0"] > 0.1


@pytest.mark.parametrize(
    ("shapes", "entropy"),
    [
        ([(3, 17, 6)], {}),  # a tail of one row
        ([(9, 6), (1, 6)], {}),  # the last batch of an epoch
        ([(2, 6)], {"center": False}),
        ([(0, 6), (9, 6)], {}),  # no sample on this rank
    ],
)
def test_a_tail_alone_is_no_mistake(shapes: list[tuple[int, ...]], entropy: dict[str, Any]) -> None:
    model = MLP()
    optimizer = wrapped(model, "blocks.*", "memorization", entropy=entropy)

    def act() -> None:
        for shape in shapes:
            optimizer.backward(model(torch.randn(shape)).square().sum())
            optimizer.step()

    assert said(act) == []


def test_what_it_advises_has_an_entropy() -> None:
    """Of REINFORCE's single observations: the episode as one call."""
    model = MLP()
    optimizer = wrapped(model, "blocks.*")
    episode = torch.stack([torch.randn(6) for _ in range(10)])
    assert said(training(model, optimizer, [episode])) == []
    assert optimizer.metrics is not None
    assert optimizer.metrics.entropy is not None
    assert optimizer.metrics.entropy > 0.1


# The entropy's share of the objective


def summed(factor: float, weight: float, steps: int = 40, **parts: Any) -> tuple[GAPTOptimizer, list[str]]:
    """Train on a loss times ``factor``; the optimizer, and what was said."""
    torch.manual_seed(1)
    model = MLP()
    optimizer = wrapped(model, "blocks.*", objective={"weight": weight, **parts})

    def act() -> None:
        for _ in range(steps):
            x = torch.randn(4, 10, 6)
            optimizer.backward((F.mse_loss(model(x), x[..., :4]) + 1) * factor)
            optimizer.step()

    return optimizer, said(act)


def test_a_summed_loss_makes_the_weight_meaningless() -> None:
    optimizer, messages = summed(70_000.0, 0.05)
    assert len(messages) == 1
    assert 'reduction="sum"' in messages[0]
    assert optimizer.metrics is not None
    share = float(re.search(r"was (\S+) of the objective", messages[0])[1])  # type: ignore[index]
    assert share == pytest.approx(optimizer.metrics.entropy_share, rel=0.2)
    weight = float(re.search(r"ObjectiveConfig\(weight=(\S+)\)", messages[0])[1])  # type: ignore[index]
    optimizer, messages = summed(70_000.0, weight)  # what it advises
    assert messages == []
    assert optimizer.metrics is not None
    assert optimizer.metrics.entropy_share == pytest.approx(0.01, rel=0.2)


@pytest.mark.parametrize(
    ("factor", "weight", "parts"),
    [
        (1.0, 0.05, {}),
        (-1.0, 0.05, {}),  # a likelihood of a density
        (70_000.0, 0.0, {}),  # meant so
        (70_000.0, 0.05, {"target": 1.9}),  # reached
        (70_000.0, 0.05, {"direction": "up", "target_share": 1.0}),  # a floor, under which little has fallen yet
    ],
)
def test_other_shares_are_no_mistake(factor: float, weight: float, parts: dict[str, Any]) -> None:
    assert summed(factor, weight, **parts)[1] == []


def test_a_small_share_is_judged_over_twenty_steps_of_compression() -> None:
    assert summed(70_000.0, 0.05, steps=19)[1] == []
    assert len(summed(70_000.0, 0.05, steps=20)[1]) == 1


def test_steps_without_a_share_are_passed_over() -> None:
    notices = Notices()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(19):
            notices.small_share(-2e4, 0.5, 0.03)
            for loss, penalty in [(math.nan, 0.0), (math.inf, 1.0), (1.0, math.nan), (1.0, math.inf)]:
                notices.small_share(loss, penalty, 0.03)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        notices.small_share(-1e4, -0.5, 0.03)
        for _ in range(40):
            notices.small_share(2e4, 0.5, 0.03)
    (message,) = (str(warning.message) for warning in told)
    assert "was 2.6e-05 of the objective (loss 1.95e+04, weight * entropy 0.5)" in message
    assert f"ObjectiveConfig(weight={0.03 * 19.5 / 0.5e-3 / 99:.2g}) makes it one percent" in message


# Losses that the loop divides


def micro_batches(i: int, n: int = 4) -> list[int]:
    return [i * n + j for j in range(n)]


@pytest.mark.parametrize("config", [GAPTConfig(gate=RESTLESS), COMPRESSING], ids=["restless", "compressing"])
@pytest.mark.parametrize("scaler", [False, True])
def test_scaled_by_is_scale(scaler: bool, config: GAPTConfig) -> None:
    """Four micro-batches, whose losses the loop divides by four: two ways to say so, and with a GradScaler."""
    runs = []
    for divides in (False, True):
        model = make_net()
        optimizer = wrap(model, config=config)
        grad_scaler = torch.amp.GradScaler("cpu", enabled=scaler, init_scale=1024.0)
        records = []
        for i in range(12):
            for j in micro_batches(i):
                loss = loss_of(model, j)
                if divides and scaler:
                    grad_scaler.scale(optimizer.objective(loss / 4, scaled_by=1 / 4)).backward()
                elif scaler:
                    grad_scaler.scale(optimizer.objective(loss) / 4).backward()
                elif divides:
                    optimizer.backward(loss / 4, scaled_by=1 / 4)
                else:
                    optimizer.backward(loss, scale=1 / 4)
            grad_scaler.step(optimizer)
            grad_scaler.update()
            optimizer.zero_grad()
            assert optimizer.metrics is not None
            records.append(optimizer.metrics)
        runs.append((weights(model), records))
    (first, one), (second, other) = runs
    for name, value in first.items():
        torch.testing.assert_close(second[name], value, rtol=1e-4, atol=1e-6)
    assert [record.phase for record in one] == [record.phase for record in other]
    for a, b in zip(one, other, strict=True):
        assert (a.loss, a.entropy) == pytest.approx((b.loss, b.entropy), rel=1e-4)
        assert a.entropy_share == (None if b.entropy_share is None else pytest.approx(b.entropy_share, rel=1e-4))


@pytest.mark.parametrize("divide", [lambda loss: loss / 4, lambda loss: loss * 0.25, lambda loss: 0.25 * loss])
def test_a_divided_loss_of_which_nothing_is_said_is_noticed(divide: Callable[[Tensor], Tensor]) -> None:
    model = make_net()
    optimizer = wrap(model)

    def act() -> None:
        for i in range(6):
            for j in micro_batches(i):
                optimizer.backward(divide(loss_of(model, j)))
            optimizer.step()
            optimizer.zero_grad()

    messages = said(act)
    assert len(messages) == 1
    assert "each step has 4 losses, each divided by 4" in messages[0]
    assert "scaled_by=1 / 4" in messages[0]


@pytest.mark.parametrize(
    "backward",
    [
        lambda optimizer, loss: optimizer.backward(loss),  # a sum, which may be meant
        lambda optimizer, loss: optimizer.backward(loss, scale=1 / 4),
        lambda optimizer, loss: optimizer.backward(loss / 4, scaled_by=1 / 4),
        lambda optimizer, loss: optimizer.backward(loss / 3),  # by something else
        lambda optimizer, loss: optimizer.backward((loss + loss.detach()) / 4),  # a mean of losses
        lambda optimizer, loss: optimizer.backward(loss / torch.tensor(4.5)),
        lambda optimizer, loss: optimizer.backward(loss * 0.0),
        lambda optimizer, loss: optimizer.backward(torch.maximum(loss, torch.tensor(4.0))),
        lambda optimizer, loss: optimizer.backward(torch.tensor(4.0) / loss),
        lambda optimizer, loss: optimizer.backward(torch.tensor(4.0) * loss),
    ],
)
def test_other_accumulated_losses_are_no_mistake(backward: Callable[[GAPTOptimizer, Tensor], None]) -> None:
    model = make_net()
    optimizer = wrap(model)

    def act() -> None:
        for i in range(6):
            for j in micro_batches(i):
                backward(optimizer, loss_of(model, j))
            optimizer.step()
            optimizer.zero_grad()

    assert said(act) == []


@pytest.mark.parametrize(
    ("micro_batches", "told"),
    [("4444", True), ("444", True), ("44", False), ("442442", False), ("441444", True), ("1111", False)],
)
def test_divided_losses_are_told_of_after_three_steps_in_a_row(micro_batches: str, told: bool) -> None:
    """Each loss is divided by four, or by one where it is the only one of its step."""
    model = make_net()
    optimizer = wrap(model)

    def act() -> None:
        for n in map(int, micro_batches):
            for i in range(n):
                optimizer.backward(loss_of(model, i) / (4 if n > 1 else 1))
            optimizer.step()
            optimizer.zero_grad()

    assert len(said(act)) == told


def test_losses_of_a_step_that_was_not_taken_are_not_those_of_the_next() -> None:
    """Half of a loss, once a step, is no division by the number of micro-batches."""
    model = make_net()
    optimizer = wrap(model)

    def act() -> None:
        for i in range(12):
            optimizer.backward(loss_of(model, i) / 2)
            if i % 2:
                optimizer.step()
            else:
                optimizer.discard_step()
            optimizer.zero_grad()

    assert said(act) == []


# Warm-up


def flat(model: nn.Module, optimizer: GAPTOptimizer, schedule: LRScheduler | None, steps: int) -> list[str]:
    """Phases of steps with one and the same loss."""
    phases = []
    for _ in range(steps):
        optimizer.backward(loss_of(model, 0))
        optimizer.step()
        if schedule is not None:
            schedule.step()
        optimizer.zero_grad()
        assert optimizer.metrics is not None
        phases.append(optimizer.metrics.next_phase)
    return phases


IMPATIENT = GAPTConfig(gate=GateConfig(patience_memorization=5, smoothing=0.0), alignment={"every": 0})  # type: ignore[arg-type]


def warmed_up(steps: int, config: GAPTConfig = IMPATIENT) -> tuple[nn.Module, GAPTOptimizer, LRScheduler]:
    """Learning rates so low that the loss stays where it is; the second group's is the largest, and rises."""
    model = make_net()
    first, *others = model.parameters()
    groups = [{"params": [first], "lr": 1e-12}, {"params": others, "lr": 1e-9}]
    optimizer = GAPTOptimizer(torch.optim.SGD(groups), RepresentationHook(model, "layers.*"), config)
    rises = [lambda step: 1.0, lambda step: min(1.0, (step + 1) / steps)]
    return model, optimizer, LambdaLR(optimizer, rises)


@pytest.mark.parametrize("steps", [1, 7, 30])
def test_a_warm_up_is_no_plateau(steps: int) -> None:
    phases = flat(*warmed_up(steps), steps + 10)
    assert phases.index("compression") == steps - 1 + 5


def test_the_published_rule_knows_no_warm_up() -> None:
    config = GAPTConfig.published(gate=GateConfig.published(patience_memorization=5))
    assert flat(*warmed_up(30, config), 10).index("compression") == flat(*warmed_up(1, config), 10).index("compression")


def test_a_warm_up_survives_saving() -> None:
    model, optimizer, schedule = warmed_up(20)
    whole = flat(model, optimizer, schedule, 40)
    for cut in (1, 7, 19, 20, 23):
        model, optimizer, schedule = warmed_up(20)
        before = flat(model, optimizer, schedule, cut)
        saved = optimizer.state_dict(), schedule.state_dict()
        model, optimizer, schedule = warmed_up(20)
        optimizer.load_state_dict(saved[0])
        schedule.load_state_dict(saved[1])
        assert before + flat(model, optimizer, schedule, 40 - cut) == whole


def test_a_state_from_before_warm_up_loads() -> None:
    model, optimizer, schedule = warmed_up(1)
    flat(model, optimizer, schedule, 3)
    state = optimizer.state_dict()
    own = json.loads(state["param_groups"][0]["gapt"])
    assert own.pop("learning_rate") == 1e-9
    state["param_groups"][0]["gapt"] = json.dumps(own)
    _, other, _ = warmed_up(1)
    other.load_state_dict(state)
    assert json.loads(other.state_dict()["param_groups"][0]["gapt"])["learning_rate"] is None


@pytest.mark.parametrize("lr", [0.01, torch.tensor(0.01), None, math.inf, "high"])
def test_any_learning_rate_will_do(lr: Any) -> None:
    """Optimizers may keep it as a tensor, or have none."""
    model = make_net()
    optimizer = wrap(model)
    optimizer.backward(loss_of(model, 0))
    given, optimizer.param_groups[0]["lr"] = optimizer.param_groups[0]["lr"], lr
    steps, optimizer.base.step = optimizer.base.step, lambda *_: None
    optimizer.step()
    optimizer.base.step, optimizer.param_groups[0]["lr"] = steps, given
    kept = json.loads(optimizer.state_dict()["param_groups"][0]["gapt"])["learning_rate"]
    assert kept == (pytest.approx(0.01) if isinstance(lr, float | Tensor) and math.isfinite(lr) else None)


@pytest.mark.parametrize(
    ("rates", "largest"),
    [
        ([1e-3, 3, 0.5], 3.0),
        ([-2.0], -2.0),
        ([torch.tensor(0.5), 0.25], 0.5),
        ([torch.tensor([0.5]), None], 0.5),
        ([math.nan, 0.1, -math.inf], 0.1),
        ([torch.tensor([1.0, 2.0])], None),  # of each parameter
        ([torch.empty((), device="meta")], None),  # to be waited for
        ([None, "high"], None),
        ([], None),
    ],
    ids=str,
)
def test_the_largest_learning_rate(rates: list[Any], largest: float | None) -> None:
    groups = [{} if rate is None else {"lr": rate} for rate in rates]
    assert largest_learning_rate(groups) == largest


# Steps that a GradScaler skips


def test_gradients_that_nothing_was_added_to() -> None:
    first, second, third = (nn.Parameter(torch.ones(2)) for _ in range(3))
    groups = [{"params": [first, second]}, {"params": [third]}]
    second.grad = torch.zeros(2)

    def unchanged(change: Callable[[], object]) -> bool:
        before = Gradients()
        before.note(groups)
        change()
        return before.unchanged(groups)

    def set_gradient(parameter: nn.Parameter, gradient: Tensor | None) -> Callable[[], None]:
        return lambda: setattr(parameter, "grad", gradient)

    assert unchanged(lambda: None)
    assert not unchanged(lambda: second.grad.add_(0))  # type: ignore[union-attr]
    assert not unchanged(set_gradient(second, torch.zeros(2)))
    assert not unchanged(set_gradient(third, torch.zeros(2)))
    assert unchanged(set_gradient(third, None))  # it was dropped, by anybody
    assert unchanged(set_gradient(second, None))
    assert not unchanged(lambda: groups.append({"params": [nn.Parameter(torch.ones(1))]}))


SKIPS: dict[str, Callable[[nn.Module, GAPTOptimizer], object]] = {
    "zero_grad": lambda model, optimizer: optimizer.zero_grad(),
    "zero_grad in place": lambda model, optimizer: optimizer.zero_grad(set_to_none=False),
    "the model's": lambda model, optimizer: model.zero_grad(),
    "by hand": lambda model, optimizer: [setattr(p, "grad", None) for p in model.parameters()],
    "the base's": lambda model, optimizer: optimizer.base.zero_grad(),
}


@pytest.mark.parametrize("skip", SKIPS.values(), ids=SKIPS)
@PHASES
def test_losses_whose_gradients_are_dropped_leave_no_trace(
    phase: str, skip: Callable[[nn.Module, GAPTOptimizer], object]
) -> None:
    found = []
    for skipped in (False, True):
        model = make_net()
        gate = GateConfig(initial_phase=phase, frozen=True)
        optimizer = wrap(model, config=GAPTConfig(gate=gate, alignment=AlignmentConfig(parameter_every=1)))
        if skipped:
            optimizer.backward(loss_of(model, 5) * 100)
            skip(model, optimizer)
        for i in range(2):  # micro-batches
            optimizer.backward(loss_of(model, i), scale=0.5)
        optimizer.step()
        found.append((optimizer.metrics, weights(model)))
    (before, path), (after, same) = found
    assert before is not None
    assert after is not None
    assert_same(after.as_dict(), before.as_dict())
    assert all(torch.equal(path[name], same[name]) for name in path)


# What is logged


def test_switches_are_logged(caplog: pytest.LogCaptureFixture) -> None:
    """One line each, for whoever asks for them: a library's log is silent by itself."""
    model = make_net()
    optimizer = wrap(model, config=GAPTConfig(gate=RESTLESS))
    with caplog.at_level("INFO", logger="gapt_optim"):
        run(model, optimizer, range(30))
    assert optimizer.metrics is not None
    lines = [record.getMessage() for record in caplog.records if record.name == "gapt_optim"]
    assert len(lines) == optimizer.metrics.switches > 2
    assert re.search(r"memorization ends, as the loss stopped falling \(loss .*compression begins", lines[0])
    assert re.search("compression ends, as .*memorization begins", lines[1])
    caplog.clear()
    run(model, optimizer, range(30, 60))
    assert caplog.records == []


def test_one_rank_of_several_logs(caplog: pytest.LogCaptureFixture) -> None:
    models = iter([make_net(), make_net()])

    def train() -> int:
        model = next(models)
        optimizer = wrap(model, config=GAPTConfig(gate=RESTLESS))
        run(model, optimizer, range(20))
        assert optimizer.metrics is not None
        return optimizer.metrics.switches

    with caplog.at_level("INFO", logger="gapt_optim"):
        switches = on_threads(train)
    assert min(switches) > 2
    assert len([record for record in caplog.records if record.name == "gapt_optim"]) == min(switches)


# Several forward passes before the first backward


@PHASES
def test_two_forward_passes_then_two_backward_calls(phase: str) -> None:
    model, x, y = MLP(), torch.randn(9, 6), torch.randn(9, 6)
    optimizer = wrapped(model, "blocks.*", phase)
    first, second = model(x).square().mean(), model(y).square().mean()
    optimizer.backward(first)
    optimizer.backward(second)
    optimizer.step()
    assert optimizer.metrics is not None
    apart = optimizer.metrics
    optimizer.zero_grad()
    optimizer.backward(model(x).square().mean() + model(y).square().mean())
    optimizer.step()
    assert optimizer.metrics.layer_entropy == pytest.approx(apart.layer_entropy, rel=1e-5)


# Where a warning points


@pytest.mark.parametrize("between", ["nothing", "scheduler", "scaler"])
def test_a_warning_points_at_the_line_that_called_us(between: str) -> None:
    """Past the frames that torch puts between."""

    def full(metrics: StepMetrics) -> None:
        raise OSError("disk full")

    model = make_net()
    optimizer = wrap(model, observers=[full])
    scaler = torch.amp.GradScaler("cpu", enabled=between == "scaler")
    if between == "scheduler":
        LambdaLR(optimizer, lambda step: 1.0)

    def act() -> None:
        scaler.scale(optimizer.objective(loss_of(model, 0))).backward()
        if between == "scaler":
            scaler.step(optimizer)
        else:
            optimizer.step()

    assert said(act) == ["observer function raised OSError: disk full; it is dropped"]


# The overall angle of activation alignment


@pytest.mark.parametrize(("first", "last"), [(1, 0), (0, 2), (1, 1)])
def test_the_overall_angle_is_that_of_the_layers_that_count(first: int, last: int) -> None:
    model = MLP(depth=4)
    optimizer = wrapped(model, "blocks.*", "memorization", counting={"skip_first": first, "skip_last": last})
    optimizer.backward(F.mse_loss(model(torch.randn(5, 12, 6)), torch.randn(5, 12, 4)))
    optimizer.step()
    assert optimizer.metrics is not None
    alignment = optimizer.metrics.alignment
    assert alignment is not None
    assert list(alignment.layers) == optimizer.hook.names
    counted = [alignment.layers[name] for name in optimizer.hook.names[first : 4 - last]]
    gd = sum((a.cosine or 0) * a.loss_norm * a.entropy_norm for a in counted)
    loss_norm, entropy_norm = (
        math.sqrt(sum(getattr(a, norm) ** 2 for a in counted)) for norm in ("loss_norm", "entropy_norm")
    )
    assert alignment.cosine == pytest.approx(gd / loss_norm / entropy_norm, rel=1e-4)
    assert alignment.loss_norm == pytest.approx(loss_norm, rel=1e-4)
    assert alignment.entropy_norm == pytest.approx(entropy_norm / len(counted), rel=1e-4)


@pytest.mark.parametrize("gone", ["replaced", "removed", "evaluation", "here", "model"])
def test_a_layer_that_no_longer_runs_is_told_of_once(gone: str) -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    watched = {"0": model[0], "1": model[1]}
    why = {"evaluation": " (it is in evaluation mode)"}.get(gone, "")
    if gone == "replaced":
        model[1] = nn.ReLU()
        why = " (the model now has a ReLU there, the hook watches a Linear)"
    elif gone == "removed":
        del model[1]
        why = " (the Linear is no longer part of the model)"
    elif gone == "evaluation":
        model[1].eval()
    notices = Notices()

    def steps() -> None:
        for _ in range(250):
            notices.absent(["0"], ["0", "1"], None if gone == "model" else model, watched)

    with pytest.warns(UserWarning, match=re.escape(f'layer "1" has not run for 100 steps{why}: its')) as told:
        steps()
    assert len(told) == 1
