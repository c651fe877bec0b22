"""What a model is run on: batches of any kind, moved to where it is, and a digest of them."""

from __future__ import annotations

import contextlib
import hashlib
import inspect
import re
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

MOST_PROMPTS = 64
"""Sequences whose own beginnings and entropies are kept."""


def device_of(model: nn.Module) -> torch.device:
    """Where the model takes its inputs: of a model on several devices, or on disk, that is its embedding's place."""
    with contextlib.suppress(AttributeError, NotImplementedError, TypeError):
        device = model.get_input_embeddings().weight.device  # type: ignore[operator]
        if device.type != "meta":
            return torch.device(device)
    devices = (parameter.device for parameter in model.parameters())
    return next((device for device in devices if device.type != "meta"), torch.device("cpu"))


def caller(model: nn.Module, call: Callable[[nn.Module, Any], Any] | None) -> Callable[[nn.Module, Any], Any]:
    """What runs the model on a batch."""
    if call is not None:
        return call
    with contextlib.suppress(TypeError, ValueError):
        # A cache of keys and values for generation would only cost memory.
        if "use_cache" in inspect.signature(model.forward).parameters:
            return lambda model, batch: _called(model, batch, use_cache=False)
    return _called


def _called(model: nn.Module, batch: Any, **more: Any) -> Any:
    if isinstance(batch, Mapping):
        return model(**{**more, **batch})
    if not isinstance(batch, tuple | list):
        return model(batch, **more)
    try:
        return model(batch[0], **more)
    except TypeError as error:
        # The words of Python. The signature would not do: a wrapper of the model takes any arguments.
        if not re.search(r"missing \d+ required positional argument", str(error)):
            raise
        raise TypeError(
            f"{error}; of a {type(batch).__name__} in batches only the first item is passed to the model; for several "
            "arguments give a dict, with their names as keys"
        ) from error


def batch_of_texts(batch: Any, tokenizer: Any) -> Any:
    """Texts as ids and their mask, anything else as it is."""
    texts = [batch] if isinstance(batch, str) else batch
    if not isinstance(texts, tuple | list) or not texts or not all(isinstance(text, str) for text in texts):
        return batch
    if tokenizer is None:
        raise ValueError("batches holds texts; pass tokenizer=, such as AutoTokenizer.from_pretrained(folder)")
    encoded = [tokenizer(text, truncation=True, verbose=False)["input_ids"] for text in texts]
    return padded(encoded, tokenizer.pad_token_id)


def padded(sequences: list[list[int]], pad: int | None) -> dict[str, Tensor]:
    """``input_ids`` and ``attention_mask`` of sequences of ids, padded on the right."""
    fill = 0 if pad is None else pad  # masked: which token stands there does not matter
    ids = pad_sequence([torch.tensor(sequence) for sequence in sequences], batch_first=True, padding_value=fill)
    lengths = torch.tensor([len(sequence) for sequence in sequences])
    return {"input_ids": ids, "attention_mask": (torch.arange(ids.shape[1]) < lengths.unsqueeze(1)).long()}


def inputs_of(batch: Any) -> dict[str, Any]:
    """What a batch passes to a model, by keyword, or as "": of a tuple or list the first item alone."""
    if isinstance(batch, Mapping):
        return dict(batch)
    if isinstance(batch, tuple | list):
        return {"": batch[0] if batch else None}
    return {"": batch}


def moved(value: Any, device: torch.device, dtype: torch.dtype | None) -> Any:
    """Tensors in ``value`` on ``device``, those of floating point as ``dtype``."""
    if isinstance(value, Tensor):
        return value.to(device, dtype if dtype is not None and value.is_floating_point() else value.dtype)
    if isinstance(value, Mapping):
        return {key: moved(item, device, dtype) for key, item in value.items()}
    if isinstance(value, tuple | list) and not hasattr(value, "_fields"):
        return type(value)(moved(item, device, dtype) for item in value)
    return value


class DataSeen:
    """The batches so far: their number, a digest of their samples, and how the first ones begin."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self._hash = hashlib.blake2b(digest_size=12)
        self.batches = self.batch_size = 0
        self.length: int | None = None
        self.prompts: list[str] = []

    def add(self, batch: Any) -> Tensor | None:
        """One batch; returns its token ids (batch, length), where it has them."""
        self.batches += 1
        inputs = inputs_of(batch)
        self._add_samples(inputs)
        ids = inputs.get("input_ids", inputs.get(""))
        if not isinstance(ids, Tensor) or ids.ndim != 2 or ids.is_floating_point():
            return None
        self.length = max(self.length or 0, ids.shape[1])
        if self.tokenizer is not None and len(self.prompts) < MOST_PROMPTS:
            self.prompts += [self.tokenizer.decode(row[:24], skip_special_tokens=True)[:80] for row in ids]
        return ids

    def _add_samples(self, inputs: dict[str, Any]) -> None:
        found = {key: value for key, value in sorted(inputs.items()) if isinstance(value, Tensor) and value.ndim}
        tensors = {key: value.detach().cpu() for key, value in found.items()}
        mask = tensors.pop("attention_mask", None)
        size = len(next(iter(tensors.values()), torch.zeros(0)))
        self.batch_size = max(self.batch_size, size)
        for i in range(size):
            for key, value in tensors.items():
                sample = value[i] if len(value) == size else value
                if mask is not None and mask.shape == value.shape[:2]:
                    sample = sample[mask[i].bool()]
                self._hash.update(f"{key} {sample.dtype} {list(sample.shape)}".encode())
                self._hash.update(sample.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())

    def digest(self) -> str:
        """Of the samples without their padding: how they are batched and padded changes nothing."""
        return self._hash.hexdigest()
