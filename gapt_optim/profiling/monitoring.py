"""A monitor: entropies and measures of any training, which it neither slows nor changes."""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from .._tell import tell
from ..config import EntropyConfig
from ..hook import Measurement, RepresentationHook
from ..layout import Layers, Reading
from ..metrics import Measures, Observer, StepMetrics
from ..passes import in_backward
from ..ranks import group_of


class Monitor:
    """Report how the layers of a training develop. It touches neither the optimizer nor the backward pass.

    >>> from gapt_optim import monitor
    >>> model = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 1))
    >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    >>> with monitor(model, "1", every=2) as watched:                    # new
    ...     for _ in range(3):
    ...         model(torch.randn(16, 4)).square().mean().backward()
    ...         optimizer.step()
    ...         optimizer.zero_grad()
    >>> watched.metrics.step, list(watched.metrics.layer_entropy)
    (2, ['1'])

    On the first training step and each whose number is a multiple of ``every``, the forward passes in training mode
    with gradients on are read, micro-batches together. A step ends with the step of an optimizer that has a parameter
    of the model; of several that step after the same backward pass, the first one's. Where no such optimizer steps (an
    engine with copies of its own), call :meth:`step`. A step that a GradScaler skips goes on until one is taken.

    Over ranks, enter it on all of them: at each report, sums are taken over the default process group.

    Args:
        model: any module. Place the monitor before the first call of a compiled model.
        layers: as for :class:`gapt_optim.RepresentationHook`.
        every: steps from one report to the next.
        observers: called with :class:`gapt_optim.StepMetrics`, as those of a GAPTOptimizer: ``loss`` is None, ``phase``
            "memorization". ``JSONLines`` writes what ``gapt-optim watch`` and ``report`` read. One that raises is
            dropped with a warning.
        entropy: its kernel, order and windows; by default ``EntropyConfig()``.
        reading: ``output``, ``mask``, ``layout``, ``segments`` as for RepresentationHook.

    Raises:
        ValueError: ``every`` is below 1, or no layer matches.
    """

    def __init__(
        self,
        model: nn.Module,
        layers: Layers = None,
        *,
        every: int = 50,
        observers: Iterable[Observer] = (),
        entropy: EntropyConfig | None = None,
        **reading: Any,
    ) -> None:
        if every < 1:
            raise ValueError(f"every must be at least 1 step, found {every}")
        self.every, self.observers = every, list(observers)
        self.steps = 0
        """Training steps so far."""
        self.metrics: StepMetrics | None = None
        """The last report."""
        self.entropy = entropy or EntropyConfig()
        self.hook = RepresentationHook(model, layers, **reading)
        self._model = weakref.ref(model)
        self._passes = _Passes(self.entropy)
        self._handles: list[Any] = []
        self._reading: Any = None
        self._looking = False

    def __enter__(self) -> Monitor:
        model = self._model()
        if model is None or self.hook.removed:
            raise RuntimeError("this monitor has ended; make a new one")
        self._look()
        if not self._looking:  # the first forward pass shows which modules are the model's blocks; the next one is read
            self._handles.append(model.register_forward_hook(self._look))
        self._handles.append(register_optimizer_step_post_hook(self._stepped))
        self._open()
        return self

    def __exit__(self, *error: object) -> None:
        self._close()
        for handle in self._handles:
            handle.remove()
        self._handles = []
        self.hook.remove()

    def step(self) -> None:
        """A training step is over. Called by the optimizers that have parameters of the model."""
        if not self._passes.seen:
            return
        self._passes.seen = False
        self.steps += 1
        if self._reading is not None:
            self._close()
            self._report()
        if (self.steps + 1) % self.every == 0:
            self._open()

    def _look(self, *call: object) -> None:
        """Look at the calls of the layers, once it is known which these are."""
        if self._looking:
            return
        model = self._model()
        assert model is not None
        modules = dict(model.named_modules())
        for name in self.hook.names:
            # Before the hook that reads, which runs without gradients and does not know the module's mode.
            self._handles.append(modules[name].register_forward_hook(self._passes.look, prepend=True))
            self._looking = True

    def _stepped(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        model = self._model()
        if model is None or not self._passes.seen:
            return
        own = {id(parameter) for parameter in model.parameters()}
        if any(id(parameter) in own for group in optimizer.param_groups for parameter in group["params"]):
            self.step()

    def _open(self) -> None:
        self._passes.clear()
        self._reading = self.hook.reading(self._passes.add)
        self._reading.__enter__()

    def _close(self) -> None:
        if self._reading is not None:
            self._reading.__exit__(None, None, None)
            self._reading = None

    def _report(self) -> None:
        measured = self._passes.measured
        measured.sums = _over_ranks(measured.sums)
        entropies, measures = measured.entropies, measured.measures
        self.metrics = StepMetrics(
            self.steps,
            "memorization",
            next_phase="memorization",
            reason=None,
            loss=None,
            entropy=sum(entropies.values()) / len(entropies) if entropies else None,
            layer_entropy=entropies,
            measures=Measures.mean(measures.values()) if measures else None,
            layer_measures=measures,
        )
        for observer in list(self.observers):
            try:
                observer(self.metrics)
            except Exception as error:  # a full disk or a tracker's network ends no training
                self.observers.remove(observer)
                tell(
                    f"{type(observer).__name__} raised {type(error).__name__}: {error}; the monitor goes on without it"
                )


monitor = Monitor


class _Passes:
    """What the forward passes of a step left. One object for all steps: a compiled model knows it."""

    def __init__(self, config: EntropyConfig) -> None:
        self.config = config
        self.seen = False
        """A forward pass of a training step ran since the last one was over."""
        self.counts = False
        """The call that is under way is part of one."""
        self.measured = Measurement(config)

    def look(self, module: nn.Module, args: Any, output: Any) -> None:
        """Before an output is read: is its call part of a training step?"""
        self.counts = module.training and torch.is_grad_enabled() and not in_backward()
        if self.counts:
            self.seen = True

    def add(self, name: str, reading: Reading) -> None:
        """An output of a layer."""
        if self.counts:
            self.measured.add(name, reading)

    def clear(self) -> None:
        self.measured = Measurement(self.config)


def _over_ranks(own: dict[str, Tensor]) -> dict[str, Tensor]:
    """The sums of a measurement over all ranks, where there are several. Waits for the device."""
    sums = {name: values.double().cpu() for name, values in own.items()}
    group = group_of(None)
    if group is None:
        return sums
    gathered: list[dict[str, Tensor]] = [{} for _ in range(dist.get_world_size(group))]
    dist.all_gather_object(gathered, sums, group=group)
    total: dict[str, Tensor] = {}
    for of_rank in gathered:  # ranks may have other layers: stages of a pipeline, experts without tokens
        for name, values in of_rank.items():
            total[name] = total[name] + values if name in total else values
    return total
