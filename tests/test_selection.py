"""Which modules are the blocks of a model, where nobody names them."""

from __future__ import annotations

import re

import pytest
import torch
from torch import Tensor, nn

from gapt_optim import RepresentationHook
from gapt_optim.layout import Candidates, choose_layers, select_layers


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = x + self.linear(x).tanh()
        return out


class Net(nn.Module):
    """Parts that run one behind the other, and some that rest."""

    def __init__(self, *parts: nn.Module, resting: nn.Module | None = None) -> None:
        super().__init__()
        self.parts, self.resting = nn.ModuleList(parts), resting

    def forward(self, x: Tensor) -> Tensor:
        for part in self.parts:
            x = part(x)
        return x


class Loop(nn.Module):
    """Runs a list of modules."""

    def __init__(self, *modules: nn.Module) -> None:
        super().__init__()
        self.layers = nn.ModuleList(modules)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


class Residual(nn.Module):
    """As in x-transformers: a list of lists of norm, layer and residual, of which the residuals are a chain."""

    def __init__(self, depth: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.ModuleList([nn.LayerNorm(4), nn.Linear(4, 4), Add()]) for _ in range(depth))

    def forward(self, x: Tensor) -> Tensor:
        for norm, layer, add in self.layers:  # type: ignore[misc]
            x = add(layer(norm(x)), x)
        return x


class Add(nn.Module):
    def forward(self, x: Tensor, residual: Tensor) -> Tensor:
        return x + residual


def chosen(model: nn.Module) -> list[str]:
    found = choose_layers(model)
    if isinstance(found, Candidates):
        handles = found.place()
        with torch.no_grad():
            model(torch.randn(2, 5, 4))
        for handle in handles:
            handle.remove()
        found = found.chosen()
    return list(found)


def blocks(number: int) -> list[nn.Module]:
    return [Block() for _ in range(number)]


@pytest.mark.parametrize(
    ("model", "names"),
    [
        (Loop(*blocks(3)), ["layers.0", "layers.1", "layers.2"]),
        (nn.Sequential(*blocks(3)), ["0", "1", "2"]),
        (nn.Sequential(nn.Linear(4, 4), nn.Tanh(), *blocks(3), nn.Linear(4, 2)), ["2", "3", "4"]),
        (nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4), nn.Tanh()), ["0", "2"]),
        (nn.Sequential(nn.Linear(4, 4), nn.Sequential(*blocks(2)), nn.Sequential(*blocks(1))), ["1.0", "1.1", "2.0"]),
        (Net(Loop(*blocks(2)), resting=Loop(*blocks(5))), ["parts.0.layers.0", "parts.0.layers.1"]),
        (Net(Loop(*blocks(2)), Loop(*blocks(2))), ["parts.0", "parts.1"]),
        (Residual(3), ["layers.0.2", "layers.1.2", "layers.2.2"]),
        (nn.Sequential(nn.Linear(4, 4), Loop(nn.Identity(), *blocks(3))), ["1.layers.1", "1.layers.2", "1.layers.3"]),
    ],
)
def test_the_blocks_that_follow_each_other(model: nn.Module, names: list[str]) -> None:
    assert chosen(model) == names


def test_where_nothing_follows_globs_that_work_are_proposed() -> None:
    class Apart(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.ModuleList(blocks(2)), nn.ModuleList(nn.Linear(4, 4) for _ in range(2))

        def forward(self, x: Tensor) -> Tensor:
            parts: list[Tensor] = [part(x.clone()) for part in [*self.first, *self.second]]
            return torch.stack(parts).sum(0)

    model = Apart()
    with pytest.raises(ValueError, match="no blocks that follow each other") as refused:
        chosen(model)
    globs = re.findall(r'"([^"]+)"', str(refused.value))
    assert "first.*" in globs
    for glob in globs:
        assert select_layers(model, glob)
    with pytest.raises(ValueError, match="it is a single module"):
        choose_layers(nn.Linear(4, 4))


def test_an_encoder_and_a_decoder_of_one_depth_are_both_chosen() -> None:
    transformers = pytest.importorskip("transformers")
    model = transformers.T5Model(
        transformers.T5Config(vocab_size=20, d_model=16, d_kv=8, d_ff=16, num_layers=2, num_heads=2)
    )
    found = choose_layers(model)
    assert isinstance(found, Candidates)
    handles = found.place()
    ids = torch.randint(0, 20, (2, 5))
    model(input_ids=ids, decoder_input_ids=ids)
    for handle in handles:
        handle.remove()
    assert list(found.chosen()) == ["encoder.block.0", "encoder.block.1", "decoder.block.0", "decoder.block.1"]


class Agent(nn.Module):
    """A model that is called by methods of its own, as policies with a value are."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Sequential(nn.Linear(4, 4), nn.Tanh()), nn.Sequential(nn.Linear(4, 4))])
        self.actor, self.critic = nn.Linear(4, 2), nn.Linear(4, 1)

    def get_value(self, x: Tensor) -> Tensor:
        value: Tensor = self.critic(self.layers[1](self.layers[0](x)))
        return value


def test_a_model_without_forward_needs_names() -> None:
    agent = nn.ModuleDict({"one": Agent(), "two": Agent()})
    with pytest.raises(ValueError, match=r"ModuleDict has no forward\(\); pass"):
        RepresentationHook(agent)
    hook = RepresentationHook(agent, "one.actor")
    with pytest.raises(RuntimeError, match=r"ModuleDict has no forward\(\), so that explain"):
        hook.explain(torch.zeros(2, 4))
