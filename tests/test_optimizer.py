"""What torch, schedulers and frameworks expect of an optimizer, and what a training loop is told when it errs."""

from __future__ import annotations

import copy
import inspect
import itertools
import json
import math
import pickle
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import Optimizer, lr_scheduler
from torch.optim.lr_scheduler import LRScheduler
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from gapt_optim import (
    EntropyConfig,
    GAPTConfig,
    GAPTOptimizer,
    GateConfig,
    ObjectiveConfig,
    Phase,
    PhaseGate,
    RepresentationHook,
    progress,
)

from .loops import (
    COMPRESSING,
    RESTLESS,
    Net,
    adamw,
    assert_same,
    gradients,
    loss_of,
    make_net,
    matrices_and_rest,
    pair,
    run,
    sgd,
    weights,
    wrap,
)


def test_it_is_an_optimizer() -> None:
    assert isinstance(wrap(make_net()), Optimizer)


# Schedulers

SCHEDULERS: dict[str, Callable[[Any], Any]] = {
    "LambdaLR": lambda o: lr_scheduler.LambdaLR(o, lambda step: 1 / (1 + step)),
    "MultiplicativeLR": lambda o: lr_scheduler.MultiplicativeLR(o, lambda step: 0.9),
    "StepLR": lambda o: lr_scheduler.StepLR(o, 3),
    "MultiStepLR": lambda o: lr_scheduler.MultiStepLR(o, [2, 5]),
    "ConstantLR": lambda o: lr_scheduler.ConstantLR(o, total_iters=4),
    "LinearLR": lambda o: lr_scheduler.LinearLR(o, total_iters=6),
    "ExponentialLR": lambda o: lr_scheduler.ExponentialLR(o, 0.8),
    "PolynomialLR": lambda o: lr_scheduler.PolynomialLR(o, 8),
    "CosineAnnealingLR": lambda o: lr_scheduler.CosineAnnealingLR(o, 8),
    "CosineAnnealingWarmRestarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 4),
    "CyclicLR": lambda o: lr_scheduler.CyclicLR(o, 0.01, 0.1, step_size_up=3, cycle_momentum="lr" not in o.defaults),
    "CyclicLR with momentum": lambda o: lr_scheduler.CyclicLR(o, 0.01, 0.1, step_size_up=3),
    "OneCycleLR": lambda o: lr_scheduler.OneCycleLR(o, 0.1, total_steps=20),
    "ReduceLROnPlateau": lambda o: lr_scheduler.ReduceLROnPlateau(o, patience=1),
    "SequentialLR": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.ConstantLR(o, total_iters=3), lr_scheduler.ExponentialLR(o, 0.9)], milestones=[3]
    ),
    "ChainedScheduler": lambda o: lr_scheduler.ChainedScheduler(
        [lr_scheduler.ConstantLR(o, total_iters=3), lr_scheduler.ExponentialLR(o, 0.9)], optimizer=o
    ),
}


def scheduled(model: nn.Module, optimizer: Any, make: Callable[[Any], Any]) -> list[Any]:
    """What the scheduler can move, after each of 12 steps."""
    scheduler = make(optimizer)
    moved = []
    for i in range(12):
        run(model, optimizer, range(i, i + 1))
        scheduler.step(*([1.0] if isinstance(scheduler, lr_scheduler.ReduceLROnPlateau) else []))
        moved.append([[group.get(key) for key in ("lr", "momentum", "betas")] for group in optimizer.param_groups])
    return moved


def test_every_scheduler_is_in_the_table() -> None:
    offered = {name for name, c in vars(lr_scheduler).items() if inspect.isclass(c) and issubclass(c, LRScheduler)}
    assert {name.split()[0] for name in SCHEDULERS} == offered - {"LRScheduler", "_LRScheduler"}


@pytest.mark.filterwarnings("ignore:The epoch parameter in `scheduler.step:UserWarning")  # by torch 2.6 itself
@pytest.mark.parametrize("base", [adamw, sgd])
@pytest.mark.parametrize("make", SCHEDULERS.values(), ids=SCHEDULERS)
def test_scheduler_moves_the_same_as_on_the_bare_optimizer(make: Any, base: Any) -> None:
    (bare_model, bare), (model, optimizer) = pair(base)
    expected = scheduled(bare_model, bare, make)
    assert scheduled(model, optimizer, make) == expected
    assert len({str(moved) for moved in expected}) > 1
    assert_same(weights(model), weights(bare_model))
    assert optimizer.metrics is not None
    assert optimizer.metrics.step == 12


def test_scheduler_of_several_optimizers_moves_all_groups() -> None:
    optimizer = wrap(make_net(), matrices_and_rest)
    scheduler = lr_scheduler.LambdaLR(optimizer, [lambda step: 0.5**step, lambda step: 0.1**step])
    optimizer.step()
    scheduler.step()
    assert [base.param_groups[0]["lr"] for base in optimizer.base] == pytest.approx([0.01, 0.001])
    lr_scheduler.OneCycleLR(optimizer, [0.1, 0.2], total_steps=5, cycle_momentum=False)


def test_scheduler_state_resumes_on_the_wrapper() -> None:
    model = make_net()
    optimizer = wrap(model)
    scheduler = lr_scheduler.CosineAnnealingLR(optimizer, 9)
    for i in range(4):
        run(model, optimizer, range(i, i + 1))
        scheduler.step()
    other = wrap(make_net())
    resumed = lr_scheduler.CosineAnnealingLR(other, 9)
    other.load_state_dict(optimizer.state_dict())
    resumed.load_state_dict(scheduler.state_dict())
    for each, one in ((optimizer, scheduler), (other, resumed)):
        each.step()
        one.step()
    assert other.param_groups[0]["lr"] == optimizer.param_groups[0]["lr"] != 0.01


def test_accelerator_prepares_it() -> None:
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState, GradientState, PartialState

    (bare_model, bare), (model, optimizer) = pair()
    bare_scheduler = lr_scheduler.StepLR(bare, 2)
    try:
        accelerator = Accelerator(cpu=True)
        prepared, scheduler = accelerator.prepare(optimizer, lr_scheduler.StepLR(optimizer, 2))
        assert prepared.optimizer is optimizer
        for i in range(6):
            run(bare_model, bare, range(i, i + 1))
            bare_scheduler.step()
            accelerator.backward(optimizer.objective(loss_of(model, i)))
            accelerator.clip_grad_norm_(model.parameters(), 1e9)
            prepared.step()
            scheduler.step()
            prepared.zero_grad()
            assert prepared.param_groups[0]["lr"] == bare.param_groups[0]["lr"]
        saved = prepared.state_dict()
        prepared.load_state_dict(saved)
    finally:
        for state in (AcceleratorState, GradientState, PartialState):
            state._reset_state()
    assert_same(weights(model), weights(bare_model))
    assert optimizer.metrics is not None
    assert optimizer.metrics.step == 6


# Groups, state and defaults are the base's own


def test_groups_state_and_defaults_read_the_base() -> None:
    model = make_net()
    optimizer = wrap(model)
    run(model, optimizer, range(1))
    assert optimizer.param_groups is optimizer.base.param_groups
    assert optimizer.state is optimizer.base.state
    assert optimizer.defaults is optimizer.base.defaults
    for name in ("param_groups", "state", "defaults"):
        replaced = copy.copy(getattr(optimizer, name))
        setattr(optimizer, name, replaced)
        assert getattr(optimizer.base, name) is replaced
        assert name not in vars(optimizer)


@pytest.mark.parametrize("side", ["wrapper", "base"])
def test_nothing_is_stale_after_loading_on_either_side(side: str) -> None:
    model = make_net()
    optimizer = wrap(model)
    run(model, optimizer, range(2))
    saved = copy.deepcopy(optimizer.state_dict() if side == "wrapper" else optimizer.base.state_dict())
    saved["param_groups"][0]["lr"] = 0.123
    (optimizer if side == "wrapper" else optimizer.base).load_state_dict(saved)
    assert optimizer.param_groups is optimizer.base.param_groups
    assert optimizer.state is optimizer.base.state
    assert optimizer.param_groups[0]["lr"] == 0.123
    scheduler = lr_scheduler.StepLR(optimizer, 1)
    run(model, optimizer, range(1))
    scheduler.step()
    assert optimizer.base.param_groups[0]["lr"] == pytest.approx(0.0123)


@pytest.mark.parametrize("base", [adamw, matrices_and_rest])
def test_the_state_of_the_base_is_never_written_to(base: Any) -> None:
    model = make_net()
    optimizer = wrap(model, base, GAPTConfig(gate=RESTLESS))
    bases = optimizer.base if isinstance(optimizer.base, tuple) else (optimizer.base,)
    run(model, optimizer, range(12))
    optimizer.state_dict()
    groups = [group for each in bases for group in each.param_groups]
    bare = base(make_net())
    own = [group for each in (bare if isinstance(bare, list) else [bare]) for group in each.param_groups]
    assert [group.keys() for group in groups] == [group.keys() | {"gapt"} for group in own]
    assert all(group["gapt"] is None for group in groups)  # for flattened checkpoints, and nothing is read from it
    for each in bases:
        assert {key for state in each.state.values() for key in state} <= {
            "step",
            "exp_avg",
            "exp_avg_sq",
            "momentum_buffer",
        }


def test_public_attributes_of_a_single_base_are_found() -> None:
    model = make_net()
    optimizer = wrap(model)
    for name in ("is_second_order", "train", "eval", "grad_scale"):
        assert not hasattr(optimizer, name)
    optimizer.base.is_second_order = True  # for which timm's training script asks
    optimizer.base._private = optimizer.base.phase = 1
    assert optimizer.is_second_order is True
    assert optimizer.phase is Phase.MEMORIZATION  # what is ours is ours
    for name in ("is_third_order", "_private"):
        with pytest.raises(AttributeError, match=f"'GAPTOptimizer' object has no attribute '{name}'$"):
            getattr(optimizer, name)


def test_a_method_that_steps_by_itself_does_so_past_us() -> None:
    class Sharp(torch.optim.SGD):
        def first_step(self, zero_grad: bool = False) -> None:
            super().step()
            if zero_grad:
                self.zero_grad()

    model = make_net()
    optimizer = wrap(model, lambda m: Sharp(m.parameters(), lr=0.1))
    before = weights(model)
    optimizer.backward(loss_of(model, 0))
    optimizer.first_step(zero_grad=True)  # type: ignore[attr-defined]
    assert not torch.equal(model.head.weight, before["head.weight"])
    assert all(p.grad is None for p in model.parameters())
    assert optimizer.metrics is None


def test_train_and_eval_of_a_schedule_free_base() -> None:
    import schedulefree

    def base(model: nn.Module) -> Optimizer:
        return schedulefree.AdamWScheduleFree(model.parameters(), lr=0.1)

    (bare_model, bare), (model, optimizer) = pair(base)
    for _ in range(2):
        assert optimizer.train() is bare.train() is None  # type: ignore[attr-defined]
        run(bare_model, bare, range(3))
        run(model, optimizer, range(3))
        assert_same(weights(model), weights(bare_model))
        assert optimizer.eval() is bare.eval() is None  # type: ignore[attr-defined]
        assert_same(weights(model), weights(bare_model))


def test_train_reaches_those_of_several_that_have_it() -> None:
    import schedulefree

    model = make_net()
    free = schedulefree.SGDScheduleFree(model.layers.parameters(), lr=0.1)
    optimizer = wrap(model, lambda m: [torch.optim.SGD(m.head.parameters(), lr=0.1), free])
    optimizer.train()
    assert free.param_groups[0]["train_mode"]
    optimizer.eval()
    assert not free.param_groups[0]["train_mode"]


# Hooks, copies, pickles


def test_step_hooks_run_once_a_step() -> None:
    """Those on all optimizers are called with the wrapped one, as without us."""
    seen: list[str] = []
    model = make_net()
    optimizer = wrap(model)

    def note(what: str) -> Callable[..., None]:
        def hook(*args: Any) -> None:
            assert args[0] is (optimizer.base if "global" in what else optimizer)
            seen.append(what)

        return hook

    handles = [
        optimizer.register_step_pre_hook(note("pre")),
        optimizer.register_step_post_hook(note("post")),
        optimizer.base.register_step_post_hook(lambda *args: seen.append("base")),
        register_optimizer_step_pre_hook(note("global pre")),
        register_optimizer_step_post_hook(note("global post")),
    ]
    run(model, optimizer, range(1))
    assert seen == ["pre", "global pre", "base", "global post", "post"]
    for handle in handles:
        handle.remove()
    run(model, optimizer, range(1))
    assert len(seen) == 5


def test_a_step_hook_may_replace_the_arguments() -> None:
    """As torch's own: self is one of them."""
    model = make_net()
    optimizer = wrap(model)
    losses: list[float] = []

    def closure() -> float:
        losses.append(1.0)
        return 1.0

    handle = optimizer.register_step_pre_hook(lambda o, args, kwargs: ((o, closure), {}))
    assert optimizer.step() == 1.0
    assert losses == [1.0]
    handle.remove()
    optimizer.register_step_pre_hook(lambda o, args, kwargs: args)
    with pytest.raises(RuntimeError, match=r"a step pre-hook must return None or \(args, kwargs\), found \(GAPTOpt"):
        optimizer.step()


def test_a_class_of_ones_own_steps_as_the_wrapper() -> None:
    class Named(GAPTOptimizer):
        """Changes nothing but its name."""

    class Counting(GAPTOptimizer):
        steps = 0

        def step(self, closure: Any = None, **options: Any) -> Any:
            self.steps += 1
            return super().step(closure, **options)

    found = []
    for kind in (GAPTOptimizer, Named, Counting):
        model = make_net()
        optimizer = kind(adamw(model), RepresentationHook(model, "layers.*"))
        seen: list[str] = []
        optimizer.register_step_post_hook(lambda *args, seen=seen: seen.append("after"))
        run(model, optimizer, range(2))
        assert set(seen) == {"after"}
        found.append(weights(model))
    assert optimizer.steps == 2
    assert_same(found[0], found[1])
    assert_same(found[0], found[2])


def test_state_dict_hooks() -> None:
    optimizer = wrap(make_net())
    seen: list[str] = []
    optimizer.register_state_dict_pre_hook(lambda o: seen.append("pre"))
    optimizer.register_state_dict_post_hook(lambda o, state: {**state, "extra": 1})
    optimizer.register_load_state_dict_pre_hook(lambda o, state: seen.append(f"load {state['extra']}"))
    optimizer.register_load_state_dict_post_hook(lambda o: seen.append("loaded"))
    optimizer.load_state_dict(optimizer.state_dict())
    assert seen == ["pre", "load 1", "loaded"]


def test_repr_names_phase_and_base() -> None:
    text = repr(wrap(make_net(), matrices_and_rest, COMPRESSING))
    assert "compression" in text
    assert "Muon" in text
    assert "AdamW" in text
    assert "lr: 0.02" in text


COPIES: dict[str, Callable[[Any], Any]] = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda value: pickle.loads(pickle.dumps(value)),
}


@pytest.mark.parametrize("base", [adamw, matrices_and_rest])
@pytest.mark.parametrize("duplicate", COPIES.values(), ids=COPIES)
def test_copy_goes_on_alike_and_apart(duplicate: Any, base: Any) -> None:
    model = make_net()
    optimizer = wrap(model, base, GAPTConfig(gate=RESTLESS), observers=[lambda m: None])
    run(model, optimizer, range(7))
    other_model, other = duplicate((model, optimizer))
    assert isinstance(other, GAPTOptimizer)
    assert other.phase is optimizer.phase
    assert {id(p) for g in other.param_groups for p in g["params"]} == {id(p) for p in other_model.parameters()}
    before = weights(model)
    ahead = run(other_model, other, range(7, 19))
    assert_same(weights(model), before)
    assert run(model, optimizer, range(7, 19)) == ahead
    assert_same(weights(model), weights(other_model))
    assert_same(other.state_dict(), optimizer.state_dict())


# Closures


def closure_of(model: nn.Module, optimizer: GAPTOptimizer, calls: list[bool]) -> Callable[[], Tensor]:
    def closure() -> Tensor:
        calls.append(torch.is_grad_enabled())
        optimizer.zero_grad()
        loss = loss_of(model, len(calls))
        optimizer.backward(loss)
        return loss

    return closure


@pytest.mark.parametrize("base", [adamw, sgd, lambda m: torch.optim.AdamW(m.parameters(), lr=0.01, fused=True)])
def test_closure_runs_once_with_gradients_and_its_loss_is_returned(base: Any) -> None:
    model, reference = make_net(), make_net()
    optimizer, other = wrap(model, base), wrap(reference, base)
    calls: list[bool] = []
    with torch.no_grad():
        loss = optimizer.step(closure_of(model, optimizer, calls))
    assert calls == [True]
    assert torch.equal(loss, loss_of(make_net(), 1))
    run(reference, other, range(1, 2))
    assert_same(weights(model), weights(reference))
    assert optimizer.metrics == other.metrics


def test_lbfgs_calls_its_closure_as_often_as_it_needs_and_the_gate_moves_once() -> None:
    model = make_net()
    optimizer = wrap(model, lambda m: torch.optim.LBFGS(m.parameters(), lr=0.1, max_iter=4))
    calls: list[bool] = []
    for step in range(1, 4):
        optimizer.step(closure_of(model, optimizer, calls))
        assert optimizer.metrics is not None
        assert optimizer.metrics.step == step
    assert len(calls) > 6


# Steps without a loss


def test_steps_without_a_loss_move_nothing_and_warn_once() -> None:
    model = make_net()
    optimizer = wrap(model, config=GAPTConfig(gate=GateConfig(patience_memorization=1)))
    before = optimizer.state_dict()["param_groups"][0]["gapt"]
    for _ in range(9):
        assert optimizer.step() is None
    with pytest.warns(UserWarning, match=r"10 .*optimizer\.backward\(loss\)") as warned:
        optimizer.step()
    assert warned[0].filename == __file__
    for _ in range(30):
        optimizer.step()
    assert optimizer.state_dict()["param_groups"][0]["gapt"] == before
    assert optimizer.metrics is None


def test_a_loss_in_between_starts_the_count_again() -> None:
    model = make_net()
    optimizer = wrap(model)
    for _ in range(3):
        for _ in range(9):
            optimizer.step()
        run(model, optimizer, range(1))


def test_the_base_still_steps_without_a_loss() -> None:
    (bare_model, bare), (model, optimizer) = pair()
    for i in range(3):
        for one, each in ((bare_model, bare), (model, optimizer)):
            loss_of(one, i).backward()
            each.step()
            each.zero_grad()
    assert_same(weights(model), weights(bare_model))


# Losses and entropies that are not finite


class Overflowing(Net):
    """Its second tapped layer gives an infinite value, which what follows takes back out."""

    def forward(self, tokens: Tensor) -> Tensor:
        h = self.embedding(tokens)
        for i, layer in enumerate(self.layers):
            h = h + layer(h).clamp(-10, 10)
            if i == 1:
                h = h.nan_to_num(0, 0, 0)
        return self.head(h).mean(1)


def overflowing(value: float) -> Net:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Overflowing()

    class Add(nn.Module):
        def forward(self, h: Tensor) -> Tensor:
            return h + torch.zeros_like(h).index_fill(-1, torch.tensor(0), value)

    model.layers[1].append(Add())
    return model


@pytest.mark.filterwarnings("ignore:the rows of layer:UserWarning")  # of layers that a large bias makes one vector
@pytest.mark.parametrize("value", [math.inf, math.nan, 1e12])
def test_extreme_entropy_in_compression_leaves_the_weights_to_the_loss(value: float) -> None:
    """Where the entropy is not finite, the step is that of the loss alone, bit for bit."""
    bare_model, model = overflowing(value), overflowing(value)
    bare, optimizer = sgd(bare_model), wrap(model, sgd, COMPRESSING)
    for i in range(5):
        run(bare_model, bare, range(i, i + 1))
        (metrics,) = run(model, optimizer, range(i, i + 1))
        assert metrics is not None
        assert all(p.isfinite().all() for p in model.parameters())
        if not math.isfinite(value):
            assert_same(weights(model), weights(bare_model))
            assert metrics["entropy"] is None
            assert metrics["nonfinite_steps"] == i + 1
        else:
            assert metrics["nonfinite_steps"] == 0


def gate_state(optimizer: GAPTOptimizer) -> Any:
    return json.loads(optimizer.state_dict()["param_groups"][0]["gapt"])["gate"]


@pytest.mark.parametrize("signal", ["train", "validation"])
@pytest.mark.parametrize("bad", [math.inf, math.nan])
def test_non_finite_loss_moves_no_gate_and_adds_nothing(bad: float, signal: str) -> None:
    """An infinite constant in the loss has the gradient of the loss without it."""
    gate = GateConfig(initial_phase="compression", patience_compression=1, signal=signal)
    bare_model, model = make_net(), make_net()
    bare, optimizer = sgd(bare_model), wrap(model, sgd, GAPTConfig(gate=gate))
    before = gate_state(optimizer)
    for i in range(5):
        loss_of(bare_model, i).backward()
        bare.step()
        bare.zero_grad()
        optimizer.backward(loss_of(model, i) + bad)
        optimizer.step()
        optimizer.zero_grad()
        assert_same(weights(model), weights(bare_model))
        assert optimizer.metrics is not None
        assert optimizer.metrics.nonfinite_steps == i + 1
    assert optimizer.phase is Phase.COMPRESSION
    assert gate_state(optimizer) == before


def test_run_of_non_finite_losses_raises() -> None:
    model = make_net()
    optimizer = wrap(model, config=GAPTConfig(objective=ObjectiveConfig(max_nonfinite=3)))

    def bad_step() -> None:
        optimizer.backward(loss_of(model, 0) + math.nan)
        optimizer.step()
        optimizer.zero_grad()

    for _ in range(2):
        bad_step()
    run(model, optimizer, range(1))  # a good one starts the count again
    for _ in range(2):
        bad_step()
    with pytest.raises(FloatingPointError, match=r"3 steps in a row.*max_nonfinite"):
        bad_step()
    assert optimizer.metrics is not None
    assert optimizer.metrics.nonfinite_steps == 5


# Validation losses


def validation_gate() -> GAPTConfig:
    return GAPTConfig(gate=RESTLESS.model_copy(update={"signal": "validation"}))


def test_validation_gate_moves_only_on_validation_losses() -> None:
    model = make_net()
    optimizer = wrap(model, config=validation_gate())
    twin = PhaseGate(validation_gate().gate)
    entropies: list[float] = []
    losses: list[float] = []
    for i in range(45):
        if i % 3 == 2:
            optimizer.record_validation(torch.tensor(2.0, requires_grad=True))
            optimizer.record_validation(3.0)
        (metrics,) = run(model, optimizer, range(i, i + 1))
        assert metrics is not None
        entropies.append(metrics["entropy"])
        losses.append(metrics["loss"])
        if i % 3 == 2:
            assert metrics["validation_loss"] == 2.5
            twin.update(2.5, math.fsum(entropies) / 3, training_loss=math.fsum(losses) / 3)
            assert metrics["reason"] == twin.reason
            entropies.clear()
            losses.clear()
        else:
            assert metrics["validation_loss"] is None
            assert metrics["reason"] is None
        assert optimizer.phase is twin.phase
    assert twin.switches >= 2


def test_validation_gate_without_validations_says_so_at_the_callers_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "_UNJUDGED_STEPS", 5)
    model = make_net()
    optimizer = wrap(model, config=validation_gate())
    for step in range(8):
        optimizer.backward(loss_of(model, step))
        if step == 4:
            with pytest.warns(UserWarning, match=r"5 steps .*record_validation\(loss\)") as warned:
                optimizer.step()
            assert warned[0].filename == __file__
        else:
            optimizer.step()
        optimizer.zero_grad()


def test_validation_gate_that_has_judged_may_do_without_validations(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "_UNJUDGED_STEPS", 5)
    model = make_net()
    optimizer = wrap(model, config=validation_gate())
    optimizer.record_validation(2.0)
    run(model, optimizer, range(12))  # a warning would be an error


@pytest.mark.parametrize("bad", [math.nan, math.inf, torch.tensor(math.nan)])
def test_held_out_loss_that_is_not_finite_is_left_out(bad: Any) -> None:
    model = make_net()
    optimizer = wrap(model, config=validation_gate())
    optimizer.record_validation(1.5)
    with pytest.warns(UserWarning, match=r"held-out loss of (nan|inf) is left out") as warned:
        optimizer.record_validation(bad)
    assert warned[0].filename == __file__
    run(model, optimizer, range(1))
    assert optimizer.metrics is not None
    assert optimizer.metrics.validation_loss == 1.5


@pytest.mark.parametrize(
    ("loss", "error", "message"),
    [
        ("abc", TypeError, "loss must be a number or a tensor of one, found str"),
        (None, TypeError, "loss must be a number or a tensor of one, found NoneType"),
        (torch.ones(3), ValueError, r"loss must be one number, found shape \(3,\)"),
    ],
)
def test_held_out_loss_must_be_a_number(loss: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        wrap(make_net()).record_validation(loss)


def test_training_gate_reports_validation_losses_and_ignores_them() -> None:
    model, plain = make_net(), make_net()
    optimizer, other = wrap(model, config=GAPTConfig(gate=RESTLESS)), wrap(plain, config=GAPTConfig(gate=RESTLESS))
    for i in range(12):
        optimizer.record_validation(1e9 * i)
        (metrics,), (expected,) = run(model, optimizer, range(i, i + 1)), run(plain, other, range(i, i + 1))
        assert metrics is not None
        assert metrics.pop("validation_loss") == 1e9 * i
        assert expected is not None
        del expected["validation_loss"]
        assert metrics == expected


def test_validation_loss_is_not_lost_on_a_step_that_is_not_finite() -> None:
    model = make_net()
    optimizer = wrap(model, sgd, GAPTConfig(gate=GateConfig(signal="validation", patience_memorization=1)))
    run(model, optimizer, range(1))
    optimizer.record_validation(2.0)
    optimizer.backward(loss_of(model, 0) + math.inf)
    optimizer.step()
    optimizer.zero_grad()
    run(model, optimizer, range(1))
    optimizer.record_validation(2.0)
    run(model, optimizer, range(1))
    assert optimizer.phase is Phase.COMPRESSION  # two validation losses without a fall


# Mistakes


@pytest.mark.parametrize(
    ("loss", "error", "message"),
    [
        (1.0, TypeError, "tensor.*float"),
        (torch.ones(3, requires_grad=True), ValueError, r"shape \(3,\).*loss\.mean\(\)"),
        (torch.tensor(1), ValueError, "int64"),
        (torch.tensor(1j), ValueError, "complex64"),
    ],
)
def test_wrong_losses_are_refused(loss: Any, error: type[Exception], message: str) -> None:
    model = make_net()
    optimizer = wrap(model)
    loss_of(model, 0)
    with pytest.raises(error, match=message):
        optimizer.backward(loss)


@pytest.mark.parametrize("name", ["scale", "scaled_by"])
@pytest.mark.parametrize("value", ["0.5", None, [0.5]])
def test_scales_that_are_no_numbers_are_refused_by_name(name: str, value: Any) -> None:
    model = make_net()
    optimizer = wrap(model)
    with pytest.raises(TypeError, match=f"{name} must be a number.*found {type(value).__name__}"):
        optimizer.backward(loss_of(model, 0), **{name: value})
    assert set(gradients(model).values()) == {None}


@pytest.mark.parametrize("value", [0, -0.5, float("nan"), float("inf")])
def test_scales_that_are_not_positive_are_refused(value: float) -> None:
    model = make_net()
    optimizer = wrap(model)
    with pytest.raises(ValueError, match="scaled_by must be a positive number, found"):
        optimizer.backward(loss_of(model, 0), scaled_by=value)
    assert set(gradients(model).values()) == {None}


@pytest.mark.parametrize("config", [GAPTConfig(), GAPTConfig(gate=GateConfig(initial_phase="compression"))])
def test_a_loss_without_a_graph_is_refused_as_by_torch(config: GAPTConfig) -> None:
    model = make_net()
    optimizer = wrap(model, config=config)
    with pytest.raises(RuntimeError, match=r"loss does not require grad.*detach\(\)"):
        optimizer.backward(loss_of(model, 0).detach())
    assert set(gradients(model).values()) == {None}
    optimizer.backward(loss_of(model, 0))
    optimizer.step()
    assert optimizer.metrics is not None


def test_the_configuration_of_an_optimizer_is_not_replaced() -> None:
    optimizer = wrap(make_net())
    with pytest.raises(AttributeError, match="config"):
        optimizer.config = GAPTConfig()  # type: ignore[misc]


def test_loss_of_one_element_is_a_scalar() -> None:
    bare_model, model = make_net(), make_net()
    loss_of(bare_model, 0).backward()
    wrap(model).backward(loss_of(model, 0).reshape(1))
    assert_same(gradients(model), gradients(bare_model))


@pytest.mark.parametrize("phase", ["memorization", "compression"])
def test_a_loss_that_no_watched_layer_was_computed_for(phase: str) -> None:
    """A parameter of its own, say. Memorization goes on, and the gate stays; compression has nothing to press."""
    model = make_net()
    optimizer = wrap(model, config=GAPTConfig(gate=GateConfig(initial_phase=phase, frozen=True)))
    other = loss_of(model, 0)
    loss = torch.tensor(3.0, requires_grad=True)
    message = r'does not depend on the output of layer "layers\.0"'
    if phase == "compression":
        with pytest.raises(RuntimeError, match=message):
            optimizer.backward(loss)
    else:
        with pytest.warns(UserWarning, match=message + ".*the gate stays"):
            optimizer.backward(loss)
        assert loss.grad == 1
        optimizer.step()
        assert optimizer.metrics is not None
        assert (optimizer.metrics.loss, optimizer.metrics.entropy) == (3, None)
        optimizer.zero_grad()
        optimizer.backward(torch.tensor(3.0, requires_grad=True))  # told once
        optimizer.step()
    optimizer.zero_grad()
    optimizer.backward(other)
    optimizer.step()
    assert optimizer.metrics is not None
    assert optimizer.metrics.entropy is not None
    assert optimizer.metrics.entropy > 0


def test_hook_serves_one_optimizer() -> None:
    model = make_net()
    hook = RepresentationHook(model, "layers.*")
    first = GAPTOptimizer(adamw(model), hook)
    with pytest.raises(ValueError, match="already serves"):
        GAPTOptimizer(adamw(model), hook)
    assert first.hook is hook


def test_removed_hook_is_refused() -> None:
    model = make_net()
    hook = RepresentationHook(model, "layers.*")
    hook.remove()
    with pytest.raises(ValueError, match="removed"):
        GAPTOptimizer(adamw(model), hook)
    optimizer = wrap(model)
    optimizer.hook.remove()
    with pytest.warns(UserWarning, match="the RepresentationHook was removed"):
        optimizer.backward(loss_of(model, 0))
    optimizer = wrap(model, config=COMPRESSING)
    optimizer.hook.remove()
    with pytest.raises(RuntimeError, match="the RepresentationHook was removed"):
        optimizer.backward(loss_of(model, 0))


@pytest.mark.parametrize(
    ("argument", "value", "message"),
    [
        ("optimizer", None, "optimizer must be a torch.optim.Optimizer"),
        ("optimizer", torch.optim.AdamW, "optimizer must be"),
        ("hook", None, "hook must be a RepresentationHook"),
        ("hook", "layers.*", r"hook must be a RepresentationHook, found str.*RepresentationHook\(model, \["),
        ("config", {"gate": {}}, "config must be a GAPTConfig"),
        ("config", GateConfig(), "config must be a GAPTConfig"),
        ("observers", print, "observers must be a sequence of callables, found <built-in function print>"),
        ("observers", [3], r"observers must be a sequence of callables, found \[3\]"),
    ],
)
def test_wrong_argument_types_are_named(argument: str, value: Any, message: str) -> None:
    model = make_net()
    hook = RepresentationHook(model, "layers.*")
    arguments = {"optimizer": adamw(model), "hook": hook, "config": None, argument: value}
    with pytest.raises(TypeError, match=message):
        GAPTOptimizer(**arguments)
    GAPTOptimizer(adamw(model), hook)  # a refused call does not take the hook


@pytest.mark.parametrize("several", [False, True])
def test_a_hook_on_another_copy_of_the_model_is_told_of_once(several: bool) -> None:
    model = make_net()
    optimizer = matrices_and_rest(model) if several else adamw(model)
    other = copy.deepcopy(model)
    with pytest.warns(UserWarning, match="none of the 5 trainable parameters") as told:
        GAPTOptimizer(optimizer, RepresentationHook(other, "layers.*"))
    assert len(told) == 1
    message = str(told[0].message)
    assert message.startswith("optimizer (Muon, AdamW) has" if several else "optimizer (AdamW) has")
    assert "of the hook's model (Net)" in message
    assert "Make the hook on the model whose parameters the optimizer has" in message
    assert told[0].filename == __file__


class Lazy(nn.Module):
    """Has no shapes, nor values, before its first call."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.LazyLinear(6), nn.LazyLinear(6)])

    def forward(self, x: Tensor) -> Tensor:
        return self.layers[1](self.layers[0](x))


def one_shared_parameter() -> tuple[nn.Module, list[Tensor]]:
    model = make_net()
    return model, [model.head.weight, torch.zeros(3, requires_grad=True)]


def prompt_of_a_frozen_model() -> tuple[nn.Module, list[Tensor]]:
    return make_net().requires_grad_(False), [torch.zeros(3, 6, requires_grad=True)]


def no_parameters_at_all() -> tuple[nn.Module, list[Tensor]]:
    return nn.Sequential(nn.Tanh(), nn.Sequential(nn.Tanh())), [torch.zeros(3, 6, requires_grad=True)]


@pytest.mark.filterwarnings("ignore:Lazy modules are a new feature:UserWarning")
@pytest.mark.parametrize(
    "make",
    [
        one_shared_parameter,
        prompt_of_a_frozen_model,
        no_parameters_at_all,
        lambda: (model := Lazy(), list(model.parameters())),
        lambda: (model := torch.compile(make_net(), backend="eager"), list(model._orig_mod.parameters())),
    ],
    ids=["one shared", "frozen", "none", "lazy", "compiled"],
)
def test_a_hook_whose_gradients_may_reach_the_optimizer_is_not_told_of(make: Any) -> None:
    model, parameters = make()
    layers = list(dict(model.named_modules()))[1]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", "Lazy modules are a new feature")
        GAPTOptimizer(torch.optim.SGD(parameters, lr=0.1), RepresentationHook(model, layers))


def test_a_wrapped_optimizer_is_not_wrapped_again() -> None:
    model = make_net()
    optimizer = wrap(model)
    with pytest.raises(TypeError, match="GAPTOptimizer"):
        wrap(model, lambda _: optimizer)
    with pytest.raises(TypeError, match="GAPTOptimizer"):
        wrap(model, lambda _: [optimizer])


# Phases


def test_phase_of_the_step_and_of_the_next() -> None:
    model = make_net()
    optimizer = wrap(model, config=GAPTConfig(gate=RESTLESS, entropy=EntropyConfig(window=4)))
    seen = set()
    for i in range(30):
        phase = optimizer.phase
        (metrics,) = run(model, optimizer, range(i, i + 1))
        assert metrics is not None
        assert metrics["phase"] == phase
        assert metrics["next_phase"] == optimizer.phase
        seen.add(metrics["reason"])
    assert {"plateau", "compressed"} <= seen


def test_no_warning_in_a_plain_loop() -> None:
    model = make_net()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        losses = [m["loss"] for m in run(model, wrap(model), range(30)) if m is not None]
    assert all(a != b for a, b in itertools.pairwise(losses))
