"""Being a ``torch.optim.Optimizer``: several optimizers as one, and the shell around them."""

from .bases import Bases
from .wrapper import START_FRESH, STATE_KEY, OptimizerWrapper

__all__ = ["START_FRESH", "STATE_KEY", "Bases", "OptimizerWrapper"]
