"""Matrix-based Rényi entropy of a representation matrix, with closed-form gradients.

For Z with n rows and d columns, the Gram matrix of its rows is C. Two choices, the *kernel*, say how:

    linear    C_ij = <z_i, z_j>
    cosine    C_ij = <z_i, z_j> / (|z_i| |z_j|)

and either may be *centered*, C <- H C H with H = I - 11ᵀ / n, as kernels are in CKA and HSIC. With the eigenvalues p
of rho = C / tr C,

    S_a(Z) = log(sum p^a) / (1 - a)                                     in nats,
    dS_a/dC = a / (1 - a) * (rho^(a-1) / tr(rho^a) - I) / tr C,

with the von Neumann entropy -sum p log p at a = 1 and the min-entropy -log max p at a = inf (Giraldo, Rao and
Principe, "Measures of entropy from data using infinitely divisible kernels", 2015, whose normalized Gram matrix is
that of `cosine`).

Where n <= d, all of it follows from the linear Gram matrix K = Z Zᵀ alone. With D = diag(K_ii), C = D^-1/2 K D^-1/2
and G = H (dS/d(HCH)) H, the matrix M with dS/dZ = M Z is 2 D^-1/2 (G - diag((G C)_ii)) D^-1/2. Where n > d, the rows
are scaled and centered first, and the d x d matrix Zᵀ Z of these rows, which has the same eigenvalues, takes C's place.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

# Orders up to this are taken by matrix products. Beyond, powers of small eigenvalues leave float32's range.
_LARGEST_POWER = 8


class Kernel(NamedTuple):
    """How the Gram matrix of rows is made."""

    cosine: bool
    """Rows are scaled to unit length."""
    center: bool
    """Then their mean is taken off."""

    @property
    def plain(self) -> bool:
        """The linear Gram matrix as it is, in which a row of zeros is a row like any other."""
        return not (self.cosine or self.center)


LINEAR = Kernel(cosine=False, center=False)
CENTERED_COSINE = Kernel(cosine=True, center=True)


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
    cosine = kernel == "cosine"
    value: Tensor = _MatrixEntropy.apply(z, float(alpha), cosine, bool(center), mask, normalize)  # type: ignore[no-untyped-call]
    return value


class _MatrixEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, z: Tensor, alpha: float, cosine: bool, center: bool, mask: Tensor | None, normalize: bool
    ) -> Tensor:
        ctx.kernel = Kernel(cosine, center)
        rows = masked(z, mask)
        gram = gram_matrix(rows, alpha, ctx.kernel)
        live = count_rows(rows, mask, alpha, ctx.kernel)
        value, factor, _ = entropy_of_gram(
            kernel_matrix(windows_last(gram), ctx.kernel, z.shape[-2:]),
            alpha,
            ctx.kernel,
            z.shape[-2:],
            z.dtype,
            None if live is None else live.reshape(-1),
            normalize,
            with_gradient=ctx.needs_input_grad[0],
        )
        ctx.save_for_backward(z, mask, None if factor is None else windows_first(factor).reshape(gram.shape))
        return value.reshape(z.shape[:-2]).to(torch.promote_types(z.dtype, torch.float32))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        z, mask, factor = ctx.saved_tensors
        return _Gradient.apply(z, grad, mask, factor, ctx.kernel), *[None] * 5  # type: ignore[no-untyped-call]


class _Gradient(torch.autograd.Function):
    """dS/dZ, tied to Z: once_differentiable would let it pass for a constant where ``grad`` is one."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, grad: Tensor, mask: Tensor | None, factor: Tensor, kernel: Kernel) -> Tensor:
        return entropy_gradient(factor * grad[..., None, None], masked(z, mask), kernel).to(z.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        raise RuntimeError("matrix_entropy is differentiable once; its gradient was differentiated again")


def masked(z: Tensor, mask: Tensor | None) -> Tensor:
    """``z`` with the rows where ``mask`` is false set to zero; a zero row does not change an entropy."""
    return z if mask is None else z.masked_fill(~mask.unsqueeze(-1), 0)


def count_rows(z: Tensor, mask: Tensor | None, alpha: float, kernel: Kernel) -> Tensor | None:
    """Rows that count in each matrix, (...,); None where all do, or where :func:`entropy_of_gram` sees them itself."""
    if kernel.plain:
        return None if mask is None else mask.sum(-1)
    if z.shape[-2] <= z.shape[-1]:
        return None
    z = _for_order(z, alpha)
    return (_squared_norms(z) > _least(z)).sum(-1)


def gram_matrix(z: Tensor, alpha: float, kernel: Kernel) -> Tensor:
    """Z Zᵀ where n <= d; otherwise Yᵀ Y of the rows Y that ``kernel`` makes of Z.

    Returns:
        (..., m, m) with m = min(n, d), in the dtype that ``alpha`` needs.
    """
    z = _for_order(z, alpha)
    with _full_precision(z):
        if z.shape[-2] <= z.shape[-1]:
            return _matmul(z, z.mT)
        y = _kernel_rows(z, kernel)
        return _matmul(y.mT, y)


def entropy_gradient(factor: Tensor, z: Tensor, kernel: Kernel) -> Tensor:
    """dS/dZ (..., n, d) from the matrix of :func:`entropy_of_gram`, in float32 or better."""
    dtype = torch.promote_types(z.dtype, torch.float32)
    z = z.to(factor.dtype)  # a factor of order 1 / |z|² may lie outside of float32 where the gradient does not
    with _full_precision(z):
        if z.shape[-2] <= z.shape[-1]:
            return _matmul(factor, z).to(dtype)
        if kernel.plain:
            return _matmul(z, factor).to(dtype)
        d = _matmul(_kernel_rows(z, kernel), factor)  # H d = d: these rows are centered
        if kernel.cosine:
            scale = _inverse_norms(_squared_norms(z)).unsqueeze(-1)
            unit = z * scale
            d = (d - unit * (d * unit).sum(-1, keepdim=True)) * scale
        return d.to(dtype)


def windows_last(gram: Tensor) -> Tensor:
    """(..., m, m) as (m, m, windows): operations on so small matrices are fast where they run over windows."""
    flat = gram.unsqueeze(0).flatten(0, -3)
    moved = flat.permute(1, 2, 0)
    # Few large matrices stay as they lie in memory.
    return moved.contiguous() if len(flat) > gram.shape[-1] else moved


def windows_first(matrices: Tensor) -> Tensor:
    """(m, m, windows) as (windows, m, m), contiguous."""
    m, _, count = matrices.shape
    # A transposition of two dimensions is several times as fast as a permutation of three.
    return matrices.reshape(m * m, count).mT.contiguous().reshape(count, m, m)


def kernel_matrix(gram: Tensor, kernel: Kernel, shape: Sequence[int]) -> KernelMatrix:
    """The matrix of ``kernel`` from that of :func:`gram_matrix`, windows last, for matrices Z of ``shape`` (n, d)."""
    n, d = shape
    return KernelMatrix(gram, LINEAR) if n > d else KernelMatrix(gram, kernel)


class KernelMatrix:
    """The Gram matrices of a kernel, from the linear ones K = Z Zᵀ.

    Args:
        gram: (n, n, windows), linear. Under all but the plain kernel a row of zeros does not count.
        kernel: the kernel. Where n > d, the Gram matrix is that of the kernel already, to be given as the plain one.
    """

    def __init__(self, gram: Tensor, kernel: Kernel) -> None:
        self.kernel = kernel
        self.live: Tensor | None = None
        """(windows,) rows that count; None where all do."""
        self.noise: Tensor | None = None
        """(windows,) rounding of the matrix, where it is the difference of larger ones: a trace at or below it is 0."""
        matrix = gram
        if not kernel.plain:
            inverse = _inverse(gram.diagonal().mT)
            self.alive = (inverse > 0).to(gram.dtype)  # (n, windows), 1 for rows that count, otherwise 0
            self.live = self.alive.sum(0)
            self.count = self.live.clamp(min=1)
        if kernel.cosine:
            self.scale = inverse.sqrt_()
            matrix = (gram * self.scale).mul_(self.scale.unsqueeze(1))
        self.uncentered = matrix
        if kernel.center:
            assert self.live is not None  # a kernel that centers is not the plain one
            whole = self.live if kernel.cosine else matrix.diagonal().sum(-1)  # a live row of cosine has 1 there
            self.noise = (16 * torch.finfo(gram.dtype).eps * whole).clamp_(min=_least(gram))
            matrix = self._centered(matrix)
        self.inverse = _inverse(matrix.diagonal().sum(-1), self.noise)
        """(windows,) 1 / trace; 0 for a matrix that counts as zero."""
        # It is this that is squared, not the matrix, so that the range of scales is that of the trace.
        self.rho = matrix.mul_(self.inverse) if kernel.center else matrix * self.inverse
        """(n, n, windows), the matrix with trace 1."""

        # Computed once. A cached_property holds a lock, which breaks a compiled graph.
        self._purity: Tensor | None = None
        self._order_2: Tensor | None = None

    @property
    def purity(self) -> Tensor:
        """(windows,) tr(rho²); 1 for a matrix that counts as zero."""
        if self._purity is None:
            total = self.rho.square().sum((0, 1))
            self._purity = total.masked_fill_(total < _no_trace(self.rho, 2), 1)
        return self._purity

    @property
    def order_2(self) -> Tensor:
        """(windows,) entropy of order 2."""
        if self._order_2 is None:
            self._order_2 = self.purity.log().clamp_(max=0).abs_()
        return self._order_2

    def differential(self, factor: Tensor) -> Tensor:
        """2 dS/dK of the linear Gram matrices, from 2 dS/d(matrix), in its place."""
        if self.kernel.center:
            factor = self._centered(factor, out=factor)
        if self.kernel.cosine:
            # A length of its own changes nothing: the gradient of a row is orthogonal to it.
            factor.diagonal().sub_((factor * self.uncentered).sum(0).mT)
            factor.mul_(self.scale).mul_(self.scale.unsqueeze(1))
        return factor

    def _centered(self, matrix: Tensor, out: Tensor | None = None) -> Tensor:
        """H M H, with H = diag(l) - l lᵀ / count over the rows l that count."""
        # Entries between a row that counts and one that does not are 0.
        means = matrix.sum(0).div_(self.count).mul_(self.alive)
        half = torch.sub(means, means.sum(0) / self.count, alpha=0.5).mul_(self.alive)
        matrix = torch.addcmul(matrix, self.alive, half.unsqueeze(1), value=-1, out=out)
        return matrix.addcmul_(self.alive.unsqueeze(1), half, value=-1)


def entropy_of_gram(
    gram: KernelMatrix,
    alpha: float,
    kernel: Kernel,
    shape: Sequence[int],
    dtype: torch.dtype,
    live: Tensor | None,
    normalize: bool,
    *,
    with_gradient: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Entropy of each window, and the symmetric matrix that turns Z into its gradient.

    Args:
        gram: from :func:`kernel_matrix`.
        alpha: order of the entropy.
        kernel: the kernel of the entropy.
        shape: (n, d) of the matrices Z; with ``dtype``, it tells rank from rounding.
        dtype: that of Z.
        live: (windows,) rows that count, from :func:`count_rows`.
        normalize: divide by the logarithm of the largest rank.
        with_gradient: False returns None for the factor and saves its work.

    Returns:
        The entropy (windows,) in nats and the factor (m, m, windows) = 2 dS/dK, both in the Gram matrix's dtype, and
        the rows that count (windows,), None where all do. Where the Gram matrix is not finite, neither is the entropy.
    """
    value, factor = _entropy_of(gram, alpha, shape, dtype, with_gradient)
    inverse, live = gram.inverse, live if gram.live is None else gram.live
    if normalize:
        scale = _normalizer(value, live, shape, kernel)
        value, inverse = value * scale, inverse * scale
    return value, None if factor is None else gram.differential(factor.mul_(inverse)), live


def measures_of_gram(gram: Tensor, known: KernelMatrix) -> tuple[Tensor, Tensor]:
    """What can hide in an entropy, from the linear Gram matrices of the rows of Z, (n, n, windows).

    Args:
        gram: linear.
        known: a matrix made of it, to be used again where it is one of those needed.

    Returns:
        (windows, 4): order-2 entropy of the linear kernel, of the centered cosine one, the largest over the median norm
        of the rows, and the share of their squared norm that lies in their mean; and (windows,) the rows that count,
        which are those that are not zero.
    """
    linear, cosine = (
        known if known.kernel == kernel else KernelMatrix(gram, kernel) for kernel in (LINEAR, CENTERED_COSINE)
    )
    live = cosine.live
    assert live is not None  # under all but the plain kernel
    share = gram.sum((0, 1)).mul_(linear.inverse).div_(cosine.count).clamp_(0, 1)
    return torch.stack((linear.order_2, cosine.order_2, _norm_ratio(gram.diagonal(), live), share)).mT, live


def measures_of_rows(z: Tensor) -> tuple[Tensor, Tensor]:
    """The same as :func:`measures_of_gram` where n > d, from the rows (windows, n, d) and d x d matrices."""
    z = _wide(z)
    squares = _squared_norms(z)
    live = (squares > _least(z)).sum(-1).to(z.dtype)
    share = z.sum(-2).square().sum(-1) * _inverse(squares.sum(-1)) / live.clamp(min=1)
    with _full_precision(z):
        y = _kernel_rows(z, CENTERED_COSINE)
        # Not windows_last, whose choice by size would cost a compiled model another compilation.
        grams = (_matmul(rows.mT, rows).permute(1, 2, 0) for rows in (z, y))
        linear, cosine = (KernelMatrix(gram, LINEAR).order_2 for gram in grams)
    return torch.stack((linear, cosine, _norm_ratio(squares, live), share.clamp(0, 1))).mT, live


def window_weights(live: Tensor, dtype: torch.dtype, fewest: int | Tensor) -> Tensor:
    """What each window counts for in the mean of a layer.

    Those with ``fewest`` rows that count have a weight of 1, the others next to nothing, which vanishes beside it: they
    say nothing, as one row has one direction, and so have two about their mean, whatever they are. Where all windows
    are such, those a single row short of it are taken, and those without any row only where no other is.

    Args:
        live: rows that count, from :func:`entropy_of_gram` or :func:`measures_of_gram`.
        dtype: of the weights.
        fewest: 2, and 3 for a centered kernel.
    """
    return (live.to(dtype) - (fewest - 1 - torch.finfo(dtype).eps)).clamp_(min=1e-30, max=1)


def _norm_ratio(squares: Tensor, live: Tensor) -> Tensor:
    """Largest over median norm of the rows that count, (...,), from squared norms (..., n); 1 where none counts."""
    n = squares.shape[-1]
    if n == 0:
        return torch.ones_like(live)
    norms = squares.sort(-1).values.sqrt()  # the rows that do not count come first
    # Of the others, the one in the middle counts for the median, or two for a half each: those whose place, from the
    # last one at 0 backwards, is less than 1 from (live - 1) / 2.
    places = torch.arange(n - 1, -1, -1, dtype=live.dtype, device=live.device)
    away = torch.add(places + 0.5, live.unsqueeze(-1), alpha=-0.5).abs_()
    median = away.neg_().add_(1).clamp_(min=0).mul_(norms).sum(-1)
    return (norms[..., -1] / median).masked_fill_(live == 0, 1)


def _wide(z: Tensor) -> Tensor:
    return z.to(torch.promote_types(z.dtype, torch.float32))


def _for_order(z: Tensor, alpha: float) -> Tensor:
    # Eigenvalues near zero matter for alpha < 1, and the Gram matrix squares the condition number.
    return _wide(z) if _by_power(alpha) else z.to(torch.float64)


def _squared_norms(z: Tensor) -> Tensor:
    return z.square().sum(-1)


def _least(like: Tensor) -> float:
    """A squared norm or a trace at or below this counts as zero: it has no reciprocal."""
    return 8 * torch.finfo(torch.promote_types(like.dtype, torch.float32)).tiny


def _inverse(values: Tensor, least: Tensor | float | None = None) -> Tensor:
    """1 / values, and 0 where they are at or below ``least``."""
    if least is None:
        least = _least(values)
    if isinstance(least, float):
        return F.threshold(values, least, math.inf).reciprocal_()
    return values.masked_fill(values <= least, math.inf).reciprocal_()


def _inverse_norms(squares: Tensor) -> Tensor:
    """1 / norm of rows, 0 for those that count as zero; nan where a square overflows, as that row has a direction."""
    return (_inverse(squares) + squares * 0).sqrt_()


def _kernel_rows(z: Tensor, kernel: Kernel) -> Tensor:
    """The rows whose linear Gram matrix is that of ``kernel``. Rows that are all equal, to rounding, become zero."""
    if kernel.plain:
        return z
    squares = _squared_norms(z)
    if kernel.cosine:
        z = z * _inverse_norms(squares).unsqueeze(-1)
    if not kernel.center:
        return z
    alive = (squares > _least(z)).to(z.dtype)
    count = alive.sum(-1).clamp(min=1)[..., None, None]
    y = (z - z.sum(-2, keepdim=True) / count) * alive.unsqueeze(-1)
    whole, left = (_squared_norms(rows).sum(-1) for rows in (z, y))
    return y * (left > 16 * torch.finfo(z.dtype).eps * whole)[..., None, None].to(z.dtype)


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
    with _full_precision(rho):
        if _by_power(alpha):
            power = torch.linalg.matrix_power(rho, int(alpha) - 1)
            total = (power * rho).sum((-2, -1))
            total = total.masked_fill(total < _no_trace(gram.rho, int(alpha)), 1)
            value = total.log().clamp_(max=0).abs_().div_(alpha - 1)
            return value, _slope(power.permute(1, 2, 0), total, int(alpha)) if with_gradient else None
        noise = None if gram.noise is None else gram.noise * gram.inverse
        value, factor = _from_eigenvalues(rho, alpha, with_gradient, _rank_tolerance(dtype, *shape), noise)
        return value, None if factor is None else windows_last(factor)


def _no_trace(rho: Tensor, alpha: int) -> float:
    """tr(rho^alpha) is at least m^(1 - alpha), with m rows; below this there was no trace to normalize by."""
    return 0.5 * float(max(len(rho), 1)) ** (1 - alpha)


def _slope(power: Tensor, total: Tensor, alpha: int) -> Tensor:
    """2 tr(C) dS/dC for whole alpha >= 2, from rho^(alpha - 1) (m, m, windows) and tr(rho^alpha) (windows,)."""
    factor = 2 * alpha / (alpha - 1)
    slope = power * (-factor / total)
    slope.diagonal().add_(factor)
    return slope


def _from_eigenvalues(
    rho: Tensor, alpha: float, with_gradient: bool, tolerance: float, noise: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """S and tr(K) dS/dK * 2 for any alpha. Eigenvalues within rounding of zero count as zero.

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


def _matmul(a: Tensor, b: Tensor) -> Tensor:
    # For a batch of windows, matmul's own arrangements take as long as the product.
    return torch.bmm(a, b) if a.ndim == 3 and b.ndim == 3 else a @ b


def _full_precision(z: Tensor) -> contextlib.AbstractContextManager[Any]:
    """Keeps an enclosing autocast from turning float32 products into bfloat16."""
    if torch.is_autocast_enabled(z.device.type):
        return torch.autocast(z.device.type, enabled=False)
    return contextlib.nullcontext()
