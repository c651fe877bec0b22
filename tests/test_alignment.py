"""Angles between gradients: of any two losses, of several, and at the taps in training."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from gapt_optim import Alignment, Angle, gradient_alignment, gradient_cosines, matrix_entropy
from gapt_optim.alignment import activation_alignment, dot, parameter_alignment, stacked
from tests.angles import activation_sums, assert_activation_alignment, assert_angle, sums_of
from tests.models import CASES, COMPILED, MLP, Case
from tests.training import wrapped

PHASES = pytest.mark.parametrize("phase", ["memorization", "compression"])
WEIGHT = 3.0
PROBE = 1e-6  # whatever the model is in, the statistics leave the backward in float32


# Angles


@pytest.mark.parametrize(
    ("sums", "cosine", "projection", "norms"),
    [
        ((-6.0, 4.0, 36.0), -0.5, -1.5, (2.0, 6.0)),
        ((1.0 + 1e-12, 1.0, 1.0), 1.0, 1.0 + 1e-12, (1.0, 1.0)),
        ((-1.0 - 1e-12, 1.0, 1.0), -1.0, -1.0 - 1e-12, (1.0, 1.0)),
        ((-1e-30, 1e-30, 1e-30), -1.0, -1.0, (1e-15, 1e-15)),
        ((2e300, 4e300, 1e300), 1.0, 0.5, (2e150, 1e150)),
        ((1e200, 1e250, 1e150), 1.0, 1e-50, (1e125, 1e75)),
        ((0.0, 0.0, 4.0), None, None, (0.0, 2.0)),
        ((0.0, 4.0, 0.0), None, None, (2.0, 0.0)),
        ((math.nan, 1.0, 1.0), None, None, (1.0, 1.0)),
        ((math.inf, math.inf, 1.0), None, None, (math.inf, 1.0)),
    ],
)
def test_angle(
    sums: tuple[float, float, float], cosine: float | None, projection: float | None, norms: tuple[float, float]
) -> None:
    angle = Angle.of(*sums)
    assert angle.cosine == (None if cosine is None else pytest.approx(cosine, rel=1e-12))
    assert angle.cosine is None or abs(angle.cosine) <= 1
    assert angle.projection == (None if projection is None else pytest.approx(projection, rel=1e-12))
    assert (angle.loss_norm, angle.entropy_norm) == pytest.approx(norms, rel=1e-12)


def test_a_norm_that_is_no_number() -> None:
    angle = Angle.of(math.nan, math.nan, 1.0)
    assert (angle.cosine, angle.projection) == (None, None)
    assert math.isnan(angle.loss_norm)


@pytest.mark.parametrize("nothing", [0.0, math.nan])
def test_no_gradient_is_no_alignment(nothing: float) -> None:
    rows = [[nothing, nothing, 1.0], [nothing, nothing, 4.0]]
    assert activation_alignment(["a", "b"], rows, ["a", "b"]) is None
    found = activation_alignment(["a", "b"], [*rows[:1], [2.0, 1.0, 4.0]], ["b"])
    assert found is not None
    assert (found.cosine, found.loss_norm, found.entropy_norm) == (1.0, 1.0, 2.0)
    assert found.layers["a"].cosine is None


@pytest.mark.parametrize("mark", ["_is_flat_param", "_fsdp_flattened"])
def test_gradients_of_a_flattened_parameter_are_refused(mark: str) -> None:
    """FullyShardedDataParallel marks them so."""
    whole, flat = (nn.Parameter(torch.ones(2)) for _ in range(2))
    setattr(flat, mark, True)
    loss = (whole * flat).sum()
    with pytest.raises(RuntimeError, match=r'parameter "1" is sharded \(Parameter\)'):
        gradient_alignment(loss, loss, [whole, flat])


def test_dot_products_of_many_numbers() -> None:
    """A single float32 dot product of this length is off by 1e-5."""
    a, b = torch.rand(6_000_001), torch.rand(6_000_001)
    expected = sums_of((a, b))
    assert dot(a, b).tolist() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_dot_products_are_of_the_values_given(dtype: torch.dtype) -> None:
    a, b = torch.randn(40, 30).to(dtype), torch.randn(30, 40).to(dtype).T
    found = dot(a, b)
    assert found.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert found.tolist() == pytest.approx(sums_of((a, b)), rel=1e-5 if dtype != torch.float64 else 1e-13)
    assert dot(a.to_sparse(), b).tolist() == found.tolist()


def test_rows_keep_the_widest_precision() -> None:
    a = torch.randn(3, dtype=torch.float64)
    rows = stacked([None, dot(a.float(), a.float()), dot(a, a), None])
    assert rows.dtype == torch.float64
    assert rows[2].tolist() == dot(a, a).tolist()
    assert not rows[[0, 3]].any()
    assert stacked([None]).tolist() == [[0.0, 0.0, 0.0]]


# Two losses of any kind


def losses_of(case: Case, model: nn.Module, inputs: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """A cross-entropy, and the entropy of the logits."""
    loss = case.loss(model, inputs)
    output = model(**inputs)
    return loss, matrix_entropy(getattr(output, "logits", output).flatten(0, -2))


def two_passes(model: nn.Module, a: Tensor, b: Tensor) -> dict[str, tuple[Tensor | None, Tensor | None]]:
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    pairs = [torch.autograd.grad(x, list(named.values()), retain_graph=True, allow_unused=True) for x in (a, b)]
    return {name: (g, d) for name, g, d in zip(named, *pairs, strict=True)}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["32", "64"])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_gradient_alignment_equals_two_passes(case: Case, dtype: torch.dtype) -> None:
    model, inputs = case.model(dtype), case.inputs(dtype)
    found = gradient_alignment(*losses_of(case, model, inputs), model.named_parameters())
    expected = two_passes(model, *losses_of(case, model, inputs))
    tolerance = 1e-6 if dtype == torch.float32 else 1e-12
    assert_angle(found, sums_of(*expected.values()), tolerance)
    assert list(found.parameters) == list(expected)
    for name, pair in expected.items():
        assert_angle(found.parameters[name], sums_of(pair), tolerance, name)
    assert (found.shared, found.only_loss, found.only_entropy) == (len(expected), 0, 0)
    assert not found.layers


def test_gradient_alignment_of_parts() -> None:
    """Each loss has a head of its own, one layer is frozen and one is used by neither."""
    torch.manual_seed(0)
    trunk, heads, unused = nn.Linear(5, 5), [nn.Linear(5, 2) for _ in range(2)], nn.Linear(2, 2)
    frozen = nn.Linear(5, 5).requires_grad_(False)
    hidden = torch.tanh(frozen(trunk(torch.randn(7, 5))))
    a, b = (head(hidden).square().mean() for head in heads)
    parameters = [*trunk.parameters(), *frozen.parameters(), *heads[0].parameters(), *unused.parameters()]
    found = gradient_alignment(a, b, [*parameters, heads[1].weight])
    assert (found.shared, found.only_loss, found.only_entropy) == (2, 2, 1)
    assert list(found.parameters) == ["0", "1"]
    g, d = (torch.autograd.grad(x, list(trunk.parameters()), retain_graph=True) for x in (a, b))
    assert_angle(found, sums_of(*zip(g, d, strict=True)), 1e-6)


def test_gradient_alignment_of_one_tensor() -> None:
    weight = torch.randn(4, 3, requires_grad=True)
    a, b = weight.square().sum(), weight.abs().sum()
    assert gradient_alignment(a, b, weight).cosine == gradient_alignment(a, b, [weight]).cosine
    assert gradient_cosines([a, b], weight) == gradient_cosines([a, b], [weight])


def test_gradient_alignment_leaves_everything_as_it_was() -> None:
    case = CASES["gpt2"]
    model, inputs = case.model(), case.inputs()
    a, b = losses_of(case, model, inputs)
    before = [torch.full_like(p, 7.0) for p in model.parameters()]
    for parameter, gradient in zip(model.parameters(), before, strict=True):
        parameter.grad = gradient
    gradient_alignment(a, b, model.parameters())
    gradient_cosines([a, b], model.parameters())
    assert all(p.grad is g and bool((g == 7).all()) for p, g in zip(model.parameters(), before, strict=True))
    (a + b).backward()  # both graphs are still there


def test_opposite_and_orthogonal_losses() -> None:
    w = torch.tensor([1.0, 2.0], requires_grad=True)
    for other, cosine, projection in ((-3 * w[0], -1.0, -3.0), (5 * w[1], 0.0, 0.0), (w.sum(), math.sqrt(0.5), 1.0)):
        found = gradient_alignment(w[0], other, [w])
        assert found.cosine == pytest.approx(cosine, abs=1e-7)
        assert found.projection == pytest.approx(projection, abs=1e-7)


def test_gradient_alignment_where_nothing_is_shared() -> None:
    a, b = torch.ones(2, requires_grad=True), torch.ones(2, requires_grad=True)
    found = gradient_alignment(a.sum(), b.sum(), [a, b])
    assert (found.cosine, found.projection) == (None, None)
    assert (found.loss_norm, found.entropy_norm) == (0.0, 0.0)
    assert (found.shared, found.only_loss, found.only_entropy) == (0, 1, 1)


def test_a_gradient_of_zeros_counts_where_it_is_the_only_one() -> None:
    """A compiled backward gives zeros to parameters that it only passes."""
    rows = {
        "both": (True, True, [1.0, 4.0, 1.0]),
        "zeros of the loss": (True, True, [0.0, 0.0, 9.0]),
        "zeros of the entropy": (True, True, [0.0, 9.0, 0.0]),
        "zeros of both": (True, True, [0.0, 0.0, 0.0]),
        "loss alone": (True, False, [0.0, 0.0, 0.0]),
        "entropy alone": (False, True, [0.0, 0.0, 0.0]),
        "neither": (False, False, [0.0, 0.0, 0.0]),
    }
    reached = [(by_loss, by_entropy) for by_loss, by_entropy, _ in rows.values()]
    found = parameter_alignment(list(rows), reached, [sums for *_, sums in rows.values()], ["both", ""])
    assert (found.shared, found.only_loss, found.only_entropy) == (1, 2, 2)
    assert list(found.parameters) == ["both"]
    assert (found.cosine, found.projection, found.loss_norm, found.entropy_norm) == (0.5, 0.25, 2.0, 1.0)
    assert list(found.layers) == [""]  # a name that is the beginning of another is no layer around it


def test_gradient_cosines_of_micro_batches() -> None:
    """Cross-entropies and entropies of two micro-batches, and a loss that reaches one parameter."""
    case = CASES["sequence mlp"]
    model, inputs = case.model(torch.float64), case.inputs(torch.float64)
    pairs = [losses_of(case, model, {"x": x}) for x in (inputs["x"], inputs["x"].flip(0) * 2)]
    losses = [a for a, _ in pairs] + [b for _, b in pairs] + [model.head.bias.square().sum(), 0 * model.head.bias.sum()]
    table = gradient_cosines(losses, model.named_parameters())
    flat = [
        torch.cat(
            [
                (torch.zeros_like(p) if g is None else g).flatten()
                for p, g in zip(
                    model.parameters(),
                    torch.autograd.grad(loss, list(model.parameters()), retain_graph=True, allow_unused=True),
                    strict=True,
                )
            ]
        )
        for loss in losses
    ]
    for i, row in enumerate(table):
        for j, cosine in enumerate(row):
            if 5 in (i, j):
                assert cosine is None
            else:
                expected = float(F.cosine_similarity(flat[i], flat[j], dim=0, eps=0.0))
                assert cosine == pytest.approx(expected, abs=1e-12)
                assert cosine == table[j][i]
    assert -0.99 < table[0][1] < 0.999
    assert 0 < abs(table[0][4]) < 1


@pytest.mark.parametrize(
    ("losses", "parameters", "error", "message"),
    [
        (lambda w: (w.sum(), w), lambda w: [w], ValueError, r"loss_b must be one number.*shape \(2,\)"),
        (lambda w: (w.detach().sum(), w.sum()), lambda w: [w], ValueError, "loss_a .*requires_grad=False"),
        (lambda w: (1.0, w.sum()), lambda w: [w], TypeError, "loss_a must be a tensor, found float"),
        (lambda w: (w.sum(), w.sum()), lambda w: [w.detach()], ValueError, "parameters holds no tensor"),
        (lambda w: (w.sum(), w.sum()), lambda w: [], ValueError, r"pass model.parameters\(\)"),
    ],
)
def test_refused(
    losses: Callable[[Tensor], Any], parameters: Callable[[Tensor], Any], error: type[Exception], message: str
) -> None:
    w = torch.ones(2, requires_grad=True)
    with pytest.raises(error, match=message):
        gradient_alignment(*losses(w), parameters(w))
    with pytest.raises(error, match=message.replace("loss_a", r"losses\[0\]").replace("loss_b", r"losses\[1\]")):
        gradient_cosines(losses(w), parameters(w))


# At the taps


def aligned(
    case: Case, phase: str, dtype: torch.dtype = torch.float64, batches: int = 1, scale: float = 1.0, **parts: Any
) -> tuple[Alignment | None, list[tuple[float, float, float]]]:
    """What a step reports, and what two passes in float64 give."""
    model, inputs = case.model(dtype), case.inputs(dtype)
    optimizer = wrapped(model, case.layers, phase=phase, objective={"weight": WEIGHT}, **parts)
    for _ in range(batches):
        optimizer.backward(case.loss(model, inputs), scale=scale)
    optimizer.step()
    assert optimizer.metrics is not None
    weight = WEIGHT if phase == "compression" else 0.0
    inputs = {key: value.double() if value.is_floating_point() else value for key, value in inputs.items()}
    sums = activation_sums(case, case.model(torch.float64), [inputs] * batches, weight, scale)
    return optimizer.metrics.alignment, sums


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["32", "64"])
@PHASES
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_activation_alignment_equals_two_passes(case: Case, phase: str, dtype: torch.dtype) -> None:
    assert_activation_alignment(*aligned(case, phase, dtype), 1e-5 if dtype == torch.float32 else PROBE)


@PHASES
@pytest.mark.parametrize("name", ["gpt2 masked", "tied"])
def test_activation_alignment_adds_up_over_micro_batches(name: str, phase: str) -> None:
    assert_activation_alignment(*aligned(CASES[name], phase, batches=3, scale=1 / 3), PROBE)


@PHASES
def test_activation_alignment_under_a_gradient_scaler(phase: str) -> None:
    case = CASES["sequence mlp"]
    model, inputs = case.model(), case.inputs()
    optimizer = wrapped(model, case.layers, phase=phase, objective={"weight": WEIGHT})
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**14)
    scaler.scale(optimizer.objective(case.loss(model, inputs))).backward()
    scaler.unscale_(optimizer)
    scaler.step(optimizer)
    assert optimizer.metrics is not None
    weight = WEIGHT if phase == "compression" else 0.0
    sums = activation_sums(case, case.model(torch.float64), [case.inputs(torch.float64)], weight, 2.0**14)
    assert_activation_alignment(optimizer.metrics.alignment, sums, 1e-5)


@PHASES
@pytest.mark.parametrize("name", ["sequence mlp", "gpt2"])
def test_activation_alignment_under_autocast(name: str, phase: str) -> None:
    """Hidden tensors of 8 bits: both ways round, and the statistics of what is there are taken in float32."""
    case = CASES[name]

    def loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return case.loss(model, batch)

    model = case.model()
    optimizer = wrapped(model, case.layers, phase=phase, objective={"weight": WEIGHT})
    optimizer.backward(loss(model, case.inputs()))
    optimizer.step()
    assert optimizer.metrics is not None
    exact = activation_sums(
        case, case.model(torch.float64), [case.inputs(torch.float64)], WEIGHT if phase == "compression" else 0.0
    )
    found = optimizer.metrics.alignment
    assert found is not None
    gd, gg, dd = (sum(column) for column in zip(*exact, strict=True))
    assert_angle(found, (gd / len(exact), gg, dd / len(exact) ** 2), 0.03)


class Checkpointed(MLP):
    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False)
        return self.head(x)


class Frozen(MLP):
    """The first of three taps has nothing below it that learns."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks[0].requires_grad_(False)


@PHASES
@pytest.mark.parametrize("build", [Checkpointed, Frozen])
def test_activation_alignment_of_other_models(build: type[nn.Module], phase: str) -> None:
    case = replace(CASES["sequence mlp"], build=build)
    found, sums = aligned(case, phase)
    assert_activation_alignment(found, sums, PROBE)
    assert found is not None
    assert (found.layers["blocks.0"].cosine is None) == (build is Frozen)


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
@pytest.mark.parametrize(
    ("case", "phase"),
    [
        (replace(CASES["sequence mlp"], build=lambda: MLP(depth=2)), "memorization"),
        (replace(CASES["sequence mlp"], build=lambda: MLP(depth=2)), "compression"),
        (COMPILED["gpt2 masked"], "compression"),
    ],
    ids=["mlp-memorization", "mlp-compression", "gpt2-compression"],
)
def test_activation_alignment_compiled(case: Case, phase: str) -> None:
    torch._dynamo.reset()
    model, inputs = case.model(), case.inputs()
    optimizer = wrapped(model, case.layers, phase=phase, objective={"weight": WEIGHT})
    optimizer.backward(case.loss(torch.compile(model, backend="aot_eager"), inputs))
    optimizer.step()
    assert optimizer.metrics is not None
    weight = WEIGHT if phase == "compression" else 0.0
    sums = activation_sums(case, case.model(torch.float64), [case.inputs(torch.float64)], weight)
    assert_activation_alignment(optimizer.metrics.alignment, sums, 1e-5)
    torch._dynamo.reset()


@pytest.mark.parametrize("objective", [{"direction": "up"}, {"target": 1.9}])
def test_activation_alignment_of_the_last_layer_knows_no_objective(objective: dict[str, Any]) -> None:
    """It is measured before the two are joined; at the last layer nothing but the loss arrives."""
    case = CASES["sequence mlp"]
    model = case.model(torch.float64)
    optimizer = wrapped(model, case.layers, objective={"weight": WEIGHT, **objective})
    optimizer.backward(case.loss(model, case.inputs(torch.float64)))
    optimizer.step()
    assert optimizer.metrics is not None
    assert optimizer.metrics.alignment is not None
    sums = activation_sums(case, case.model(torch.float64), [case.inputs(torch.float64)], 0.0)
    assert_angle(optimizer.metrics.alignment.layers[optimizer.hook.names[-1]], sums[-1], PROBE)


def test_no_activation_alignment() -> None:
    """Where it is off, and where no gradient arrives at all."""
    case = CASES["sequence mlp"]
    model = case.model()
    optimizer = wrapped(model, case.layers, activation=False)
    optimizer.backward(case.loss(model, case.inputs()))
    optimizer.step()
    assert optimizer.metrics is not None
    assert optimizer.metrics.alignment is None
    optimizer.hook.remove()
    optimizer = wrapped(model, case.layers)
    optimizer.objective(case.loss(model, case.inputs()))
    optimizer.step()
    assert optimizer.metrics is not None
    assert optimizer.metrics.alignment is None
