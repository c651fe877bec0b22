"""What else ranks agree on: how often they talk, what is not finite, checkpoints, and what is refused."""

from __future__ import annotations

import copy
import math
import tempfile
import warnings
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
    GateConfig,
    LayerConfig,
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


def numbers_per_step(depth: int) -> int:
    """The loss, what compression adds, micro-batches; of each layer an entropy, four measures and their weights,
    whether it ran, and three sums for its angle; held-out losses and how many there are.
    """
    return 3 + 2 * depth + 8 * depth + depth + 2 + 3 * depth


COMPARED = [(8, 64)]
"""The digest of what ranks were given, before the first step."""


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
@pytest.mark.parametrize("activation", [False, True])
@pytest.mark.parametrize(
    ("depth", "micro_batches", "dtype"),
    [(6, 1, torch.float32), (3, 4, torch.float64), (3, 2, torch.bfloat16)],
    ids=str,
)
def test_one_collective_per_step(
    ranks: Ranks, parallel: str, activation: bool, depth: int, micro_batches: int, dtype: torch.dtype
) -> None:
    """However many micro-batches the step has."""
    config = GAPTConfig(gate=RESTLESS, alignment=AlignmentConfig(every=int(activation)))
    build = partial(Net, depth=depth)
    run = Run(parallel, config=config, micro_batches=micro_batches, steps=3, build=build, dtype=dtype)
    numbers = numbers_per_step(depth)
    step = [(numbers, 8 * numbers)]
    assert ranks(collectives, run) == [[COMPARED + step, step, step]] * 2


@pytest.mark.parametrize("micro_batches", [1, 2])
@pytest.mark.parametrize("reduce", ["mean", "largest_drop"])
def test_collectives_of_a_measured_step(ranks: Ranks, reduce: str, micro_batches: int) -> None:
    """One more, for all gradients of the entropy and for which parameters there are, however many micro-batches.

    Where the entropy's part of the gradient is not the weight times that, the loss's own gradients go along.
    """
    config = GAPTConfig(
        gate=COMPRESSING,
        alignment=AlignmentConfig(every=0, parameter_every=2),
        layers=LayerConfig(reduce=reduce),
    )
    parameters = list(Net().parameters())
    size = sum(p.numel() for p in parameters) * (1 if reduce == "mean" else 2) + 3 * len(parameters)
    numbers = numbers_per_step(LAYERS)
    plain = [(numbers, 8 * numbers)]
    measured = [(size, 8 * size), *plain]
    for found in ranks(collectives, Run("ddp", config=config, steps=3, micro_batches=micro_batches)):
        assert found == [COMPARED + measured, measured, plain]  # before the first one


def made_before_ranks_meet() -> list[str]:
    with mock.patch("torch.distributed.is_initialized", return_value=False):
        called, model, optimizer = made(Run("none"))
    with counted_collectives() as sizes:
        seen = [train_step(Run(), step, called, model, optimizer) for step in range(2)]
    assert len(sizes) == 3  # one per step, and one before the first
    return [repr((each.metrics.loss, each.metrics.layer_entropy)) for each in seen]


class TwoLists(nn.Module):
    """Only a forward pass tells which list has the blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = (nn.ModuleList(nn.Linear(8, 8) for _ in range(2)) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        for layer in (*self.first, *self.last):
            x = layer(x)
        return x


def without_layers() -> list[str]:
    model = TwoLists()
    hook = RepresentationHook(model)
    config = GAPTConfig(gate=GateConfig(frozen=True))
    optimizer = GAPTOptimizer(torch.optim.SGD(model.parameters()), hook, config)
    with pytest.warns(UserWarning, match="waits for a forward pass"):
        optimizer.backward(model.forward(torch.randn(16, 8)).mean())
    optimizer.step()
    assert optimizer.metrics is not None
    return [repr((hook.names, optimizer.metrics.entropy, optimizer.metrics.layer_entropy))]


def test_ranks_whose_layers_no_forward_pass_chose(ranks: Ranks) -> None:
    """The model was called past its hooks."""
    assert ranks(without_layers) == [["([], None, {})"]] * 2


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


def trained_aloud(run: Run) -> tuple[list[Seen], list[str]]:
    """Steps, and what was said."""
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        seen = train(run)
    return seen, [str(each.message) for each in said if "loss does not use" in str(each.message)]


SEARCHING = pytest.mark.parametrize("option", ["find_unused_parameters", "static_graph"])
FOUND = {"find_unused_parameters": True}


@pytest.mark.parametrize("phase", ["memorization", "compression"])
def test_a_branch_that_the_loss_does_not_use_is_told_and_left_alone(ranks: Ranks, phase: str) -> None:
    run = branching(phase, FOUND, False)
    expected, _ = trained_aloud(replace(run, parallel="none"))
    assert {seen.metrics.phase for seen in expected} == {"memorization", "compression"}
    found = ranks(trained_aloud, run)
    assert_equal_runs([seen for seen, _ in found], expected)
    for _, said in found:
        assert len(said) == 1
        assert 'the loss does not use the output of layer "blocks.2"' in said[0]


@SEARCHING
@pytest.mark.parametrize("phase", ["memorization", "compression"])
def test_a_branch_made_part_of_the_loss(ranks: Ranks, phase: str, option: str) -> None:
    run = branching(phase, {option: True}, True)
    expected = train(replace(run, parallel="none"))
    assert {seen.metrics.phase for seen in expected} == {"memorization", "compression"}
    assert_equal_runs(ranks(train, run), expected)


class Returning(Branching):
    """Returns the branch beside its output, and something that is no tensor."""

    def forward(self, x: Tensor) -> Any:
        h = self.blocks[1](self.blocks[0](x))
        return None, self.blocks[2](h), self.head(h).log_softmax(-1)


def return_branch(run: Run) -> list[dict[str, Tensor]]:
    called, model, optimizer = made(replace(run, build=partial(Returning, joined=False)))
    output = lambda x: called(x)[2]  # noqa: E731
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "the loss does not use the output", UserWarning)
        return [train_step(run, step, output, model, optimizer).gradients for step in range(run.steps)]


@pytest.mark.parametrize("phase", ["memorization", "compression"])
def test_a_branch_that_the_model_returns_and_the_loss_does_not_use(ranks: Ranks, phase: str) -> None:
    """Nothing presses it: its parameters get what they get without us, nothing or zeros."""
    run = branching(phase, FOUND, False)
    expected = return_branch(replace(run, parallel="none"))
    for of_rank in ranks(return_branch, run):
        for here, there in zip(of_rank, expected, strict=True):
            extra = {name: torch.zeros_like(here[name]) for name in here.keys() - there.keys()}
            assert all(name.startswith("blocks.2") for name in extra)
            assert distance(here, there | extra) < 1e-9


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


FLAT = StateDictOptions(flatten_optimizer_state_dict=True)


def save_flat(folder: str, run: Run, until: int) -> list[Seen]:
    """As torchtitan saves: one flat mapping of tensors and numbers."""
    called, model, optimizer = made(run)
    for step in range(until):
        train_step(run, step, called, model, optimizer)
    state = {"model": get_model_state_dict(model), **get_optimizer_state_dict(model, optimizer, options=FLAT)}
    dcp.save(state, checkpoint_id=folder)
    return [train_step(run, step, called, model, optimizer) for step in range(until, run.steps)]


def load_flat(folder: str, run: Run, start: int) -> list[Seen]:
    called, model, optimizer = made(replace(run, build=Other))
    of_optimizer = get_optimizer_state_dict(model, optimizer, options=FLAT)
    state = {"model": get_model_state_dict(model), **of_optimizer}
    dcp.load(state, checkpoint_id=folder)
    set_model_state_dict(model, state.pop("model"))
    set_optimizer_state_dict(model, optimizer, state, options=FLAT)
    return [train_step(run, step, called, model, optimizer) for step in range(start, run.steps)]


def test_a_flat_checkpoint_of_four_ranks_goes_on_over_two(four: Ranks, ranks: Ranks) -> None:
    run = Run("fsdp", steps=8, base=ADAMW)
    with tempfile.TemporaryDirectory() as folder:
        expected = four(save_flat, folder, run, 3)[0]
        found = ranks(load_flat, folder, run, 3)
    assert {seen.metrics.phase for seen in expected} == {"memorization", "compression"}
    for of_rank in found:
        for here, there in zip(of_rank, expected, strict=True):
            assert distance(here.gradients, there.gradients) < 1e-7
            assert_equal_metrics(here, there, 1e-7)


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
        assert "Set AlignmentConfig.parameter_every=0; angles at layers work" in message


def compare_sharded() -> str:
    model = Net()
    fully_shard(model.blocks[0], mesh=init_device_mesh("cpu", (2,)), reshard_after_forward=True)
    loss = model(torch.randn(2, 5, 6)).square().mean()
    return refused(lambda: gradient_alignment(loss, loss, model.parameters()), RuntimeError)


def test_gradients_of_a_sharded_model_are_refused(ranks: Ranks) -> None:
    for message in ranks(compare_sharded):
        assert 'parameter "0" is sharded (DTensor)' in message


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
