"""Entropies read in evaluation."""

from __future__ import annotations

from torch import Tensor

import gapt_optim  # for its configurations: pydantic, which is slow to import, comes with the first one

from ..metrics import Measures


class Measurement:
    """Entropies read by :meth:`RepresentationHook.measuring`, averaged over the calls of each module.

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
        self._sums: dict[str, Tensor] = {}  # (5,): the entropy, then its measures
        self._calls: dict[str, int] = {}

    def add(self, name: str, numbers: Tensor) -> None:
        self._sums[name] = self._sums[name] + numbers if name in self._sums else numbers
        self._calls[name] = self._calls.get(name, 0) + 1

    @property
    def entropies(self) -> dict[str, float]:
        """Entropy per layer, in nats (or in [0, 1] with ``normalize``); waits for the device."""
        return {name: float(total[0]) / self._calls[name] for name, total in self._sums.items()}

    @property
    def measures(self) -> dict[str, Measures]:
        """Per layer, whether its entropy is that of fewer directions; waits for the device."""
        return {
            name: Measures(*(value / self._calls[name] for value in total[1:].tolist()))
            for name, total in self._sums.items()
        }

    @property
    def mean(self) -> float:
        """Mean over layers. Raises RuntimeError when nothing ran inside the ``with`` block."""
        entropies = self.entropies
        if not entropies:
            raise RuntimeError("no tapped module ran inside hook.measuring(); run the model in the with block")
        return sum(entropies.values()) / len(entropies)
