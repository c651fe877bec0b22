"""Which axis is what: ``layout=``, a module's type and weights, what was followed, the sizes of the tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor, nn

from .operations import BATCH, FEATURES, FLAT, FLATTENED, LENGTH, POSITION, Axes
from .tokens import TRANSFORMERS, sequence_first

_FOLLOWED = "followed through the operations before it"
_WORDS = {
    BATCH: BATCH,
    **dict.fromkeys(("features", "channels", "heads", "streams", "dim"), FEATURES),
    **dict.fromkeys(("length", "sequence", "seq", "tokens"), LENGTH),
    **dict.fromkeys(("height", "width", "depth", "time", "frames", "positions"), POSITION),
}
"""Of ``layout=``, and what they mean."""
_FIRST = (
    *(nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm, nn.GroupNorm),
    *(nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d),
)
_LAST = (nn.Linear, nn.Bilinear, nn.Embedding, nn.LayerNorm, nn.RNNBase, nn.MultiheadAttention, *TRANSFORMERS)


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
    if isinstance(module, _FIRST):
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
    features = None
    for key, module in around.named_children() if isinstance(around, nn.Sequential) else ():
        if key == child:
            break
        says = [by_type(inner)[0] for inner in module.modules()]
        features = next((each for each in reversed(says) if each), features)
    return features


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
    transformers = [outer for outer in around[:-1] if isinstance(outer, TRANSFORMERS)]
    flags = map(sequence_first, (module, *reversed(transformers)))
    return next((flag for flag in flags if flag is not None), False)


# Deciding


def decided(
    name: str, h: Tensor, kind: Kind, followed: Axes | None, sizes: list[tuple[int, int]]
) -> tuple[Axes, str, str | None]:
    """The axes of ``h``, why, and what to pass if that is a guess; ``sizes`` are (batch, length) of the tokens.

    Raises:
        ValueError: it can be read in two ways.
    """
    if h.ndim == 2:
        return _of_two(h, kind, followed, sizes)
    if kind.sequence_first and h.ndim == 3:
        return (LENGTH, BATCH, FEATURES), "batch_first=False", None
    if kind.features == "first" and (kind.spatial is None or h.ndim in (kind.spatial + 1, kind.spatial + 2)):
        batch: Axes = () if kind.spatial == h.ndim - 1 else (BATCH,)
        positions: Axes = (POSITION,) * (h.ndim - 1 - len(batch))
        if followed is not None and LENGTH in followed[-len(positions) :]:
            positions = tuple(axis or POSITION for axis in followed[-len(positions) :])
        return (*batch, FEATURES, *positions), f"its type {kind.typename}", None
    complete = None if followed is None else completed(followed, h, kind)
    if complete is not None:
        return complete, _FOLLOWED, None
    by_sizes = _of_sizes(h, kind, sizes)
    if by_sizes is not None:
        return by_sizes, "the (batch, length) of the tokens", None
    return _of_width(name, h, kind)


def check_features(name: str, h: Tensor, kind: Kind, axes: Axes) -> None:
    """What was followed may have no rows, whatever its sizes are.

    Raises:
        ValueError: it has none.
    """
    if FEATURES not in axes:
        raise ValueError(
            f'the output of module "{name}" ({kind.typename}), of shape {tuple(h.shape)}, was followed as '
            f'"{described(axes)}", which leaves no axis for features of rows, as in attention weights. Leave it out '
            "of layers, or say with layout= what its axes are"
        )


def _of_two(h: Tensor, kind: Kind, followed: Axes | None, sizes: list[tuple[int, int]]) -> tuple[Axes, str, str | None]:
    first, second = (None, None) if followed is None else followed
    fitting = [size for size in sizes if size[0] * size[1] == len(h)]
    if kind.spatial == 1:
        return (FEATURES, POSITION), f"its type {kind.typename}", None
    if first in FLATTENED and fitting:
        return (first, FEATURES), _FOLLOWED, None
    if first in FLATTENED:
        return (BATCH, FEATURES), "rows of several sequences", None
    if first == FEATURES and second is not None:
        return (first, second), _FOLLOWED, None
    if first == LENGTH:
        return (LENGTH, FEATURES), _FOLLOWED, None
    if followed is None and any(1 not in size for size in fitting):
        return (FLAT, FEATURES), "as many rows as the call has tokens", 'layout="batch features" for rows of their own'
    return (BATCH, FEATURES), "two dimensions", None


def completed(axes: Axes, h: Tensor, kind: Kind) -> Axes | None:
    """Followed axes with the unknown ones filled in; None where that is not possible."""
    n = h.ndim
    places = [axis for axis, what in enumerate(axes) if what == FEATURES]
    width_is_last = kind.width == h.shape[-1] and [size == kind.width for size in h.shape].count(True) == 1
    if any(axis in FLATTENED for axis in axes):
        return None
    if LENGTH in axes and BATCH in axes:
        return tuple(axis or FEATURES for axis in axes)
    if len(places) == n - 1 > 1 and axes[0] is None and h.shape[0] > 1 and not width_is_last:  # heads of nodes, say
        return (BATCH, *axes[1:])
    other = POSITION if places else FEATURES
    if not places and (kind.features == "last" or width_is_last):
        places = [n - 1]
    if not places:
        return None
    if LENGTH in axes:  # of one sequence, or of a batch that got lost
        batch = next((axis for axis, what in enumerate(axes) if what is None and axis not in places), None)
        return tuple(BATCH if axis == batch else (what or other) for axis, what in enumerate(axes))
    batch = axes.index(BATCH) if BATCH in axes else 0
    if batch in places or len(places) == n - 1:
        return None
    positions = LENGTH if n == 3 and places[-1] == 2 else POSITION
    return tuple(
        FEATURES if axis in places else BATCH if axis == batch else (what or positions)
        for axis, what in enumerate(axes)
    )


_BY_SIZES: dict[int, tuple[Axes, ...]] = {
    3: ((BATCH, LENGTH, FEATURES), (LENGTH, BATCH, FEATURES), (BATCH, FEATURES, LENGTH)),
    4: (
        (BATCH, LENGTH, FEATURES, FEATURES),
        (LENGTH, BATCH, FEATURES, FEATURES),
        (FEATURES, BATCH, LENGTH, FEATURES),
        (BATCH, FEATURES, LENGTH, FEATURES),
    ),
}
"""By the number of dimensions, where the batch and the length of the tokens may stand."""


def _of_sizes(h: Tensor, kind: Kind, sizes: list[tuple[int, int]]) -> Axes | None:
    """By the places where an output has the (batch, length) of the tokens: of three dimensions the first that fit."""
    for batch, length in sizes:
        readings = [
            axes
            for axes in _BY_SIZES.get(h.ndim, ())
            if (h.shape[axes.index(BATCH)], h.shape[axes.index(LENGTH)]) == (batch, length) and batch != length
        ]
        if kind.width == length:  # which the features have too
            readings = [axes for axes in readings if axes[-1] == FEATURES]
        if len(readings) == 1 or (readings and h.ndim == 3):
            return readings[0]
    return None


def _of_width(name: str, h: Tensor, kind: Kind) -> tuple[Axes, str, str | None]:
    """By the axis that has the size of the module's last weight."""
    n = h.ndim
    last: Axes = (BATCH, *((LENGTH,) if n == 3 else (POSITION,) * (n - 2)), FEATURES)
    first: Axes = (BATCH, FEATURES, *(POSITION,) * (n - 2))
    fits_last, fits_first = h.shape[-1] == kind.width, h.shape[1] == kind.width
    if kind.features == "last" and (fits_last or not fits_first):
        return last, f"its type {kind.typename}", None
    if fits_last != fits_first:
        return last if fits_last else first, f"the size {kind.width} of its last weight", None
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
    for word in text.split():
        if word not in _WORDS:
            raise ValueError(f'layout="{text}" has "{word}"; the words for axes are {", ".join(sorted(_WORDS))}')
    axes = tuple(_WORDS[word] for word in text.split())
    if FEATURES not in axes or axes.count(BATCH) > 1 or len(axes) < 2:
        raise ValueError(f'layout="{text}" must have one axis of features at least, and at most one "batch"')
    return axes


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


def turns(before: Axes, now: Axes) -> bool:
    """Other axes than before have the batch or the features."""
    roles = [[axis if axis in (BATCH, FEATURES) else None for axis in axes] for axes in (before, now)]
    return roles[0] != roles[1]


# Rows


@dataclass
class View:  # Dynamo of torch 2.6 calls no NamedTuple
    """From a hidden tensor, or a gradient of it, to its rows: (batch, length, features)."""

    axes: Axes
    flat: tuple[int, int] | None = None
    """(batch, length) of rows that lie one behind another."""
    shape: tuple[int, int] | None = None
    """(batch, length), where the mask tells another than the axes."""

    def __call__(self, h: Tensor) -> Tensor:
        rows = h
        if self.flat is not None:
            batch, length = self.flat
            if self.axes[0] == FLAT:
                rows = h.reshape(batch, length, -1)
            else:
                rows = h.reshape(length, batch, -1).transpose(0, 1)
        elif self.axes == (BATCH, FEATURES):  # samples are the rows of one sequence
            rows = h.unsqueeze(0)
        elif self.axes != (BATCH, LENGTH, FEATURES):
            rows = self._ordered(h)
        return rows if self.shape is None else rows.reshape(*self.shape, rows.shape[-1])

    def _ordered(self, h: Tensor) -> Tensor:
        batch = [i for i, axis in enumerate(self.axes) if axis == BATCH]
        positions = [i for i, axis in enumerate(self.axes) if axis in (LENGTH, POSITION)]
        features = [i for i, axis in enumerate(self.axes) if i not in batch and i not in positions]
        if not positions:  # samples are the rows of one sequence
            positions, batch = batch, []
        rows = h.permute(*batch, *positions, *features)
        if len(features) > 1:
            rows = rows.flatten(-len(features))
        if len(positions) > 1:
            rows = rows.flatten(len(batch), -2)
        if not positions:
            rows = rows.unsqueeze(0)
        return rows if batch else rows.unsqueeze(0)
