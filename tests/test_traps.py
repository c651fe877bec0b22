"""Mistakes that train on without a word, and what is said about them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from .training import wrapped

PHASES = pytest.mark.parametrize("phase", ["memorization", "compression"])

# In-place activations


class ResidualBlock(nn.Module):
    """As in every ResNet: the activation works on the output of the BatchNorm in place."""

    def __init__(self, *, inplace: bool = True) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(3, 3, 3, padding=1), nn.Conv2d(3, 3, 3, padding=1)
        self.bn1, self.bn2 = nn.BatchNorm2d(3), nn.BatchNorm2d(3)
        self.relu = nn.ReLU(inplace=inplace)

    def forward(self, x: Tensor) -> Tensor:
        h = self.relu(self.bn1(self.conv1(x)))
        found: Tensor = self.relu(self.bn2(self.conv2(h)) + x)
        return found


@PHASES
@pytest.mark.parametrize("activation", [False, True])
def test_an_inplace_activation_behind_a_tap(phase: str, activation: bool) -> None:
    model, x = ResidualBlock(), torch.randn(2, 3, 6, 6)
    optimizer = wrapped(model, "bn1", phase, activation=activation)
    advice = r"module 'bn1' \(what follows it works in place: tap that module instead, or give it inplace=False\)"
    with pytest.raises(RuntimeError, match=advice):
        optimizer.backward(model(x).square().mean())
    optimizer.hook.remove()
    for model, layer in ((ResidualBlock(), "relu"), (ResidualBlock(inplace=False), "bn1")):  # what it advises
        optimizer = wrapped(model, layer, phase, activation=activation)
        optimizer.backward(model(x).square().mean())
        optimizer.step()
