"""Hidden tensors of which each rank holds a part: tensor and sequence parallel.

All ranks of such a mesh share one loss. A part along the rows has windows of its own, whose sums are added up; a part
along the features has a part of each Gram matrix. Both are collectives that give every rank the sum, and hand the
gradient back as it is: what each rank then differentiates is the loss that all of them share. Where windows would cross
from one part to the next, parts are put together first.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeAlias

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F

from .layout import Layout, Reading
from .layout.operations import BATCH, FEATURES, LENGTH, POSITION
from .ranks import is_dtensor

Group: TypeAlias = "dist.ProcessGroup"


class Shards(NamedTuple):
    """Which sums a capture takes part in."""

    rows: tuple[Group, ...] = ()
    """Ranks whose windows are others of the same output, one group for each dimension of the mesh."""
    features: tuple[Group, ...] = ()
    """Ranks that have other features of the same windows."""
    of_angle: float = 1.0
    """Factor on the sums of its angle, for norms that are those of one process."""


class Placed(NamedTuple):
    """Where the parts of one hidden tensor lie."""

    parts: tuple[tuple[Group, int], ...]
    """Ranks, and the axis along which they have parts."""
    ranks: int
    """Of the mesh: they share one loss."""
    copies: int
    """Ranks that have the same part."""
    whole: torch.Size
    """Shape of the hidden tensor that the parts make."""


def plain(loss: Tensor) -> Tensor:
    """A DTensor loss, as that of ``loss_parallel``, as the number that it is on every rank."""
    return loss.full_tensor() if is_dtensor(loss) else loss  # type: ignore[attr-defined]


def _local(h: Any) -> Any:
    """The part of a DTensor that this rank has."""
    return h.to_local() if is_dtensor(h) else h


def digest(tensors: Iterable[Tensor]) -> Tensor | None:
    """Two numbers that are the same for the same tensors, and hardly for others; None where there are none."""
    found: Tensor | None = None
    for i, tensor in enumerate(tensors):
        if tensor.is_nested or tensor.layout != torch.strided or tensor.is_quantized:
            continue
        flat = _local(tensor).detach().reshape(-1)
        values = flat.abs().to(torch.float32) if flat.is_complex() else flat.to(torch.float32)
        places = torch.arange(len(values), device=values.device, dtype=torch.float32).add_(i + 1).sin_()
        own = torch.stack((values.sum(), values @ places))
        found = own if found is None else found.to(own) + own
    return found


def checked_placements(value: Any) -> Any:
    """What ``placements=`` may be: (mesh, placement of each dimension), (), or a mapping from globs to either.

    Raises:
        TypeError, ValueError: it is something else.
    """
    for each in value.values() if isinstance(value, Mapping) else [value]:
        if each is None or each == ():
            continue
        if not (isinstance(each, tuple) and len(each) == 2 and hasattr(each[0], "get_group")):
            raise TypeError(f"placements must be (mesh, placement), as (mesh, Shard(1)), found {each!r}")
        mesh, placements = each[0], _all(each[1])
        if len(placements) != mesh.ndim:
            raise ValueError(
                f"placements has {len(placements)} of them for a mesh of {mesh.ndim} dimensions; name one for each, as "
                "(mesh, (Replicate(), Shard(1))), or give the dimension: (mesh['tp'], Shard(1))"
            )
    return value


def _all(placements: Any) -> tuple[Any, ...]:
    return tuple(placements) if isinstance(placements, (tuple, list)) else (placements,)


def placed(name: str, h: Any, declared: Any) -> Placed | None:
    """Where the parts of ``h`` lie: by its own placements, or by those that were declared; None where it is whole.

    Raises:
        ValueError: parts are sums, or not equally large.
    """
    if is_dtensor(h):
        mesh, placements = h.device_mesh, h.placements
    elif declared:
        mesh, placements = declared[0], _all(declared[1])
    else:
        return None
    whole = list(h.shape)
    parts: list[tuple[Group, int]] = []
    for i, placement in enumerate(placements):
        if placement.is_replicate():
            continue
        if not placement.is_shard():
            raise ValueError(
                f'the output of module "{name}" is a {placement} over a mesh, of which a rank knows a summand only; '
                "redistribute it to Replicate() or Shard(1) in the model, or watch the module behind it"
            )
        axis = placement.dim % h.ndim
        size = mesh.size(i)
        if is_dtensor(h) and whole[axis] % size:
            raise ValueError(
                f'the output of module "{name}" has {whole[axis]} along axis {axis}, which {size} ranks do not share '
                f"equally; make it a multiple of {size}"
            )
        if not is_dtensor(h):
            whole[axis] *= size
        parts.append((mesh.get_group(i), axis))
    if len({axis for _, axis in parts}) < len(parts):
        raise ValueError(f'the output of module "{name}" is sharded twice along one axis; shard it along two, or once')
    ranks = mesh.size()
    return Placed(tuple(parts), ranks, ranks // math.prod(dist.get_world_size(g) for g, _ in parts), torch.Size(whole))


@dataclass
class PartView:  # Dynamo of torch 2.6 calls no NamedTuple
    """From the part that this rank has, or a gradient of it, to rows (batch, length, features)."""

    view: Callable[[Tensor], Tensor]
    gathered: tuple[tuple[Group, int], ...]
    placements: Any
    """Of a DTensor."""
    fewest: int
    """Features that the rows are filled up to with zeros: Gram matrices of all ranks are of one form."""

    def __call__(self, h: Any) -> Tensor:
        if is_dtensor(h):
            if tuple(h.placements) != tuple(self.placements):  # of a gradient
                h = h.redistribute(placements=self.placements)
            h = h.to_local(grad_placements=self.placements)
        rows = self.view(_gathered(h, self.gathered))
        missing = self.fewest - rows.shape[-1]
        return F.pad(rows, (0, missing)) if missing > 0 else rows


def read_part(
    layout: Layout, name: str, output: Any, h: Any, at: Placed, window: int | None
) -> tuple[Reading, Shards, int]:
    """What this rank's part of an output means, which sums it takes part in, and the features of the whole.

    Args:
        layout: reads the whole.
        name: of the module.
        output: what it returned.
        h: the hidden tensor in it.
        at: where its parts lie.
        window: rows of a window; None = whole sequences.
    """
    stand_in = _local(h).detach().new_zeros(()).expand(at.whole)
    reading = layout.read(name, output, whole=stand_in)
    view: Any = reading.view
    length, width = reading.rows.shape[1:]
    simple = view.flat is None and view.shape is None
    positions = [axis for axis in view.axes if axis in (LENGTH, POSITION)]
    unmasked = reading.live is None and reading.segments is None
    own: list[Group] = []
    features: list[Group] = []
    gathered: list[tuple[Group, int]] = []
    live, segments = reading.live, reading.segments
    for group, axis in at.parts:
        size, what = dist.get_world_size(group), view.axes[axis]
        part = at.whole[axis] // size
        if what == FEATURES and view.axes.count(FEATURES) == 1:
            features.append(group)
        elif what == BATCH and positions and simple:
            own.append(group)
            start = dist.get_rank(group) * part
            live = None if live is None else live[start : start + part]
            segments = None if segments is None else segments[start : start + part]
        elif simple and len(positions) <= 1 and unmasked and window is not None and part % window == 0:
            own.append(group)
        else:
            gathered.append((group, axis))
            _tell_gathered(layout, name, window, part, unmasked)
    fewest = (length if window is None else min(window, length)) if features else 0
    placements = h.placements if is_dtensor(h) else None
    to_rows: Any = PartView(view, tuple(gathered), placements, fewest)
    copies = at.copies * math.prod(dist.get_world_size(group) for group, _ in gathered)
    shards = Shards(tuple(own), tuple(features), at.ranks**2 / copies)
    part_of = reading._replace(h=h, rows=to_rows(h), live=live, segments=segments, view=to_rows)
    return part_of, shards, width


def read_whole(layout: Layout, name: str, output: Any, h: Any, at: Placed) -> Reading:
    """The whole output, put together from the parts of all ranks."""
    return layout.read(name, output, whole=_gathered(_local(h), at.parts))


def _gathered(part: Tensor, parts: Sequence[tuple[Group, int]]) -> Tensor:
    """The parts of all ranks along these axes, put together."""
    for group, axis in parts:
        part = _Gather.apply(part, group, axis)  # type: ignore[no-untyped-call]
    return part


def _tell_gathered(layout: Layout, name: str, window: int | None, part: int, unmasked: bool) -> None:
    if not unmasked:
        why = "its rows are masked or in documents, whose windows cross from one part to the next"
    elif window is None:
        why = "a window is a whole sequence"
    else:
        fits = math.gcd(window, part)
        why = f"windows of {window} rows cross from one part of {part} rows to the next"
        why += f" (EntropyConfig(window={fits}) would not)" if fits > 1 else ""
    layout.tell_once(
        f'the output of module "{name}" is put together from the parts of all ranks of its mesh, which takes memory '
        f"and one more collective: {why}",
        subject=f"gathered {name}",
    )


class _Sum(torch.autograd.Function):
    """The sum over ranks that share one loss; its gradient is the same on all of them."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, groups: Sequence[Group]) -> Tensor:
        total = values.clone(memory_format=torch.contiguous_format)
        for group in groups:
            dist.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


class _Gather(torch.autograd.Function):
    """The parts of all ranks along an axis; each gets back the gradient of its own."""

    @staticmethod
    def forward(ctx: Any, part: Tensor, group: Group, axis: int) -> Tensor:
        ctx.axis, ctx.start, ctx.size = axis, dist.get_rank(group) * part.shape[axis], part.shape[axis]
        parts = [
            torch.empty_like(part, memory_format=torch.contiguous_format) for _ in range(dist.get_world_size(group))
        ]
        dist.all_gather(parts, part.contiguous(), group=group)
        return torch.cat(parts, axis)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return grad.narrow(ctx.axis, ctx.start, ctx.size), None, None


def sum_grams(calls: Sequence[Any]) -> None:
    """Add up the Gram matrices of captures whose features lie on several ranks, in place; one collective per mesh."""
    for groups, members in _by_groups([call.shards and call.shards.features for call in calls]).items():
        grams = [calls[i].gram for i in members]
        summed = _Sum.apply(torch.cat([gram.reshape(-1) for gram in grams]), groups)  # type: ignore[no-untyped-call]
        for i, gram, own in zip(members, grams, summed.split([gram.numel() for gram in grams]), strict=True):
            calls[i].gram = own.reshape(gram.shape)


def sum_windows(calls: Sequence[Any], sums: Tensor) -> Tensor:
    """Add up (2, calls), sums over windows and the windows' numbers, of captures whose rows lie on several ranks."""
    for groups, members in _by_groups([call.shards and call.shards.rows for call in calls]).items():
        places = torch.tensor(members, device=sums.device)
        totals, counts = _Sum.apply(sums[:, places], groups)  # type: ignore[no-untyped-call]
        sums = sums.index_copy(1, places, torch.stack((totals, counts.detach())))
    return sums


def _by_groups(groups: Sequence[Any]) -> dict[tuple[Group, ...], list[int]]:
    found: dict[tuple[Group, ...], list[int]] = {}
    for i, each in enumerate(groups):
        if each:
            found.setdefault(each, []).append(i)
    return found
