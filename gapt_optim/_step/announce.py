"""What the wrapper does in a loop, in two lines of its log: the first compression, and the first return from it."""

from __future__ import annotations

import logging

import torch.distributed as dist

from .._plan import StepPlan
from ..gate import Phase
from ..metrics import StepMetrics

_LOGGER = logging.getLogger("gapt_optim")

_WHY = {
    "plateau": "the loss stopped falling",
    "spike": "the training loss rose",
    "compressed": "the entropy stopped falling",
}


def announce_switch(plan: StepPlan, metrics: StepMetrics) -> None:
    """Log the first switch to each phase, on the first rank.

    At the level of a warning, the least that Python shows where nobody has configured logging: from here on another
    objective is trained, and a loop that was copied from somewhere should not hide that. It goes through ``logging``
    and not through ``warnings``, so that it never becomes an error.
    """
    if metrics.reason is None or metrics.switches > 2:
        return
    if plan.group is not None and dist.get_rank(plan.group) > 0:
        return
    objective = "the loss alone"
    if metrics.next_phase == Phase.COMPRESSION.value:
        n = len(plan.shares)
        layers = f"{n} layers" if n > 1 else f'layer "{next(iter(plan.shares))}"'
        objective = f"loss + {plan.config.objective.weight:g} * entropy of {layers}"
    more = ""
    if metrics.switches == 2:
        more = "; further switches are in optimizer.metrics and not logged"
    _LOGGER.warning(
        "gapt_optim: step %d, %s -> %s, as %s (loss %.4g, entropy %.4g): now training on %s%s. "
        "GAPTOptimizer(..., announce=False) hides this",
        metrics.step,
        metrics.phase,
        metrics.next_phase,
        _WHY.get(metrics.reason, metrics.reason),
        metrics.loss,
        metrics.entropy,
        objective,
        more,
    )
