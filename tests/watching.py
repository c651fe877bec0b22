"""A small hook of our own, that reads the outputs of modules by a Layout and sums the entropies of their windows."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gapt_optim import matrix_entropy
from gapt_optim.layout import Layout, Reading


class Watch:
    """Readings of the modules ``names`` of ``model``, and the sums of the entropies of their windows, while open."""

    def __init__(self, model: nn.Module, names: Iterable[str], **options: Any) -> None:
        modules = {name: model.get_submodule(name) for name in names}
        self.layout = Layout(model, modules, **options)
        self.readings: dict[str, list[Reading]] = {}
        self.sums: dict[str, tuple[float, int]] = {}
        self.handles: list[Any] = []
        for module, calls in self.layout.callers():
            self.handles.append(
                module.register_forward_pre_hook(
                    lambda _, args, kwargs, calls=calls: calls.enter(args, kwargs, lambda: True),
                    with_kwargs=True,
                    prepend=True,
                )
            )
        for name, module in modules.items():
            self.handles.append(module.register_forward_hook(lambda _, __, out, name=name: self._read(name, out)))
        for module, calls in self.layout.callers():  # behind them: a watched module may be a caller
            self.handles.append(module.register_forward_hook(lambda *_, calls=calls: calls.leave(), always_call=True))

    def _read(self, name: str, output: Any) -> None:
        reading = self.layout.read(name, output)
        self.readings.setdefault(name, []).append(reading)
        if not torch.compiler.is_compiling():
            total, count = self.sums.get(name, (0.0, 0))
            more, weight = window_sums(reading)
            self.sums[name] = total + more, count + weight

    @property
    def entropies(self) -> dict[str, float]:
        """The mean of each layer's windows; 0 where none can have an entropy."""
        return {name: total / max(count, 1) for name, (total, count) in self.sums.items()}

    def clear(self) -> None:
        self.readings.clear()
        self.sums.clear()

    def __enter__(self) -> Watch:
        return self

    def __exit__(self, *exception: object) -> None:
        for handle in self.handles:
            handle.remove()


def window_sums(reading: Reading, window: int = 8) -> tuple[float, int]:
    """The sum over windows that can have an entropy (cosine, centred, order 2), and their number."""
    rows = reading.rows.detach().double()
    batch, length, _ = rows.shape
    live = torch.ones(batch, length, dtype=torch.bool) if reading.live is None else reading.live
    total, count = 0.0, 0
    for sequence in range(batch):
        ids = None if reading.segments is None else reading.segments[sequence]
        for part in documents(rows[sequence], live[sequence], ids):
            for z, keep in zip(part[0].split(window), part[1].split(window), strict=True):
                if int(keep.sum()) > 2:
                    total, count = total + float(matrix_entropy(z, mask=keep)), count + 1
    return total, count


def documents(rows: Tensor, live: Tensor, ids: Tensor | None) -> list[tuple[Tensor, Tensor]]:
    """The rows of each document, and which of them count."""
    if ids is None:
        return [(rows, live)]
    lengths = torch.unique_consecutive(ids, return_counts=True)[1].tolist()
    return list(zip(rows.split(lengths), live.split(lengths), strict=True))


def direct(*sequences: Tensor, window: int = 8) -> float:
    """The mean entropy of the windows of sequences (n, d), from its definition."""
    total, count = 0.0, 0
    for rows in sequences:
        for part in rows.detach().double().split(window):
            if len(part) > 2:
                u = F.normalize(part, dim=-1)
                k = (u - u.mean(0)) @ (u - u.mean(0)).mT
                total, count = total + float(2 * k.trace().log() - k.square().sum().log()), count + 1
    return total / max(count, 1)
