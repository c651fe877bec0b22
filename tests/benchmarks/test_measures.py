"""What can hide in an entropy, on matrices whose measures are known."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from benchmarks.evidence.measures import NAMES, measures, watching
from gapt_optim import matrix_entropy


def test_orthogonal_rows() -> None:
    found = measures(torch.eye(8).repeat(4, 1)[None])
    assert found["linear"] == pytest.approx(math.log(8), rel=1e-5)
    assert found["cosine"] == pytest.approx(math.log(8), rel=1e-5)
    assert found["centred_cosine"] == pytest.approx(math.log(7), rel=1e-5)
    assert found["window_norm_ratio"] == pytest.approx(1.0)
    assert found["window_mean_share"] == pytest.approx(1 / 8, rel=1e-5)


def test_one_long_token_hides_in_the_linear_entropy_alone() -> None:
    z = torch.eye(8) * torch.tensor([100.0, *[1.0] * 7])[:, None]
    found = measures(z[None])
    assert found["linear"] < 0.01
    assert found["cosine"] == pytest.approx(math.log(8), rel=1e-5)
    assert found["norm_ratio"] == pytest.approx(100.0)


def test_a_common_vector_hides_in_the_cosine_entropy_alone() -> None:
    z = torch.cat([torch.full((8, 1), 30.0), torch.eye(8)], dim=1)
    found = measures(z[None])
    assert found["cosine"] < 0.05
    assert found["centred_cosine"] == pytest.approx(math.log(7), rel=1e-3)
    assert found["mean_share"] > 0.99


def test_no_rows_at_all_are_no_entropy() -> None:
    assert all(math.isfinite(value) and value <= 1.5 for value in measures(torch.zeros(2, 16, 4)).values())


@pytest.mark.parametrize(
    ("name", "kernel", "center"),
    [("linear", "linear", False), ("centred_linear", "linear", True), ("cosine", "cosine", False),
     ("centred_cosine", "cosine", True)],
)  # fmt: skip
def test_they_equal_the_library_s(name: str, kernel: str, center: bool) -> None:
    h = torch.randn(3, 24, 16, generator=torch.Generator().manual_seed(0))
    ours = matrix_entropy(h.unflatten(1, (-1, 8)), kernel=kernel, center=center).mean()  # type: ignore[arg-type]
    assert measures(h)[name] == pytest.approx(float(ours), rel=1e-5)
    assert set(NAMES) == set(measures(h))


def test_watching_sees_outputs_in_order_and_lets_go() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    with watching(list(model)) as seen:
        model(torch.zeros(1, 4))
    assert [h.shape[-1] for h in seen] == [4, 2]
    model(torch.zeros(1, 4))
    assert len(seen) == 2
