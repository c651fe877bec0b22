"""``torch.distributed.pipelining``: every stage presses its own layers, and the last one's loss reaches all gates."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ..layout import replaced
from ..optimizer import GAPTOptimizer
from ..passes import tensors_in

Loss = Callable[..., Tensor]


def pipelined(
    optimizer: GAPTOptimizer, stages: Any, loss_fn: Loss, *, scale: float | Callable[[], float] = 1.0
) -> Loss:
    """Make an optimizer one of a pipeline; returns what the schedule takes for ``loss_fn``.

    Call it on every rank, before the first step::

        hook = RepresentationHook(stage.submod, "layers.*")
        optimizer = GAPTOptimizer(torch.optim.AdamW(stage.submod.parameters()), hook)
        loss_fn = pipelined(optimizer, stage, cross_entropy)
        schedule = Schedule1F1B(stage, n_microbatches=8, loss_fn=loss_fn)

        schedule.step(batch)      # schedule.step(target=target) on the last rank, schedule.step() between
        optimizer.step()
        optimizer.zero_grad()

    The backward pass of an earlier stage begins at its outputs, and knows no loss: the entropies of its layers join
    there. Layers keep the names that they have in the stages, so that these must differ from stage to stage, as those
    of a model that was cut do. Any schedule will do, also one that computes gradients of inputs before those of
    weights.

    Args:
        optimizer: of the stages on this rank.
        stages: the ``PipelineStage`` of this rank, or a sequence of several; the hook is then on
            ``nn.ModuleDict({str(stage.stage_index): stage.submod for stage in stages})``.
        loss_fn: of the last stage's output and a target, a mean over one micro-batch.
        scale: what each loss is multiplied by, or a function that gives it, such as ``scaler.get_scale``: the entropies
            of all stages get it too.

    Raises:
        ValueError: on all ranks, where two stages watch layers of the same name, or the configuration asks for what
            needs all layers on one rank.
    """
    stages = list(stages) if isinstance(stages, Sequence) else [stages]
    config = optimizer.config
    if config.alignment.parameter_every or config.layers.reduce != "mean":
        raise ValueError(
            "a pipeline has no parameter alignment and no reduce='largest_drop', which need all layers on one rank; "
            "set AlignmentConfig(parameter_every=0) and LayerConfig(reduce='mean')"
        )
    pipeline = _Pipeline(optimizer, stages, scale)
    names = _names(optimizer.hook.names, stages, optimizer.join_process_group)
    optimizer.join_stages(names, dist.get_world_size(stages[0].group))

    def objective(*args: Any, **kwargs: Any) -> Tensor:
        loss = loss_fn(*args, **kwargs)
        return optimizer.objective(loss) * pipeline.factor() if pipeline.live else loss

    return objective


class _Pipeline:
    """Attaches the entropies of earlier stages to what these return."""

    def __init__(self, optimizer: GAPTOptimizer, stages: Sequence[Any], scale: float | Callable[[], float]) -> None:
        self.optimizer, self._scale = optimizer, scale
        self.live = False
        """The last forward pass was one of a schedule, and not one that only finds out shapes."""
        self._within = False
        for stage in stages:
            stage.forward_one_chunk = self._counted(stage.forward_one_chunk)
            stage.submod.register_forward_hook(self._last if stage.is_last else self._earlier)

    def factor(self) -> float:
        return float(self._scale() if callable(self._scale) else self._scale)

    def _counted(self, forward: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*args: Any, **kwargs: Any) -> Any:
            self._within = True
            try:
                return forward(*args, **kwargs)
            finally:
                self._within = False

        return counted

    def _last(self, module: Any, args: Any, output: Any) -> None:
        self.live = self._within

    def _earlier(self, module: Any, args: Any, output: Any) -> Any:
        self.live = self._within
        if not self.live or not module.training or not torch.is_grad_enabled():
            return None
        carrier = next((tensor for tensor in tensors_in(output) if tensor.requires_grad), None)
        if carrier is None:
            return None
        pressed = self.optimizer.press_stage(carrier)
        if pressed is not None:
            joined: Tensor = _Join.apply(carrier, pressed * self.factor())  # type: ignore[no-untyped-call]
        elif carrier._is_view():  # as where an angle is taken: a schedule detaches outputs in place
            joined = carrier.clone()
        else:
            return None
        return replaced(output, carrier, joined)


class _Join(torch.autograd.Function):
    """The identity of an output, whose backward pass also differentiates an entropy."""

    @staticmethod
    def forward(ctx: Any, output: Tensor, entropy: Tensor) -> Tensor:
        ctx.save_for_backward(entropy)
        return output.clone()  # a schedule detaches outputs in place, and cannot a view

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        (entropy,) = ctx.saved_tensors
        return grad, torch.ones_like(entropy)


def _names(own: list[str], stages: Sequence[Any], group: Any) -> list[str]:
    """Names of the layers of all stages, in the order of the stages.

    Raises:
        ValueError: two stages have one of the same name.
    """
    indices = [str(stage.stage_index) for stage in stages]
    here = [(indices[0] if len(indices) == 1 else name.split(".")[0], name) for name in own]
    known = all(index in indices for index, _ in here)
    everyone: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(everyone, here if known else None, group=group)
    if None in everyone:
        raise ValueError(
            "several stages on a rank are known by their numbers: place the hook on "
            "nn.ModuleDict({str(stage.stage_index): stage.submod for stage in stages})"
        )
    found: dict[str, int] = {}
    for index, name in sorted((int(index), name) for pairs in everyone for index, name in pairs):
        if found.setdefault(name, index) != index:
            raise ValueError(
                f'stages {found[name]} and {index} both watch a layer "{name}"; give the modules of stages the names '
                "that they have in the whole model, as in a ModuleDict from which layers were deleted"
            )
    place = {name: i for pairs in everyone for i, (_, name) in enumerate(pairs)}
    return sorted(found, key=lambda name: (found[name], place[name]))
