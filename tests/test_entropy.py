"""matrix_entropy against its slow twin, and at the edges where the twin is not defined."""

from __future__ import annotations

import contextlib
import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from gapt_optim import matrix_entropy
from gapt_optim.kernels import full_precision
from tests.reference import KERNELS, reference_entropy

ORDERS = [0.1, 0.5, 0.9, 1 - 1e-7, 1.0, 1 + 1e-7, 1.5, 2.0, 2.5, 3.0, 8.0, 9.0, 50.0, math.inf]
ROUTES = [0.5, 1.0, 2.0, 3.0, 9.0, math.inf]  # one order per way to compute
SHAPES = [(5, 9), (9, 5), (6, 6)]

orders = pytest.mark.parametrize("alpha", ORDERS)
routes = pytest.mark.parametrize("alpha", ROUTES)
shapes = pytest.mark.parametrize("shape", SHAPES, ids=["wide", "tall", "square"])
normalized = pytest.mark.parametrize("normalize", [False, True], ids=["nats", "normalized"])
kernels = pytest.mark.parametrize(("kernel", "center"), KERNELS.values(), ids=KERNELS)


def value_and_gradient(z: Tensor, **options: object) -> tuple[Tensor, Tensor]:
    z = z.clone().requires_grad_()
    value = matrix_entropy(z, **options)  # type: ignore[arg-type]
    (gradient,) = torch.autograd.grad(value.sum(), z)
    return value.detach(), gradient


def relative(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected.double()).norm() / expected.double().norm())


@kernels
@normalized
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-5)], ids=["64", "32"])
@shapes
@orders
def test_equals_the_reference(
    alpha: float,
    shape: tuple[int, int],
    dtype: torch.dtype,
    tolerance: float,
    normalize: bool,
    kernel: str,
    center: bool,
) -> None:
    z = torch.randn(*shape, dtype=dtype)
    twin = z.double().requires_grad_()
    expected = reference_entropy(twin, alpha, normalize=normalize, kernel=kernel, center=center)
    (slope,) = torch.autograd.grad(expected, twin)
    value, gradient = value_and_gradient(z, alpha=alpha, normalize=normalize, kernel=kernel, center=center)
    assert relative(value, expected.detach()) < tolerance
    assert relative(gradient, slope) < tolerance


@kernels
@orders
def test_masked_rows_equal_deleted_rows(alpha: float, kernel: str, center: bool) -> None:
    z = torch.randn(7, 4, dtype=torch.float64)
    mask = torch.tensor([1, 0, 1, 1, 0, 1, 0])
    z[1], z[4] = math.nan, math.inf
    value, gradient = value_and_gradient(z, alpha=alpha, mask=mask, normalize=True, kernel=kernel, center=center)
    kept_value, kept_gradient = value_and_gradient(
        z[mask.bool()], alpha=alpha, normalize=True, kernel=kernel, center=center
    )
    torch.testing.assert_close(value, kept_value, rtol=1e-10, atol=0)
    torch.testing.assert_close(gradient[mask.bool()], kept_gradient, rtol=1e-8, atol=1e-12)
    assert (gradient[mask == 0] == 0).all()


@kernels
@routes
def test_leading_dimensions_are_batched(alpha: float, kernel: str, center: bool) -> None:
    z, mask = torch.randn(2, 3, 5, 4, dtype=torch.float64), torch.rand(2, 3, 5) > 0.3
    weights = torch.rand(2, 3, dtype=torch.float64)
    z.requires_grad_()
    value = matrix_entropy(z, alpha=alpha, mask=mask, kernel=kernel, center=center)
    (gradient,) = torch.autograd.grad((value * weights).sum(), z)
    assert value.shape == (2, 3)
    for i in range(2):
        for j in range(3):
            one, slope = value_and_gradient(
                z[i, j].detach(), alpha=alpha, mask=mask[i, j], kernel=kernel, center=center
            )
            torch.testing.assert_close(value[i, j], one)
            torch.testing.assert_close(gradient[i, j], slope * weights[i, j])


def test_a_mask_of_one_sequence_serves_the_batch() -> None:
    z, mask = torch.randn(3, 5, 4), torch.tensor([1, 1, 0, 1, 0])
    torch.testing.assert_close(matrix_entropy(z, mask=mask), matrix_entropy(z, mask=mask.expand(3, 5)))


@kernels
@routes
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_low_precision_is_accumulated_in_float32(alpha: float, dtype: torch.dtype, kernel: str, center: bool) -> None:
    z = (torch.randn(9, 5) * 30).to(dtype)
    value, gradient = value_and_gradient(z, alpha=alpha, kernel=kernel, center=center)
    exact, slope = value_and_gradient(z.float(), alpha=alpha, kernel=kernel, center=center)
    assert value.dtype == torch.float32
    assert torch.equal(value, exact)
    assert gradient.dtype == dtype
    assert torch.equal(gradient, slope.to(dtype))


@kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@routes
def test_keeps_single_and_double_precision(alpha: float, dtype: torch.dtype, kernel: str, center: bool) -> None:
    value, gradient = value_and_gradient(torch.randn(4, 3, dtype=dtype), alpha=alpha, kernel=kernel, center=center)
    assert value.dtype == gradient.dtype == dtype


@kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@routes
def test_autocast_changes_nothing(alpha: float, dtype: torch.dtype, kernel: str, center: bool) -> None:
    z = torch.randn(9, 5, dtype=dtype)
    expected = value_and_gradient(z, alpha=alpha, kernel=kernel, center=center)
    with torch.autocast("cpu", torch.bfloat16):
        found = value_and_gradient(z, alpha=alpha, kernel=kernel, center=center)
    assert all(map(torch.equal, found, expected))


@pytest.mark.skipif(not hasattr(torch.backends, "fp32_precision"), reason="torch 2.9 and newer say it so")
@pytest.mark.parametrize("own", [True, False], ids=["of products on GPUs", "of everything"])
@pytest.mark.parametrize("raises", [False, True])
def test_products_on_a_gpu_are_not_rounded_to_tf32(raises: bool, own: bool) -> None:
    """Where the training around them allows it; it has its own setting back afterwards."""
    matmul: Any = torch.backends.cuda.matmul
    with FakeTensorMode():
        z = torch.empty(2, 3, device="cuda")
    try:
        with torch.backends.flags(fp32_precision="none" if own else "tf32"):
            matmul.fp32_precision = "tf32" if own else "none"
            assert matmul.fp32_precision == "tf32"
            with contextlib.suppress(ZeroDivisionError), full_precision(z):
                with full_precision(z):  # as in another thread
                    assert matmul.fp32_precision == "ieee"
                assert matmul.fp32_precision == "ieee"
                if raises:
                    _ = 1 / 0
            assert matmul.fp32_precision == "tf32"
        with torch.backends.flags(fp32_precision="ieee"):
            assert matmul.fp32_precision == ("tf32" if own else "ieee")
    finally:
        matmul.fp32_precision = "none"


@kernels
@normalized
@routes
@pytest.mark.parametrize("shape", [(4, 3), (3, 4), (1, 1), (0, 3), (3, 0), (0, 0), (2, 0, 3), (0, 2, 3), (2, 3, 0)])
def test_zeros_and_nothing_have_no_entropy(
    shape: tuple[int, ...], alpha: float, normalize: bool, kernel: str, center: bool
) -> None:
    value, gradient = value_and_gradient(
        torch.zeros(shape), alpha=alpha, normalize=normalize, kernel=kernel, center=center
    )
    assert value.shape == shape[:-2]
    assert (value == 0).all()
    assert (gradient == 0).all()


@kernels
@normalized
@routes
def test_no_live_row_means_no_entropy(alpha: float, normalize: bool, kernel: str, center: bool) -> None:
    mask = torch.tensor([[False] * 3, [True] * 3])
    value, gradient = value_and_gradient(
        torch.randn(2, 3, 4), alpha=alpha, mask=mask, normalize=normalize, kernel=kernel, center=center
    )
    assert value[0] == 0
    assert value[1] > 0.1
    assert (gradient[0] == 0).all()


@normalized
@shapes
@routes
@pytest.mark.parametrize("kernel", ["linear", "cosine"])
def test_centered_one_live_row_or_equal_rows_have_none(
    kernel: str, alpha: float, shape: tuple[int, int], normalize: bool
) -> None:
    """Value and gradient are exactly 0: what is left of such rows is rounding."""
    one = torch.zeros(shape)
    one[1] = torch.randn(shape[1]) * 100
    equal = (torch.randn(1, shape[1]) * 100).expand(shape)
    alone = torch.arange(shape[0]) == 2
    for z, mask in ((one, None), (equal, None), (torch.randn(shape), alone), (equal, ~alone)):
        value, gradient = value_and_gradient(z, alpha=alpha, kernel=kernel, mask=mask, normalize=normalize)
        assert value == 0
        assert (gradient == 0).all()


@kernels
@normalized
@pytest.mark.parametrize("shape", [(1, 5), (5, 1), (1, 1)])
@orders
def test_one_row_or_one_column(
    alpha: float, shape: tuple[int, int], normalize: bool, kernel: str, center: bool
) -> None:
    value, gradient = value_and_gradient(
        torch.randn(shape), alpha=alpha, normalize=normalize, kernel=kernel, center=center
    )
    assert 0 <= value < 1e-6
    assert gradient.abs().max() < 1e-5


@kernels
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 2e-5)], ids=["64", "32"])
@shapes
@orders
def test_rank_deficient(
    alpha: float, shape: tuple[int, int], dtype: torch.dtype, tolerance: float, kernel: str, center: bool
) -> None:
    """Value and gradient are those of the two directions that are left, not of the rounding of the others."""
    n, d = shape
    rows, mixing, columns = (torch.randn(*size, dtype=dtype) for size in ((n, 2), (2, 64), (64, d)))
    value, gradient = value_and_gradient(rows @ mixing @ columns, alpha=alpha, kernel=kernel, center=center)
    q, r = torch.linalg.qr((mixing.double() @ columns.double()).T)  # z = (rows rᵀ) qᵀ
    small = (rows.double() @ r.T).requires_grad_()
    expected = reference_entropy(small, alpha, kernel=kernel, center=center)
    (slope,) = torch.autograd.grad(expected, small)
    torch.testing.assert_close(value.double(), expected.detach(), rtol=tolerance, atol=tolerance)
    assert relative(gradient, slope @ q.T) < tolerance * 10


@kernels
@pytest.mark.parametrize("scale", [1e-30, 1e-22, 1e-20, 1e-19, 1e-18, 1e-15])
@orders
def test_tiny_matrices_are_finite(alpha: float, scale: float, kernel: str, center: bool) -> None:
    """Where float32 ends the entropy may be that of zeros, never nan."""
    value, gradient = value_and_gradient(torch.randn(5, 4) * scale, alpha=alpha, kernel=kernel, center=center)
    assert value.isfinite()
    assert gradient.isfinite().all()
    assert (value > 0.1) or (gradient == 0).all()


@kernels
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@shapes
@routes
def test_non_finite_input_gives_a_non_finite_value(
    alpha: float, shape: tuple[int, int], bad: float, kernel: str, center: bool
) -> None:
    z = torch.randn(2, *shape)
    z[0, 2, 3] = bad
    value, gradient = value_and_gradient(z, alpha=alpha, kernel=kernel, center=center)
    assert not value[0].isfinite()
    assert value[1].isfinite()
    assert gradient[1].isfinite().all()


@kernels
@routes
def test_shared_eigenvalues_have_a_finite_gradient(alpha: float, kernel: str, center: bool) -> None:
    for z in (torch.eye(4, 6), torch.linalg.qr(torch.randn(6, 4, dtype=torch.float64)).Q.T):
        value, gradient = value_and_gradient(z, alpha=alpha, kernel=kernel, center=center)
        assert value == pytest.approx(math.log(4 - center), rel=1e-6)
        assert gradient.abs().max() < 1e-5  # a maximum


@kernels
@routes
def test_cannot_be_differentiated_twice(alpha: float, kernel: str, center: bool) -> None:
    z = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(
        matrix_entropy(z, alpha=alpha, kernel=kernel, center=center), z, create_graph=True
    )
    with pytest.raises(RuntimeError, match="once"):
        (gradient.square().sum() + z.sum()).backward()


def test_non_contiguous_and_expanded_input() -> None:
    z = torch.randn(4, 5, dtype=torch.float64)
    for view in (z.T, z[:, ::2], z.expand(3, 4, 5), z[0].expand(4, 5)):
        torch.testing.assert_close(matrix_entropy(view), matrix_entropy(view.clone()))


def test_values_only_without_gradients() -> None:
    z = torch.randn(4, 3, requires_grad=True)
    with torch.no_grad():
        assert not matrix_entropy(z).requires_grad
    assert not matrix_entropy(z.detach()).requires_grad


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.complex64])
def test_refuses_what_is_not_real_floating_point(dtype: torch.dtype) -> None:
    with pytest.raises(TypeError, match=rf"z must be .*{dtype}"):
        matrix_entropy(torch.ones(3, 3, dtype=dtype))


def test_refuses_what_is_no_tensor() -> None:
    with pytest.raises(TypeError, match="z must be a tensor, found list"):
        matrix_entropy([[1.0, 2.0]])  # type: ignore[arg-type]


@pytest.mark.parametrize("shape", [(), (3,)])
def test_refuses_fewer_than_two_dimensions(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"z must have shape"):
        matrix_entropy(torch.ones(shape))


@pytest.mark.parametrize("alpha", [0.0, -1.0, -math.inf, math.nan])
def test_refuses_impossible_orders(alpha: float) -> None:
    with pytest.raises(ValueError, match="alpha"):
        matrix_entropy(torch.ones(3, 3), alpha=alpha)


@pytest.mark.parametrize("kernel", ["rbf", "", None])
def test_refuses_kernels_that_it_does_not_know(kernel: str) -> None:
    with pytest.raises(ValueError, match=r'kernel must be "linear" or "cosine"'):
        matrix_entropy(torch.ones(3, 3), kernel=kernel)  # type: ignore[arg-type]


@pytest.mark.parametrize("shape", [(2,), (3, 2), (2, 3, 3), (4, 3)])
def test_refuses_masks_of_another_shape(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"mask must have shape \(2, 3\)"):
        matrix_entropy(torch.ones(2, 3, 4), mask=torch.ones(shape))
