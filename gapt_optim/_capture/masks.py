"""Which mask: hooks around the model that keep the token mask of the call under way."""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from .store import CaptureStore
from .unsaved import Unsaved


class ModelCall(Unsaved):
    """Forward pre-hook of the model, or of a module around the taps that takes an attention_mask: keeps the mask."""

    def __init__(self, store: CaptureStore, parameters: list[str], *, is_model: bool) -> None:
        self.store, self.parameters, self.is_model = store, parameters, is_model
        self.kept: list[bool] = []  # of the calls under way: it brought a mask, or is the model's own

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        store = self.store
        self.kept.append(False)
        listening = store.plan is not None and torch.is_grad_enabled()
        # Where nothing is captured, a backward to come may need the mask of the call before.
        mask = self.token_mask(args, kwargs) if listening or store.measurement is not None else None
        if mask is None and not self.is_model:
            return  # that of the call around it holds
        masked_already = any(outer is not None for outer in store.masks)
        store.masks.append(mask)
        self.kept[-1] = True
        if listening and store.measurement is None:
            store.mask = mask
            if self.is_model and not torch.compiler.is_compiling():
                store.wait_for_loss()
            if mask is not None and not masked_already and not torch.compiler.is_compiling():
                store.masked_calls = 1 if store.recomputed else store.masked_calls + 1
                store.recomputed = False

    def token_mask(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
        # As Dynamo of torch 2.6 knows it: neither strict= nor a union of dictionaries.
        keywords = {**dict(zip(self.parameters, args)), **kwargs}  # noqa: B905
        if self.store.pick_mask is None:
            mask = keywords.get("attention_mask")
            return mask if isinstance(mask, Tensor) and mask.ndim == 2 else None
        mask = self.store.pick_mask(keywords)
        if not isinstance(mask, Tensor | None):
            raise TypeError(f"mask= must give a tensor (batch, seq) or None, found {type(mask).__name__}")
        return mask


class ModelReturn(Unsaved):
    """Forward hook to a :class:`ModelCall`: a module called by itself afterwards has no mask."""

    def __init__(self, call: ModelCall) -> None:
        self.call = call

    def __call__(self, module: nn.Module, args: Any, output: Any) -> None:
        masks = self.call.store.masks
        if self.call.kept and self.call.kept.pop() and masks:
            masks.pop()


def argument_names(model: nn.Module) -> list[str]:
    """Names of the arguments of the model's call, which DDP and torch.compile hide behind *args."""
    parameters = inspect.signature(model.forward).parameters
    inner = getattr(model, "_orig_mod", getattr(model, "module", None))
    if isinstance(inner, nn.Module) and all(p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD) for p in parameters.values()):
        return argument_names(inner)
    return list(parameters)


def masked_modules(model: nn.Module, names: Iterable[str]) -> list[nn.Module]:
    """The model, and the modules around or at the named ones whose call takes an attention_mask."""
    around = {".".join(parts[:i]) for parts in (name.split(".") for name in names) for i in range(1, len(parts) + 1)}
    modules = [module for name, module in model.named_modules() if name in around and module is not model]
    return [model, *(module for module in modules if "attention_mask" in argument_names(module))]
