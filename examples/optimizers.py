"""The optimizers of gpt2_fineweb.py by name, and how much memory their state takes."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal, get_args

import torch
from errors import UserError
from gpt2 import parameter_groups
from parallel import Parallel
from speedups import check_compiler
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

OptimizerName = Literal["adamw", "muon", "adamw8bit", "adamw4bit", "adamwfp8"]
LOW_BIT = {"adamw8bit": "AdamW8bit", "adamw4bit": "AdamW4bit", "adamwfp8": "AdamWFp8"}
OPTIMIZERS: tuple[OptimizerName, ...] = get_args(OptimizerName)


def make_optimizers(
    name: OptimizerName, model: nn.Module, *, lr: float, weight_decay: float, beta2: float
) -> list[Optimizer]:
    """One optimizer, or the two of ``muon``, over all parameters."""
    betas = (0.9, beta2)
    groups = parameter_groups(model, weight_decay)
    if name in LOW_BIT:
        import torchao.optim

        return [getattr(torchao.optim, LOW_BIT[name])(groups, lr=lr, betas=betas)]
    if name == "adamw":
        return [torch.optim.AdamW(groups, lr=lr, betas=betas, fused=True)]
    matrices = [p for p in model.get_submodule("transformer.h").parameters() if p.ndim == 2]
    rest = set(model.parameters()) - set(matrices)
    for group in groups:
        group["params"] = [p for p in group["params"] if p in rest]
    return [
        # Updates of the size that AdamW's have, so that one learning rate and weight decay suit both.
        torch.optim.Muon(matrices, lr=lr, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(groups, lr=lr, betas=betas, fused=True),
    ]


def check_optimizer(name: OptimizerName, parallel: Parallel, device: torch.device) -> None:
    """Refuses an optimizer that cannot run here."""
    if name == "muon" and not hasattr(torch.optim, "Muon"):
        raise UserError(f"--optimizer muon: needs PyTorch 2.9, found {torch.__version__}; update it, or take adamw")
    if name not in LOW_BIT:
        return
    if parallel == "fsdp":
        raise UserError(
            f"--optimizer {name}: its quantized state cannot be gathered from shards for a checkpoint; "
            "give --parallel ddp, or --optimizer adamw, whose state FSDP divides by the ranks"
        )
    try:
        import torchao.optim  # noqa: F401
    except ImportError as error:
        raise UserError(f"--optimizer {name}: needs torchao ({error}); pip install torchao, or take adamw") from error
    check_compiler(f"--optimizer {name}", "take adamw", device)


def state_bytes(optimizers: Iterable[Optimizer]) -> int:
    """Bytes that the optimizers keep on this rank, quantized tensors and shards as they are stored."""
    states = (state for optimizer in optimizers for state in optimizer.state.values())
    return sum(_stored(value) for state in states for value in state.values())


def _stored(value: Any) -> int:
    if is_traceable_wrapper_subclass(value):  # such as a DTensor, or a state of torchao: made of others
        parts, _ = value.__tensor_flatten__()
        return sum(_stored(getattr(value, part)) for part in parts)
    return value.numel() * value.element_size() if isinstance(value, Tensor) else 0
