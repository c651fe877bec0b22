"""Matrix-based Rényi entropy of a representation matrix, with closed-form gradients.

With the eigenvalues p of rho = C / tr C, where C is the Gram matrix of the rows of Z under a kernel
(:mod:`gapt_optim.kernels`),

    S_a(Z) = log(sum p^a) / (1 - a)                                     in nats,
    dS_a/dC = a / (1 - a) * (rho^(a-1) / tr(rho^a) - I) / tr C,

with the von Neumann entropy -sum p log p at a = 1 and the min-entropy -log max p at a = inf (Giraldo, Rao and
Principe, "Measures of entropy from data using infinitely divisible kernels", 2015, whose normalized Gram matrix is
that of `cosine`).

It is made of two autograd functions: :class:`Gram` takes rows to the Gram matrices K of their windows, and
:class:`EntropyOfGram` takes K to S, with dS/dK in closed form. Everything behind S is ordinary autograd.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from .config import EntropyConfig
from .kernels import (
    LINEAR,
    Kernel,
    KernelMatrix,
    full_precision,
    inverse_norms,
    kernel_rows,
    least,
    measures_of_gram,
    no_trace,
    squared_norms,
    windows_first,
    windows_last,
)
from .windows import Windows, cut, joined, rows_that_count

# Orders up to this are taken by matrix products. Beyond, powers of small eigenvalues leave float32's range.
_LARGEST_POWER = 8

_PIECE = 2**24
"""Numbers of a hidden tensor of low precision that are made float32 at once."""


def matrix_entropy(
    z: Tensor,
    *,
    alpha: float = 2.0,
    kernel: Literal["linear", "cosine"] = "cosine",
    center: bool = True,
    mask: Tensor | None = None,
    normalize: bool = False,
) -> Tensor:
    """Matrix-based Rényi entropy of each matrix in ``z``, differentiable once.

    >>> import torch
    >>> rows = torch.eye(4)                               # four orthogonal directions
    >>> matrix_entropy(rows, kernel="linear", center=False).exp()
    tensor(4.)
    >>> matrix_entropy(rows).exp()                        # about their mean, one direction fewer
    tensor(3.0000)

    Args:
        z: (..., n, d), real floating point: n tokens or samples with d features.
        alpha: order, in (0, inf]. 1 is the von Neumann entropy, ``math.inf`` the min-entropy.
        kernel: "cosine" uses the direction of each row, whatever its length; with "linear", a few long rows dominate
            the matrix. With "cosine", and with ``center``, a row of zeros counts as masked.
        center: subtract the mean of the rows, so that a vector which all rows share does not count.
        mask: (..., n), broadcastable to ``z``'s leading shape; rows where it is false or 0 do not count
            and receive no gradient.
        normalize: divide by the logarithm of the largest rank, min(live rows, d), with ``center`` min(live rows - 1,
            d), which maps the entropy to [0, 1].

    Returns:
        (...) in nats, at least 0 and at most log rank; float64 for float64 input, otherwise float32.
        A matrix of zeros, one with no live row, and with ``center`` one with a single live row or with rows that are
        all equal, has entropy 0 and gradient 0. For alpha < 1 the gradient at a rank-deficient matrix is taken on its
        support, where it is finite.

    Raises:
        TypeError: ``z`` is not real floating point.
        ValueError: ``z`` has fewer than two dimensions, ``alpha`` or ``kernel`` is out of range, or ``mask`` does not
            fit.
    """
    if not isinstance(z, Tensor):
        raise TypeError(f"z must be a tensor, found {type(z).__name__}")
    if not z.is_floating_point():
        raise TypeError(f"z must be a real floating-point tensor, found {z.dtype}; convert it with z.float()")
    if z.ndim < 2:
        raise ValueError(f"z must have shape (..., n, d), found {tuple(z.shape)}")
    if not alpha > 0:
        raise ValueError(f"alpha must lie in (0, inf], found {alpha}")
    if kernel not in ("linear", "cosine"):
        raise ValueError(f'kernel must be "linear" or "cosine", found {kernel!r}')
    if mask is not None:
        try:
            mask = mask.to(device=z.device, dtype=torch.bool).expand(z.shape[:-1])
        except RuntimeError:
            expected, found = tuple(z.shape[:-1]), tuple(mask.shape)
            raise ValueError(f"mask must have shape {expected}, one value per row of z, found {found}") from None
    shape, single = z.shape[-2:], torch.promote_types(z.dtype, torch.float32)
    if 0 in shape:
        return z.sum((-2, -1), dtype=single)
    rows = z.reshape(math.prod(z.shape[:-2]), *shape)
    keep = None if mask is None else mask.reshape(rows.shape[:-1])
    order = Order(float(alpha), Kernel(kernel == "cosine", bool(center)), normalize)
    gram, live = gram_with_gradient(rows, Windows(shape[0], None, keep), order, None)
    value, _, _ = entropies(gram, live, order, shape, z.dtype)
    return value.reshape(z.shape[:-2]).to(single)


class Order(NamedTuple):
    """Which entropy: its order, its kernel, and whether it is divided by the logarithm of the largest rank."""

    alpha: float = 2.0
    kernel: Kernel = Kernel(cosine=True, center=True)
    normalize: bool = False

    def dtype(self, given: torch.dtype) -> torch.dtype:
        """In which Gram matrices of rows of the ``given`` one are computed."""
        # Eigenvalues near zero matter where they are taken, and the Gram matrix squares the condition number.
        return torch.promote_types(given, torch.float32) if _by_power(self.alpha) else torch.float64

    @property
    def fewest(self) -> int:
        """Rows that count which a window needs for an entropy: with fewer, there is one direction at most."""
        return 3 if self.kernel.center else 2

    @property
    def depends_on_features(self) -> bool:
        """Of two windows with one Gram matrix, that of more features may have another entropy: eigenvalues are told
        from rounding by the features, and a normalized entropy is divided by their logarithm."""
        return self.normalize or not _by_power(self.alpha)


def order_of(config: EntropyConfig) -> Order:
    """The entropy that a configuration names."""
    return Order(float(config.alpha), Kernel(config.kernel == "cosine", config.center), config.normalize)


class Gram(torch.autograd.Function):
    """Rows to the Gram matrices of their windows: K = Z Zᵀ, or Yᵀ Y of the kernel's rows Y where n > d.

    It saves the rows as they are, and neither copies nor changes them.

    ``apply(rows, places, keep, size, alpha, cosine, center, module)`` takes rows (batch, length, d), their windows
    (:class:`gapt_optim.windows.Windows`), and the name of the module that returned them, or None. It gives K
    (windows, m, m) with m = min(n, d), and the rows that count (windows,), or K alone where K or the shape tell them.
    """

    @staticmethod
    def forward(
        ctx: Any,
        rows: Tensor,
        places: Tensor | None,
        keep: Tensor | None,
        size: int,
        alpha: float,
        cosine: bool,
        center: bool,
        module: str | None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        ctx.windows, ctx.order, ctx.module = Windows(size, places, keep), Order(alpha, Kernel(cosine, center)), module
        # Of a call that a checkpoint repeats, the rows are made again. Its windows are not: they may be of a mask that
        # the repeated call does not have.
        ctx.save_for_backward(rows.clone() if torch.compiler.is_compiling() else rows)
        ctx.set_materialize_grads(False)
        gram, live = gram_of(rows, ctx.windows, ctx.order)
        if live is None:  # Dynamo of torch 2.6 takes no None among what a function returns
            return gram
        ctx.mark_non_differentiable(live)
        return gram, live

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
        if grad is None:
            return (None,) * 8
        module, compiling = ctx.module, torch.compiler.is_compiling()
        if module is not None and torch.is_grad_enabled() and not compiling:
            raise RuntimeError(
                f'the entropy of module "{module}" cannot be differentiated twice, and this backward pass was asked '
                "for a graph (create_graph=True) in compression, or where parameter alignment is due; run what needs "
                "second derivatives inside `with hook.measuring():`, or keep the gate in memorization with "
                "GateConfig(frozen=True)"
            )
        rows = ctx.saved_tensors[0] if compiling else saved_rows(ctx, module)
        with torch.no_grad():
            d = gradient_of_rows(grad + grad.mT, rows, ctx.windows, ctx.order)
            if module is not None:
                # Without this, one overflowing layer would put nan into every weight below it.
                d = d.nan_to_num_(0.0, 0.0, 0.0)
        if torch.is_grad_enabled() and not compiling:
            d = _Once.apply(d, rows)  # type: ignore[no-untyped-call]
        return (d, *[None] * 7)


def gram_with_gradient(
    rows: Tensor, windows: Windows, order: Order, module: str | None
) -> tuple[Tensor, Tensor | None]:
    """What :class:`Gram` gives; the rows that count are None where K or the shape tell them."""
    found = Gram.apply(  # type: ignore[no-untyped-call]
        rows, windows.places, windows.keep, windows.size, order.alpha, *order.kernel, module
    )
    return found if isinstance(found, tuple) else (found, None)


def saved_rows(node: Any, module: str | None) -> Tensor:
    """What a :class:`Gram` node saved. Raises RuntimeError where the rows were changed in place since."""
    rows: Tensor | None = node.__dict__.pop("unpacked", None)
    if rows is not None:  # by the angle at this layer, just before: a checkpoint lets tensors be unpacked once
        return rows
    try:
        (rows,) = node.saved_tensors
    except RuntimeError as error:
        if module is None or "inplace" not in str(error):
            raise
        raise RuntimeError(
            f'the output of module "{module}" was changed in place by what follows it, so that its entropy cannot be '
            "differentiated; give the operation behind it inplace=False (out = out + x in place of out += x), or watch "
            "that module instead"
        ) from error
    return rows


class _Once(torch.autograd.Function):
    """A gradient, tied to what it is the gradient of: it would otherwise pass for a constant."""

    @staticmethod
    def forward(ctx: Any, gradient: Tensor, rows: Tensor) -> Tensor:
        return gradient.view_as(gradient)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        raise RuntimeError("matrix_entropy is differentiable once; its gradient was differentiated again")


class EntropyOfGram(torch.autograd.Function):
    """Gram matrices K to entropies S, in closed form.

    ``apply(gram, live, order, shape, dtype)``: see :func:`entropy_of_gram`. It gives S (windows,), the rows that count
    (windows,) or None, and the factor F (windows, m, m) = 2 dS/dK, with dS/dZ = F Z; only S has a gradient.
    """

    @staticmethod
    def forward(
        ctx: Any, gram: Tensor, live: Tensor | None, order: Order, shape: Sequence[int], dtype: torch.dtype
    ) -> tuple[Tensor, Tensor | None, Tensor]:
        value, live, factor = entropy_of_gram(gram, live, order, shape, dtype, with_factor=True)
        assert factor is not None
        ctx.save_for_backward(factor)
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(factor, *([] if live is None else [live]))
        return value, live, factor

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
        if grad is None:
            return (None,) * 5
        (factor,) = ctx.saved_tensors
        half = (grad * 0.5)[:, None, None]
        # A factor of 0 times one that is not finite would be nan.
        return (torch.where(half != 0, factor * half, 0), *[None] * 4)


def gram_of(rows: Tensor, windows: Windows, order: Order) -> tuple[Tensor, Tensor | None]:
    """What :class:`Gram` gives, without a gradient of its own."""
    z = cut(rows, windows)
    size, features = z.shape[-2:]
    pieces, wide_rows = _pieces(z), size <= features
    live = None
    if order.kernel.plain:
        live = rows_that_count(windows, *rows.shape[:2])
    elif not wide_rows:
        live = torch.cat([_live(piece, order) for piece in pieces])
    grams = [_products(piece, order, wide=wide_rows) for piece in pieces]
    return (grams[0] if len(grams) == 1 else torch.cat(grams)), live


def _products(z: Tensor, order: Order, *, wide: bool) -> Tensor:
    z = z.to(order.dtype(z.dtype))
    with full_precision(z):
        if wide:
            return torch.bmm(z, z.mT)
        y = kernel_rows(z, order.kernel)
        return torch.bmm(y.mT, y)


def _live(z: Tensor, order: Order) -> Tensor:
    z = z.to(order.dtype(z.dtype))
    return (squared_norms(z) <= least(z)).logical_not_().sum(-1)  # a row that is not finite counts


def gradient_of_rows(factor: Tensor, rows: Tensor, windows: Windows, order: Order) -> Tensor:
    """dS/dZ in the shape and dtype of ``rows``, from the symmetric ``factor`` (windows, m, m) with dS/dZ = F Z."""
    z = cut(rows, windows)
    parts = _pieces(z)
    if len(parts) == 1:
        d = _gradient(factor, z, order.kernel).to(rows.dtype)
    else:
        d = torch.empty_like(z)
        factors = torch.split(factor, [len(part) for part in parts])
        for out, own, part in zip(_pieces(d), factors, parts, strict=True):
            out.copy_(_gradient(own, part, order.kernel))
    return joined(d, windows, *rows.shape[:2])


def _gradient(factor: Tensor, z: Tensor, kernel: Kernel) -> Tensor:
    z = z.to(factor.dtype)  # a factor of order 1 / |z|² may lie outside of float32 where the gradient does not
    with full_precision(z):
        if z.shape[-2] <= z.shape[-1]:
            return torch.bmm(factor, z)
        if kernel.plain:
            return torch.bmm(z, factor)
        d = torch.bmm(kernel_rows(z, kernel), factor)  # H d = d: these rows are centered
        if kernel.cosine:
            scale = inverse_norms(squared_norms(z)).unsqueeze(-1)
            unit = z * scale
            d = (d - unit * (d * unit).sum(-1, keepdim=True)) * scale
        return d


def _pieces(z: Tensor) -> Sequence[Tensor]:
    """``z`` in parts where its whole float32 copy would take as much memory as two activations."""
    if z.dtype in (torch.float32, torch.float64) or z.numel() <= _PIECE or torch.compiler.is_compiling():
        return (z,)
    return torch.split(z, max(1, _PIECE // (z.shape[-2] * z.shape[-1])))


def entropies(
    gram: Tensor, live: Tensor | None, order: Order, shape: Sequence[int], dtype: torch.dtype
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """:func:`entropy_of_gram`, differentiable; the factor is there where a gradient may flow."""
    if torch.is_grad_enabled() and gram.requires_grad:
        found = EntropyOfGram.apply(gram, live, order, shape, dtype)  # type: ignore[no-untyped-call]
        value, live, factor = found
        return value, live, factor
    return entropy_of_gram(gram, live, order, shape, dtype, with_factor=False)


def entropy_of_gram(
    gram: Tensor, live: Tensor | None, order: Order, shape: Sequence[int], dtype: torch.dtype, *, with_factor: bool
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Entropy of each window, and the symmetric matrix that turns Z into its gradient.

    Args:
        gram: (windows, m, m) from :class:`Gram`.
        live: (windows,) rows that count, as :class:`Gram` gives them.
        order: which entropy.
        shape: (n, d) of the matrices Z; with ``dtype``, it tells rank from rounding.
        dtype: that of Z.
        with_factor: False returns None for the factor and saves its work.

    Returns:
        The entropy (windows,) in nats, the rows that count (windows,), None where all do, and the factor
        (windows, m, m) = 2 dS/dK. Where the Gram matrix is not finite, neither is the entropy.
    """
    reduced = gram.shape[-1] < shape[0]  # of ranks that share out the features, also where n > d it is not
    matrix = KernelMatrix(windows_last(gram), LINEAR if reduced else order.kernel)
    value, factor = _entropy_of(matrix, order.alpha, shape, dtype, with_factor)
    inverse, live = matrix.inverse, live if matrix.live is None else matrix.live
    if order.normalize:
        scale = _normalizer(value, live, shape, order.kernel)
        value, inverse = value * scale, inverse * scale
    if factor is None:
        return value, live, None
    return value, live, windows_first(matrix.differential(factor.mul_(inverse)))


def measures_of(gram: Tensor) -> tuple[Tensor, Tensor]:
    """:func:`gapt_optim.kernels.measures_of_gram` of linear Gram matrices (windows, n, n)."""
    last = windows_last(gram)
    return measures_of_gram(last, KernelMatrix(last, LINEAR))


def window_weights(live: Tensor | None, like: Tensor, fewest: int, size: int) -> Tensor:
    """1 for the windows that can have an entropy, and 0 for those with fewer than ``fewest`` rows that count.

    Args:
        live: (windows,) rows that count; None where all ``size`` do.
        like: (windows,), for dtype and device.
    """
    if live is None:
        return torch.ones_like(like) if size >= fewest else torch.zeros_like(like)
    return (live >= fewest).to(like.dtype)


def _normalizer(like: Tensor, live: Tensor | None, shape: Sequence[int], kernel: Kernel) -> Tensor:
    """1 / log of the largest rank for matrices of ``shape`` (n, d), and 0 where that is at most 1."""
    n, d = shape
    rows = torch.full_like(like, n) if live is None else live.to(like.dtype)
    limit = (rows - 1 if kernel.center else rows).clamp(max=d).log()
    return torch.where(limit > 0, limit.reciprocal(), 0)


def _by_power(alpha: float) -> bool:
    return 2 <= alpha <= _LARGEST_POWER and float(alpha).is_integer()


def _entropy_of(
    gram: KernelMatrix, alpha: float, shape: Sequence[int], dtype: torch.dtype, with_gradient: bool
) -> tuple[Tensor, Tensor | None]:
    """S (windows,) and tr(C) dS/dC * 2 (m, m, windows)."""
    if alpha == 2:
        return gram.order_2, _slope(gram.rho, gram.purity, 2) if with_gradient else None
    rho = windows_first(gram.rho)
    with full_precision(rho):
        if _by_power(alpha):
            power = torch.linalg.matrix_power(rho, int(alpha) - 1)
            total = (power * rho).sum((-2, -1))
            total = total.masked_fill(total < no_trace(gram.rho, int(alpha)), 1)
            value = total.log().clamp_(max=0).abs_().div_(alpha - 1)
            return value, _slope(power.permute(1, 2, 0), total, int(alpha)) if with_gradient else None
        noise = None if gram.noise is None else gram.noise * gram.inverse
        value, factor = _from_eigenvalues(rho, alpha, with_gradient, _rank_tolerance(dtype, *shape), noise)
        return value, None if factor is None else windows_last(factor)


def _slope(power: Tensor, total: Tensor, alpha: int) -> Tensor:
    """2 tr(C) dS/dC for whole alpha >= 2, from rho^(alpha - 1) (m, m, windows) and tr(rho^alpha) (windows,)."""
    factor = 2 * alpha / (alpha - 1)
    slope = power * (-factor / total)
    slope.diagonal().add_(factor)
    return slope


def _from_eigenvalues(
    rho: Tensor, alpha: float, with_gradient: bool, tolerance: float, noise: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """S and tr(C) dS/dC * 2 for any alpha. Eigenvalues within rounding of zero count as zero.

    Args:
        tolerance: what that is, relative to the largest eigenvalue.
        noise: (...,) the same in absolute terms, where a matrix is the difference of larger ones.
    """
    if not rho.numel():
        return rho.new_zeros(rho.shape[:-2]), rho if with_gradient else None
    finite = rho.isfinite().all(-1).all(-1)
    # eigh raises on non-finite input, which would end a training run; such matrices come back as nan instead.
    p, vectors = torch.linalg.eigh(torch.where(finite[..., None, None], rho, 0))
    # A row of zeros has no part in a direction, but for rounding.
    vectors = torch.where(rho.diagonal(dim1=-2, dim2=-1).unsqueeze(-1) > 0, vectors, 0)
    largest = p[..., -1:]
    zero = largest.squeeze(-1) < 0.5 / rho.shape[-1]  # there was no trace to normalize by
    limit = tolerance * largest
    support = p > (limit if noise is None else torch.maximum(limit, noise.unsqueeze(-1)))
    p = torch.where(support, p, 1)
    log_p = p.log()
    if alpha == 1:
        p = torch.where(support, p, 0)
        value = -(p * log_p).sum(-1)
        slope = -2 * (log_p + value.unsqueeze(-1))
    elif math.isinf(alpha):
        # Where the largest eigenvalue is shared, the mean over its eigenvectors is a subgradient.
        top = support & (p >= largest * (1 - 1e-12))
        value = -log_p[..., -1]
        slope = 2 - 2 * top / (top.sum(-1, keepdim=True) * p)
    else:
        excess = (alpha - 1) * log_p
        if abs(alpha - 1) < 0.5:  # log(sum p^alpha), exact to the last digits as alpha nears 1
            total = torch.where(support, p * excess.expm1(), 0).sum(-1).log1p()
        else:
            total = torch.where(zero, 0, torch.where(support, excess + log_p, -math.inf).logsumexp(-1))
        value = total / (1 - alpha)
        slope = 2 * alpha / (1 - alpha) * (excess - total.unsqueeze(-1)).expm1()
    alive = finite & ~zero
    value = torch.where(alive, value.clamp(min=0).abs(), torch.where(finite, 0, math.nan))
    if not with_gradient:
        return value, None
    slope = torch.where(support & alive.unsqueeze(-1), slope, 0)
    return value, (vectors * slope.unsqueeze(-2)) @ vectors.mT


def _rank_tolerance(dtype: torch.dtype, n: int, d: int) -> float:
    """Smallest eigenvalue, relative to the largest, that is told from rounding; `torch.linalg.matrix_rank`'s rule."""
    largest, eps = max(n, d), torch.finfo(torch.promote_types(dtype, torch.float32)).eps
    return max((largest * eps) ** 2, largest * torch.finfo(torch.float64).eps)
