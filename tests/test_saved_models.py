"""A model with taps is saved and copied without them."""

from __future__ import annotations

import copy
import io
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gapt_optim import GAPTOptimizer, RepresentationHook

from .loops import COMPRESSING, assert_same, loss_of, make_net, run, weights, wrap


class Masked(nn.Module):
    """Takes an attention_mask, and has hooks of its user's own."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)])

    def forward(self, x: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


class WithItsOwnState(nn.Linear):
    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"said": "by the class"}


class WithATupleForState(nn.Linear):
    def __getstate__(self) -> tuple[str, Any]:
        return "in a tuple", self.__dict__

    def __setstate__(self, state: tuple[str, Any]) -> None:
        super().__setstate__(state[1])
        self.said = state[0]


class WithItsOwnReduce(nn.Linear):
    def __reduce_ex__(self, protocol: Any) -> Any:
        return _rebuilt, (dict(self.__dict__),)


def _rebuilt(state: dict[str, Any]) -> nn.Module:
    module = WithItsOwnReduce.__new__(WithItsOwnReduce)
    module.__dict__.update(state)
    return module


def pickled(model: nn.Module) -> nn.Module:
    loaded: nn.Module = pickle.loads(pickle.dumps(model))
    return loaded


def saved(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    loaded: nn.Module = torch.load(io.BytesIO(file.getvalue()), weights_only=False)
    return loaded


WAYS = {"pickle": pickled, "torch.save": saved, "deepcopy": copy.deepcopy}


def hooks_of(model: nn.Module) -> list[Any]:
    return [
        hook
        for module in model.modules()
        for hook in (*module._forward_hooks.values(), *module._forward_pre_hooks.values())
    ]


@pytest.mark.parametrize("protocol", range(2, pickle.HIGHEST_PROTOCOL + 1))
def test_what_is_saved_says_nothing_of_us(protocol: int) -> None:
    model = make_net()
    untapped = pickle.dumps(model, protocol)
    optimizer = wrap(model)
    assert hooks_of(model)
    assert pickle.dumps(model, protocol) == untapped
    run(model, optimizer, range(2))
    assert b"gapt_optim" not in pickle.dumps(model, protocol)
    optimizer.hook.remove()
    assert "__getstate__" not in {name for module in model.modules() for name in module.__dict__}


@pytest.mark.parametrize("way", WAYS)
def test_a_copy_has_the_users_hooks_and_none_of_ours(way: str) -> None:
    model = Masked()
    model.layers[0].register_forward_hook(doubled)
    model.register_forward_pre_hook(_passed_on, with_kwargs=True)
    hook = RepresentationHook(model, "layers.*")
    copied = WAYS[way](model)
    assert hooks_of(copied) == [_passed_on, doubled]
    assert "__getstate__" not in {name for module in copied.modules() for name in module.__dict__}
    x = torch.randn(2, 3, 4)
    assert torch.equal(copied(x), model(x))
    assert len(hooks_of(model)) > 2  # those of the model stay
    with hook.measuring() as measured:
        model(x)
        copied(x)
    assert measured.entropies.keys() == {"layers.0", "layers.1"}


def doubled(module: nn.Module, args: Any, output: Tensor) -> Tensor:
    return 2 * output


def _passed_on(module: nn.Module, args: Any, kwargs: Any) -> None:
    return None


@pytest.mark.parametrize("way", WAYS)
def test_training_goes_on_and_a_copy_can_be_tapped(way: str) -> None:
    plain, model = make_net(), make_net()
    alone, optimizer = wrap(plain, config=COMPRESSING), wrap(model, config=COMPRESSING)
    run(plain, alone, range(2))
    run(model, optimizer, range(2))
    copied = WAYS[way](model)
    run(plain, alone, range(2, 4))
    run(model, optimizer, range(2, 4))
    assert_same(weights(model), weights(plain))
    loss_of(copied, 0).backward()
    run(copied, wrap(copied, config=COMPRESSING), range(2))
    assert b"gapt_optim" not in pickle.dumps(copied)


def test_two_hooks_on_one_model() -> None:
    model = make_net()
    first, second = RepresentationHook(model, "layers.*"), RepresentationHook(model, "layers.1")
    for each in (second, first):
        assert b"gapt_optim" not in pickle.dumps(model)
        each.remove()
        each.remove()  # the second time does nothing
    assert "__getstate__" not in model.layers[1].__dict__


@pytest.mark.parametrize("way", WAYS)
def test_classes_with_a_way_of_their_own(way: str) -> None:
    model = nn.Sequential(WithItsOwnState(4, 4), WithItsOwnReduce(4, 4), WithATupleForState(4, 4))
    hook = RepresentationHook(model, ["0", "1", "2"])
    copied = WAYS[way](model)
    assert (copied[0].said, copied[2].said) == ("by the class", "in a tuple")
    assert not copied[0]._forward_hooks
    assert not copied[2]._forward_hooks
    x = torch.randn(3, 4)
    assert torch.equal(copied(x), model(x))  # what the second has for our hooks does nothing
    assert b"gapt_optim" not in pickle.dumps(model)
    assert not hook.removed


def test_weights_only_needs_no_class_of_ours(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2))
    optimizer = GAPTOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), RepresentationHook(model, ["0", "1"]))
    optimizer.backward(model(torch.randn(5, 4)).square().mean())
    optimizer.step()
    torch.save(model, tmp_path / "model.pt")
    needed = torch.serialization.get_unsafe_globals_in_checkpoint(tmp_path / "model.pt")
    assert {name.rsplit(".", 1)[1] for name in needed} == {"Sequential", "Linear", "Tanh"}
    with torch.serialization.safe_globals([nn.Sequential, nn.Linear, nn.Tanh]):
        loaded = torch.load(tmp_path / "model.pt", weights_only=True)
    assert_same(dict(loaded.state_dict()), dict(model.state_dict()))
    without = (
        "import sys, torch; sys.modules['gapt_optim'] = None; "
        f"print(torch.load({str(tmp_path / 'model.pt')!r}, weights_only=False)(torch.ones(1, 4)).tolist())"
    )
    answer = subprocess.run([sys.executable, "-c", without], check=True, capture_output=True, text=True).stdout
    assert answer.strip() == str(loaded(torch.ones(1, 4)).tolist())
