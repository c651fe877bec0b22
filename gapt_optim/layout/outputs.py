"""The hidden tensor in a module's output, and what it means."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Mapping, MutableMapping
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence


class Reading(NamedTuple):
    """What one output of a watched module means."""

    h: Tensor
    """The hidden tensor in it, as the module returned it."""
    rows: Tensor
    """(batch, length, features): a view of ``h`` where strides allow it. Rows without an order are one sequence."""
    live: Tensor | None
    """(batch, length) bool, true where a row counts; None where all do."""
    segments: Tensor | None
    """(batch, length) integers; where they change, another document begins. None for one document in each sequence."""
    axes: str
    """What the axes of ``h`` are, as ``layout=`` has them."""
    why_axes: str
    why_rows: str
    guess: str | None
    """What is only likely, and what to pass to say it; None where it is known."""
    view: Any
    """A callable, from a tensor of the shape of ``h`` to its rows."""


def hidden_tensor(output: Any) -> Any:
    """The tensor itself, ``last_hidden_state``, the only tensor of a mapping, or the first item."""
    if isinstance(output, Tensor):
        return output
    if getattr(output, "last_hidden_state", None) is not None:
        return output.last_hidden_state
    if isinstance(output, Mapping):
        tensors = [value for value in output.values() if isinstance(value, Tensor)]
        return output.get("last_hidden_state", tensors[0] if len(tensors) == 1 else None)
    if isinstance(output, (tuple, list)) and output:  # Dynamo of torch 2.6 knows no tuple | list
        return output[0]
    return None


def checked_hidden(name: str, output: Any, pick: Callable[[Any], Tensor] | None) -> Tensor:
    """The hidden tensor in the output of the module ``name``: what ``pick`` (``output=``) gives, or the usual one.

    Raises:
        TypeError: it is no tensor, or not of floating point.
        ValueError: it has fewer than two dimensions.
    """
    if pick is not None:
        h = pick(output)
    else:
        h = output if isinstance(output, Tensor) else hidden_tensor(output)
    if isinstance(h, PackedSequence):
        raise TypeError(
            f'module "{name}" returned a PackedSequence, in which the rows of all sequences are mixed; watch a module '
            "behind torch.nn.utils.rnn.pad_packed_sequence(..., batch_first=True), and pass mask= for its padding"
        )
    if not isinstance(h, Tensor):
        what = "its default choice" if pick is None else "output="
        raise TypeError(
            f'module "{name}" returned {type(output).__name__} and {what} gave {type(h).__name__}, not a '
            "tensor; pass output=lambda out: ... to pick the hidden tensor"
        )
    if not h.is_floating_point():
        raise TypeError(
            f'module "{name}" returned a tensor of {h.dtype}; entropy needs floating point. Choose another '
            "module in layers, or another tensor of its output with output="
        )
    if h.ndim < 2:
        raise ValueError(
            f'module "{name}" returned a tensor of shape {tuple(h.shape)}; expected (batch, d), '
            "(batch, seq, d) or (batch, channels, *positions). Choose another module or pass output="
        )
    return h


def replaced(output: Any, old: Tensor, new: Tensor) -> Any:
    """``output`` with ``old`` replaced by ``new``, in the same kind of container; None where it does not hold it."""
    if output is old:
        return new
    if isinstance(output, (tuple, list)):
        items = [replaced(item, old, new) for item in output]
        if all(item is None for item in items):
            return None
        items = [item if changed is None else changed for item, changed in zip(output, items, strict=True)]
        return type(output)(*items) if hasattr(output, "_fields") else type(output)(items)
    fields = dataclasses.is_dataclass(output) and not isinstance(output, type)
    if fields:
        pairs: Any = ((field.name, getattr(output, field.name)) for field in dataclasses.fields(output))
    elif isinstance(output, Mapping):
        pairs = output.items()
    else:
        return None
    changed = {key: value for key, value in ((k, replaced(v, old, new)) for k, v in pairs) if value is not None}
    if not changed:
        return None
    # Its class may be made in a way of its own: a copy needs none.
    result = copy.copy(output)
    for key, value in changed.items():
        if fields:
            object.__setattr__(result, key, value)
        if isinstance(result, MutableMapping):  # a ModelOutput of transformers is both
            result[key] = value
    return result


def padded(h: Tensor, length: int) -> tuple[Tensor, Tensor]:
    """A nested tensor as (batch, length, d) with zeros behind its sequences, and the mask of what is not padding."""
    lengths = torch.tensor([len(sequence) for sequence in h.unbind()])
    length = max(length, int(lengths.max()))
    rows = torch.nested.to_padded_tensor(h, 0.0, output_size=(len(lengths), length, h.size(-1)))
    return rows, (torch.arange(length) < lengths[:, None]).to(h.device)
