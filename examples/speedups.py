"""Faster steps: memory that is kept between them, torch.compile, and matrix products in 8-bit floating point."""

from __future__ import annotations

import contextlib
import ctypes
import shutil

import torch
from errors import UserError, first_line
from torch import nn

FLOAT8_CAPABILITY = (8, 9)  # Ada and Hopper are the first with 8-bit tensor cores
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # of glibc's malloc.h


def keep_freed_memory() -> None:
    """Lets this process keep memory that it frees, for the next step on a CPU.

    Each step allocates tensors of the same sizes. glibc gives the large ones back to the system as they are freed, and
    to be handed them again, cleared, takes a tenth to a third of a step of the small presets. No effect with another C
    library.
    """
    with contextlib.suppress(OSError, AttributeError, TypeError):  # TypeError: Windows
        allocator = ctypes.CDLL(None)
        allocator.mallopt(M_MMAP_MAX, 0)
        allocator.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)


def check_compiler(flag: str, instead: str, device: torch.device) -> None:
    """Refuses what torch.compile is needed for where it does not work, by compiling something."""
    try:
        torch.compile(lambda x: x.square() + 1)(torch.ones(2, device=device))
    except Exception as error:  # no C++ compiler, no Triton, a GPU too old: each raises its own
        reason = first_line(error)
        compiler = "" if shutil.which("c++") or shutil.which("g++") else "; there is no C++ compiler"
        raise UserError(f"{flag}: torch.compile fails on {device} ({reason}{compiler}); mend that, or {instead}") from (
            error
        )


def check_float8(device: torch.device) -> None:
    """Refuses --float8 where no tensor core multiplies 8-bit numbers."""
    needs = "--float8: needs a CUDA GPU of compute capability 8.9 or higher (Ada, Hopper or newer)"
    if device.type != "cuda":
        raise UserError(f"{needs}, found --device {device.type}; leave it out")
    found = torch.cuda.get_device_capability(device)
    if found < FLOAT8_CAPABILITY:
        raise UserError(f"{needs}, found {torch.cuda.get_device_name(device)} with {found[0]}.{found[1]}; leave it out")
    try:
        import torchao.float8  # noqa: F401
    except ImportError as error:
        raise UserError(f"--float8: needs torchao ({error}); pip install torchao, or leave it out") from error


def to_float8(model: nn.Module, *, emulate: bool = False) -> None:
    """Lets the linear layers of the blocks multiply in float8, forward and backward; weights stay as they are.

    transformers' GPT-2 has layers of a class of its own, ``Conv1D``, with transposed weights, which torchao does not
    know: they become ``nn.Linear`` first. ``emulate`` computes the same on any device, slowly.
    """
    from torchao.float8 import Float8LinearConfig, convert_to_float8_training

    blocks = model.get_submodule("transformer.h")
    use_linear_layers(blocks)
    # Sizes that are no multiple of 16, which the tensor cores need, are filled up with zeros.
    convert_to_float8_training(blocks, config=Float8LinearConfig(pad_inner_dim=True, emulate=emulate))


def use_linear_layers(module: nn.Module) -> None:
    """Puts an ``nn.Linear`` that computes the same in place of every ``Conv1D``."""
    from transformers.pytorch_utils import Conv1D

    for name, child in list(module.named_modules()):
        if isinstance(child, Conv1D):
            linear = nn.Linear(child.weight.shape[0], child.weight.shape[1], device=child.weight.device)
            linear.weight = nn.Parameter(child.weight.detach().T.contiguous())
            linear.bias = child.bias
            module.set_submodule(name, linear)
