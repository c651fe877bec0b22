"""Every optimizer of torch.optim, torchao.optim, schedulefree and pytorch_optimizer: how it is built and stepped."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import partial
from types import ModuleType
from typing import Any

import pytorch_optimizer
import schedulefree
import torch
import torchao.optim
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

from gapt_optim import GAPTOptimizer
from tests.loops import Net, batch, loss_of, make_net

LIBRARIES: dict[str, ModuleType] = {
    "torch.optim": torch.optim,
    "torchao.optim": torchao.optim,
    "schedulefree": schedulefree,
    "pytorch_optimizer": pytorch_optimizer,
}

NOT_STEPPED = {
    "torchao.optim.CPUOffloadOptimizer": "needs a GPU",
    "pytorch_optimizer.SafeFP16Optimizer": "has no param_groups, which every scheduler needs",
    "pytorch_optimizer.DeMo": "needs einops and ranks",
    "pytorch_optimizer.DistributedMuon": "needs ranks",
    "pytorch_optimizer.LOMO": "steps in a backward pass of its own, its step() does nothing",
    "pytorch_optimizer.AdaLOMO": "steps in a backward pass of its own, its step() does nothing",
}
"""Why an optimizer is not stepped on one process with a CPU."""

ITS_OWN_CLOSURE = "evaluates its closure itself, so it must be the only one"

Part = Callable[[Net], Iterable[Tensor]]


def _all(model: Net) -> Iterable[Tensor]:
    return model.parameters()


def _layers(model: Net) -> Iterable[Tensor]:
    return model.layers.parameters()


def _matrices(model: Net) -> Iterable[Tensor]:
    return [p for p in model.layers.parameters() if p.ndim == 2]


def _embedding(model: Net) -> Iterable[Tensor]:
    return model.embedding.parameters()


@dataclass(frozen=True)
class Way:
    """How one optimizer is built and stepped."""

    cls: type
    build: Callable[[type, Net, list[Tensor]], Any] = lambda cls, model, parameters: cls(parameters, lr=0.01)
    part: Part = _all
    paired_part: Part = _layers
    step: str = "step"  # "closure", "sam", "loss", "graph", "given"
    net: dict[str, Any] | None = None
    alone_only: str = ""

    def model(self, seed: int = 0) -> Net:
        return make_net(seed, **({"bias": True} if self.net is None else self.net))

    def optimizers(self, model: Net, paired: bool) -> list[Any]:
        own = list((self.paired_part if paired else self.part)(model))
        optimizer = self.build(self.cls, model, own)
        if not paired:
            return [optimizer]
        rest = [p for p in model.parameters() if not any(p is other for other in own)]
        return [optimizer, AdamW(rest, lr=0.01)]


def _plain(cls: type, model: Net, parameters: list[Tensor]) -> Any:
    return cls(parameters)


def _of_an_optimizer(cls: type, model: Net, parameters: list[Tensor]) -> Any:
    return cls(AdamW(parameters, lr=0.01))


def _with_a_base(cls: type, model: Net, parameters: list[Tensor]) -> Any:
    return cls(parameters, AdamW, lr=0.01)


def _wsam(cls: type, model: Net, parameters: list[Tensor]) -> Any:
    return cls(model, parameters, AdamW, lr=0.01)


def _gsam(cls: type, model: Net, parameters: list[Tensor]) -> Any:
    from pytorch_optimizer.lr_scheduler import CosineScheduler, ProportionScheduler

    base = AdamW(parameters, lr=0.01)
    schedule = CosineScheduler(base, t_max=10, max_lr=0.01, min_lr=0.001)
    return cls(parameters, base, model, ProportionScheduler(schedule, max_lr=0.01, min_lr=0.001, max_value=2.0))


def _muon_groups(cls: type, model: Net, parameters: list[Tensor]) -> Any:
    groups = [
        {"params": [p for p in parameters if (p.ndim == 2) == muon], "use_muon": muon, "lr": 0.01}
        for muon in (True, False)
    ]
    return cls(groups)


def _adam_mini(cls: type, model: Net, parameters: list[Tensor]) -> Any:
    return cls(nn.ParameterList(parameters) if len(parameters) < len(list(model.parameters())) else model, lr=0.01)


_CLOSURE: dict[str, Any] = {"step": "closure", "alone_only": ITS_OWN_CLOSURE}
_SAM: dict[str, Any] = {"step": "sam", "alone_only": ITS_OWN_CLOSURE}
_QUANTIZED: dict[str, Any] = {"part": _matrices, "paired_part": _matrices, "net": {"features": 64}}

SPECIAL: dict[str, dict[str, Any]] = {
    "torch.optim.LBFGS": _CLOSURE,
    "torch.optim.Muon": {"part": _matrices, "paired_part": _matrices},
    "torch.optim.SparseAdam": {"part": _embedding, "paired_part": _embedding, "net": {"sparse": True}},
    "schedulefree.AdamWScheduleFreeClosure": _CLOSURE,
    "schedulefree.RAdamScheduleFreeClosure": _CLOSURE,
    "schedulefree.SGDScheduleFreeClosure": _CLOSURE,
    "pytorch_optimizer.AdaHessian": {"step": "graph"},
    "pytorch_optimizer.SophiaH": {"step": "graph"},
    "pytorch_optimizer.AdamMini": {"build": _adam_mini},
    "pytorch_optimizer.AliG": {"step": "loss", "build": _plain, "alone_only": ITS_OWN_CLOSURE},
    "pytorch_optimizer.BSAM": _SAM | {"build": lambda cls, model, parameters: cls(parameters, num_data=40, lr=0.01)},
    "pytorch_optimizer.FriendlySAM": _SAM | {"build": _with_a_base},
    "pytorch_optimizer.GSAM": {"step": "given", "build": _gsam, "alone_only": "runs the model itself"},
    "pytorch_optimizer.LBFGS": _CLOSURE,
    "pytorch_optimizer.LookSAM": _SAM | {"build": _with_a_base},
    "pytorch_optimizer.SAM": _SAM | {"build": _with_a_base},
    "pytorch_optimizer.WSAM": _SAM | {"build": _wsam},
    "pytorch_optimizer.LoRARite": {"part": _matrices, "paired_part": _matrices},
    "pytorch_optimizer.SpectralSphere": {"part": _matrices, "paired_part": _matrices},
    "pytorch_optimizer.Ranger21": {
        "build": lambda cls, model, parameters: cls(parameters, lr=0.01, num_iterations=100),
    },
    **{
        f"pytorch_optimizer.{name}": {"build": _muon_groups}
        for name in ("AdaGO", "AdaMuon", "Muon", "MuonClip", "NorMuon")
    },
    **{
        f"pytorch_optimizer.{name}": {"build": _of_an_optimizer}
        for name in ("Lookahead", "OrthoGrad", "PCGrad", "ScheduleFreeWrapper", "TRAC")
    },
}


def found() -> dict[str, type]:
    """Every class of the four libraries that is an optimizer, by name."""
    classes: dict[str, type] = {}
    for library, module in LIBRARIES.items():
        for name, value in sorted(vars(module).items()):
            if inspect.isclass(value) and issubclass(value, Optimizer) and not name.startswith("_"):
                classes[f"{library}.{name}"] = value
    return {name: cls for name, cls in classes.items() if cls is not Optimizer}


def ways() -> dict[str, Way]:
    """How each of :func:`found` is built and stepped, less those of :data:`NOT_STEPPED`."""
    result = {}
    for name, cls in found().items():
        if name not in NOT_STEPPED:
            way = Way(cls, **(_QUANTIZED if name.startswith("torchao") else {}))
            result[name] = replace(way, **SPECIAL.get(name, {}))
    return result


def take_steps(way: Way, model: Net, optimizers: list[Any], steps: range) -> None:
    """Train with bare optimizers, or with one of ours around them."""
    for optimizer in optimizers:
        if callable(getattr(optimizer, "train", None)):
            optimizer.train()
    for i in steps:
        torch.manual_seed(i)
        _STEPS[way.step](model, optimizers, i)
        for optimizer in optimizers:
            optimizer.zero_grad()


def _backward(optimizers: list[Any], loss: Tensor, **options: Any) -> Tensor:
    total = optimizers[0].objective(loss) if isinstance(optimizers[0], GAPTOptimizer) else loss
    total.backward(**options)
    return loss


def _evaluate(model: Net, optimizers: list[Any], i: int) -> Tensor:
    for optimizer in optimizers:
        optimizer.zero_grad()
    return _backward(optimizers, loss_of(model, i))


def _step(model: Net, optimizers: list[Any], i: int, **options: Any) -> None:
    _backward(optimizers, loss_of(model, i), **options)
    for optimizer in optimizers:
        optimizer.step()


def _closure(model: Net, optimizers: list[Any], i: int) -> None:
    optimizers[0].step(partial(_evaluate, model, optimizers, i))


def _sam(model: Net, optimizers: list[Any], i: int) -> None:
    _backward(optimizers, loss_of(model, i))
    _closure(model, optimizers, i)


def _loss(model: Net, optimizers: list[Any], i: int) -> None:
    loss = _backward(optimizers, loss_of(model, i)).item()
    optimizers[0].step(lambda: loss)


def _given(model: Net, optimizers: list[Any], i: int) -> None:
    base = optimizers[0].base if isinstance(optimizers[0], GAPTOptimizer) else optimizers[0]
    base.set_closure(nn.functional.cross_entropy, *batch(i))
    optimizers[0].step()


_STEPS: dict[str, Callable[..., None]] = {
    "step": _step,
    "closure": _closure,
    "sam": _sam,
    "loss": _loss,
    "given": _given,
    "graph": partial(_step, create_graph=True),
}
