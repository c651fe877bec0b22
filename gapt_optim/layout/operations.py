"""What an operation makes of the axes of a tensor: which of them are the batch, the length, the features."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple, TypeAlias

from torch import Tensor

BATCH, LENGTH, POSITION, FEATURES = "batch", "length", "position", "features"
FLAT, FLAT_SEQUENCE_FIRST = "batch * length", "length * batch"
FLATTENED = (FLAT, FLAT_SEQUENCE_FIRST)

Axes: TypeAlias = tuple[str | None, ...]
"""What each axis of a tensor is, None where that is not known."""

PRODUCTS = {"matmul", "bmm", "mm", "addmm", "baddbmm", "rmatmul", "einsum"}
_RESHAPED = {"view", "reshape", "flatten", "unflatten", "squeeze", "unsqueeze", "unsafe_view", "view_as", "reshape_as"}
RECURRENT = {"lstm", "gru", "rnn_tanh", "rnn_relu"}


class Operation(NamedTuple):
    """One that ran."""

    name: str
    """Without the underscores around it: what an operator or an operation in place does is the same."""
    args: list[Any]
    kwargs: Mapping[str, Any]
    out: Any
    """What it returned."""

    def argument(self, position: int, name: str, default: Any) -> Any:
        return self.args[position] if len(self.args) > position else self.kwargs.get(name, default)

    def dim(self, position: int, tensor: Tensor) -> int:
        """The axis that it works along, 0 by default."""
        axis: int = self.argument(position, "dim", self.kwargs.get("axis", 0)) % tensor.ndim
        return axis


def tensors_within(values: Any) -> Iterator[Tensor]:
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, (tuple, list)):
            yield from tensors_within(value)
        elif isinstance(value, Mapping):
            yield from tensors_within(value.values())


def axes_after(op: Operation, source: Tensor, axes: Axes, last: str | None) -> Axes:
    """The axes of the result, where those of ``source`` are ``axes``; ``last`` is the last one of a product."""
    known = _of_layer(op, axes) or _moved(op, axes)
    if known is not None:
        return known
    if op.name == "getitem":
        return _axes_of_part(op, source, axes)
    if op.name == "einsum":
        return _einsum(op.args, source, axes)
    if op.name == "stack":
        dim = op.dim(1, op.out)
        return (*axes[:dim], None, *axes[dim:])
    if op.name in PRODUCTS and op.out.ndim == len(axes):
        return (*axes[:-1], last)
    return _by_shapes(op, source, axes)


def _by_shapes(op: Operation, source: Tensor, axes: Axes) -> Axes:
    """Of any other operation."""
    out: Tensor = op.out
    if out.shape == source.shape or (out.ndim == source.ndim and op.name not in _RESHAPED):
        return axes
    if out.numel() == source.numel():
        return reshaped(tuple(source.shape), tuple(out.shape), axes)
    if out.ndim == source.ndim - 1:
        dim = op.argument(1, "dim", None)
        if isinstance(dim, (tuple, list)) and len(dim) == 1:
            dim = dim[0]
        if isinstance(dim, int):
            dim %= source.ndim
            return (*axes[:dim], *axes[dim + 1 :])
    if out.ndim > source.ndim and out.shape[-source.ndim :] == source.shape:  # broadcast or expanded
        return (*(None,) * (out.ndim - source.ndim), *axes)
    return (None,) * out.ndim


def _of_layer(op: Operation, axes: Axes) -> Axes | None:
    """Of an operation that says which axis has the features."""
    name, args, n = op.name, op.args, op.out.ndim
    if name == "linear" or (name in ("layer_norm", "rms_norm") and len(args[1]) == 1):
        return (*axes[:-1], FEATURES)
    if name == "embedding":
        return (*axes, FEATURES)
    convolution = re.fullmatch(r"(?:conv|conv_transpose|(?:adaptive_)?(?:avg|max|lp)_pool)([123])d", name)
    if convolution:
        if "pool" in name and axes.count(FEATURES) == 1 and None not in axes:  # which may pool over features
            return axes
        positions = tuple(LENGTH if axis == LENGTH else POSITION for axis in axes[-int(convolution[1]) :])
        batch: Axes = (axes[0] or BATCH,) if n == len(positions) + 2 else ()
        return (*batch, FEATURES, *positions)
    if name in ("batch_norm", "group_norm", "instance_norm") and n > 2:
        return (axes[0] or BATCH, FEATURES, *(axis or POSITION for axis in axes[2:]))
    if n != 3:
        return None
    batch_first = None
    if name in RECURRENT and isinstance(args[-1], bool):
        batch_first = args[-1]
    elif name == "multi_head_attention_forward":
        batch_first = False
    elif name == "pad_packed_sequence":
        batch_first = args[2]
    if batch_first is None:
        return None
    return (BATCH, LENGTH, FEATURES) if batch_first else (LENGTH, BATCH, FEATURES)


def _moved(op: Operation, axes: Axes) -> Axes | None:
    n = len(axes)
    order = list(range(n))
    if op.name in ("transpose", "swapaxes", "swapdims"):
        first = op.argument(1, "dim0", op.kwargs.get("axis0", 0))
        second = op.argument(2, "dim1", op.kwargs.get("axis1", 0))
        order[first], order[second] = order[second], order[first]
    elif op.name in ("t", "T", "mT", "H", "mH", "adjoint") and n >= 2:
        order[-1], order[-2] = order[-2], order[-1]
    elif op.name == "permute":
        dims = op.kwargs.get("dims", op.args[1:])
        dims = dims[0] if len(dims) == 1 and not isinstance(dims[0], int) else dims
        order = [dim % n for dim in dims]
    elif op.name in ("movedim", "moveaxis"):
        order.insert(op.args[2] % n, order.pop(op.args[1] % n))
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
    if axes == [BATCH, LENGTH]:
        joint: str | None = FLAT
    elif axes == [LENGTH, BATCH]:
        joint = FLAT_SEQUENCE_FIRST
    else:
        joint = axes[0] if len(set(axes)) == 1 else None
    if parts == 2 and joint == FLAT:
        return [BATCH, LENGTH]
    if parts == 2 and joint == FLAT_SEQUENCE_FIRST:
        return [LENGTH, BATCH]
    if parts > 1 and joint in (BATCH, *FLATTENED):  # a batch of frames, say, is one of videos again
        return [None] * parts
    return [joint] * parts


def _axes_of_part(op: Operation, source: Tensor, axes: Axes) -> Axes:
    n: int = op.out.ndim
    if op.args[0] is not source:  # a table, indexed by the tokens
        return (*axes, *(FEATURES,) * (n - source.ndim))
    indexed = indexed_axes(op.args[1], source)
    if indexed is None:
        return (None,) * n
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
