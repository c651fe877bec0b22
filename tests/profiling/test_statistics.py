"""Figures beside the entropies, against their definitions written out: errors, CKA, places, sequences, documents."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gapt_optim import matrix_entropy, profile
from gapt_optim.profiling.sequences import centered_without_diagonal

from . import reference
from .test_presets import live_rows
from .test_profile import gpt2, outputs, tokens

IDENTITY = nn.Sequential(nn.Identity())


def tokens_like(sequences: int = 5, length: int = 16, features: int = 12) -> Tensor:
    return torch.randn(sequences, length, features, generator=torch.Generator().manual_seed(3))


def hsic(x: Tensor, y: Tensor) -> float:
    """The unbiased estimate of Song et al., 2012, equation 5, with the linear kernel, term by term."""
    n = len(x)
    k, l = ((rows @ rows.mT).double() * (1 - torch.eye(n, dtype=torch.double)) for rows in (x.double(), y.double()))  # noqa: E741
    first = (k @ l).trace()
    second = k.sum() * l.sum() / ((n - 1) * (n - 2))
    third = 2 / (n - 2) * (k.sum(0) @ l.sum(1))
    return float((first + second - third) / (n * (n - 3)))


def test_the_standard_error_is_that_of_means_of_sequences() -> None:
    """With as many windows in each sequence, the error of a ratio is that of a mean."""
    z = tokens_like()
    value = profile(IDENTITY, [z[:2], z[2:]], "0")["0"].entropy()
    means = torch.stack([matrix_entropy(rows.reshape(2, 8, -1)).mean() for rows in z]).double()
    assert value.nats == pytest.approx(float(means.mean()), rel=1e-5)
    assert value.error == pytest.approx(float(means.std() / math.sqrt(len(z))), rel=1e-3)
    # Without first tokens, a sequence's first window and its others are still of one sequence.
    rest = profile(IDENTITY, [z], "0")["0"].entropy(first_token=False)
    means = torch.stack([torch.stack([matrix_entropy(y) for y in (rows[1:8], rows[8:])]).mean() for rows in z]).double()
    assert rest.nats == pytest.approx(float(means.mean()), rel=1e-5)
    assert rest.error == pytest.approx(float(means.std() / math.sqrt(len(z))), rel=1e-3)
    assert profile(IDENTITY, [z[:1]], "0")["0"].entropy().error is None


def test_cka_equals_its_definition_over_sequences_of_several_lengths() -> None:
    model, batches = gpt2(), tokens(mask=True)
    found = profile(model, batches)
    kept = outputs(model, found.names, lambda: [model(**batch, use_cache=False) for batch in batches])
    rows = {name: live_rows(batches, hidden) for name, hidden in kept.items()}

    def total(a: str, b: str) -> float:
        return sum(hsic(x, y) for x, y in zip(rows[a], rows[b], strict=True))

    assert found.cka is not None
    assert found.cka_names == tuple(found.names)
    for i, a in enumerate(found.names):
        for j, b in enumerate(found.names):
            expected = total(a, b) / math.sqrt(total(a, a) * total(b, b))
            assert found.cka[i][j] == pytest.approx(expected, abs=1e-4)


def test_cka_of_layers_without_common_rows_is_of_samples() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 6, 3, stride=2), nn.Flatten(), nn.Linear(54, 4))
    batches = [torch.randn(10, 3, 9, 9) for _ in range(2)]
    found = profile(model, batches, ["0", "1", "3"])
    kept = outputs(model, found.names, lambda: [model(batch) for batch in batches])

    def total(a: str, b: str) -> float:
        return sum(hsic(x.flatten(1), y.flatten(1)) for x, y in zip(kept[a], kept[b], strict=True))

    assert found.cka is not None
    expected = total("0", "3") / math.sqrt(total("0", "0") * total("3", "3"))
    assert found.cka[0][2] == pytest.approx(expected, abs=1e-4)


def test_cka_against_another_model() -> None:
    model, batches = gpt2(), tokens(mask=True)
    found = profile(model, batches, against=copy.deepcopy(model))
    assert found.cka is not None
    layers = len(found.names)
    assert found.cka_names[layers:] == tuple(f"against: {name}" for name in found.names)
    for i in range(layers):
        assert found.cka[i][layers + i] == pytest.approx(1, abs=1e-6)
        assert found.cka[i][layers:] == pytest.approx(found.cka[i][:layers], abs=1e-6)


def test_unbiased_hsic_ignores_masked_rows_and_few() -> None:
    x = torch.randn(1, 9, 5)
    keep = torch.ones(1, 9)
    keep[0, 6:] = 0
    masked = x * keep.unsqueeze(-1)
    whole = centered_without_diagonal(masked @ masked.mT, keep)
    assert float(whole.square().sum()) == pytest.approx(hsic(x[0, :6], x[0, :6]), rel=1e-4)
    keep[0, 3:] = 0
    assert not centered_without_diagonal(masked @ masked.mT, keep).any()


def test_where_the_length_lies() -> None:
    z = tokens_like(features=40)
    z[1, 5] *= 300
    z[:, 0] *= 10
    z[..., 7] *= 20
    ids = torch.arange(5 * 16).reshape(5, 16)
    model = nn.ModuleDict({"embed": nn.Embedding.from_pretrained(z.flatten(0, 1))})
    found = profile(model, [ids[:2], ids[2:]], "embed", call=lambda model, x: model.get_submodule("embed")(x))["embed"]
    assert (found.longest[0].sequence, found.longest[0].position, found.longest[0].token) == (1, 5, 21)
    assert found.longest[0].ratio == pytest.approx(float(z[1, 5].norm() / z[1].norm(dim=1).median()), rel=1e-4)
    shares = z.square().sum((0, 1)) / z.square().sum()
    assert found.channels[0] == (int(shares.argmax()), pytest.approx(float(shares.max()), rel=1e-4))
    positions = dict(found.norm_by_position)
    assert positions[0] == pytest.approx(float(z[:, 0].norm(dim=-1).mean()), rel=1e-4)
    assert positions[4] == pytest.approx(float(z[:, 4:8].norm(dim=-1).mean()), rel=1e-4)
    assert list(positions) == [0, 1, 2, 3, 4, 8]


def test_a_row_for_each_sequence() -> None:
    model, batches = gpt2(), tokens(mask=True)
    found = profile(model, batches)
    kept = outputs(model, found.names, lambda: [model(**batch, use_cache=False) for batch in batches])
    for layer in found.layers:
        live = live_rows(batches, kept[layer.name])
        pooled = {"mean": [z.mean(0) for z in live], "last": [z[-1] for z in live], "first": [z[0] for z in live]}
        assert [level.pooling for level in layer.sequence_level] == list(pooled)
        for level in layer.sequence_level:
            rows = torch.stack(pooled[level.pooling])
            assert level.rows == len(rows)
            assert level.nats == pytest.approx(reference.entropy(rows, "cosine", True, 2.0)[0], abs=1e-4)
            assert level.rankme == pytest.approx(reference.rankme(rows), rel=1e-3)


def test_entropies_of_single_sequences() -> None:
    z = tokens_like()
    found = profile(IDENTITY, list(z.split(2)), "0")["0"]
    expected = [reference.entropy(rows, "cosine", True, 2.0)[0] for rows in z]
    assert found.by_sequence == pytest.approx(expected, abs=1e-4)


def test_packed_documents_have_what_they_have_alone() -> None:
    z = tokens_like(2, 40)
    segments = torch.zeros(2, 40, dtype=torch.long)
    segments[0, 11:] = 1
    segments[1, 30:] = 1
    packed = profile(IDENTITY, [z], "0", segments=lambda call: segments)["0"]
    alone = profile(IDENTITY, [z[:1, :11], z[:1, 11:], z[1:, :30], z[1:, 30:]], "0")["0"]
    for a, b in zip(packed.entropies, alone.entropies, strict=True):
        assert a.nats == pytest.approx(b.nats, rel=1e-4, abs=1e-5), (a, b)
    assert packed.curvature == pytest.approx(alone.curvature, rel=1e-5)
    assert dict(packed.norm_by_position) == pytest.approx(dict(alone.norm_by_position), rel=1e-5)


def test_batches_of_every_kind() -> None:
    x = torch.randn(6, 9, 4)
    model = nn.Sequential(nn.Linear(4, 5))
    loader: Any = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, torch.zeros(6)), batch_size=6)
    expected = profile(model, [x], "0").layers[0].entropies
    for batches in (x, loader, [(x, 0)], iter([x]), [{"input": x}]):
        assert profile(model, batches, "0").layers[0].entropies == expected
    with pytest.raises(ValueError, match="batches holds texts; pass tokenizer="):
        profile(model, ["a text"], "0")


@pytest.mark.filterwarnings("ignore:`torch.jit.* is deprecated:DeprecationWarning")
@pytest.mark.parametrize("make", [torch.jit.script, lambda model: torch.jit.trace(model, torch.randn(3, 4))])
def test_torchscript_is_seen_from_outside_and_refused_inside(make: Callable[[nn.Module], nn.Module]) -> None:
    plain = nn.Sequential(nn.Linear(4, 5), nn.Tanh())
    scripted, data = make(plain), [torch.randn(16, 4)]
    with pytest.raises(ValueError, match=r"the model is one of TorchScript.*pass the module that it was made from"):
        profile(scripted, data, "0")
    # What that message says to do.
    around = profile(nn.Sequential(scripted, nn.Identity()), data, "1")
    assert around.layers[0].entropies == profile(nn.Sequential(plain, nn.Identity()), data, "1").layers[0].entropies

    mixed = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Sequential(nn.Linear(4, 4), nn.Tanh(), make(plain)))
    assert profile(mixed, data, ["0", "2"]).names == ["0", "2"]
    for layers in ("2.*", "2.2.0", mixed[2][2]):
        with pytest.raises(ValueError, match=r'layer "2\.2(\.0)?" is a module of TorchScript, which runs no hooks'):
            profile(mixed, data, layers)
    chosen = profile(mixed, data).names
    assert chosen
    assert not any(name.startswith("2.2") for name in chosen)
