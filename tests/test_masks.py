"""Which tokens count: the masks that a call brings, and those that mask= picks."""

from __future__ import annotations

import re
import warnings
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from gapt_optim import EntropyConfig, GAPTConfig, GAPTOptimizer, GateConfig, RepresentationHook
from gapt_optim.layout import reading
from gapt_optim.profiling import profile
from gapt_optim.windows import windows_of

from .reference import reference_layer_entropy

TOKENS = 11
LIVE = torch.arange(TOKENS) < torch.tensor([11, 4, 9])[:, None]
ADDED = torch.zeros(LIVE.shape).masked_fill(~LIVE, -torch.inf)
TARGET = torch.arange(TOKENS) < torch.tensor([7, 11, 5])[:, None]
COMPRESSION = GAPTConfig(gate=GateConfig(initial_phase="compression", frozen=True))


class Recorder:
    """What modules returned."""

    def __init__(self, modules: list[nn.Module]) -> None:
        self.outputs: dict[nn.Module, Tensor] = {}
        for module in modules:
            module.register_forward_hook(self)

    def __call__(self, module: nn.Module, args: Any, output: Any) -> None:
        self.outputs[module] = output[0] if isinstance(output, tuple) else output


def in_training(model: nn.Module, hook: RepresentationHook, *args: Any, **kwargs: Any) -> dict[str, float]:
    optimizer = GAPTOptimizer(torch.optim.SGD(model.parameters(), lr=0.0), hook, COMPRESSION)
    out = model(*args, **kwargs)
    loss = out if isinstance(out, Tensor) else out.logits
    optimizer.backward(loss.square().mean())
    optimizer.step()
    assert optimizer.metrics is not None
    return dict(optimizer.metrics.layer_entropy)


def measured(model: nn.Module, hook: RepresentationHook, *args: Any, **kwargs: Any) -> dict[str, float]:
    with torch.no_grad(), hook.measuring() as found:
        model(*args, **kwargs)
    return found.entropies


def encoder_decoder(kind: str) -> tuple[nn.Module, list[str]]:
    from transformers import BartConfig, BartForConditionalGeneration, T5Config, T5ForConditionalGeneration

    if kind == "t5":
        t5 = T5Config(vocab_size=20, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2, dropout_rate=0.0)
        t5.decoder_start_token_id = 0
        return T5ForConditionalGeneration(t5), ["encoder.block.0", "decoder.block.0"]
    bart = BartConfig(
        vocab_size=20, d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2, dropout=0.0,
        decoder_attention_heads=2, encoder_ffn_dim=16, decoder_ffn_dim=16, max_position_embeddings=32,
    )  # fmt: skip
    return BartForConditionalGeneration(bart), ["model.encoder.layers.0", "model.decoder.layers.0"]


@pytest.mark.parametrize("decoder", [None, TARGET], ids=["without one", "with its own"])
@pytest.mark.parametrize("kind", ["t5", "bart"])
def test_the_mask_of_an_encoder_is_not_that_of_the_decoder(kind: str, decoder: Tensor | None) -> None:
    """Not even where source and target have the same shape."""
    torch.manual_seed(0)
    model, layers = encoder_decoder(kind)
    ids = torch.randint(1, 20, (3, TOKENS))
    call: dict[str, Any] = {"input_ids": ids, "attention_mask": LIVE.long(), "labels": ids.flip(1)}
    if decoder is not None:
        call["decoder_attention_mask"] = decoder.long()
    recorder = Recorder([model.get_submodule(name) for name in layers])
    model(**call)
    expected = {
        name: float(reference_layer_entropy(recorder.outputs[model.get_submodule(name)].detach(), mask=mask))
        for name, mask in zip(layers, (LIVE, decoder), strict=True)
    }
    hook = RepresentationHook(model, layers)
    assert measured(model, hook, **call) == pytest.approx(expected, rel=1e-5)
    assert in_training(model, hook, **call) == pytest.approx(expected, rel=1e-5)
    found = {layer.name: layer.entropy().nats for layer in profile(model, [call], layers, windows=(8,)).layers}
    assert found == pytest.approx(expected, rel=1e-5)


class Reading(nn.Module):
    """Torch's own modules inside a model whose call names its padding in its own way."""

    def __init__(self) -> None:
        super().__init__()
        encoding = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
        self.encoder = nn.TransformerEncoder(encoding, 2, enable_nested_tensor=False)
        self.decoder = nn.TransformerDecoder(nn.TransformerDecoderLayer(8, 2, 16, dropout=0.0, batch_first=True), 1)

    def forward(self, source: Tensor, target: Tensor, padding: Tensor, target_padding: Tensor | None = None) -> Tensor:
        memory = self.encoder(source, src_key_padding_mask=padding)
        out: Tensor = self.decoder(target, memory, tgt_key_padding_mask=target_padding, memory_key_padding_mask=padding)
        return out


@pytest.mark.parametrize("additive", [False, True])
@pytest.mark.parametrize("target", [None, TARGET], ids=["without one", "with its own"])
def test_the_padding_of_torchs_transformers_does_not_count(target: Tensor | None, additive: bool) -> None:
    torch.manual_seed(0)
    model = Reading()
    padding, target_padding = ~LIVE, None if target is None else ~target
    if additive:
        padding = ADDED
        if target is not None:
            target_padding = torch.zeros(target.shape).masked_fill(~target, -torch.inf)
    call = (torch.randn(3, TOKENS, 8), torch.randn(3, TOKENS, 8), padding, target_padding)
    masks = {"encoder.layers.0": LIVE, "encoder.layers.1": LIVE, "decoder.layers.0": target}
    recorder = Recorder([model.get_submodule(name) for name in masks])
    model(*call)
    expected = {
        name: float(reference_layer_entropy(recorder.outputs[model.get_submodule(name)].detach(), mask=mask))
        for name, mask in masks.items()
    }
    hook = RepresentationHook(model, list(masks))
    assert in_training(model, hook, *call) == pytest.approx(expected, rel=1e-5)
    assert measured(model, hook, *call) == pytest.approx(expected, rel=1e-5)


class Masked(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 8)

    def forward(self, x: Tensor, attention_mask: Tensor) -> Tensor:
        out: Tensor = self.layer(x)
        return out


@pytest.mark.parametrize(
    "mask",
    [LIVE, LIVE.long(), LIVE.float(), 3.0 * LIVE, (~LIVE).float() * -1e9, ADDED],
    ids=["bool", "long", "float", "weights", "added to scores", "-inf"],
)  # fmt: skip
def test_every_kind_of_attention_mask(mask: Tensor) -> None:
    model, x = Masked(), torch.randn(3, TOKENS, 8)
    expected = {"layer": float(reference_layer_entropy(model.layer(x).detach(), mask=LIVE))}
    hook = RepresentationHook(model, "layer")
    assert in_training(model, hook, x, attention_mask=mask) == pytest.approx(expected, rel=1e-5)


# One function for each part of a model


class Translator(nn.Module):
    """Two sequences of different lengths."""

    def __init__(self) -> None:
        super().__init__()
        self.source, self.target, self.rest = (nn.Linear(8, 8) for _ in range(3))

    def forward(self, x: Tensor, y: Tensor, x_mask: Tensor | None, y_mask: Tensor) -> Tensor:
        out: Tensor = self.rest(self.source(x).mean(1, keepdim=True) + self.target(y))
        return out


@pytest.mark.parametrize("checkpointed", [False, True])
def test_masks_of_several_sequences(checkpointed: bool) -> None:
    torch.manual_seed(0)
    model, x, y = Translator(), torch.randn(3, 16, 8), torch.randn(3, TOKENS, 8)
    x_mask = torch.rand(3, 16) > 0.3
    picks = {"so*": lambda call: call["x_mask"], "target": lambda call: call["y_mask"]}
    hook = RepresentationHook(model, ["source", "target", "rest"], mask=picks)
    layers = [(model.source, x, x_mask), (model.target, y, LIVE)]
    expected = [float(reference_layer_entropy(layer(z).detach(), mask=mask)) for layer, z, mask in layers]
    if checkpointed:
        target = model.target
        model.target = Checkpointed(target)  # type: ignore[assignment]
        hook.remove()
        picks["target.inner"] = picks.pop("target")
        hook = RepresentationHook(model, ["source", "target.inner", "rest"], mask=picks)
    found = in_training(model, hook, x, y, x_mask, LIVE)
    assert list(found.values())[:2] == pytest.approx(expected, rel=1e-5)
    whole = float(reference_layer_entropy(model(x, y, x_mask, LIVE).detach()))
    assert found["rest"] == pytest.approx(whole, rel=1e-5)


class Checkpointed(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        from torch.utils.checkpoint import checkpoint

        out: Tensor = checkpoint(self.inner, x, use_reentrant=False)
        return out


def test_masks_of_several_sequences_are_checked() -> None:
    model = Translator()
    with pytest.raises(ValueError, match=r"mask has a key 'decoder' that matches none of the layers source, target"):
        RepresentationHook(model, ["source", "target"], mask=dict.fromkeys(("source", "decoder"), lambda call: None))
    with pytest.raises(TypeError, match=r"mask\['source'\] must be a function or None, found Tensor"):
        RepresentationHook(model, ["source"], mask={"source": LIVE})  # type: ignore[dict-item]
    hook = RepresentationHook(model, ["source"], mask={"source": lambda call: 3})  # type: ignore[dict-item, return-value]
    with pytest.raises(TypeError, match=r"mask= must give a tensor \(batch, seq\) or None, found int"):
        measured(model, hook, torch.randn(3, 16, 8), torch.randn(3, TOKENS, 8), None, LIVE)


WRONG = {
    "inverted integers": (~(~LIVE).long(), "torch.int64 with the value -1"),
    "added to scores": ((~LIVE).float() * -1e9, r"torch.float32 with the value -1e\+09"),
    "tokens": (LIVE * 7, "torch.int64 with the value 7"),
}


@pytest.mark.parametrize("name", WRONG)
def test_values_that_do_not_say_what_counts_are_refused(name: str) -> None:
    mask, message = WRONG[name]
    model, x = Masked(), torch.randn(3, TOKENS, 8)
    hook = RepresentationHook(model, "layer", mask=lambda call: call["attention_mask"])
    for _ in range(2):  # it does not become right
        with pytest.raises(ValueError, match=rf'mask= gave {message} for module "layer"; return bools'):
            in_training(model, hook, x, mask)
        hook = RepresentationHook(model, "layer", mask=lambda call: call["attention_mask"])
    optimizer = GAPTOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), hook)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        for _ in range(3):
            optimizer.backward(model(x, mask).square().mean())
            optimizer.step()
    (left_out,) = [str(each.message) for each in told if "left out" in str(each.message)]
    assert re.search(message, left_out)
    assert optimizer.metrics is not None


def test_values_are_looked_at_until_a_batch_shows_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    """Zeros alone may be a mask that is added, of a batch without padding. Afterwards nothing waits for the device."""
    model, x = Masked(), torch.randn(3, TOKENS, 8)
    hook, looks = RepresentationHook(model, "layer", mask=lambda call: call["attention_mask"]), []
    has_ones = reading.has_ones
    monkeypatch.setattr(reading, "has_ones", lambda *args: looks.append(args) or has_ones(*args))
    for mask, seen in ((torch.zeros(LIVE.shape), 1), (LIVE, 1), (LIVE.long(), 2), (LIVE.long(), 2)):
        measured(model, hook, x, mask)
        assert len(looks) == seen


def test_a_mask_of_samples() -> None:
    class Weighed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(8, 12)

        def forward(self, x: Tensor, counts: Tensor) -> Tensor:
            out: Tensor = self.layer(x)
            return out

    torch.manual_seed(0)
    model, x, counts = Weighed(), torch.randn(24, 8), torch.arange(24) < 16
    hook = RepresentationHook(model, "layer", mask=lambda call: call["counts"])
    with torch.no_grad(), hook.measuring() as found:
        model(x, counts)
    with torch.no_grad(), RepresentationHook(model, "layer").measuring() as expected:
        model(x[:16], counts)
    assert found.mean == pytest.approx(expected.mean, rel=1e-6)


# What a window with too few rows counts for


@pytest.mark.parametrize("center", [True, False])
@pytest.mark.parametrize("length", range(8, 17))
def test_a_window_without_directions_changes_nothing(length: int, center: bool) -> None:
    """Neither the entropy of a layer nor where its gradient goes."""
    torch.manual_seed(length)
    model, config = nn.Sequential(nn.Linear(6, 12)), EntropyConfig(center=center)
    x, hook = torch.randn(4, length, 6), RepresentationHook(model, "0")

    def entropy(part: Tensor) -> float:
        with torch.no_grad(), hook.measuring(config) as found:
            model(part)
        return found.mean

    says = length % 8 >= 2 + center
    whole, first = entropy(x), entropy(x[:, :8])
    if length == 16 or says:
        assert whole != pytest.approx(first, rel=1e-4)
    else:
        assert whole == pytest.approx(first, rel=1e-6)


@pytest.mark.parametrize("cut", [(65,), (64, 1), (32, 32, 1), (16, 49), (8, 8, 40, 9)])
def test_how_data_is_cut_into_batches_does_not_matter(cut: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(6, 12)), torch.randn(65, 6)
    hook, parts = RepresentationHook(model, "0"), torch.split(x, cut)

    def all_of(parts: Sequence[Tensor]) -> list[float]:
        with torch.no_grad(), hook.measuring() as found:
            for part in parts:
                model(part)
        m = found.measures["0"]
        return [found.mean, m.linear_entropy, m.centered_cosine_entropy, m.norm_ratio, m.mean_share]

    whole = all_of((x,))
    assert all_of(parts) == pytest.approx(whole, rel=1e-5)
    assert whole[0] == pytest.approx(float(reference_layer_entropy(model(x).detach())), rel=1e-5)
    found = profile(model, parts, "0", windows=(8,)).layers[0]
    assert found.entropy().nats == pytest.approx(whole[0], rel=1e-5)


@pytest.mark.parametrize("rows", [[], [0], [0, 1], [2]], ids=str)
def test_windows_of_documents_are_as_long_as_the_longest(rows: list[int]) -> None:
    """Also behind sequences of which no token counts."""
    segments = torch.tensor([[0, 0, 0, 1], [0, 1, 1, 1], [0, 0, 1, 1]])
    live = torch.ones(3, 4, dtype=torch.bool)
    live[rows] = False
    longest = max(int(own[kept].bincount().max()) for own, kept in zip(segments, live, strict=True) if kept.any())
    windows = windows_of(3, 4, None, live, segments)
    assert windows.size == longest
    assert windows.keep is not None
    assert int(windows.keep.sum()) == int(live.sum())


@given(data=st.data(), batch=st.integers(1, 3), length=st.integers(1, 12), size=st.none() | st.integers(1, 5))
def test_windows_of_documents_hold_the_rows_that_count(
    data: st.DataObject, batch: int, length: int, size: int | None
) -> None:
    """Of one document each, from its first row that counts on, with holes where rows between do not."""
    numbers = st.lists(st.integers(0, 2), min_size=batch * length, max_size=batch * length)
    segments = torch.tensor(data.draw(numbers)).reshape(batch, length)
    live = torch.tensor(data.draw(numbers)).reshape(batch, length) > 0
    documents: list[list[int]] = []  # places of rows that count
    for row in range(batch):
        for column in range(length):
            if column == 0 or segments[row, column] != segments[row, column - 1]:
                documents.append([])
            if live[row, column]:
                documents[-1].append(row * length + column)
    documents = [document for document in documents if document]
    longest = max((document[-1] - document[0] + 1 for document in documents), default=1)
    rows = longest if size is None or size >= length else size
    expected = [
        [place for place in document if begin <= place < begin + rows]
        for document in documents
        for begin in range(document[0], document[-1] + 1, rows)
    ]

    windows = windows_of(batch, length, size, live, segments)
    assert windows.places is not None
    assert windows.keep is not None
    pairs = zip(windows.places, windows.keep, strict=True)
    found = [places[keep].tolist() for places, keep in pairs]
    assert windows.size == rows
    assert [places for places in found if places] == [places for places in expected if places]
