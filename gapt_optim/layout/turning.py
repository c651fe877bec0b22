"""Arguments that are taken to have the batch first, until a module that gets them as they are says otherwise."""

from __future__ import annotations

from typing import NamedTuple

from torch import nn

from .following import Following, Source, Trace
from .operations import BATCH, FEATURES, LENGTH, Axes
from .tokens import Call, Choice, axes_of

TURN = 'layout="length batch features" if the model is called with the sequence first'
"""What is a guess in a first forward pass: a layer runs before the module that says it."""


class Decision(NamedTuple):
    """What was found out about the outputs of one layer in calls of one kind."""

    axes: Axes
    why_axes: str
    choice: Choice | None
    problem: str | None
    guess: str | None
    followed: bool


def names_with_batch_second(model: nn.Module) -> list[str]:
    """Torch's modules in it that say so."""
    kinds = (nn.RNNBase, nn.MultiheadAttention)
    return [name for name, module in model.named_modules() if isinstance(module, kinds) and not module.batch_first]


def may_turn(source: Source) -> bool:
    """That an argument has the batch first is only assumed: neither its module nor the sizes of a mask say so."""
    call, name = source
    assert isinstance(call, Call)
    return not axes_of(call, name)[1]


def turn_arguments(following: Following) -> bool:
    """From now on, read the arguments as the modules took them that were followed; whether that is news."""
    news = False
    channels_first = following.channels_first - following.batch_first - following.features_last
    for source in (*following.sequence_first, *channels_first):
        call, name = source
        assert isinstance(call, Call)
        if may_turn(source):
            (call.caller.channels_first if source in channels_first else call.caller.turned).add(name)
            news = True
    return news


def is_assumed(axes: Axes, trace: Trace | None, following: Following | None) -> bool:
    """Nothing but habit says so far that the batch of a layer comes first."""
    if following is None or trace is None or axes[:2] != (BATCH, LENGTH):
        return False
    known = following.batch_first | following.sequence_first
    return any(source not in known and may_turn(source) for source in trace.spans)


def turns(before: Axes, now: Axes) -> bool:
    """Other axes than before have the batch or the features."""
    roles = [[axis if axis in (BATCH, FEATURES) else None for axis in axes] for axes in (before, now)]
    return roles[0] != roles[1]


def turned(layers: dict[str, str]) -> str:
    """What to tell of layers, given what their axes are, which a first pass has read otherwise."""
    name, axes = next(iter(layers.items()))
    return (
        f"the first forward pass of {', '.join(layers)} was read otherwise than this one: a module in it showed that "
        "the model is called with the sequence or the channels first. To say it from the start, pass "
        f'layout={{"{name}": "{axes}"}}'
    )
