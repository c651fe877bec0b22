"""Which layers a hook taps, what it reads from their outputs, and what it leaves alone."""

from __future__ import annotations

import copy
import gc
import io
import math
import pickle
import re
import weakref
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import asdict
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from gapt_optim import EntropyConfig, GAPTOptimizer, Measures, RepresentationHook
from gapt_optim.layout import Layout
from tests.models import CASES, CNN, MLP, WRAPS, Block, TiedLM, Wrapping, gpt2, masked_tokens, tokens
from tests.reference import KERNELS, reference_layer_entropy, reference_windows
from tests.training import distance, gradients, recorded, wrapped

PHASES = pytest.mark.parametrize("phase", ["memorization", "compression"])
ALIGNMENTS = pytest.mark.parametrize("activation", [False, True], ids=["unmeasured", "measured"])


def loss_of(model: nn.Module, x: Tensor) -> Tensor:
    output = model(x)
    return output.square().mean()


def entropies(optimizer: GAPTOptimizer) -> dict[str, float]:
    assert optimizer.metrics is not None
    return optimizer.metrics.layer_entropy


def captured(hook: RepresentationHook) -> int:
    return sum(len(each.captures) for each in hook.watching.passes.all())


# Which layers


class Nest(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.ModuleList(Block(4) for _ in range(3))
        self.decoder = nn.ModuleDict({"a[0]": Block(4), "b": nn.Sequential(Block(4), nn.Tanh())})

    def forward(self, x: Tensor) -> Tensor:
        for block in [*self.encoder, *self.decoder.values()]:
            x = block(x)
        return x


@pytest.mark.parametrize(
    ("layers", "names"),
    [
        ("encoder.*", ["encoder.0", "encoder.1", "encoder.2"]),
        ("encoder.[02]", ["encoder.0", "encoder.2"]),
        ("*.1", ["encoder.1"]),
        ("decoder.*.*", ["decoder.a[0].linear", "decoder.b.0", "decoder.b.1"]),
        ("decoder.b", ["decoder.b"]),
        ("decoder.a[0]", ["decoder.a[0]"]),
        ("", [""]),
        (["encoder.2", "encoder.0", "encoder.*"], ["encoder.0", "encoder.1", "encoder.2"]),
    ],
)
def test_names_and_globs(layers: Any, names: list[str]) -> None:
    assert RepresentationHook(Nest(), layers).names == names


@PHASES
def test_a_forward_pass_chooses_where_a_model_has_several_lists(phase: str) -> None:
    """From the second step on, the layers are judged and pressed."""
    model, x = Nest(), torch.randn(8, 4)
    optimizer = wrapped(model, None, phase=phase)
    assert optimizer.hook.names == []
    for step in range(3):
        optimizer.backward(loss_of(model, x))
        optimizer.step()
        assert optimizer.hook.names == ["encoder.0", "encoder.1", "encoder.2"]
        assert list(entropies(optimizer)) == (optimizer.hook.names if step else [])
    saved = optimizer.state_dict()
    other = Nest()
    again = wrapped(other, None, phase=phase)
    again.load_state_dict(saved)
    assert again.hook.names == optimizer.hook.names
    optimizer.hook.remove()
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_no_glob_means_the_model_as_a_whole() -> None:
    assert RepresentationHook(Nest(), "*").names == ["encoder", "decoder"]
    assert RepresentationHook(nn.Sequential(nn.Linear(2, 2), nn.Tanh()), "?").names == ["0", "1"]


def test_layers_that_are_one_module_have_one_tap() -> None:
    model, block = nn.Module(), Block(4)
    model.layers = nn.ModuleList([block, block, Block(4)])
    assert RepresentationHook(model).names == RepresentationHook(model, "layers.*").names == ["layers.0", "layers.2"]


def test_modules_and_mixed_lists() -> None:
    model = Nest()
    assert RepresentationHook(model, model.encoder[1]).names == ["encoder.1"]
    assert RepresentationHook(model, [model.decoder["b"], "encoder.0"]).names == ["encoder.0", "decoder.b"]
    assert RepresentationHook(model, (block for block in model.encoder)).names == [f"encoder.{i}" for i in range(3)]
    assert RepresentationHook(model.encoder[0], model.encoder[0]).names == [""]


def test_automatic_choice_of_a_transformer() -> None:
    assert RepresentationHook(gpt2(n_layer=3)).names == [f"transformer.h.{i}" for i in range(3)]
    assert RepresentationHook(MLP(depth=1)).names == ["blocks.0"]


class Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = (nn.ModuleList(Block(4) for _ in range(2)) for _ in range(2))


@pytest.mark.parametrize(
    ("model", "layers", "error", "message"),
    [
        (nn.Sequential(nn.Linear(2, 2)), None, ValueError, r'layers=None finds no blocks.*name layers: "0"'),
        (Nest(), "encoder", None, ""),
        (Nest(), "encoders.*", ValueError, r'"encoders\.\*" matches no module.*"encoder\.0"'),
        (Nest(), ["encoder.0", "nothing"], ValueError, '"nothing" matches no module'),
        (Nest(), "*", None, ""),
        (Nest(), [], ValueError, "layers is empty"),
        (Nest(), [3], TypeError, "found int"),
        (Nest(), 3, TypeError, "layers must be a glob, a name, a module, a list of these or None, found int"),
        (nn.Linear(2, 2), None, ValueError, r"it is a single module; .*pass it: RepresentationHook\(model, model\)"),
        (Nest(), nn.Tanh(), ValueError, "Tanh that is no module of the model"),
        (nn.DataParallel(Nest()), "encoder.*", ValueError, r'is wrapped, use "module\.encoder\.\*"'),
        (torch.compile(Nest(), backend="eager"), "encoder.*", ValueError, r'is wrapped, use "_orig_mod\.encoder\.\*"'),
        (torch.nn.Linear, None, TypeError, "model must be a torch.nn.Module"),
    ],
)
def test_errors_of_the_choice_say_what_to_pass(model: Any, layers: Any, error: Any, message: str) -> None:
    with pytest.raises(error, match=message) if error else nullcontext():
        RepresentationHook(model, layers)


# What is read from an output


@pytest.mark.parametrize("kind", WRAPS)
@PHASES
def test_outputs_of_every_kind(kind: str, phase: str) -> None:
    torch.manual_seed(1)
    plain = MLP()
    model = Wrapping(kind)
    model.load_state_dict(plain.state_dict())
    types = []
    x = torch.randn(3, 9, 6)
    expected = wrapped(plain, "blocks.*", phase=phase)
    expected.backward(loss_of(plain, x))
    optimizer = wrapped(model, "blocks.*", phase=phase, output=model.pick)
    model.blocks[0].register_forward_hook(lambda module, args, output: types.append(type(output)))
    optimizer.backward(loss_of(model, x))
    assert distance(gradients(model), gradients(plain)) < 1e-6
    assert types == [type(WRAPS[kind][0](x))]


class Returning(nn.Module):
    """A tapped layer whose output is what ``make`` says."""

    def __init__(self, make: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.linear, self.layer = nn.Linear(4, 4), nn.Identity()
        self.layer.forward = make

    def forward(self, x: Tensor) -> Tensor:
        x = self.linear(x)
        self.layer(x)
        return x


@pytest.mark.parametrize(
    ("make", "output", "error", "message"),
    [
        (lambda h: None, None, TypeError, r'"layer" returned NoneType.*pass output='),
        (lambda h: (None, h), None, TypeError, r'"layer" returned tuple.*pass output='),
        (lambda h: {"a": h, "b": h}, None, TypeError, r'"layer" returned dict.*pass output='),
        (lambda h: (), None, TypeError, r'"layer" returned tuple'),
        (lambda h: h.argmax(-1, keepdim=True), None, TypeError, r'"layer" returned.*int64.*Choose another'),
        (lambda h: h.sum((0, 1)), None, ValueError, r'"layer" returned.*\(4,\).*\(batch, seq, d\)'),
        (lambda h: h, lambda out: "x", TypeError, r'"layer" returned Tensor and output= gave str'),
    ],
)
@PHASES
def test_errors_of_an_output_name_the_module(
    make: Any, output: Any, error: type[Exception], message: str, phase: str
) -> None:
    model = Returning(make)
    optimizer = wrapped(model, "layer", phase=phase, output=output)
    with pytest.raises(error, match=message) if phase == "compression" else pytest.warns(UserWarning, match=message):
        loss = model(torch.randn(2, 5, 4)).sum()
    if phase == "memorization":  # trains on, and says no more
        optimizer.backward(loss)
        optimizer.step()
        assert optimizer.metrics.entropy is None
        assert optimizer.metrics.loss == pytest.approx(float(loss.detach()))


@PHASES
def test_a_view_of_an_output_may_be_picked(phase: str) -> None:
    """Though the loss uses the output itself."""
    found = []
    for pick in (None, lambda out: out.unflatten(-1, (2, 3)).flatten(-2)):
        model = MLP()
        optimizer = wrapped(model, "blocks.*", phase=phase, output=pick)
        torch.manual_seed(1)
        for parameter in model.parameters():
            nn.init.normal_(parameter)
        optimizer.backward(loss_of(model, torch.randn(3, 9, 6)))
        optimizer.step()
        found.append((entropies(optimizer), gradients(model)))
    assert found[0][0] == found[1][0]
    assert distance(found[1][1], found[0][1]) < 1e-6


LAYOUTS = {4: "batch channels height width", 5: "batch channels depth height width"}
"""By dimensions, what no module here tells."""


@pytest.mark.filterwarnings("ignore:layer .* can have no entropy:UserWarning")  # of the last shapes
@pytest.mark.parametrize("shape", [(11, 6), (3, 11, 6), (2, 6, 3, 5), (2, 6, 2, 3, 3), (1, 6), (2, 1, 6)])
@pytest.mark.parametrize("window", [4, None])
def test_shapes(shape: tuple[int, ...], window: int | None) -> None:
    model = nn.Sequential(nn.Tanh(), nn.PReLU())
    optimizer = wrapped(model, "0", entropy={"window": window}, layout=LAYOUTS.get(len(shape)))
    x = torch.randn(shape, requires_grad=True)
    optimizer.backward(loss_of(model, x))
    leaf = x.detach().requires_grad_()
    hidden = leaf.tanh()
    expected = reference_layer_entropy(hidden, window=window)
    (model[1](hidden).square().mean() + expected).backward()
    torch.testing.assert_close(x.grad, leaf.grad)
    optimizer.step()
    assert entropies(optimizer).get("0", 0.0) == pytest.approx(float(expected.detach()), abs=1e-5)


@pytest.mark.parametrize("kernel", ["linear", "cosine"])
@pytest.mark.parametrize("shape", [(0, 6), (0, 5, 6), (3, 0, 6), (0, 6, 2, 2)])
@PHASES
def test_an_empty_batch_has_no_entropy(shape: tuple[int, ...], phase: str, kernel: str) -> None:
    model = nn.Sequential(nn.Conv2d(6, 6, 1) if len(shape) == 4 else nn.Linear(6, 6))
    entropy = {"kernel": kernel, "center": kernel == "cosine"}
    optimizer = wrapped(model, "0", phase=phase, entropy=entropy)
    optimizer.backward(model(torch.randn(shape)).sum())
    optimizer.step()
    assert entropies(optimizer) == {}
    assert optimizer.metrics.entropy is None
    assert all((gradient == 0).all() for gradient in gradients(model).values())


# Masks


def test_attention_mask_is_found_by_keyword_and_by_position() -> None:
    model, batch = TiedLM(), masked_tokens()
    optimizer = wrapped(model, "blocks.*")
    found = []
    for args, kwargs in (((), batch), (tuple(batch.values()), {}), ((batch["input_ids"],), {})):
        optimizer.objective(model(*args, **kwargs).square().mean())
        optimizer.step()
        found.append(entropies(optimizer))
    assert found[0] == found[1]
    assert found[0] != found[2]


class Task(nn.Module):
    """Holds a model, as a LightningModule does; its own call has no attention_mask, and may not even happen."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        return self.training_step(batch)

    def training_step(self, batch: dict[str, Tensor]) -> Tensor:
        return CASES["gpt2 masked"].loss(self.model, batch)


class TakingMask(nn.Module):
    """Takes an attention_mask, and so does the module in it."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        found: Tensor = self.inner(x)
        return found


def test_masks_are_looked_for_around_the_taps() -> None:
    outer = TakingMask(TakingMask(nn.Linear(4, 4)))
    model = nn.ModuleDict({"outer": outer, "beside": TakingMask(nn.Linear(4, 4)), "plain": nn.Linear(4, 4)})

    def around(*names: str) -> list[nn.Module]:
        return [module for module, _ in Layout(model, {name: model.get_submodule(name) for name in names}).callers()]

    assert around("outer.inner.inner", "plain") == [model, outer, outer.inner]
    assert around("outer") == [model, outer]
    assert around("plain") == [model]


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("call", [lambda task, batch: task(batch), lambda task, batch: task.training_step(batch)])
@pytest.mark.parametrize("name", ["gpt2 masked", "tied masked"])
def test_attention_mask_is_found_inside_of_another_module(
    name: str, call: Callable[[Task, Any], Tensor], checkpointing: bool
) -> None:
    case = CASES[name]
    model, task, batch = case.model(), Task(case.model()), case.inputs()
    if checkpointing and name == "tied masked":
        task.model.checkpointing = {"use_reentrant": False}
    plain, optimizer = wrapped(model, case.layers), wrapped(task, f"model.{case.layers}")
    for _ in range(2):
        for each in (plain, optimizer):
            each.zero_grad()
        for _ in range(2):  # micro-batches
            plain.backward(case.loss(model, batch))
            optimizer.backward(call(task, batch))
        for each in (plain, optimizer):
            each.step()
        assert list(entropies(optimizer).values()) == pytest.approx(list(entropies(plain).values()))
        found = {name.removeprefix("model."): gradient for name, gradient in gradients(task).items()}
        assert distance(found, gradients(model)) < 1e-6
    with optimizer.hook.measuring() as measured, torch.no_grad():
        call(task, batch)
    assert measured.entropies == pytest.approx(entropies(optimizer))


@pytest.mark.parametrize("wrap", [nn.DataParallel, lambda model: torch.compile(model, backend="eager")])
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
def test_a_positional_mask_is_found_through_a_wrapper(wrap: Callable[[nn.Module], nn.Module]) -> None:
    model, batch = TiedLM(), masked_tokens()
    outer = wrap(model)
    name = "module" if isinstance(outer, nn.DataParallel) else "_orig_mod"
    found = []
    for target, called, prefix in ((model, model, ""), (outer, outer, f"{name}.")):
        optimizer = wrapped(target, f"{prefix}blocks.*")
        optimizer.objective(called(*batch.values()).square().mean())
        optimizer.step()
        found.append(list(entropies(optimizer).values()))
        optimizer.hook.remove()
    assert found[0] == pytest.approx(found[1])


def test_masked_tokens_change_no_entropy() -> None:
    """Other tokens under the mask of a causal model leave every entropy as it is."""
    model, batch = TiedLM(), masked_tokens()
    optimizer = wrapped(model, "blocks.*")
    found = []
    for replaced in (False, True):
        ids = batch["input_ids"]
        if replaced:
            ids = torch.where(batch["attention_mask"] == 0, (ids + 7) % 31, ids)
        optimizer.objective(model(ids, attention_mask=batch["attention_mask"]).square().mean())
        optimizer.step()
        found.append(entropies(optimizer))
    assert found[0] == found[1]


class Masked(nn.Module):
    """Its tapped layer gives ``junk`` in masked rows, which the rest of the model then leaves out."""

    def __init__(self, junk: float) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.first, self.layer, self.head = nn.Linear(6, 6), nn.Identity(), nn.Linear(6, 4)
        self.junk = junk

    def forward(self, x: Tensor, attention_mask: Tensor) -> Tensor:
        dead = (attention_mask == 0).unsqueeze(-1)
        h = self.layer(self.first(x).masked_fill(dead, self.junk))
        return self.head(h.masked_fill(dead, 0))


@pytest.mark.parametrize("alpha", [0.5, 1.0, 2.0, 3.0])
@pytest.mark.parametrize("window", [8, 5, None])
def test_nan_in_masked_rows_stays_there(window: int | None, alpha: float) -> None:
    x, mask = torch.randn(4, 13, 6), masked_tokens()["attention_mask"]
    found = []
    for junk in (0.0, 1e6, math.inf, math.nan):
        model = Masked(junk)
        optimizer = wrapped(model, "layer", entropy={"window": window, "alpha": alpha})
        optimizer.backward(model(x, attention_mask=mask).square().mean())
        optimizer.step()
        found.append((entropies(optimizer), gradients(model)))
    expected_entropy, expected = found[0]
    assert expected_entropy["layer"] > 0.1
    for entropy, gradient in found[1:]:
        assert entropy == expected_entropy
        assert all(torch.equal(gradient[name], expected[name]) for name in expected)


@pytest.mark.parametrize(("kernel", "center"), KERNELS.values(), ids=KERNELS)
@pytest.mark.parametrize("alpha", [0.5, 2.0])
@pytest.mark.parametrize("width", [4, 20], ids=["covariance", "gram"])
def test_masked_tokens_receive_no_entropy_gradient(width: int, alpha: float, kernel: str, center: bool) -> None:
    model, mask = nn.Sequential(nn.Identity()), masked_tokens()["attention_mask"]
    model.weight = nn.Parameter(torch.zeros(1))
    entropy = {"alpha": alpha, "kernel": kernel, "center": center}
    optimizer = wrapped(model, "0", entropy=entropy, mask=lambda keywords: mask)
    x = torch.randn(4, 13, width, requires_grad=True)
    optimizer.backward((model(x) * 0).sum())
    assert x.grad is not None
    assert (x.grad[mask == 0] == 0).all()
    lengths = x.grad.norm(dim=-1)
    # Two tokens in a window lie on one line about their mean: nothing is left to compress.
    live = torch.cat([part.sum(1, keepdim=True).expand_as(part) for part in mask.split(8, 1)], dim=1)
    moved = (mask == 1) & (live > 1 + center)
    assert moved.sum() >= 20
    assert (lengths[moved] > 1e-4).all()
    assert (lengths[~moved] < 1e-6).all()


def test_mask_of_another_keyword() -> None:
    class Keyword(TiedLM):
        def forward(self, input_ids: Tensor, padding: Tensor) -> Tensor:
            return super().forward(input_ids)

    model, batch = Keyword(), masked_tokens()
    optimizer = wrapped(model, "blocks.*", mask=lambda keywords: ~keywords["padding"])
    with recorded(list(model.blocks)) as calls:
        loss = model(batch["input_ids"], padding=batch["attention_mask"] == 0).square().mean()
    optimizer.objective(loss)
    optimizer.step()
    expected = [
        sum(float(reference_layer_entropy(h.detach(), mask=batch["attention_mask"])) for h in of_layer) / len(of_layer)
        for of_layer in calls
    ]
    assert list(entropies(optimizer).values()) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("phase", ["memorization", "compression", "measuring"])
@pytest.mark.parametrize(
    ("mask", "error", "message"),
    [
        (torch.ones(3, 12), ValueError, r'mask= gave shape \(3, 12\).*"blocks.0" has \(batch, seq\) = \(3, 13\)'),
        (torch.ones(13), ValueError, r"mask= gave shape \(13,\)"),
        ([1, 1], TypeError, r"mask= must give a tensor .*found list"),
        (None, None, ""),
    ],
)
def test_errors_of_a_mask(mask: Any, error: Any, message: str, phase: str) -> None:
    model = TiedLM()
    optimizer = wrapped(model, "blocks.*", phase=phase.replace("measuring", "compression"), mask=lambda keywords: mask)
    measuring = optimizer.hook.measuring() if phase == "measuring" else nullcontext()
    refused = pytest.raises(error, match=message) if error else nullcontext()
    if error and phase == "memorization":
        refused = pytest.warns(UserWarning, match=message)
    with measuring, refused:
        model(**tokens())


@pytest.mark.parametrize("explicit", [False, True])
@pytest.mark.parametrize("phase", ["memorization", "compression"])
def test_a_mask_of_tokens_that_lie_in_one_row(phase: str, explicit: bool) -> None:
    """As mixtures of experts flatten them: the entropy and its gradient are those of (batch, seq, d)."""

    class Flat(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.layer, self.pooled = nn.Linear(6, 6), nn.Linear(6, 5), nn.Linear(5, 4)

        def forward(self, x: Tensor, attention_mask: Tensor, flat: bool) -> Tensor:
            h = self.first(x)
            h = self.layer(h.flatten(0, 1) if flat else h).reshape(len(x), 16, 5)
            return self.pooled((h * attention_mask.unsqueeze(-1)).sum(1))

    x = torch.randn(3, 16, 6)
    mask = (torch.rand(3, 16) > 0.4).float()
    found = []
    for flat in (False, True):
        torch.manual_seed(0)
        model = Flat()
        optimizer = wrapped(
            model,
            ["layer", "pooled"],
            phase=phase,
            mask=(lambda keywords: keywords["attention_mask"]) if explicit else None,
        )
        optimizer.backward(model(x, attention_mask=mask, flat=flat).square().mean())
        gradients = [p.grad.clone() for p in model.parameters() if p.grad is not None]
        optimizer.step()
        found.append((entropies(optimizer), gradients))
    (one, g), (two, d) = found
    assert one == pytest.approx(two, rel=1e-6)
    for a, b in zip(g, d, strict=True):
        torch.testing.assert_close(a, b)


def test_an_explicit_mask_that_fits_no_row_is_refused() -> None:
    model = nn.Sequential(nn.Linear(6, 5))
    optimizer = wrapped(model, "0", mask=lambda keywords: torch.ones(3, 4))
    with pytest.raises(ValueError, match=r'mask= gave shape \(3, 4\).*"0" has 7 rows'):
        optimizer.objective(model(torch.randn(7, 6)).square().mean())


@pytest.mark.parametrize("shape", [(3, 1, 13, 13), (3, 20), (13,)])
def test_an_attention_mask_of_another_shape_is_not_a_token_mask(shape: tuple[int, ...]) -> None:
    model, batch = TiedLM(), tokens()
    optimizer = wrapped(model, "blocks.*")
    found = []
    for mask in (None, torch.zeros(shape)):
        optimizer.objective(model(**batch, attention_mask=mask).square().mean())
        optimizer.step()
        found.append(entropies(optimizer))
    assert found[0] == found[1]


def test_a_token_mask_is_not_one_of_channels() -> None:
    class Convolution(nn.Conv2d):
        def forward(self, x: Tensor, attention_mask: Tensor | None = None) -> Tensor:
            return super().forward(x)

    model, x = Convolution(3, 5, 3), torch.randn(2, 3, 7, 7)
    hook = RepresentationHook(model, "")
    with hook.measuring() as plain:
        model(x)
    with hook.measuring() as masked:
        model(x, attention_mask=torch.tensor([[1, 0, 0, 0, 0], [1, 1, 0, 0, 0]]))
    assert masked.entropies == plain.entropies


@pytest.mark.parametrize("shape", [(2, 5), (1, 2)])
def test_a_mask_that_is_picked_is_not_one_of_images(shape: tuple[int, int]) -> None:
    """Beside tokens, a model may have images, whose positions it is not about."""
    model, x, found = CNN(), torch.randn(2, 3, 7, 7), []
    for mask in (None, lambda _: torch.zeros(shape)):
        optimizer = wrapped(model, "convolutions.*", mask=mask)
        optimizer.backward(model(x).square().mean())
        optimizer.step()
        found.append(entropies(optimizer))
        optimizer.hook.remove()
    assert found[0] == found[1]


def test_a_mask_serves_its_own_call_only() -> None:
    """Not a part of the model that is called by itself afterwards, not even where the model's call had failed."""
    model, batch, h = TiedLM(), masked_tokens(), torch.randn(4, 13, 6)
    optimizer = wrapped(model, "blocks.0")
    expected = float(reference_layer_entropy(model.blocks[0](h).detach()))
    optimizer.step()

    def direct() -> float:
        optimizer.objective(model.blocks[0](h).square().mean())
        optimizer.step()
        return entropies(optimizer)["blocks.0"]

    model(**batch)
    optimizer.step()
    assert direct() == pytest.approx(expected, rel=1e-5)
    with pytest.raises(IndexError):
        model(input_ids=batch["input_ids"] + 100, attention_mask=batch["attention_mask"])
    assert direct() == pytest.approx(expected, rel=1e-5)
    with optimizer.hook.measuring() as masked:
        model(**batch)
    with optimizer.hook.measuring() as measured:
        model(**batch)
        model.blocks[0](h)
    # Windows with three tokens that count, masked; and two of each of the four sequences.
    lives = [live for _, live in reference_windows(h, 8, batch["attention_mask"]) if live is not None]
    m, n = sum(int(live.sum()) > 2 for live in lives), 8
    found = ((m + n) * measured.entropies["blocks.0"] - m * masked.entropies["blocks.0"]) / n
    assert found == pytest.approx(expected, rel=1e-5)
    assert masked.entropies["blocks.0"] != pytest.approx(expected, rel=1e-2)


# What is captured, and when


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_nothing_is_captured_with_gradients_off(context: Callable[[], Any]) -> None:
    model = MLP()
    optimizer = wrapped(model, "blocks.*")
    with context():
        output = model(torch.randn(3, 6))
    assert captured(optimizer.hook) == 0
    with pytest.raises(RuntimeError, match=r'"blocks.0" \(and 2 more\) ran with gradients off'):
        optimizer.objective(output.clone().sum())


def test_nothing_is_captured_in_evaluation() -> None:
    model = MLP().eval()
    optimizer = wrapped(model, "blocks.*")
    loss = loss_of(model, torch.randn(3, 6))
    assert captured(optimizer.hook) == 0
    with pytest.raises(RuntimeError, match=r'"blocks.0".*ran in evaluation mode.*measuring'):
        optimizer.objective(loss)


@pytest.mark.parametrize("remove", [lambda hook: hook.remove(), lambda hook: hook.__exit__(None, None, None)])
@PHASES
def test_nothing_is_captured_after_remove(remove: Callable[[RepresentationHook], None], phase: str) -> None:
    model, x = MLP(), torch.randn(3, 6)
    optimizer = wrapped(model, "blocks.*", phase=phase)
    model(x)
    remove(optimizer.hook)
    loss = loss_of(model, x)
    assert captured(optimizer.hook) == 0
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    told = pytest.raises(RuntimeError, match="was removed")
    with told if phase == "compression" else pytest.warns(UserWarning, match="was removed"):
        optimizer.objective(loss)


def test_the_hook_is_a_context_manager_and_removing_twice_is_fine() -> None:
    model = MLP()
    with RepresentationHook(model, "blocks.*") as hook:
        assert not hook.removed
    assert hook.removed
    hook.remove()


@pytest.mark.parametrize(("count", "shown"), [(12, '"11"'), (13, '"11", ...')])
def test_twelve_modules_are_shown(count: int, shown: str) -> None:
    model = nn.Sequential(*(nn.Linear(2, 2) for _ in range(count)))
    with pytest.raises(ValueError, match=re.escape(f'"10", {shown}') + "$"):
        RepresentationHook(model, "nothing")


def test_nothing_is_captured_without_an_optimizer() -> None:
    model = MLP()
    hook = RepresentationHook(model, "blocks.*")
    output = model(torch.randn(3, 6))
    assert captured(hook) == 0
    assert "Tap" not in str(output.grad_fn.next_functions)


def test_a_loss_that_no_watched_module_ran_for() -> None:
    model = Two()
    optimizer = wrapped(model, ["left.*", "right.*"])
    h = model.left[1](model.left[0](torch.randn(3, 4)))
    optimizer.backward(h.sum())  # a part of the model rests
    optimizer.step()
    assert list(entropies(optimizer)) == ["left.0", "left.1"]
    other = nn.Linear(4, 4)(torch.randn(3, 4)).sum()
    with pytest.raises(RuntimeError, match=r'does not depend on the output of layer "left.0" \(and 3 more\)'):
        optimizer.backward(other)


def test_a_module_that_ran_before_may_rest() -> None:
    """Layer drop leaves out a layer now and then."""
    model, x = Two(), torch.randn(3, 4)
    optimizer = wrapped(model, "left.*")
    for used in ((0, 1), (0,), (1,), (0, 1)):
        h = x
        for i in used:
            h = model.left[i](h)
        optimizer.backward(h.square().mean())
        optimizer.step()
        assert list(entropies(optimizer)) == [f"left.{i}" for i in used]
        with torch.no_grad():  # does not matter to a later step
            model.left[0](x)
        optimizer.step()
    with pytest.raises(RuntimeError, match=r'"left\.0".*did not run'):
        optimizer.objective(x.sum().requires_grad_())


def test_the_entropy_is_that_of_all_windows_of_the_calls_of_a_module() -> None:
    model = MLP(depth=1)
    block = model.blocks[0]
    optimizer = wrapped(model, "blocks.*")
    hidden = [torch.randn(9, 6), torch.randn(2, 12, 6), torch.randn(5, 6)]
    total = sum((block(h).square().mean() for h in hidden), torch.zeros(()))
    optimizer.objective(total)
    optimizer.step()
    # 8 rows and a row alone, two times 8 rows and 4, and 5 rows.
    windows = [float(reference_layer_entropy(block(h).detach())) * n for h, n in zip(hidden, (1, 4, 1), strict=True)]
    expected = sum(windows) / 6
    assert entropies(optimizer)["blocks.0"] == pytest.approx(expected, rel=1e-5)


@PHASES
@ALIGNMENTS
def test_a_stray_forward_never_reaches_a_later_step(phase: str, activation: bool) -> None:
    model, x = MLP(), torch.randn(3, 9, 6)
    optimizer = wrapped(model, "blocks.*", phase=phase, activation=activation)
    found = []
    for stray in (False, True):
        if stray:
            model(torch.randn(5, 6) * 100)
            optimizer.step()
            assert captured(optimizer.hook) == 0
        optimizer.zero_grad()
        optimizer.backward(loss_of(model, x))
        optimizer.step()
        found.append((entropies(optimizer), gradients(model)))
    assert found[0][0] == found[1][0]
    assert distance(found[1][1], found[0][1]) == 0


def test_the_error_of_a_model_that_is_gone_says_so() -> None:
    model = MLP()
    optimizer = wrapped(model, "blocks.*")
    del model
    with pytest.raises(RuntimeError, match="no longer exists"):
        optimizer.objective(torch.ones((), requires_grad=True))


def test_an_optimizer_that_is_copied_by_itself_says_what_to_copy_with_it() -> None:
    model, x = MLP(), torch.randn(3, 9, 6)
    copied = copy.deepcopy(wrapped(model, "blocks.*"))
    gc.collect()
    with pytest.raises(RuntimeError, match=r"deepcopy\(\(model, optimizer\)\)"):
        copied.objective(loss_of(model, x))


# Lifetime


@pytest.fixture
def no_collection() -> Iterator[None]:
    """What dies here dies by its reference count alone."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()


@pytest.mark.usefixtures("no_collection")
@pytest.mark.parametrize("stepped", [False, True], ids=["before step", "after step"])
@ALIGNMENTS
@PHASES
def test_nothing_keeps_a_model_alive(phase: str, activation: bool, stepped: bool) -> None:
    model = MLP()
    optimizer = wrapped(model, "blocks.*", phase=phase, activation=activation)
    hook = optimizer.hook
    loss = loss_of(model, torch.randn(3, 6))
    if stepped:
        optimizer.backward(loss)
        optimizer.step()
    watched = [weakref.ref(model), weakref.ref(model.blocks[0]), weakref.ref(model.head.weight)]
    del loss, hook, optimizer, model
    assert [ref() for ref in watched] == [None, None, None]


@pytest.mark.usefixtures("no_collection")
def test_the_hook_alone_keeps_no_model_alive() -> None:
    model = MLP()
    hook = RepresentationHook(model, "blocks.*")
    watched = weakref.ref(model)
    del model
    assert watched() is None
    hook.remove()


@pytest.mark.usefixtures("no_collection")
def test_a_model_outlives_its_hooks_without_them() -> None:
    model = MLP()
    for _ in range(3):
        optimizer = wrapped(model, "blocks.*")
        optimizer.backward(loss_of(model, torch.randn(3, 6)))
        del optimizer
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def living_tensors() -> int:
    gc.collect()
    return sum(issubclass(type(thing), Tensor) for thing in gc.get_objects())


def living_objects() -> int:
    gc.collect()
    return len(gc.get_objects())


@pytest.mark.parametrize("parts", [{"phase": "compression"}, {"phase": "memorization", "activation": False}], ids=str)
def test_memory_is_flat(parts: dict[str, Any]) -> None:
    model, x = MLP(depth=2), torch.randn(4, 6)
    optimizer = wrapped(model, "blocks.*", **parts)
    counts = []
    for step in range(301):
        optimizer.backward(loss_of(model, x))
        optimizer.step()
        optimizer.zero_grad()
        if step in (20, 300):
            counts.append((living_tensors(), living_objects()))
    (tensors, objects), (later_tensors, later_objects) = counts
    assert later_tensors <= tensors
    assert later_objects <= objects + 20  # far less than one a step


@pytest.mark.parametrize("left", ["idle", "deleted"])
@ALIGNMENTS
@PHASES
def test_memory_is_flat_when_the_model_is_trained_past_the_wrapper(phase: str, activation: bool, left: str) -> None:
    model, x = MLP(depth=2), torch.randn(4, 6)
    optimizer: Any = wrapped(model, "blocks.*", phase=phase, activation=activation)
    hook, bare = optimizer.hook, torch.optim.SGD(model.parameters(), lr=0.0)
    if left == "deleted":
        del optimizer
    counts = []
    for step in range(201):
        loss_of(model, x).backward()
        bare.step()
        bare.zero_grad()
        if step in (20, 200):
            counts.append(living_tensors())
    assert counts[1] <= counts[0]
    assert captured(hook) <= 2


# Several wrappers and copies


@ALIGNMENTS
@pytest.mark.parametrize("phases", [("compression", "memorization"), ("compression", "compression")], ids="-".join)
def test_two_wrappers_on_one_model_do_not_see_each_other(phases: tuple[str, str], activation: bool) -> None:
    """They take turns; each does what it does alone."""

    def run(use: tuple[int, ...]) -> dict[int, list[Any]]:
        torch.manual_seed(1)
        model = MLP().double()
        parts = [{"entropy": {"window": 8}}, {"entropy": {"window": 4, "alpha": 3.0}, "objective": {"weight": 2.0}}]
        optimizers = {i: wrapped(model, "blocks.*", phases[i], activation=activation, **parts[i]) for i in use}
        found: dict[int, list[Any]] = {i: [] for i in use}
        for step in range(3):
            for i in range(2):
                x = torch.randn(3, 9, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(10 * step + i))
                if i in use:
                    optimizers[i].zero_grad()
                    optimizers[i].backward(loss_of(model, x))
                    optimizers[i].step()
                    found[i].append((gradients(model), optimizers[i].metrics))
        return found

    together = run((0, 1))
    for i in range(2):
        for (gradient, metrics), (expected, alone) in zip(together[i], run((i,))[i], strict=True):
            assert distance(gradient, expected) < 1e-12
            assert metrics.layer_entropy == pytest.approx(alone.layer_entropy)
            if activation:
                assert metrics.alignment.loss_norm == pytest.approx(alone.alignment.loss_norm)
                assert metrics.alignment.cosine == pytest.approx(alone.alignment.cosine)


COPIES: dict[str, Callable[[nn.Module], Any]] = {
    "deepcopy": copy.deepcopy,
    "AveragedModel": AveragedModel,
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
    "torch.save": lambda model: torch.load(_saved(model), weights_only=False),
}


def _saved(model: nn.Module) -> io.BytesIO:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return file


@pytest.mark.parametrize("moment", ["before", "within", "after"])
@pytest.mark.parametrize("copying", COPIES.values(), ids=COPIES)
def test_a_copy_does_not_feed_the_hook(copying: Callable[[nn.Module], Any], moment: str) -> None:
    """Copied before the forward, between forward and backward, and after a whole step."""
    torch.manual_seed(1)
    model, x = MLP(), torch.randn(3, 9, 6)
    optimizer = wrapped(model, "blocks.*", lr=0.1)
    other = copying(model) if moment == "before" else None
    loss = loss_of(model, x)
    other = copying(model) if moment == "within" else other
    if other is not None:
        loss_of(other, torch.randn(3, 9, 6) * 50).backward()
        assert captured(optimizer.hook) == 3
    optimizer.backward(loss)
    optimizer.step()
    if moment == "after":
        other = copying(model)
        loss_of(other, x).backward()
        assert captured(optimizer.hook) == 0
    torch.manual_seed(1)
    twin = MLP()
    alone = wrapped(twin, "blocks.*", lr=0.1)
    alone.backward(loss_of(twin, x))
    alone.step()
    assert entropies(optimizer) == entropies(alone)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), twin.parameters(), strict=True))
    if isinstance(other, AveragedModel):
        other.update_parameters(model)
        assert captured(optimizer.hook) == 0


@pytest.mark.parametrize("copying", [copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))])
def test_model_and_optimizer_copied_together_stay_together(copying: Callable[[Any], Any]) -> None:
    model, x = MLP(), torch.randn(3, 9, 6)
    optimizer = wrapped(model, "blocks.*", lr=0.1)
    optimizer.backward(loss_of(model, x))
    optimizer.step()
    other, other_optimizer = copying((model, optimizer))
    for m, o in ((model, optimizer), (other, other_optimizer)):
        o.zero_grad()
        o.backward(loss_of(m, x))
        o.step()
    assert entropies(other_optimizer) == entropies(optimizer)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))
    assert not any(a is b for a, b in zip(model.parameters(), other.parameters(), strict=True))


@pytest.mark.parametrize("copying", [copy.deepcopy, pickle.dumps])
def test_a_hook_whose_model_is_gone_is_not_copied(copying: Callable[[Any], Any]) -> None:
    model = MLP()
    hook = RepresentationHook(model, "blocks.*")
    del model
    gc.collect()
    with pytest.raises(RuntimeError, match="cannot copy a RepresentationHook whose model no longer exists"):
        copying(hook)


# Measuring


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("context", [torch.no_grad, torch.enable_grad, torch.inference_mode])
def test_measuring_reads_in_any_mode_and_captures_nothing(context: Callable[[], Any], training: bool) -> None:
    model, x = MLP().train(training), torch.randn(3, 9, 6)
    optimizer = wrapped(model, "blocks.*")
    with recorded(list(model.blocks)) as calls, optimizer.hook.measuring() as measured, context():
        output = model(x)
    expected = [float(reference_layer_entropy(h.detach())) for (h,) in calls]
    assert measured.entropies == pytest.approx(dict(zip(optimizer.hook.names, expected, strict=True)), rel=1e-5)
    assert measured.mean == pytest.approx(sum(expected) / 3, rel=1e-5)
    assert captured(optimizer.hook) == 0
    if output.requires_grad:
        output.sum().backward()  # no tap in the way


def test_measuring_between_forward_and_backward_changes_no_step() -> None:
    model, x = MLP(), torch.randn(3, 9, 6)
    optimizer = wrapped(model, "blocks.*")
    found = []
    for between in (False, True):
        optimizer.zero_grad()
        loss = loss_of(model, x)
        if between:
            with optimizer.hook.measuring():
                model(torch.randn(3, 9, 6))
        optimizer.backward(loss)
        optimizer.step()
        found.append((entropies(optimizer), gradients(model)))
    assert found[0][0] == found[1][0]
    assert distance(found[1][1], found[0][1]) == 0


def test_measuring_averages_over_windows_and_takes_its_own_settings() -> None:
    model = MLP(depth=1)
    hook = RepresentationHook(model, "blocks.*")
    first, second = torch.randn(9, 6), torch.randn(2, 12, 6)
    settings = EntropyConfig(alpha=1.0, window=None, normalize=True)
    with hook.measuring(settings) as measured:
        outputs = [model.blocks[0](first), model.blocks[0](second)]
    one, other = (float(reference_layer_entropy(h.detach(), 1.0, None, normalize=True)) for h in outputs)
    expected = (one + 2 * other) / 3  # a sequence, and two
    assert measured.entropies["blocks.0"] == pytest.approx(expected, rel=1e-5)
    alone = []
    for h in (first, second, second):
        with hook.measuring(settings) as once:
            model.blocks[0](h)
        alone.append(once.measures["blocks.0"])
    for name, value in asdict(Measures.mean(alone)).items():
        assert getattr(measured.measures["blocks.0"], name) == pytest.approx(value, rel=1e-6)


def test_measuring_windows_that_fit_the_sequence() -> None:
    model = MLP(depth=1)
    hook = RepresentationHook(model, "blocks.*")
    with hook.measuring(EntropyConfig(window=4)) as measured:
        h = model.blocks[0](torch.randn(3, 12, 6))
    assert measured.entropies["blocks.0"] == pytest.approx(float(reference_layer_entropy(h.detach(), 2.0, 4)), rel=1e-5)


def test_measuring_takes_the_settings_and_masks_of_training() -> None:
    case = CASES["gpt2 masked"]
    model, inputs = case.model(), case.inputs()
    optimizer = wrapped(model, case.layers, entropy={"alpha": 3.0, "window": 5})
    optimizer.objective(case.loss(model, inputs))
    optimizer.step()
    with optimizer.hook.measuring() as measured, torch.no_grad():
        model.eval()(**inputs)
    assert measured.entropies == pytest.approx(entropies(optimizer), rel=1e-6)


def test_measuring_a_convolution() -> None:
    model, x = CNN(), torch.randn(2, 3, 7, 7)
    hook = RepresentationHook(model, "convolutions.*")
    with recorded(list(model.convolutions)) as calls, hook.measuring() as measured:
        model(x)
    expected = [float(reference_layer_entropy(h.detach())) for (h,) in calls]
    assert list(measured.entropies.values()) == pytest.approx(expected, rel=1e-5)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("picked", [None, "not padding", "some of that"])
def test_measuring_the_packed_sequences_of_an_encoder(picked: str | None) -> None:
    """In evaluation nn.TransformerEncoder packs masked sequences into a nested tensor."""
    torch.manual_seed(0)
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, dropout=0.0), 2)
    x, padding = torch.randn(3, 11, 8), torch.arange(11) >= torch.tensor([11, 4, 9])[:, None]
    live = ~padding & (torch.arange(11) % 3 > 0) if picked == "some of that" else ~padding
    hook = RepresentationHook(encoder, "layers.*", mask=None if picked is None else lambda _: live)
    with recorded(list(encoder.layers)) as calls, torch.enable_grad():  # with gradients on, nothing is packed
        encoder(x, src_key_padding_mask=padding)
    expected = [float(reference_layer_entropy(h.detach(), mask=live)) for (h,) in calls]
    encoder.eval()
    with hook.measuring() as measured, torch.no_grad():
        encoder(x, src_key_padding_mask=padding)
    assert list(measured.entropies.values()) == pytest.approx(expected, rel=1e-5)


def test_packed_sequences_are_refused() -> None:
    """Their rows are those of all sequences at a time step, which windows would mix."""
    model = nn.ModuleDict({"lstm": nn.LSTM(4, 8, batch_first=True)})
    hook = RepresentationHook(model, "lstm")
    with (
        hook.measuring(),
        pytest.raises(TypeError, match=r'"lstm" returned a PackedSequence.*pad_packed.*mask='),
    ):
        model["lstm"](nn.utils.rnn.pack_padded_sequence(torch.randn(2, 3, 4), [3, 2], batch_first=True))


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("layout", [torch.strided, torch.jagged])
def test_a_nested_output_is_refused_in_training(layout: torch.layout) -> None:
    model = nn.Sequential(nn.Linear(4, 4))
    optimizer = wrapped(model, "0")
    with pytest.raises(TypeError, match=r'module "0" returned a nested tensor.*padded sequences'):
        model(torch.nested.nested_tensor([torch.randn(2, 4), torch.randn(3, 4)], layout=layout))
    assert captured(optimizer.hook) == 0


def test_training_while_measuring_is_refused() -> None:
    model = MLP()
    optimizer = wrapped(model, "blocks.*")
    with optimizer.hook.measuring(), pytest.raises(RuntimeError, match="train outside its with block"):
        optimizer.backward(loss_of(model, torch.randn(3, 6)))


@pytest.mark.parametrize("argument", ["output", "mask"])
def test_what_picks_must_be_a_function(argument: str) -> None:
    with pytest.raises(TypeError, match=f"{argument} must be a function or None, found str"):
        RepresentationHook(MLP(), "blocks.*", **{argument: "hidden"})


def test_misuse_of_measuring_is_refused() -> None:
    model = MLP()
    hook = RepresentationHook(model, "blocks.*")
    with pytest.raises(TypeError, match="entropy must be an EntropyConfig, found float"), hook.measuring(2.0):  # type: ignore[arg-type]
        pass
    with hook.measuring() as empty:
        pass
    with pytest.raises(RuntimeError, match="no watched module ran"):
        _ = empty.mean
    with hook.measuring(), pytest.raises(RuntimeError, match="already open"), hook.measuring():
        pass
    with pytest.raises(ZeroDivisionError), hook.measuring():
        raise ZeroDivisionError
    with hook.measuring() as measured:  # the exception closed it
        model(torch.randn(3, 6))
    assert len(measured.entropies) == 3
    hook.remove()
    with pytest.raises(RuntimeError, match="was removed"), hook.measuring():
        pass
