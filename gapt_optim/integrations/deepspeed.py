"""DeepSpeed: the wrapper as client optimizer of ZeRO 0 to 3."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

from ..optimizer import GAPTOptimizer
from .common import Replacement, unwrapped


def connect(engine: Any) -> GAPTOptimizer:
    """Let the gate of a :class:`GAPTOptimizer` follow the steps that a DeepSpeed engine takes, and no others.

    ZeRO steps the optimizer that it was given once for each of its own groups, and leaves steps out when gradients
    overflow: it is the engine that knows when a step was taken. ::

        optimizer = GAPTOptimizer(torch.optim.AdamW(model.parameters(), lr=3e-4), RepresentationHook(model, "layers.*"))
        engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
        connect(engine)

        engine.backward(optimizer.objective(engine(batch)))      # was: engine.backward(engine(batch))
        engine.step()

    With Accelerate the engine is ``accelerator.deepspeed_engine_wrapped.engine``, once ``prepare`` has made it; in the
    Trainer, :class:`gapt_optim.integrations.transformers.GAPTCallback` connects it.

    The configuration says ``"zero_allow_untested_optimizer": True``. The engine divides by its accumulation steps and
    scales losses of half precision itself, so give :meth:`GAPTOptimizer.objective` the loss as it is.

    Args:
        engine: what ``deepspeed.initialize`` returned.

    Returns:
        The optimizer.

    Raises:
        TypeError: the engine was not given a GAPTOptimizer.
        ValueError: parameter alignment is wanted, whose gradients an engine keeps to itself.
    """
    optimizer = unwrapped(engine.optimizer)
    if optimizer is None:
        raise TypeError(
            "engine was not given a GAPTOptimizer: deepspeed.initialize(model=model, optimizer=GAPTOptimizer(...)), "
            "and no optimizer in its configuration"
        )
    if optimizer.config.alignment.parameter_every:
        raise ValueError(
            "an engine keeps the gradients of parameters to itself, so that their alignment cannot be measured; set "
            "AlignmentConfig(parameter_every=0)"
        )
    judge = optimizer.stepped_elsewhere()
    bases = optimizer.base if isinstance(optimizer.base, tuple) else (optimizer.base,)

    def step_bases(_: Any) -> Callable[[], None]:
        def step() -> None:
            for base in bases:
                base.step()

        return step

    Replacement(optimizer, "step", step_bases)
    Replacement(engine, "step", lambda own: _judged(engine, judge, own))
    return optimizer


def _judged(engine: Any, judge: Callable[[Callable[[], bool]], None], own: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(own)
    def judged(*args: Any, **kwargs: Any) -> Any:
        if not engine.is_gradient_accumulation_boundary():
            return own(*args, **kwargs)
        results: list[Any] = []

        def take() -> bool:
            results.append(own(*args, **kwargs))
            return bool(engine.was_step_applied())

        judge(take)
        return results[0]

    return judged
