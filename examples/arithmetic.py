"""Multiplication, trained on factors of 1 to 3 digits and tested on 4 to 6, plain and with GAPT.

python examples/arithmetic.py                                 # 5 minutes on two CPU cores
python examples/arithmetic.py --preset minutes                # one minute
python examples/arithmetic.py --preset paper --device cuda    # 12 layers of width 768
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
import tyro
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import GPT2Config, GPT2LMHeadModel

import comparison
from gapt_optim import (
    EntropyConfig,
    GAPTConfig,
    GAPTOptimizer,
    GateConfig,
    JSONLines,
    Measures,
    ObjectiveConfig,
    ProgressBar,
    RepresentationHook,
)

# ------------------------------------------------------------------------------------------------
# Settings


@dataclass
class Settings:
    """Multiplication beyond the trained lengths. What is not given comes from the preset."""

    preset: Literal["minutes", "small", "paper"] = "small"
    methods: tuple[Literal["plain", "penalty", "published", "gapt"], ...] = ("plain", "gapt")
    out: str = "runs/arithmetic"  # folder for everything that is written
    overwrite: bool = False  # replace the run in --out
    seed: int = 100  # of weights, problems and test sets; these settings were tuned on 0 to 9

    # Model
    layers: int = 4
    width: int = 128
    heads: int = 4

    # Training
    steps: int = 700  # optimizer steps
    batch_size: int = 128  # problems in a step
    lr: float = 1e-3  # highest learning rate
    warmup: int = 50  # steps of linear warm-up, in half a cosine to a tenth
    weight_decay: float = 0.1

    # GAPT: the settings that people change first; GAPTConfig has them all
    weight: float = 0.03  # of the entropy in compression, per nat
    kernel: Literal["cosine", "linear"] = "cosine"  # linear is the paper's
    window: int | None = 8  # tokens in a matrix; None: the whole problem
    patience_memorization: int = 15  # steps in which the loss does not fall before compression
    patience_compression: int = 25  # steps in which the entropy does not fall before memorization

    eval_every: int = 50  # steps between evaluations
    problems: int = 512  # in each of the evaluation sets
    device: str = "cpu"  # or cuda


PRESETS: dict[str, dict[str, Any]] = {
    "minutes": {"layers": 2, "width": 96, "steps": 300, "problems": 256},
    "small": {},
    "paper": {
        "layers": 12, "width": 768, "heads": 12, "steps": 20_000, "batch_size": 512,
        "lr": 3e-4, "warmup": 1000,
    },
}  # fmt: skip


def config_of(s: Settings, method: str) -> GAPTConfig:
    """One loop trains all methods, which differ in this alone."""
    entropy = EntropyConfig(kernel=s.kernel, window=s.window)
    objective = ObjectiveConfig(weight=s.weight)
    if method == "plain":  # never compresses: the bare optimizer, bit for bit
        return GAPTConfig.plain(entropy=entropy, objective=objective)
    if method == "penalty":  # always compresses
        return GAPTConfig.penalty(entropy=entropy, objective=objective)
    if method == "published":  # the author's late protocol
        return GAPTConfig.published()
    gate = GateConfig(
        patience_memorization=s.patience_memorization, patience_compression=s.patience_compression
    )
    return GAPTConfig(entropy=entropy, objective=objective, gate=gate)


# ------------------------------------------------------------------------------------------------
# The task: "B12x3=36E" and padding

SYMBOLS = "0123456789x=BEP"  # B, E and P stand for <bos>, <eos> and padding
PADDING = SYMBOLS.index("P")
IGNORED = -100
CONTEXT = (
    2 * 6 + 12 + 4
)  # two factors of six digits and their product, between <bos>, x, = and <eos>
TRAINING, VALIDATION, TEST = 0, 1, 2


def part(a: Tensor, b: Tensor) -> Tensor:
    """A twentieth is for validation and one for tests; a x b is where b x a is."""
    mixed = (torch.minimum(a, b) * 7919 + torch.maximum(a, b) * 104_729 + 12_345) % 1_000_003
    bucket = (mixed * mixed) % 1_000_003 % 20
    return torch.where(bucket == 0, VALIDATION, torch.where(bucket == 1, TEST, TRAINING))


def draw(
    count: int, digits: tuple[int, int], wanted: int | None, generator: torch.Generator
) -> list[tuple[int, int]]:
    """Problems whose factors each have a number of digits drawn evenly from `digits`."""
    found: list[tuple[int, int]] = []
    while len(found) < count:
        length = torch.randint(digits[0], digits[1] + 1, (2, 32 * count), generator=generator)
        least = torch.where(length == 1, 0, 10 ** (length - 1))
        share = torch.rand(length.shape, generator=generator, dtype=torch.float64)
        factors = least + (share * (10**length - least)).long()
        if wanted is not None:
            factors = factors[:, part(factors[0], factors[1]) == wanted]
        found += [(a, b) for a, b in factors.T[: count - len(found)].tolist()]
    return found


class Problems(NamedTuple):
    ids: Tensor  # padded on the right
    mask: Tensor  # 1 where a token is not padding
    targets: Tensor  # the next token within the answer, <eos> included; IGNORED elsewhere


def encode(pairs: Sequence[tuple[int, int]]) -> Problems:
    texts = [f"B{a}x{b}={a * b}E" for a, b in pairs]
    width = max(len(text) for text in texts)
    ids = torch.tensor([[SYMBOLS.index(c) for c in text.ljust(width, "P")] for text in texts])
    equals = torch.tensor([[text.index("=")] for text in texts])
    in_answer = (torch.arange(width - 1) >= equals) & (ids[:, 1:] != PADDING)
    targets = torch.where(in_answer, ids[:, 1:], IGNORED)
    return Problems(ids, (ids != PADDING).long(), targets)


def evaluation_sets(s: Settings, generator: torch.Generator) -> dict[str, Problems]:
    return {
        "validation": encode(draw(s.problems, (1, 3), VALIDATION, generator)),  # to choose settings
        "test": encode(draw(s.problems, (1, 3), TEST, generator)),
        "longer": encode(draw(s.problems, (4, 6), None, generator)),
    }


# ------------------------------------------------------------------------------------------------
# Model and evaluation


def build_model(s: Settings) -> nn.Module:
    """GPT-2 with random weights."""
    config = GPT2Config(
        vocab_size=len(SYMBOLS),
        n_layer=s.layers,
        n_embd=s.width,
        n_head=s.heads,
        n_positions=CONTEXT,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        activation_function="gelu_pytorch_tanh",
        use_cache=False,
        bos_token_id=0,
        eos_token_id=0,
    )
    return GPT2LMHeadModel(config)


def answers(model: nn.Module, problems: Problems) -> tuple[Tensor, Tensor]:
    """Logits of every answer token (answer tokens, symbols), and what they should be."""
    device = next(model.parameters()).device
    ids, mask, targets = (tensor.to(device) for tensor in problems)
    # The hook reads the mask: padding has no part in an entropy.
    logits = model(input_ids=ids, attention_mask=mask).logits[:, :-1]
    answered = targets != IGNORED
    return logits[answered].float(), targets[answered]


@torch.no_grad()
def evaluate(s: Settings, model: nn.Module, hook: Any, problems: Problems) -> dict[str, Any]:
    """Loss, share of exact answers, and entropies."""
    model.eval()
    with hook.measuring(config_of(s, "plain").entropy) as measured:
        logits, targets = answers(model, problems)
    model.train()
    answered = problems.targets != IGNORED
    right = torch.ones_like(answered)
    right[answered] = (logits.argmax(-1) == targets).cpu()
    return {
        "loss": cross_entropy(logits, targets).item(),
        # Greedy decoding is exact if every token is right given the right ones before it.
        "accuracy": right.all(-1).float().mean().item(),
        "entropy": measured.mean,
        "measures": asdict(Measures.mean(measured.measures.values())),
        "layer_entropy": measured.entropies,
        "layer_measures": {name: asdict(of) for name, of in measured.measures.items()},
    }


# ------------------------------------------------------------------------------------------------
# Training


def train(s: Settings, method: str, folder: Path) -> dict[str, Any]:
    """One method. The seed decides weights, problems and test sets, for all of them alike."""
    generator = torch.Generator().manual_seed(s.seed)
    sets = evaluation_sets(s, generator)
    torch.manual_seed(s.seed)
    model = build_model(s).to(s.device)

    log = JSONLines(folder / "metrics.jsonl")
    bar = ProgressBar(s.steps, desc=method, leave=False, disable=None)
    hook = RepresentationHook(model, "transformer.h.*")
    adamw = torch.optim.AdamW(
        model.parameters(), s.lr, betas=(0.9, 0.98), weight_decay=s.weight_decay, fused=True
    )
    optimizer = GAPTOptimizer(adamw, hook, config_of(s, method), observers=[log, bar])

    def rate(step: int) -> float:
        cosine = 0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * (step / s.steps)))
        return min((step + 1) / (s.warmup + 1), cosine)

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
    model.train()
    with log, bar:
        for step in range(1, s.steps + 1):
            problems = encode(draw(s.batch_size, (1, 3), TRAINING, generator))
            loss = cross_entropy(*answers(model, problems))
            optimizer.backward(loss)  # was: loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            if step % s.eval_every == 0 or step == s.steps:
                found = {name: evaluate(s, model, hook, each) for name, each in sets.items()}
                values = {"step": step, **found["test"], **found}
                with (folder / "validation.jsonl").open("a") as file:
                    file.write(json.dumps(values) + "\n")
    return values


def main() -> None:
    given = tyro.cli(Settings)
    s = tyro.cli(Settings, default=Settings(preset=given.preset, **PRESETS[given.preset]))
    if s.steps < 1 or s.heads < 1 or s.width % s.heads:
        raise SystemExit("--steps must be at least 1, and --width a multiple of --heads")
    configs: dict[str, GAPTConfig] = {method: config_of(s, method) for method in s.methods}
    out = Path(s.out)
    comparison.check_folder(out, overwrite=s.overwrite)
    comparison.begin_folder(out, asdict(s), configs)
    results: dict[str, dict[str, Any]] = {}
    for method in s.methods:
        print(f"Multiplication, {method}, {s.steps} steps.", flush=True)
        held_out = train(s, method, out / method)
        result = comparison.result_of(out / method, held_out)
        result["exact"] = held_out["test"]["accuracy"]
        result["longer_loss"] = held_out["longer"]["loss"]
        results[method] = result
    more = {"exact answers (share)": "exact", "loss on longer factors": "longer_loss"}
    comparison.conclude(out, results, more)


if __name__ == "__main__":
    main()
