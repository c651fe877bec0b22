"""One optimizer step: its plan, its numbers on their way to the host, parameter alignment, ranks, and checkpoints."""

from .state import StepState, notify, warn_of_another_model

__all__ = ["StepState", "notify", "warn_of_another_model"]
