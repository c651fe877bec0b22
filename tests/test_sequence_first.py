"""Modules that return (seq, batch, d): windows are still cut along the sequence."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.nn import functional as F

from gapt_optim import EntropyConfig, GAPTOptimizer, RepresentationHook
from gapt_optim.layout import puts_sequence_first

from .loops import assert_same
from .models import MLP
from .reference import reference_layer_entropy
from .training import config, distance, gradients, wrapped


def encoder_layer(batch_first: bool) -> nn.Module:
    return nn.TransformerEncoderLayer(6, 2, 8, dropout=0.0, batch_first=batch_first)


class Attention(nn.Module):
    def __init__(self, batch_first: bool) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(6, 2, batch_first=batch_first)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.attention(x, x, x)[0]
        return found


class Recurrent(nn.Module):
    def __init__(self, kind: type[nn.RNNBase], batch_first: bool, **options: Any) -> None:
        super().__init__()
        self.rnn = kind(6, 6, batch_first=batch_first, **options)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.rnn(x)[0]
        return found


class Decoder(nn.Module):
    def __init__(self, batch_first: bool) -> None:
        super().__init__()
        layer = nn.TransformerDecoderLayer(6, 2, 8, dropout=0.0, batch_first=batch_first)
        self.decoder = nn.TransformerDecoder(layer, 2)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.decoder(x, x)
        return found


def encoder(batch_first: bool) -> nn.Module:
    return nn.TransformerEncoder(encoder_layer(batch_first), 2, enable_nested_tensor=False)


def named(module: nn.Module, name: str) -> nn.Module:
    """``module`` as a part of another, under ``name``."""
    model = nn.Sequential()
    model.add_module(name, module)
    return model


CASES: dict[str, tuple[Callable[[bool], nn.Module], str]] = {
    "LSTM": (lambda first: Recurrent(nn.LSTM, first), "rnn"),
    "LSTM both ways": (lambda first: Recurrent(nn.LSTM, first, bidirectional=True), "rnn"),
    "GRU": (lambda first: Recurrent(nn.GRU, first), "rnn"),
    "RNN": (lambda first: Recurrent(nn.RNN, first), "rnn"),
    "attention": (Attention, "attention"),
    "encoder layer": (lambda first: named(encoder_layer(first), "layer"), "layer"),
    "encoder": (lambda first: named(encoder(first), "encoder"), "encoder"),
    "layers of an encoder": (lambda first: named(encoder(first), "encoder"), "encoder.layers.*"),
    "parts of a layer": (lambda first: named(encoder(first), "encoder"), "encoder.layers.*.linear2"),
    "checkpointed layer": (lambda first: named(checkpoint_wrapper(encoder_layer(first)), "layer"), "layer"),
    "decoder": (Decoder, "decoder"),
    "layers of a decoder": (Decoder, "decoder.layers.*"),
}


def twins(name: str) -> tuple[nn.Module, nn.Module, str]:
    """A model with the sequence first, its twin with the batch first, and the glob."""
    make, layers = CASES[name]
    torch.manual_seed(1)
    model, twin = make(False), make(True)
    twin.load_state_dict(model.state_dict())
    return model.double(), twin.double(), layers


def loss_of(output: Tensor) -> Tensor:
    """Of a (batch, seq, d) output."""
    torch.manual_seed(3)
    return F.mse_loss(output, torch.randn(output.shape, dtype=output.dtype))


def data(batch: int = 3, length: int = 21) -> Tensor:
    torch.manual_seed(2)
    return torch.randn(batch, length, 6, dtype=torch.float64)


@pytest.mark.parametrize("phase", ["memorization", "compression"])
@pytest.mark.parametrize("name", CASES)
def test_windows_lie_along_the_sequence(name: str, phase: str) -> None:
    model, twin, layers = twins(name)
    x, found = data(), []
    for net, first in ((model, False), (twin, True)):
        optimizer = wrapped(net, layers, phase)
        output = net(x if first else x.transpose(0, 1))
        optimizer.backward(loss_of(output if first else output.transpose(0, 1)))
        optimizer.step()
        assert optimizer.metrics is not None
        assert optimizer.metrics.alignment is not None
        entropies, alignment = optimizer.metrics.layer_entropy, optimizer.metrics.alignment
        with optimizer.hook.measuring() as measured:
            net.eval()(x if first else x.transpose(0, 1))
        found.append((entropies, gradients(net), alignment.cosine, measured.entropies))
    (entropy, gradient, cosine, measured), (expected, expected_gradient, expected_cosine, expected_measured) = found
    assert entropy == pytest.approx(expected)
    assert distance(gradient, expected_gradient) < 1e-12
    assert cosine == pytest.approx(expected_cosine)
    assert measured == pytest.approx(expected_measured)
    assert min(entropy.values()) > 0.1


def test_the_gradient_is_that_of_the_reference() -> None:
    model, _, _ = twins("GRU")
    x = data().transpose(0, 1)
    optimizer = wrapped(model, "rnn", objective={"weight": 0.3})
    optimizer.backward(loss_of(model(x).transpose(0, 1)))
    found = gradients(model)
    model.zero_grad()
    optimizer.hook.remove()
    output = model(x).transpose(0, 1)
    (loss_of(output) + 0.3 * reference_layer_entropy(output)).backward()
    assert distance(found, gradients(model)) < 1e-9


def test_a_mask_of_batch_and_sequence_fits() -> None:
    model, twin, layers = twins("layers of an encoder")
    x, mask, found = data(), torch.ones(3, 21, dtype=torch.bool), []
    mask[0, 5:], mask[1, 17:] = False, False
    for net, first in ((model, False), (twin, True)):
        optimizer = wrapped(net, layers, mask=lambda keywords: mask)
        output = net(x if first else x.transpose(0, 1))
        optimizer.backward(loss_of(output if first else output.transpose(0, 1)))
        optimizer.step()
        assert optimizer.metrics is not None
        found.append((optimizer.metrics.layer_entropy, gradients(net)))
    assert found[0][0] == pytest.approx(found[1][0])
    assert distance(found[0][1], found[1][1]) < 1e-12


@pytest.mark.filterwarnings(  # of torch.compile
    "ignore:.*should not be instantiated:DeprecationWarning", "ignore:The .grad attribute of a Tensor:UserWarning"
)
@pytest.mark.parametrize("name", ["attention", "encoder layer", "layers of an encoder"])
def test_under_compile(name: str) -> None:
    found = []
    for compiled in (False, True):
        model, _, layers = twins(name)
        optimizer = wrapped(model, layers)
        call = torch.compile(model, fullgraph=True, backend="aot_eager") if compiled else model
        optimizer.backward(loss_of(call(data().transpose(0, 1)).transpose(0, 1)))
        optimizer.step()
        assert optimizer.metrics is not None
        found.append((optimizer.metrics.layer_entropy, gradients(model)))
    assert found[0][0] == pytest.approx(found[1][0])
    assert distance(found[0][1], found[1][1]) < 1e-12


def test_said_by_hand_where_a_module_has_no_flag() -> None:
    """Blocks of one's own have no ``batch_first``; the copy of a hook keeps what was said."""
    x, found = data(), []
    for first in (False, True):
        torch.manual_seed(1)
        model = MLP().double()
        hook = RepresentationHook(model, "blocks.*", batch_first=first)
        optimizer = GAPTOptimizer(torch.optim.SGD(model.parameters(), lr=0.0), hook, config())
        for copied in (copy.deepcopy, lambda both: pickle.loads(pickle.dumps(both))):
            net, wrapper = copied((model, optimizer))
            output = net(x if first else x.transpose(0, 1))
            wrapper.backward(loss_of(output if first else output.transpose(0, 1)))
            found.append(gradients(net))
    for other in found[1:]:
        assert distance(found[0], other) < 1e-12
    with pytest.raises(TypeError, match="batch_first must be True, False or None, found 1"):
        RepresentationHook(model, "blocks.*", batch_first=1)  # type: ignore[arg-type]


def test_the_flag_is_about_the_sequence_alone() -> None:
    """Of an LSTM, ``output=`` may give the last states, (layers, batch, d) whatever the flag says."""
    found = []
    for first in (False, True):
        torch.manual_seed(1)
        model = nn.Sequential(nn.LSTM(6, 6, num_layers=4, batch_first=first)).double()
        hook = RepresentationHook(model, "0", output=lambda out: out[1][0])
        x = data(5)
        with hook.measuring(EntropyConfig(center=False)) as measured:
            model(x if first else x.transpose(0, 1))
        found.append(measured.entropies)
    assert found[0] == pytest.approx(found[1])


def test_an_output_that_is_named_is_read_as_the_one_that_is_found() -> None:
    """``output=`` may give the very tensor that the flag is about."""
    found = []
    for output in (None, lambda out: out[0]):
        torch.manual_seed(1)
        model = nn.Sequential(nn.LSTM(6, 6)).double()
        with RepresentationHook(model, "0", output=output).measuring() as measured:
            model(data(3, 21).transpose(0, 1))
        found.append(measured.entropies)
    assert found[0] == found[1]


@pytest.mark.parametrize("outer", [False, True])
def test_the_transformer_that_is_nearest_is_asked(outer: bool) -> None:
    """Of one inside another, and of a layer that differs from the others of its stack."""
    transformer = nn.Transformer(6, 2, 2, 1, 8, custom_encoder=encoder(outer), batch_first=outer)
    transformer.encoder.layers[0] = encoder_layer(not outer)
    model = nn.Sequential(transformer)
    for layer, first in (("encoder.layers.0", not outer), ("encoder.layers.1", outer), ("decoder.layers.0", outer)):
        assert puts_sequence_first(model, f"0.{layer}") == (not first)
        assert puts_sequence_first(model, f"0.{layer}.linear1") == (not first)
    assert puts_sequence_first(model, "0.encoder") == outer  # which its first layer tells
    assert puts_sequence_first(model, "0") == (not outer)
    assert not puts_sequence_first(model, "")


def test_a_transformer_inside_a_wrapper_is_asked() -> None:
    for first in (False, True):
        model = nn.Sequential(checkpoint_wrapper(encoder(first)), nn.Sequential(encoder(first)))
        assert puts_sequence_first(model, "0") == (not first)
        assert not puts_sequence_first(model, "1")  # which may do anything with what it gets


def test_without_a_batch() -> None:
    """(seq, d) is one sequence, whatever the flag says."""
    found = []
    for first in (False, True):
        torch.manual_seed(1)
        model = Recurrent(nn.GRU, first).double()
        with RepresentationHook(model, "rnn").measuring() as measured:
            model(data(1)[0])
        found.append(measured.entropies)
    assert_same(found[0], found[1])
    assert found[0]["rnn"] > 0.1
