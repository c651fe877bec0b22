"""One optimizer step: its plan, its numbers on their way to the host, parameter alignment, ranks, and checkpoints."""

from .hints import warn_of_another_model
from .report import notify
from .state import StepState

__all__ = ["StepState", "notify", "warn_of_another_model"]
