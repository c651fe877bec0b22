"""From Gram matrices to one scalar: the weights of layers, and what is differentiated."""

from .build import Objective, build_objective, check_loss
from .layers import counted_layers, schedule_shares

__all__ = ["Objective", "build_objective", "check_loss", "counted_layers", "schedule_shares"]
