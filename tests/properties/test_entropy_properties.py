"""What holds for the entropy of any matrix, on generated ones."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor

from gapt_optim import matrix_entropy

ORDERS = [0.1, 0.5, 0.9, 1.0, 1.1, 1.5, 2.0, 2.5, 3.0, 5.0, 8.0, 9.0, 50.0, math.inf]

orders = st.sampled_from(ORDERS)
seeds = st.integers(0, 2**31)
sizes = st.integers(1, 12)
dtypes = st.sampled_from([torch.float32, torch.float64])


@st.composite
def matrices(draw: Any, dtype: torch.dtype | None = None, smallest: int = 1) -> Tensor:
    """Random matrices of every shape and rank, with eigenvalues spread over up to four decades."""
    n, d = draw(st.integers(smallest, 12)), draw(st.integers(smallest, 12))
    rank = draw(st.integers(1, min(n, d)))
    generator = torch.Generator().manual_seed(draw(seeds))
    spread = 10 ** -torch.linspace(0, draw(st.sampled_from([0.0, 0.5, 2.0])), rank, dtype=torch.float64)
    left = torch.linalg.qr(torch.randn(n, rank, generator=generator, dtype=torch.float64)).Q
    right = torch.linalg.qr(torch.randn(d, rank, generator=generator, dtype=torch.float64)).Q
    return (left * spread @ right.T).to(draw(dtypes) if dtype is None else dtype)


def tolerance(z: Tensor) -> float:
    return 1e-9 if z.dtype == torch.float64 else 2e-5


def orthogonal(size: int, like: Tensor) -> Tensor:
    return torch.linalg.qr(torch.randn(size, size, dtype=torch.float64)).Q.to(like.dtype)


def gradient_of(z: Tensor, alpha: float) -> Tensor:
    z = z.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(matrix_entropy(z, alpha=alpha), z)
    return gradient


def same(a: Tensor, b: Tensor) -> bool:
    return bool((a.double() - b.double()).abs() <= tolerance(a))


@given(matrices(), orders)
def test_lies_between_zero_and_log_rank(z: Tensor, alpha: float) -> None:
    rank = torch.linalg.matrix_rank(z.double(), rtol=1e-5)
    assert 0 <= matrix_entropy(z, alpha=alpha) <= rank.double().log() + tolerance(z)


@given(matrices(), orders, st.floats(-12, 12))
def test_ignores_scale(z: Tensor, alpha: float, exponent: float) -> None:
    scale = 10**exponent
    assert same(matrix_entropy(z * scale, alpha=alpha), matrix_entropy(z, alpha=alpha))


@given(matrices(torch.float64), st.sampled_from([1.0, 1.5, 2.0, 3.0, 9.0]), st.floats(-12, 12))
def test_gradient_falls_as_scale_grows(z: Tensor, alpha: float, exponent: float) -> None:
    scale = 10**exponent
    torch.testing.assert_close(
        gradient_of(z * scale, alpha) * scale, gradient_of(z, alpha), rtol=1e-7, atol=1e-7, check_dtype=False
    )


@given(matrices(), orders)
def test_ignores_rotations_of_columns_and_of_rows(z: Tensor, alpha: float) -> None:
    value = matrix_entropy(z, alpha=alpha)
    assert same(matrix_entropy(z @ orthogonal(z.shape[1], z), alpha=alpha), value)
    assert same(matrix_entropy(orthogonal(z.shape[0], z) @ z, alpha=alpha), value)


@given(matrices(), orders, seeds)
def test_ignores_the_order_of_rows(z: Tensor, alpha: float, seed: int) -> None:
    order = torch.randperm(len(z), generator=torch.Generator().manual_seed(seed))
    assert same(matrix_entropy(z[order], alpha=alpha), matrix_entropy(z, alpha=alpha))


@given(matrices())
def test_falls_as_the_order_rises(z: Tensor) -> None:
    values = [float(matrix_entropy(z, alpha=alpha)) for alpha in ORDERS]
    assert all(after <= before + tolerance(z) for before, after in pairwise(values))


@given(matrices(smallest=2), orders)
def test_is_smooth_in_the_order(z: Tensor, alpha: float) -> None:
    """Neighbouring orders may be computed in different ways, and agree."""
    assume(math.isfinite(alpha))
    near = matrix_entropy(z, alpha=alpha * (1 + 1e-9))
    assert same(near, matrix_entropy(z, alpha=alpha))


@given(sizes, sizes, seeds, orders, dtypes)
def test_rank_one_has_none(n: int, d: int, seed: int, alpha: float, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(seed)
    row, column = torch.randn(1, d, generator=generator), torch.randn(n, 1, generator=generator)
    value = matrix_entropy((column.double() @ row.double()).to(dtype), alpha=alpha)
    # For small orders the rounding of single precision is an entropy of its own.
    assert 0 <= value <= (1e-6 if dtype == torch.float32 and alpha >= 1 else 1e-3)


@given(st.integers(1, 8), st.integers(0, 6), orders, dtypes)
def test_orthonormal_rows_have_log_n(n: int, more: int, alpha: float, dtype: torch.dtype) -> None:
    z = torch.linalg.qr(torch.randn(n + more, n, dtype=torch.float64)).Q.T.to(dtype)
    assert abs(float(matrix_entropy(z, alpha=alpha)) - math.log(n)) <= tolerance(z)
    assert abs(float(matrix_entropy(z.T, alpha=alpha)) - math.log(n)) <= tolerance(z)
    assert abs(float(matrix_entropy(z, alpha=alpha, normalize=True)) - (n > 1)) <= tolerance(z)


@given(matrices(), orders)
def test_gradient_is_orthogonal_to_the_matrix(z: Tensor, alpha: float) -> None:
    """The value does not depend on scale, so it does not change along the matrix."""
    gradient = gradient_of(z, alpha)
    along = float((gradient.double() * z.double()).sum())
    assert abs(along) <= tolerance(z) * (1 + float(gradient.double().norm() * z.double().norm()))


@given(st.integers(2, 5), st.integers(2, 5), seeds, st.sampled_from([0.5, 1.0, 1.5, 2.0, 3.0, 9.0, math.inf]))
def test_gradcheck(n: int, d: int, seed: int, alpha: float) -> None:
    z = torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    p = torch.linalg.svdvals(z).square()
    assume(p.min() > 1e-2 * p.max())  # away from the edge of the support
    assume(math.isfinite(alpha) or p[1] < 0.95 * p[0])  # and from a shared maximum
    assert torch.autograd.gradcheck(lambda x: matrix_entropy(x, alpha=alpha), z.requires_grad_(), atol=1e-5)


@given(matrices(), orders)
def test_both_forms_agree(z: Tensor, alpha: float) -> None:
    """A matrix and its transpose: one takes the Gram side, the other the covariance side."""
    assert same(matrix_entropy(z.T, alpha=alpha), matrix_entropy(z, alpha=alpha))
    a, b = gradient_of(z, alpha), gradient_of(z.T, alpha).T
    assert float((a - b).norm()) <= 50 * tolerance(z) * (1 + float(a.norm()))


@given(matrices(), orders, seeds, st.booleans())
def test_masking_rows_is_deleting_them(z: Tensor, alpha: float, seed: int, normalize: bool) -> None:
    mask = torch.rand(len(z), generator=torch.Generator().manual_seed(seed)) > 0.4
    masked = matrix_entropy(z, alpha=alpha, mask=mask, normalize=normalize)
    assert same(masked, matrix_entropy(z[mask], alpha=alpha, normalize=normalize))


@given(matrices(), orders, st.integers(1, 9))
def test_rows_of_zeros_change_nothing(z: Tensor, alpha: float, count: int) -> None:
    padded = torch.cat([z, z.new_zeros(count, z.shape[1])])
    assert same(matrix_entropy(padded, alpha=alpha), matrix_entropy(z, alpha=alpha))


@given(matrices(), orders)
def test_normalized_lies_between_zero_and_one(z: Tensor, alpha: float) -> None:
    value = matrix_entropy(z, alpha=alpha, normalize=True)
    assert 0 <= value <= 1 + tolerance(z)
    limit = math.log(min(z.shape))
    if limit > 0:
        assert same(value * limit, matrix_entropy(z, alpha=alpha))
