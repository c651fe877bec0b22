"""Following tokens: which argument the rows of a tensor come from, and which of its axes is which.

A model's first forward pass runs under :class:`Following`, which sees each operation and notes beside its result whose
rows these are. That settles what shapes cannot: two sequences of one length, a text mask and as many image patches, as
many channels as positions. What it found is kept by layer; later passes run without it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakIdKeyDictionary

from .operations import (
    BATCH,
    FEATURES,
    LENGTH,
    PRODUCTS,
    RECURRENT,
    Axes,
    Operation,
    axes_after,
    indexed_axes,
    tensors_within,
)

Source: TypeAlias = tuple[Any, str]
"""A call, and the name of an argument of it."""


class Span(NamedTuple):
    """Where the tokens of an argument lie in the rows of a tensor."""

    start: int
    """The row of the first one; negative where the first ones were cut off."""
    length: int | None
    """Rows that the tensor should have: another number tells that it was pooled or subsampled."""


POOLED = Span(0, 0)
"""Of rows that were made one."""


class Trace(NamedTuple):
    """What is known of a tensor."""

    spans: Mapping[Source, Span | None]
    """The arguments that its rows come from; None for rows in another order, as those that were sent to an expert."""
    axes: Axes


class Following(TorchFunctionMode):
    """Notes whose rows each tensor has, from the arguments given to :meth:`begin` on.

    ``situation`` is the kind of the call that is followed.
    """

    def __init__(self, situation: object) -> None:
        super().__init__()
        self.situation = situation
        self.read = False
        """A watched module was read."""
        self.changed: dict[str, str] = {}
        """By layer, what the axes are that an earlier pass took for others."""
        self._traces: Any = WeakIdKeyDictionary()
        self.batch_first: set[Source] = set()
        """Arguments whose tokens a module took as they were assumed to be."""
        self.sequence_first: set[Source] = set()
        """Those that were assumed to have the batch first, and came to a module that says otherwise."""
        self.channels_first: set[Source] = set()
        """Those that were assumed to have the features last, and came to a convolution as they are."""
        self.features_last: set[Source] = set()
        """Those that came as they are to what takes features last."""
        self._derived: set[Source] = set()
        """Those that come from others, and are turned with these."""

    def begin(self, tensor: Tensor, source: Source, axes: Axes, *, known: bool) -> None:
        """``tensor`` is the argument ``source`` of a call; its ``axes`` are a habit where they are not ``known``."""
        before = self.of(tensor)
        if before is not None and known and axes[:2] == (LENGTH, BATCH):
            self._hear(before, sequence_first=True)
        if before is not None:
            axes = _merged(axes, before.axes) if known else _merged(before.axes, axes)
            if BATCH in before.axes or LENGTH in before.axes:
                self._derived.add(source)
        length = tensor.shape[axes.index(LENGTH)] if LENGTH in axes else None
        spans = {} if before is None else dict(before.spans)
        self._traces[tensor] = Trace({**spans, source: Span(0, length)}, axes)

    def of(self, tensor: Any) -> Trace | None:
        found: Trace | None = self._traces.get(tensor) if isinstance(tensor, Tensor) else None
        return found

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if torch.compiler.is_compiling():  # a compiled function in the model
            return func(*args, **kwargs)
        result = func(*args, **kwargs)
        if isinstance(result, (Tensor, tuple, list)) or func is Tensor.__setitem__:
            # An operation in a form that is not known here, or on tensors without a shape, leaves its result without a
            # trace, and the model as it is.
            with contextlib.suppress(Exception):
                self._note(Operation(_name(func), list(args), kwargs, result))
        return result

    def _note(self, op: Operation) -> None:
        if op.name == "setitem":
            target, value = op.args[0], self.of(op.args[2])
            if value is not None and isinstance(target, Tensor):
                self._traces[target] = _united(self.of(target), value, target)
            return
        if op.name in _JOINED:
            self._note_joined(op)
            return
        source = self._source(op)
        if source is None:
            return
        trace = self._traces[source]
        if op.args and op.args[0] is source and source.ndim == 3:
            self._listen(op, trace)
        if op.name in _PARTS:
            self._note_parts(op, source, trace)
            return
        out = op.out if isinstance(op.out, Tensor) else op.out[0]
        if isinstance(out, Tensor):
            self._note_result(op._replace(out=out), source, trace)

    def _note_result(self, op: Operation, source: Tensor, trace: Trace) -> None:
        out = op.out
        axes = axes_after(op, source, trace.axes, self._last_of_product(op, source))
        spans = _spans(op, source, trace)
        if op.name not in _REORDERED and _pooled(source, trace.axes, out, axes):
            spans = dict.fromkeys(spans, POOLED)
        found = Trace(spans, axes)
        if op.name in _UNITED:
            for tensor in tensors_within(op.args[1:] if op.name == "where" else op.args):
                other = None if tensor is source or _is_index(op.name, tensor) else self.of(tensor)
                if other is not None:
                    found = _united(found, other, out, alike=tensor.shape == source.shape == out.shape)
        self._traces[out] = found

    def _listen(self, op: Operation, trace: Trace) -> None:
        """A module may say which axis of what it was given is which."""
        if op.name in (*RECURRENT, "pack_padded_sequence") and isinstance(op.args[-1], bool):
            self._hear(trace, sequence_first=not op.args[-1])
        elif op.name == "multi_head_attention_forward":
            self._hear(trace, sequence_first=True)
        elif op.name in ("conv1d", "linear") and trace.axes == (BATCH, LENGTH, None):
            heard = self.channels_first if op.name == "conv1d" else self.features_last
            heard.update(trace.spans.keys() - self._derived)

    def _hear(self, trace: Trace, *, sequence_first: bool) -> None:
        """A module says which axis of what it was given is the sequence."""
        says = (LENGTH, BATCH) if sequence_first else (BATCH, LENGTH)
        if trace.axes[:2] == says:
            self.batch_first.update(trace.spans)
        elif trace.axes[:2] == says[::-1] and not self.batch_first.intersection(trace.spans):
            self.sequence_first.update(trace.spans.keys() - self._derived)

    def _note_joined(self, op: Operation) -> None:
        dim = op.dim(1, op.out)
        before, found = 0, None
        for part in op.args[0]:
            trace = self.of(part)
            if trace is not None:
                if trace.axes[dim] == LENGTH:
                    trace = trace._replace(spans=_shifted(trace, before, op.out.shape[dim] - part.shape[dim]))
                found = _united(found, trace, op.out)
            before += part.shape[dim]
        if found is not None:
            self._traces[op.out] = found

    def _note_parts(self, op: Operation, source: Tensor, trace: Trace) -> None:
        dim = op.dim(1 if op.name == "unbind" else 2, source)
        before = 0
        for part in op.out:
            if op.name == "unbind":
                self._traces[part] = trace._replace(axes=(*trace.axes[:dim], *trace.axes[dim + 1 :]))
            elif trace.axes[dim] == LENGTH:
                spans = _shifted(trace, -before, part.shape[dim] - source.shape[dim])
                self._traces[part] = trace._replace(spans=spans)
                before += part.shape[dim]
            else:
                self._traces[part] = trace

    def _source(self, op: Operation) -> Tensor | None:
        """The tensor whose rows the result has: that of a query, the first factor, the first one that is traced."""
        tensors = list(tensors_within([op.args, op.kwargs]))
        if op.name in _ATTENTION or op.name in PRODUCTS:
            first = tensors[0] if tensors else None
            if self.of(first) is not None:
                return first
            # A matrix of weights times x; but a query that comes of no argument has rows of its own.
            weights = op.name in PRODUCTS and first is not None and first.ndim <= 2
            tensors = tensors[1:] if weights or op.name in ("addmm", "baddbmm") else []
        if op.name == "where":
            tensors = tensors[1:]
        traced = [tensor for tensor in tensors if self.of(tensor) is not None]
        traced = [tensor for tensor in traced if not _is_index(op.name, tensor)] or traced
        if op.name in _UNITED:  # of which the largest has the shape
            traced.sort(key=lambda tensor: -tensor.ndim)
        return traced[0] if traced else None

    def _last_of_product(self, op: Operation, source: Tensor) -> str | None:
        """The last axis of a product: features, but of scores it is that of keys."""
        second = self.of(op.args[1]) if op.name in PRODUCTS and len(op.args) == 2 and op.args[0] is source else None
        return FEATURES if second is None else second.axes[-1]


_ATTENTION = {"scaled_dot_product_attention", "multi_head_attention_forward", "flex_attention", "cdist"}
_UNITED = {
    *("add", "radd", "iadd", "sub", "rsub", "isub", "mul", "rmul", "imul", "div", "true_divide", "truediv"),
    *("where", "lerp", "maximum", "minimum", "addcmul", "copy", "masked_scatter"),
    *("index_add", "index_put", "scatter", "scatter_add"),
}
"""Operations whose result has the rows of several of their tensors."""
_PARTS = {"chunk", "split", "split_with_sizes", "tensor_split", "unsafe_chunk", "unsafe_split", "unbind"}
_REORDERED = {
    *("index_select", "gather", "take_along_dim", "masked_select", "sort", "topk", "take", "argsort", "roll"),
    *("pack_padded_sequence", "pad_packed_sequence"),
}
_JOINED = {"cat", "concat", "concatenate"}


def _name(func: Any) -> str:
    name: str = getattr(func, "__name__", "")
    if name == "__get__":  # a property, as x.T
        name = getattr(getattr(func, "__self__", None), "__name__", "")
    return name.strip("_")


def _is_index(name: str, tensor: Tensor) -> bool:
    """It says where rows go, and has none of its own."""
    return name.startswith(("scatter", "index_")) and not tensor.is_floating_point()


# Spans


def _spans(op: Operation, source: Tensor, trace: Trace) -> Mapping[Source, Span | None]:
    """Where the tokens lie in the result, of what lay in ``source``."""
    if op.name in _REORDERED:
        return dict.fromkeys(trace.spans)
    if op.name == "getitem" and op.args[0] is source:
        indexed = indexed_axes(op.args[1], source)
        if indexed is None:
            return dict.fromkeys(trace.spans)
        for axis, part in indexed:
            if axis is not None and part is not None and trace.axes[axis] == LENGTH:
                size = source.shape[axis]
                start, stop, step = part.indices(size)
                return _shifted(trace, -start, max(stop - start, 0) - size) if step == 1 else dict.fromkeys(trace.spans)
    if op.name == "pad" and (len(op.args) < 3 or op.args[2] == "constant"):
        pads = op.args[1]
        for i in range(len(pads) // 2):
            if trace.axes[source.ndim - 1 - i] == LENGTH:
                return _shifted(trace, pads[2 * i], pads[2 * i] + pads[2 * i + 1])
    return trace.spans


def _pooled(source: Tensor, before: Axes, out: Tensor, after: Axes) -> bool:
    """The rows were made one, or one of them was taken."""
    if LENGTH not in before or source.shape[before.index(LENGTH)] == 1:
        return False
    if LENGTH in after:
        return out.shape[after.index(LENGTH)] == 1
    return out.ndim < source.ndim and out.numel() < source.numel()


def _shifted(trace: Trace, start: int, more: int) -> Mapping[Source, Span | None]:
    """The spans with ``start`` rows more before the tokens, and ``more`` in all."""
    if trace.axes.count(LENGTH) > 1 and (start or more):  # rows in blocks, each of which changed
        return dict.fromkeys(trace.spans)
    return {
        source: None if span is None else Span(span.start + start, None if span.length is None else span.length + more)
        for source, span in trace.spans.items()
    }


# Several tensors


def _united(first: Trace | None, second: Trace, out: Tensor, *, alike: bool = False) -> Trace:
    """The trace of what two tensors made together: a span that fits counts before one that does not.

    Where tensors of one shape (``alike``) contradict each other, as a convolution that mixes tokens and the tokens that
    it is added to, neither says what is what. A smaller one is a gate, and does not contradict.
    """
    if first is None:
        return Trace(second.spans, _broadcast(second.axes, out.ndim))
    ours, theirs = _broadcast(first.axes, out.ndim), _broadcast(second.axes, out.ndim)
    both = FEATURES in ours and FEATURES in theirs
    if alike and both and (FEATURES, FEATURES) not in zip(ours, theirs, strict=True):
        ours = theirs = tuple(a if a == b else None for a, b in zip(ours, theirs, strict=True))
    axes = _merged(ours, theirs)
    length = out.shape[axes.index(LENGTH)] if LENGTH in axes else None
    spans = dict(first.spans)
    for source, span in second.spans.items():
        present = spans.get(source)
        if present is None or (span is not None and present.length != length and span.length == length):
            spans[source] = span
    return Trace(spans, axes)


def _broadcast(axes: Axes, ndim: int) -> Axes:
    return ((None,) * (ndim - len(axes)) + axes)[-ndim:] if ndim else ()


def _merged(first: Axes, second: Axes) -> Axes:
    """``second`` where ``first`` says nothing, and nothing but features that it says elsewhere."""
    return tuple(a or (b if b == FEATURES or b not in first else None) for a, b in zip(first, second, strict=True))


def compiled_within(model: torch.nn.Module) -> bool:
    """A part of the model is compiled, which a mode around it would compile once more."""
    return any(
        hasattr(module, "_orig_mod") or getattr(module, "_compiled_call_impl", None) is not None
        for module in model.modules()
    )
