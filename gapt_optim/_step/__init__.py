"""One optimizer step: its plan, its numbers on their way to the host, parameter alignment, ranks, and checkpoints."""

from .hints import warn_of_another_model
from .progress import checked_state
from .report import notify
from .state import StepState

__all__ = ["StepState", "checked_state", "notify", "warn_of_another_model"]
