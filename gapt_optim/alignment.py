"""Angles between the gradients of two losses: cosines, projections, norms."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import Tensor

from .entropy import Order, entropy_of_gram, gradient_of_rows, gram_of, saved_rows, window_weights
from .kernels import Kernel
from .ranks import is_dtensor, sum_over_ranks
from .windows import Windows

if TYPE_CHECKING:
    from .passes import Capture

Rows: TypeAlias = Callable[[Tensor], Tensor]
"""From a hidden tensor, or a gradient of it, to its rows."""

_PIECE = 2**18

Parameters: TypeAlias = Tensor | Iterable[Tensor | tuple[str, Tensor]]
"""A tensor, tensors, or (name, tensor) pairs as ``model.named_parameters()`` gives them."""


@dataclass(frozen=True)
class Angle:
    """The angle between the loss gradient g and the entropy gradient d, in one layer or tensor.

    >>> Angle.of(gd=3.0, gg=9.0, dd=4.0).cosine  # <g,d>, ‖g‖², ‖d‖²
    0.5
    """

    cosine: float | None
    """<g,d> / (‖g‖ ‖d‖), in [-1, 1]; None where a norm is zero or not finite."""
    projection: float | None
    """<d,g> / ‖g‖², the coefficient of d's projection on g; None like the cosine."""
    loss_norm: float
    """‖g‖, of the loss as it was differentiated (scaled, where the loss was scaled)."""
    entropy_norm: float
    """‖d‖, on the same scale; without the objective's weight."""

    @classmethod
    def of(cls, gd: float, gg: float, dd: float) -> Angle:
        """From <g,d>, ‖g‖² and ‖d‖²."""
        defined = gg > 0 and dd > 0 and math.isfinite(gg) and math.isfinite(dd) and math.isfinite(gd)
        return cls(
            cosine=max(-1.0, min(1.0, gd / math.sqrt(gg) / math.sqrt(dd))) if defined else None,
            projection=gd / gg if defined else None,
            loss_norm=math.sqrt(gg),
            entropy_norm=math.sqrt(dd),
        )


@dataclass(frozen=True)
class Alignment(Angle):
    """The angle between two gradients as a whole, and per layer or parameter.

    >>> import torch
    >>> w = torch.ones(2, requires_grad=True)
    >>> found = gradient_alignment(w.sum(), w[0], {"w": w}.items())
    >>> round(found.cosine, 3), round(found.parameters["w"].cosine, 3), found.shared
    (0.707, 0.707, 1)
    """

    layers: dict[str, Angle] = field(default_factory=dict)
    """Per watched layer."""
    parameters: dict[str, Angle] = field(default_factory=dict)
    """Per parameter tensor that both losses reach (parameter space only)."""
    shared: int | None = None
    """Parameter tensors that both losses reach; the angle is over these (parameter space only)."""
    only_loss: int | None = None
    """Parameter tensors that only the first loss reaches."""
    only_entropy: int | None = None
    """Parameter tensors that only the second loss, the entropy, reaches."""


def activation_alignment(
    names: Sequence[str], statistics: Sequence[Sequence[float]], counted: Sequence[str]
) -> Alignment | None:
    """Alignment from each layer's <g,d>, ‖g‖² and ‖d‖², for the mean entropy over the layers that count.

    The overall angle is that of the gradients of these layers laid end to end. None where no gradient arrived at all,
    or none that is a number.
    """
    if not any(gg > 0 for _, gg, _ in statistics):
        return None
    of_layer = dict(zip(names, statistics, strict=True))
    # d is the gradient of one layer's entropy; the mean over n layers has 1/n of it.
    share = 1 / len(counted)
    gd, gg, dd = _totals([of_layer[name] for name in counted])
    layers = {name: Angle.of(*row) for name, row in of_layer.items()}
    return _alignment(Angle.of(gd * share, gg, dd * share * share), layers=layers)


def parameter_alignment(
    names: Sequence[str],
    reached: Sequence[tuple[bool, bool]],
    statistics: Sequence[Sequence[float]],
    layers: Sequence[str],
) -> Alignment:
    """Alignment from each parameter tensor's <g,d>, ‖g‖² and ‖d‖².

    Args:
        names: of the parameters.
        reached: per parameter, whether the loss and whether the entropy reaches it. A gradient of zeros does not
            count where there are two: a compiled backward gives one to whatever it passes.
        statistics: three numbers per parameter, ignored where not both reach it.
        layers: names of modules; a layer's parameters are those whose names begin with its own.
    """
    by = [
        (a and (not b or gg != 0), b and (not a or dd != 0))
        for (a, b), (_, gg, dd) in zip(reached, statistics, strict=True)
    ]
    shared = {name: row for name, both, row in zip(names, by, statistics, strict=True) if all(both)}
    prefixes = {layer: layer + "." if layer else "" for layer in layers}
    in_layer = {layer: [row for name, row in shared.items() if name.startswith(p)] for layer, p in prefixes.items()}
    return _alignment(
        Angle.of(*_totals(list(shared.values()))),
        layers={layer: Angle.of(*_totals(rows)) for layer, rows in in_layer.items() if rows},
        parameters={name: Angle.of(*row) for name, row in shared.items()},
        shared=len(shared),
        only_loss=by.count((True, False)),
        only_entropy=by.count((False, True)),
    )


def gradient_alignment(loss_a: Tensor, loss_b: Tensor, parameters: Parameters) -> Alignment:
    """Angle between the gradients of two losses of any kind.

    Neither ``.grad`` nor the graph is touched, so both losses can still be differentiated. Takes two backward
    passes and the memory of both gradients.

    >>> import torch
    >>> w = torch.ones(2, requires_grad=True)
    >>> round(gradient_alignment(w.sum(), -w.sum(), w).cosine, 6)
    -1.0

    Args:
        loss_a, loss_b: scalars.
        parameters: a tensor, tensors, or (name, tensor) pairs as ``model.named_parameters()`` gives them. Those that
            do not require a gradient are passed over.

    Returns:
        Cosine, norms and projection of b's gradient on a's, over the parameters that both losses reach and for each.

    Raises:
        TypeError, ValueError: a loss is no scalar that requires a gradient, or no parameter requires one.
        RuntimeError: a parameter is sharded.
    """
    named = _named(parameters)
    a, b = (_gradients(name, loss, named) for name, loss in (("loss_a", loss_a), ("loss_b", loss_b)))
    reached = [(x is not None, y is not None) for x, y in zip(a, b, strict=True)]
    return parameter_alignment(list(named), reached, dots(a, b).tolist(), ())


def gradient_cosines(losses: Sequence[Tensor], parameters: Parameters) -> list[list[float | None]]:
    """Cosines between the gradients of several losses, for example of one loss on several micro-batches.

    With ``[*cross_entropies, *entropies]`` of n micro-batches, the blocks of the result are the CE-CE, CE-MBE and
    MBE-MBE cosines of arXiv 2505.08727. Takes one backward pass and the memory of a gradient per loss.

    >>> import torch
    >>> w = torch.ones(2, requires_grad=True)
    >>> gradient_cosines([w[0], w[1], 2 * w[0]], w)
    [[1.0, 0.0, 1.0], [0.0, 1.0, 0.0], [1.0, 0.0, 1.0]]

    Args:
        losses: scalars.
        parameters: as for :func:`gradient_alignment`. A parameter that a loss does not reach counts as zero.

    Returns:
        A symmetric table, None where a gradient is zero.

    Raises:
        TypeError, ValueError, RuntimeError: as for :func:`gradient_alignment`.
    """
    named = _named(parameters)
    gradients = [_gradients(f"losses[{i}]", loss, named) for i, loss in enumerate(losses)]
    gram = [[math.fsum(dots(a, b)[:, 0].tolist()) for b in gradients[: i + 1]] for i, a in enumerate(gradients)]
    lower = [[Angle.of(gram[i][j], gram[i][i], gram[j][j]).cosine for j in range(i + 1)] for i in range(len(losses))]
    return [[lower[max(i, j)][min(i, j)] for j in range(len(losses))] for i in range(len(losses))]


def dots(first: Sequence[Tensor | None], second: Sequence[Tensor | None]) -> Tensor:
    """<a,b>, |a|² and |b|² of each pair, (pairs, 3); zeros where one is None."""
    return stacked([None if a is None or b is None else dot(a, b) for a, b in zip(first, second, strict=True)])


def dot(a: Tensor, b: Tensor) -> Tensor:
    """<a,b>, |a|² and |b|², in float32 or better."""
    dtype = torch.promote_types(torch.promote_types(a.dtype, b.dtype), torch.float32)
    # A float32 dot product of tens of millions of numbers is off by 1e-4 on CPU; in pieces it is not.
    x, y = (torch.split(t.detach().to_dense().to(dtype).reshape(-1), _PIECE) for t in (a, b))
    pairs = ((x, y), (x, x), (y, y))
    pieces = [torch.dot(u, v) for left, right in pairs for u, v in zip(left, right, strict=True)]
    return torch.stack(pieces).reshape(3, -1).sum(1)


def stacked(rows: Sequence[Tensor | None]) -> Tensor:
    """What :func:`dot` gave for each pair, (pairs, 3), on one device; zeros for None."""
    given = [row for row in rows if row is not None]
    like = given[0].new_zeros(3) if given else torch.zeros(3)
    dtype = torch.float64 if any(row.dtype == torch.float64 for row in given) else like.dtype
    return torch.stack([(like if row is None else row).to(device=like.device, dtype=dtype) for row in rows])


def sharded(parameters: Mapping[str, Tensor]) -> str | None:
    """The name of a parameter that is the shard of one; None where none is."""
    for name, parameter in parameters.items():
        flat = getattr(parameter, "_is_flat_param", False) or getattr(parameter, "_fsdp_flattened", False)
        if flat or is_dtensor(parameter):
            return name
    return None


def refuse_sharded(parameters: Mapping[str, Tensor], advice: str) -> None:
    """Raise RuntimeError if a parameter is the shard of one: the forward pass runs on another tensor."""
    name = sharded(parameters)
    if name is not None:
        raise RuntimeError(
            f'parameter "{name}" is sharded ({type(parameters[name]).__name__}): the forward pass runs on what is '
            f"gathered from all ranks, so that no gradient of a single loss reaches it. {advice}"
        )


class Angles:
    """The angle at one layer, summed over the calls of a step.

    The sums are <g,d>, |g|² and |d|², for the gradient g of the loss that arrives at the layer's output, and the
    gradient d of the sum of the entropies of its windows.
    """

    def __init__(self, device: torch.device) -> None:
        self.paused = False
        self._sums: Tensor | None = None
        self._probe = torch.zeros(3, device=device, requires_grad=True)
        """In a compiled model the sums leave the backward as the gradient of this leaf: it runs no Python."""

    def watch(self, seen: Tensor, capture: Capture, windows: Windows, order: Order, view: Rows) -> None:
        """Add what arrives at ``seen``, a view of the hidden tensor, once the objective gave ``capture`` its factor."""

        def arrived(g: Tensor) -> None:
            if self.paused:
                return
            factor, capture.factor = capture.factor, None
            if factor is None:  # the gradient of something else
                return
            node = capture.saved.next_functions[0][0]  # of Gram
            with torch.no_grad():
                try:
                    saved = saved_rows(node, None)
                except RuntimeError:  # changed in place since
                    return
                if capture.pressed:  # the Gram node's own backward comes next
                    node.unpacked = saved
                sums = _sums(view(g.detach()), gradient_of_rows(factor, saved, windows, order))
                self._sums = sums if self._sums is None else self._sums + sums.to(self._sums)

        seen.register_hook(arrived)  # type: ignore[no-untyped-call]

    def in_graph(
        self, h: Tensor, view: Rows, windows: Windows, order: Order, features: int, groups: tuple[Any, ...]
    ) -> Tensor:
        """``h`` with a place behind it where g arrives alone, for a compiled model.

        Args:
            h, view, windows, order: the hidden tensor, and how it is read.
            features: of a whole row.
            groups: ranks that have other features of the same rows.
        """
        probe = self._probe if self._probe.device == h.device else self._probe.to(h.device)  # the model moved since
        found: Tensor = _Place.apply(  # type: ignore[no-untyped-call]
            h,
            probe,
            windows.places,
            windows.keep,
            windows.size,
            order.alpha,
            *order.kernel,
            order.normalize,
            view,
            features,
            groups,
        )
        return found

    def take(self, device: torch.device) -> Tensor:
        """The sums (3,) since the last call, zeros where no backward came by."""
        sums = self._sums if self._probe.grad is None else self._probe.grad
        self.clear()
        return torch.zeros(3, device=device) if sums is None else sums.to(device, non_blocking=True)

    def clear(self) -> None:
        self._sums = self._probe.grad = None


class _Place(torch.autograd.Function):
    """The identity. It knows d from its own forward, and gives the probe the sums of :class:`Angles`."""

    @staticmethod
    def forward(
        ctx: Any,
        h: Tensor,
        probe: Tensor,
        places: Tensor | None,
        keep: Tensor | None,
        size: int,
        alpha: float,
        cosine: bool,
        center: bool,
        normalize: bool,
        view: Rows,
        features: int,
        groups: tuple[Any, ...],
    ) -> Tensor:
        windows, order = Windows(size, places, keep), Order(alpha, Kernel(cosine, center), normalize)
        rows = view(h)
        gram, live = gram_of(rows, windows, order)
        for group in groups:
            gram = sum_over_ranks(gram, group)
        shape = size, features
        value, live, factor = entropy_of_gram(gram, live, order, shape, rows.dtype, with_factor=True)
        assert factor is not None
        factor = factor * window_weights(live, value, order.fewest, size)[:, None, None]
        ctx.save_for_backward(h, places, keep, factor)
        ctx.size, ctx.order, ctx.view = size, order, view
        return h.clone()  # what follows may work in place, which torch refuses on a view

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        h, places, keep, factor = ctx.saved_tensors
        with torch.no_grad():
            d = gradient_of_rows(factor, ctx.view(h), Windows(ctx.size, places, keep), ctx.order)
            return (g, _sums(ctx.view(g), d), *[None] * 10)


def _sums(g: Tensor, d: Tensor) -> Tensor:
    if not torch.compiler.is_compiling():
        return dot(g, d)
    g, d = g.reshape(-1).to(torch.float32), d.reshape(-1).to(torch.float32)
    return torch.stack((torch.dot(g, d), torch.dot(g, g), torch.dot(d, d)))


def _gradients(name: str, loss: Tensor, named: dict[str, Tensor]) -> tuple[Tensor | None, ...]:
    if not isinstance(loss, Tensor):
        raise TypeError(f"{name} must be a tensor, found {type(loss).__name__}")
    if loss.numel() != 1 or not loss.requires_grad:
        raise ValueError(
            f"{name} must be one number that requires a gradient, found shape {tuple(loss.shape)}, "
            f"requires_grad={loss.requires_grad}; pass the scalar loss of a forward pass with gradients on"
        )
    return torch.autograd.grad(loss, list(named.values()), retain_graph=True, allow_unused=True)


def _named(parameters: Parameters) -> dict[str, Tensor]:
    parameters = [parameters] if isinstance(parameters, Tensor) else parameters
    pairs = [(str(i), item) if isinstance(item, Tensor) else item for i, item in enumerate(list(parameters))]
    named = {name: parameter for name, parameter in pairs if parameter.requires_grad}
    if not named:
        raise ValueError("parameters holds no tensor that requires a gradient; pass model.parameters()")
    refuse_sharded(named, "Compare the gradients of a model that is not sharded")
    return named


def _totals(rows: Sequence[Sequence[float]]) -> tuple[float, float, float]:
    gd, gg, dd = (sum(column) for column in zip(*rows, strict=True)) if rows else (0.0, 0.0, 0.0)
    return gd, gg, dd


def _alignment(overall: Angle, **parts: Any) -> Alignment:
    return Alignment(overall.cosine, overall.projection, overall.loss_norm, overall.entropy_norm, **parts)
