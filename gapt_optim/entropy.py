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
from typing import Any

import torch
from torch import Tensor

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
        live = None if mask is None else mask.sum(-1)
        value, kernel = entropy_and_kernel(masked(z, mask), alpha, live, normalize, with_kernel=ctx.needs_input_grad[0])
        ctx.save_for_backward(z, mask, kernel)
        return value

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        z, mask, kernel = ctx.saved_tensors
        return (apply_kernel(kernel * grad[..., None, None], masked(z, mask)).to(z.dtype), None, None, None)


def masked(z: Tensor, mask: Tensor | None) -> Tensor:
    """``z`` with the rows where ``mask`` is false set to zero; a zero row does not change an entropy."""
    return z if mask is None else z.masked_fill(~mask.unsqueeze(-1), 0)


def apply_kernel(kernel: Tensor, z: Tensor) -> Tensor:
    """The gradient dS/dz from the kernel of :func:`entropy_and_kernel`, in the kernel's dtype."""
    z = z.to(kernel.dtype)
    with _full_precision(z):
        return kernel @ z if z.shape[-2] <= z.shape[-1] else z @ kernel


def entropy_and_kernel(
    z: Tensor, alpha: float, live: Tensor | None = None, normalize: bool = False, *, with_kernel: bool = True
) -> tuple[Tensor, Tensor | None]:
    """Entropy of each matrix, and the small symmetric matrix that turns ``z`` into its gradient.

    Args:
        z: (..., n, d), masked rows already zero.
        alpha: order of the entropy.
        live: (...) number of rows that count, for ``normalize``; None = all n.
        normalize: divide by log min(live, d).
        with_kernel: False returns None for the kernel and saves its work.

    Returns:
        The entropy (...) and the kernel (..., m, m) with m = min(n, d): dS/dz is ``kernel @ z`` where n <= d,
        otherwise ``z @ kernel``. Where ``z`` is not finite, neither is the entropy.
    """
    n, d = z.shape[-2:]
    by_power = alpha == int(alpha) and 2 <= alpha <= _LARGEST_POWER if math.isfinite(alpha) else False
    value_dtype = torch.promote_types(z.dtype, torch.float32)
    # Eigenvalues near zero matter for alpha < 1, and the Gram matrix squares the condition number.
    z = z.to(value_dtype if by_power else torch.float64)
    with _full_precision(z):
        gram = z @ z.mT if n <= d else z.mT @ z
        trace = gram.diagonal(dim1=-2, dim2=-1).sum(-1)
        # Below this the reciprocal overflows: such a matrix counts as zero.
        zero = trace <= 8 * torch.finfo(trace.dtype).tiny
        inverse = torch.where(zero, 0, trace.reciprocal())
        rho = gram * inverse[..., None, None]
        if by_power:
            value, kernel = _by_power(rho, int(alpha), zero, with_kernel)
        else:
            value, kernel = _by_eigenvalues(rho, alpha, zero, with_kernel, _rank_tolerance(value_dtype, n, d))
    scale = inverse if not normalize else inverse * _normalizer(inverse, live, n, d)
    if normalize:
        value = value * _normalizer(value, live, n, d)
    if kernel is not None:
        kernel = (kernel * scale[..., None, None]).to(value_dtype)
    return value.to(value_dtype), kernel


def _by_power(rho: Tensor, alpha: int, zero: Tensor, with_kernel: bool) -> tuple[Tensor, Tensor | None]:
    """S and tr(K) dS/dK * 2 for integer alpha >= 2, from matrix products alone."""
    power = rho if alpha == 2 else torch.linalg.matrix_power(rho, alpha - 1)
    total = torch.where(zero, 1, (power * rho).sum((-2, -1)))
    value = total.log().clamp(max=0).abs() / (alpha - 1)
    if not with_kernel:
        return value, None
    factor = 2 * alpha / (alpha - 1)
    kernel = power * (-factor / total)[..., None, None]
    kernel.diagonal(dim1=-2, dim2=-1).add_(factor)
    return value, kernel


def _by_eigenvalues(
    rho: Tensor, alpha: float, zero: Tensor, with_kernel: bool, tolerance: float
) -> tuple[Tensor, Tensor | None]:
    """S and tr(K) dS/dK * 2 for any alpha. Eigenvalues within rounding of zero count as zero."""
    if rho.shape[-1] == 0:
        return torch.zeros_like(zero, dtype=rho.dtype), rho if with_kernel else None
    finite = rho.isfinite().all(-1).all(-1)
    # eigh raises on non-finite input, which would end a training run; such matrices come back as nan instead.
    p, vectors = torch.linalg.eigh(torch.where(finite[..., None, None], rho, 0))
    largest = p[..., -1:]
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
    largest = max(n, d)
    return max((largest * torch.finfo(dtype).eps) ** 2, largest * torch.finfo(torch.float64).eps)


def _normalizer(like: Tensor, live: Tensor | None, n: int, d: int) -> Tensor:
    """1 / log min(live, d), and 0 where that is not defined (one row or feature has no entropy to divide)."""
    rows = torch.full_like(like, n) if live is None else live.to(like.dtype)
    limit = rows.clamp(max=d).log()
    return torch.where(limit > 0, limit.reciprocal(), 0)


def _full_precision(z: Tensor) -> contextlib.AbstractContextManager[Any]:
    """Keeps an enclosing autocast from turning float32 products into bfloat16."""
    if torch.is_autocast_enabled(z.device.type):
        return torch.autocast(z.device.type, enabled=False)
    return contextlib.nullcontext()
