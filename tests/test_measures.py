"""What can hide in an entropy, as steps and measurements report it: equal to the slow twin, whatever is pressed."""

from __future__ import annotations

import statistics
from dataclasses import astuple

import pytest
import torch
from torch import Tensor, nn

from gapt_optim import Measures, RepresentationHook
from gapt_optim.kernels import LINEAR, KernelMatrix, measures_of_gram
from tests.models import CASES, COMPILED, Case
from tests.reference import KERNELS, reference_layer_measures
from tests.training import gradients, recorded, wrapped

cases = pytest.mark.parametrize("case", CASES.values(), ids=CASES)
kernels = pytest.mark.parametrize(("kernel", "center"), KERNELS.values(), ids=KERNELS)
PHASES = pytest.mark.parametrize("phase", ["memorization", "compression"])


def micro_batches(inputs: dict[str, Tensor], count: int) -> list[dict[str, Tensor]]:
    """Of different content."""
    rolled = lambda i, t: t.roll(i, 0) * (1 + i if t.is_floating_point() else 1)  # noqa: E731
    return [{key: rolled(i, value) for key, value in inputs.items()} for i in range(count)]


def expected_measures(
    calls: list[list[Tensor]], masks: list[Tensor | None], window: int | None
) -> list[tuple[float, ...]]:
    """Per layer, means over its calls, of which each micro-batch makes equally many."""
    found = []
    for of_layer in calls:
        each = len(of_layer) // len(masks)
        rows = [reference_layer_measures(h.detach(), window, masks[i // each]) for i, h in enumerate(of_layer)]
        found.append(tuple(statistics.fmean(column) for column in zip(*rows, strict=True)))
    return found


def assert_measures(found: dict[str, Measures], expected: list[tuple[float, ...]], tolerance: float = 1e-9) -> None:
    assert len(found) == len(expected)
    for (name, measures), values in zip(found.items(), expected, strict=True):
        assert astuple(measures) == pytest.approx(values, rel=tolerance, abs=tolerance), name


@PHASES
@pytest.mark.parametrize("window", [8, 5, 1000, None])
@cases
def test_measures_of_a_step_equal_the_reference(case: Case, window: int | None, phase: str) -> None:
    """With masks, short tails, more rows than features, several calls of a module and several micro-batches."""
    model, batches = case.model(torch.float64), micro_batches(case.inputs(torch.float64), 2)
    optimizer = wrapped(model, case.layers, phase=phase, entropy={"window": window})
    with recorded([model.get_submodule(name) for name in optimizer.hook.names]) as calls:
        for batch in batches:
            optimizer.backward(case.loss(model, batch), scale=1 / 2)
    optimizer.step()
    expected = expected_measures(calls, [batch.get("attention_mask") for batch in batches], window)
    assert_measures(optimizer.metrics.layer_measures, expected)
    assert optimizer.metrics.measures == Measures.mean(optimizer.metrics.layer_measures.values())


@kernels
@pytest.mark.parametrize("alpha", [0.5, 2.0, 3.0])
@pytest.mark.parametrize("name", ["sequence mlp", "gpt2 masked"])
def test_measures_do_not_depend_on_what_is_pressed(name: str, alpha: float, kernel: str, center: bool) -> None:
    case = CASES[name]
    model, inputs = case.model(torch.float64), case.inputs(torch.float64)
    entropy = {"kernel": kernel, "center": center, "alpha": alpha, "normalize": True}
    optimizer = wrapped(model, case.layers, entropy=entropy)
    with recorded([model.get_submodule(name) for name in optimizer.hook.names]) as calls:
        optimizer.backward(case.loss(model, inputs))
    optimizer.step()
    assert_measures(optimizer.metrics.layer_measures, expected_measures(calls, [inputs.get("attention_mask")], 8))


@kernels
@cases
def test_measurements_equal_the_reference(case: Case, kernel: str, center: bool) -> None:
    model, batches = case.model(torch.float64).eval(), micro_batches(case.inputs(torch.float64), 2)
    optimizer = wrapped(model, case.layers, entropy={"kernel": kernel, "center": center})
    modules = [model.get_submodule(name) for name in optimizer.hook.names]
    with torch.no_grad(), recorded(modules) as calls, optimizer.hook.measuring() as measured:
        for batch in batches:
            model(**batch)
    expected = expected_measures(calls, [batch.get("attention_mask") for batch in batches], 8)
    assert_measures(measured.measures, expected)
    assert measured.measures.keys() == measured.entropies.keys()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_measures_of_lower_precision_are_those_of_what_the_model_gave(dtype: torch.dtype) -> None:
    case = CASES["sequence mlp"]
    model, inputs = case.model(dtype), case.inputs(dtype)
    optimizer = wrapped(model, case.layers)
    with recorded([model.get_submodule(name) for name in optimizer.hook.names]) as calls:
        optimizer.backward(case.loss(model, inputs))
    optimizer.step()
    assert_measures(optimizer.metrics.layer_measures, expected_measures(calls, [None], 8), 1e-5)


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
@pytest.mark.parametrize("case", [CASES["sequence mlp"], COMPILED["gpt2 masked"]], ids=["mlp", "gpt2"])
def test_measures_of_a_compiled_model(case: Case) -> None:
    found: list[dict[str, Measures]] = []
    for compiling in (False, True):
        torch._dynamo.reset()
        model, inputs = case.model(torch.float64), case.inputs(torch.float64)
        optimizer = wrapped(model, case.layers)
        called = torch.compile(model, backend="aot_eager") if compiling else model
        optimizer.backward(case.loss(called, inputs))
        optimizer.step()
        found.append(optimizer.metrics.layer_measures)
    torch._dynamo.reset()
    assert_measures(found[1], [astuple(measures) for measures in found[0].values()])


def test_the_share_of_the_mean_is_none_to_all() -> None:
    """Where rows cancel each other, rounding leaves a sum on either side of zero."""
    z = torch.randn(500, 8, 9)
    rows = torch.cat([z - z.mean(1, keepdim=True), torch.randn(500, 1, 9).expand(-1, 8, -1)])
    gram = (rows @ rows.mT).permute(1, 2, 0)
    measures, live = measures_of_gram(gram, KernelMatrix(gram, LINEAR))
    share = measures[:, 3]
    assert share.min() >= 0
    assert share.max() <= 1
    torch.testing.assert_close(share, torch.tensor([0.0, 1.0]).repeat_interleave(500))
    assert (live == 8).all()


def test_tokens_of_zeros_do_not_count() -> None:
    """As little as masked ones, under every kernel."""
    x = torch.randn(2, 11, 20, dtype=torch.float64)
    zeroed = x.clone()
    zeroed[0, 3:5], zeroed[1, 8:] = 0, 0
    kept = torch.stack([(row != 0).any(-1) for row in zeroed])
    for width in (20, 4):
        found = []
        for data, mask in ((zeroed, None), (x, kept)):
            model = nn.Sequential(nn.Identity())
            hook = RepresentationHook(model, "0", mask=lambda keywords, mask=mask: mask)
            with hook.measuring() as measured:
                model(data[..., :width])
            found.append(astuple(measured.measures["0"]))
        assert found[0] == pytest.approx(found[1], rel=1e-12)


def test_a_window_without_a_token_has_no_part_in_a_mean() -> None:
    model, x = nn.Sequential(nn.Identity()), torch.randn(1, 24, 20, dtype=torch.float64)
    x[0, 8:16] = 0
    hook = RepresentationHook(model, "0")
    with hook.measuring() as measured:
        model(x)
    with hook.measuring() as without:
        model(torch.cat([x[:, :8], x[:, 16:]], dim=1))
    assert astuple(measured.measures["0"]) == pytest.approx(astuple(without.measures["0"]), rel=1e-12)
    assert measured.mean == pytest.approx(without.mean, rel=1e-12)


@pytest.mark.parametrize("width", [20, 4])
def test_an_overflow_is_no_compression(width: int) -> None:
    """What lies beyond the range of the squares is not finite, neither the entropy nor its measures."""
    model, x = nn.Sequential(nn.Identity()), torch.randn(1, 8, width) * 1e30
    hook = RepresentationHook(model, "0")
    with hook.measuring() as measured:
        model(x)
    assert not torch.tensor(measured.mean).isfinite()
    assert not torch.tensor(measured.measures["0"].centered_cosine_entropy).isfinite()
    assert not torch.tensor(measured.measures["0"].linear_entropy).isfinite()


@kernels
@pytest.mark.parametrize("width", [20, 4])
def test_a_layer_of_zeros_has_no_entropy_and_no_measures(width: int, kernel: str, center: bool) -> None:
    model = nn.Sequential(nn.Linear(width, width))
    nn.init.zeros_(model[0].weight)
    nn.init.zeros_(model[0].bias)
    optimizer = wrapped(model, "0", entropy={"kernel": kernel, "center": center})
    optimizer.backward(model(torch.randn(2, 8, width)).sum() * 0)
    optimizer.step()
    plain = kernel == "linear" and not center  # under all others, a row of zeros does not count
    assert optimizer.metrics.layer_entropy == ({"0": 0.0} if plain else {})
    assert optimizer.metrics.layer_measures == {}
    assert all((gradient == 0).all() for gradient in gradients(model).values())


def test_a_pass_that_began_before_measures_were_due_has_none() -> None:
    """Where rows outnumber features they are taken in the forward pass, and this one ran in the step before."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 3))
    optimizer = wrapped(model, "0", alignment={"every": 3})
    for step in (1, 2, 3):
        if step != 3:
            loss = model(torch.randn(64, 4)).square().mean()
        optimizer.objective(loss)
        if step == 2:
            loss = model(torch.randn(64, 4)).square().mean()
        optimizer.step()
        assert list(optimizer.metrics.layer_measures) == (["0"] if step == 1 else [])
        assert list(optimizer.metrics.layer_entropy) == ["0"]
