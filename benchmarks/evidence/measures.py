"""What can hide in an entropy, measured by a few lines of torch that share no code with the library.

linear            order-2 entropy of the raw Gram matrix of a window (nats)
cosine            the same with rows of unit length
centred_cosine    the same about the mean of the window
centred_linear    about the mean of the window, rows as they are
norm_ratio        largest over median row norm, all tokens of the batch together
window_norm_ratio the same within a window, mean over windows
mean_share        share of the squared norm that lies in the vector common to all tokens of the batch
window_mean_share the same within a window, mean over windows
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

NAMES = (
    "linear",
    "cosine",
    "centred_cosine",
    "centred_linear",
    "norm_ratio",
    "window_norm_ratio",
    "mean_share",
    "window_mean_share",
)


def measures(hidden: Tensor, window: int = 8) -> dict[str, float]:
    """All measures of one layer.

    Args:
        hidden: (batch, tokens, d) or (samples, d); a tail shorter than a window is left out.
    """
    hidden = hidden.float()
    tokens = hidden.flatten(0, -2)
    count = hidden.shape[-2] // window * window
    z = hidden[..., :count, :].reshape(-1, window, hidden.shape[-1])
    unit = nn.functional.normalize(z, dim=-1)
    norms, window_norms = tokens.norm(dim=-1), z.norm(dim=-1)
    shares = window * z.mean(1).square().sum(-1) / z.square().sum((1, 2)).clamp(min=1e-30)
    values = {
        "linear": entropy(z).mean(),
        "cosine": entropy(unit).mean(),
        "centred_cosine": entropy(unit - unit.mean(1, keepdim=True)).mean(),
        "centred_linear": entropy(z - z.mean(1, keepdim=True)).mean(),
        "norm_ratio": norms.max() / norms.median().clamp(min=1e-30),
        "window_norm_ratio": (window_norms.amax(1) / window_norms.median(1).values.clamp(min=1e-30)).mean(),
        "mean_share": len(tokens) * tokens.mean(0).square().sum() / tokens.square().sum().clamp(min=1e-30),
        "window_mean_share": shares.mean(),
    }
    return {name: float(value) for name, value in values.items()}


def entropy(z: Tensor) -> Tensor:
    """Order-2 entropy of each (n, d) of z, from the definition: -log sum (eigenvalues of K / tr K)^2."""
    gram = z @ z.mT
    trace = gram.diagonal(dim1=-2, dim2=-1).sum(-1)
    purity = gram.square().sum((-2, -1)) / trace.square().clamp(min=1e-30)
    return torch.where(trace > 1e-12, -purity.clamp(min=1e-30).log(), 0).clamp(min=0)


@contextmanager
def watching(modules: Sequence[nn.Module], *, graph: bool = False) -> Iterator[list[Tensor]]:
    """The outputs of ``modules`` in one forward pass, in the order in which they run; with ``graph``, to be
    differentiated."""
    seen: list[Tensor] = []

    def keep(module: nn.Module, inputs: Any, output: Any) -> None:
        h = output if isinstance(output, Tensor) else output[0]
        seen.append(h if graph else h.detach())

    handles = [module.register_forward_hook(keep) for module in modules]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def mean_measures(hidden: Sequence[Tensor], window: int = 8) -> dict[str, float]:
    """Mean over layers."""
    layers = [measures(h, window) for h in hidden]
    return {name: sum(layer[name] for layer in layers) / len(layers) for name in NAMES}


def note(curve: dict[str, list[float]], point: Mapping[str, float]) -> None:
    """Append a point to the curve of each name."""
    for name, value in point.items():
        curve.setdefault(name, []).append(value)
