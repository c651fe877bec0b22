"""Two ranks that share a batch do what one process does with the whole of it."""

from __future__ import annotations

from dataclasses import astuple, replace
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel

from gapt_optim import (
    AlignmentConfig,
    Angle,
    EntropyConfig,
    GAPTConfig,
    GAPTOptimizer,
    GateConfig,
    LayerConfig,
    ObjectiveConfig,
    Phase,
    PhaseGate,
    RepresentationHook,
)
from tests.distributed.ranks import Ranks
from tests.distributed.runs import COMPRESSING, RESTLESS, SGD, Net, Run, Seen, full, train
from tests.reference import KERNELS
from tests.training import distance

DDP = [{}, {"static_graph": True}, {"find_unused_parameters": True}, {"gradient_as_bucket_view": True}]
FSDP = [{"reshard_after_forward": True}, {"reshard_after_forward": False}]
WAYS = [*(("ddp", options) for options in DDP), *(("fsdp", options) for options in FSDP)]
ways = pytest.mark.parametrize(("parallel", "options"), WAYS, ids=str)


def assert_equal_runs(found: list[list[Seen]], expected: list[Seen], tolerance: float = 1e-9) -> None:
    """Every rank saw what one process did: gradients, numbers, angles and phases of each step."""
    for of_rank in found:
        assert len(of_rank) == len(expected)
        for here, there in zip(of_rank, expected, strict=True):
            assert distance(here.gradients, there.gradients) < tolerance
            assert_equal_metrics(here, there, max(tolerance, 1e-9))
    assert [seen.metrics for seen in found[0]] == [seen.metrics for seen in found[1]]
    # The ranks did see different data.
    assert all(a.local_loss != b.local_loss for a, b in zip(*found, strict=True))


def assert_equal_metrics(here: Seen, there: Seen, tolerance: float) -> None:
    a, b = here.metrics, there.metrics
    assert (a.step, a.phase, a.next_phase, a.reason, a.switches) == (
        b.step,
        b.phase,
        b.next_phase,
        b.reason,
        b.switches,
    )
    assert a.loss == pytest.approx(b.loss, rel=tolerance)
    assert a.layer_entropy == pytest.approx(b.layer_entropy, rel=tolerance)
    assert a.entropy_share == (b.entropy_share and pytest.approx(b.entropy_share, rel=tolerance))
    assert a.layer_measures.keys() == b.layer_measures.keys()
    for name, measures in a.layer_measures.items():
        assert astuple(measures) == pytest.approx(astuple(b.layer_measures[name]), rel=tolerance, abs=tolerance)
    for found, expected in ((a.alignment, b.alignment), (a.parameter_alignment, b.parameter_alignment)):
        assert (found is None) == (expected is None)
        if found is not None and expected is not None:
            assert_equal_angles(found, expected, max(tolerance, 1e-6))
            assert found.layers.keys() == expected.layers.keys()
            for name in found.layers:
                assert_equal_angles(found.layers[name], expected.layers[name], max(tolerance, 1e-6))


def assert_equal_angles(found: Angle, expected: Angle, tolerance: float) -> None:
    for name in ("cosine", "projection", "loss_norm", "entropy_norm"):
        value = getattr(expected, name)  # None where one of the two is no gradient at all
        assert getattr(found, name) == (value and pytest.approx(value, rel=tolerance, abs=tolerance)), name


# Gradients, numbers and phases


@ways
def test_ranks_equal_one_process(ranks: Ranks, parallel: str, options: dict[str, Any]) -> None:
    run = Run(parallel, options)
    expected = train(replace(run, parallel="none"))
    assert expected[-1].metrics.switches >= 2
    assert_equal_runs(ranks(train, run), expected)


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
@pytest.mark.parametrize(
    "parts",
    [
        {"objective": ObjectiveConfig(weight=5.0), "layers": LayerConfig(schedule="rotate")},
        {"objective": ObjectiveConfig(direction="up", target_share=1.0)},
        {"alignment": AlignmentConfig(every=0)},
        {"layers": LayerConfig(skip_first=1)},
    ],
    ids=str,
)
def test_other_objectives(ranks: Ranks, parallel: str, parts: dict[str, Any]) -> None:
    run = Run(parallel, config=GAPTConfig(gate=COMPRESSING, **parts), steps=2)
    assert_equal_runs(ranks(train, run), train(replace(run, parallel="none")))


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
@pytest.mark.parametrize(("kernel", "center"), KERNELS.values(), ids=KERNELS)
def test_every_kernel(ranks: Ranks, kernel: str, center: bool, parallel: str) -> None:
    entropy = EntropyConfig(kernel=kernel, center=center)
    run = Run(parallel, config=GAPTConfig(gate=COMPRESSING, entropy=entropy), steps=2, micro_batches=2)
    assert_equal_runs(ranks(train, run), train(replace(run, parallel="none")))


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_recomputation(ranks: Ranks, parallel: str) -> None:
    run = Run(parallel, build=partial(Net, recompute=True))
    assert_equal_runs(ranks(train, run), train(replace(run, parallel="none", build=Net)))


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
@pytest.mark.slow
@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("parallel", ["ddp", "none"])
def test_compiled(ranks: Ranks, parallel: str, recompute: bool) -> None:
    run = Run(parallel, compiled=True, build=partial(Net, recompute=recompute))
    expected = train(replace(run, parallel="none", compiled=False))
    if parallel == "none":  # without averaged gradients, one process compiled
        (found,) = [train(run)]
        assert_equal_runs_of_one(found, expected)
        return
    assert_equal_runs(ranks(train, run), expected)


def assert_equal_runs_of_one(found: list[Seen], expected: list[Seen]) -> None:
    for here, there in zip(found, expected, strict=True):
        assert distance(here.gradients, there.gradients) < 1e-9
        assert_equal_metrics(here, there, 1e-9)


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_accumulation(ranks: Ranks, parallel: str) -> None:
    """DDP with no_sync on all micro-batches but the last."""
    run = Run(parallel, micro_batches=3)
    assert_equal_runs(ranks(train, run), train(replace(run, parallel="none")))


@pytest.mark.parametrize("reshard", [True, False])
def test_mixed_precision(ranks: Ranks, reshard: bool) -> None:
    """Hidden tensors of 8 bits on the ranks, of 53 in the one process."""
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    options = {"mp_policy": policy, "reshard_after_forward": reshard}
    run = Run("fsdp", options, GAPTConfig(gate=COMPRESSING), steps=1, dtype=torch.float32)
    expected = train(replace(run, parallel="none", dtype=torch.float64))
    for (found,) in ranks(train, run):
        there = expected[0]
        assert distance(found.gradients, there.gradients) < 0.02
        assert found.metrics.layer_entropy == pytest.approx(there.metrics.layer_entropy, rel=0.01)
        assert found.metrics.alignment is not None
        assert found.metrics.alignment.cosine == pytest.approx(there.metrics.alignment.cosine, abs=0.02)


def test_all_ranks_are_in_the_phase_that_the_mean_names(ranks: Ranks) -> None:
    """Each by itself would have gone another way."""
    gate = GateConfig(
        rule="published", patience_memorization=2, patience_compression=2, spike_tolerance=0.02, smoothing=0.0
    )
    run = Run("ddp", config=GAPTConfig(gate=gate), steps=30, lr=0.01)
    found = ranks(train, run)
    phases = [[seen.metrics.phase for seen in of_rank] for of_rank in found]
    assert phases[0] == phases[1]
    assert set(phases[0]) == {"memorization", "compression"}
    alone = []
    for of_rank in found:
        judge, phase = PhaseGate(gate), Phase.MEMORIZATION
        alone.append([])
        for seen in of_rank:
            alone[-1].append(phase.value)
            phase = judge.update(seen.local_loss, seen.metrics.entropy)
    assert alone[0] != alone[1]
    assert phases[0] == [seen.metrics.phase for seen in train(replace(run, parallel="none"))]


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_validation_losses_are_averaged(ranks: Ranks, parallel: str) -> None:
    gate = RESTLESS.model_copy(update={"signal": "validation"})
    run = Run(parallel, config=GAPTConfig(gate=gate), validation=True)
    found = ranks(train, run)
    for step, (a, b) in enumerate(zip(*found, strict=True)):
        assert a.metrics.validation_loss == b.metrics.validation_loss
        assert a.metrics.validation_loss == pytest.approx((a.local_loss + b.local_loss) / 2 + step, rel=1e-12)
    assert_equal_runs(found, train(replace(run, parallel="none")))


# Parameter alignment


@pytest.mark.parametrize("options", DDP, ids=str)
@pytest.mark.parametrize(
    "parts",
    [
        {},
        {"layers": LayerConfig(schedule="rotate")},
        {"objective": ObjectiveConfig(direction="up", weight=20.0)},
    ],
    ids=["mean", "rotate", "up"],
)
def test_parameter_alignment_is_that_of_the_mean_gradients(
    ranks: Ranks, options: dict[str, Any], parts: dict[str, Any]
) -> None:
    alignment = AlignmentConfig(parameter_every=1)
    run = Run("ddp", options, GAPTConfig(gate=RESTLESS, **{**parts, "alignment": alignment}), steps=5)
    assert_equal_runs(ranks(train, run), train(replace(run, parallel="none")))


def test_parameter_alignment_over_micro_batches(ranks: Ranks) -> None:
    alignment = AlignmentConfig(parameter_every=1)
    config = GAPTConfig(gate=COMPRESSING, alignment=alignment, objective=ObjectiveConfig(weight=20.0))
    run = Run("ddp", config=config, micro_batches=3, steps=3)
    found = ranks(train, run)
    assert [seen.metrics for seen in found[0]] == [seen.metrics for seen in found[1]]
    for a, b in zip(*found, strict=True):
        assert all(torch.equal(a.gradients[name], b.gradients[name]) for name in a.gradients)
    assert_equal_runs(found, train(replace(run, parallel="none")))


def test_shards_and_copies_of_them(four: Ranks) -> None:
    """HSDP: over four ranks, two shards twice."""
    run = Run("hsdp")
    expected = train(replace(run, parallel="none"))
    for of_rank in four(train, run):
        for here, there in zip(of_rank, expected, strict=True):
            assert distance(here.gradients, there.gradients) < 1e-9
            assert_equal_metrics(here, there, 1e-9)


def train_chunks(steps: int, parts: bool) -> list[Seen]:
    """Context parallel: each rank has a chunk of every sequence, of as many rows as a window has."""
    model = Net().double()
    hook = RepresentationHook(model, "blocks.*")
    optimizer = GAPTOptimizer(SGD(model.parameters(), lr=0.05), hook, GAPTConfig(gate=RESTLESS))
    called = DistributedDataParallel(model) if parts else model
    own = slice(8 * dist.get_rank(), 8 * dist.get_rank() + 8) if parts else slice(16)
    seen = []
    for step in range(steps):
        generator = torch.Generator().manual_seed(step)
        x = torch.randn(4, 16, 6, generator=generator, dtype=torch.float64)[:, own]
        target = torch.randint(4, (4, 16), generator=generator)[:, own]
        loss = cross_entropy(called(x).flatten(0, 1), target.flatten())
        optimizer.backward(loss)
        gradients = {name: full(p.grad) for name, p in model.named_parameters()}
        optimizer.step()
        optimizer.zero_grad()
        seen.append(Seen(optimizer.metrics, gradients, float(loss.detach())))
    return seen


def test_chunks_of_a_sequence(ranks: Ranks) -> None:
    torch.manual_seed(0)
    assert_equal_runs(ranks(train_chunks, 6, True), train_chunks(6, False))
