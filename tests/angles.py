"""Angles between gradients from two separate passes of autograd, in float64: what alignment is compared with."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gapt_optim import Alignment, Angle
from tests.models import Case
from tests.reference import reference_layer_entropy
from tests.training import recorded

Sums = tuple[float, float, float]
"""<g,d>, |g|² and |d|²."""
Pair = tuple[Tensor | None, Tensor | None]


def layers_of(model: nn.Module, case: Case) -> dict[str, nn.Module]:
    prefix = case.layers.removesuffix("*")
    return {f"{prefix}{name}": child for name, child in model.get_submodule(prefix.removesuffix(".")).named_children()}


def entropies_of(calls: list[list[Tensor]], mask: Tensor | None) -> list[list[Tensor]]:
    """Per layer, each call's share of the layer's entropy."""
    return [[reference_layer_entropy(h, mask=mask) / len(of_layer) for h in of_layer] for of_layer in calls]


def parameter_gradients(
    case: Case, model: nn.Module, batches: Sequence[dict[str, Tensor]], scale: float = 1.0, loss_of: Any = None
) -> dict[str, Pair]:
    """Per parameter, the gradients of the loss and of the mean entropy, by two passes per batch."""
    names = [name for name, p in model.named_parameters() if p.requires_grad]
    parameters = [p for p in model.parameters() if p.requires_grad]
    sums: dict[str, list[Tensor | None]] = {name: [None, None] for name in names}
    for batch in batches:
        with recorded(list(layers_of(model, case).values())) as calls:
            loss = (loss_of or case.loss)(model, batch)
        calls = [[h.double() for h in of_layer] for of_layer in calls]
        shares = entropies_of(calls, batch.get("attention_mask"))
        entropy = torch.stack([sum(of_layer, torch.zeros(())) for of_layer in shares]).mean()
        for i, value in enumerate((loss, entropy)):
            gradients = torch.autograd.grad(value * scale, parameters, retain_graph=True, allow_unused=True)
            for name, gradient in zip(names, gradients, strict=True):
                held = sums[name][i]
                sums[name][i] = gradient if held is None or gradient is None else held + gradient
    return {name: (g, d) for name, (g, d) in sums.items()}


def activation_sums(
    case: Case, model: nn.Module, batches: Sequence[dict[str, Tensor]], weight: float, scale: float = 1.0
) -> list[Sums]:
    """Per layer, g of the loss, as it is scaled, and of the entropies behind that layer; d of its own over the step."""
    modules = list(layers_of(model, case).values())
    sums = [(0.0, 0.0, 0.0) for _ in modules]
    for batch in batches:
        with recorded(modules) as calls:
            loss = case.loss(model, batch)
        shares = entropies_of(calls, batch.get("attention_mask"))
        total = loss + weight * sum(share for of_layer in shares for share in of_layer) / len(modules)
        for i, (of_layer, own) in enumerate(zip(calls, shares, strict=True)):
            for h, share in zip(of_layer, own, strict=True):
                if not h.requires_grad:
                    continue
                (g,) = torch.autograd.grad((total - weight * share / len(modules)) * scale, h, retain_graph=True)
                leaf = h.detach().requires_grad_()
                mine = reference_layer_entropy(leaf, mask=batch.get("attention_mask")) / len(of_layer) / len(batches)
                (d,) = torch.autograd.grad(mine, leaf)
                sums[i] = _plus(sums[i], sums_of((g, d)))
    return sums


def sums_of(*pairs: Pair) -> Sums:
    """Over the pairs of which both are there."""
    total = (0.0, 0.0, 0.0)
    for g, d in pairs:
        if g is not None and d is not None:
            g, d = g.double(), d.double()
            total = _plus(total, (float((g * d).sum()), float(g.square().sum()), float(d.square().sum())))
    return total


def assert_angle(found: Angle, sums: Sums, tolerance: float, where: str = "") -> None:
    """Cosine to ``tolerance``; norms to it relatively; projection relative to the ratio of the norms."""
    gd, gg, dd = sums
    assert found.loss_norm == pytest.approx(math.sqrt(gg), rel=tolerance), where
    assert found.entropy_norm == pytest.approx(math.sqrt(dd), rel=tolerance), where
    if gg == 0 or dd == 0:
        assert found.cosine is None, where
        assert found.projection is None, where
        return
    assert found.cosine == pytest.approx(gd / math.sqrt(gg * dd), abs=tolerance), where
    assert found.projection == pytest.approx(gd / gg, abs=2 * tolerance * math.sqrt(dd / gg)), where


def assert_parameter_alignment(
    found: Alignment | None,
    expected: dict[str, Pair],
    layers: Sequence[str],
    tolerance: float,
    weight: float = 0.0,
    noise: float = 0.0,
) -> None:
    """Overall to ``tolerance``, per parameter and per layer.

    With a ``weight`` a part of the loss's gradient is the difference of two, which costs digits where the entropy's
    is larger. A parameter of which a gradient is no larger than ``noise`` of all (a key's bias in attention) is
    rounding only, and one that is not much larger has fewer digits: its terms cancel, as do those of a bias under a
    centered kernel.
    """
    assert found is not None
    shared = {name: pair for name, pair in expected.items() if pair[0] is not None and pair[1] is not None}
    assert all(t is None or t.any() for pair in expected.values() for t in pair)  # where a gradient is, it counts
    assert set(found.parameters) == set(shared)
    assert found.shared == len(shared)
    assert found.only_loss == sum(d is None and g is not None for g, d in expected.values())
    assert found.only_entropy == sum(g is None and d is not None for g, d in expected.values())
    overall = sums_of(*shared.values())
    assert_angle(found, overall, tolerance, "overall")
    of_layer = {layer: [pair for name, pair in shared.items() if name.startswith(layer + ".")] for layer in layers}
    assert set(found.layers) == {layer for layer, pairs in of_layer.items() if pairs}
    parts = [(found.parameters[name], sums_of(pair), name) for name, pair in shared.items()]
    parts += [(angle, sums_of(*of_layer[layer]), layer) for layer, angle in found.layers.items()]
    for angle, sums, where in parts:
        smallest = math.sqrt(min(sums[1] / overall[1], sums[2] / overall[2]))
        if smallest > noise:
            lost = weight * math.sqrt(sums[2] / sums[1])
            assert_angle(angle, sums, tolerance * (1 + lost) + 1e-2 * noise / smallest, where)


def assert_activation_alignment(found: Alignment | None, sums: Sequence[Sums], tolerance: float) -> None:
    """Per layer, and overall for the mean entropy over layers."""
    assert found is not None
    for (name, angle), row in zip(found.layers.items(), sums, strict=True):
        assert_angle(angle, row, tolerance, name)
    gd, gg, dd = (sum(column) for column in zip(*sums, strict=True))
    assert_angle(found, (gd / len(sums), gg, dd / len(sums) ** 2), tolerance, "overall")
    assert found.shared is None
    assert not found.parameters


def _plus(a: Sums, b: Sums) -> Sums:
    return a[0] + b[0], a[1] + b[1], a[2] + b[2]
