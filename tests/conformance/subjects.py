"""One optimizer of PyTorch's own test database, bare, in the wrapper alone, and in it as one of several."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.optim import AdamW
from torch.testing._internal.common_optimizers import OptimizerInfo, optim_db

from gapt_optim import GAPTConfig, GAPTOptimizer, GateConfig, RepresentationHook
from tests.loops import Net, loss_of, make_net, weights

MEMORIZING = GAPTConfig(gate=GateConfig(frozen=True))

BARE_OF = {"alone": "bare", "several": "bare pair"}
"""What a wrapped form is compared with."""


@dataclass(frozen=True)
class Case:
    """An optimizer and one of its input sets."""

    info: OptimizerInfo
    kwargs: dict[str, Any]

    @property
    def name(self) -> str:
        return str(self.info.name)

    def net(self, seed: int = 0) -> Net:
        return make_net(seed, bias=self.name != "Muon", sparse=self.info.only_supports_sparse_grads)

    def own(self, model: Net, several: bool) -> dict[str, Tensor]:
        """Parameters of the optimizer under test; those that are left are AdamW's, or nobody's."""
        named = dict(model.named_parameters())
        if self.name == "Muon":
            return {name: p for name, p in named.items() if name.startswith("layers")}
        if self.info.only_supports_sparse_grads:
            return {name: p for name, p in named.items() if name.startswith("embedding")}
        return {name: p for name, p in named.items() if not (several and name.startswith("embedding"))}


def cases() -> dict[str, list[Case]]:
    """Every input set, by optimizer."""
    return {
        str(info.name): [Case(info, each.kwargs) for each in info.optim_inputs_func(device="cpu")] for info in optim_db
    }


@dataclass
class Subject:
    """A model and what trains it."""

    case: Case
    form: str  # "bare", "bare pair", "alone", "several"
    model: Net
    optimizers: list[Any]
    extra: list[Tensor] = field(default_factory=list)  # parameters beside the model's

    @property
    def optimizer(self) -> Any:
        return self.optimizers[0]

    @property
    def under_test(self) -> Any:
        """The bare optimizer itself."""
        optimizer = self.optimizer
        if isinstance(optimizer, GAPTOptimizer):
            return optimizer.base[0] if isinstance(optimizer.base, tuple) else optimizer.base
        return optimizer

    def loss(self, i: int) -> Tensor:
        loss = loss_of(self.model, i)
        return loss + sum((p.abs().square().sum() for p in self.extra), torch.zeros(()))

    def objective(self, i: int) -> tuple[Tensor, Tensor]:
        """The loss, and what to differentiate for it."""
        loss = self.loss(i)
        return loss, self.optimizer.objective(loss) if isinstance(self.optimizer, GAPTOptimizer) else loss

    def zero_grad(self, set_to_none: bool = True) -> None:
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none)

    def evaluate(self, i: int) -> Tensor:
        self.zero_grad()
        loss, total = self.objective(i)
        total.backward()
        return loss

    def step(self, i: int, *, closure: bool = False) -> Any:
        if self.case.info.step_requires_closure or (closure and len(self.optimizers) == 1):
            return self.optimizer.step(lambda: self.evaluate(i))
        loss = self.evaluate(i)
        for optimizer in self.optimizers:
            optimizer.step()
        return loss if closure else None

    def train(self, steps: Iterable[int]) -> Subject:
        for i in steps:
            self.step(i)
        return self

    def weights(self) -> dict[str, Any]:
        return weights(self.model) | {f"extra {i}": p.detach().clone() for i, p in enumerate(self.extra)}

    def saved(self) -> list[Any]:
        return copy.deepcopy([optimizer.state_dict() for optimizer in self.optimizers])

    def load(self, states: list[Any]) -> None:
        for optimizer, state in zip(self.optimizers, states, strict=True):
            optimizer.load_state_dict(state)


def made(
    case: Case,
    form: str,
    seed: int = 0,
    *,
    named: bool = False,
    split: bool = False,
    extra: tuple[Tensor, ...] = (),
    **changes: Any,
) -> Subject:
    """Fresh and untrained.

    Args:
        named: give the optimizer names with its parameters.
        split: in two parameter groups, the second with a learning rate of its own.
        extra: more parameters of the optimizer under test.
        changes: to the input set.
    """
    model = case.net(seed)
    several = form in ("several", "bare pair")
    own = case.own(model, several)
    kwargs = copy.deepcopy(case.kwargs) | changes
    leaves = [p.detach().clone().requires_grad_() for p in extra]
    parameters: Any = [*own.items()] if named else [*own.values(), *leaves]
    if split:
        half = max(1, len(parameters) // 2)
        parameters = [{"params": parameters[:half]}, {"params": parameters[half:], "lr": 0.003}]
        parameters = [group for group in parameters if group["params"]]
    optimizers: list[Any] = [case.info.optim_cls(parameters, **kwargs)]
    if several:
        optimizers.append(AdamW([p for name, p in model.named_parameters() if name not in own], lr=0.01))
    if form in BARE_OF:
        hook = RepresentationHook(model, "layers.*")
        optimizers = [GAPTOptimizer(optimizers if several else optimizers[0], hook, MEMORIZING)]
    return Subject(case, form, model, optimizers, leaves)
