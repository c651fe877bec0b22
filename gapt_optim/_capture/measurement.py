"""Entropies read in evaluation."""

from __future__ import annotations

import torch
from torch import Tensor

import gapt_optim  # for its configurations: pydantic, which is slow to import, comes with the first one

from ..metrics import Measures


class Measurement:
    """Entropies read by :meth:`RepresentationHook.measuring`, averaged over all windows: how data is cut into batches
    does not matter, if batches are cut between windows.

    >>> import torch
    >>> from gapt_optim import RepresentationHook
    >>> model = torch.nn.Sequential(torch.nn.Linear(4, 16), torch.nn.ReLU())
    >>> hook = RepresentationHook(model, "1")
    >>> with torch.no_grad(), hook.measuring() as measured:
    ...     _ = model(torch.randn(64, 4))
    >>> list(measured.entropies), measured.measures["1"].norm_ratio >= 1
    (['1'], True)
    """

    def __init__(self, config: gapt_optim.EntropyConfig) -> None:
        self.config = config
        self._sums: dict[str, Tensor] = {}  # (2, 5): of the entropy and its measures, and of the weights of windows

    def add(self, name: str, numbers: Tensor, weights: Tensor) -> None:
        sums = torch.stack((numbers, weights))
        self._sums[name] = self._sums[name] + sums if name in self._sums else sums

    @property
    def entropies(self) -> dict[str, float]:
        """Entropy per layer, in nats (or in [0, 1] with ``normalize``); waits for the device."""
        return {name: numbers[0] for name, numbers in self._means().items()}

    @property
    def measures(self) -> dict[str, Measures]:
        """Per layer, whether its entropy is that of fewer directions; waits for the device."""
        return {name: Measures(*numbers[1:]) for name, numbers in self._means().items()}

    def _means(self) -> dict[str, list[float]]:
        # Nothing but empty batches weighs nothing, and has entropy 0.
        return {name: (total / weights.clamp(min=1e-37)).tolist() for name, (total, weights) in self._sums.items()}

    @property
    def mean(self) -> float:
        """Mean over layers. Raises RuntimeError when nothing ran inside the ``with`` block."""
        entropies = self.entropies
        if not entropies:
            raise RuntimeError("no tapped module ran inside hook.measuring(); run the model in the with block")
        return sum(entropies.values()) / len(entropies)
