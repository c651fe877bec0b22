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
from gapt_optim.kernels import LINEAR as LINEAR_KERNEL
from gapt_optim.kernels import KernelMatrix, measures_of_gram, measures_of_rows
from tests.reference import KERNELS, reference_measures, reference_rows

LINEAR, CENTERED_COSINE = KERNELS["linear"], KERNELS["centered cosine"]

ORDERS = [0.1, 0.5, 0.9, 1.0, 1.1, 1.5, 2.0, 2.5, 3.0, 5.0, 8.0, 9.0, 50.0, math.inf]

orders = st.sampled_from(ORDERS)
kernels = st.sampled_from(list(KERNELS.values()))
centered = st.sampled_from(["linear", "cosine"])
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


def entropy(z: Tensor, kernel: tuple[str, bool], alpha: float = 2.0, **options: Any) -> Tensor:
    return matrix_entropy(z, alpha=alpha, kernel=kernel[0], center=kernel[1], **options)  # type: ignore[arg-type]


def gradient_of(z: Tensor, kernel: tuple[str, bool], alpha: float, **options: Any) -> Tensor:
    z = z.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(entropy(z, kernel, alpha, **options), z)
    return gradient


def same(a: Tensor, b: Tensor) -> bool:
    return bool((a.double() - b.double()).abs() <= tolerance(a))


def kernel_rank(z: Tensor, kernel: tuple[str, bool]) -> int:
    """Rank of the rows that the kernel makes of z."""
    rows = reference_rows(z.double(), None, *kernel)
    return int(torch.linalg.matrix_rank(rows, atol=1e-5 * float(z.double().norm()) if kernel[0] == "linear" else 1e-5))


def largest_rank(z: Tensor, kernel: tuple[str, bool]) -> int:
    """The rank that rows of this shape can have under the kernel."""
    return max(min(len(z) - kernel[1], z.shape[1]), 1)


# Values


@given(matrices(), kernels, orders)
def test_lies_between_zero_and_log_rank(z: Tensor, kernel: tuple[str, bool], alpha: float) -> None:
    limit = math.log(max(kernel_rank(z, kernel), 1))
    assert 0 <= entropy(z, kernel, alpha) <= limit + tolerance(z)


@given(matrices(), kernels, orders, st.floats(-12, 12))
def test_ignores_scale(z: Tensor, kernel: tuple[str, bool], alpha: float, exponent: float) -> None:
    assert same(entropy(z * 10**exponent, kernel, alpha), entropy(z, kernel, alpha))


@given(matrices(torch.float64), kernels, st.sampled_from([1.0, 1.5, 2.0, 3.0, 9.0]), st.floats(-12, 12))
def test_gradient_falls_as_scale_grows(z: Tensor, kernel: tuple[str, bool], alpha: float, exponent: float) -> None:
    scale = 10**exponent
    torch.testing.assert_close(
        gradient_of(z * scale, kernel, alpha) * scale,
        gradient_of(z, kernel, alpha),
        rtol=1e-7,
        atol=1e-7,
        check_dtype=False,
    )


@given(matrices(), kernels, orders)
def test_ignores_rotations_of_columns(z: Tensor, kernel: tuple[str, bool], alpha: float) -> None:
    assert same(entropy(z @ orthogonal(z.shape[1], z), kernel, alpha), entropy(z, kernel, alpha))


@given(matrices(), orders)
def test_linear_ignores_rotations_of_rows(z: Tensor, alpha: float) -> None:
    assert same(entropy(orthogonal(z.shape[0], z) @ z, LINEAR, alpha), entropy(z, LINEAR, alpha))


@given(matrices(), kernels, orders, seeds)
def test_ignores_the_order_of_rows(z: Tensor, kernel: tuple[str, bool], alpha: float, seed: int) -> None:
    order = torch.randperm(len(z), generator=torch.Generator().manual_seed(seed))
    assert same(entropy(z[order], kernel, alpha), entropy(z, kernel, alpha))


@given(matrices(), kernels)
def test_falls_as_the_order_rises(z: Tensor, kernel: tuple[str, bool]) -> None:
    values = [float(entropy(z, kernel, alpha)) for alpha in ORDERS]
    assert all(after <= before + tolerance(z) for before, after in pairwise(values))


@given(matrices(smallest=2), kernels, orders)
def test_is_smooth_in_the_order(z: Tensor, kernel: tuple[str, bool], alpha: float) -> None:
    """Neighbouring orders may be computed in different ways, and agree."""
    assume(math.isfinite(alpha))
    assert same(entropy(z, kernel, alpha * (1 + 1e-9)), entropy(z, kernel, alpha))


@given(sizes, sizes, seeds, orders, dtypes)
def test_rank_one_has_none(n: int, d: int, seed: int, alpha: float, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(seed)
    row, column = torch.randn(1, d, generator=generator), torch.randn(n, 1, generator=generator)
    z = (column.double() @ row.double()).to(dtype)
    for kernel in KERNELS.values():
        # For small orders the rounding of single precision is an entropy of its own.
        assert 0 <= entropy(z, kernel, alpha) <= (1e-6 if dtype == torch.float32 and alpha >= 1 else 1e-3)


@given(st.integers(1, 8), st.integers(0, 6), kernels, orders, dtypes)
def test_orthonormal_rows_have_log_n(
    n: int, more: int, kernel: tuple[str, bool], alpha: float, dtype: torch.dtype
) -> None:
    """About their mean, one direction fewer."""
    z = torch.linalg.qr(torch.randn(n + more, n, dtype=torch.float64)).Q.T.to(dtype)
    rank = max(n - kernel[1], 1)
    assert abs(float(entropy(z, kernel, alpha)) - math.log(rank)) <= tolerance(z)
    assert abs(float(entropy(z, kernel, alpha, normalize=True)) - (rank > 1)) <= tolerance(z)
    assert abs(float(entropy(z.T, LINEAR, alpha)) - math.log(n)) <= tolerance(z)


# Gradients


@given(matrices(), kernels, orders)
def test_gradient_is_orthogonal_to_the_matrix(z: Tensor, kernel: tuple[str, bool], alpha: float) -> None:
    """The value does not depend on scale, so it does not change along the matrix."""
    gradient = gradient_of(z, kernel, alpha)
    along = float((gradient.double() * z.double()).sum())
    assert abs(along) <= tolerance(z) * (1 + float(gradient.double().norm() * z.double().norm()))


@given(st.integers(2, 5), st.integers(2, 5), seeds, kernels, st.sampled_from([0.5, 1.0, 1.5, 2.0, 3.0, 9.0, math.inf]))
def test_gradcheck(n: int, d: int, seed: int, kernel: tuple[str, bool], alpha: float) -> None:
    z = torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    assume(not kernel[1] or (n > 2 and d > 1))  # otherwise one direction is left, and nothing changes
    p = torch.linalg.svdvals(reference_rows(z, None, *kernel)).square()[: largest_rank(z, kernel)]
    assume(p.min() > 1e-2 * p.max())  # away from the edge of the support
    assume(math.isfinite(alpha) or p[1] < 0.95 * p[0])  # and from a shared maximum
    assert torch.autograd.gradcheck(lambda x: entropy(x, kernel, alpha), z.requires_grad_(), atol=1e-5)


@given(matrices(), orders)
def test_both_forms_agree(z: Tensor, alpha: float) -> None:
    """A matrix and its transpose: one takes the Gram side, the other the covariance side."""
    assert same(entropy(z.T, LINEAR, alpha), entropy(z, LINEAR, alpha))
    a, b = gradient_of(z, LINEAR, alpha), gradient_of(z.T, LINEAR, alpha).T
    assert float((a - b).norm()) <= 50 * tolerance(z) * (1 + float(a.norm()))


@given(matrices(torch.float64), kernels, orders)
def test_columns_of_zeros_change_nothing(z: Tensor, kernel: tuple[str, bool], alpha: float) -> None:
    """With them the rows are fewer than the columns: one side for every kernel, the other for z."""
    assume(alpha >= 0.5)
    wide = torch.cat([z, z.new_zeros(len(z), len(z))], dim=1)
    assert same(entropy(wide, kernel, alpha), entropy(z, kernel, alpha))
    a, b = gradient_of(wide, kernel, alpha)[:, : z.shape[1]], gradient_of(z, kernel, alpha)
    assert float((a - b).norm()) <= 1e-6 * (1 + float(a.norm()))


# Rows that do not count


@given(matrices(), kernels, orders, seeds, st.booleans())
def test_masking_rows_is_deleting_them(
    z: Tensor, kernel: tuple[str, bool], alpha: float, seed: int, normalize: bool
) -> None:
    mask = torch.rand(len(z), generator=torch.Generator().manual_seed(seed)) > 0.4
    masked = entropy(z, kernel, alpha, mask=mask, normalize=normalize)
    assert same(masked, entropy(z[mask], kernel, alpha, normalize=normalize))


@given(matrices(), kernels, orders, st.integers(1, 9))
def test_rows_of_zeros_change_nothing(z: Tensor, kernel: tuple[str, bool], alpha: float, count: int) -> None:
    padded = torch.cat([z, z.new_zeros(count, z.shape[1])])
    assert same(entropy(padded, kernel, alpha), entropy(z, kernel, alpha))


@given(matrices(smallest=2), kernels, st.integers(1, 9))
def test_rows_of_zeros_count_as_masked_but_for_the_plain_kernel(
    z: Tensor, kernel: tuple[str, bool], count: int
) -> None:
    """Which rows count shows in the normalization."""
    padded = torch.cat([z, z.new_zeros(count, z.shape[1])])
    found, value = entropy(padded, kernel, normalize=True), entropy(z, kernel)
    counted = padded if kernel == LINEAR else z
    rank = largest_rank(counted, kernel)
    assert same(found * math.log(rank), value if rank > 1 else value * 0)
    assert (gradient_of(padded, kernel, 2.0, normalize=True)[len(z) :] == 0).all()


@given(matrices(), kernels, orders)
def test_normalized_lies_between_zero_and_one(z: Tensor, kernel: tuple[str, bool], alpha: float) -> None:
    value = entropy(z, kernel, alpha, normalize=True)
    assert 0 <= value <= 1 + tolerance(z)
    limit = math.log(largest_rank(z, kernel))
    assert same(value * limit, entropy(z, kernel, alpha) if limit else value * 0)


# What a kernel does not see


@st.composite
def lengths(draw: Any, count: int) -> Tensor:
    """A factor for each row, over 24 decades within one matrix. A power of two rounds nothing: a row that is rounded
    has another direction, of which centred rows that are nearly parallel make much."""
    exponents = draw(st.lists(st.integers(-40, 40), min_size=count, max_size=count))
    return torch.ldexp(torch.ones(count, 1, dtype=torch.float64), torch.tensor(exponents).unsqueeze(-1))


@given(st.data(), matrices(), st.booleans(), orders)
def test_cosine_ignores_the_length_of_each_row(data: st.DataObject, z: Tensor, center: bool, alpha: float) -> None:
    kernel = ("cosine", center)
    z = z / z.norm(dim=-1, keepdim=True)
    scaled = z * data.draw(lengths(len(z))).to(z.dtype)
    assert same(entropy(scaled, kernel, alpha), entropy(z, kernel, alpha))


@given(st.data(), matrices(torch.float64), st.booleans(), orders)
def test_under_cosine_the_gradient_of_a_row_is_orthogonal_to_it(
    data: st.DataObject, z: Tensor, center: bool, alpha: float
) -> None:
    z = z / z.norm(dim=-1, keepdim=True) * data.draw(lengths(len(z)))
    # Per row and free of units: the gradient's length goes with the inverse of the row's.
    gradient = gradient_of(z, ("cosine", center), alpha) * z.norm(dim=-1, keepdim=True)
    along = (gradient * z / z.norm(dim=-1, keepdim=True)).sum(-1)
    assert (along.abs() <= 1e-9 * (1 + gradient.norm(dim=-1))).all()


@given(matrices(torch.float64), orders, seeds, st.floats(-3, 3))
def test_centered_linear_ignores_a_vector_that_all_rows_share(
    z: Tensor, alpha: float, seed: int, exponent: float
) -> None:
    assume(alpha >= 0.5 and kernel_rank(z, ("linear", True)) > 0)
    z = z / z.norm()
    shared = torch.randn(z.shape[1], generator=torch.Generator().manual_seed(seed), dtype=z.dtype) * 10**exponent
    a, b = entropy(z + shared, ("linear", True), alpha), entropy(z, ("linear", True), alpha)
    # Of a matrix of size 1 beside a vector of size s, rounding leaves 16 - 2 log10 s digits.
    assert abs(float(a - b)) <= 1e-5
    gradient = gradient_of(z, ("linear", True), alpha)
    assert float(gradient.sum(0).norm()) <= 1e-9 * (1 + float(gradient.norm()))


@given(matrices(torch.float64, smallest=3), seeds)
def test_centered_cosine_ignores_a_vector_that_all_unit_rows_share(z: Tensor, seed: int) -> None:
    """Rows on a sphere about a vector orthogonal to them: all cosines rise alike."""
    generator = torch.Generator().manual_seed(seed)
    unit = z / z.norm(dim=-1, keepdim=True)
    beside = torch.rand(1, generator=generator, dtype=z.dtype) * 3
    raised = torch.cat([unit, beside.expand(len(z), 1)], dim=1)
    assert same(entropy(raised, CENTERED_COSINE), entropy(unit, ("linear", True)))
    assert same(entropy(raised, CENTERED_COSINE), entropy(unit, CENTERED_COSINE))


# What can hide


@st.composite
def with_rows_of_zeros(draw: Any) -> Tensor:
    """At least one row that is not zero, among rows that are, with a few long ones and a shared vector."""
    z = draw(matrices(torch.float64))
    generator = torch.Generator().manual_seed(draw(seeds))
    z = z * 10 ** torch.randn(len(z), 1, generator=generator, dtype=z.dtype)
    z = z + draw(st.sampled_from([0.0, 1.0, 10.0])) * torch.randn(z.shape[1], generator=generator, dtype=z.dtype)
    z[torch.rand(len(z), generator=generator) < draw(st.sampled_from([0.0, 0.3, 0.7]))] = 0
    assume(bool((z.norm(dim=-1) > 1e-6).any()))
    return z


def measures(z: Tensor) -> Tensor:
    if z.shape[0] > z.shape[1]:
        found, live = measures_of_rows(z.unsqueeze(0))
    else:
        gram = (z @ z.T).unsqueeze(-1)
        found, live = measures_of_gram(gram, KernelMatrix(gram, LINEAR_KERNEL))
    assert live == (z != 0).any(-1).sum()
    return found.squeeze(0)


@given(with_rows_of_zeros())
def test_measures_equal_the_reference(z: Tensor) -> None:
    expected = torch.tensor(reference_measures(z), dtype=torch.float64)
    torch.testing.assert_close(measures(z), expected, rtol=1e-9, atol=1e-9)


@given(with_rows_of_zeros())
def test_measures_lie_in_their_ranges(z: Tensor) -> None:
    live = int((z != 0).any(-1).sum())
    linear, cosine, ratio, share = measures(z).tolist()
    assert 0 <= linear <= math.log(min(live, z.shape[1])) + 1e-9
    assert 0 <= cosine <= math.log(max(min(live - 1, z.shape[1]), 1)) + 1e-9
    assert ratio >= 1
    assert 0 <= share <= 1


@given(with_rows_of_zeros(), seeds, st.floats(-12, 12))
def test_measures_ignore_scale_the_order_of_rows_and_rotations_of_columns(
    z: Tensor, seed: int, exponent: float
) -> None:
    expected = measures(z)
    order = torch.randperm(len(z), generator=torch.Generator().manual_seed(seed))
    rotation = orthogonal(z.shape[1], z)
    for other in (z * 10**exponent, z[order]):
        torch.testing.assert_close(measures(other), expected, rtol=1e-9, atol=1e-9)
    turned = torch.where((z == 0).all(-1, keepdim=True), 0, z @ rotation)
    torch.testing.assert_close(measures(turned), expected, rtol=1e-7, atol=1e-7)


@given(st.integers(2, 10), st.integers(2, 10), seeds, st.floats(1, 6))
def test_a_long_row_and_a_shared_vector_show(n: int, d: int, seed: int, exponent: float) -> None:
    """The two ways to lower the linear entropy without any compression."""
    z = torch.randn(n + 1, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    plain = measures(z)
    long = z.clone()
    long[0] *= 1e3 * 10**exponent
    shared = z + 1e2 * 10**exponent * torch.nn.functional.normalize(z[0], dim=0)
    assert measures(long)[0] < 1e-2
    assert measures(long)[2] > 100
    torch.testing.assert_close(measures(long)[1], plain[1], rtol=1e-8, atol=1e-8)
    assert measures(shared)[0] < 0.2
    assert measures(shared)[3] > 0.9
