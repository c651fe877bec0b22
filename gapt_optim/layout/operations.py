"""What an operation makes of the axes of a tensor: which of them are the batch, the length, the features."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any, TypeAlias

from torch import Tensor

BATCH, LENGTH, POSITION, FEATURES = "batch", "length", "position", "features"
FLAT, FLAT_SEQUENCE_FIRST = FLATTENED = "batch * length", "length * batch"

Axes: TypeAlias = tuple[str | None, ...]
"""What each axis of a tensor is, None where that is not known."""

PRODUCTS = {"matmul", "bmm", "mm", "addmm", "baddbmm", "__matmul__", "__rmatmul__", "einsum"}
_RESHAPED = {"view", "reshape", "flatten", "unflatten", "squeeze", "unsqueeze", "_unsafe_view", "view_as", "reshape_as"}
_SWAPPED = {"transpose", "swapaxes", "swapdims", "transpose_"}
RECURRENT = {"lstm", "gru", "rnn_tanh", "rnn_relu"}


def tensors_within(values: Any) -> Iterator[Tensor]:
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, (tuple, list)):
            yield from tensors_within(value)


def argument(args: list[Any], kwargs: Mapping[str, Any], position: int, name: str, default: Any) -> Any:
    return args[position] if len(args) > position else kwargs.get(name, default)


def axes_after(
    name: str, args: list[Any], kwargs: Mapping[str, Any], source: Tensor, axes: Axes, out: Tensor, last: str | None
) -> Axes:
    """The axes of the result ``out``, where those of ``source`` are ``axes``; ``last`` is the last one of a product."""
    layer = _of_layer(name, args, axes, out)
    if layer is not None:
        return layer
    moved = _moved(name, args, kwargs, axes)
    if moved is not None:
        return moved
    if name == "__getitem__":
        return _axes_of_part(args, source, axes, out)
    if name == "einsum":
        return _einsum(args, source, axes)
    if name == "stack":
        dim = argument(args, kwargs, 1, "dim", 0) % out.ndim
        return (*axes[:dim], None, *axes[dim:])
    if name in PRODUCTS and out.ndim == len(axes):
        return (*axes[:-1], last)
    return _generic(name, args, kwargs, source, axes, out)


def _generic(name: str, args: list[Any], kwargs: Mapping[str, Any], source: Tensor, axes: Axes, out: Tensor) -> Axes:
    if out.shape == source.shape or (out.ndim == source.ndim and name not in _RESHAPED):
        return axes
    if out.numel() == source.numel():
        return reshaped(tuple(source.shape), tuple(out.shape), axes)
    if out.ndim == source.ndim - 1:
        dim = argument(args, kwargs, 1, "dim", None)
        if isinstance(dim, (tuple, list)) and len(dim) == 1:
            dim = dim[0]
        if isinstance(dim, int):
            dim %= source.ndim
            return (*axes[:dim], *axes[dim + 1 :])
    if out.ndim > source.ndim and out.shape[-source.ndim :] == source.shape:  # broadcast or expanded
        return (*(None,) * (out.ndim - source.ndim), *axes)
    return (None,) * out.ndim


def _of_layer(name: str, args: list[Any], axes: Axes, out: Tensor) -> Axes | None:
    """Of an operation that says which axis has the features."""
    if name == "linear" or (name in ("layer_norm", "rms_norm") and len(args[1]) == 1):
        return (*axes[:-1], FEATURES)
    if name == "embedding":
        return (*axes, FEATURES)
    convolution = re.fullmatch(r"(?:conv|conv_transpose|(?:adaptive_)?(?:avg|max|lp)_pool)([123])d", name)
    if convolution:
        if "pool" in name and axes.count(FEATURES) == 1 and None not in axes:  # which may pool over features
            return axes
        positions = tuple(LENGTH if axis == LENGTH else POSITION for axis in axes[-int(convolution[1]) :])
        batch: Axes = (axes[0] or BATCH,) if out.ndim == len(positions) + 2 else ()
        return (*batch, FEATURES, *positions)
    if name in ("batch_norm", "group_norm", "instance_norm") and out.ndim > 2:
        return (axes[0] or BATCH, FEATURES, *(axis or POSITION for axis in axes[2:]))
    if name in RECURRENT and out.ndim == 3 and isinstance(args[-1], bool):
        return (BATCH, LENGTH, FEATURES) if args[-1] else (LENGTH, BATCH, FEATURES)
    if name == "multi_head_attention_forward" and out.ndim == 3:
        return (LENGTH, BATCH, FEATURES)
    if name == "_pad_packed_sequence" and out.ndim == 3:
        return (BATCH, LENGTH, FEATURES) if args[2] else (LENGTH, BATCH, FEATURES)
    return None


def _moved(name: str, args: list[Any], kwargs: Mapping[str, Any], axes: Axes) -> Axes | None:
    n = len(axes)
    order = list(range(n))
    if name in _SWAPPED:
        first = argument(args, kwargs, 1, "dim0", kwargs.get("axis0", 0))
        second = argument(args, kwargs, 2, "dim1", kwargs.get("axis1", 0))
        order[first], order[second] = order[second], order[first]
    elif name in ("t", "T", "mT", "H", "mH", "adjoint") and n >= 2:
        order[-1], order[-2] = order[-2], order[-1]
    elif name == "permute":
        dims = kwargs.get("dims", args[1:])
        dims = dims[0] if len(dims) == 1 and not isinstance(dims[0], int) else dims
        order = [dim % n for dim in dims]
    elif name in ("movedim", "moveaxis"):
        source, target = args[1] % n, args[2] % n
        order.insert(target, order.pop(source))
    else:
        return None
    return tuple(axes[axis] for axis in order)


def reshaped(before: tuple[int, ...], after: tuple[int, ...], axes: Axes) -> Axes:
    """The axes of a tensor of shape ``before`` seen as one of shape ``after``.

    >>> reshaped((2, 5, 12), (2, 5, 3, 4), ("batch", "length", "features"))
    ('batch', 'length', 'features', 'features')
    >>> reshaped((2, 5, 12), (10, 12), ("batch", "length", "features"))
    ('batch * length', 'features')
    """
    if before == after:
        return axes
    found: list[str | None] = [None] * len(after)
    left = [axis for axis, size in enumerate(before) if size != 1]
    right = [axis for axis, size in enumerate(after) if size != 1]
    while left and right:
        ins, outs = [left.pop(0)], [right.pop(0)]
        size_in, size_out = before[ins[0]], after[outs[0]]
        while size_in != size_out:
            if size_in < size_out:
                ins.append(left.pop(0))
                size_in *= before[ins[-1]]
            else:
                outs.append(right.pop(0))
                size_out *= after[outs[-1]]
        for out, axis in zip(outs, _regrouped([axes[i] for i in ins], len(outs)), strict=True):
            found[out] = axis
    return tuple(found)


def _regrouped(axes: list[str | None], parts: int) -> list[str | None]:
    """Several axes as ``parts`` others."""
    if axes == [BATCH, FEATURES] and parts == 2:  # heads, which attention counts with the batch
        return [BATCH, FEATURES]
    return _split(_joint(axes), parts)


def _joint(axes: list[str | None]) -> str | None:
    """What several axes are as one."""
    if axes == [BATCH, LENGTH]:
        return FLAT
    if axes == [LENGTH, BATCH]:
        return FLAT_SEQUENCE_FIRST
    return axes[0] if len(set(axes)) == 1 else None


def _split(axis: str | None, parts: int) -> list[str | None]:
    if parts == 2 and axis == FLAT:
        return [BATCH, LENGTH]
    if parts == 2 and axis == FLAT_SEQUENCE_FIRST:
        return [LENGTH, BATCH]
    if parts > 1 and axis in (BATCH, FLAT, FLAT_SEQUENCE_FIRST):  # a batch of frames, say, is one of videos again
        return [None] * parts
    return [axis] * parts


def _axes_of_part(args: list[Any], source: Tensor, axes: Axes, out: Tensor) -> Axes:
    if args[0] is not source:  # a table, indexed by the tokens
        return (*axes, *(FEATURES,) * (out.ndim - source.ndim))
    indexed = indexed_axes(args[1], source)
    if indexed is None:
        return (None,) * out.ndim
    return tuple(axes[axis] if axis is not None else None for axis, _ in indexed)


def indexed_axes(index: Any, source: Tensor) -> list[tuple[int | None, slice | None]] | None:
    """For each axis of ``source[index]``, which axis of ``source`` it was and its slice; None if tensors index it."""
    items = list(index) if isinstance(index, tuple) else [index]
    if any(not (item is None or item is Ellipsis or isinstance(item, (int, slice))) for item in items):
        return None
    used = sum(isinstance(item, (int, slice)) and not isinstance(item, bool) for item in items)
    if Ellipsis not in items:
        items.append(Ellipsis)
    found: list[tuple[int | None, slice | None]] = []
    axis = 0
    for item in items:
        if item is None:
            found.append((None, None))
        elif item is Ellipsis:
            found += [(axis + i, None) for i in range(source.ndim - used)]
            axis += source.ndim - used
        else:
            if isinstance(item, slice):
                found.append((axis, item))
            axis += 1
    return found


def _einsum(args: list[Any], source: Tensor, axes: Axes) -> Axes:
    inputs, output = args[0].replace(" ", "").split("->")
    operands = list(tensors_within(args[1:]))
    position = next(i for i, tensor in enumerate(operands) if tensor is source)
    named = dict(zip(inputs.split(",")[position], axes, strict=True))
    return tuple(named.get(letter, FEATURES if i == len(output) - 1 else None) for i, letter in enumerate(output))
