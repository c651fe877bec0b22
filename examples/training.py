"""Training of one run: one function of configuration, seed and method, which returns a dictionary of results.

A run leaves in its folder ``metrics.jsonl`` (a line per step), ``validation.jsonl`` (a line per validation) and
``checkpoint.pt``, from which it goes on exactly as if it had never stopped.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import torch
from checkpoints import forget_after, load_checkpoint, save_checkpoint, stop_after_step
from corpus import Batches, Corpus, validation_batches
from errors import StoppedError, UserError
from gpt2 import PRESETS, build, parameter_groups, token_loss
from methods import of_method
from pydantic import BaseModel, ConfigDict, Field
from torch import nn

from gapt_optim import GAPTConfig, GAPTOptimizer, RepresentationHook
from gapt_optim.metrics import JSONLines, ProgressBar, StepMetrics


class TrainConfig(BaseModel):
    """Everything that decides how a run goes, besides corpus, seed and method."""

    model_config = ConfigDict(extra="forbid", frozen=True, ser_json_inf_nan="constants")

    preset: Literal["nano", "micro", "mini", "small", "medium", "large"] = "micro"
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
    gapt: GAPTConfig = GAPTConfig()


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
        PRESETS[config.preset],
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
) -> dict[str, Any]:
    """Trains one model and returns its results.

    Args:
        resume: go on from the checkpoint in ``folder``, if there is one.
        progress: show a progress bar.
        on_step: called after every step.

    Raises:
        UserError: the checkpoint to resume from is of another model, or the loss is no longer finite.
        StoppedError: Ctrl-C. A checkpoint of the last whole step is written first.
    """
    device = pick_device(config.device)
    torch.manual_seed(seed)
    model = build_model(config, corpus).to(device)
    hook = RepresentationHook(model, config.layers)
    base = torch.optim.AdamW(
        parameter_groups(model, config.weight_decay), lr=config.lr, betas=(0.9, config.beta2), fused=True
    )
    settings = of_method(method, config.gapt)
    # Plain training gets the bare optimizer: the hook then only measures, at validations.
    gapt = GAPTOptimizer(base, hook, settings) if settings is not None else None
    optimizer: torch.optim.Optimizer = base if gapt is None else gapt
    scheduler = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: learning_rate_factor(step, config.steps, config.warmup, config.final_lr)
    )
    batches = Batches(corpus.train, config.context, config.batch_size, seed)
    held_out = list(validation_batches(corpus.validation, config.context, config.batch_size, config.eval_sequences))
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
    }
    checkpoint = folder / "checkpoint.pt"
    folder.mkdir(parents=True, exist_ok=True)
    if resume and checkpoint.exists():
        state = load_checkpoint(checkpoint, identity, device, model, optimizer, scheduler)
    forget_after(folder / "metrics.jsonl", state["step"])
    forget_after(folder / "validation.jsonl", state["step"] - 1)  # a validation is taken after the step's checkpoint

    def save() -> None:
        save_checkpoint(checkpoint, state, identity, model, optimizer, scheduler)

    def validate() -> dict[str, Any]:
        """Loss and entropies on held-out text, written down and told to the gate."""
        model.eval()
        total = 0.0
        with torch.no_grad(), autocast, hook.measuring(config.gapt.entropy) as measured:
            for inputs, targets in held_out:
                total += token_loss(model, inputs.to(device), targets.to(device)).item() * len(inputs)
        model.train()
        loss = total / sum(len(inputs) for inputs, _ in held_out)
        record = {
            "step": state["step"],
            "loss": loss,
            "entropy": measured.mean,
            "layer_entropy": measured.entropies,
        }
        with (folder / "validation.jsonl").open("a") as file:
            file.write(json.dumps(record) + "\n")
        return record

    model.train()
    with (
        JSONLines(folder / "metrics.jsonl") as metrics_file,
        ProgressBar(config.steps, initial=state["step"], desc=method, disable=not progress, leave=True) as bar,
        stop_after_step() as stop,
    ):
        while state["step"] < config.steps:
            step: int = state["step"]
            due = step > 0 and step % config.eval_every == 0
            validation = validate() if due else None
            if validation is not None and gapt is not None:
                gapt.record_validation(validation["loss"])

            started = time.perf_counter()
            losses = []
            for micro in range(config.accumulation):
                inputs, targets = batches(step * config.accumulation + micro)
                with autocast:
                    loss = token_loss(model, inputs.to(device), targets.to(device))
                losses.append(loss.detach())
                if gapt is None:
                    (loss / config.accumulation).backward()  # type: ignore[no-untyped-call]
                else:
                    gapt.backward(loss, scale=1 / config.accumulation)
            nn.utils.clip_grad_norm_(model.parameters(), config.clip)
            try:
                optimizer.step()
            except FloatingPointError as error:
                raise UserError(f"{method}: {error}; try a smaller --lr") from error
            scheduler.step()
            optimizer.zero_grad()
            mean_loss = torch.stack(losses).mean().item()
            state["step"] = step + 1
            state["seconds"] += time.perf_counter() - started

            metrics = gapt.metrics if gapt is not None else plain_metrics(step + 1, mean_loss, validation)
            assert metrics is not None
            metrics_file(metrics)
            bar(metrics)
            on_step()
            state["compression_steps"] += metrics.phase == "compression"
            if metrics.reason is not None:
                state["switches"].append({"step": step + 1, "to": metrics.next_phase, "reason": metrics.reason})
            if not math.isfinite(mean_loss) and gapt is None:
                raise UserError(f"{method}: the loss is {mean_loss} at step {step + 1}; try a smaller --lr")
            if stop.is_set():
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
    return final + (1 - final) * 0.5 * (1 + math.cos(math.pi * done))


def pick_device(name: str) -> torch.device:
    """``auto`` takes the first GPU where there is one."""
    try:
        device = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"--device {name}: cannot be used here ({reason}); try --device cpu") from error
    return device


def use_bfloat16(dtype: str, device: torch.device) -> bool:
    """On a GPU that has it, unless told otherwise. CPUs mostly emulate it, slowly."""
    if dtype == "auto":
        return device.type == "cuda" and torch.cuda.is_bf16_supported()
    return dtype == "bfloat16"
