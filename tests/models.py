"""A zoo of small models, each with the layers to tap, a batch and a loss."""

from __future__ import annotations

from collections import OrderedDict, namedtuple
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from transformers import GPT2Config, GPT2LMHeadModel
from transformers.modeling_outputs import BaseModelOutput

VOCABULARY = 31


def itself(h: Tensor) -> Tensor:
    return h


class Block(nn.Module):
    """A residual layer. ``wrap`` makes its output from the hidden tensor."""

    def __init__(self, width: int, wrap: Callable[[Tensor], Any] = itself) -> None:
        super().__init__()
        self.linear = nn.Linear(width, width)
        self.wrap = wrap

    def forward(self, x: Any) -> Any:
        return self.wrap(x + torch.tanh(self.linear(x)))


class MLP(nn.Module):
    """(batch, features) -> logits, or (batch, seq, features) likewise. ``checkpointing`` as for TiedLM."""

    def __init__(self, width: int = 6, depth: int = 3, classes: int = 4, **checkpointing: Any) -> None:
        super().__init__()
        self.checkpointing = checkpointing
        self.blocks = nn.ModuleList(Block(width) for _ in range(depth))
        self.head = nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = checkpoint(block, x, **self.checkpointing) if self.checkpointing else block(x)
        return self.head(x)


class CNN(nn.Module):
    """(batch, 3, height, width) -> logits."""

    def __init__(self) -> None:
        super().__init__()
        self.convolutions = nn.ModuleList([nn.Conv2d(3, 5, 3, padding=1), nn.Conv2d(5, 7, 3, stride=2)])
        self.head = nn.Linear(7, 4)

    def forward(self, x: Tensor) -> Tensor:
        for convolution in self.convolutions:
            x = torch.tanh(convolution(x))
        return self.head(x.flatten(2).mean(-1))


class TiedLM(nn.Module):
    """Tokens -> logits, with one matrix as embedding and output layer, and one block that runs three times.

    With ``checkpointing``, keywords of torch's ``checkpoint``, every block is recomputed in the backward.
    """

    def __init__(self, **checkpointing: Any) -> None:
        super().__init__()
        self.checkpointing = checkpointing
        self.embedding = nn.Embedding(VOCABULARY, 6)
        self.blocks = nn.ModuleList(Block(6) for _ in range(2))
        self.head = nn.Linear(6, VOCABULARY, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        x = self.embedding(input_ids)
        for block in [*self.blocks, self.blocks[1], self.blocks[1]]:
            x = checkpoint(block, x, **self.checkpointing) if self.checkpointing else block(x)
        return self.head(x)


Pair = namedtuple("Pair", ["hidden", "extra"])

WRAPS: dict[str, tuple[Callable[[Tensor], Any], Callable[[Any], Tensor] | None, Callable[[Any], Tensor]]] = {
    "tensor": (lambda h: h, None, lambda out: out),
    "tuple": (lambda h: (h, None), None, lambda out: out[0]),
    "list": (lambda h: [h, "state"], None, lambda out: out[0]),
    "namedtuple": (lambda h: Pair(h, 1), None, lambda out: out.hidden),
    "dict": (lambda h: {"hidden": h, "n": 3}, None, lambda out: out["hidden"]),
    "ordered dict": (lambda h: OrderedDict(hidden=h), None, lambda out: out["hidden"]),
    "dict of several": (
        lambda h: {"last_hidden_state": h, "first": h.detach()},
        None,
        lambda out: out["last_hidden_state"],
    ),
    "ModelOutput": (
        lambda h: BaseModelOutput(last_hidden_state=h),
        None,
        lambda out: out.last_hidden_state,
    ),
    "ModelOutput twice": (
        lambda h: BaseModelOutput(last_hidden_state=h, hidden_states=(h.detach(), h)),
        None,
        lambda out: out.hidden_states[1],
    ),
    "nested": (
        lambda h: {"out": ([torch.zeros(2), h], "x")},
        lambda out: out["out"][0][1],
        lambda out: out["out"][0][1],
    ),
}
"""Kind of output: what makes it, ``output=`` of the hook, and how the model reads its hidden tensor."""


class Wrapping(MLP):
    """An MLP whose blocks return their hidden tensor inside something."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        wrap, self.pick, self.read = WRAPS[kind]
        for block in self.blocks:
            block.wrap = wrap

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = self.read(block(x))
        return self.head(x)


def gpt2(**changes: Any) -> GPT2LMHeadModel:
    """A GPT-2 of two layers with random weights and without dropout, in training mode."""
    settings = {
        "vocab_size": VOCABULARY,
        "n_positions": 32,
        "n_embd": 12,
        "n_layer": 2,
        "n_head": 2,
        "embd_pdrop": 0.0,
        "attn_pdrop": 0.0,
        "resid_pdrop": 0.0,
        "bos_token_id": 0,
        "eos_token_id": 0,
        "use_cache": False,
    }
    return GPT2LMHeadModel(GPT2Config(**(settings | changes))).train()


@dataclass(frozen=True)
class Case:
    """A model, its tapped layers, and a batch: keywords of the model's call, and targets."""

    build: Callable[[], nn.Module]
    layers: str
    batch: Callable[[], dict[str, Tensor]]
    classes: int

    def model(self, dtype: torch.dtype = torch.float32) -> nn.Module:
        torch.manual_seed(1)
        return self.build().to(dtype).train()

    def inputs(self, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
        torch.manual_seed(2)
        batch = self.batch()
        return {key: value.to(dtype) if value.is_floating_point() else value for key, value in batch.items()}

    def loss(self, model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
        """Cross-entropy against fixed random targets, masked tokens ignored, in the model's dtype."""
        output = model(**inputs)
        logits = getattr(output, "logits", output)
        torch.manual_seed(3)
        targets = torch.randint(self.classes, logits.shape[:-1])
        if "attention_mask" in inputs:
            targets = targets.masked_fill(inputs["attention_mask"] == 0, -100)
        return F.cross_entropy(logits.flatten(0, -2), targets.flatten())


def tokens(batch: int = 3, length: int = 13) -> dict[str, Tensor]:
    return {"input_ids": torch.randint(VOCABULARY, (batch, length))}


def masked_tokens() -> dict[str, Tensor]:
    """Right and left padding, a hole, and a sequence with whole windows masked."""
    mask = torch.ones(4, 13, dtype=torch.long)
    mask[0, 10:] = 0
    mask[1, :5] = 0
    mask[2, 4:6] = 0
    mask[3, 3:] = 0
    return {**tokens(4), "attention_mask": mask}


CASES: dict[str, Case] = {
    "mlp": Case(MLP, "blocks.*", lambda: {"x": torch.randn(11, 6)}, 4),
    "mlp wide batch": Case(lambda: MLP(12), "blocks.*", lambda: {"x": torch.randn(7, 12)}, 4),
    "sequence mlp": Case(MLP, "blocks.*", lambda: {"x": torch.randn(3, 10, 6)}, 4),
    "deep": Case(lambda: MLP(depth=5), "blocks.*", lambda: {"x": torch.randn(2, 10, 6)}, 4),
    "cnn": Case(CNN, "convolutions.*", lambda: {"x": torch.randn(3, 3, 7, 7)}, 4),
    "gpt2": Case(gpt2, "transformer.h.*", tokens, VOCABULARY),
    "gpt2 masked": Case(gpt2, "transformer.h.*", masked_tokens, VOCABULARY),
    "tied": Case(TiedLM, "blocks.*", tokens, VOCABULARY),
    "tied masked": Case(TiedLM, "blocks.*", masked_tokens, VOCABULARY),
}

COMPILED: dict[str, Case] = {
    "sequence mlp": Case(lambda: MLP(depth=1), "blocks.*", CASES["sequence mlp"].batch, 4),
    "cnn": CASES["cnn"],
    "gpt2 masked": Case(lambda: gpt2(n_layer=1), "transformer.h.*", masked_tokens, VOCABULARY),
}
"""With as few layers as will do, as torch's compiler takes most of a second for each."""


def recompute_activations(model: Any, *options: Any) -> None:
    """Activation checkpointing of a transformers model, under the name that its version has for it."""
    names = ("activation_checkpointing_enable", "gradient_checkpointing_enable")
    getattr(model, next(name for name in names if hasattr(model, name)))(*options)


def adapted(model: Any, adapters: Any) -> Any:
    """``model`` with peft's ``adapters``; a skip where peft refuses the newest torchao that an older torch has."""
    peft = pytest.importorskip("peft")
    try:
        return peft.get_peft_model(model, adapters)
    except ImportError as error:
        if "incompatible version of torchao" in str(error):
            pytest.skip(str(error))
        raise
