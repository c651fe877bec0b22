"""Parameter alignment: the numbers of two separate passes, and a run that does not notice it is measured."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from gapt_optim import AlignmentConfig, GAPTConfig, GAPTOptimizer, ObjectiveConfig
from tests.angles import (
    Pair,
    assert_angle,
    assert_parameter_alignment,
    layers_of,
    parameter_gradients,
    sums_of,
)
from tests.loops import RESTLESS, adamw, assert_same, gradients, loss_of, make_net, weights, wrap
from tests.memory import Live
from tests.models import CASES, COMPILED, MLP, Block, Case
from tests.training import wrapped

PHASES = pytest.mark.parametrize("phase", ["memorization", "compression"])
cases = pytest.mark.parametrize("case", CASES.values(), ids=CASES)
# Parts of a float32 gradient smaller than this share of it are its rounding.
NOISE = {torch.float32: 1e-5, torch.float64: 1e-12}


def measuring(model: nn.Module, case: Case, phase: str = "compression", **parts: Any) -> GAPTOptimizer:
    alignment = {"parameter_every": 1, **parts.pop("alignment", {})}
    return wrapped(model, case.layers, phase=phase, alignment=alignment, **parts)


def different(inputs: dict[str, Tensor], n: int) -> list[dict[str, Tensor]]:
    """n batches of different content and equal masks."""
    torch.manual_seed(7)
    shuffled = lambda t: t.flatten()[torch.randperm(t.numel())].reshape(t.shape)  # noqa: E731
    return [
        {key: value if key == "attention_mask" or i == 0 else shuffled(value) for key, value in inputs.items()}
        for i in range(n)
    ]


def measured(
    case: Case, dtype: torch.dtype, phase: str, *, micro_batches: int = 1, scale: float = 1.0, **parts: Any
) -> tuple[GAPTOptimizer, dict[str, Pair]]:
    """After one step: the optimizer, and the reference's gradients of the same model in float64."""
    model = case.model(dtype)
    optimizer = measuring(model, case, phase, **parts)
    for batch in different(case.inputs(dtype), micro_batches):
        optimizer.backward(case.loss(model, batch), scale=scale)
    optimizer.step()
    twin = case.model(torch.float64)
    batches = different(case.inputs(dtype), micro_batches)
    batches = [{k: v.double() if v.is_floating_point() else v for k, v in batch.items()} for batch in batches]
    return optimizer, parameter_gradients(case, twin, batches, scale)


def assert_measured(optimizer: GAPTOptimizer, expected: dict[str, Pair], dtype: torch.dtype, tolerance: float) -> None:
    assert optimizer.metrics is not None
    assert_parameter_alignment(
        optimizer.metrics.parameter_alignment,
        expected,
        optimizer.hook.names,
        tolerance,
        weight=optimizer.config.objective.weight if optimizer.metrics.phase == "compression" else 0.0,
        noise=NOISE[dtype],
    )


# The numbers


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["32", "64"])
@PHASES
@cases
def test_equals_two_passes(case: Case, phase: str, dtype: torch.dtype) -> None:
    optimizer, expected = measured(case, dtype, phase)
    assert_measured(optimizer, expected, dtype, 1e-6 if dtype == torch.float32 else 1e-11)


@PHASES
@pytest.mark.parametrize("name", ["sequence mlp", "gpt2 masked", "tied"])
def test_equals_two_passes_over_micro_batches(name: str, phase: str) -> None:
    optimizer, expected = measured(CASES[name], torch.float64, phase, micro_batches=3, scale=1 / 3)
    assert_measured(optimizer, expected, torch.float64, 1e-11)


@PHASES
@pytest.mark.parametrize(
    "parts",
    [
        {"objective": {"direction": "up"}},
        {"objective": {"target": 1.2}},
        {"objective": {"direction": "up", "target": 1.9}},
        {"counting": {"reduce": "largest_drop"}},
        {"counting": {"schedule": "rotate"}},
    ],
    ids=str,
)
def test_other_objectives_are_measured_alike(parts: dict[str, Any], phase: str) -> None:
    """Whatever becomes of the two gradients, the angle is between the loss's own and that of the mean entropy."""
    optimizer, expected = measured(CASES["gpt2"], torch.float64, phase, micro_batches=2, **parts)
    assert_measured(optimizer, expected, torch.float64, 1e-11)


@pytest.mark.parametrize("weight", [0.0, 1e-3, 100.0])
def test_the_weight_has_no_part_in_it(weight: float) -> None:
    """The loss's part of .grad is a difference, so a heavy entropy costs digits: 1e-7 times its weight."""
    optimizer, expected = measured(CASES["sequence mlp"], torch.float32, "compression", objective={"weight": weight})
    assert_measured(optimizer, expected, torch.float32, 1e-6 * max(1.0, weight / 5))


def test_skipped_layers_have_no_part_in_it() -> None:
    case = CASES["deep"]
    optimizer, _ = measured(case, torch.float64, "compression", counting={"skip_first": 1, "skip_last": 2})
    counted = replace(case, layers="blocks.[12]")
    model = case.model(torch.float64)
    found = measuring(model, counted)
    found.backward(case.loss(model, case.inputs(torch.float64)))
    found.step()
    ours, theirs = (each.metrics.parameter_alignment for each in (optimizer, found))
    assert ours.cosine == pytest.approx(theirs.cosine, rel=1e-12)
    assert ours.entropy_norm == pytest.approx(theirs.entropy_norm, rel=1e-12)


@PHASES
def test_under_a_gradient_scaler(phase: str) -> None:
    case = CASES["sequence mlp"]
    model = case.model()
    optimizer = measuring(model, case, phase)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12)
    scaler.scale(torch.zeros(()))  # makes its scale exist
    optimizer.backward(case.loss(model, case.inputs()), scale=scaler.get_scale())
    scaler.unscale_(optimizer)
    nn.utils.clip_grad_norm_(model.parameters(), 1e-3)
    scaler.step(optimizer)
    expected = parameter_gradients(case, case.model(torch.float64), [case.inputs(torch.float64)], 2.0**12)
    assert_measured(optimizer, expected, torch.float32, 1e-6)


def test_a_step_that_the_scaler_skips_leaves_nothing_behind() -> None:
    case = CASES["sequence mlp"]
    for set_to_none in (True, False):
        model = case.model(torch.float64)
        optimizer = measuring(model, case, objective={"weight": 30.0})
        optimizer.backward(case.loss(model, case.inputs(torch.float64)), scale=float("inf"))
        optimizer.zero_grad(set_to_none)  # GradScaler did not call step
        optimizer.backward(case.loss(model, case.inputs(torch.float64)))
        assert all(p.grad.isfinite().all() for p in model.parameters())
        optimizer.step()
        expected = parameter_gradients(case, case.model(torch.float64), [case.inputs(torch.float64)])
        assert_measured(optimizer, expected, torch.float64, 1e-11)


@PHASES
@pytest.mark.parametrize("name", ["sequence mlp", "gpt2"])
def test_under_autocast(name: str, phase: str) -> None:
    """Taps pass bfloat16 gradients on, so the two passes and their sum each round to 8 bits."""
    case = CASES[name]
    model = case.model()
    optimizer = measuring(model, case, phase)
    with torch.autocast("cpu", torch.bfloat16):
        loss = case.loss(model, case.inputs())
    optimizer.backward(loss)
    optimizer.step()

    def loss_of(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return case.loss(model, batch)

    expected = parameter_gradients(case, case.model(), [case.inputs()], loss_of=loss_of)
    assert_angle(optimizer.metrics.parameter_alignment, sums_of(*expected.values()), 0.02)


class Checkpointed(MLP):
    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False)
        return self.head(x)


def frozen(build: Callable[[], nn.Module], name: str) -> Callable[[], nn.Module]:
    def made() -> nn.Module:
        model = build()
        model.get_submodule(name).requires_grad_(False)
        return model

    return made


def test_recomputing(  # of every block, in each of the passes
) -> None:
    plain = CASES["sequence mlp"]
    case = replace(plain, build=Checkpointed)
    for parts in ({}, {"objective": {"target": 0.5}}):
        optimizer, expected = measured(case, torch.float64, "compression", micro_batches=1, **parts)
        assert_measured(optimizer, expected, torch.float64, 1e-11)


@PHASES
@pytest.mark.parametrize(
    ("name", "part"), [("sequence mlp", "blocks.0"), ("sequence mlp", "blocks.1"), ("gpt2", "transformer.wte")]
)
def test_frozen_parameters_are_passed_over(name: str, part: str, phase: str) -> None:
    case = replace(CASES[name], build=frozen(CASES[name].build, part))
    optimizer, expected = measured(case, torch.float64, phase)
    assert_measured(optimizer, expected, torch.float64, 1e-11)
    assert not any(name.startswith(part) for name in optimizer.metrics.parameter_alignment.parameters)


def test_parameters_frozen_or_thawed_between_steps() -> None:
    case = CASES["sequence mlp"]
    model, inputs = case.model(torch.float64), case.inputs(torch.float64)
    optimizer = measuring(model, case)
    for frozen_block in (None, 0, 1, None):
        for i, block in enumerate(model.blocks):
            block.requires_grad_(i != frozen_block)
        optimizer.backward(case.loss(model, inputs))
        optimizer.step()
        optimizer.zero_grad()
        reached = {name.rpartition(".linear")[0] for name in optimizer.metrics.parameter_alignment.parameters}
        assert reached == {f"blocks.{i}" for i in range(3)} - {f"blocks.{frozen_block}"}


IN_TORCH = [  # what torch's compiler does to any autograd.Function, and to any hook of the compiled module itself
    pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning"),
]
PHASES_COMPILED = [pytest.param(phase, marks=IN_TORCH) for phase in ("memorization", "compression")]


@pytest.fixture
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    with torch._functorch.config.patch(donated_buffer=False):
        yield
    torch._dynamo.reset()


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("phase", PHASES_COMPILED)
@pytest.mark.parametrize(
    "parts",
    [{}, {"objective": {"target": 0.5, "weight": 20.0}}],
    ids=["plain", "target"],
)
def test_compiled(phase: str, parts: dict[str, Any]) -> None:
    case = replace(CASES["sequence mlp"], build=lambda: MLP(depth=2))
    model = case.model()
    optimizer = measuring(model, case, phase, **parts)
    compiled = torch.compile(model, backend="aot_eager")
    for _ in range(2):
        optimizer.zero_grad()
        optimizer.backward(case.loss(compiled, case.inputs()))
        optimizer.step()
    expected = parameter_gradients(case, case.model(torch.float64), [case.inputs(torch.float64)])
    assert_measured(optimizer, expected, torch.float32, 1e-6)


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
def test_donated_buffers_are_refused_with_advice() -> None:
    case = COMPILED["sequence mlp"]
    model = case.model()
    optimizer = measuring(model, case)
    with torch._functorch.config.patch(donated_buffer=True):
        compiled = torch.compile(model, backend="aot_eager")
        optimizer.objective(case.loss(compiled, case.inputs())).backward()  # compiles it for one use
        loss = case.loss(compiled, case.inputs())
        with pytest.raises(RuntimeError, match="donated_buffer = False before compiling"):
            optimizer.backward(loss)


class OneLossEach(nn.Module):
    """A side branch that only the entropy reaches, one that nothing does, and a head for the loss alone."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Block(6), Block(6)])
        self.head, self.unused = nn.Linear(6, 4), nn.Linear(2, 2)

    def forward(self, x: Tensor) -> Tensor:
        h = self.blocks[0](x)
        self.blocks[1](h)
        return self.head(h)


@pytest.mark.filterwarnings("ignore:the loss does not use the output of layer:UserWarning")
@PHASES
def test_parameters_that_one_loss_reaches(phase: str) -> None:
    model, x = OneLossEach(), torch.randn(3, 8, 6)
    optimizer = measuring(model, replace(CASES["sequence mlp"], build=OneLossEach), phase)
    optimizer.backward(model(x).square().mean())
    optimizer.step()
    found = optimizer.metrics.parameter_alignment
    assert (found.shared, found.only_loss, found.only_entropy) == (2, 2, 0)
    assert list(found.layers) == ["blocks.0"]


@pytest.mark.filterwarnings("ignore:the loss does not use the output of layer:UserWarning")
@pytest.mark.parametrize("alignment", [{"every": 0}, {}, {"every": 1}, {"parameter_every": 1}])
@PHASES
def test_what_the_loss_does_not_reach_rests(phase: str, alignment: dict[str, Any]) -> None:
    """Without a gradient, as the bare optimizer leaves it: a gradient of zeros would let weight decay in."""
    torch.manual_seed(0)
    model, x = OneLossEach(), torch.randn(3, 8, 6)
    optimizer = wrapped(model, "blocks.*", phase=phase, alignment=alignment)
    optimizer.backward(model(x).square().mean())
    assert all(p.grad is None for p in model.blocks[1].parameters())
    assert all(p.grad is not None for p in (*model.blocks[0].parameters(), *model.head.parameters()))
    optimizer.step()


class Twice(nn.Module):
    """Two parameters of which autograd hands out one gradient tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Parameter(torch.randn(10, 6)), nn.Parameter(torch.randn(10, 6))
        self.blocks = nn.ModuleList([Block(6), Block(6)])
        self.head = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        h = x[0] + self.a + self.b
        for block in self.blocks:
            h = block(h)
        return self.head(h)


def test_parameters_that_share_a_gradient_tensor() -> None:
    case = replace(CASES["sequence mlp"], build=Twice)
    optimizer, expected = measured(case, torch.float64, "compression", micro_batches=3)
    overall = sums_of(*expected.values())
    assert optimizer.metrics.parameter_alignment.loss_norm == pytest.approx(overall[1] ** 0.5, rel=1e-9)
    assert_measured(optimizer, expected, torch.float64, 1e-11)


def test_sparse_gradients() -> None:
    net, twin = make_net(sparse=True).double(), make_net().double()
    both = []
    for model in (net, twin):
        optimizer = wrap(model, lambda m: torch.optim.SGD(m.parameters(), 0.0), measure())
        for i in range(2):
            optimizer.backward(loss_of(model, i))
        optimizer.step()
        both.append(optimizer.metrics.parameter_alignment)
    assert both[0].cosine == pytest.approx(both[1].cosine, rel=1e-12)
    assert both[0].parameters["embedding.weight"].cosine is not None


def test_an_overflowing_entropy_has_no_gradient() -> None:
    """The step falls back to the loss alone, and so does what is measured of it."""

    class Overflowing(MLP):
        def forward(self, x: Tensor) -> Tensor:
            hidden = self.blocks[1](self.blocks[0](x) * 1e30) * 1e-30
            return self.head(self.blocks[2](hidden))

    model, x = Overflowing(), torch.randn(9, 6)
    optimizer = measuring(model, replace(CASES["mlp"], build=Overflowing))
    plain = torch.autograd.grad(model(x).square().mean(), list(model.head.parameters()))
    optimizer.discard_step()
    optimizer.backward(model(x).square().mean())
    assert all(torch.equal(p.grad, g) for p, g in zip(model.head.parameters(), plain, strict=True))
    optimizer.step()
    assert optimizer.metrics.parameter_alignment.cosine is None
    assert optimizer.metrics.parameter_alignment.entropy_norm == 0


# The run


def measure(**alignment: Any) -> GAPTConfig:
    return GAPTConfig(gate=RESTLESS, alignment=AlignmentConfig(**({"parameter_every": 1} | alignment)))


@pytest.mark.parametrize("activation", [False, True])
@pytest.mark.parametrize(
    ("objective", "alignment"),
    [
        ({}, {"parameter_every": 1}),
        ({}, {"parameter_every": 3}),
        ({"direction": "up"}, {"parameter_every": 1}),
        ({"target": 0.5}, {"parameter_every": 2}),
    ],
    ids=str,
)
def test_a_measured_run_is_the_run_that_is_not(
    objective: dict[str, Any], alignment: dict[str, Any], activation: bool
) -> None:
    runs: list[list[Any]] = []
    for extra in ({}, alignment):
        model = make_net(bias=True)
        config = GAPTConfig(
            gate=RESTLESS,
            objective=ObjectiveConfig(**objective),
            alignment=AlignmentConfig(every=int(activation), **extra),
        )
        optimizer = wrap(model, adamw, config)
        seen: list[Any] = []
        for step in range(12):
            for micro in range(2):
                optimizer.backward(loss_of(model, 2 * step + micro), scale=0.5)
            seen.append(gradients(model))
            optimizer.step()
            optimizer.zero_grad()
            due = bool(extra) and (step == 0 or (step + 1) % extra["parameter_every"] == 0)
            assert (optimizer.metrics.parameter_alignment is not None) == due
            seen.append((optimizer.metrics.loss, optimizer.metrics.layer_entropy, optimizer.metrics.alignment))
        assert optimizer.metrics.switches >= 3  # both phases
        runs.append([*seen, weights(model), optimizer.base.state_dict()])
    assert_same(runs[0], runs[1])


def test_the_objective_alone_is_not_measured() -> None:
    """Who differentiates the objective has no measured pass; the gradient is right all the same."""
    case = CASES["sequence mlp"]
    for phase in ("memorization", "compression"):
        found = []
        for every in (0, 1):
            model = case.model()
            optimizer = wrapped(model, case.layers, phase=phase, alignment={"parameter_every": every})
            optimizer.objective(case.loss(model, case.inputs())).backward()
            found.append(gradients(model))
            told = pytest.warns(UserWarning, match="only optimizer.backward") if every else nullcontext()
            with told:
                optimizer.step()
            assert optimizer.metrics.parameter_alignment is None
        assert_same(found[0], found[1])


# Memory


WIDE = Case(lambda: MLP(width=192, depth=6), "blocks.*", lambda: {"x": torch.randn(1, 8, 192)}, 4)
ONE = 192 * 192 * 4
ALL = 6 * ONE


def peak_of_backward(phase: str, micro_batches: int, **parts: Any) -> int:
    """Of the last of the micro-batches, with what is held from those before it."""
    model, inputs = WIDE.model(), WIDE.inputs()
    optimizer = wrapped(model, WIDE.layers, phase=phase, **parts)
    with Live() as live:
        for _ in range(micro_batches):
            optimizer.backward(WIDE.loss(model, inputs))
    return live.peak


@pytest.mark.parametrize("micro_batches", [1, 2])
@PHASES
def test_memory_of_one_gradient(phase: str, micro_batches: int) -> None:
    bare = peak_of_backward(phase, micro_batches)
    assert bare > ALL  # the gradients themselves
    kept = peak_of_backward(phase, micro_batches, alignment={"parameter_every": 1}) - bare
    assert kept + ONE > ALL
    # One gradient of all parameters, and what the work on a single parameter takes.
    assert kept < ALL + 3 * ONE


def test_nothing_is_kept_after_the_step() -> None:
    case = CASES["sequence mlp"]
    model = case.model()
    optimizer = measuring(model, case, alignment={"parameter_every": 2})
    optimizer.backward(case.loss(model, case.inputs()))
    held = [weakref.ref(gradient) for gradient in optimizer._step._comparison._entropy if gradient is not None]
    assert held
    optimizer.step()
    assert not any(ref() is not None for ref in held)


# Refusals


def test_other_errors_of_the_backward_are_passed_on() -> None:
    case = CASES["mlp"]
    model = case.model()
    optimizer = measuring(model, case)
    loss = case.loss(model, case.inputs())
    F.relu_(next(model.parameters()).data)  # not seen by autograd
    with torch.no_grad():
        model.head.weight.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        optimizer.backward(loss)
    assert not any(getattr(p, "_backward_hooks", None) for p in model.parameters())
    assert list(layers_of(model, case)) == optimizer.hook.names
