"""The monitor: what it reports, and that it changes nothing."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter
from torch.optim import optimizer as torch_optimizer

from gapt_optim import (
    EntropyConfig,
    GAPTConfig,
    GAPTOptimizer,
    GateConfig,
    JSONLines,
    RepresentationHook,
    StepMetrics,
    monitor,
)
from gapt_optim.profiling import Monitor

from .test_profile import gpt2, tokens


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([nn.Linear(6, 12), nn.Linear(12, 12)])
        self.dropout = nn.Dropout(0.2)
        self.head = nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = self.dropout(torch.tanh(block(x)))
        out: Tensor = self.head(x)
        return out


def train(
    steps: int,
    watch: Callable[[nn.Module], contextlib.AbstractContextManager[Any]],
    *,
    micro_batches: int = 1,
    run: Callable[[nn.Module], nn.Module] = lambda model: model,
) -> tuple[list[Tensor], list[list[Tensor]], Any]:
    """A plain loop that evaluates after each step. Returns weights before each step, its batches and the monitor."""
    torch.manual_seed(0)
    model = Net()
    called = run(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    batches, weights = [], []
    with watch(model) as watching:
        for _ in range(steps):
            batches.append([torch.randn(16, 6) for _ in range(micro_batches)])
            weights.append(torch.nn.utils.parameters_to_vector(model.parameters()).detach().clone())
            for x in batches[-1]:
                called(x).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
            model.eval()
            with torch.no_grad():
                called(torch.ones(16, 6))
            model.train()
    weights.append(torch.nn.utils.parameters_to_vector(model.parameters()).detach().clone())
    return weights, batches, watching


def nothing(model: nn.Module) -> contextlib.AbstractContextManager[None]:
    return contextlib.nullcontext()


@pytest.mark.parametrize("micro_batches", [1, 3])
def test_it_changes_nothing_and_equals_measuring(micro_batches: int) -> None:
    seen: list[StepMetrics] = []
    bare, _, _ = train(7, nothing, micro_batches=micro_batches)
    weights, batches, _ = train(
        7, lambda model: monitor(model, every=3, observers=[seen.append]), micro_batches=micro_batches
    )
    assert all(torch.equal(a, b) for a, b in zip(bare, weights, strict=True))
    assert [metrics.step for metrics in seen] == [1, 3, 6]
    model = Net()
    hook = RepresentationHook(model)
    model.blocks[1].register_forward_hook(lambda module, args, out: None)
    for metrics in seen:
        torch.nn.utils.vector_to_parameters(weights[metrics.step - 1], model.parameters())
        model.eval()
        with torch.no_grad(), hook.measuring() as measured:
            for x in batches[metrics.step - 1]:
                model(x)
        # Dropout changes what comes behind the first block, and not that.
        name = "blocks.0"
        assert metrics.layer_entropy[name] == pytest.approx(measured.entropies[name], rel=1e-5)
        assert metrics.layer_measures[name].norm_ratio == pytest.approx(measured.measures[name].norm_ratio, rel=1e-5)
        assert metrics.loss is None


def test_it_equals_the_frozen_gate_of_an_optimizer() -> None:
    """The same entropies, with masks, in training mode."""
    torch.manual_seed(0)
    model, batches = gpt2(), tokens(mask=True, batches=5)
    config = GAPTConfig(gate=GateConfig(frozen=True))
    optimizer = GAPTOptimizer(torch.optim.SGD(model.parameters(), lr=1e-2), RepresentationHook(model), config)
    with monitor(model, every=2) as watching:
        for i, batch in enumerate(batches):
            optimizer.backward(model(**batch, labels=batch["input_ids"]).loss)
            optimizer.step()
            optimizer.zero_grad()
            if i == 0 or i % 2 == 1:
                assert optimizer.metrics is not None
                assert watching.metrics is not None
                assert watching.steps == watching.metrics.step == i + 1
                for name, value in optimizer.metrics.layer_entropy.items():
                    assert watching.metrics.layer_entropy[name] == pytest.approx(value, rel=1e-5)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
def test_compiled_models() -> None:
    torch._dynamo.reset()
    counter = CompileCounter()
    compiled = {"run": lambda model: torch.compile(model, backend=counter, fullgraph=True)}
    bare, _, _ = train(9, nothing, **compiled)  # type: ignore[arg-type]
    torch._dynamo.reset()
    seen: list[StepMetrics] = []
    counter.frame_count = 0
    weights, _, _ = train(9, lambda model: monitor(model, every=4, observers=[seen.append]), **compiled)  # type: ignore[arg-type]
    assert all(torch.equal(a, b) for a, b in zip(bare, weights, strict=True))
    assert [metrics.step for metrics in seen] == [1, 4, 8]
    assert all(len(metrics.layer_entropy) == 2 for metrics in seen)
    assert counter.frame_count <= 4  # read or not, in training and in evaluation


def test_recomputed_forward_passes_are_not_counted_again() -> None:
    class Checkpointed(Net):
        def forward(self, x: Tensor) -> Tensor:
            for block in self.blocks:
                x = torch.utils.checkpoint.checkpoint(lambda z, b=block: torch.tanh(b(z)), x, use_reentrant=False)
            out: Tensor = self.head(x)
            return out

    found = []
    for build in (Checkpointed, Net):
        torch.manual_seed(0)
        model = build()
        model.dropout.p = 0.0
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        with monitor(model) as watching:
            model(torch.ones(16, 6) + torch.eye(16, 6)).square().mean().backward()
            optimizer.step()
        found.append(watching.metrics)
    assert found[0] == found[1]


def test_several_optimizers_of_a_step_and_those_of_other_models() -> None:
    model, other = Net(), nn.Linear(2, 2)
    optimizers = [torch.optim.SGD(block.parameters(), lr=0.1) for block in (*model.blocks, other)]
    with monitor(model, every=1) as watching:
        for _ in range(3):
            other(torch.randn(4, 2)).sum().backward()
            optimizers[2].step()
            assert watching.steps == 0 or watching.metrics is not None
        assert watching.steps == 0
        for _ in range(2):
            model(torch.randn(16, 6)).sum().backward()
            for optimizer in optimizers:
                optimizer.step()
        assert watching.steps == 2


def test_steps_that_no_optimizer_of_the_model_takes_are_told_by_hand() -> None:
    model = Net()
    with monitor(model, every=1) as watching:
        model(torch.randn(16, 6)).sum().backward()
        watching.step()
        watching.step()
    assert watching.steps == 1
    assert watching.metrics is not None


def test_it_leaves_nothing_behind() -> None:
    model = Net()
    before = len(torch_optimizer._global_optimizer_post_hooks)
    placed = []
    with contextlib.suppress(KeyboardInterrupt), monitor(model):
        placed = [module for module in model.modules() if module._forward_hooks]
        raise KeyboardInterrupt
    assert placed
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert len(torch_optimizer._global_optimizer_post_hooks) == before


def test_an_observer_that_raises_is_dropped_once_with_a_warning(tmp_path: Path) -> None:
    def broken(metrics: StepMetrics) -> None:
        raise OSError("no space left")

    seen: list[StepMetrics] = []
    with JSONLines(tmp_path / "metrics.jsonl") as log, pytest.warns(UserWarning, match="no space left"):
        train(2, lambda model: Monitor(model, every=1, observers=[broken, seen.append, log]))
    assert len(seen) == len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 2


def test_settings() -> None:
    with pytest.raises(ValueError, match="every must be at least 1 step, found 0"):
        monitor(Net(), every=0)
    plain = EntropyConfig(kernel="linear", center=False)
    _, _, watching = train(1, lambda model: monitor(model, "blocks.0", entropy=plain))
    assert watching.metrics.entropy == pytest.approx(watching.metrics.measures.linear_entropy, rel=1e-6)
    with pytest.raises(RuntimeError, match="this monitor has ended; make a new one"):
        watching.__enter__()
