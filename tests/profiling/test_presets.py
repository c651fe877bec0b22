"""The presets against the papers' definitions, written out."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from gapt_optim import profile
from gapt_optim.profiling import untrained

from .test_profile import gpt2, outputs, tokens


def prompt_entropy(rows: Tensor) -> float:
    """Of "Layer by layer": the von Neumann entropy of rows of unit length, over the largest there can be."""
    z = rows.double()
    z = z / z.norm(dim=1, keepdim=True)
    n, d = z.shape
    p = torch.linalg.eigvalsh(z @ z.mT / n)
    p = p[p > 1e-12]
    return float(-(p * p.log()).sum()) / math.log(min(n, d))


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
        value = layer.entropy("cosine", False, alpha=1.0, window=None)
        assert value.normalized == pytest.approx(sum(map(prompt_entropy, rows)) / len(rows), abs=1e-6)
        level = next(level for level in layer.sequence_level if level.pooling == "mean")
        means = torch.stack([each.double().mean(0) for each in rows])
        assert level.normalized == pytest.approx(prompt_entropy(means), abs=1e-6)


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
