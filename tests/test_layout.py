"""What a watched module's output means: its axes, the rows that count, and the documents."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gapt_optim.layout import Layout
from gapt_optim.layout.tokens import restarted

from .watching import Watch, direct

WIDTH = 16


def batch(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def lengths(mask: list[int], total: int) -> Tensor:
    return torch.arange(total) < torch.tensor(mask)[:, None]


class Encoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.l = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        out: Tensor = self.l(x)
        return out


def of(model: nn.Module, layer: str, *args: Any, **kwargs: Any) -> float:
    """The entropy of ``layer``: followed, once more as it is known then, and without gradients."""
    with Watch(model, [layer]) as watch:
        found = []
        for grad in (True, True, False):
            with torch.set_grad_enabled(grad):
                model(*args, **kwargs)
            found.append(watch.entropies[layer])
            watch.clear()
    assert found[1:] == pytest.approx(found[:1] * 2)
    with torch.no_grad(), Watch(model, [layer]) as watch:
        model(*args, **kwargs)
    assert watch.entropies[layer] == pytest.approx(found[0])
    return found[0]


# Axes


class OtherRMSNorm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        return x * x.square().mean(-1, keepdim=True).rsqrt() * self.weight


SHAPES: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], Callable[[Tensor], list[Tensor]]]] = {
    "Conv1d": (lambda: nn.Conv1d(4, WIDTH, 3, padding=1), (2, 4, 40), lambda h: list(h.mT)),
    "Conv1d as long as wide": (lambda: nn.Conv1d(WIDTH, WIDTH, 3, padding=1), (2, 16, 16), lambda h: list(h.mT)),
    "Conv1d without a batch": (lambda: nn.Conv1d(4, WIDTH, 3, padding=1), (4, 40), lambda h: [h.mT]),
    "Conv2d": (lambda: nn.Conv2d(4, WIDTH, 3), (2, 4, 7, 9), lambda h: list(h.flatten(2).mT)),
    "Conv3d": (lambda: nn.Conv3d(4, WIDTH, 2), (2, 4, 3, 4, 5), lambda h: list(h.flatten(2).mT)),
    "BatchNorm1d": (lambda: nn.BatchNorm1d(WIDTH), (2, 16, 16), lambda h: list(h.mT)),
    "BatchNorm2d": (lambda: nn.BatchNorm2d(WIDTH), (2, 16, 4, 16), lambda h: list(h.flatten(2).mT)),
    "GroupNorm": (lambda: nn.GroupNorm(4, WIDTH), (2, 16, 16), lambda h: list(h.mT)),
    "LayerNorm of an image": (lambda: nn.LayerNorm(WIDTH), (2, 16, 8, 16), lambda h: list(h.flatten(1, 2))),
    "RMSNorm": (lambda: nn.RMSNorm(WIDTH), (2, 6, 8, 16), lambda h: list(h.flatten(1, 2))),
    "Linear": (lambda: nn.Linear(4, WIDTH), (2, 16, 16, 4), lambda h: list(h.flatten(1, 2))),
    "Linear of samples": (lambda: nn.Linear(4, WIDTH), (24, 4), lambda h: [h]),
    "pooling": (lambda: nn.AvgPool1d(2), (2, 16, 32), lambda h: list(h.mT)),
    "Unfold": (lambda: nn.Unfold(3), (2, 4, 7, 9), lambda h: list(h.mT)),
    "RMSNorm of another library": (lambda: OtherRMSNorm(), (2, 6, 8, 16), lambda h: list(h.flatten(1, 2))),
}


@pytest.mark.parametrize("name", SHAPES)
def test_axes_from_the_type(name: str) -> None:
    make, shape, rows = SHAPES[name]
    model, x = nn.Sequential(make(), nn.Tanh()), batch(*shape)
    assert of(model, "0", x) == pytest.approx(direct(*rows(model[0](x))))
    assert of(model, "1", x) == pytest.approx(direct(*rows(model(x)))), "what follows it"


def test_axes_of_a_module_without_weights_behind_another() -> None:
    model, x = nn.Sequential(nn.Linear(4, WIDTH), nn.Tanh(), nn.ReLU()), batch(2, 6, 8, 4)
    assert of(model, "2", x) == pytest.approx(direct(*model(x).flatten(1, 2)))


class Operation(nn.Module):
    """Something happens between the argument and the watched module."""

    def __init__(self, made: Callable[[Tensor], Tensor], out: nn.Module | None = None) -> None:
        super().__init__()
        self.made, self.out = made, nn.Identity() if out is None else out

    def forward(self, x: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        found: Tensor = self.out(self.made(x))
        return found


def axes_of(model: nn.Module, *args: Tensor) -> str:
    with Watch(model, ["out"]) as watch:
        model(*args)
    return watch.readings["out"][0].axes


OPERATIONS: dict[str, tuple[Callable[[Tensor], Tensor], str]] = {
    "unbind": (lambda x: torch.stack(x.unbind(0)), "batch length features"),
    "expand": (lambda x: x[0].expand(3, -1, -1), "batch length features"),
    "a tuple of one dimension": (lambda x: torch.stack([x, x], 2).mean((2,)), "batch length features"),
    "movedim": (lambda x: x.movedim(1, 0), "length batch features"),
    "heads of one sequence": (
        lambda x: F.linear(x, torch.eye(WIDTH))[0].unflatten(-1, (4, 4)),
        "length features features",
    ),
    "flat rows, each with an axis of its own": (lambda x: x.flatten(0, 1).unsqueeze(1), "batch length features"),
    "flat rows, some of them": (lambda x: x.flatten(0, 1)[:11], "batch features"),
    "flat rows in three parts": (lambda x: x.flatten(0, 1).reshape(2, 4, 3, WIDTH), "batch height width channels"),
}


@pytest.mark.parametrize("name", OPERATIONS)
def test_axes_are_followed_through(name: str) -> None:
    made, axes = OPERATIONS[name]
    out = None if "heads" in name else nn.Linear(WIDTH, WIDTH)
    assert axes_of(Operation(made, out), batch(2, 12, WIDTH)) == axes


class Masked(nn.Module):
    """A block that may be given a mask, and is not."""

    def forward(self, x: Tensor, padding_mask: Tensor | None = None) -> Tensor:
        return x * 2


@pytest.mark.parametrize("sequences", [1, 2, 12])
def test_what_was_followed_counts_more_than_the_habit_of_a_block_with_masks(sequences: int) -> None:
    model = Operation(lambda x: F.linear(x, torch.eye(WIDTH)).transpose(0, 1), Masked())
    assert axes_of(model, batch(sequences, 12, WIDTH)) == "length batch features"


@pytest.mark.parametrize(
    ("ids", "shape", "axes"),
    [
        ((3, 5), (15, 7), "batch * length features"),
        ((3, 5), (3, 5, 7), "batch length features"),
        ((3, 5), (5, 3, 7), "length batch features"),
        ((3, 5), (3, 7, 5), "batch features length"),
        ((4, 4), (4, 4, 7), "batch length features"),
        ((3, 5), (3, 5, 2, 7), "batch length features features"),
        ((3, 5), (5, 3, 2, 7), "length batch features features"),
        ((3, 5), (2, 3, 5, 7), "features batch length features"),
        ((3, 5), (3, 2, 5, 7), "batch features length features"),
    ],
)
def test_axes_by_the_sizes_of_the_tokens(ids: tuple[int, int], shape: tuple[int, ...], axes: str) -> None:
    assert axes_of(Operation(lambda _: batch(*shape)), torch.zeros(ids, dtype=torch.long)) == axes


def test_sizes_that_fit_twice_are_refused() -> None:
    with pytest.raises(ValueError, match="can be read as"):
        axes_of(Operation(lambda _: batch(3, 5, 5, 7)), torch.zeros(3, 5, dtype=torch.long))
    with pytest.raises(ValueError, match="can be read as"):
        axes_of(Operation(lambda x: nn.Linear(4, 7)(x).permute(3, 0, 1, 2)), batch(2, 5, 6, 4))


class Turned(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).mT


def test_axes_by_the_width_of_the_last_weight() -> None:
    model = Operation(lambda _: batch(4, 6, WIDTH), nn.Sequential(Turned(WIDTH, WIDTH)))
    assert axes_of(model, torch.zeros(2, 3, dtype=torch.long)) == "batch channels length"


def test_a_convolution_keeps_the_length_of_its_tokens() -> None:
    embed = nn.Embedding(9, 4)
    model = Operation(lambda ids: embed(ids).mT, nn.Conv1d(4, WIDTH, 3, padding=1))
    assert axes_of(model, torch.zeros(2, 12, dtype=torch.long)) == "batch features length"


class ChannelsLast(nn.Module):
    """As ConvNeXt's block: a convolution, and then channels at the end; out with channels first again."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.norm = nn.Conv2d(WIDTH, WIDTH, 3, padding=1), nn.LayerNorm(WIDTH)
        self.gelu, self.linear = nn.GELU(), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x).permute(0, 2, 3, 1)
        return x + self.linear(self.gelu(self.norm(y))).permute(0, 3, 1, 2)


def test_axes_are_followed_where_all_sizes_are_one() -> None:
    model = nn.Sequential(ChannelsLast(), ChannelsLast())
    x = batch(2, 16, 16, 16)
    with Watch(model, ["0", "0.gelu", "0.norm", "1"]) as watch:
        model(x)
    last = model[0].gelu(model[0].norm(model[0].conv(x).permute(0, 2, 3, 1)))
    assert watch.entropies["0"] == pytest.approx(direct(*model[0](x).flatten(2).mT))
    assert watch.entropies["1"] == pytest.approx(direct(*model(x).flatten(2).mT))
    assert watch.entropies["0.gelu"] == pytest.approx(direct(*last.flatten(1, 2)))
    axes = {name: found[0].axes for name, found in watch.readings.items()}
    assert axes["0"] == "batch channels height width"
    assert axes["0.gelu"] == "batch height width channels"


class Recurrent(nn.Module):
    def __init__(self, first: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.rnn, self.head = nn.LSTM(WIDTH, WIDTH, batch_first=first), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.rnn(x)[0])
        return out


@pytest.mark.parametrize("shape", [(3, 24, WIDTH), (8, 8, WIDTH)])
def test_what_stands_behind_a_sequence_first_module(shape: tuple[int, ...]) -> None:
    x = batch(*shape)
    for layer in ("rnn", "head"):
        first, last = Recurrent(True), Recurrent(False)
        assert of(last, layer, x.transpose(0, 1)) == pytest.approx(of(first, layer, x))


class Before(nn.Module):
    """A layer before the module that says where the sequence is; ``turns`` are where its arguments are transposed."""

    def __init__(self, kind: str, first: bool = False, turns: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.inp, self.kind, self.turns = nn.Linear(WIDTH, WIDTH), kind, turns
        self.embed = nn.Embedding(9, WIDTH)
        if kind in ("GRU", "LSTM"):
            self.block: nn.Module = getattr(nn, kind)(WIDTH, WIDTH, batch_first=first)
        elif kind == "attention":
            self.block = nn.MultiheadAttention(WIDTH, 2, batch_first=first)
        else:
            layer = nn.TransformerEncoderLayer(WIDTH, 2, 8, dropout=0.0, batch_first=first)
            self.block = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False)

    def forward(self, x: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        h = self.inp(x if x.is_floating_point() else self.embed(x))
        h = h.transpose(0, 1) if self.turns else h
        out = self.block(h, h, h) if self.kind == "attention" else self.block(h)
        return out[0] if isinstance(out, tuple) else out  # type: ignore[no-any-return]


@pytest.mark.parametrize("ids", [False, True])
@pytest.mark.parametrize("kind", ["GRU", "LSTM", "attention", "encoder"])
@pytest.mark.parametrize("watched", [["inp"], ["inp", "block"]])
def test_what_stands_before_a_sequence_first_module(watched: list[str], kind: str, ids: bool) -> None:
    """The first pass shows it, and says so; the next ones are read rightly."""
    model, x = Before(kind), torch.randint(0, 9, (20, 5)) if ids else batch(20, 5, WIDTH)
    with Watch(model, watched) as watch:
        model(x)
        assert 'layout="length batch features"' in str(watch.readings["inp"][0].guess)
        watch.clear()
        with pytest.warns(UserWarning, match="first forward pass of inp was read otherwise") as told:
            model(x)
        assert len(told) == 1
        model(x)
    readings = watch.readings["inp"]
    assert [(each.axes, each.guess) for each in readings] == [("length batch features", None)] * 2
    h = model.inp(model.embed(x) if ids else x)
    assert watch.entropies["inp"] == pytest.approx(direct(*h.transpose(0, 1)))


@pytest.mark.parametrize(("first", "turns"), [(True, False), (False, True)])
@pytest.mark.parametrize("kind", ["GRU", "attention", "encoder"])
def test_what_stands_before_a_module_that_gets_the_batch_first(kind: str, first: bool, turns: bool) -> None:
    model, x = Before(kind, first, turns), batch(5, 20, WIDTH)
    with Watch(model, ["inp"]) as watch:
        model(x)
        model(x)
    assert [each.axes for each in watch.readings["inp"]] == ["batch length features"] * 2
    assert watch.readings["inp"][1].guess is None


def test_a_mask_says_more_than_batch_first() -> None:
    model, x = Before("GRU"), batch(5, 20, WIDTH)
    with Watch(model, ["inp"]) as watch:
        model(x, attention_mask=torch.ones(5, 20))
        model(x, attention_mask=torch.ones(5, 20))
    assert [(each.axes, each.guess) for each in watch.readings["inp"]] == [("batch length features", None)] * 2


class Streams(nn.Module):
    """Several vectors for each token."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.dim, self.embed, self.mix = dim, nn.Embedding(9, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        x = self.embed(input_ids)
        out: Tensor = self.mix(torch.stack([x, x.sin(), x.cos()], self.dim))
        return out


@pytest.mark.parametrize("dim", [0, 2])
@pytest.mark.parametrize("shape", [(3, 24), (3, 3), (16, 16)])
def test_streams_are_features(dim: int, shape: tuple[int, int]) -> None:
    model, ids = Streams(dim), torch.randint(0, 9, shape)
    h = model(ids)
    merged = (h.movedim(0, 2) if dim == 0 else h).flatten(2)
    assert of(model, "mix", ids) == pytest.approx(direct(*merged))


class Heads(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.q, self.heads = nn.Linear(WIDTH, WIDTH), nn.Identity()

    def forward(self, x: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        q = self.q(x)
        out: Tensor = self.heads(q.view(*q.shape[:2], 4, -1).transpose(1, 2))
        return out


def test_heads_are_features() -> None:
    model, x, mask = Heads(), batch(4, 4, WIDTH), torch.ones(4, 4)
    assert of(model, "heads", x, mask) == pytest.approx(direct(*model.q(x)))


def test_a_layout_says_it() -> None:
    model, x = nn.Sequential(nn.Identity()), batch(2, 16, 8, 16)
    with Watch(model, ["0"], layout="batch height width channels") as watch:
        model(x)
    assert watch.entropies["0"] == pytest.approx(direct(*x.flatten(1, 2)))
    with Watch(model, ["0"], layout={"0": "batch channels length heads"}) as watch:
        model(x)
    assert watch.entropies["0"] == pytest.approx(direct(*x.permute(0, 2, 1, 3).flatten(2)))
    with Watch(model, ["0"], layout="sequence batch features") as watch:
        model(x[0])
        reading = watch.readings["0"][0]
    with Watch(model, ["0"], layout="batch heads features") as watch:
        model(x[0])
    assert torch.equal(watch.readings["0"][0].rows, x[0].flatten(1)[None])
    with Watch(model, ["0"], layout="heads features") as watch:
        model(x[0, 0])
    assert torch.equal(watch.readings["0"][0].rows, x[0, 0].flatten()[None, None])
    assert torch.equal(reading.rows, x[0].transpose(0, 1))
    assert reading.rows.untyped_storage().data_ptr() == x.untyped_storage().data_ptr()


def test_what_is_ambiguous_or_does_not_fit_is_refused() -> None:
    model = nn.Sequential(nn.Identity())
    message = (
        r'output of module "0" \(Identity\), of shape \(2, 5, 6, 7\), can be read as '
        r'"batch height width channels" or as "batch channels height width"; pass layout='
    )
    with Watch(model, ["0"]), pytest.raises(ValueError, match=message):
        model(batch(2, 5, 6, 7))
    with (
        Watch(model, ["0"], layout="batch length features"),
        pytest.raises(ValueError, match=r"names 3 axes.*module \"0\" has 4, of shape \(2, 5, 6, 7\)"),
    ):
        model(batch(2, 5, 6, 7))
    for options, error, found in (
        ({"layout": "batch colour"}, ValueError, 'has "colour"; the words for axes are batch, channels'),
        ({"layout": "batch length"}, ValueError, "one axis of features at least"),
        ({"layout": 3}, TypeError, "layout must be a string"),
        ({"layout": {"x*": "batch features"}}, ValueError, "layout has a key 'x\\*' that matches none of the layers 0"),
        ({"mask": batch(2, 5)}, TypeError, "mask must be a function or None, found Tensor"),
        ({"segments": 3}, TypeError, "segments must be a function or None, found int"),
        ({"output": 3}, TypeError, "output must be a function or None, found int"),
    ):
        with pytest.raises(error, match=found):
            Layout(model, {"0": model[0]}, **options)  # type: ignore[arg-type]


# Rows


class Wrapper(nn.Module):
    """Makes the mask itself, in the form that ``made`` says."""

    def __init__(self, made: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.encoder, self.made = Encoder(), made

    def forward(self, x: Tensor, padding: Tensor) -> Tensor:
        out: Tensor = self.encoder(x, attention_mask=self.made(padding))
        return out


def causal(padding: Tensor) -> Tensor:
    keep = torch.ones(padding.shape[1], padding.shape[1], dtype=torch.bool).tril()
    return (keep & ~padding[:, None, :])[:, None]


FORMS: dict[str, Callable[[Tensor], Tensor]] = {
    "bool": lambda padding: ~padding,
    "int": lambda padding: (~padding).long(),
    "float": lambda padding: (~padding).float(),
    "additive": lambda padding: torch.zeros(padding.shape).masked_fill(padding, -1e9),
    "local": lambda padding: (
        torch.zeros(padding.shape).masked_fill(padding, -1e4) + F.one_hot(torch.tensor(0), padding.shape[1]) * 1e4
    ),
    "4-D": causal,
    "4-D additive": lambda padding: torch.zeros(causal(padding).shape).masked_fill(~causal(padding), -1e9),
    "4-D hiding": lambda padding: ~causal(padding),
    "keys": lambda padding: ~padding[:, None, None, :],
    "3-D": lambda padding: ~padding[:, None, :],
}


@pytest.mark.parametrize("padded", [True, False])
@pytest.mark.parametrize("form", FORMS)
def test_a_mask_of_every_form(form: str, padded: bool) -> None:
    model, x = Wrapper(FORMS[form]), batch(3, 20, WIDTH)
    padding = ~lengths([20, 5, 11], 20) if padded else torch.zeros(3, 20, dtype=torch.bool)
    h = model.encoder.l(x)
    expected = direct(h[0], h[1, :5], h[2, :11]) if padded else direct(*h)
    assert of(model, "encoder.l", x, padding) == pytest.approx(expected)


class TwoTowers(nn.Module):
    """The mask of the text fits the image by chance."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.words, self.text = nn.Embedding(9, WIDTH), nn.TransformerEncoderLayer(WIDTH, 2, 8, 0.0, batch_first=True)
        self.patches, self.image = nn.Conv2d(3, WIDTH, 2, 2), nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh())
        self.latents = nn.Parameter(torch.randn(16, WIDTH))
        self.read, self.fused = nn.Linear(WIDTH, WIDTH), nn.Identity()

    def forward(self, input_ids: Tensor, pixel_values: Tensor, attention_mask: Tensor) -> Tensor:
        text = self.text(self.words(input_ids))
        image = self.image(self.patches(pixel_values).flatten(2).mT)
        latents = F.scaled_dot_product_attention(self.latents.expand(len(text), -1, -1), text, text)
        fused = self.fused(image + F.scaled_dot_product_attention(image, text, text))
        return text.mean() + image.mean() + self.read(latents).mean() + fused.mean()


def test_a_text_mask_does_not_reach_an_image() -> None:
    model, ids, image = TwoTowers(), torch.randint(0, 9, (2, 16)), batch(2, 3, 8, 8)
    mask = lengths([5, 16], 16).long()
    with Watch(model, ["text", "image.1", "fused", "patches"]) as watch:
        for _ in range(2):
            watch.clear()
            model(ids, image, mask)
            h = model.image(model.patches(image).flatten(2).mT)
            assert watch.entropies["image.1"] == pytest.approx(direct(*h))
            assert watch.readings["fused"][0].live is None
            live = watch.readings["text"][0].live
            assert live is not None
            assert torch.equal(live, mask.bool())


def test_a_guess_is_told_where_nothing_was_followed() -> None:
    model, ids, image = TwoTowers(), torch.randint(0, 9, (2, 16)), batch(2, 3, 8, 8)
    with Watch(model, ["image.1"]) as watch:
        watch.layout._looks = 99
        with pytest.warns(UserWarning, match=r'layer "image.1" count is a guess: attention_mask.*pixel_values'):
            model(ids, image, lengths([5, 16], 16))


class Subsampled(nn.Module):
    def __init__(self, kind: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.kind, self.l, self.conv = kind, nn.Linear(WIDTH, WIDTH), nn.Conv1d(WIDTH, WIDTH, 3, 2, 1)
        self.prefix = nn.Parameter(torch.randn(3, WIDTH))

    def forward(self, x: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        if self.kind == "strided":
            x = x[:, ::2]
        elif self.kind == "convolved":
            x = self.conv(x.mT).mT
        elif self.kind == "prefixed":
            x = torch.cat([self.prefix.expand(len(x), -1, -1), x], 1)
        elif self.kind == "cut":
            x = x[:, 1:]
        elif self.kind == "padded":
            x = F.pad(x, (0, 0, 4, 0))
        out: Tensor = self.l(x)
        return out


@pytest.mark.parametrize("kind", ["strided", "convolved"])
def test_a_mask_that_does_not_fit_is_told_once(kind: str) -> None:
    model, mask, x = Subsampled(kind), lengths([32, 9], 32).long(), batch(2, 32, WIDTH)
    with Watch(model, ["l"]) as watch:
        with pytest.warns(
            UserWarning, match=r'attention_mask of shape \(2, 32\) does not fit layer "l".*\(2, 16\).*mask='
        ):
            model(x, mask)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            model(x, mask)
            model(x)
    assert all(reading.live is None for reading in watch.readings["l"])


class Dropping(nn.Module):
    """Takes every so many tokens: one at first."""

    def __init__(self, flat: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.l, self.step, self.flat = nn.Linear(WIDTH, WIDTH), 1, flat

    def forward(self, x: Tensor, attention_mask: Tensor) -> Tensor:
        x = x[:, :: self.step]
        out: Tensor = self.l(x.flatten(0, 1) if self.flat else x)
        return out


@pytest.mark.parametrize("flat", [False, True])
def test_a_mask_that_fits_no_more(flat: bool) -> None:
    model, mask, x = Dropping(flat), lengths([32, 9], 32), batch(2, 32, WIDTH)
    with Watch(model, ["l"]) as watch:
        model(x, mask)
        assert torch.equal(watch.readings["l"][0].live, mask)  # type: ignore[arg-type]
        model.step = 2
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            model(x, mask)
        assert watch.readings["l"][1].live is None
        assert flat or '"l"' in str(said[0].message)
        assert watch.readings["l"][1].rows.shape == ((1, 32, WIDTH) if flat else (2, 16, WIDTH))


@pytest.mark.parametrize(("kind", "start"), [("prefixed", 3), ("cut", -1), ("padded", 4)])
def test_a_prefix_of_fixed_length(kind: str, start: int) -> None:
    model = Subsampled(kind)
    with Watch(model, ["l"]) as watch:
        for length in (20, 20, 30):
            mask = lengths([length, 9], length)
            model(batch(2, length, WIDTH), mask)
            live = watch.readings["l"][-1].live
            assert live is not None
            expected = F.pad(mask, (start, 0), value=True) if start > 0 else mask[:, -start:]
            assert torch.equal(live, expected)


class MaskInADict(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.model = Encoder()

    def forward(self, features: dict[str, Tensor]) -> Tensor:
        return self.model.forward(**features)


def test_a_mask_inside_a_dict_is_found() -> None:
    model, x, mask = MaskInADict(), batch(2, 16, WIDTH), lengths([5, 16], 16).float()
    h = model.model.l(x)
    assert of(model, "model.l", {"x": x, "attention_mask": mask}) == pytest.approx(direct(h[0, :5], h[1]))


class InsideOfArguments(nn.Module):
    """Its argument is a tuple, or a dataclass."""

    def __init__(self) -> None:
        super().__init__()
        self.l = nn.Linear(WIDTH, WIDTH)

    def forward(self, given: Any) -> Tensor:
        out: Tensor = self.l(given[0] if isinstance(given, tuple) else given.x)
        return out


@dataclasses.dataclass
class Given:
    x: Tensor
    attention_mask: Tensor
    kind: str = "text"


def test_a_mask_inside_a_dataclass_is_found() -> None:
    model, x, mask = InsideOfArguments(), batch(2, 16, WIDTH), lengths([5, 16], 16).float()
    h = model.l(x)
    assert of(model, "l", Given(x, mask)) == pytest.approx(direct(h[0, :5], h[1]))
    assert of(model, "l", (x, "text")) == pytest.approx(direct(*h))


def test_a_mask_of_an_image_has_its_positions() -> None:
    model, x, keep = nn.Sequential(nn.Conv2d(4, WIDTH, 1)), batch(2, 4, 4, 6), torch.ones(2, 4, 6, dtype=torch.bool)
    keep[1, 2:] = False
    h = model(x).flatten(2).mT
    with Watch(model, ["0"], mask=lambda call: keep) as watch:
        model(x)
    assert watch.entropies["0"] == pytest.approx(direct(h[0], h[1, :12]))


def test_rows_of_no_argument_have_a_mask_by_its_shape() -> None:
    model, h = Operation(lambda _: batch(2, 9, WIDTH)), batch(2, 9, WIDTH)
    with Watch(model, ["out"]) as watch, pytest.warns(UserWarning, match="could not be followed from the arguments"):
        model(batch(2, 9, 4), lengths([5, 9], 9).float())
    assert watch.entropies["out"] == pytest.approx(direct(h[0, :5], h[1]))


class OfSomeMask(Encoder):
    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:  # type: ignore[override]
        out: Tensor = self.l(x)
        return out


def test_an_argument_that_may_be_a_mask_is_told() -> None:
    model = OfSomeMask()
    with Watch(model, ["l"]), pytest.warns(UserWarning, match=r'argument "mask" of shape \(2, 9\) may mask the rows'):
        model(batch(2, 9, WIDTH), torch.ones(2, 9, dtype=torch.bool))


class Bypassed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.model = Encoder()

    def forward(self, x: Tensor, padding: Tensor) -> Tensor:
        return self.model.forward(x, attention_mask=~padding)


def test_a_forward_that_is_called_past_its_hooks_is_told() -> None:
    model = Bypassed()
    with Watch(model, ["model.l"]), pytest.warns(UserWarning, match=r'"model" takes attention_mask, but its forward'):
        model(batch(2, 16, WIDTH), torch.zeros(2, 16, dtype=torch.bool))


class SequenceFirstInside(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.l = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor, attention_mask: Tensor) -> Tensor:
        out: Tensor = self.l(x.transpose(0, 1)).transpose(0, 1)
        return out


@pytest.mark.parametrize("length", [24, 3])
def test_a_sequence_that_comes_first_inside(length: int) -> None:
    model, x = SequenceFirstInside(), batch(3, length, WIDTH)
    assert of(model, "l", x, torch.ones(3, length)) == pytest.approx(direct(*model.l(x)))


class Flat(nn.Module):
    def __init__(self, sequence_first: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.sequence_first, self.mlp = sequence_first, nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor, attention_mask: Tensor) -> Tensor:
        x = x.transpose(0, 1) if self.sequence_first else x
        out: Tensor = self.mlp(x.reshape(-1, WIDTH))
        return out


@pytest.mark.parametrize("sequence_first", [False, True])
def test_flat_rows_do_not_cross_sequences(sequence_first: bool) -> None:
    model, x = Flat(sequence_first), batch(3, 20, WIDTH) + 3 * batch(3, 1, WIDTH, seed=3)
    assert of(model, "mlp", x, torch.ones(3, 20)) == pytest.approx(direct(*model.mlp(x)))


class Expert(nn.Module):
    """Gets tokens by their numbers: by chance as many as there are."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.l = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor, which: Tensor, attention_mask: Tensor) -> Tensor:
        out: Tensor = self.l(x.flatten(0, 1)[which])
        return out


def test_rows_that_were_sent_to_an_expert_have_no_order() -> None:
    model, x, which = Expert(), batch(2, 16, WIDTH), torch.randint(0, 32, (32,))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = of(model, "l", x, which, lengths([16, 4], 16))
    assert found == pytest.approx(direct(model.l(x.flatten(0, 1)[which])))


# mask= and segments=


def test_a_mask_that_is_picked() -> None:
    model, x, mask = Encoder(), batch(3, 20, WIDTH), lengths([20, 5, 11], 20)
    h = model.l(x)
    with Watch(model, ["l"], mask=lambda call: mask) as watch:
        model(x, attention_mask=torch.zeros(3, 20))
    assert watch.entropies["l"] == pytest.approx(direct(h[0], h[1, :5], h[2, :11]))
    with Watch(model, ["l"], mask=lambda call: None) as watch:
        model(x, attention_mask=mask)
    assert watch.entropies["l"] == pytest.approx(direct(*h))
    message = r'mask= gave shape \(3, 19\), but the output of module "l" has \(batch, seq\) = \(3, 20\)'
    with Watch(model, ["l"], mask=lambda call: mask[:, 1:]), pytest.raises(ValueError, match=message):
        model(x)
    with Watch(model, ["l"], mask={"l": lambda call: 3}), pytest.raises(TypeError, match="found int"):  # type: ignore[dict-item, return-value]
        model(x)


class Packed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.l = nn.Embedding(50, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, input_ids: Tensor, position_ids: Any = None, cu_seqlens: Any = None, docs: Any = None) -> Tensor:
        out: Tensor = self.l(self.embed(input_ids).squeeze(0))
        return out


@pytest.mark.parametrize("how", ["position_ids", "cu_seqlens", "segments"])
@pytest.mark.parametrize("flat", [False, True])
def test_windows_do_not_cross_documents(how: str, flat: bool) -> None:
    model, sizes = Packed(), [5, 1, 20, 6]
    ids = torch.randint(0, 50, (1, 32))
    given = {
        "position_ids": torch.cat([torch.arange(size) for size in sizes])[None],
        "cu_seqlens": torch.tensor([0, 5, 6, 26, 32]),
        "segments": torch.arange(4).repeat_interleave(torch.tensor(sizes))[None],
    }
    options: dict[str, Any] = {"segments": lambda call: call["docs"]} if how == "segments" else {}
    call = {"docs" if how == "segments" else how: given[how]}
    with Watch(model, ["embed", "l"], **options) as watch:
        model(ids, **call)
    h = model.embed(ids)[0]
    assert watch.entropies["embed"] == pytest.approx(direct(*h.split(sizes)))
    assert watch.entropies["l"] == pytest.approx(direct(*model.l(h).split(sizes)))


@pytest.mark.parametrize("shape", [(3, 20), (1, 20), (20,)])
def test_positions_of_all_sequences_mark_documents(shape: tuple[int, ...]) -> None:
    """Models take position_ids that all sequences of a batch share."""
    model, ids = Packed(), torch.randint(0, 50, (3, 20))
    positions = torch.cat([torch.arange(12), torch.arange(8)])
    positions = positions.reshape(shape) if len(shape) == 1 else positions.expand(shape)
    with Watch(model, ["embed"]) as watch:
        model(ids, position_ids=positions)
    parts = [part for h in model.embed(ids) for part in h.split([12, 8])]
    assert watch.entropies["embed"] == pytest.approx(direct(*parts))


DOCUMENTS: dict[str, tuple[list[int], list[int]]] = {
    "packed": ([*range(12), *range(8)], [12, 8]),
    "documents of one token": ([0, *range(9), 0, *range(9)], [1, 9, 1, 9]),
    "from one on": ([*range(1, 13), *range(1, 9)], [12, 8]),
    "the end of a document first": ([*range(7, 15), *range(12)], [8, 12]),
    "one sequence": ([*range(20)], [20]),
    "a part behind a cache": ([*range(30, 50)], [20]),
    "reversed": ([*range(19, -1, -1)], [20]),
    "shuffled": ([*range(0, 20, 2), *range(19, 0, -2)], [20]),
    "one for each frame": ([i // 4 for i in range(20)], [20]),
    "rows of an image": ([0, 1, 2, *(3,) * 9, *range(4, 12)], [20]),
    "all the same": ([0] * 20, [20]),
}


@pytest.mark.parametrize("name", DOCUMENTS)
def test_positions_mark_documents_where_each_counts_from_the_first(name: str) -> None:
    model, ids = Packed(), torch.randint(0, 50, (1, 20))
    positions, sizes = DOCUMENTS[name]
    with Watch(model, ["embed"]) as watch:
        model(ids, position_ids=torch.tensor([positions]))
    assert watch.entropies["embed"] == pytest.approx(direct(*model.embed(ids)[0].split(sizes)))


def test_documents_are_numbered_in_one_graph() -> None:
    positions = torch.tensor([positions for positions, _ in DOCUMENTS.values()])
    live = torch.ones_like(positions, dtype=torch.bool)
    live[:, 15:] = False
    compiled = torch.compile(restarted, backend="eager", fullgraph=True)
    for mask in (None, live):
        assert torch.equal(compiled(positions, mask), restarted(positions, mask))


class PackedMasked(Packed):
    def forward(self, input_ids: Tensor, attention_mask: Any = None, position_ids: Any = None) -> Tensor:  # type: ignore[override]
        out: Tensor = self.l(self.embed(input_ids))
        return out


@pytest.mark.parametrize("pad", [0, 1])
@pytest.mark.parametrize("left", [False, True])
def test_positions_of_padding_say_nothing(left: bool, pad: int) -> None:
    """On the left, transformers gives padding the position 1."""
    model, ids = PackedMasked(), torch.randint(0, 50, (2, 20))
    documents, padding = [*range(9), *range(6)], [pad] * 5
    positions = torch.tensor([padding + documents if left else documents + padding, [*range(20)]])
    mask = torch.ones(2, 20, dtype=torch.bool)
    mask[0, slice(5) if left else slice(15, None)] = False
    with Watch(model, ["embed"]) as watch:
        model(ids, attention_mask=mask, position_ids=positions)
    (reading,) = watch.readings["embed"]
    assert reading.segments is not None
    live = [reading.segments[row][mask[row]] for row in range(2)]
    assert [torch.unique_consecutive(ids, return_counts=True)[1].tolist() for ids in live] == [[9, 6], [20]]


# Calls


class Raising(Encoder):
    def forward(self, x: Tensor, attention_mask: Tensor | None = None, error: Any = None) -> Tensor:
        out: Tensor = self.l(x)
        if error is not None:
            raise error("in forward")
        return out


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_a_call_that_raises_leaves_nothing(error: type[BaseException]) -> None:
    model, x, mask = Raising(), batch(2, 16, WIDTH), lengths([5, 16], 16)
    with Watch(model, ["l"]) as watch:
        with pytest.raises(error):
            model(x, mask, error)
        watch.clear()
        model(x)
        assert watch.readings["l"][0].live is None
        assert watch.layout.calls == []
    assert torch.overrides._get_current_function_mode() is None
    h = model.l(x)
    assert of(model, "l", x, mask) == pytest.approx(direct(h[0, :5], h[1]))


class Nested(nn.Module):
    """Calls itself with another mask."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.l = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor, attention_mask: Tensor, again: Tensor | None = None) -> Tensor:
        if again is not None:
            self(x, again)
        out: Tensor = self.l(x)
        return out


def test_calls_inside_calls_have_masks_of_their_own() -> None:
    model, x, inner, outer = Nested(), batch(2, 16, WIDTH), lengths([5, 16], 16), lengths([16, 9], 16)
    with Watch(model, ["l"]) as watch:
        for _ in range(2):
            watch.clear()
            model(x, outer, inner)
            assert [torch.equal(r.live, m) for r, m in zip(watch.readings["l"], (inner, outer), strict=True)] == [
                True,
                True,
            ]  # type: ignore[arg-type]


class Siamese(nn.Module):
    """One encoder for two sequences of one length."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.l = nn.Linear(WIDTH, WIDTH)

    def forward(
        self, query: Tensor, document: Tensor, query_attention_mask: Tensor, document_attention_mask: Tensor
    ) -> Any:
        return self.l(query), self.l(document)


def test_two_sequences_of_one_length_through_one_layer() -> None:
    model, masks = Siamese(), (lengths([5, 16], 16), lengths([16, 9], 16))
    with Watch(model, ["l"]) as watch:
        for seed in range(2):
            watch.clear()
            model(batch(2, 16, WIDTH, seed=seed), batch(2, 16, WIDTH, seed=9), *masks)
            assert [torch.equal(r.live, m) for r, m in zip(watch.readings["l"], masks, strict=True)] == [True, True]  # type: ignore[arg-type]


class Translator(nn.Module):
    """An encoder and a decoder on sequences of one length."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.model = nn.Transformer(WIDTH, 2, 1, 1, 16, 0.0, batch_first=True)

    def forward(self, x: Tensor, y: Tensor, x_padding: Tensor | None, y_padding: Tensor | None) -> Tensor:
        out: Tensor = self.model(
            x, y, src_key_padding_mask=x_padding, tgt_key_padding_mask=y_padding, memory_key_padding_mask=x_padding
        )
        return out


@pytest.mark.parametrize("additive", [False, True])
@pytest.mark.parametrize("decoder", [False, True])
def test_masks_of_torchs_transformers(additive: bool, decoder: bool) -> None:
    model, x, y = Translator(), batch(2, 16, WIDTH), batch(2, 16, WIDTH, seed=2)
    masks = lengths([5, 16], 16), lengths([16, 9], 16)
    given = [torch.zeros(2, 16).masked_fill(~mask, -torch.inf) if additive else ~mask for mask in masks]
    layers = ["model.encoder.layers.0", "model.decoder.layers.0", "model.decoder.layers.0.self_attn"]
    with Watch(model, layers) as watch:
        for _ in range(2):
            watch.clear()
            model(x, y, given[0], given[1] if decoder else None)
            source, target, attention = (watch.readings[name][0].live for name in layers)
            assert source is not None
            assert torch.equal(source, masks[0])
            for live in (target, attention):
                assert (live is None) != decoder
                assert live is None or torch.equal(live, masks[1])


class LabelsOnly(nn.Module):
    """As T5 or BART, fine-tuned."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.encoder, self.decoder = (
            nn.Embedding(9, WIDTH),
            nn.Linear(WIDTH, WIDTH),
            nn.Linear(WIDTH, WIDTH),
        )

    def forward(
        self, input_ids: Tensor, attention_mask: Any = None, decoder_input_ids: Any = None, labels: Any = None
    ) -> Tensor:
        if decoder_input_ids is None:
            decoder_input_ids = labels.new_zeros(labels.shape)
            decoder_input_ids[:, 1:] = labels[:, :-1].clone()
            decoder_input_ids.masked_fill_(decoder_input_ids == -100, 0)
        h = self.encoder(self.embed(input_ids))
        out: Tensor = self.decoder(self.embed(decoder_input_ids) + h.mean(1, keepdim=True))
        return out


def test_labels_of_an_encoder_decoder_are_its_padding() -> None:
    model, ids, mask, target = LabelsOnly(), torch.randint(0, 9, (2, 16)), lengths([5, 16], 16), lengths([16, 9], 16)
    labels = torch.randint(0, 9, (2, 16)).masked_fill(~target, -100)
    with Watch(model, ["encoder", "decoder"]) as watch:
        for _ in range(2):
            watch.clear()
            model(ids, mask, labels=labels)
            assert torch.equal(watch.readings["encoder"][0].live, mask)  # type: ignore[arg-type]
            assert torch.equal(watch.readings["decoder"][0].live, target)  # type: ignore[arg-type]


class Cached(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.l = nn.Embedding(9, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        out: Tensor = self.l(self.embed(input_ids))
        return out


def test_a_mask_is_also_of_tokens_that_are_cached() -> None:
    model = Cached()
    with Watch(model, ["l"]) as watch:
        for length in (16, 1, 3):
            mask = lengths([16, 14], 16)
            model(torch.randint(0, 9, (2, length)), mask)
            assert torch.equal(watch.readings["l"][-1].live, mask[:, -length:])  # type: ignore[arg-type]


# Under torch.compile


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize("looked", [False, True], ids=["at once", "after an eager pass"])
def test_compiled_readings_are_those_of_eager_mode(looked: bool) -> None:
    torch._dynamo.reset()
    x, mask = batch(3, 20, WIDTH), lengths([20, 5, 11], 20)
    found: list[Any] = []

    class Kept(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder = Encoder()

        def forward(self, x: Tensor, attention_mask: Tensor) -> Tensor:
            out: Tensor = self.encoder(x, attention_mask=attention_mask)
            return out

    model = Kept()
    layout = Layout(model, {"encoder.l": model.encoder.l})

    def read(module: nn.Module, args: Any, out: Tensor) -> Tensor:
        reading = layout.read("encoder.l", out)
        found.append(reading.why_axes)
        assert reading.live is not None
        return out * reading.live[..., None]

    for module, calls in layout.callers():
        module.register_forward_pre_hook(
            lambda _, args, kwargs, calls=calls: calls.enter(args, kwargs, lambda: True), with_kwargs=True, prepend=True
        )
        module.register_forward_hook(lambda *_, calls=calls: calls.leave(), always_call=True)
    model.encoder.l.register_forward_hook(read)
    if looked:
        model(x, mask)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    for _ in range(2):
        out = compiled(x, mask)
        expected = F.linear(x, model.encoder.l.weight, model.encoder.l.bias) * mask[..., None]
        torch.testing.assert_close(out, expected)
