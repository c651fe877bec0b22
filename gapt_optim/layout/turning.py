"""Arguments that are taken to have the batch first, until a module that gets them as they are says otherwise."""

from __future__ import annotations

from torch import nn

from .following import Following, Source, Trace
from .operations import BATCH, LENGTH, Axes
from .tokens import Call, axes_of

TURN = 'layout="length batch features" if the model is called with the sequence first'
"""What is a guess in a first forward pass: a layer runs before the module that says it."""


def names_with_batch_second(model: nn.Module) -> list[str]:
    """Torch's modules in it that say so."""
    kinds = (nn.RNNBase, nn.MultiheadAttention)
    return [name for name, module in model.named_modules() if isinstance(module, kinds) and not module.batch_first]


def may_turn(source: Source) -> bool:
    """That an argument has the batch first is only assumed: neither its module nor the sizes of a mask say so."""
    call, name = source
    assert isinstance(call, Call)
    return not axes_of(call, name)[1]


def turn_arguments(following: Following) -> str | None:
    """From now on, read the arguments as modules took them that were followed; what comes first, if that is news."""
    news = None
    for sources, comes_first in ((following.sequence_first, "sequence"), (following.channels_first, "channels")):
        for source in sources:
            call, name = source
            assert isinstance(call, Call)
            if may_turn(source):
                known = call.caller.turned if comes_first == "sequence" else call.caller.channels_first
                known.add(name)
                news = comes_first
    return news


def is_assumed(axes: Axes, trace: Trace | None, following: Following | None) -> bool:
    """Nothing but habit says so far that the batch of a layer comes first."""
    if following is None or trace is None or axes[:2] != (BATCH, LENGTH):
        return False
    known = following.batch_first | following.sequence_first
    return any(source not in known and may_turn(source) for source in trace.spans)


def turned(layers: list[str], comes_first: str) -> str:
    """What to tell of ``layers``, which were read otherwise."""
    sequence = comes_first == "sequence"
    layout, read = ("length batch features", "the batch first") if sequence else ("batch channels length", "them last")
    return (
        f"the model is called with the {comes_first} first, as a module in it takes them. This first forward pass of "
        f"{', '.join(layers)} was read with {read}, later ones are not; to say it from the start, pass "
        f'layout={{"{layers[0]}": "{layout}"}}'
    )
