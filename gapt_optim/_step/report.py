"""What one step reports: the metrics made of its numbers, and the observers that get them."""

from __future__ import annotations

import math
from collections.abc import Sequence

from .._plan import StepPlan
from .._tell import tell
from ..alignment import Alignment, activation_alignment
from ..metrics import Measures, Observer, StepMetrics
from .progress import Progress
from .record import Reading


def judged_layers(counted: Sequence[str], reading: Reading) -> list[str]:
    """The layers whose mean is the step's entropy: those that count and ran, or all that ran where none does."""
    return [name for name in counted if name in reading.entropies] or list(reading.entropies)


def mean_entropy(judged: Sequence[str], reading: Reading) -> float:
    """Mean over the judged layers."""
    return math.fsum(reading.entropies[name] for name in judged) / len(judged)


def step_metrics(
    plan: StepPlan,
    reading: Reading,
    judged: Sequence[str],
    counted: Sequence[str],
    progress: Progress,
    reason: str | None,
    parameter_alignment: Alignment | None,
) -> StepMetrics:
    """The metrics of one step.

    Args:
        plan: of that step.
        reading: its numbers.
        judged: from :func:`judged_layers`.
        counted: the layers that count in the objective.
        progress: after the step.
        reason: why the phase switches after it, None where it does not.
        parameter_alignment: where it was due.
    """
    objective, counts = reading.loss + reading.penalty, progress.counts
    return StepMetrics(
        step=counts.steps,
        phase=plan.phase.value,
        next_phase=progress.phase.value,
        reason=reason,
        loss=reading.loss,
        entropy=mean_entropy(judged, reading),
        layer_entropy=reading.entropies,
        measures=Measures.mean(reading.measures[name] for name in judged),
        layer_measures=reading.measures,
        entropy_share=reading.penalty / objective if plan.compressing and objective else None,
        alignment=activation_alignment(plan.layers, reading.statistics, counted) if reading.statistics else None,
        parameter_alignment=parameter_alignment,
        validation_loss=None if math.isnan(reading.validation) else reading.validation,
        switches=progress.gate.switches,
        compression_steps=counts.compression_steps,
        nonfinite_steps=counts.nonfinite_steps,
    )


def notify(observers: list[Observer], metrics: StepMetrics) -> None:
    """Call each observer; one that raises is dropped with a warning."""
    for observer in list(observers):
        try:
            observer(metrics)
        except Exception as error:  # a full disk must not end a training run
            observers.remove(observer)
            tell(f"observer {type(observer).__name__} raised {type(error).__name__}: {error}; it is dropped")
