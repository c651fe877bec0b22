"""The hidden tensor in a module's output, and the output with another tensor in its place."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

_TRANSFORMERS = (
    nn.Transformer,
    nn.TransformerEncoder,
    nn.TransformerDecoder,
    nn.TransformerEncoderLayer,
    nn.TransformerDecoderLayer,
)
"""Modules whose parts pass on tensors in the order that they themselves have."""


def hidden_tensor(output: Any) -> Any:
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


def puts_sequence_first(model: nn.Module, name: str) -> bool:
    """The module ``name`` returns (seq, batch, d), by its ``batch_first`` or that of the transformer around it."""
    module, around = model, [model]
    for part in name.split(".") if name else []:
        module = module.get_submodule(part)
        around.append(module)
    own = _batch_first(module)
    flags = [own, *(_batch_first(outer) for outer in reversed(around[:-1]) if isinstance(outer, _TRANSFORMERS))]
    return next((not flag for flag in flags if flag is not None), False)


def _batch_first(module: Any) -> bool | None:
    """A module's ``batch_first``; that of a transformer lies in its attention."""
    flag = getattr(module, "batch_first", None)
    if isinstance(flag, bool):
        return flag
    for wrapper in ("_orig_mod", "_checkpoint_wrapped_module"):
        if isinstance(getattr(module, wrapper, None), nn.Module):
            return _batch_first(getattr(module, wrapper))
    if isinstance(module, (nn.TransformerEncoder, nn.TransformerDecoder)):
        return _batch_first(module.layers[0]) if len(module.layers) else None
    if isinstance(module, (nn.TransformerEncoderLayer, nn.TransformerDecoderLayer)):
        return _batch_first(module.self_attn)
    return None


def checked_hidden(name: str, output: Any, pick: Callable[[Any], Tensor] | None) -> Tensor:
    """The hidden tensor in the output of the module ``name``: what ``pick`` (``output=``) gives, or the usual one.

    Raises:
        TypeError: it is no tensor, a DTensor, or not of floating point.
        ValueError: it has fewer than two dimensions.
    """
    h = hidden_tensor(output) if pick is None else pick(output)
    if isinstance(h, PackedSequence):
        raise TypeError(
            f'module "{name}" returned a PackedSequence, in which the rows of all sequences are mixed; tap a module '
            "behind torch.nn.utils.rnn.pad_packed_sequence(..., batch_first=True), and pass mask= for its padding"
        )
    if not isinstance(h, Tensor):
        what = "its default choice" if pick is None else "output="
        raise TypeError(
            f'module "{name}" returned {type(output).__name__} and {what} gave {type(h).__name__}, not a '
            "tensor; pass output=lambda out: ... to pick the hidden tensor"
        )
    if type(h).__name__ == "DTensor":
        raise TypeError(
            f'module "{name}" returned a DTensor; its entropy would be that of one shard. Tap a module whose '
            "output is a plain tensor, for example one that gathers or replicates it"
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


def batch_first(h: Tensor, output: Any, pick: Callable[[Any], Tensor] | None, sequence_first: bool) -> Tensor:
    """``h`` as (batch, seq, d): a view, where the module puts the sequence first.

    Only of the tensor that its ``batch_first`` is about: the last states of an LSTM have an order of their own.
    """
    if not (sequence_first and h.ndim == 3):
        return h
    return h.transpose(0, 1) if pick is None or h is hidden_tensor(output) else h


def hidden_rows(
    name: str, output: Any, pick: Callable[[Any], Tensor] | None, sequence_first: bool, length: int
) -> tuple[Tensor, Tensor | None]:
    """The hidden tensor with its batch first, and for a nested one, padded to at least ``length``, the mask of it."""
    h = checked_hidden(name, output, pick)
    if h.is_nested:
        return padded(h, length)
    return batch_first(h, output, pick, sequence_first), None


def padded(h: Tensor, length: int) -> tuple[Tensor, Tensor]:
    """A nested tensor as (batch, seq, d) with zeros behind its sequences, and the mask of what is not padding.

    In evaluation ``nn.TransformerEncoder`` packs masked sequences into one. ``length`` is the least that they get.
    """
    lengths = torch.tensor([len(sequence) for sequence in h.unbind()])
    length = max(length, int(lengths.max()))
    rows = torch.nested.to_padded_tensor(h, 0.0, output_size=(len(lengths), length, h.size(-1)))
    return rows, (torch.arange(length) < lengths[:, None]).to(h.device)


def replace_tensor(output: Any, old: Tensor, new: Tensor, name: str) -> Any:
    """``output`` with ``old`` replaced by ``new``, in the same kind of container."""
    replaced = _replace_within(output, old, new)
    if replaced is None:
        raise TypeError(
            f'module "{name}" returned {type(output).__name__}, which does not hold the tensor that output= gave; '
            "output= must return one of the tensors inside a tuple, list, dict or dataclass, not a new one"
        )
    return replaced


def _replace_within(output: Any, old: Tensor, new: Tensor) -> Any:
    if output is old:
        return new
    if isinstance(output, (tuple, list)):
        items = [_replace_within(item, old, new) for item in output]
        if all(item is None for item in items):
            return None
        items = [item if changed is None else changed for item, changed in zip(output, items, strict=True)]
        return type(output)(*items) if hasattr(output, "_fields") else type(output)(items)
    if dataclasses.is_dataclass(output) and not isinstance(output, type):
        pairs: Any = ((field.name, getattr(output, field.name)) for field in dataclasses.fields(output))
    elif isinstance(output, Mapping):
        pairs = output.items()
    else:
        return None
    changed = {key: value for key, value in ((k, _replace_within(v, old, new)) for k, v in pairs) if value is not None}
    if not changed:
        return None
    if dataclasses.is_dataclass(output) and not isinstance(output, type):
        return dataclasses.replace(output, **changed)
    return type(output)({**output, **changed})
