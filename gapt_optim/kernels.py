"""Kernels: what the Gram matrix of a representation is, and what can hide in an entropy.

For Z with n rows and d columns, the Gram matrix of its rows is C. Two choices, the *kernel*, say how:

    linear    C_ij = <z_i, z_j>
    cosine    C_ij = <z_i, z_j> / (|z_i| |z_j|)

and either may be *centered*, C <- H C H with H = I - 11ᵀ / n, as kernels are in CKA and HSIC.

Where n <= d, all of it follows from the linear Gram matrix K = Z Zᵀ alone. With D = diag(K_ii), C = D^-1/2 K D^-1/2
and G = H (dS/d(HCH)) H, the matrix M with dS/dZ = M Z is 2 D^-1/2 (G - diag((G C)_ii)) D^-1/2. Where n > d, the rows
are scaled and centered first, and the d x d matrix Zᵀ Z of these rows, which has the same eigenvalues, takes C's place.
"""

from __future__ import annotations

import contextlib
import math
import threading
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F


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


def windows_last(gram: Tensor) -> Tensor:
    """(..., m, m) as (m, m, windows): operations on so small matrices are fast where they run over windows."""
    flat = gram if gram.ndim == 3 else gram.unsqueeze(0).flatten(0, -3)
    moved = flat.permute(1, 2, 0)
    # Few large matrices stay as they lie in memory. A choice by size would cost a compiled model another compilation.
    return moved.contiguous() if torch.compiler.is_compiling() or len(flat) > gram.shape[-1] else moved


def windows_first(matrices: Tensor) -> Tensor:
    """(m, m, windows) as (windows, m, m), contiguous."""
    m, _, count = matrices.shape
    # A transposition of two dimensions is several times as fast as a permutation of three.
    return matrices.reshape(m * m, count).mT.contiguous().reshape(count, m, m)


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
            squares = gram.diagonal().mT
            inverse = reciprocal(squares)
            # (n, windows), 1 for rows that count, otherwise 0. One that is not finite counts.
            self.alive = (squares <= least(gram)).logical_not_().to(gram.dtype)
            self.live = self.alive.sum(0)
            self.count = self.live.clamp(min=1)
        if kernel.cosine:
            self.scale = inverse.sqrt_()
            matrix = (gram * self.scale).mul_(self.scale.unsqueeze(1))
        self.uncentered = matrix
        if kernel.center:
            assert self.live is not None  # a kernel that centers is not the plain one
            whole = self.live if kernel.cosine else matrix.diagonal().sum(-1)  # a live row of cosine has 1 there
            self.noise = 16 * torch.finfo(gram.dtype).eps * whole
            if not kernel.cosine:
                self.noise.clamp_(min=least(gram))
            matrix = self._centered(matrix)
        self.inverse = reciprocal(matrix.diagonal().sum(-1), self.noise)
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
            self._purity = total.masked_fill_(total < no_trace(self.rho, 2), 1)
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
            factor = self._centered(factor, in_place=True)
        if self.kernel.cosine:
            # A length of its own changes nothing: the gradient of a row is orthogonal to it.
            factor.diagonal().sub_((factor * self.uncentered).sum(0).mT)
            factor.mul_(self.scale).mul_(self.scale.unsqueeze(1))
        return factor

    def _centered(self, matrix: Tensor, *, in_place: bool = False) -> Tensor:
        """H M H, with H = diag(l) - l lᵀ / count over the rows l that count."""
        # Entries between a row that counts and one that does not are 0.
        means = matrix.sum(0).div_(self.count).mul_(self.alive)
        half = torch.sub(means, means.sum(0) / self.count, alpha=0.5).mul_(self.alive)
        add = matrix.addcmul_ if in_place else matrix.addcmul
        matrix = add(self.alive, half.unsqueeze(1), value=-1)
        return matrix.addcmul_(self.alive.unsqueeze(1), half, value=-1)


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
    z = wide(z)
    squares = squared_norms(z)
    live = (squares > least(z)).sum(-1).to(z.dtype)
    share = z.sum(-2).square().sum(-1) * reciprocal(squares.sum(-1)) / live.clamp(min=1)
    with full_precision(z):
        y = kernel_rows(z, CENTERED_COSINE)
        grams = (windows_last(torch.bmm(rows.mT, rows)) for rows in (z, y))
        linear, cosine = (KernelMatrix(gram, LINEAR).order_2 for gram in grams)
    return torch.stack((linear, cosine, _norm_ratio(squares, live), share.clamp(0, 1))).mT, live


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


def kernel_rows(z: Tensor, kernel: Kernel) -> Tensor:
    """The rows whose linear Gram matrix is that of ``kernel``. Rows that are all equal, to rounding, become zero."""
    if kernel.plain:
        return z
    squares = squared_norms(z)
    if kernel.cosine:
        z = z * inverse_norms(squares).unsqueeze(-1)
    if not kernel.center:
        return z
    alive = (squares > least(z)).to(z.dtype)
    count = alive.sum(-1).clamp(min=1)[..., None, None]
    y = (z - z.sum(-2, keepdim=True) / count) * alive.unsqueeze(-1)
    whole, left = (squared_norms(rows).sum(-1) for rows in (z, y))
    return y * (left > 16 * torch.finfo(z.dtype).eps * whole)[..., None, None].to(z.dtype)


def wide(z: Tensor) -> Tensor:
    return z.to(torch.promote_types(z.dtype, torch.float32))


def squared_norms(z: Tensor) -> Tensor:
    return z.square().sum(-1)


_LEAST = {dtype: 8 * torch.finfo(dtype).tiny for dtype in (torch.float32, torch.float64)}


def least(like: Tensor) -> float:
    """A squared norm or a trace at or below this counts as zero: it has no reciprocal."""
    return _LEAST.get(like.dtype, _LEAST[torch.float32])


def reciprocal(values: Tensor, zero: Tensor | None = None) -> Tensor:
    """1 / values, and 0 where they are at or below ``zero``, by default :func:`least`."""
    if zero is None:
        return F.threshold(values, least(values), math.inf).reciprocal_()
    return values.masked_fill(values <= zero, math.inf).reciprocal_()


def inverse_norms(squares: Tensor) -> Tensor:
    """1 / norm of rows, 0 for those that count as zero; nan where a square overflows, as that row has a direction."""
    return (reciprocal(squares) + squares * 0).sqrt_()


def full_precision(z: Tensor) -> contextlib.AbstractContextManager[Any]:
    """Keeps an enclosing autocast from turning float32 products into bfloat16, and a GPU from rounding them to TF32.

    A graph that is compiled keeps what the model has.
    """
    autocast: contextlib.AbstractContextManager[Any] = contextlib.nullcontext()
    if torch.is_autocast_enabled(z.device.type):
        autocast = torch.autocast(z.device.type, enabled=False)
    return _unrounded(autocast) if z.device.type == "cuda" and not torch.compiler.is_compiling() else autocast


class _Rounding:
    """Of float32 products on GPUs: off, as long as any thread wants it so. Autograd has a thread for each device."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._users = 0
        self._before = ""

    def stop(self) -> None:
        with self._lock:
            self._users += 1
            if self._users == 1:
                self._before = self._read()
                if self._before not in _EXACT:
                    self._write(_EXACT[0])

    def go_on(self) -> None:
        with self._lock:
            self._users -= 1
            if self._users == 0 and self._before not in _EXACT:
                if _SETS_EACH:
                    self._write("none")  # which reads as the setting for everything, if it was that
                if self._read() != self._before:
                    self._write(self._before)

    def _read(self) -> str:
        found: str = _MATMUL.fp32_precision if _SETS_EACH else torch.get_float32_matmul_precision()
        return found

    def _write(self, value: str) -> None:
        if _SETS_EACH:
            _MATMUL.fp32_precision = value
        else:
            torch.set_float32_matmul_precision("highest" if value == _EXACT[0] else value)


_MATMUL: Any = torch.backends.cuda.matmul
_SETS_EACH = hasattr(_MATMUL, "fp32_precision")
"""torch 2.9 has a setting for each kind of product, besides that for all of them."""
_EXACT = ("ieee", "none", "highest")
"""What torch calls it where products are not rounded."""
_ROUNDING = _Rounding()


@contextlib.contextmanager
def _unrounded(inner: contextlib.AbstractContextManager[Any]) -> Iterator[None]:
    _ROUNDING.stop()
    try:
        with inner:
            yield
    finally:
        _ROUNDING.go_on()


def no_trace(rho: Tensor, alpha: int) -> float:
    """tr(rho^alpha) is at least m^(1 - alpha), with m rows; below this there was no trace to normalize by."""
    return 0.5 * float(max(len(rho), 1)) ** (1 - alpha)
