"""Which mask: hooks around the model that keep the token mask of the call under way."""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from .store import CaptureStore, TokenMask
from .unsaved import Unsaved

_PADDING = {
    nn.TransformerEncoder: "src_key_padding_mask",
    nn.TransformerEncoderLayer: "src_key_padding_mask",
    nn.TransformerDecoder: "tgt_key_padding_mask",
    nn.TransformerDecoderLayer: "tgt_key_padding_mask",
}
"""What torch's own modules call the mask of padding, which is true where a token does not count."""


class ModelCall(Unsaved):
    """Forward pre-hook of the model, or of a module around the taps that takes a mask of tokens: keeps the mask."""

    def __init__(self, store: CaptureStore, parameters: list[str], padding: str | None, *, is_model: bool) -> None:
        self.store, self.parameters, self.padding, self.is_model = store, parameters, padding, is_model
        self.kept: list[bool] = []  # of the calls under way: it brought a mask, or is the model's own

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        store = self.store
        self.kept.append(False)
        listening = store.plan is not None and torch.is_grad_enabled()
        # Where nothing is captured, a backward to come may need the mask of the call before.
        mask, own = None, self.is_model
        if listening or store.measurement is not None:
            mask, own = self.token_mask(args, kwargs)
        if not own:
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

    def token_mask(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[TokenMask, bool]:
        """The mask of this call, and whether it has one of its own: otherwise that of the call around it holds."""
        # As Dynamo of torch 2.6 knows it: neither strict= nor a union of dictionaries.
        keywords = {**dict(zip(self.parameters, args)), **kwargs}  # noqa: B905
        picked = self.store.pick_mask
        if isinstance(picked, dict):
            return {layers: self.checked(pick(keywords)) for layers, pick in picked.items()}, True
        if picked is not None:
            return self.checked(picked(keywords)), True
        mask = keywords.get("attention_mask")
        if isinstance(mask, Tensor) and mask.ndim == 2:
            return counted(mask), True
        padding = None if self.padding is None else keywords.get(self.padding)
        if isinstance(padding, Tensor) and padding.ndim == 2:  # between torch's modules it is 0, and -inf for padding
            return ~padding if padding.dtype == torch.bool else padding >= 0, True
        # The mask around a decoder that reads an encoder's output is that of the tokens which the encoder has.
        decodes = self.padding == "tgt_key_padding_mask" or keywords.get("encoder_hidden_states") is not None
        return None, self.is_model or (mask is None and decodes)

    @staticmethod
    def checked(mask: Any) -> Tensor | None:
        if isinstance(mask, Tensor) or mask is None:
            return mask
        raise TypeError(f"mask= must give a tensor (batch, seq) or None, found {type(mask).__name__}")


class ModelReturn(Unsaved):
    """Forward hook to a :class:`ModelCall`: a module called by itself afterwards has no mask."""

    def __init__(self, call: ModelCall) -> None:
        self.call = call

    def __call__(self, module: nn.Module, args: Any, output: Any) -> None:
        masks = self.call.store.masks
        if self.call.kept and self.call.kept.pop() and masks:
            masks.pop()


def counted(mask: Tensor) -> Tensor:
    """True where a token counts: where an attention_mask is not 0, or is 0 if it is one that is added to scores."""
    if not mask.is_floating_point():
        return mask.to(torch.bool)
    return torch.where((mask < 0).any(), mask >= 0, mask != 0)


def padding_argument(module: nn.Module) -> str | None:
    """What ``module`` calls its mask of padding, if it is one of torch's."""
    return next((name for kind, name in _PADDING.items() if isinstance(module, kind)), None)


def argument_names(model: nn.Module) -> list[str]:
    """Names of the arguments of the model's call, which DDP and torch.compile hide behind *args."""
    parameters = inspect.signature(model.forward).parameters
    inner = getattr(model, "_orig_mod", getattr(model, "module", None))
    if isinstance(inner, nn.Module) and all(p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD) for p in parameters.values()):
        return argument_names(inner)
    return list(parameters)


def masked_modules(model: nn.Module, names: Iterable[str]) -> list[nn.Module]:
    """The model, and the modules around or at the named ones whose call takes a mask of tokens."""
    around = {".".join(parts[:i]) for parts in (name.split(".") for name in names) for i in range(1, len(parts) + 1)}
    modules = [module for name, module in model.named_modules() if name in around and module is not model]
    return [model, *(m for m in modules if padding_argument(m) or "attention_mask" in argument_names(m))]
