"""An in-place operation behind a watched output of a compiled model."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from gapt_optim import AlignmentConfig, GAPTConfig, GAPTOptimizer, RepresentationHook


def gradient(config: GAPTConfig, *, compiled: bool, inplace: bool) -> Tensor:
    torch._dynamo.reset()
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(inplace=inplace), nn.Linear(8, 2))
    optimizer = GAPTOptimizer(torch.optim.SGD(model.parameters(), lr=0.0), RepresentationHook(model, "0"), config)
    called = torch.compile(model, backend="aot_eager") if compiled else model
    optimizer.backward(called(torch.randn(16, 4)).square().mean())
    assert isinstance(model[0], nn.Linear)
    assert model[0].weight.grad is not None
    return model[0].weight.grad


@pytest.mark.parametrize("every", [0, 1, 10])
@pytest.mark.parametrize("method", [GAPTConfig.plain, GAPTConfig.penalty])
@pytest.mark.filterwarnings("ignore:.*autograd.function.Function.*should not be instantiated:DeprecationWarning")
def test_a_compiled_model_may_work_in_place_behind_a_watched_output(method, every: int) -> None:  # type: ignore[no-untyped-def]
    config = method(alignment=AlignmentConfig(every=every))
    expected = gradient(config, compiled=False, inplace=False)
    torch.testing.assert_close(gradient(config, compiled=True, inplace=True), expected)
