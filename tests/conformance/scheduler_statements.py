"""What PyTorch's own tests of learning-rate schedulers say, as statements on one scheduler."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch.optim import SGD, AdamW, lr_scheduler
from torch.optim.swa_utils import SWALR

from gapt_optim import GAPTOptimizer, RepresentationHook
from tests.conformance.subjects import MEMORIZING
from tests.loops import Net, assert_same, loss_of, make_net, weights

SCHEDULERS: dict[str, Callable[[Any], Any]] = {
    "LambdaLR": lambda o: lr_scheduler.LambdaLR(o, lr_lambda=_falling),
    "MultiplicativeLR": lambda o: lr_scheduler.MultiplicativeLR(o, lr_lambda=_falling),
    "StepLR": lambda o: lr_scheduler.StepLR(o, step_size=2),
    "MultiStepLR": lambda o: lr_scheduler.MultiStepLR(o, milestones=[2, 4]),
    "ConstantLR": lambda o: lr_scheduler.ConstantLR(o, total_iters=3),
    "LinearLR": lambda o: lr_scheduler.LinearLR(o, total_iters=3),
    "ExponentialLR": lambda o: lr_scheduler.ExponentialLR(o, gamma=0.9),
    "PolynomialLR": lambda o: lr_scheduler.PolynomialLR(o, total_iters=5),
    "CosineAnnealingLR": lambda o: lr_scheduler.CosineAnnealingLR(o, T_max=5),
    "CosineAnnealingWarmRestarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, T_0=2),
    "CyclicLR": lambda o: lr_scheduler.CyclicLR(o, 0.01, 0.1, step_size_up=2, cycle_momentum=_has_momentum(o)),
    "OneCycleLR": lambda o: lr_scheduler.OneCycleLR(o, max_lr=0.1, total_steps=12, cycle_momentum=_has_momentum(o)),
    "ReduceLROnPlateau": lambda o: lr_scheduler.ReduceLROnPlateau(o, patience=0),
    "ChainedScheduler": lambda o: lr_scheduler.ChainedScheduler(
        [lr_scheduler.ConstantLR(o, total_iters=2), lr_scheduler.ExponentialLR(o, gamma=0.9)]
    ),
    "SequentialLR": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.LinearLR(o, total_iters=2), lr_scheduler.StepLR(o, step_size=1)], milestones=[2]
    ),
    "SWALR": lambda o: SWALR(o, swa_lr=0.05, anneal_epochs=3),
}

Build = Callable[[Any], Any]


def _falling(epoch: int) -> float:
    return 0.95**epoch


def _has_momentum(optimizer: Any) -> bool:
    return all("momentum" in group for group in optimizer.param_groups)


class _Run:
    def __init__(self, form: str, build: Build | None, seed: int = 0) -> None:
        self.model: Net = make_net(seed, bias=True)
        head = list(self.model.head.parameters())
        rest = [p for p in self.model.parameters() if not any(p is other for other in head)]
        several = form in ("several", "bare pair")
        groups = [{"params": rest[:2]}, {"params": rest[2:], "lr": 0.02}] if not several else [{"params": rest}]
        last = [] if several else [{"params": head}]
        bases: list[Any] = [SGD(groups + last, lr=0.05, momentum=0.9)]
        bases += [AdamW(head, lr=0.01)] if several else []
        self.optimizers = bases
        if form in ("alone", "several"):
            hook = RepresentationHook(self.model, "layers.*")
            self.optimizers = [GAPTOptimizer(bases if several else bases[0], hook, MEMORIZING)]
        self.schedulers = [] if build is None else [build(o) for o in self.optimizers]

    def step_optimizers(self, i: int) -> float:
        loss = loss_of(self.model, i)
        first = self.optimizers[0]
        (first.objective(loss) if isinstance(first, GAPTOptimizer) else loss).backward()
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad()
        return loss.item()

    def step_schedulers(self, loss: float) -> None:
        for scheduler in self.schedulers:
            scheduler.step(loss) if isinstance(scheduler, lr_scheduler.ReduceLROnPlateau) else scheduler.step()

    def train(self, steps: range) -> list[list[float]]:
        seen = []
        for i in steps:
            self.step_schedulers(self.step_optimizers(i))
            seen.append([float(group["lr"]) for o in self.optimizers for group in o.param_groups])
        return seen


def _bare_of(form: str) -> str:
    return {"alone": "bare", "several": "bare pair"}.get(form, form)


def the_same_learning_rates(build: Build, form: str) -> None:
    """The learning rates and weights of eight steps are those of the bare optimizers."""
    if form == "several" and build in (SCHEDULERS["CyclicLR"], SCHEDULERS["OneCycleLR"]):
        bare = _Run("bare pair", None)
        # A scheduler of both cycles no momentum where only one has it, so neither of the two does here.
        bare.schedulers = [
            lr_scheduler.CyclicLR(o, 0.01, 0.1, step_size_up=2, cycle_momentum=False)
            if build is SCHEDULERS["CyclicLR"]
            else lr_scheduler.OneCycleLR(o, max_lr=0.1, total_steps=12, cycle_momentum=False)
            for o in bare.optimizers
        ]
    else:
        bare = _Run(_bare_of(form), build)
    ours = _Run(form, build)
    assert ours.train(range(8)) == bare.train(range(8))
    assert_same(weights(ours.model), weights(bare.model))


def its_state_goes_on(build: Build, form: str) -> None:
    """Scheduler and optimizer that load what others saved go on as those do."""
    first, second = _Run(form, build), _Run(form, build, seed=1)
    first.train(range(4))
    second.model.load_state_dict(first.model.state_dict())
    for mine, yours in zip(second.optimizers, first.optimizers, strict=True):
        mine.load_state_dict(copy.deepcopy(yours.state_dict()))
    for mine, yours in zip(second.schedulers, first.schedulers, strict=True):
        mine.load_state_dict(copy.deepcopy(yours.state_dict()))
    assert second.train(range(4, 8)) == first.train(range(4, 8))
    assert_same(weights(second.model), weights(first.model))


def the_right_order_is_silent(build: Build, form: str) -> None:
    """The optimizer first, then the scheduler: no warning."""
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        _Run(form, build).train(range(3))
    assert not warned


def the_wrong_order_is_warned_of(build: Build, form: str) -> None:
    """The scheduler before the first step of the optimizer: as much warning as for the bare optimizer."""
    texts = []
    for each in (form, _bare_of(form)):
        with warnings.catch_warnings(record=True) as warned:
            warnings.simplefilter("always")
            run = _Run(each, build)
            run.step_schedulers(1.0)
            run.step_optimizers(0)
            run.step_schedulers(1.0)
        texts.append({str(warning.message)[:60] for warning in warned})
    assert texts[0] == texts[1]


def a_replaced_step_is_noticed(build: Build, form: str) -> None:
    """Where ``step`` of the optimizer is replaced after the scheduler was made, that is said as for the bare one."""
    texts = []
    for each in (form, _bare_of(form)):
        run = _Run(each, build)
        for optimizer in run.optimizers:
            old = type(optimizer).step
            optimizer.step = lambda *args, optimizer=optimizer, old=old: old(optimizer, *args)
        with warnings.catch_warnings(record=True) as warned:
            warnings.simplefilter("always")
            run.step_schedulers(1.0)
        texts.append({str(warning.message)[:60] for warning in warned})
    assert texts[0] == texts[1]


def initial_rates_are_in_the_groups(build: Build, form: str) -> None:
    """The scheduler finds, and leaves, in the groups what it does on a bare optimizer."""
    ours, bare = _Run(form, build), _Run(_bare_of(form), build)
    keys = [
        [sorted(g.keys() - {"params", "gapt"}) for o in run.optimizers for g in o.param_groups] for run in (ours, bare)
    ]
    if not (form == "several" and build in (SCHEDULERS["CyclicLR"], SCHEDULERS["OneCycleLR"])):
        assert keys[0] == keys[1]
    groups = [group for run in (ours, bare) for o in run.optimizers for group in o.param_groups]
    assert len({"initial_lr" in group for group in groups}) == 1


def rates_of_tensors_stay_tensors(build: Build, form: str) -> None:
    """A learning rate that is a tensor stays the same tensor where PyTorch keeps it."""
    found = []
    for each in (form, _bare_of(form)):
        run = _Run(each, None)
        tensors = []
        for optimizer in run.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = torch.tensor(float(group["lr"]))
                tensors.append(group["lr"])
        run.schedulers = [build(optimizer) for optimizer in run.optimizers]
        run.train(range(2))
        groups = [group for optimizer in run.optimizers for group in optimizer.param_groups]
        found.append([(group["lr"] is t, float(group["lr"])) for group, t in zip(groups, tensors, strict=True)])
    assert found[0] == found[1]


STATEMENTS: dict[str, Callable[[Build, str], None]] = {
    statement.__name__.replace("_", " "): statement
    for statement in (
        the_same_learning_rates,
        its_state_goes_on,
        the_right_order_is_silent,
        the_wrong_order_is_warned_of,
        a_replaced_step_is_noticed,
        initial_rates_are_in_the_groups,
        rates_of_tensors_stay_tensors,
    )
}


def outcome(statement: Callable[[Build, str], None], name: str, form: str) -> str:
    """ "passed", or what was raised."""
    try:
        statement(SCHEDULERS[name], form)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "passed"
