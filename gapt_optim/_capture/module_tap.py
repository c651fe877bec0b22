"""The forward hook of one tapped module.

It refers to no module, so that it never keeps a model alive, and a copy of the model does not have it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from .._plan import StepPlan
from .entropies import sums_of
from .grams import captured, grams_of, kernel_of
from .graph import unspent
from .measurement import Measurement
from .outputs import batch_first, checked_hidden, hidden_rows, replace_tensor
from .store import CaptureStore, TokenMask
from .tap import Tap
from .unsaved import Unsaved


class ModuleTap(Unsaved):
    """Forward hook of one tapped module."""

    def __init__(
        self,
        name: str,
        store: CaptureStore,
        output: Callable[[Any], Tensor] | None,
        *,
        sequence_first: bool = False,
        mask_of: str | None = None,
    ) -> None:
        self.name, self.store, self.output, self.sequence_first = name, store, output, sequence_first
        self.mask_of = mask_of  # which of the functions of mask= picks it, where there is one for each glob
        # Autograd puts a Function's name into the message about an in-place operation on its output, as that of the
        # ReLU behind nearly every BatchNorm.
        advice = "what follows it works in place: tap that module instead, or give it inplace=False"
        self.function: Any = type(f"Tap of module '{name}' ({advice}) ", (Tap,), {})

    def __call__(self, module: nn.Module, args: Any, output: Any) -> Any:
        if getattr(module, "_is_replica", False):
            raise RuntimeError("the replicas of nn.DataParallel cannot be watched; use DistributedDataParallel")
        store = self.store
        if store.measurement is not None:
            self._measure(store.measurement, output)
            return None
        if store.plan is None:
            return None
        if not (module.training and torch.is_grad_enabled()):
            (store.without_grad if module.training else store.evaluated).add(self.name)
            return None
        if _transformed():  # by torch.func, whose gradients are no part of a step
            store.transformed.add(self.name)
            return None
        return self._capture(store.plan, output)

    def _measure(self, measurement: Measurement, output: Any) -> None:
        """Add the entropy of ``output`` to an open measurement."""
        with torch.no_grad():
            picked = self._own(self.store.masks[-1]) if self.store.masks else None
            length = picked.shape[1] if picked is not None and picked.ndim == 2 else 0
            h, mask = hidden_rows(self.name, output, self.output, self.sequence_first, length)
            given = self.mask_for(h, False)
            mask = given if mask is None else mask if given is None else mask & given
            measurement.add(self.name, *sums_of(grams_of(h, mask, measurement.config), measurement.config))

    def _capture(self, plan: StepPlan, output: Any) -> Any:
        """Leave the Gram matrices of ``output`` for the optimizer; returns the output with the tap in its graph."""
        store = self.store
        recomputing = _in_backward()
        h = checked_hidden(self.name, output, self.output)
        if h.is_nested:
            raise TypeError(
                f'module "{self.name}" returned a nested tensor, which has no taps in training; tap a module with '
                "padded sequences in its output, and pass mask="
            )
        found, h = h, batch_first(h, output, self.output, self.sequence_first)
        mask = self.mask_for(h, recomputing)
        if not h.requires_grad:  # everything below is frozen: there is an entropy, and nothing to push
            if not recomputing:
                store.calls[self.name].append(grams_of(h, mask, plan.entropy))
            return None
        kernel = kernel_of(plan.entropy)
        tapped, gram, carrier, *beside = self.function.apply(
            h,
            store.probe(self.name, h.device),
            mask,
            plan.entropy.alpha,
            kernel.cosine,
            kernel.center,
            plan.entropy.window,
            plan.passes_entropy(self.name),
            plan.activation_alignment,
            plan.config.objective.combine,
            self.name,
        )
        if not recomputing:
            calls = store.calls[self.name]
            if calls and not torch.compiler.is_compiling():
                calls[:] = unspent(calls)
            calls.append(captured(h, mask, plan.entropy, gram, carrier, beside))
        return replace_tensor(output, found, tapped if h is found else tapped.transpose(0, 1), self.name)

    def _own(self, mask: TokenMask) -> Tensor | None:
        if isinstance(mask, dict):
            return None if self.mask_of is None else mask[self.mask_of]
        return mask

    def mask_for(self, h: Tensor, recomputing: bool) -> Tensor | None:
        """The token mask of the model call that ``h`` belongs to, where it has one that fits."""
        store = self.store
        mask = self._own(store.masks[-1] if store.masks else store.mask if recomputing else None)
        if mask is None or h.ndim > 3:
            return None
        rows = h.shape[:2] if h.ndim == 3 else (1, len(h))
        if h.ndim == 2:
            if mask.numel() == len(h):  # tokens of all sequences in one row after another
                mask = mask.reshape(rows)
            elif store.pick_mask is None or (mask.ndim == 2 and len(mask) == len(h)):
                return None  # a vector for each sequence, which has no tokens left
        if recomputing and not store.masks and store.masked_calls > 1:
            raise RuntimeError(
                f'module "{self.name}" is recomputed by activation checkpointing after several masked forward passes, '
                "and which mask belongs to it is unknown; call backward after each forward pass"
            )
        if recomputing:
            store.recomputed = True
        if mask.shape != rows:
            if store.pick_mask is None:
                return None
            raise ValueError(
                f'mask= gave shape {tuple(mask.shape)}, but the output of module "{self.name}" has '
                + (f"(batch, seq) = {tuple(rows)}" if h.ndim == 3 else f"{len(h)} rows")
                + "; return a mask of that shape, or None"
            )
        return mask.to(device=h.device, dtype=torch.bool)


def _transformed() -> bool:
    return not torch.compiler.is_compiling() and torch._C._functorch.maybe_current_level() is not None


def _in_backward() -> bool:
    """A module that runs within a backward is being recomputed by activation checkpointing."""
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1
