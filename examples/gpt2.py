"""GPT-2 with random weights, from a toy that a CPU trains in minutes to the published sizes."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

# transformers imports torchao where it is installed, whose GPU libraries do not load on every machine. GPT-2
# uses none of it, so its remarks are noise.
for _name in ("torchao", "torch.utils._pytree"):
    logging.getLogger(_name).setLevel(logging.ERROR)


@dataclass(frozen=True)
class Preset:
    """A model size with training settings that suit it. Any of them can be overridden by a flag."""

    layers: int
    width: int
    heads: int
    vocabulary: int | None
    """Tokens of the BPE to learn from the corpus; None: GPT-2's own."""
    context: int
    batch_size: int
    accumulation: int
    steps: int
    warmup: int
    lr: float
    patience_compression: int | None = None
    """Of the gate, in steps, where the library's is long for a run of a few hundred steps."""

    @property
    def size(self) -> tuple[int, int, int]:
        """Layers, width and heads."""
        return self.layers, self.width, self.heads


PRESETS = {
    "nano": Preset(  # 0.4M parameters: half a minute on two cores
        3,
        64,
        2,
        4096,
        context=128,
        batch_size=8,
        accumulation=1,
        steps=300,
        warmup=20,
        lr=4e-3,
        patience_compression=12,
    ),
    "micro": Preset(  # 2.6M: two minutes
        4,
        192,
        3,
        4096,
        context=128,
        batch_size=16,
        accumulation=1,
        steps=400,
        warmup=30,
        lr=2e-3,
        patience_compression=12,
    ),
    "mini": Preset(  # 14M: for a GPU, or patience
        6, 384, 6, 8192, context=256, batch_size=32, accumulation=1, steps=4000, warmup=200, lr=1e-3
    ),
    "small": Preset(  # GPT-2, 124M
        12, 768, 12, None, context=1024, batch_size=16, accumulation=16, steps=10000, warmup=500, lr=6e-4
    ),
    "sprint": Preset(  # the same in 33 million tokens: sized for a comparison in minutes on one H100, with --compile
        12, 768, 12, None, context=1024, batch_size=32, accumulation=1, steps=1000, warmup=100, lr=6e-4
    ),
    "medium": Preset(  # GPT-2 medium, 355M
        24, 1024, 16, None, context=1024, batch_size=8, accumulation=32, steps=10000, warmup=500, lr=3e-4
    ),
    "large": Preset(  # GPT-2 large, 774M
        36, 1280, 20, None, context=1024, batch_size=4, accumulation=64, steps=10000, warmup=500, lr=2.5e-4
    ),
}


def build(
    layers: int, width: int, heads: int, *, vocabulary: int, separator: int, context: int, dropout: float
) -> nn.Module:
    """A `GPT2LMHeadModel` with random weights, drawn from torch's global generator."""
    from transformers import GPT2Config, GPT2LMHeadModel

    return GPT2LMHeadModel(
        GPT2Config(
            vocab_size=vocabulary,
            n_positions=context,
            n_embd=width,
            n_layer=layers,
            n_head=heads,
            activation_function="gelu_pytorch_tanh",  # GPT-2's own (gelu_new) as one kernel
            resid_pdrop=dropout,
            embd_pdrop=dropout,
            attn_pdrop=dropout,
            bos_token_id=separator,
            eos_token_id=separator,
            use_cache=False,
        )
    )


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Weight decay for matrices only, as GPT-2 is usually trained: gains and biases keep their scale."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    return [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]


def token_loss(model: nn.Module, inputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Mean cross-entropy of the next token, in nats."""
    logits = model(input_ids=inputs).logits
    return nn.functional.cross_entropy(logits.float().flatten(0, 1), targets.flatten())
