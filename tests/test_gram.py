"""Gradients through the taps: equal to autograd of loss + weight * entropy, however the model is run."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint, set_checkpoint_early_stop

from gapt_optim import (
    EntropyConfig,
    GAPTConfig,
    GAPTOptimizer,
    ObjectiveConfig,
    RepresentationHook,
    matrix_entropy,
)
from gapt_optim.entropy import Order, gram_with_gradient
from gapt_optim.kernels import LINEAR
from gapt_optim.windows import Windows
from tests.loops import assert_same
from tests.memory import Live
from tests.models import CASES, COMPILED, MLP, Block, Case, TiedLM, gpt2, masked_tokens, recompute_activations
from tests.reference import (
    KERNELS,
    REFERENCE_REDUCTIONS,
    reference_layer_entropy,
    reference_objective,
)
from tests.training import distance, gradients, recorded, wrapped

PRECISIONS = pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-10)], ids=["32", "64"]
)
cases = pytest.mark.parametrize("case", CASES.values(), ids=CASES)
PHASES = pytest.mark.parametrize("phase", ["memorization", "compression"])
kernels = pytest.mark.parametrize(("kernel", "center"), KERNELS.values(), ids=KERNELS)
WEIGHT = 3.0


def tapped_modules(model: nn.Module, optimizer: GAPTOptimizer) -> list[nn.Module]:
    return [model.get_submodule(name) for name in optimizer.hook.names]


def reference_gradients(case: Case, dtype: torch.dtype, **options: Any) -> dict[str, Tensor]:
    """Gradients by autograd through the slow twin; several calls of a module are averaged."""
    model, inputs = case.model(dtype), case.inputs(dtype)
    with recorded(list(model.get_submodule(case.layers.removesuffix(".*")))) as calls:
        loss = case.loss(model, inputs)
    if options.pop("plain", False):
        loss.backward()
        return gradients(model)
    mask = inputs.get("attention_mask")
    weight, reduce = options.pop("weight", WEIGHT), options.pop("reduce", REFERENCE_REDUCTIONS["mean"])
    entropies = [
        torch.stack([reference_layer_entropy(h, mask=mask, **options) for h in of_layer]).mean() for of_layer in calls
    ]
    (loss + weight * reduce(entropies)).backward()
    return gradients(model)


def tapped_gradients(case: Case, dtype: torch.dtype, weight: float = WEIGHT, **parts: Any) -> dict[str, Tensor]:
    model, inputs = case.model(dtype), case.inputs(dtype)
    parts.setdefault("objective", {"weight": weight})
    optimizer = wrapped(model, case.layers, **parts)
    optimizer.backward(case.loss(model, inputs))
    return gradients(model)


# Gradients


@PRECISIONS
@pytest.mark.parametrize("window", [8, 5, 3, 1000, None])
@cases
def test_gradient_equals_the_reference(case: Case, window: int | None, dtype: torch.dtype, tolerance: float) -> None:
    expected = reference_gradients(case, dtype, window=window)
    found = tapped_gradients(case, dtype, entropy={"window": window})
    assert distance(found, expected) < tolerance
    plain = reference_gradients(case, dtype, plain=True)
    assert distance(plain, expected) > 0.01  # the entropy matters here


@kernels
@pytest.mark.parametrize("window", [8, None])
@cases
def test_gradient_under_every_kernel(case: Case, window: int | None, kernel: str, center: bool) -> None:
    entropy = {"window": window, "kernel": kernel, "center": center}
    expected = reference_gradients(case, torch.float64, **entropy)
    assert distance(tapped_gradients(case, torch.float64, entropy=entropy), expected) < 1e-10


@kernels
@pytest.mark.parametrize("normalize", [False, True], ids=["nats", "normalized"])
@pytest.mark.parametrize("alpha", [0.5, 1.0, 1.5, 2.0, 2.5, 3.0, 9.0, math.inf])
@pytest.mark.parametrize("name", ["mlp", "cnn", "gpt2 masked"])
def test_gradient_of_every_order(name: str, alpha: float, normalize: bool, kernel: str, center: bool) -> None:
    entropy = {"window": 5, "alpha": alpha, "normalize": normalize, "kernel": kernel, "center": center}
    expected = reference_gradients(CASES[name], torch.float64, **entropy)
    assert distance(tapped_gradients(CASES[name], torch.float64, entropy=entropy), expected) < 1e-10


@pytest.mark.parametrize("reduce", REFERENCE_REDUCTIONS)
def test_gradient_of_every_reduction(reduce: str) -> None:
    case = CASES["deep"]
    expected = reference_gradients(case, torch.float64, reduce=REFERENCE_REDUCTIONS[reduce])
    assert distance(tapped_gradients(case, torch.float64, counting={"reduce": reduce}), expected) < 1e-10


def test_one_layer_after_the_other() -> None:
    case = CASES["deep"]
    model, inputs = case.model(torch.float64), case.inputs(torch.float64)
    optimizer = wrapped(model, case.layers, objective={"weight": WEIGHT}, counting={"schedule": "rotate"})
    for step in range(7):
        expected = reference_gradients(case, torch.float64, reduce=lambda s, step=step: s[step % 5])
        optimizer.zero_grad()
        optimizer.backward(case.loss(model, inputs))
        assert distance(gradients(model), expected) < 1e-10
        optimizer.step()


@pytest.mark.parametrize("reduce", ["mean", "largest_drop"])
def test_skipped_layers_are_read_and_not_pressed(reduce: str) -> None:
    case = CASES["deep"]
    model, inputs = case.model(torch.float64), case.inputs(torch.float64)
    counting = {"skip_first": 1, "skip_last": 2, "reduce": reduce}
    optimizer = wrapped(model, case.layers, objective={"weight": WEIGHT}, counting=counting)
    optimizer.backward(case.loss(model, inputs))
    twin = REFERENCE_REDUCTIONS[reduce]
    expected = reference_gradients(case, torch.float64, reduce=lambda s: twin(s[1:3]))
    assert distance(gradients(model), expected) < 1e-10
    optimizer.step()
    assert optimizer.metrics is not None
    assert list(optimizer.metrics.layer_entropy) == optimizer.hook.names


@pytest.mark.parametrize("direction", ["down", "up"])
@pytest.mark.parametrize("target", [None, 1, 3])
def test_gradient_to_a_target(direction: str, target: int | None) -> None:
    """A layer whose entropy is beyond the target is pressed no further; ``target`` of the five layers lie below it."""
    case = CASES["deep"]
    model, inputs = case.model(torch.float64), case.inputs(torch.float64)
    with recorded(list(model.blocks)) as calls:
        case.loss(model, inputs)
    sign = 1 if direction == "down" else -1
    place = math.inf * -sign
    if target is not None:
        place = sorted(float(reference_layer_entropy(h.detach())) for (h,) in calls)[target - 1] + 1e-4

    def pressed(entropies: list[Tensor]) -> Tensor:
        return sum((sign * s if target is None else (sign * (s - place)).clamp(min=0)) for s in entropies) / 5

    expected = reference_gradients(case, torch.float64, reduce=pressed)
    objective = {"weight": WEIGHT, "direction": direction, "target": None if target is None else place}
    assert distance(tapped_gradients(case, torch.float64, objective=objective), expected) < 1e-10


@kernels
@pytest.mark.parametrize("direction", ["down", "up"])
def test_a_share_of_the_entropy_at_the_start_is_held(direction: str, kernel: str, center: bool) -> None:
    """Pressed from beyond it, a layer ends at its target."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 24), nn.Linear(24, 24))
    x = torch.randn(64, 3) @ torch.randn(3, 12) + 0.3 * torch.randn(64, 12)
    share = 0.8 if direction == "down" else 1.1
    settings = GAPTConfig.penalty(
        entropy=EntropyConfig(kernel=kernel, center=center),
        objective=ObjectiveConfig(weight=1.0, direction=direction, target_share=share, start=2),
    )
    optimizer = GAPTOptimizer(torch.optim.SGD(model.parameters(), lr=0.02), RepresentationHook(model, "0"), settings)
    seen = []
    for _ in range(500):
        optimizer.zero_grad()
        loss = 1e-2 * model(x).square().mean()
        optimizer.backward(loss)
        if len(seen) <= 2:  # nothing is pressed before the start, and the start measures
            found = gradients(model)
            optimizer.zero_grad()
            (1e-2 * model(x).square().mean()).backward()
            assert distance(found, gradients(model)) < 1e-6
        optimizer.step()
        assert optimizer.metrics is not None
        seen.append(optimizer.metrics.layer_entropy["0"])
    assert seen[-1] == pytest.approx(share * seen[2], rel=0.05)


@cases
def test_memorization_leaves_the_gradient_bit_for_bit(case: Case) -> None:
    plain = reference_gradients(case, torch.float32, plain=True)
    for activation in (False, True):
        found = tapped_gradients(case, torch.float32, phase="memorization", activation=activation)
        assert all(torch.equal(found[name], plain[name]) for name in plain)


@kernels
def test_objective_has_the_value_of_the_sum(kernel: str, center: bool) -> None:
    case = CASES["gpt2 masked"]
    model, inputs = case.model(torch.float64), case.inputs(torch.float64)
    entropy = {"kernel": kernel, "center": center}
    optimizer = wrapped(model, case.layers, objective={"weight": WEIGHT}, entropy=entropy)
    with recorded(tapped_modules(model, optimizer)) as calls:
        loss = case.loss(model, inputs)
    expected = reference_objective(loss, [h for (h,) in calls], WEIGHT, mask=inputs["attention_mask"], **entropy)
    torch.testing.assert_close(optimizer.objective(loss), expected, rtol=1e-12, atol=0)
    optimizer.discard_step()
    found = optimizer.objective(case.loss(model, inputs) / 4, scaled_by=1 / 4)
    torch.testing.assert_close(found, expected / 4, rtol=1e-12, atol=0)


@kernels
def test_scale_and_accumulation_reach_the_entropy(kernel: str, center: bool) -> None:
    case = CASES["sequence mlp"]
    model, inputs = case.model(torch.float64), case.inputs(torch.float64)
    entropy = {"kernel": kernel, "center": center}
    optimizer = wrapped(model, case.layers, objective={"weight": WEIGHT}, entropy=entropy)
    for _ in range(3):
        optimizer.backward(case.loss(model, inputs), scale=1024 / 3)
    expected = reference_gradients(case, torch.float64, **entropy)
    assert distance(gradients(model), {name: gradient * 1024 for name, gradient in expected.items()}) < 1e-10
    optimizer.zero_grad()
    optimizer.backward(case.loss(model, inputs) / 4, scaled_by=1 / 4)
    assert distance(gradients(model), {name: gradient / 4 for name, gradient in expected.items()}) < 1e-10


@kernels
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_close(dtype: torch.dtype, kernel: str, center: bool) -> None:
    case = CASES["sequence mlp"]
    entropy = {"kernel": kernel, "center": center}
    exact = reference_gradients(case, torch.float32, **entropy)
    found = tapped_gradients(case, dtype, entropy=entropy)
    assert distance({name: gradient.float() for name, gradient in found.items()}, exact) < 0.03


def test_autocast_takes_the_entropy_of_what_the_model_gave() -> None:
    """Under autocast a block returns bfloat16; the entropy of exactly that is computed in float32."""
    model, x = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 4)), torch.randn(4, 8, 6)
    optimizer = wrapped(model, "0")
    with recorded([model[0]]) as calls, torch.autocast("cpu", torch.bfloat16):
        loss = model(x).float().square().mean()
        optimizer.backward(loss)
    optimizer.step()
    ((h,),) = calls
    assert h.dtype == torch.bfloat16
    assert optimizer.metrics is not None
    assert optimizer.metrics.entropy == pytest.approx(float(matrix_entropy(h.detach().float()).mean()), rel=1e-6)


def test_frozen_lower_layers_are_read_and_the_rest_is_pressed() -> None:
    case = CASES["sequence mlp"]

    def freeze(model: nn.Module) -> nn.Module:
        model.blocks[:2].requires_grad_(False)
        return model

    frozen = Case(lambda: freeze(case.build()), case.layers, case.batch, case.classes)
    assert distance(tapped_gradients(frozen, torch.float64), reference_gradients(frozen, torch.float64)) < 1e-10


@pytest.mark.parametrize("infinity", [math.inf, -math.inf, math.nan])
def test_an_entropy_gradient_that_is_not_finite_is_left_out(infinity: float) -> None:
    h = torch.tensor([[[1.0, 2.0], [3.0, 4.0]]], requires_grad=True)
    gram, _ = gram_with_gradient(h, Windows(2), Order(2.0, LINEAR), "layer")
    (found,) = torch.autograd.grad(gram, h, torch.tensor([[[infinity, 0.0], [0.0, 0.5]]]))
    assert found.tolist() == [[[0.0, 0.0], [3.0, 4.0]]]


def test_an_overflowing_layer_leaves_the_gradient_of_the_loss() -> None:
    """Its entropy is not finite, and must not put nan into the weights below it."""

    class Overflowing(MLP):
        def forward(self, x: Tensor) -> Tensor:
            hidden = self.blocks[1](self.blocks[0](x) * 1e30) * 1e-30
            return self.head(self.blocks[2](hidden))

    model, x = Overflowing(), torch.randn(9, 6)
    model(x).square().mean().backward()
    expected = gradients(model)
    model.zero_grad()
    optimizer = wrapped(model, "blocks.*")
    optimizer.backward(model(x).square().mean())
    found = gradients(model)
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    optimizer.step()
    assert optimizer.metrics is not None
    assert not math.isfinite(optimizer.metrics.layer_entropy["blocks.1"])
    assert optimizer.metrics.nonfinite_steps == 1
    loss = model(x).square().mean()
    assert optimizer.objective(loss) == loss


# Memory


def saved_by(run: Callable[[], Any]) -> list[Tensor]:
    saved: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        run()
    return saved


@cases
def test_memorization_without_alignment_saves_nothing(case: Case) -> None:
    model, inputs = case.model(), case.inputs()
    bare = len(saved_by(lambda: case.loss(model, inputs)))
    optimizer = wrapped(model, case.layers, phase="memorization", activation=False)
    assert len(saved_by(lambda: optimizer.objective(case.loss(model, inputs)))) == bare


@pytest.mark.parametrize("parts", [{"phase": "compression"}, {"phase": "memorization", "activation": True}], ids=str)
def test_taps_save_the_hidden_tensor_itself_and_small_matrices(parts: dict[str, Any]) -> None:
    model, x = MLP(width=16), torch.randn(4, 40, 16)
    bare = saved_by(lambda: model(x))
    optimizer = wrapped(model, "blocks.*", **parts)
    with recorded(tapped_modules(model, optimizer)) as calls:
        tapped = saved_by(lambda: optimizer.objective(model(x).square().mean()))
    storages = {h.untyped_storage().data_ptr() for of_layer in calls for h in of_layer}
    matrices = [tensor for tensor in tapped if tensor.shape[-2:] == (8, 8) or tensor.numel() <= 3 * 2]
    others = [tensor for tensor in tapped if not any(tensor is matrix for matrix in matrices)]
    held = {tensor.untyped_storage().data_ptr() for tensor in others}
    assert storages <= held
    allowed = storages | {tensor.untyped_storage().data_ptr() for tensor in bare}
    # What is new beside them is small: one 8 x 8 matrix for each of 20 windows, for each of 3 layers.
    assert sum(tensor.numel() for tensor in matrices) <= 3 * 20 * 64 + 64
    assert len(held - allowed) <= len({tensor.untyped_storage().data_ptr() for tensor in bare})


def kept(case: Case, dtype: torch.dtype, **parts: Any) -> tuple[int, int]:
    """Bytes that the wrapper adds to what the model keeps: after the forward pass, and after the objective."""
    found = []
    for wrap in (False, True):
        model, inputs = case.model(dtype), case.inputs(dtype)
        optimizer = wrapped(model, case.layers, **parts) if wrap else None
        with Live() as live:
            loss = case.loss(model, inputs)
            forward = live.now()
            total = loss if optimizer is None else optimizer.objective(loss)
            found.append((forward, live.now()))
            del total
    (bare_forward, bare), (forward, objective) = found
    return forward - bare_forward, objective - bare


def rows(*shape: int) -> Callable[[], dict[str, Tensor]]:
    return lambda: {"x": torch.randn(shape)}


# Batch, sequence, width, and the window.
SHAPES = {
    "wide": ((4, 32, 48), 8),
    "long": ((2, 64, 16), 16),
    "short tail": ((3, 30, 48), 8),
    "narrow": ((8, 32, 6), 16),
    "whole sequences": ((2, 24, 48), None),
}


@kernels
@pytest.mark.parametrize(
    ("dtype", "depth"), [(torch.float32, 2), (torch.float32, 5), (torch.bfloat16, 2), (torch.float64, 2)], ids=str
)
@pytest.mark.parametrize(
    ("phase", "activation"), [("memorization", False), ("memorization", True), ("compression", False)]
)
@pytest.mark.parametrize(("shape", "window"), SHAPES.values(), ids=SHAPES)
def test_bytes_kept_per_layer(
    shape: tuple[int, int, int],
    window: int | None,
    depth: int,
    phase: str,
    activation: bool,
    dtype: torch.dtype,
    kernel: str,
    center: bool,
) -> None:
    """Gram matrices until the objective, factors of their size from there to the backward, and no activation.

    Beside them, until the objective: the rows that count in each window, where these matrices do not tell, and five
    numbers for each window whose rows outnumber its features.
    """
    batch, length, width = shape
    window = length if window is None else window
    windows = batch * math.ceil(length / window)
    number = 8 if dtype is torch.float64 else 4
    matrices = windows * min(window, width) ** 2 * number
    plain = kernel == "linear" and not center
    counts = 8 * windows if (length % window if plain else window > width) else 0
    measures = 5 * number * windows if window > width and activation else 0
    case = Case(lambda: MLP(width, depth), "blocks.*", rows(*shape), 4)
    entropy = {"window": None if window == length else window, "kernel": kernel, "center": center}
    forward, objective = kept(case, dtype, phase=phase, activation=activation, entropy=entropy)
    few = 96 * depth + 96  # numbers per layer, and per step
    assert 0 <= forward - depth * (matrices + counts + measures) <= few
    nothing_flows = phase == "memorization" and not activation
    assert 0 <= objective - depth * (0 if nothing_flows else matrices) <= few
    assert few < matrices


def test_bytes_kept_per_masked_layer() -> None:
    """One mask, and the places of rows in windows, which all layers share, beside the matrices."""
    windows, tokens, layers = 4 * 2, 4 * 13 + 4 * 2 * 8 * 9, 2
    forward, objective = kept(CASES["gpt2 masked"], torch.float32, phase="compression")
    assert 0 <= forward - layers * windows * 4 * 8**2 - tokens <= 96 * layers
    assert 0 <= objective - layers * windows * 4 * 8**2 - tokens <= 96 * layers


@kernels
@PHASES
def test_bytes_while_the_objective_is_built(phase: str, kernel: str, center: bool) -> None:
    """About eight times the Gram matrices that are kept already, on a step that takes measures."""
    depth, matrices = 5, 4 * 4 * (32 // 8) * 8**2
    model, x = MLP(48, depth), torch.randn(4, 32, 48)
    entropy = {"kernel": kernel, "center": center}
    optimizer = wrapped(model, "blocks.*", phase=phase, activation=True, entropy=entropy)
    with Live() as live:
        loss = model(x).square().mean()
        before, live.peak = live.now(), 0
        optimizer.objective(loss)
    assert depth * matrices < live.peak - before < 8.6 * depth * matrices


# In-place operations


class Inplace(nn.Module):
    def __init__(self, operation: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.first, self.second = Block(6), Block(6)
        self.operation = operation

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        self.operation(h)
        return self.second(h)


INPLACE = {"relu_": torch.relu_, "add_": lambda h: h.add_(1), "a part": lambda h: h[:, 0].zero_()}


@pytest.mark.parametrize("activation", [False, True])
@pytest.mark.parametrize("operation", INPLACE.values(), ids=INPLACE)
def test_an_inplace_operation_behind_a_watched_output(operation: Callable[[Tensor], Any], activation: bool) -> None:
    """In memorization it does not matter, but for the angle there. Compression refuses it, and names the module."""
    x, found = torch.randn(4, 6), []
    for bare in (True, False):
        torch.manual_seed(0)
        model = Inplace(operation)
        if bare:
            model(x).square().mean().backward()
        else:
            optimizer = wrapped(model, ["first", "second"], phase="memorization", activation=activation)
            optimizer.backward(model(x).square().mean())
            optimizer.step()
            assert list(optimizer.metrics.layer_entropy) == ["first", "second"]
            assert (optimizer.metrics.alignment is not None) == activation
            if activation:
                assert optimizer.metrics.alignment.layers["first"].cosine is None
                assert optimizer.metrics.alignment.layers["second"].cosine is not None
        found.append(gradients(model))
    assert_same(*found)
    optimizer = wrapped(model, ["first", "second"], activation=activation)
    with pytest.raises(RuntimeError, match=r'output of module "first" was changed in place.*inplace=False'):
        optimizer.backward(model(x).square().mean())


# Activation checkpointing


def checkpointed_gpt2() -> nn.Module:
    model = gpt2()
    recompute_activations(model, {"use_reentrant": False})
    return model


def recomputing_mlp() -> nn.Module:
    return MLP(use_reentrant=False)


def recomputing_lm() -> nn.Module:
    return TiedLM(use_reentrant=False)


@pytest.mark.parametrize("early_stop", [False, True], ids=["whole", "early stop"])
@pytest.mark.parametrize("micro_batches", [1, 2])
@pytest.mark.parametrize("activation", [False, True])
@PHASES
@pytest.mark.parametrize(
    ("plain", "recomputing"),
    [
        ("sequence mlp", recomputing_mlp),
        ("tied", recomputing_lm),
        ("tied masked", recomputing_lm),
        ("gpt2 masked", checkpointed_gpt2),
    ],
    ids=["mlp", "tied", "tied masked", "gpt2 masked"],
)
def test_recomputation_changes_nothing(
    plain: str, recomputing: Callable[[], nn.Module], phase: str, activation: bool, micro_batches: int, early_stop: bool
) -> None:
    case = CASES[plain]
    twin = Case(recomputing, case.layers, case.batch, case.classes)
    found = []
    for each in (case, twin):
        model, inputs = each.model(torch.float64), each.inputs(torch.float64)
        optimizer = wrapped(model, each.layers, phase=phase, activation=activation)
        for _ in range(2):  # steps
            optimizer.zero_grad()
            for _ in range(micro_batches):
                with set_checkpoint_early_stop(early_stop):
                    optimizer.backward(each.loss(model, inputs), scale=1 / micro_batches)
                assert not any(each.captures for each in optimizer.hook.watching.passes.all())
            optimizer.step()
        found.append((gradients(model), optimizer.metrics))
    (expected, before), (gradient, after) = found
    assert distance(gradient, expected) < 1e-12
    assert after.entropy == pytest.approx(before.entropy, rel=1e-12)
    assert (after.alignment is None) == (not activation)
    if activation:
        assert after.alignment.cosine == pytest.approx(before.alignment.cosine, rel=1e-6)


@kernels
@pytest.mark.parametrize(
    ("plain", "recomputing"),
    [("sequence mlp", recomputing_mlp), ("tied masked", recomputing_lm), ("gpt2 masked", checkpointed_gpt2)],
    ids=["mlp", "tied masked", "gpt2 masked"],
)
def test_recomputed_gradients_under_every_kernel(
    plain: str, recomputing: Callable[[], nn.Module], kernel: str, center: bool
) -> None:
    case, entropy = CASES[plain], {"kernel": kernel, "center": center}
    twin = Case(recomputing, case.layers, case.batch, case.classes)
    expected = reference_gradients(case, torch.float64, **entropy)
    assert distance(tapped_gradients(twin, torch.float64, entropy=entropy), expected) < 1e-10


def test_recomputing_the_whole_model_keeps_its_mask() -> None:
    case = CASES["gpt2 masked"]
    model, inputs = case.model(torch.float64), case.inputs(torch.float64)
    optimizer = wrapped(model, case.layers, objective={"weight": WEIGHT})

    def recomputed(**inputs: Tensor) -> Any:
        return checkpoint(lambda: model(**inputs).logits, use_reentrant=False)

    expected = reference_gradients(case, torch.float64)
    for _ in range(2):
        optimizer.zero_grad()
        optimizer.backward(case.loss(recomputed, inputs))
        assert distance(gradients(model), expected) < 1e-10
    optimizer.zero_grad()
    total = [optimizer.objective(case.loss(recomputed, inputs)) for _ in range(2)]
    (sum(total) / 2).backward()
    assert distance(gradients(model), expected) < 1e-10


def test_a_pass_without_gradients_leaves_the_mask_of_the_one_before() -> None:
    """Of which a backward is still to come, and recomputes what the mask is of."""
    case, entropy = CASES["tied masked"], {"kernel": "linear", "center": False}
    model, inputs = replace(case, build=recomputing_lm).model(torch.float64), case.inputs(torch.float64)
    optimizer = wrapped(model, case.layers, objective={"weight": WEIGHT}, entropy=entropy)
    loss = case.loss(model, inputs)
    with torch.no_grad():
        model(**(inputs | {"attention_mask": torch.ones_like(inputs["attention_mask"])}))
    optimizer.backward(loss)
    assert distance(gradients(model), reference_gradients(case, torch.float64, **entropy)) < 1e-10


def test_recomputing_two_masked_batches_at_once() -> None:
    """A recomputed block is known by its input, and so is the mask that it had."""
    case = CASES["tied masked"]
    model, twin, batch = recomputing_lm().double(), TiedLM().double(), masked_tokens()
    twin.load_state_dict(model.state_dict())
    other = {"input_ids": batch["input_ids"] + 1, "attention_mask": batch["attention_mask"].flip(0)}
    other["input_ids"] %= 31
    for net, together in ((model, True), (twin, False)):
        optimizer = wrapped(net, case.layers)
        losses = [optimizer.objective(case.loss(net, each)) for each in ((batch, other) if together else ())]
        for each in () if together else (batch, other):
            optimizer.backward(case.loss(net, each))
        if together:
            sum(losses).backward()
    assert distance(gradients(model), gradients(twin)) < 1e-10


@PHASES
def test_reentrant_checkpointing_is_refused_with_advice(phase: str) -> None:
    model = MLP(use_reentrant=True)
    optimizer = wrapped(model, "blocks.*", phase=phase)
    for _ in range(2):
        loss = model(torch.randn(4, 6, requires_grad=True)).square().mean()
        if phase == "compression":
            with pytest.raises(RuntimeError, match=r'"blocks.0".*use_reentrant=False'):
                optimizer.backward(loss)
        else:
            with pytest.warns(UserWarning, match=r'"blocks.0".*use_reentrant=False'):
                optimizer.backward(loss)
            assert all(p.grad is not None for p in model.parameters())
            return


def test_reentrant_checkpointing_turned_on_later_is_refused_too() -> None:
    model = recomputing_mlp()
    optimizer = wrapped(model, "blocks.*")
    x = torch.randn(4, 6, requires_grad=True)
    optimizer.backward(model(x).square().mean())
    optimizer.step()
    model.checkpointing["use_reentrant"] = True
    with pytest.raises(RuntimeError, match=r'"blocks.0".*use_reentrant=False'):
        optimizer.backward(model(x).square().mean())


@pytest.mark.parametrize("use_reentrant", [False, True])
@PHASES
def test_a_backward_past_the_wrapper_is_left_alone(phase: str, use_reentrant: bool) -> None:
    """Of who calls loss.backward(): a recomputed block passes on what it gets, whether its call is known or not."""
    model, x = MLP(use_reentrant=use_reentrant), torch.randn(4, 6, requires_grad=True)
    model(x).square().mean().backward()
    expected = gradients(model)
    model.zero_grad()
    optimizer = wrapped(model, "blocks.*", phase=phase)
    loss = model(x).square().mean()
    optimizer.discard_step()
    loss.backward()
    assert_same(gradients(model), expected)


# Alignment statistics


def reference_statistics(
    model: nn.Module, modules: list[nn.Module], batches: list[Any], loss_of: Callable[[Any], Tensor], scale: float
) -> list[tuple[float, float, float]]:
    """<g,d>, |g|² and |d|² per layer from two passes: autograd of the loss, as it is scaled, and of the layer's entropy
    over the step.
    """
    sums = [[0.0, 0.0, 0.0] for _ in modules]
    for batch in batches:
        with recorded(modules) as calls:
            loss = loss_of(batch)
        for i, of_layer in enumerate(calls):
            arriving = torch.autograd.grad(loss * scale, of_layer, retain_graph=True)
            for h, g in zip(of_layer, arriving, strict=True):
                leaf = h.detach().double().requires_grad_()
                entropy = reference_layer_entropy(leaf) / len(of_layer) / len(batches)
                d = torch.autograd.grad(entropy, leaf)[0]
                g = g.double()
                for j, value in enumerate(((g * d).sum(), g.square().sum(), d.square().sum())):
                    sums[i][j] += float(value)
    return [(gd, gg, dd) for gd, gg, dd in sums]


def statistics_of(optimizer: GAPTOptimizer) -> list[tuple[float, float, float]]:
    assert optimizer.metrics is not None
    assert optimizer.metrics.alignment is not None
    angles = [optimizer.metrics.alignment.layers[name] for name in optimizer.hook.names]
    return [(a.cosine * a.loss_norm * a.entropy_norm, a.loss_norm**2, a.entropy_norm**2) for a in angles]


@pytest.mark.parametrize(
    ("name", "micro_batches", "scale"),
    [
        ("sequence mlp", 1, 1.0),
        ("sequence mlp", 3, 1 / 3),
        ("mlp", 1, 2.0**16),
        ("cnn", 2, 2.0**-10),
        ("gpt2", 1, 1.0),
        ("tied", 2, 0.5),
    ],
)
def test_statistics_equal_two_passes(name: str, micro_batches: int, scale: float) -> None:
    case = CASES[name]
    model = case.model()
    batches = [case.inputs()]
    while len(batches) < micro_batches:
        batches.append({key: value.flip(0) for key, value in batches[-1].items()})
    optimizer = wrapped(model, case.layers, phase="memorization")
    for batch in batches:
        optimizer.backward(case.loss(model, batch), scale=scale)
    optimizer.step()
    found = statistics_of(optimizer)
    modules = tapped_modules(model, optimizer)
    optimizer.hook.remove()
    expected = reference_statistics(model, modules, batches, lambda batch: case.loss(model, batch), scale)
    for (gd, gg, dd), (expected_gd, expected_gg, expected_dd) in zip(found, expected, strict=True):
        assert gg == pytest.approx(expected_gg, rel=1e-5)
        assert dd == pytest.approx(expected_dd, rel=1e-5)
        assert gd == pytest.approx(expected_gd, abs=1e-5 * math.sqrt(expected_gg * expected_dd))


def test_statistics_start_anew_at_each_step() -> None:
    case = CASES["sequence mlp"]
    model, inputs = case.model(), case.inputs()
    optimizer = wrapped(model, case.layers, phase="memorization")
    seen = []
    for _ in range(3):
        optimizer.backward(case.loss(model, inputs))
        optimizer.step()
        seen.append(statistics_of(optimizer))
    assert seen[0] == seen[1] == seen[2]


def test_a_backward_of_another_loss_adds_nothing_to_the_statistics() -> None:
    case = CASES["sequence mlp"]
    model, inputs = case.model(), case.inputs()
    optimizer = wrapped(model, case.layers, phase="memorization")
    seen = []
    for other in (False, True):
        loss = case.loss(model, inputs)
        if other:
            (loss * 7).backward(retain_graph=True)
        optimizer.backward(loss)
        optimizer.step()
        seen.append(statistics_of(optimizer))
    assert seen[0] == seen[1]


# torch.compile

_IN_TORCH = [  # what torch's compiler does to any autograd.Function, and to any hook of the compiled module itself
    "ignore:.*should not be instantiated:DeprecationWarning",
    "ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning",
]


def compiling(test: Any) -> Any:
    for ignored in _IN_TORCH:
        test = pytest.mark.filterwarnings(ignored)(test)
    return test


@pytest.fixture
def counters() -> Iterator[Any]:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield torch._dynamo.utils.counters
    torch._dynamo.reset()


def compilations(counters: Any) -> int:
    return int(counters["stats"]["unique_graphs"])


# Every kernel where it has a gradient, and every model under half of the kernels in each phase.
COMPILING = [("sequence mlp", "compression", kernel) for kernel in KERNELS] + [
    (name, phase, kernel)
    for name, kernels in {"cnn": ("linear", "centered cosine"), "gpt2 masked": ("cosine", "centered linear")}.items()
    for phase, kernel in zip(("memorization", "compression"), kernels, strict=True)
]


@compiling
@pytest.mark.parametrize(("name", "phase", "kernel"), COMPILING)
def test_compiled_gradients_are_equal(name: str, phase: str, kernel: str, counters: Any) -> None:
    case, entropy = COMPILED[name], dict(zip(("kernel", "center"), KERNELS[kernel], strict=True))
    expected = tapped_gradients(case, torch.float32, phase=phase, entropy=entropy)
    model, inputs = case.model(), case.inputs()
    optimizer = wrapped(model, case.layers, phase=phase, objective={"weight": WEIGHT}, entropy=entropy)
    compiled = torch.compile(model, backend="aot_eager")
    optimizer.backward(case.loss(compiled, inputs))
    assert distance(gradients(model), expected) < 1e-5
    assert not counters["graph_break"]
    optimizer.step()
    assert optimizer.metrics is not None
    assert optimizer.metrics.alignment is not None


@compiling
def test_one_compilation_per_phase_and_none_per_step(counters: Any) -> None:
    case = COMPILED["sequence mlp"]
    model, inputs = case.model(), case.inputs()
    compiled = torch.compile(model, backend="aot_eager")
    optimizer = switching(model, case.layers)
    graphs = {}
    for _ in range(16):
        phase = optimizer.phase
        optimizer.backward(case.loss(compiled, inputs))
        optimizer.step()
        optimizer.zero_grad()
        graphs.setdefault(phase, compilations(counters))
    assert optimizer.metrics is not None
    assert optimizer.metrics.switches >= 3
    assert compilations(counters) == max(graphs.values()) <= 2
    assert not counters["graph_break"]


def switching(model: nn.Module, layers: str) -> GAPTOptimizer:
    """Changes its phase every few steps."""
    from gapt_optim import GAPTConfig, GateConfig, RepresentationHook

    gate = GateConfig(patience_memorization=2, patience_compression=2)
    return GAPTOptimizer(
        torch.optim.SGD(model.parameters(), lr=0.0), RepresentationHook(model, layers), GAPTConfig(gate=gate)
    )


@compiling
def test_compiled_with_changing_lengths(counters: Any) -> None:
    case = Case(lambda: MLP(depth=1), "blocks.*", dict, 4)
    model, twin = case.model(), case.model()
    optimizer, plain = (wrapped(each, case.layers) for each in (model, twin))
    compiled = torch.compile(model, backend="aot_eager")
    counts = []
    for length in (16, 13, 21, 9, 30, 24, 11, 26):
        inputs = {"x": torch.randn(2, length, 6)}
        optimizer.backward(case.loss(compiled, inputs))
        plain.backward(case.loss(twin, inputs))
        assert distance(gradients(model), gradients(twin)) < 1e-5
        for each in (optimizer, plain):
            each.step()
            each.zero_grad()
        counts.append(compilations(counters))
    if not torch.__version__.startswith(("2.6.", "2.15.")):  # which compile anew for more of the lengths
        assert counts == [
            1,
            2,
            2,
            2,
            2,
            3,
            3,
            3,
        ]  # the first length, and all others with a short last window or without
    assert not counters["graph_break"]


@compiling
def test_compiled_wrappers_that_take_turns(counters: Any) -> None:
    """What one captured in the other's forward is spent, and no part of its own step."""
    case = COMPILED["sequence mlp"]
    model, inputs = case.model(), case.inputs()
    optimizers = [wrapped(model, case.layers, objective={"weight": weight}) for weight in (WEIGHT, 2 * WEIGHT)]
    compiled = torch.compile(model, backend="aot_eager")
    for _ in range(2):
        for i, optimizer in enumerate(optimizers):
            twin = case.model()
            alone = wrapped(twin, case.layers, objective={"weight": (i + 1) * WEIGHT})
            for each, called in ((optimizer, compiled), (alone, twin)):
                each.zero_grad()
                each.backward(case.loss(called, inputs))
                each.step()
            assert distance(gradients(model), gradients(twin)) < 1e-5
            for found, expected in zip(statistics_of(optimizer), statistics_of(alone), strict=True):
                assert found == pytest.approx(expected, rel=1e-4)


@compiling
@kernels
def test_compiled_with_recomputation(kernel: str, center: bool, counters: Any) -> None:
    case, entropy = CASES["sequence mlp"], {"kernel": kernel, "center": center}
    expected = tapped_gradients(case, torch.float32, entropy=entropy)
    twin = Case(recomputing_mlp, case.layers, case.batch, case.classes)
    model, inputs = twin.model(), twin.inputs()
    optimizer = wrapped(model, twin.layers, objective={"weight": WEIGHT}, entropy=entropy)
    optimizer.backward(twin.loss(torch.compile(model, backend="aot_eager"), inputs))
    assert distance(gradients(model), expected) < 1e-5
    assert not counters["graph_break"]
