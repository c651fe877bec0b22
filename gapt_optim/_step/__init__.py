"""One optimizer step: its plan, its numbers on their way to the host, parameter alignment, ranks, and checkpoints."""

from .hints import warn_of_another_model
from .progress import checked_state
from .state import StepState, notify

__all__ = ["StepState", "checked_state", "notify", "warn_of_another_model"]
