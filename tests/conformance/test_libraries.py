"""Every optimizer that can be stepped on a CPU trains, saves and loads as without us, alone and paired with AdamW."""

from __future__ import annotations

import io
import pickle
from typing import Any

import pytest
import torch

from gapt_optim import GAPTConfig, GAPTOptimizer, GateConfig, RepresentationHook
from tests.conformance.libraries import NOT_STEPPED, SPECIAL, Way, found, take_steps, ways
from tests.loops import Net, assert_same, weights

pytestmark = [
    pytest.mark.filterwarnings("ignore:.torch.jit.script_method. is deprecated:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:Using backward.. with create_graph=True:UserWarning"),
]

MEMORIZING = GAPTConfig(gate=GateConfig(frozen=True))
WAYS = ways()


def test_the_catalogue_names_what_there_is() -> None:
    assert WAYS.keys() >= QUICK
    assert found().keys() >= NOT_STEPPED.keys() | SPECIAL.keys()
    assert len(WAYS) >= 160


def wrapped(way: Way, model: Net, paired: bool) -> list[Any]:
    bases = way.optimizers(model, paired)
    hook = RepresentationHook(model, "layers.*")
    return [GAPTOptimizer(bases if paired else bases[0], hook, MEMORIZING)]


def through_a_file(state: Any) -> Any:
    file = io.BytesIO()
    torch.save(state, file)
    try:
        return torch.load(io.BytesIO(file.getvalue()), weights_only=True)
    except pickle.UnpicklingError:  # some save objects of their own
        return torch.load(io.BytesIO(file.getvalue()), weights_only=False)


def trained_and_resumed(build: Any, way: Way, paired: bool) -> dict[str, Any]:
    """Weights after six steps, and after three, a file, a new model and optimizer, and three more."""
    torch.manual_seed(0)
    whole = way.model()
    optimizers = build(way, whole, paired)
    take_steps(way, whole, optimizers, range(3))
    saved = through_a_file({"model": whole.state_dict(), "optimizers": [each.state_dict() for each in optimizers]})
    middle = weights(whole)
    take_steps(way, whole, optimizers, range(3, 6))

    torch.manual_seed(1)
    resumed = way.model(seed=1)
    resumed.load_state_dict(saved["model"])
    again = build(way, resumed, paired)
    outcome: dict[str, Any] = {"middle": middle, "whole": weights(whole)}
    try:
        for each, state in zip(again, saved["optimizers"], strict=True):
            each.load_state_dict(state)
        take_steps(way, resumed, again, range(3, 6))
    except Exception as error:
        return outcome | {"resumed": None, "error": error}
    return outcome | {"resumed": weights(resumed)}


RESUME_TO_OTHER_WEIGHTS: dict[str, str] = {}
"""Bare optimizers that do not go on as they would have without stopping, and why. The wrapper does what they do."""


def as_bare(name: str, paired: bool) -> None:
    way = WAYS[name]
    with torch.compiler.set_stance("force_eager"):  # torchao compiles its step, uncompiled it does the same
        bare = trained_and_resumed(Way.optimizers, way, paired)
        ours = trained_and_resumed(wrapped, way, paired)
    assert_same(ours["middle"], bare["middle"])
    assert_same(ours["whole"], bare["whole"])
    if bare["resumed"] is None:
        assert ours["resumed"] is None, "it loads here, and not without the wrapper"
        assert name in RESUME_TO_OTHER_WEIGHTS
        return
    if ours["resumed"] is None:
        raise ours["error"]
    assert_same(ours["resumed"], bare["resumed"])
    exact = all(torch.equal(bare["resumed"][key], bare["whole"][key]) for key in bare["whole"])
    assert exact == (name not in RESUME_TO_OTHER_WEIGHTS)


QUICK = {
    *(name for name in WAYS if name.startswith(("torch.optim", "schedulefree")) and "LBFGS" not in name),
    "torchao.optim.AdamW8bit",
    # Those that keep something besides the state of parameters, or are stepped in a way of their own.
    *(
        f"pytorch_optimizer.{name}"
        for name in (
            *("AdaHessian", "AliG", "EmoNavi", "GSAM", "Lookahead", "LookSAM", "MADGRAD", "Magma", "Muon", "PCGrad"),
            *("Prodigy", "Ranger21", "SAM", "SOAP", "SPAM", "ScheduleFreeWrapper", "StableSPAM", "TRAC", "WSAM"),
        )
    ),
}


def _marked(names: list[str]) -> list[Any]:
    return [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in names]


@pytest.mark.parametrize("name", _marked(list(WAYS)))
def test_alone(name: str) -> None:
    as_bare(name, paired=False)


@pytest.mark.parametrize("name", _marked([name for name, way in WAYS.items() if not way.alone_only]))
def test_paired_with_adamw(name: str) -> None:
    as_bare(name, paired=True)


@pytest.mark.parametrize("name", [name for name, way in WAYS.items() if "closure" in way.alone_only])
def test_those_that_evaluate_a_closure_themselves_cannot_be_paired(name: str) -> None:
    """They say so themselves where they are stepped without one."""
    way = WAYS[name]
    model = way.model()
    with pytest.raises(Exception, match=r"(?i)closure|must be the only one|'NoneType' object is not callable"):
        take_steps(Way(way.cls), model, wrapped(way, model, paired=True), range(1))
