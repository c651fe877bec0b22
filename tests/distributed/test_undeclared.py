"""What the first step over ranks shows: parts that nobody declared, and losses that are shares."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import Shard
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from gapt_optim import GAPTConfig, GAPTOptimizer, RepresentationHook
from gapt_optim.undeclared import share_of
from tests.distributed.parallel import Split, along_batch, batch_of, made, sequence_parallel
from tests.distributed.ranks import Ranks
from tests.distributed.runs import COMPRESSING, Net, data, full


def first_step(run: Split, low: bool) -> tuple[str, bool]:
    """What the first step raised, and whether the weights changed."""
    model, optimizer, _ = made(run)
    before = [full(p) for p in model.parameters()]
    ids, _ = batch_of(0, masked=False)
    scores = model(ids[:, :-1])
    loss = F.cross_entropy(scores.flatten(0, 1), ids[:, 1:].flatten())
    if hasattr(loss, "full_tensor"):
        loss = loss.full_tensor()
    optimizer.backward(loss.bfloat16() if low else loss)
    try:
        optimizer.step()
    except ValueError as error:
        return str(error), any(not torch.equal(full(p), was) for p, was in zip(model.parameters(), before, strict=True))
    return "", True


PLANS = {
    "blocks": Split(sequence_parallel),
    "batch": Split(along_batch),
    "features": Split(sequence_parallel, "blocks.*.mlp.up"),
}


@pytest.mark.parametrize("low", [False, True], ids=["float64", "bfloat16"])
@pytest.mark.parametrize("run", PLANS.values(), ids=PLANS)
def test_parts_that_nobody_declared_are_refused_before_the_step(ranks: Ranks, run: Split, low: bool) -> None:
    first, second = ranks(first_step, run, low)
    assert first == second
    message, changed = first
    assert not changed
    assert 'the same loss, and different entropies of layer "blocks.0' in message
    assert "placements=(mesh['tp'], Shard(1))" in message


@pytest.mark.parametrize(
    "run",
    [
        replace(PLANS["blocks"], placement=Shard(1)),
        replace(PLANS["features"], placement=Shard(-1)),
        Split(sequence_parallel, "blocks.*.norm"),
        Split(sequence_parallel, "head"),
    ],
    ids=["blocks", "features", "DTensors", "whole"],
)
def test_what_was_declared_or_is_whole_is_not(ranks: Ranks, run: Split) -> None:
    assert ranks(first_step, run, False) == [("", True)] * 2


class Noisy(Net):
    """Drops features at random, of each rank's own choice."""

    def forward(self, x: Tensor) -> Tensor:
        torch.manual_seed(dist.get_rank())
        return super().forward(F.dropout(x, 0.5))


def train_on(same: bool, noisy: bool, dtype: torch.dtype, gathered: bool) -> str:
    """One step of DDP on the same batch or on shares of it."""
    torch.manual_seed(0)
    model: nn.Module = (Noisy if noisy else Net)()
    hook = RepresentationHook(model, "blocks.*")
    optimizer = GAPTOptimizer(torch.optim.SGD(model.parameters(), 0.1), hook, GAPTConfig(gate=COMPRESSING))
    x, target = data(0, torch.float32)
    if same:
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(4, 10, 6, generator=generator)
        target = torch.randint(4, (4, 10), generator=generator)
    loss = F.cross_entropy(DistributedDataParallel(model)(x).flatten(0, 1), target.flatten()).to(dtype)
    if gathered:  # a loss over the batches of all ranks, the same number on each
        others = loss.detach().clone()
        dist.all_reduce(others)
        loss = loss + (others - loss).detach()
    if dtype == torch.bfloat16:  # that of another rank, by chance
        loss = loss - loss.detach() + 1
    optimizer.backward(loss)
    try:
        optimizer.step()
    except ValueError as error:
        return str(error)
    return ""


@pytest.mark.parametrize(
    ("same", "noisy", "dtype", "gathered"),
    [
        (False, False, torch.float32, False),
        (True, False, torch.float32, False),
        (True, True, torch.float32, False),
        (False, False, torch.bfloat16, False),
        (False, True, torch.bfloat16, False),
        (False, False, torch.float32, True),
    ],
)
def test_ranks_with_data_of_their_own_raise_no_alarm(
    ranks: Ranks, same: bool, noisy: bool, dtype: torch.dtype, gathered: bool
) -> None:
    assert ranks(train_on, same, noisy, dtype, gathered) == ["", ""]


def divide(by: int, scaled_by: float, ignored: bool) -> str:
    """A step of a loss that is a sum over the tokens of this rank."""
    torch.manual_seed(0)
    model = Net()
    optimizer = GAPTOptimizer(torch.optim.SGD(model.parameters(), 0.1), RepresentationHook(model, "blocks.*"))
    x, target = data(0, torch.float32)
    if ignored:
        target[:, 5:] = -100
    tokens = torch.tensor((target >= 0).sum().item())
    total = F.cross_entropy(model(x).flatten(0, 1), target.flatten(), reduction="sum")
    try:
        optimizer.backward(total / (tokens * by), scaled_by=scaled_by)
        optimizer.step()
    except ValueError as error:
        return str(error)
    return ""


def test_a_share_of_a_loss_over_all_ranks_is_refused(ranks: Ranks) -> None:
    for message in ranks(divide, 2, 1.0, False):
        assert "scaled_by=own tokens / all tokens), here 0.5" in message


@pytest.mark.parametrize(("by", "scaled_by", "ignored"), [(2, 0.5, False), (1, 1.0, False), (1, 1.0, True)])
def test_other_losses_are_not(ranks: Ranks, by: int, scaled_by: float, ignored: bool) -> None:
    assert ranks(divide, by, scaled_by, ignored) == ["", ""]


class _LossParallelCrossEntropy(torch.autograd.Function):
    """As torchtitan's over parts of a vocabulary."""

    @staticmethod
    def forward(ctx: Any, scores: Tensor, target: Tensor) -> Tensor:
        ctx.save_for_backward(scores, target)
        return F.cross_entropy(scores, target, reduction="sum")

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        scores, _ = ctx.saved_tensors
        return torch.zeros_like(scores), None


class _Mean(_LossParallelCrossEntropy):
    """One that may be a mean already."""


def test_which_losses_are_shares() -> None:
    scores, target = torch.randn(8, 5, requires_grad=True), torch.randint(5, (8,))
    target[:2] = -100
    summed = F.cross_entropy(scores, target, reduction="sum")
    assert share_of(summed / 24) == pytest.approx(0.25)
    assert share_of(_LossParallelCrossEntropy.apply(scores, target) / torch.tensor(24)) == pytest.approx(0.25)
    assert share_of(_Mean.apply(scores, target) / 24) == 1.0  # type: ignore[no-untyped-call]
    for loss in (summed, summed / 6, F.cross_entropy(scores, target) / 24, scores.sum() / 24, scores.square().sum()):
        assert share_of(loss) == 1.0
