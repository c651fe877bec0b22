"""Which axis is what: ``layout=``, a module's type and weights, what was followed, the sizes of the tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor, nn

from .following import Trace
from .operations import BATCH, FEATURES, FLAT, FLAT_SEQUENCE_FIRST, LENGTH, POSITION, Axes
from .tokens import sequence_first

_FEATURES = {"features", "channels", "heads", "streams", "dim"}
_POSITIONS = {"length", "sequence", "seq", "tokens", "height", "width", "depth", "time", "frames", "positions"}
_TRANSFORMERS = (
    nn.Transformer,
    nn.TransformerEncoder,
    nn.TransformerDecoder,
    nn.TransformerEncoderLayer,
    nn.TransformerDecoderLayer,
)
_LAST = (nn.Linear, nn.Bilinear, nn.Embedding, nn.LayerNorm, nn.RNNBase, nn.MultiheadAttention, *_TRANSFORMERS)
_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
_INSTANCE_NORMS = (nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d)


class Kind(NamedTuple):
    """What a module says of the axes of its output."""

    features: str | None
    """"first" for channels before positions, "last", or None where its type says nothing."""
    spatial: int | None
    """Positions' axes behind the channels, where its type says how many."""
    width: int | None
    """The size of its last weight."""
    ending: str | None
    """As ``features``, of the last module in it that has weights, which is only a hint."""
    sequence_first: bool
    typename: str


def kind_of(model: nn.Module, name: str, module: nn.Module) -> Kind:
    """What ``module``, which is called ``name`` in ``model``, says."""
    features, spatial = by_type(module)
    last = next((m for m in reversed(list(module.modules())) if any(True for _ in m.parameters(recurse=False))), None)
    ending = None if last is None else by_type(last)[0]
    if last is None:
        ending = _by_predecessor(model, name)
    width = None if last is None else _width(last)
    return Kind(features, spatial, width, ending, puts_sequence_first(model, name), type(module).__name__)


def by_type(module: nn.Module) -> tuple[str | None, int | None]:
    """Where a module of this type has the features, and how many axes of positions."""
    if isinstance(module, nn.modules.conv._ConvNd):
        return "first", len(module.kernel_size)
    if isinstance(module, (*_NORMS, *_INSTANCE_NORMS)):
        return "first", None
    if isinstance(module, nn.GroupNorm):
        return "first", None
    if isinstance(module, nn.Unfold):
        return "first", 1
    if type(module).__module__ == "torch.nn.modules.pooling":
        return "first", int(type(module).__name__.removesuffix("d")[-1])
    if isinstance(module, _LAST) or type(module).__name__.endswith("RMSNorm"):
        shape = getattr(module, "normalized_shape", ())
        return ("last", None) if len(shape) <= 1 else (None, None)
    return None, None


def _by_predecessor(model: nn.Module, name: str) -> str | None:
    """Of a module without weights in an nn.Sequential: what the one before it says."""
    parent, _, child = name.rpartition(".")
    around = model.get_submodule(parent) if name else None
    if not isinstance(around, nn.Sequential):
        return None
    before = []
    for key, module in around.named_children():
        if key == child:
            break
        before.append(module)
    for module in reversed(before):
        last = next((m for m in reversed(list(module.modules())) if by_type(m)[0]), None)
        if last is not None:
            return by_type(last)[0]
    return None


def _width(module: nn.Module) -> int | None:
    for attribute in ("out_features", "embedding_dim", "num_features", "num_channels", "out_channels", "embed_dim"):
        size = getattr(module, attribute, None)
        if isinstance(size, int):
            return size
    shape = getattr(module, "normalized_shape", None)
    if isinstance(shape, tuple) and shape:
        return int(shape[-1])
    if isinstance(module, nn.RNNBase):
        return (module.proj_size or module.hidden_size) * (2 if module.bidirectional else 1)
    own = {name: parameter.shape for name, parameter in module.named_parameters(recurse=False) if parameter.ndim}
    sizes = list(own.values())
    if len(own) == 2 and len(sizes[0]) == 2 and own.get("bias") == sizes[0]:  # for each number of what it is given
        return int(sizes[0][-1])
    return int(sizes[-1][0]) if sizes else None


def puts_sequence_first(model: nn.Module, name: str) -> bool:
    """The module ``name`` returns (seq, batch, d), by its ``batch_first`` or that of the transformer around it."""
    module, around = model, [model]
    for part in name.split(".") if name else []:
        module = module.get_submodule(part)
        around.append(module)
    own = sequence_first(module)
    flags = [own, *(sequence_first(outer) for outer in reversed(around[:-1]) if isinstance(outer, _TRANSFORMERS))]
    return next((flag for flag in flags if flag is not None), False)


# Deciding


def decided(
    name: str, h: Tensor, kind: Kind, trace: Trace | None, sizes: list[tuple[int, int]]
) -> tuple[Axes, str, str | None]:
    """The axes of ``h``, why, and what to pass if that is a guess.

    Raises:
        ValueError: it can be read in two ways.
    """
    axes = None if trace is None else trace.axes
    if h.ndim == 2:
        return _of_two(h, kind, axes, sizes)
    if kind.sequence_first and h.ndim == 3:
        return (LENGTH, BATCH, FEATURES), "batch_first=False", None
    if kind.features == "first" and (kind.spatial is None or h.ndim in (kind.spatial + 1, kind.spatial + 2)):
        batch: Axes = () if kind.spatial == h.ndim - 1 else (BATCH,)
        positions: Axes = (POSITION,) * (h.ndim - 1 - len(batch))
        if axes is not None and LENGTH in axes[-len(positions) :]:
            positions = axes[-len(positions) :]
        return (*batch, FEATURES, *(axis or POSITION for axis in positions)), f"its type {kind.typename}", None
    if axes is not None:
        complete = completed(axes, h, kind)
        if complete is not None:
            _refuse_unreadable(name, h, kind, complete)
            return complete, "followed through the operations before it", None
    by_sizes = _of_sizes(h, kind, sizes)
    if by_sizes is not None:
        return by_sizes, "the (batch, length) of the tokens", None
    return _of_width(name, h, kind)


class FollowedError(ValueError):
    """What was followed has no rows, whatever its sizes are."""


def _refuse_unreadable(name: str, h: Tensor, kind: Kind, axes: Axes) -> None:
    if FEATURES not in axes:
        raise FollowedError(
            f'the output of module "{name}" ({kind.typename}), of shape {tuple(h.shape)}, was followed as '
            f'"{described(axes)}", which leaves no axis for features of rows, as in attention weights. Leave it out '
            "of layers, or say with layout= what its axes are"
        )


def _of_two(h: Tensor, kind: Kind, axes: Axes | None, sizes: list[tuple[int, int]]) -> tuple[Axes, str, str | None]:
    if kind.spatial == 1:
        return (FEATURES, POSITION), f"its type {kind.typename}", None
    if axes is not None and axes[0] in (FLAT, FLAT_SEQUENCE_FIRST):
        if any(batch * length == len(h) for batch, length in sizes):
            return (axes[0], FEATURES), "followed through the operations before it", None
        return (BATCH, FEATURES), "rows of several sequences", None
    if axes is not None and axes[0] == FEATURES and axes[1] is not None:
        return axes, "followed through the operations before it", None
    if axes is None and any(batch * length == len(h) and 1 not in (batch, length) for batch, length in sizes):
        return (FLAT, FEATURES), "as many rows as the call has tokens", 'layout="batch features" for rows of their own'
    if axes is not None and axes[0] == LENGTH:
        return (LENGTH, FEATURES), "followed through the operations before it", None
    return (BATCH, FEATURES), "two dimensions", None


def completed(axes: Axes, h: Tensor, kind: Kind) -> Axes | None:
    """Followed axes with the unknown ones filled in; None where that is not possible."""
    places = [axis for axis, what in enumerate(axes) if what == FEATURES]
    tokens = LENGTH in axes and BATCH in axes
    if any(axis in (FLAT, FLAT_SEQUENCE_FIRST) for axis in axes):
        return None
    if tokens:
        return tuple(axis or FEATURES for axis in axes)
    several = len(places) > 1 and len(places) == h.ndim - 1
    if several and axes[0] is None and h.shape[0] > 1 and not _fits_width(h, kind, h.ndim - 1):  # heads of nodes, say
        return (BATCH, *axes[1:])
    known = bool(places)
    if not places:
        if kind.features != "last" and not _fits_width(h, kind, h.ndim - 1):
            return None
        places = [h.ndim - 1]
    if LENGTH in axes:  # of one sequence, or of a batch that got lost
        rest = [axis for axis, what in enumerate(axes) if what is None and axis not in places]
        filled = [axis or (POSITION if known else FEATURES) for axis in axes]
        if rest:
            filled[rest[0]] = BATCH
        return tuple(filled)
    batch = axes.index(BATCH) if BATCH in axes else 0
    if batch in places or len(places) == h.ndim - 1:
        return None
    positions = LENGTH if h.ndim == 3 and places[-1] == 2 else POSITION
    return tuple(
        FEATURES if axis in places else BATCH if axis == batch else (what or positions)
        for axis, what in enumerate(axes)
    )


def _fits_width(h: Tensor, kind: Kind, axis: int) -> bool:
    return kind.width == h.shape[axis] and [size == kind.width for size in h.shape].count(True) == 1


def _of_sizes(h: Tensor, kind: Kind, sizes: list[tuple[int, int]]) -> Axes | None:
    """By the places where an output has the (batch, length) of the tokens, if there is one such reading."""
    for batch, length in sizes:
        if batch == length:
            continue
        shape = tuple(h.shape)
        if h.ndim == 3 and shape[:2] == (batch, length):
            return (BATCH, LENGTH, FEATURES)
        if h.ndim == 3 and shape[:2] == (length, batch):
            return (LENGTH, BATCH, FEATURES)
        if h.ndim == 3 and (shape[0], shape[2]) == (batch, length) and kind.width != length:
            return (BATCH, FEATURES, LENGTH)
        if h.ndim == 4:
            readings = [
                reading
                for reading, sized in (
                    ((BATCH, LENGTH, FEATURES, FEATURES), shape[:2]),
                    ((LENGTH, BATCH, FEATURES, FEATURES), (shape[1], shape[0])),
                    ((FEATURES, BATCH, LENGTH, FEATURES), shape[1:3]),
                    ((BATCH, FEATURES, LENGTH, FEATURES), (shape[0], shape[2])),
                )
                if sized == (batch, length)
            ]
            if len(readings) == 1:
                return readings[0]
    return None


def _of_width(name: str, h: Tensor, kind: Kind) -> tuple[Axes, str, str | None]:
    """By the axis that has the size of the module's last weight."""
    n = h.ndim
    last: Axes = (BATCH, *((LENGTH,) if n == 3 else (POSITION,) * (n - 2)), FEATURES)
    first: Axes = (BATCH, FEATURES, *(POSITION,) * (n - 2))
    if kind.features == "last" and (h.shape[-1] == kind.width or kind.width is None or h.shape[1] != kind.width):
        return last, f"its type {kind.typename}", None
    why = f"the size {kind.width} of its last weight"
    fits_last, fits_first = h.shape[-1] == kind.width, h.shape[1] == kind.width
    if fits_last and not fits_first:
        return last, why, None
    if fits_first and not fits_last:
        return first, why, None
    if n == 3 and kind.ending != "first":
        return last, "three dimensions", f'layout="{described(last)}" or "{described(first)}"'
    if kind.ending is not None and not fits_last:
        reading = first if kind.ending == "first" else last
        return reading, f"what is {'before' if kind.width is None else 'last in'} it", f'layout="{described(reading)}"'
    raise ValueError(
        f'the output of module "{name}" ({kind.typename}), of shape {tuple(h.shape)}, can be read as '
        f'"{described(last)}" or as "{described(first)}"; pass layout= with the right one, as '
        f'layout={{"{name}": "{described(last)}"}}'
    )


# layout=


def parsed(text: str) -> Axes:
    """``"batch height width channels"`` as axes.

    Raises:
        TypeError: it is no string.
        ValueError: a word is not known, or there are no features.
    """
    if not isinstance(text, str):
        raise TypeError(f"layout must be a string or a mapping from globs to strings, found {type(text).__name__}")
    axes: list[str | None] = []
    for word in text.split():
        if word == BATCH:
            axes.append(BATCH)
        elif word in _FEATURES:
            axes.append(FEATURES)
        elif word in _POSITIONS:
            axes.append(LENGTH if word in ("length", "sequence", "seq", "tokens") else POSITION)
        else:
            known = ", ".join(sorted({BATCH} | _FEATURES | _POSITIONS))
            raise ValueError(f'layout="{text}" has "{word}"; the words for axes are {known}')
    if FEATURES not in axes or axes.count(BATCH) > 1 or len(axes) < 2:
        raise ValueError(f'layout="{text}" must have one axis of features at least, and at most one "batch"')
    return tuple(axes)


def given(name: str, text: str, h: Tensor) -> Axes:
    """The axes of ``layout=``, where ``h`` has as many.

    Raises:
        ValueError: it has not.
    """
    axes = parsed(text)
    if len(axes) != h.ndim:
        raise ValueError(
            f'layout="{text}" names {len(axes)} axes, but the output of module "{name}" has {h.ndim}, of shape '
            f"{tuple(h.shape)}; name each of them, from the first to the last"
        )
    return axes


def described(axes: Axes) -> str:
    """As ``layout=`` has it."""
    # Dynamo of torch 2.6 knows no tuple.count.
    places, features = (len([axis for axis in axes if axis == kind]) for kind in (POSITION, FEATURES))
    positions = {1: ["length"], 2: ["height", "width"], 3: ["depth", "height", "width"]}.get(places, [])
    image = features == 1 and places > 0
    words = []
    for axis in axes:
        if axis == POSITION:
            words.append(positions.pop(0) if positions else "positions")
        elif axis == FEATURES and image:
            words.append("channels")
        else:
            words.append(str(axis))
    return " ".join(words)


# Rows


def batch_and_length(h: Tensor, axes: Axes) -> tuple[int, int]:
    positions = [size for size, axis in zip(h.shape, axes, strict=True) if axis in (LENGTH, POSITION)]
    batch = [size for size, axis in zip(h.shape, axes, strict=True) if axis == BATCH]
    if not positions:
        return 1, batch[0] if batch else 1
    length = 1
    for size in positions:
        length *= size
    return (batch[0] if batch else 1), length


@dataclass
class View:  # Dynamo of torch 2.6 calls no NamedTuple
    """From a hidden tensor, or a gradient of it, to its rows."""

    axes: Axes
    flat: tuple[int, int] | None
    """(batch, length) of rows that lie one behind another."""
    shape: tuple[int, int] | None = None
    """(batch, length), where the mask tells another than the axes."""

    def __call__(self, h: Tensor) -> Tensor:
        rows = as_rows(h, self.axes, self.flat)
        return rows if self.shape is None else rows.reshape(*self.shape, rows.shape[-1])


def as_rows(h: Tensor, axes: Axes, flat: tuple[int, int] | None) -> Tensor:
    """``h`` as (batch, length, features)."""
    if flat is not None:
        if axes[0] == FLAT_SEQUENCE_FIRST:
            return h.reshape(flat[1], flat[0], -1).transpose(0, 1)
        return h.reshape(flat[0], flat[1], -1)
    if axes == (BATCH, LENGTH, FEATURES):
        return h
    if axes == (BATCH, FEATURES):  # samples are the rows of one sequence
        return h.unsqueeze(0)
    batch = [i for i, axis in enumerate(axes) if axis == BATCH]
    positions = [i for i, axis in enumerate(axes) if axis in (LENGTH, POSITION)]
    features = [i for i, axis in enumerate(axes) if i not in batch and i not in positions]
    if not positions:  # samples are the rows of one sequence
        positions, batch = batch, []
    rows = h.permute(*batch, *positions, *features)
    if len(features) > 1:
        rows = rows.flatten(len(batch) + len(positions))
    if len(positions) > 1:
        rows = rows.flatten(len(batch), len(batch) + len(positions) - 1)
    if not positions:
        rows = rows.unsqueeze(0)
    return rows if batch else rows.unsqueeze(0)
