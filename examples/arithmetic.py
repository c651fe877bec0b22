"""Multiplication, trained on factors of 1-3 digits and tested on 4-6 digits, with and without compression.

python examples/arithmetic.py                                      # plain training and GAPT, one after the other
python examples/arithmetic.py --preset paper --device cuda         # 12 layers of width 768
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Sequence
from typing import Annotated, Any, Literal, NamedTuple

import tyro
from pydantic import BaseModel, ConfigDict, Field

MINUTES = {"layers": 2, "width": 96, "steps": 300, "problems": 256}
PAPER = {
    "layers": 12,
    "width": 768,
    "heads": 12,
    "steps": 20_000,
    "batch": 512,
    "lr": 3e-4,
    "warmup": 1000,
}
Method = Literal["plain", "penalty", "published", "gapt"]
NAME = tyro.conf.arg(metavar="NAME")  # keeps --help short


class Config(BaseModel):
    """Multiplication beyond trained lengths, with and without GAPT. GAPTConfig's settings are flags too:
    --gapt.objective.weight 0.3 and so on; --gapt.help lists them."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    preset: Literal["minutes", "small", "paper"] = "small"  # Gives other defaults.
    methods: Annotated[tuple[Method, ...], NAME] = ("plain", "gapt")  # Also penalty and published.
    out: str = "runs/arithmetic"  # Folder for everything that is written.
    overwrite: bool = False  # Replace the run in --out.
    quiet: bool = False  # No progress bars.
    seed: int = Field(
        100, ge=0, lt=2**62
    )  # Of weights, problems and test sets; settings were tuned on 0 to 9.
    layers: int = Field(4, ge=1)  # Of GPT-2.
    width: int = Field(128, ge=1)  # Of a layer.
    heads: int = Field(4, ge=1)  # Of attention.
    steps: int = Field(700, ge=1)  # Optimizer steps.
    batch: int = Field(128, ge=1)  # Problems in a step.
    lr: float = Field(1e-3, gt=0, allow_inf_nan=False)  # Highest learning rate.
    warmup: int = Field(50, ge=0)  # Steps of linear warm-up.
    weight_decay: float = Field(0.1, ge=0, allow_inf_nan=False)  # Of all parameters.
    positions: Literal["first", "random"] = (
        "first"  # Where training problems begin; random trains all positions.
    )
    evaluate_every: int = Field(50, ge=1)  # Steps between evaluations.
    problems: int = Field(512, ge=1)  # Problems in each of the validation and test sets.
    device: str = "cpu"  # cpu, cuda, ...


if __name__ == "__main__" and {"-h", "--help"} & set(
    sys.argv
):  # answers before torch, which takes seconds to load
    tyro.cli(Config, config=(tyro.conf.FlagCreatePairsOff,))

import torch
from torch import Tensor, nn

from gapt_optim import GAPTConfig, GAPTOptimizer, Measures, RepresentationHook, runs
from gapt_optim import viewing as view

SYMBOLS = "0123456789x=BEP"  # B, E and P stand for <bos>, <eos> and padding
PADDING, IGNORED, TRAINING, VALIDATION, TEST = SYMBOLS.index("P"), -100, 0, 1, 2
CONTEXT = (
    2 * 6 + 12 + 4
)  # two factors of six digits and their product, between <bos>, x, = and <eos>


def part(a: Tensor, b: Tensor) -> Tensor:
    """Which set a problem belongs to, in either order: a twentieth is for validation, a twentieth for tests."""
    mixed = (torch.minimum(a, b) * 7919 + torch.maximum(a, b) * 104_729 + 12_345) % 1_000_003
    bucket = (mixed * mixed) % 1_000_003 % 20
    return torch.where(bucket == 0, VALIDATION, torch.where(bucket == 1, TEST, TRAINING))


def draw(
    count: int, digits: tuple[int, int], wanted: int | None, generator: torch.Generator
) -> list[tuple[int, int]]:
    """``count`` problems whose factors each have a number of digits drawn evenly from ``digits``."""
    found: list[tuple[int, int]] = []
    while len(found) < count:
        length = torch.randint(digits[0], digits[1] + 1, (2, 32 * count), generator=generator)
        least = torch.where(length == 1, 0, 10 ** (length - 1))
        factors = (
            least
            + (
                torch.rand(length.shape, generator=generator, dtype=torch.float64)
                * (10**length - least)
            ).long()
        )
        if wanted is not None:
            factors = factors[:, part(factors[0], factors[1]) == wanted]
        found += [(a, b) for a, b in factors.T[: count - len(found)].tolist()]
    return found


class Problems(NamedTuple):
    ids: Tensor  # padded on the right
    mask: Tensor  # 1 where a token is not padding
    targets: Tensor  # the next token within the answer, <eos> included; IGNORED elsewhere
    positions: Tensor  # place of each token in the context


def encode(pairs: Sequence[tuple[int, int]], starts: torch.Generator | None = None) -> Problems:
    """``starts`` draws where in the context each problem begins; without it that is its first position."""
    width = max(map(len, texts := [f"B{a}x{b}={a * b}E" for a, b in pairs]))
    ids = torch.tensor([[SYMBOLS.index(c) for c in text.ljust(width, "P")] for text in texts])
    start, place = torch.tensor([[text.index("=")] for text in texts]), torch.arange(width)
    targets = torch.where((place[:-1] >= start) & (ids[:, 1:] != PADDING), ids[:, 1:], IGNORED)
    first = torch.zeros(len(ids), 1, dtype=torch.long)
    if starts is not None:
        first = torch.randint(CONTEXT - width + 1, first.shape, generator=starts)
    return Problems(ids, (ids != PADDING).long(), targets, first + place)


def build_model(config: Config) -> nn.Module:
    """GPT-2 with random weights, drawn from torch's global generator."""
    from transformers import GPT2Config, GPT2LMHeadModel

    size = {
        "n_layer": config.layers,
        "n_embd": config.width,
        "n_head": config.heads,
        "n_positions": CONTEXT,
    }
    rest: dict[str, Any] = {
        **size,
        **dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0),
    }
    rest |= {
        "activation_function": "gelu_pytorch_tanh",
        "use_cache": False,
        "bos_token_id": 0,
        "eos_token_id": 0,
    }
    return GPT2LMHeadModel(GPT2Config(vocab_size=len(SYMBOLS), **rest))


def answers(model: nn.Module, problems: Problems) -> tuple[Tensor, Tensor]:
    """Logits of every answer token (answer tokens, symbols), and what they should be."""
    ids, mask, targets, positions = (
        tensor.to(next(model.parameters()).device) for tensor in problems
    )
    logits: Tensor = model(input_ids=ids, attention_mask=mask, position_ids=positions).logits[
        :, :-1
    ]
    return logits[targets != IGNORED].float(), targets[targets != IGNORED]


@torch.no_grad()
def evaluate(
    model: nn.Module, hook: RepresentationHook, problems: Problems, gapt: GAPTConfig
) -> dict[str, Any]:
    """Loss, exact-match accuracy, calibration, loss and accuracy of each digit, entropies and their measures."""
    model.eval()
    with hook.measuring(gapt.entropy) as measured:
        logits, targets = (tensor.cpu() for tensor in answers(model, problems))
    model.train()
    right = torch.ones_like(answered := problems.targets != IGNORED)
    probability, guess = logits.softmax(-1).max(-1)
    right[answered] = guess == targets
    position, hits = (answered.cumsum(-1) - 1)[answered], (guess == targets).float()
    calibration = torch.bincount((probability * 10).long().clamp(max=9), probability - hits, 10)
    losses, counts = (
        nn.functional.cross_entropy(logits, targets, reduction="none"),
        torch.bincount(position),
    )
    return {
        "loss": losses.mean().item(),
        # Greedy decoding writes the exact answer if and only if every token is right given the right ones before it.
        "accuracy": right.all(-1).float().mean().item(),
        "calibration": (
            calibration.abs().sum() / len(hits)
        ).item(),  # mean gap between how sure and how often right
        "digits": (torch.bincount(position, hits) / counts).tolist(),
        "digit_losses": (torch.bincount(position, losses) / counts).tolist(),
        "entropy": measured.mean,
        "layer_entropy": measured.entropies,
        "layer_measures": measured.measures,
        "measures": Measures.mean(measured.measures.values()),
    }


def train(
    config: Config,
    gapt: GAPTConfig,
    method: str,
    record: Callable[[Any], None] = lambda metrics: None,
) -> dict[str, Any]:
    """One run and its evaluations. The seed alone decides weights, problems and test sets, so methods share them."""
    device, generator = runs.pick_device(config.device), torch.Generator().manual_seed(config.seed)
    kinds = (
        ("validation", (1, 3), VALIDATION),
        ("id", (1, 3), TEST),
        ("ood", (4, 6), None),
    )  # short, short, longer
    sets = {
        name: encode(draw(config.problems, digits, wanted, generator))
        for name, digits, wanted in kinds
    }
    starts = (
        torch.Generator().manual_seed(config.seed + 1_000_003)
        if config.positions == "random"
        else None
    )
    torch.manual_seed(config.seed)
    model, history = build_model(config).to(device).train(), []
    base = torch.optim.AdamW(
        model.parameters(), config.lr, (0.9, 0.98), weight_decay=config.weight_decay, fused=True
    )

    def rate(step: int) -> float:
        cosine = 0.1 + (1 - 0.1) * 0.5 * (1 + math.cos(math.pi * (step / config.steps)))
        return min((step + 1) / (config.warmup + 1), cosine)

    with RepresentationHook(model, "transformer.h.*") as hook:
        optimizer = GAPTOptimizer(base, hook, runs.config_of(method, gapt))  # plain: a frozen gate
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
        for step in range(1, config.steps + 1):
            problems = encode(draw(config.batch, (1, 3), TRAINING, generator), starts)
            loss = nn.functional.cross_entropy(*answers(model, problems))
            optimizer.backward(loss)  # was: loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            record(optimizer.metrics)
            if step % config.evaluate_every == 0 or step == config.steps:
                history.append(
                    {
                        "step": step,
                        **{n: evaluate(model, hook, each, gapt) for n, each in sets.items()},
                    }
                )
    last: Any = optimizer.metrics
    return {
        "history": history,
        "compression_share": last.compression_steps / config.steps,
        "switches": last.switches,
    }


def main() -> None:
    config, gapt, folder = runs.open_run(Config, sys.argv[1:], {"minutes": MINUTES, "paper": PAPER})
    if config.width % config.heads:
        raise runs.CommandError(
            f"--width: must be a multiple of --heads {config.heads}, found {config.width}"
        )
    runs.pick_device(config.device)
    settings, results = {"config": config.model_dump(), "gapt": gapt.model_dump()}, {}
    folder.begin(settings, children=config.methods, replace=config.overwrite)
    for method in config.methods:
        child = folder.child(method)
        with child.recording(0, config.steps, name=method, quiet=config.quiet) as record:
            results[method] = train(config, gapt, method, record)["history"]
        for point in results[method]:
            child.append(
                "validation.jsonl", {"step": point["step"], **point["id"], "longer": point["ood"]}
            )
    view.conclude(folder, config.methods, settings)
    for method, (*_, last) in results.items():
        print(
            f"{method}: exact answers {last['id']['accuracy']:.1%}, on longer factors {last['ood']['loss']:.3f} nats"
        )


if __name__ == "__main__":
    runs.run_script(main)
