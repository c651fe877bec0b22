"""Arguments that are taken to have the batch first, until a module that gets them as they are says otherwise."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

from .following import BATCH, LENGTH, Axes, Following, Source, Trace
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


def turn_arguments(sources: Iterable[Source]) -> bool:
    """From now on, those that may have the sequence first have it so; whether there are any."""
    turning = [(call, name) for call, name in sources if may_turn((call, name))]
    for call, name in turning:
        assert isinstance(call, Call)
        call.caller.turned.add(name)
    return bool(turning)


def is_assumed(axes: Axes, trace: Trace | None, following: Following | None) -> bool:
    """Nothing but habit says so far that the batch of a layer comes first."""
    if following is None or trace is None or axes[:2] != (BATCH, LENGTH):
        return False
    known = following.batch_first | following.sequence_first
    return any(source not in known and may_turn(source) for source in trace.spans)


def turned(layers: list[str], batch_second: list[str]) -> str:
    """What to tell of ``layers``, which were read otherwise."""
    return (
        f"the model is called with the sequence first, as a module with batch_first=False gets it (of "
        f"{', '.join(batch_second)}). This first forward pass of {', '.join(layers)} was read with the batch first, "
        f'later ones are not; to say it from the start, pass layout={{"{layers[0]}": "length batch features"}}'
    )
