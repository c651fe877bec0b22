"""Matrix-based Rényi entropy of a representation matrix, with closed-form gradients.

For Z with n rows and d columns, K = Z Zᵀ and the eigenvalues p of rho = K / tr K,

    S_a(Z) = log(sum p^a) / (1 - a)                                     in nats,
    dS_a/dZ = 2a / (1 - a) * (rho^(a-1) / tr(rho^a) - I) Z / tr K,

with the von Neumann entropy -sum p log p at a = 1 and the min-entropy -log max p at a = inf
(Giraldo, Rao and Principe, "Measures of entropy from data using infinitely divisible kernels", 2015).
The same holds with Zᵀ Z in place of Z Zᵀ and the factor on the right; the smaller one is used.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

# Orders up to this are taken by matrix products. Beyond, powers of small eigenvalues leave float32's range.
_LARGEST_POWER = 8


def matrix_entropy(z: Tensor, *, alpha: float = 2.0, mask: Tensor | None = None, normalize: bool = False) -> Tensor:
    """Matrix-based Rényi entropy of each matrix in ``z``, differentiable once.

    Args:
        z: (..., n, d), real floating point: n tokens or samples with d features.
        alpha: order, in (0, inf]. 1 is the von Neumann entropy, ``math.inf`` the min-entropy.
        mask: (..., n), broadcastable to ``z``'s leading shape; rows where it is false or 0 do not count
            and receive no gradient.
        normalize: divide by log min(live rows, d), which maps the entropy to [0, 1].

    Returns:
        (...) in nats, at least 0 and at most log rank; float64 for float64 input, otherwise float32.
        A matrix of zeros, or with no live row, has entropy 0 and gradient 0. For alpha < 1 the
        gradient at a rank-deficient matrix is taken on its support, where it is finite.

    Raises:
        TypeError: ``z`` is not real floating point.
        ValueError: ``z`` has fewer than two dimensions, ``alpha`` is out of range, or ``mask`` does not fit.
    """
    if not z.is_floating_point():
        raise TypeError(f"z must be a real floating-point tensor, found {z.dtype}; convert it with z.float()")
    if z.ndim < 2:
        raise ValueError(f"z must have shape (..., n, d), found {tuple(z.shape)}")
    if not alpha > 0:
        raise ValueError(f"alpha must lie in (0, inf], found {alpha}")
    if mask is not None:
        try:
            mask = mask.to(device=z.device, dtype=torch.bool).expand(z.shape[:-1])
        except RuntimeError:
            expected, found = tuple(z.shape[:-1]), tuple(mask.shape)
            raise ValueError(f"mask must have shape {expected}, one value per row of z, found {found}") from None
    value: Tensor = _MatrixEntropy.apply(z, float(alpha), mask, normalize)  # type: ignore[no-untyped-call]
    return value


class _MatrixEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, z: Tensor, alpha: float, mask: Tensor | None, normalize: bool) -> Tensor:
        gram = gram_matrix(masked(z, mask), alpha)
        value, kernel = entropy_of_gram(gram, alpha, z.shape[-2:], z.dtype, with_kernel=ctx.needs_input_grad[0])
        if normalize:
            scale = normalizer(value, None if mask is None else mask.sum(-1), z.shape[-2:])
            value, kernel = value * scale, None if kernel is None else kernel * scale[..., None, None]
        ctx.save_for_backward(z, mask, kernel)
        return value.to(torch.promote_types(z.dtype, torch.float32))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        z, mask, kernel = ctx.saved_tensors
        return _Gradient.apply(z, grad, mask, kernel), None, None, None  # type: ignore[no-untyped-call]


class _Gradient(torch.autograd.Function):
    """dS/dZ, tied to Z: once_differentiable would let it pass for a constant where ``grad`` is one."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, grad: Tensor, mask: Tensor | None, kernel: Tensor) -> Tensor:
        return apply_kernel(kernel * grad[..., None, None], masked(z, mask)).to(z.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        raise RuntimeError("matrix_entropy is differentiable once; its gradient was differentiated again")


def masked(z: Tensor, mask: Tensor | None) -> Tensor:
    """``z`` with the rows where ``mask`` is false set to zero; a zero row does not change an entropy."""
    return z if mask is None else z.masked_fill(~mask.unsqueeze(-1), 0)


def gram_matrix(z: Tensor, alpha: float) -> Tensor:
    """The smaller of Z Zᵀ and Zᵀ Z, (..., m, m) with m = min(n, d), in the dtype that ``alpha`` needs."""
    # Eigenvalues near zero matter for alpha < 1, and the Gram matrix squares the condition number.
    z = z.to(torch.promote_types(z.dtype, torch.float32) if _by_power(alpha) else torch.float64)
    with _full_precision(z):
        return _matmul(z, z.mT) if z.shape[-2] <= z.shape[-1] else _matmul(z.mT, z)


def apply_kernel(kernel: Tensor, z: Tensor) -> Tensor:
    """dS/dZ from the kernel of :func:`entropy_of_gram`: kernel @ z, or z @ kernel where n > d."""
    dtype = torch.promote_types(z.dtype, torch.float32)
    z = z.to(kernel.dtype)  # a kernel of order 1 / |z|² may lie outside of float32 where the gradient does not
    with _full_precision(z):
        return (_matmul(kernel, z) if z.shape[-2] <= z.shape[-1] else _matmul(z, kernel)).to(dtype)


def entropy_of_gram(
    gram: Tensor, alpha: float, shape: Sequence[int], dtype: torch.dtype, *, with_kernel: bool
) -> tuple[Tensor, Tensor | None]:
    """Entropy from the matrix of :func:`gram_matrix`, and the symmetric matrix that turns Z into its gradient.

    Args:
        gram: (..., m, m).
        alpha: order of the entropy.
        shape: (n, d) of the matrices Z; with ``dtype``, it tells rank from rounding.
        dtype: that of Z.
        with_kernel: False returns None for the kernel and saves its work.

    Returns:
        The entropy (...) in nats and the kernel (..., m, m) = 2 dS/dK, both in the Gram matrix's dtype. Where the
        Gram matrix is not finite, neither is the entropy.
    """
    # Normalized before it is squared, so that the range of scales is that of the trace itself. A matrix whose
    # trace has no reciprocal counts as zero.
    trace = gram.diagonal(dim1=-2, dim2=-1).sum(-1)
    inverse = F.threshold(trace, 8 * torch.finfo(gram.dtype).tiny, math.inf).reciprocal_()
    rho = gram * inverse[..., None, None]
    with _full_precision(gram):
        if _by_power(alpha):
            value, kernel = _from_powers(rho, int(alpha), with_kernel)
        else:
            value, kernel = _from_eigenvalues(rho, alpha, with_kernel, _rank_tolerance(dtype, *shape))
    return value, None if kernel is None else kernel.mul_(inverse[..., None, None])


def normalizer(like: Tensor, live: Tensor | None, shape: Sequence[int]) -> Tensor:
    """1 / log min(live rows, d) for matrices of ``shape`` (n, d), and 0 where one row or column leaves no entropy."""
    n, d = shape
    rows = torch.full_like(like, n) if live is None else live.to(like.dtype)
    limit = rows.clamp(max=d).log()
    return torch.where(limit > 0, limit.reciprocal(), 0)


def _by_power(alpha: float) -> bool:
    return 2 <= alpha <= _LARGEST_POWER and float(alpha).is_integer()


def _from_powers(rho: Tensor, alpha: int, with_kernel: bool) -> tuple[Tensor, Tensor | None]:
    """S and tr(K) dS/dK * 2 for integer alpha >= 2, from matrix products alone."""
    power = rho if alpha == 2 else torch.linalg.matrix_power(rho, alpha - 1)
    total = (power * rho).sum((-2, -1))
    # tr(rho^alpha) is at least m^(1 - alpha); below it there was no trace to normalize by: a matrix of zeros.
    zero = total < 0.5 * max(rho.shape[-1], 1) ** (1 - alpha)
    total = total.masked_fill_(zero, 1)
    value = total.log().clamp_(max=0).abs_().div_(alpha - 1)
    if not with_kernel:
        return value, None
    factor = 2 * alpha / (alpha - 1)
    kernel = power * (-factor / total)[..., None, None]
    kernel.diagonal(dim1=-2, dim2=-1).add_(factor)
    return value, kernel


def _from_eigenvalues(rho: Tensor, alpha: float, with_kernel: bool, tolerance: float) -> tuple[Tensor, Tensor | None]:
    """S and tr(K) dS/dK * 2 for any alpha. Eigenvalues within rounding of zero count as zero."""
    if rho.shape[-1] == 0:
        return rho.new_zeros(rho.shape[:-2]), rho if with_kernel else None
    finite = rho.isfinite().all(-1).all(-1)
    # eigh raises on non-finite input, which would end a training run; such matrices come back as nan instead.
    p, vectors = torch.linalg.eigh(torch.where(finite[..., None, None], rho, 0))
    # A row of zeros has no part in a direction, but for rounding.
    vectors = torch.where(rho.diagonal(dim1=-2, dim2=-1).unsqueeze(-1) > 0, vectors, 0)
    largest = p[..., -1:]
    zero = largest.squeeze(-1) < 0.5 / rho.shape[-1]  # there was no trace to normalize by
    support = p > tolerance * largest
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
        slope = 2 - 2 * top / (top.sum(-1, keepdim=True).clamp(min=1) * p)
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
    if not with_kernel:
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
