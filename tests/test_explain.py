"""What ``explain`` says of the outputs that a hook watches."""

from __future__ import annotations

import gc

import pytest
import torch
from torch import Tensor, nn

from gapt_optim import GAPTOptimizer, RepresentationHook
from gapt_optim.explain import Explanation, explain


def chain() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 16))


class Net(nn.Module):
    """Of three parts, one gives what cannot be read, and one does not run."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.image, self.resting = nn.Linear(4, 16), nn.Identity(), nn.Linear(4, 4)

    def forward(self, x: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        out: Tensor = self.first(x)
        self.image(torch.zeros(2, 5, 6, 7))
        return out


class TwoLists(nn.Module):
    """Which of its lists are blocks, a pass must show."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.other = (nn.ModuleList(nn.Linear(4, 4) for _ in range(2)) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        for block in (*self.one, *self.other):
            x = block(x)
        return x


def of(model: nn.Module, layers: list[str] | None, *args: Tensor) -> Explanation:
    return explain(RepresentationHook(model, layers), *args)


def test_a_layer_is_found_by_its_name() -> None:
    found = of(chain(), ["0", "2"], torch.randn(64, 4))
    assert found["2"].shape == (64, 16)
    with pytest.raises(KeyError, match=r"no layer '7' ran; those that did: \['0', '2'\]"):
        found["7"]


def test_what_is_refused_and_what_did_not_run() -> None:
    found = of(Net(), ["first", "image", "resting"], torch.randn(2, 16, 4))
    assert [layer.name for layer in found.layers] == ["first"]
    assert found.silent == ("resting",)
    assert "image\n  refused  the output of module" in str(found)
    assert str(found).endswith("did not run: resting")


def test_all_is_refused() -> None:
    found = of(Net(), ["image"], torch.randn(2, 16, 4))
    assert found.layers == ()
    assert list(found.unreadable) == ["image"]


def test_an_error_of_the_model_itself_is_raised() -> None:
    class Fails(Net):
        def forward(self, x: Tensor, attention_mask: Tensor | None = None) -> Tensor:
            raise ValueError("no such token")

    with pytest.raises(ValueError, match="no such token"):
        of(Fails(), ["first"], torch.randn(2, 4))


def test_a_model_that_is_gone() -> None:
    model = chain()
    hook = RepresentationHook(model, ["0"])
    del model
    gc.collect()
    with pytest.raises(RuntimeError, match="no longer exists; make a hook on a model that does"):
        explain(hook, torch.randn(2, 4))


def test_layers_that_a_first_pass_chooses() -> None:
    model = TwoLists()
    hook = RepresentationHook(model)
    assert not hook.names
    optimizer = GAPTOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), hook)
    with pytest.warns(UserWarning, match="layers=None waits for a forward pass of the model to choose layers"):
        optimizer.backward(model.one[0](torch.randn(24, 4)).sum())
    found = explain(hook, torch.randn(24, 4))
    assert [layer.name for layer in found.layers] == ["one.0", "one.1", "other.0", "other.1"]


def test_windows_without_an_entropy() -> None:
    found = of(Net(), ["first"], torch.randn(2, 4))
    assert "none can have an entropy: they have too few rows that count" in str(found)
    found = of(Net(), ["first"], torch.randn(2, 16, 4), (torch.arange(16) < torch.tensor([16, 2])[:, None]).float())
    assert found["first"].usable < found["first"].windows
    assert "can have no entropy: too few of their rows count" in str(found)


class Pooled(Net):
    """Its image is of three dimensions that come of no argument."""

    def forward(self, x: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        out: Tensor = self.image(torch.zeros(2, 5, 7))
        return out


def test_a_guess_is_shown() -> None:
    assert "  guess    layout=" in str(of(Pooled(), ["image"], torch.randn(2, 4)))
