"""The presets against the papers' definitions, written out."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from gapt_optim import profile
from gapt_optim.profiling import untrained

from .test_profile import gpt2, outputs, tokens


def centred_and_scaled(rows: Tensor) -> Tensor:
    z = rows.double() - rows.double().mean(0)
    return z / z.norm(dim=1, keepdim=True)


def clamped_entropy(z: Tensor) -> float:
    """Of the code of "Layer by layer": products of rows or, where these are fewer, of features; negative ones are 0, as
    are negative eigenvalues of what is left; over the largest entropy there can be."""
    n, d = z.shape
    products = torch.einsum("ni,nj->ij", z, z) if n > d else torch.einsum("id,jd->ij", z, z)
    p = torch.linalg.eigvalsh(torch.where(products < 0, 0, products))
    p = p[p > 0]
    p = p / p.sum()
    return float(-(p * p.log()).sum()) / min(math.log(n), math.log(d))


def erank_entropy(rows: Tensor) -> float:
    """Of Diff-eRank: the mean taken off, rows scaled, the spectrum of their covariance."""
    z = rows.double()
    z = z - z.mean(0)
    z = z / z.norm(dim=1, keepdim=True)
    covariance = z.mT @ z / len(z)
    p = torch.linalg.svdvals(covariance / covariance.trace())
    p = p[p > 1e-12]
    return float(-(p * p.log()).sum())


def live_rows(batches: list[dict[str, Tensor]], hidden: list[Tensor]) -> list[Tensor]:
    return [
        rows[mask.bool()]
        for batch, h in zip(batches, hidden, strict=True)
        for rows, mask in zip(h, batch["attention_mask"], strict=True)
    ]


@pytest.mark.parametrize("length", [21, 32])  # fewer rows than features, and more
def test_layer_by_layer(length: int) -> None:
    model, batches = gpt2(), tokens(mask=True, length=length)
    found = profile(model, batches, preset="layer-by-layer")
    kept = outputs(model, found.names, lambda: [model(**batch, use_cache=False) for batch in batches])
    for layer in found.layers:
        rows = live_rows(batches, kept[layer.name])
        prompts = [centred_and_scaled(each) for each in rows]
        value = layer.entropy("cosine", "first", alpha=1.0, window=None)
        assert value.normalized == pytest.approx(sum(map(clamped_entropy, prompts)) / len(rows), abs=1e-6)
        level = next(level for level in layer.sequence_level if level.pooling == "mean")
        assert level.normalized == pytest.approx(clamped_entropy(torch.stack([z.mean(0) for z in prompts])), abs=1e-6)


@pytest.mark.parametrize("length", [21, 32])
def test_diff_erank(length: int) -> None:
    torch.manual_seed(0)
    model, batches = gpt2(), tokens(mask=True, length=length)
    fresh = untrained(model)
    assert not torch.equal(*(next(each.parameters()) for each in (model, fresh)))
    ranks = []
    for each in (fresh, model):
        found = profile(each, batches, preset="diff-erank")
        last = found.layers[-1]
        kept = outputs(each, [last.name], lambda each=each: [each(**batch, use_cache=False) for batch in batches])
        rows = live_rows(batches, kept[last.name])
        expected = math.exp(sum(map(erank_entropy, rows)) / len(rows))
        rank = last.entropy("cosine", "first", alpha=1.0, window=None).effective_rank
        assert rank == pytest.approx(expected, rel=1e-6)
        ranks.append((rank, expected))
    assert ranks[0][0] - ranks[1][0] == pytest.approx(ranks[0][1] - ranks[1][1], abs=1e-5)


def test_another_preset_is_named() -> None:
    with pytest.raises(ValueError, match="preset must be one of layer-by-layer, diff-erank, found 'rank'"):
        profile(gpt2(), tokens(), preset="rank")
