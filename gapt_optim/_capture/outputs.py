"""The hidden tensor in a module's output, and the output with another tensor in its place."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor


def hidden_tensor(output: Any) -> Any:
    if isinstance(output, Tensor):
        return output
    if getattr(output, "last_hidden_state", None) is not None:
        return output.last_hidden_state
    if isinstance(output, Mapping):
        tensors = [value for value in output.values() if isinstance(value, Tensor)]
        return output.get("last_hidden_state", tensors[0] if len(tensors) == 1 else None)
    if isinstance(output, tuple | list) and output:
        return output[0]
    return None


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
    if isinstance(output, tuple | list):
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
