"""Training of one run: one function of configuration, seed and method, which returns a dictionary of results.

A run leaves in its folder ``metrics.jsonl`` (a line per step), ``validation.jsonl`` (a line per validation) and
``checkpoint.pt``, from which it goes on exactly as if it had never stopped.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from checkpoints import forget_after, load_checkpoint, save_checkpoint, stop_after_step
from corpus import Batches, Corpus, validation_batches
from errors import StoppedError, UserError, first_line
from gpt2 import PRESETS, build, token_loss
from methods import cosine, of_method
from optimizers import OptimizerName, check_optimizer, make_optimizers, state_bytes
from parallel import ALONE, Parallel, Ranks, clip_gradients, gradient_sync, parallelize
from pydantic import BaseModel, ConfigDict, Field
from speedups import check_compiler, check_float8, keep_freed_memory, to_float8
from torch import nn

from gapt_optim import GAPTConfig, GAPTOptimizer, Phase, RepresentationHook
from gapt_optim.metrics import JSONLines, ProgressBar, StepMetrics


class TrainConfig(BaseModel):
    """Everything that decides how a run goes, besides corpus, seed and method."""

    model_config = ConfigDict(extra="forbid", frozen=True, ser_json_inf_nan="constants")

    preset: Literal["nano", "micro", "mini", "small", "sprint", "medium", "large"] = "micro"
    context: int = Field(ge=2)
    steps: int = Field(ge=1)
    batch_size: int = Field(ge=1)
    accumulation: int = Field(ge=1)
    lr: float = Field(gt=0.0, allow_inf_nan=False)
    warmup: int = Field(ge=0)
    final_lr: float = Field(0.1, ge=0.0, le=1.0)
    """Learning rate at the end, as a share of the highest."""
    weight_decay: float = Field(0.1, ge=0.0, allow_inf_nan=False)
    beta2: float = Field(0.95, ge=0.0, lt=1.0)
    clip: float = Field(1.0, gt=0.0)
    """Largest norm of the gradient."""
    dropout: float = Field(0.0, ge=0.0, lt=1.0)
    eval_every: int = Field(50, ge=1)
    eval_sequences: int = Field(128, ge=1)
    checkpoint_every: int = Field(100, ge=1)
    device: str = "auto"
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    layers: str = "transformer.h.*"
    optimizer: OptimizerName = "adamw"
    compile: bool = False
    float8: bool = False
    parallel: Parallel = "none"
    gapt: GAPTConfig = GAPTConfig()
    cooldown: float = Field(0.15, ge=0.0, le=1.0)
    """Share of the steps, at the end, in which a gate on validations starts no compression: it is strong then, and
    the loss takes some steps to come back."""


def check_layers(config: TrainConfig, corpus: Corpus) -> None:
    """Refuses a --layers that fits no module, on a model without memory, so that nothing is lost by it."""
    with torch.device("meta"):
        model = build_model(config, corpus)
    try:
        RepresentationHook(model, config.layers).remove()
    except ValueError as error:
        raise UserError(f"--layers: {error}") from error


def build_model(config: TrainConfig, corpus: Corpus) -> nn.Module:
    """The preset's GPT-2, for the vocabulary of the corpus."""
    return build(
        *PRESETS[config.preset].size,
        vocabulary=corpus.vocabulary,
        separator=corpus.separator,
        context=config.context,
        dropout=config.dropout,
    )


def train(
    config: TrainConfig,
    corpus: Corpus,
    *,
    seed: int,
    method: str,
    folder: Path,
    resume: bool = False,
    progress: bool = True,
    on_step: Callable[[], object] = lambda: None,
    ranks: Ranks = ALONE,
) -> dict[str, Any]:
    """Trains one model and returns its results.

    Several ranks train it together: each takes a part of every step's sequences, and the results are those of one
    process with the same configuration, to the rounding of sums.

    Args:
        resume: go on from the checkpoint in ``folder``, if there is one.
        progress: show a progress bar.
        on_step: called after every step.
        ranks: the processes that call this together.

    Raises:
        UserError: the checkpoint to resume from is of another model, or the loss is no longer finite.
        StoppedError: Ctrl-C. A checkpoint of the last whole step is written first.
    """
    device = pick_device(config.device, ranks)
    torch.set_float32_matmul_precision("high")  # lets a GPU use its tensor cores; no effect on a CPU
    if device.type == "cpu":
        keep_freed_memory()
    micro_batches, batch_size = ranks.divide(config.accumulation, config.batch_size)
    torch.manual_seed(seed)
    model = build_model(config, corpus).to(device)
    if config.float8:
        to_float8(model)
    wrapped_model = parallelize(model, config.parallel, device, ranks)
    hook = RepresentationHook(model, config.layers)
    bases = make_optimizers(config.optimizer, model, lr=config.lr, weight_decay=config.weight_decay, beta2=config.beta2)
    settings = of_method(method, config.gapt)
    # Plain training gets the bare optimizers: the hook then only measures, at validations.
    gapt = None if settings is None else GAPTOptimizer(bases[0] if len(bases) == 1 else bases, hook, settings)
    optimizers = bases if gapt is None else [gapt]
    schedulers = [
        torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: learning_rate_factor(step, config.steps, config.warmup, config.final_lr)
        )
        for optimizer in optimizers
    ]
    if config.compile:
        torch.compiler.reset()  # what was compiled for the run before, of which only a few versions are kept
        wrapped_model.compile()
    batches = Batches(corpus.train, config.context, batch_size, seed)
    held_out = list(
        validation_batches(
            corpus.validation,
            config.context,
            config.batch_size,
            config.eval_sequences,
            first=ranks.rank,
            every=ranks.world,
        )
    )
    rounds = math.ceil(ranks.sum(torch.tensor(len(held_out))).item() / ranks.world)
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=use_bfloat16(config.dtype, device))

    state: dict[str, Any] = {"step": 0, "seconds": 0.0, "switches": [], "compression_steps": 0}
    preset = PRESETS[config.preset]
    identity = {
        "layers": preset.layers,
        "width": preset.width,
        "heads": preset.heads,
        "vocabulary": corpus.vocabulary,
        "context": config.context,
        "method": method,
        "seed": seed,
        "optimizer": config.optimizer,
        "float8": config.float8,
    }
    checkpoint = folder / "checkpoint.pt"
    folder.mkdir(parents=True, exist_ok=True)
    if resume and ranks.on_first(checkpoint.exists):
        state = load_checkpoint(checkpoint, identity, model, optimizers, schedulers, ranks)
    if ranks.first:
        forget_after(folder / "metrics.jsonl", state["step"])
        # A validation is taken after the step's checkpoint.
        forget_after(folder / "validation.jsonl", state["step"] - 1)

    def save() -> None:
        save_checkpoint(checkpoint, state, identity, model, optimizers, schedulers, ranks)

    def validate() -> dict[str, Any]:
        """Loss and entropies on held-out text, of all ranks' batches, written down and told to the gate."""
        model.eval()
        total = 0.0
        with torch.no_grad(), autocast:
            with hook.measuring(config.gapt.entropy) as measured:
                for inputs, targets in held_out:
                    total += token_loss(model, inputs.to(device), targets.to(device)).item() * len(inputs)
            if config.parallel == "fsdp" and len(held_out) < rounds:  # the others wait for this rank's shards
                model(input_ids=torch.zeros(1, config.context, dtype=torch.long, device=device))
        model.train()
        rows, calls = sum(len(inputs) for inputs, _ in held_out), len(held_out)
        entropies = measured.entropies
        if ranks.world > 1:
            sums = [total, rows, calls, *(entropies.get(name, 0.0) * calls for name in hook.names)]
            total, rows, calls, *parts = ranks.sum(torch.tensor(sums, dtype=torch.float64)).tolist()
            entropies = {name: part / calls for name, part in zip(hook.names, parts, strict=True)}
        record = {
            "step": state["step"],
            "loss": total / rows,
            "entropy": sum(entropies.values()) / len(entropies),
            "layer_entropy": entropies,
        }
        if ranks.first:
            with (folder / "validation.jsonl").open("a") as file:
                file.write(json.dumps(record) + "\n")
        return record

    model.train()
    with ExitStack() as stack:
        observers: list[Callable[[StepMetrics], None]] = []
        if ranks.first:
            bar = ProgressBar(config.steps, initial=state["step"], desc=method, disable=not progress, leave=True)
            observers = [
                stack.enter_context(JSONLines(folder / "metrics.jsonl", resume=True)),
                stack.enter_context(bar),
            ]
        stop = stack.enter_context(stop_after_step(ranks))
        while state["step"] < config.steps:
            step: int = state["step"]
            due = step > 0 and step % config.eval_every == 0
            validation = validate() if due else None
            if validation is not None and gapt is not None:
                judged = gapt.config.gate.signal == "validation"
                late = step > (1 - config.cooldown) * config.steps
                cooling = judged and late and gapt.phase is Phase.MEMORIZATION
                if math.isfinite(validation["loss"]) and not cooling:
                    gapt.record_validation(validation["loss"])

            started = time.perf_counter()
            if config.dropout:
                seed_dropout(seed, step, ranks.rank)
            losses = []
            for micro in range(micro_batches):
                inputs, targets = batches((step * micro_batches + micro) * ranks.world + ranks.rank)
                with gradient_sync(wrapped_model, micro == micro_batches - 1):
                    with autocast:
                        loss = token_loss(wrapped_model, inputs.to(device), targets.to(device))
                    losses.append(loss.detach())
                    if gapt is None:
                        (loss / micro_batches).backward()  # type: ignore[no-untyped-call]
                    else:
                        gapt.backward(loss, scale=1 / micro_batches)
            clip_gradients(model, config.clip)
            try:
                for optimizer in optimizers:
                    optimizer.step()
            except FloatingPointError as error:
                raise UserError(f"{method}: {error}; try a smaller --lr") from error
            for scheduler, optimizer in zip(schedulers, optimizers, strict=True):
                scheduler.step()
                optimizer.zero_grad()
            mean_loss = torch.stack(losses).mean().item()
            if gapt is None:
                mean_loss = ranks.mean(mean_loss)
            state["step"] = step + 1
            state["seconds"] += time.perf_counter() - started

            metrics = gapt.metrics if gapt is not None else plain_metrics(step + 1, mean_loss, validation)
            assert metrics is not None
            for observer in observers:
                observer(metrics)
            on_step()
            state["compression_steps"] += metrics.phase == "compression"
            if metrics.reason is not None:
                state["switches"].append({"step": step + 1, "to": metrics.next_phase, "reason": metrics.reason})
            if not math.isfinite(mean_loss) and gapt is None:
                raise UserError(f"{method}: the loss is {mean_loss} at step {step + 1}; try a smaller --lr")
            if ranks.any(stop.is_set()):
                save()
                raise StoppedError(
                    f"{method}: stopped after step {step + 1} of {config.steps}. Go on with the same command and "
                    "--resume."
                )
            if (step + 1) % config.checkpoint_every == 0 and step + 1 < config.steps:
                save()
    save()
    final = validate()
    hook.remove()
    tokens = state["step"] * config.accumulation * config.batch_size * config.context
    return {
        "method": method,
        "seed": seed,
        "val_loss": final["loss"],
        "entropy": final["entropy"],
        "layer_entropy": final["layer_entropy"],
        "compression_share": state["compression_steps"] / state["step"],
        "switches": len(state["switches"]),
        "switch_list": state["switches"],
        "tokens_per_second": tokens / state["seconds"],
        "seconds": state["seconds"],
        "tokens_seen": tokens,
        "parameters": sum(p.numel() for p in model.parameters()),
        "optimizer_state_mb": state_bytes(bases) / 1e6,
        "ranks": ranks.world,
    }


def plain_metrics(step: int, loss: float, validation: dict[str, Any] | None) -> StepMetrics:
    """The same line for a run without the wrapper, which measures no entropy while it trains."""
    return StepMetrics(
        step=step,
        phase="memorization",
        next_phase="memorization",
        reason=None,
        loss=loss,
        entropy=None,
        layer_entropy={},
        validation_loss=validation["loss"] if validation else None,
    )


def learning_rate_factor(step: int, steps: int, warmup: int, final: float) -> float:
    """Linear warm-up, then half a cosine down to ``final``."""
    if step < warmup:
        return (step + 1) / (warmup + 1)
    done = min(1.0, (step - warmup) / max(1, steps - warmup))
    return cosine(done, final)


def check_config(config: TrainConfig, ranks: Ranks = ALONE) -> None:
    """Refuses ways to train that do not fit each other, the ranks or the device."""
    ranks.check(config.parallel)
    ranks.divide(config.accumulation, config.batch_size)
    measured = config.gapt.alignment.parameter_every > 0
    if measured and config.parallel == "fsdp":
        raise UserError(
            "--parameter-alignment-every: shards have no gradient of one loss; give --parallel ddp, or leave it out"
        )
    if measured and config.compile:
        raise UserError("--parameter-alignment-every: a compiled model keeps no graph for it; leave --compile out")

    def check_device() -> None:
        device = pick_device(config.device, ranks)
        if config.float8:
            check_float8(device)
        check_optimizer(config.optimizer, config.parallel, device)
        if config.compile:
            check_compiler("--compile", "leave it out", device)

    ranks.together(check_device)


def seed_dropout(seed: int, step: int, rank: int) -> None:
    """A run that is resumed drops what it would have dropped, on any number of ranks, and each rank something else."""
    torch.manual_seed(int(np.random.default_rng([seed, step, rank]).integers(1 << 62)))


def pick_device(name: str, ranks: Ranks = ALONE) -> torch.device:
    """``auto`` takes the first GPU where there is one, and each of several ranks its own."""
    try:
        device = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name)
        device = ranks.device(device)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = first_line(error)
        raise UserError(f"--device {name}: cannot be used here ({reason}); try --device cpu") from error
    return device


def use_bfloat16(dtype: str, device: torch.device) -> bool:
    """On a GPU that has it, unless told otherwise. CPUs mostly emulate it, slowly."""
    if dtype == "auto":
        return device.type == "cuda" and torch.cuda.is_bf16_supported()
    return dtype == "bfloat16"
