"""What else ranks agree on: how often they talk, what is not finite, checkpoints, and what is refused."""

from __future__ import annotations

import copy
import math
import tempfile
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

from gapt_optim import (
    AlignmentConfig,
    GAPTConfig,
    GAPTOptimizer,
    ObjectiveConfig,
    RepresentationHook,
    gradient_alignment,
)
from tests.distributed.ranks import Ranks
from tests.distributed.runs import (
    ADAMW,
    COMPRESSING,
    RESTLESS,
    SGD,
    Net,
    Run,
    Seen,
    full,
    made,
    train,
    train_step,
    weights,
)
from tests.distributed.test_training_over_ranks import assert_equal_metrics, assert_equal_runs
from tests.loops import assert_same
from tests.training import distance

LAYERS = 3


# Collectives


@contextmanager
def counted_collectives() -> Iterator[list[tuple[int, int]]]:
    """Numbers and bytes of each collective of ours."""
    sizes: list[tuple[int, int]] = []
    real = dist.all_reduce

    def counting(tensor: Tensor, *args: Any, **options: Any) -> Any:
        sizes.append((tensor.numel(), tensor.nbytes))
        return real(tensor, *args, **options)

    with mock.patch("gapt_optim.ranks.dist.all_reduce", counting):
        yield sizes


def collectives(run: Run) -> list[list[tuple[int, int]]]:
    called, model, optimizer = made(run)
    found = []
    for step in range(run.steps):
        with counted_collectives() as sizes:
            train_step(run, step, called, model, optimizer)
        found.append(sizes)
    return found


def numbers_per_step(depth: int, activation: bool) -> int:
    """Loss and penalty; an entropy and four measures per layer; the held-out loss; whether each of loss, layers and
    held-out loss was there; three sums per layer.
    """
    return 2 + 5 * depth + 1 + (1 + depth + 1) + 3 * depth * activation


COMPARED = [(8, 64)]
"""The digest of what ranks were given, before the first step."""


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
@pytest.mark.parametrize("activation", [False, True])
@pytest.mark.parametrize(
    ("depth", "micro_batches", "dtype", "size"),
    [(6, 1, torch.float32, 4), (3, 4, torch.float64, 8), (3, 2, torch.bfloat16, 4)],
    ids=str,
)
def test_one_collective_per_step(
    ranks: Ranks, parallel: str, activation: bool, depth: int, micro_batches: int, dtype: torch.dtype, size: int
) -> None:
    """However many micro-batches the step has."""
    config = GAPTConfig(gate=RESTLESS, alignment=AlignmentConfig(every=int(activation)))
    build = partial(Net, depth=depth)
    run = Run(parallel, config=config, micro_batches=micro_batches, steps=3, build=build, dtype=dtype)
    numbers = numbers_per_step(depth, activation)
    step = [(numbers, size * numbers)]
    assert ranks(collectives, run) == [[COMPARED + step, step, step]] * 2


@pytest.mark.parametrize("micro_batches", [1, 2])
@pytest.mark.parametrize("combine", ["sum", "project"])
def test_collectives_of_a_measured_step(ranks: Ranks, combine: str, micro_batches: int) -> None:
    """Per micro-batch, one for which parameters there are and one for each parameter's entropy gradient.

    Where the entropy's part of the gradient is not the weight times that, the loss's own gradients are averaged too.
    """
    config = GAPTConfig(
        gate=COMPRESSING,
        alignment=AlignmentConfig(every=0, parameter_every=2),
        objective=ObjectiveConfig(combine=combine),
    )
    parameters = dict(Net().named_parameters())
    flags = [(3 * len(parameters), 4 * 3 * len(parameters))]
    reached = [(p.numel(), 8 * p.numel()) for name, p in parameters.items() if name.startswith("blocks")]
    behind_loss = [] if combine == "sum" else [(p.numel(), 8 * p.numel()) for p in parameters.values()]
    numbers = numbers_per_step(LAYERS, False)
    plain = [(numbers, 8 * numbers)]
    measured = micro_batches * (flags + reached + behind_loss) + plain
    for found in ranks(collectives, Run("ddp", config=config, steps=3, micro_batches=micro_batches)):
        assert found == [COMPARED + measured, plain, measured]


def made_before_ranks_meet() -> list[str]:
    with mock.patch("torch.distributed.is_initialized", return_value=False):
        called, model, optimizer = made(Run("none"))
    with counted_collectives() as sizes:
        seen = [train_step(Run(), step, called, model, optimizer) for step in range(2)]
    assert len(sizes) == 3  # one per step, and one before the first
    return [repr((each.metrics.loss, each.metrics.layer_entropy)) for each in seen]


def test_an_optimizer_that_is_made_before_ranks_meet(ranks: Ranks) -> None:
    first, second = ranks(made_before_ranks_meet)
    assert first == second


# Steps that are not whole


class Failing(Net):
    """Not finite in steps 1 to 3, on the first rank alone: the loss, an entropy, or both."""

    what = ""
    calls = 0

    def forward(self, x: Tensor) -> Tensor:
        Failing.calls += 1
        failing = Failing.calls in (2, 3, 4) and dist.get_rank() == 0
        h = self.blocks[1](self.blocks[0](x))
        last = self.blocks[2](h * (1e200 if failing and self.what != "loss" else 1.0))
        out = (self.head(h) + last[..., :4].clamp(-1, 1)).log_softmax(-1)
        return out * math.nan if failing and self.what != "entropy" else out


def fail(what: str, run: Run) -> list[Seen]:
    Failing.what, Failing.calls = what, 0
    return train(replace(run, build=Failing))


@pytest.mark.parametrize("what", ["loss", "entropy", "both"])
def test_what_is_not_finite_on_one_rank_is_judged_on_none(ranks: Ranks, what: str) -> None:
    config = GAPTConfig(gate=Run().config.gate.model_copy(update={"initial_phase": "compression"}))
    found = ranks(fail, what, Run("ddp", config=config, steps=6, lr=0.0))
    assert [repr(seen.metrics) for seen in found[0]] == [repr(seen.metrics) for seen in found[1]]
    metrics = [seen.metrics for seen in found[0]]
    if what == "entropy":  # the weights know of nothing
        assert [m.nonfinite_steps for m in metrics] == [0, 1, 2, 3, 3, 3]
        assert len({m.phase for m in metrics[:5]}) == 1
        assert all(math.isfinite(m.loss) for m in metrics)
        assert all(g.isfinite().all() for of_rank in found for seen in of_rank for g in seen.gradients.values())
    else:  # as without us, they follow the loss
        assert [m.nonfinite_steps for m in metrics] == [0, 1, 2, 3, 4, 5]
        assert len({m.phase for m in metrics}) == 1


class Resting(Net):
    """The first block rests on the second rank from the second step on."""

    calls = 0

    def forward(self, x: Tensor) -> Tensor:
        Resting.calls += 1
        for block in list(self.blocks)[int(Resting.calls > 1 and dist.get_rank() == 1) :]:
            x = block(x)
        return self.head(x).log_softmax(-1)


def rest(run: Run) -> list[Seen]:
    Resting.calls = 0
    return train(replace(run, build=Resting))


def test_a_layer_that_rests_on_one_rank(ranks: Ranks) -> None:
    config = GAPTConfig(gate=COMPRESSING, alignment=AlignmentConfig(parameter_every=1))
    found = ranks(rest, Run("ddp", {"find_unused_parameters": True}, config, steps=3))
    assert [seen.metrics for seen in found[0]] == [seen.metrics for seen in found[1]]
    for seen in found[0]:
        assert all(math.isfinite(entropy) and entropy > 0 for entropy in seen.metrics.layer_entropy.values())
        assert len(seen.metrics.layer_entropy) == LAYERS
        assert seen.metrics.parameter_alignment is not None
        assert seen.metrics.parameter_alignment.shared == 2 * LAYERS


class Branching(Net):
    """The last block is a branch that the loss does not use, unless it is ``joined`` as the error advises."""

    def __init__(self, joined: bool) -> None:
        super().__init__()
        self.joined = joined

    def forward(self, x: Tensor) -> Tensor:
        h = self.blocks[1](self.blocks[0](x))
        branch = self.blocks[2](h)
        out = self.head(h).log_softmax(-1)
        return out + 0 * branch.sum() if self.joined else out


def branching(phase: str, options: dict[str, Any], joined: bool) -> Run:
    gate = RESTLESS.model_copy(update={"initial_phase": phase})
    return Run("ddp", options, GAPTConfig(gate=gate), build=partial(Branching, joined=joined))


def branch_off(run: Run) -> str:
    called, model, optimizer = made(run)
    return refused(lambda: train_step(run, 0, called, model, optimizer), RuntimeError)


SEARCHING = pytest.mark.parametrize("option", ["find_unused_parameters", "static_graph"])


@SEARCHING
@pytest.mark.parametrize("activation", [False, True])
@pytest.mark.parametrize("phase", ["memorization", "compression"])
def test_a_branch_that_the_loss_does_not_use_is_refused_under_ddp(
    ranks: Ranks, phase: str, activation: bool, option: str
) -> None:
    """At the first step of any phase, before ranks could drift apart in compression."""
    run = branching(phase, {option: True}, False)
    run = replace(run, config=run.config.model_copy(update={"alignment": AlignmentConfig(every=int(activation))}))
    for message in ranks(branch_off, run):
        assert 'does not depend on the output of tapped module "blocks.2"' in message
        assert "adding 0 * output.sum() to what the model returns" in message


@SEARCHING
@pytest.mark.parametrize("phase", ["memorization", "compression"])
def test_a_branch_made_part_of_the_loss_as_advised(ranks: Ranks, phase: str, option: str) -> None:
    run = branching(phase, {option: True}, True)
    expected = train(replace(run, parallel="none"))
    assert {seen.metrics.phase for seen in expected} == {"memorization", "compression"}
    assert_equal_runs(ranks(train, run), expected)


@pytest.mark.parametrize("phase", ["memorization", "compression"])
def test_a_branch_where_ddp_looks_for_no_unused_parameters(ranks: Ranks, phase: str) -> None:
    run = branching(phase, {}, False)
    expected = train(replace(run, parallel="none"))
    for of_rank in ranks(train, run):
        for here, there in zip(of_rank, expected, strict=True):
            nothing = {name: torch.zeros_like(g) for name, g in here.gradients.items() if name not in there.gradients}
            assert distance(here.gradients, there.gradients | nothing) < 1e-9


class Returning(Branching):
    """Returns the branch beside its output, and something that is no tensor."""

    def forward(self, x: Tensor) -> Any:
        h = self.blocks[1](self.blocks[0](x))
        return None, self.blocks[2](h), self.head(h).log_softmax(-1)


def return_branch(run: Run) -> list[dict[str, Tensor]] | str:
    called, model, optimizer = made(replace(run, build=partial(Returning, joined=False)))

    def go() -> list[dict[str, Tensor]]:
        output = lambda x: called(x)[2]  # noqa: E731
        return [train_step(run, step, output, model, optimizer).gradients for step in range(run.steps)]

    return refused(go, RuntimeError) if run.options.get("static_graph") else go()


@SEARCHING
@pytest.mark.parametrize("phase", ["memorization", "compression"])
def test_a_branch_that_the_model_returns_and_the_loss_does_not_use(ranks: Ranks, phase: str, option: str) -> None:
    """DDP sees what is returned where it looks at every step; a static graph has no gradient for it to see."""
    run = branching(phase, {option: True}, False)
    found = ranks(return_branch, run)
    if option == "static_graph":
        assert all('does not depend on the output of tapped module "blocks.2"' in message for message in found)
        return
    expected = [seen.gradients for seen in train(replace(run, parallel="none"))]
    assert any("blocks.2.linear.weight" in gradients for gradients in expected)
    for of_rank in found:
        for here, there in zip(of_rank, expected, strict=True):
            assert distance(here, there) < 1e-9


# The order in which things are put around a model


def hooked_first(options: dict[str, Any]) -> list[Seen]:
    """The taps are placed before the model is sharded."""
    run = Run("fsdp")
    torch.manual_seed(0)
    model = Net().double()
    hook = RepresentationHook(model, "blocks.*")
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    with mock.patch("warnings.warn"):  # a tapped output is a view of the module's own
        for block in model.blocks:
            fully_shard(block, mesh=mesh, **options)
        fully_shard(model, mesh=mesh, **options)
        optimizer = GAPTOptimizer(torch.optim.SGD(model.parameters(), lr=run.lr, momentum=0.9), hook, run.config)
        return [train_step(run, step, model, model, optimizer) for step in range(run.steps)]


@pytest.mark.parametrize("reshard", [True, False])
def test_taps_placed_before_sharding(ranks: Ranks, reshard: bool) -> None:
    assert_equal_runs(ranks(hooked_first, {"reshard_after_forward": reshard}), train(Run()))


# Checkpoints


@dataclass
class Continued:
    """A run from its checkpoint on."""

    start: dict[str, Any]
    """Weights, optimizer state and gate at the checkpoint, whole."""
    steps: list[Seen]
    final: dict[str, Tensor]


def go_on(run: Run, start: int, called: nn.Module, model: nn.Module, optimizer: GAPTOptimizer) -> Continued:
    whole = get_optimizer_state_dict(model, optimizer, options=StateDictOptions(full_state_dict=True))
    state = {"model": weights(model), "optimizer": copy.deepcopy(whole)}
    steps = [train_step(run, step, called, model, optimizer) for step in range(start, run.steps)]
    return Continued(state, steps, weights(model))


def save_and_go_on(folder: str, run: Run, until: int) -> Continued:
    called, model, optimizer = made(run)
    for step in range(until):
        train_step(run, step, called, model, optimizer)
    state = {"model": get_model_state_dict(model), "optimizer": get_optimizer_state_dict(model, optimizer)}
    dcp.save(state, checkpoint_id=folder)
    return go_on(run, until, called, model, optimizer)


def load_and_go_on(folder: str, run: Run, start: int) -> Continued:
    torch.manual_seed(5)
    called, model, optimizer = made(replace(run, build=Other))
    state = {"model": get_model_state_dict(model), "optimizer": get_optimizer_state_dict(model, optimizer)}
    dcp.load(state, checkpoint_id=folder, no_dist=not dist.is_initialized())
    set_model_state_dict(model, state["model"])
    set_optimizer_state_dict(model, optimizer, state["optimizer"], options=StateDictOptions(strict=True))
    return go_on(run, start, called, model, optimizer)


class Other(Net):
    """Starts from other weights."""

    def __init__(self) -> None:
        super().__init__()
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.add_(1.0)


@pytest.mark.parametrize("until", [1, 3, 4])
@pytest.mark.parametrize("base", [SGD, ADAMW], ids=["sgd", "adamw"])
def test_a_sharded_checkpoint_goes_on_where_it_was(ranks: Ranks, base: Any, until: int) -> None:
    """On the same ranks bit for bit, gate and counters included."""
    run = Run("fsdp", steps=8, base=base)
    with tempfile.TemporaryDirectory() as folder:
        never_stopped = ranks(save_and_go_on, folder, run, until)
        resumed = ranks(load_and_go_on, folder, run, until)
    for expected, found in zip(never_stopped, resumed, strict=True):
        assert_same(found.start, expected.start)
        assert_same(found.final, expected.final)
        assert [seen.metrics for seen in found.steps] == [seen.metrics for seen in expected.steps]


@pytest.mark.filterwarnings("ignore:torch.distributed is (disabled, )?unavailable or uninitialized:UserWarning")
def test_a_sharded_checkpoint_goes_on_at_another_world_size(ranks: Ranks) -> None:
    """Saved on two ranks; on four, on one and on none the state is the same bit for bit, and the run the same.

    Of four, one rank has no row of the blocks' matrices.
    """
    runs = [(Run("fsdp", steps=8, base=base), until) for base, until in ((SGD, 4), (ADAMW, 1))]
    with tempfile.TemporaryDirectory() as folder, closing(Ranks(4)) as four, closing(Ranks(1)) as one:
        for i, (run, until) in enumerate(runs):
            where = f"{folder}/{i}"
            expected = ranks(save_and_go_on, where, run, until)[0]
            assert {seen.metrics.phase for seen in expected.steps} == {"memorization", "compression"}
            alone = load_and_go_on(where, replace(run, parallel="none"), until)
            for found in [*four(load_and_go_on, where, run, until), *one(load_and_go_on, where, run, until), alone]:
                assert_same(found.start, expected.start)
                for here, there in zip(found.steps, expected.steps, strict=True):
                    assert_equal_metrics(here, there, 1e-7)
                    assert distance(here.gradients, there.gradients) < 1e-7
                assert distance(found.final, expected.final) < 1e-9


# Refusals


def refused(make: Callable[[], Any], error: type[Exception]) -> str:
    try:
        make()
    except error as found:
        return str(found)
    return "not refused"


def measure_sharded(kind: str) -> str:
    torch.manual_seed(0)
    model: nn.Module = Net()
    if kind == "fully_shard":
        fully_shard(model, mesh=init_device_mesh("cpu", (2,)))
    else:
        model = FullyShardedDataParallel(model, device_id=torch.device("cpu"), use_orig_params=kind == "originals")
    hook = RepresentationHook(model)
    config = GAPTConfig(alignment=AlignmentConfig(parameter_every=5))
    return refused(lambda: GAPTOptimizer(torch.optim.SGD(model.parameters(), 0.1), hook, config), RuntimeError)


@pytest.mark.parametrize("kind", ["fully_shard", "flat", "originals"])
def test_parameter_alignment_of_a_sharded_model_is_refused(ranks: Ranks, kind: str) -> None:
    for message in ranks(measure_sharded, kind):
        assert "is sharded" in message
        assert "Set AlignmentConfig.parameter_every=0; activation alignment works" in message


def compare_sharded() -> str:
    model = Net()
    fully_shard(model.blocks[0], mesh=init_device_mesh("cpu", (2,)), reshard_after_forward=True)
    loss = model(torch.randn(2, 5, 6)).square().mean()
    return refused(lambda: gradient_alignment(loss, loss, model.parameters()), RuntimeError)


def test_gradients_of_a_sharded_model_are_refused(ranks: Ranks) -> None:
    for message in ranks(compare_sharded):
        assert 'parameter "0" is sharded (DTensor)' in message


def stream() -> str:
    model = Net()
    config = GAPTConfig(alignment=AlignmentConfig(parameter_every=1, parameter_streaming=True))
    hook = RepresentationHook(model)
    return refused(lambda: GAPTOptimizer(torch.optim.SGD(model.parameters(), 0.1), hook, config), RuntimeError)


def test_streaming_over_ranks_is_refused(ranks: Ranks) -> None:
    assert all("use parameter_streaming=False" in message for message in ranks(stream))


def tap_a_dtensor(measuring: bool) -> str:
    model = nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 2))
    parallelize_module(model, init_device_mesh("cpu", (2,)), {"0": ColwiseParallel(use_local_output=False)})
    hook = RepresentationHook(model, "0")
    optimizer = GAPTOptimizer(torch.optim.SGD(model.parameters(), 0.1), hook)

    def run() -> None:
        if measuring:
            with hook.measuring():
                model(torch.randn(4, 6))
        model(torch.randn(4, 6))

    message = refused(run, TypeError)
    del optimizer  # the taps work as long as it lives
    return message


@pytest.mark.parametrize("measuring", [False, True])
def test_a_tensor_parallel_output_is_refused(ranks: Ranks, measuring: bool) -> None:
    for message in ranks(tap_a_dtensor, measuring):
        assert 'module "0" returned a DTensor' in message
        assert "Tap a module whose output is a plain tensor" in message


def tap_local_output() -> tuple[float, float]:
    """A module that gathers its output is tapped as any other; parameters are sharded all the same."""
    torch.manual_seed(0)
    model = nn.ModuleDict({"up": nn.Linear(6, 8), "down": nn.Linear(8, 6), "head": nn.Linear(6, 2)})
    plain = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    from torch.distributed.tensor.parallel import RowwiseParallel

    parallelize_module(model, init_device_mesh("cpu", (2,)), {"up": ColwiseParallel(), "down": RowwiseParallel()})
    model.forward = lambda x: model["head"](model["down"](model["up"](x)))
    hook = RepresentationHook(model, "down")
    optimizer = GAPTOptimizer(torch.optim.SGD(model.parameters(), 0.0), hook, GAPTConfig(gate=COMPRESSING))
    x = torch.randn(8, 6)
    optimizer.backward(model(x).square().mean())
    found = full(model["up"].weight.grad)
    twin = nn.ModuleDict({"up": nn.Linear(6, 8), "down": nn.Linear(8, 6), "head": nn.Linear(6, 2)})
    twin.load_state_dict(plain)
    from gapt_optim import matrix_entropy

    h = twin["down"](twin["up"](x))
    (twin["head"](h).square().mean() + optimizer.config.objective.weight * matrix_entropy(h)).backward()
    expected = twin["up"].weight.grad
    return float((found - expected).norm() / expected.norm()), float(expected.norm())


def test_tensor_parallel_modules_with_plain_outputs(ranks: Ranks) -> None:
    for error, size in ranks(tap_local_output):
        assert error < 1e-5
        assert size > 0.01
