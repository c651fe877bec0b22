"""Every rank takes part in the one collective of every step, whatever it had to do: nothing hangs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.algorithms.join import Join
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from gapt_optim import GAPTConfig, GAPTOptimizer, RepresentationHook
from tests.distributed.ranks import Ranks
from tests.distributed.runs import RESTLESS, Net, data
from tests.distributed.test_over_ranks import counted_collectives, numbers_per_step

STEPS = 5


def made(dtype: torch.dtype, layers: Any = "blocks.*") -> tuple[nn.Module, GAPTOptimizer]:
    torch.manual_seed(0)
    model = Net().to(dtype)
    base = torch.optim.SGD(model.parameters(), lr=0.05)
    return model, GAPTOptimizer(base, RepresentationHook(model, layers), GAPTConfig(gate=RESTLESS))


def mean_gradients(model: nn.Module) -> None:
    """As a loop of one's own averages them, also on a rank that has none."""
    for p in model.parameters():
        p.grad = torch.zeros_like(p) if p.grad is None else p.grad
        dist.all_reduce(p.grad)
        p.grad /= dist.get_world_size()


def loss_of(model: nn.Module, step: int, dtype: torch.dtype) -> Tensor:
    x, target = data(step, dtype)
    return F.cross_entropy(model(x).flatten(0, 1), target.flatten())


def train_with(what: str, dtype: torch.dtype) -> list[tuple[Any, list[int]]]:
    """Metrics and collectives of ours by step; in step 2, and for ``first`` in step 0, one rank has no loss."""
    model, optimizer = made(dtype)
    seen = []
    for step in range(STEPS):
        odd = dist.get_rank() == 1 and step == (0 if what == "first" else 2)
        with counted_collectives() as sizes:
            if not odd:
                optimizer.backward(loss_of(model, step, dtype))
            elif what == "discarded":
                optimizer.backward(loss_of(model, step, dtype))
                optimizer.zero_grad()
                optimizer.discard_step()
            elif what == "exception":
                model(data(step, dtype)[0])
                with pytest.raises(ValueError, match="one floating-point number"):
                    optimizer.backward(torch.ones(2))
            real, sent = list(sizes), None
        mean_gradients(model)
        with counted_collectives() as sizes:
            optimizer.step()
            sent = [numbers for numbers, _ in [*real, *sizes]]
        optimizer.zero_grad()
        metrics = optimizer.metrics
        assert metrics is not None
        seen.append((repr((metrics.step, metrics.phase, metrics.loss, metrics.layer_entropy)), sent))
    return seen


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("what", ["none", "first", "discarded", "exception"])
def test_a_rank_without_a_loss_takes_part(ranks: Ranks, what: str, dtype: torch.dtype) -> None:
    first, second = ranks(train_with, what, dtype, timeout=30)
    assert first == second
    numbers = numbers_per_step(3)
    assert [sent for _, sent in first] == [[8, numbers], *[[numbers]] * (STEPS - 1)]


def train_joined(batches: list[int], with_model: bool) -> list[str]:
    """Each rank has its own number of batches."""
    model, optimizer = made(torch.float64)
    called = DistributedDataParallel(model)
    told: list[str] = []
    optimizer._observers.append(lambda m: told.append(repr((m.step, m.phase, m.loss, m.entropy))))
    with Join([called, optimizer] if with_model else [optimizer]):
        for step in range(batches[dist.get_rank()]):
            loss = loss_of(called if with_model else model, step, torch.float64)
            optimizer.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
    return told


@pytest.mark.parametrize("with_model", [True, False])
@pytest.mark.parametrize("batches", [[6, 3], [1, 4], [0, 3]])
def test_ranks_whose_data_ends_follow_the_gate(ranks: Ranks, batches: list[int], with_model: bool) -> None:
    first, second = ranks(train_joined, batches, with_model, timeout=30)
    assert first == second
    assert len(first) == max(batches)


class Experts(nn.Module):
    """Tokens of each rank go to an expert of their own choice; one may get none."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList(nn.Linear(6, 6) for _ in range(2))
        self.head = nn.Linear(6, 4)
        self.rank = dist.get_rank() if dist.is_initialized() else 0

    def forward(self, x: Tensor) -> Tensor:
        x = x.flatten(0, 1)
        first = x[:, 0] > (9 if self.rank == 1 else 0)
        out = torch.zeros_like(x)
        for expert, own in zip(self.experts, (first, ~first), strict=True):
            if own.any():
                out = out.index_put((own.nonzero().squeeze(1),), expert(x[own]))
        return self.head(x + out)


def train_experts() -> list[tuple[dict[str, float], dict[str, float]]]:
    """Entropies by step, as the gate knows them and of this rank alone."""
    torch.manual_seed(0)
    model = Experts().double()
    hook = RepresentationHook(model, "experts.*")
    optimizer = GAPTOptimizer(torch.optim.SGD(model.parameters(), 0.0), hook, GAPTConfig(gate=RESTLESS))
    seen = []
    for step in range(3):
        x, target = data(step, torch.float64)
        optimizer.backward(F.cross_entropy(model(x), target.flatten()))
        optimizer.step()
        optimizer.zero_grad()
        with hook.measuring() as alone:
            model(x)
        assert optimizer.metrics is not None
        seen.append((optimizer.metrics.layer_entropy, alone.entropies))
    return seen


def test_an_expert_without_tokens_on_a_rank_weighs_nothing(ranks: Ranks) -> None:
    first, second = ranks(train_experts, timeout=30)
    for (judged, here), (same, there) in zip(first, second, strict=True):
        assert judged == same
        assert set(there) == {"experts.1"}
        assert judged["experts.0"] == pytest.approx(here["experts.0"], rel=1e-12)
        assert min(here["experts.1"], there["experts.1"]) < judged["experts.1"]
        assert judged["experts.1"] < max(here["experts.1"], there["experts.1"])


class Own(nn.Module):
    """Experts of this rank alone, by their numbers among all."""

    def __init__(self) -> None:
        super().__init__()
        first = 2 * dist.get_rank()
        self.experts = nn.ModuleDict({str(i): nn.Linear(6, 6) for i in range(first, first + 2)})
        self.head = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(sum(expert(x) for expert in self.experts.values()))


def train_own(layers: str) -> str:
    model = Own()
    hook = RepresentationHook(model, layers)
    optimizer = GAPTOptimizer(torch.optim.SGD(model.parameters(), 0.1), hook)
    x, target = data(0, torch.float32)
    optimizer.backward(F.cross_entropy(model(x).flatten(0, 1), target.flatten()))
    try:
        optimizer.step()
    except ValueError as error:
        return str(error)
    return ""


def test_experts_that_only_some_ranks_have_are_refused_on_all(ranks: Ranks) -> None:
    for message in ranks(train_own, "experts.*", timeout=30):
        assert "layers (rank 0: ['experts.0', 'experts.1'], rank 1: ['experts.2', 'experts.3'])" in message
        assert "watch the module around them" in message
    assert ranks(train_own, "head", timeout=30) == ["", ""]
