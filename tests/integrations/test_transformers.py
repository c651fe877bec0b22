"""`transformers.Trainer` itself, with a GAPTOptimizer and the callback."""

from __future__ import annotations

import os

os.environ["HF_HUB_OFFLINE"] = "1"

import functools
import math
import re
import socket
import tempfile
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import schedulefree
import torch
from peft import LoraConfig
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR, ReduceLROnPlateau
from transformers import GPT2LMHeadModel, Trainer, TrainingArguments, default_data_collator

from gapt_optim import (
    AlignmentConfig,
    GAPTConfig,
    GAPTOptimizer,
    GateConfig,
    ObjectiveConfig,
    RepresentationHook,
    StepMetrics,
)
from gapt_optim.integrations.transformers import GAPTCallback
from tests.loops import COMPRESSING, RESTLESS, assert_same, weights
from tests.models import VOCABULARY, adapted, recompute_activations
from tests.models import gpt2 as any_gpt2
from tests.reference import reference_objective
from tests.training import recorded

pytestmark = [
    pytest.mark.filterwarnings(
        "ignore:.is_gradient_checkpointing. is deprecated:FutureWarning"
    ),  # peft 0.21 asks for it
    pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning"),  # torch.compile's own doing
]

Example = dict[str, Tensor]

CYCLES = GAPTConfig(gate=RESTLESS)
MEMORIZING = GAPTConfig(gate=GateConfig(frozen=True))


def gpt2(**changes: Any) -> GPT2LMHeadModel:
    """With its loss named: otherwise the Trainer counts one token too many per text, for GPT-2's class name."""
    model = any_gpt2(**changes)
    model.loss_type = "ForCausalLM"
    return model


def texts(n: int = 24) -> list[Example]:
    """Random tokens, padded on the right: every text has another number of tokens."""
    generator = torch.Generator().manual_seed(7)
    examples = []
    for _ in range(n):
        ids = torch.randint(1, VOCABULARY, (16,), generator=generator)
        mask = (torch.arange(16) < torch.randint(3, 17, (1,), generator=generator)).long()
        examples.append({"input_ids": ids, "attention_mask": mask, "labels": torch.where(mask == 1, ids, -100)})
    return examples


class Seen:
    """Keeps the batches that a Trainer collates, and the metrics of each step."""

    def __init__(self) -> None:
        self.batches: list[Example] = []
        self.metrics: list[StepMetrics] = []

    def collate(self, features: list[Any]) -> Example:
        batch = default_data_collator(features)
        self.batches.append({key: value.clone() for key, value in batch.items()})
        return batch


def adamw(model: nn.Module) -> Optimizer:
    return AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01)


def still(model: nn.Module) -> Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.0)


def lora() -> nn.Module:
    adapters = LoraConfig(target_modules=["c_attn"], r=2, task_type="CAUSAL_LM", fan_in_fan_out=True)
    model = adapted(gpt2(), adapters)
    # The last layer of every adapter starts at zero, where most of the model would not move yet.
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.1)
    return model


# As this version of transformers calls it.
CHECKPOINTING = next(
    name
    for name in ("activation_checkpointing", "gradient_checkpointing")
    if name in {f.name for f in fields(TrainingArguments)}
)


def make(
    folder: Path,
    model: nn.Module | None = None,
    config: GAPTConfig | None = CYCLES,
    base: Callable[[nn.Module], Any] = adamw,
    seen: Seen | None = None,
    schedule: Callable[[Optimizer], Any] = lambda o: LambdaLR(o, lambda step: 1 / (1 + step)),
    callback: dict[str, Any] | None = None,
    layers: str | None = None,
    examples: int = 24,
    trainer: dict[str, Any] | None = None,
    **arguments: Any,
) -> Trainer:
    """A Trainer on `texts`; ``config=None`` trains with the bare base."""
    torch.manual_seed(3)
    model = gpt2() if model is None else model
    optimizer: Optimizer = base(model)
    if config is not None:
        observers = () if seen is None else (seen.metrics.append,)
        optimizer = GAPTOptimizer(optimizer, RepresentationHook(model, layers), config, observers=observers)
    settings: dict[str, Any] = {
        "use_cpu": True,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 3,
        "max_steps": 10,
        "logging_steps": 1,
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
    }
    built = Trainer(
        model,
        TrainingArguments(str(folder), **(settings | arguments)),
        train_dataset=texts(examples),
        eval_dataset=texts(5),
        data_collator=default_data_collator if seen is None else seen.collate,
        optimizers=(optimizer, schedule(optimizer)),
        **(trainer or {}),
    )
    if config is not None:
        built.add_callback(GAPTCallback(built, **(callback or {})))
    return built


def wrapper(trainer: Trainer) -> GAPTOptimizer:
    optimizer = trainer.optimizer.optimizer
    assert isinstance(optimizer, GAPTOptimizer)
    return optimizer


def token_losses(model: nn.Module, batch: Example) -> Tensor:
    logits = model(**{key: value for key, value in batch.items() if key != "labels"}).logits
    labels = batch["labels"][:, 1:]
    return F.cross_entropy(logits[:, :-1][labels != -100], labels[labels != -100], reduction="none")


def training_logs(trainer: Trainer) -> list[dict[str, float]]:
    return [
        {k: v for k, v in logs.items() if "runtime" not in k} for logs in trainer.state.log_history if "loss" in logs
    ]


@pytest.mark.parametrize("accumulate", [1, 3])
def test_the_gate_judges_the_mean_cross_entropy_per_token_of_the_whole_batch(tmp_path: Path, accumulate: int) -> None:
    seen, model = Seen(), gpt2()
    make(tmp_path, model, seen=seen, base=still, gradient_accumulation_steps=accumulate, max_steps=4).train()
    model.eval()
    for step, metrics in enumerate(seen.metrics):
        batches = seen.batches[step * accumulate : (step + 1) * accumulate]
        losses = [token_losses(model, batch) for batch in batches]
        assert metrics.loss == pytest.approx(float(torch.cat(losses).mean().detach()), rel=1e-5)
        if accumulate > 1:  # the mean of the micro-batches' means is another number
            means = torch.stack([loss.mean().detach() for loss in losses])
            assert metrics.loss != pytest.approx(float(means.mean()), rel=1e-5)
    assert len(seen.metrics) == 4


def test_gradients_are_those_of_cross_entropy_per_token_plus_the_mean_entropy(tmp_path: Path) -> None:
    seen, model = Seen(), gpt2()
    config = COMPRESSING.model_copy(update={"objective": ObjectiveConfig(weight=0.3)})
    sgd = {
        "base": lambda model: torch.optim.SGD(model.parameters(), lr=1.0),
        "schedule": lambda o: LambdaLR(o, lambda step: 1),
    }
    before = weights(model)
    make(tmp_path, model, config, seen=seen, max_steps=1, max_grad_norm=0, **sgd).train()
    taken = {name: before[name] - value for name, value in weights(model).items()}

    model.load_state_dict(before)
    model.zero_grad()
    tokens = sum(int((batch["labels"][:, 1:] != -100).sum()) for batch in seen.batches[:3])
    for batch in seen.batches[:3]:
        with recorded(list(model.transformer.h)) as calls:
            loss = token_losses(model, batch).sum() / tokens
        activations = [outputs[0] for outputs in calls]
        reference_objective(loss, activations, 0.1, mask=batch["attention_mask"]).backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(
            taken[name], parameter.grad, rtol=1e-3, atol=1e-5, msg=lambda text, n=name: f"{n}: {text}"
        )


def test_in_memorization_the_parameters_are_those_of_the_bare_optimizer(tmp_path: Path) -> None:
    """Over 41 micro-batches: 41 * (1 / 41) is not 1 in float32."""
    bare, ours = gpt2(resid_pdrop=0.1), gpt2(resid_pdrop=0.1)
    ours.load_state_dict(bare.state_dict())
    for model, config in ((bare, None), (ours, MEMORIZING)):
        make(
            tmp_path,
            model,
            config,
            gradient_accumulation_steps=41,
            per_device_train_batch_size=1,
            max_steps=2,
            max_grad_norm=0.5,
            examples=41,
        ).train()
    assert_same(weights(ours), weights(bare))


def per_token(outputs: Any, labels: Tensor, num_items_in_batch: Tensor) -> Tensor:
    logits, labels = outputs.logits[:, :-1], labels[:, 1:]
    return F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum") / num_items_in_batch


@functools.cache
def plain_run(layers: str) -> list[StepMetrics]:
    seen = Seen()
    with tempfile.TemporaryDirectory() as folder:
        make(Path(folder), seen=seen, layers=layers, max_grad_norm=0.2).train()
    return seen.metrics


VARIANTS: dict[str, dict[str, Any]] = {
    "evaluation": {"eval_strategy": "steps", "eval_steps": 3, "per_device_eval_batch_size": 2},
    "checkpointing": {CHECKPOINTING: True},
    "checkpointing and evaluation": {
        CHECKPOINTING: True,
        "eval_strategy": "steps",
        "eval_steps": 3,
        "per_device_eval_batch_size": 2,
    },
    "own loss": {"trainer": {"compute_loss_func": per_token}},
    "compiled": {"torch_compile": True, "torch_compile_backend": "aot_eager"},
}


@pytest.mark.parametrize("layers", ["transformer.h.*", "transformer.h.*.mlp"])
@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.slow) if n == "compiled" else n for n in VARIANTS])
def test_what_should_not_change_the_run_does_not(tmp_path: Path, name: str, layers: str) -> None:
    seen = Seen()
    make(tmp_path, seen=seen, layers=layers, max_grad_norm=0.2, **VARIANTS[name]).train()
    plain = plain_run(layers)
    assert {metrics.phase for metrics in plain} == {"memorization", "compression"}
    for metrics, expected in zip(seen.metrics, plain, strict=True):
        assert (metrics.phase, metrics.reason) == (expected.phase, expected.reason)
        assert (metrics.loss, metrics.entropy) == pytest.approx((expected.loss, expected.entropy), rel=1e-4)


def test_bfloat16_stays_close(tmp_path: Path) -> None:
    exact, seen = Seen(), Seen()
    make(tmp_path, seen=exact, max_steps=4, config=COMPRESSING).train()
    make(tmp_path, seen=seen, max_steps=4, config=COMPRESSING, bf16=True).train()
    for metrics, expected in zip(seen.metrics, exact.metrics, strict=True):
        assert metrics.loss != expected.loss
        assert (metrics.loss, metrics.entropy) == pytest.approx((expected.loss, expected.entropy), rel=0.03)


@pytest.mark.parametrize("build", [gpt2, lora])
@pytest.mark.parametrize("stop", [3, 6])
def test_resumes_bit_equal(tmp_path: Path, build: Callable[[], nn.Module], stop: int) -> None:
    """Step 3 is within an epoch and a patience, step 6 within a phase of compression."""
    arguments: dict[str, Any] = {
        "save_strategy": "steps",
        "save_steps": stop,
        "eval_strategy": "steps",
        "eval_steps": 2,
    }
    whole = make(tmp_path / "whole", build(), **arguments)
    whole.train()
    torch.manual_seed(0)
    resumed = make(tmp_path / "resumed", build(), **arguments)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / f"checkpoint-{stop}"))
    assert_same(weights(resumed.model), weights(whole.model))
    assert_same(resumed.optimizer.state_dict(), whole.optimizer.state_dict())
    assert training_logs(resumed) == training_logs(whole)
    assert wrapper(whole).metrics.switches > 1


def test_lora_trains_its_adapters_only(tmp_path: Path) -> None:
    model, seen = lora(), Seen()
    before = weights(model)
    make(tmp_path, model, seen=seen, **{CHECKPOINTING: True}).train()
    changed = {name for name, value in weights(model).items() if not torch.equal(value, before[name])}
    assert changed == {name for name in before if "lora_" in name}
    assert {metrics.phase for metrics in seen.metrics} == {"memorization", "compression"}


def test_logs_hold_phase_and_entropies_of_the_step(tmp_path: Path) -> None:
    seen = Seen()
    trainer = make(tmp_path, seen=seen, eval_strategy="steps", eval_steps=3, logging_steps=2)
    trainer.train()
    logs = training_logs(trainer)
    assert len(logs) == 5
    for line in logs:
        metrics = seen.metrics[int(line["step"]) - 1]
        assert line["gapt/compression"] == (metrics.phase == "compression")
        assert line["gapt/loss"] == metrics.loss
        assert line["gapt/entropy"] == metrics.entropy
        assert line["gapt/entropy/transformer.h.1"] == metrics.layer_entropy["transformer.h.1"]
        due = metrics.step % 10 == 0  # where logs at multiples of ten have it
        assert ("gapt/activation_cosine" in line) == ("gapt/norm_ratio" in line) == due
    assert {line["gapt/compression"] for line in logs} == {0.0, 1.0}
    others = [line for line in trainer.state.log_history if "loss" not in line]
    assert len(others) > 3
    assert not any(key.startswith("gapt") for line in others for key in line)


def test_logs_the_loss_that_the_trainer_logs(tmp_path: Path) -> None:
    trainer = make(tmp_path, callback={"layers": False}, label_smoothing_factor=0.1)
    trainer.train()
    for line in training_logs(trainer):
        assert line["gapt/loss"] == pytest.approx(line["loss"], rel=1e-6)
        assert not any(key.startswith("gapt/entropy/") for key in line)


def test_a_gate_on_validation_judges_the_evaluations(tmp_path: Path) -> None:
    gate = RESTLESS.model_copy(update={"signal": "validation"})
    seen = Seen()
    trainer = make(tmp_path, None, GAPTConfig(gate=gate), seen=seen, eval_strategy="steps", eval_steps=2)
    trainer.train()
    given = [line["eval_loss"] for line in trainer.state.log_history if "eval_loss" in line]
    judged = [m.validation_loss for m in seen.metrics if m.validation_loss is not None]
    assert judged == given[:-1]  # the last evaluation is after the last step
    assert len(judged) == 4
    assert seen.metrics[-1].switches > 0


def test_parameter_alignment_is_measured_when_due(tmp_path: Path) -> None:
    seen, again = Seen(), Seen()
    alignment = AlignmentConfig(parameter_every=2)
    make(tmp_path, seen=seen, config=GAPTConfig(gate=RESTLESS, alignment=alignment), max_steps=6).train()
    make(tmp_path, seen=again, max_steps=6).train()
    due = [metrics.step for metrics in seen.metrics if metrics.parameter_alignment is not None]
    assert due == [1, 2, 4, 6]
    assert all(-1 <= m.parameter_alignment.cosine <= 1 for m in seen.metrics[1::2])
    assert [m.loss for m in seen.metrics] == pytest.approx([m.loss for m in again.metrics], rel=1e-5)


def test_an_overflow_takes_no_step(tmp_path: Path) -> None:
    """With a scale that overflows at first: a loss scaler on the CPU, as fp16=True sets up on a GPU."""
    seen = Seen()
    trainer = make(tmp_path, seen=seen, base=still, max_steps=4)
    trainer.accelerator.scaler = torch.amp.GradScaler(
        "cpu", init_scale=2.0**127, growth_interval=1000, backoff_factor=2.0**-120
    )
    trainer.train()
    assert len(seen.metrics) == 3
    trainer.model.eval()
    for step, metrics in enumerate(seen.metrics, 1):
        losses = [token_losses(trainer.model, batch) for batch in seen.batches[step * 3 : step * 3 + 3]]
        assert metrics.loss == pytest.approx(float(torch.cat(losses).mean().detach()), rel=1e-5)
        assert (metrics.alignment is not None) == (step == 1)
    assert math.isfinite(seen.metrics[0].alignment.cosine)


def test_the_trainer_is_as_before_after_training(tmp_path: Path) -> None:
    trainer = make(tmp_path, max_steps=2)
    trainer.train()
    assert "log" not in vars(trainer)
    assert "backward" not in vars(trainer.accelerator)
    assert wrapper(trainer).metrics.step == 2
    trainer.train()  # once more, with the optimizer prepared already
    assert wrapper(trainer).metrics.step == 4


def test_training_goes_on_after_an_error(tmp_path: Path) -> None:
    seen = Seen()
    trainer = make(tmp_path, max_steps=2, base=still, seen=seen)
    compute_loss, calls = trainer.compute_loss, []

    def fails_once(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        if len(calls) == 2:
            raise MemoryError("no memory")
        return compute_loss(*args, **kwargs)

    trainer.compute_loss = fails_once
    with pytest.raises(MemoryError):
        trainer.train()
    trainer.train()
    assert [m.step for m in seen.metrics] == [1, 2]
    assert [m.loss for m in seen.metrics] == pytest.approx([line["loss"] for line in training_logs(trainer)], rel=1e-6)
    assert "backward" not in vars(trainer.accelerator)


def test_without_the_callback_a_warning_says_that_the_gate_rests(tmp_path: Path) -> None:
    trainer = make(tmp_path)
    trainer.remove_callback(GAPTCallback)
    with pytest.warns(UserWarning, match="10 optimizer steps in a row had no loss"):
        trainer.train()


def test_schedule_free_is_switched_for_evaluation(tmp_path: Path) -> None:
    modes = []

    def metrics(_: Any) -> dict[str, float]:
        modes.append(wrapper(trainer).base.param_groups[0]["train_mode"])
        return {}

    trainer = make(
        tmp_path,
        base=lambda model: schedulefree.AdamWScheduleFree(model.parameters(), lr=0.01),
        schedule=lambda o: LambdaLR(o, lambda step: 1),
        trainer={"compute_metrics": metrics},
        eval_strategy="steps",
        eval_steps=5,
        max_steps=6,
    )
    trainer.train()
    assert modes == [False, False]
    assert wrapper(trainer).metrics.step == 6


def test_reduce_on_plateau_follows_the_evaluations(tmp_path: Path) -> None:
    trainer = make(
        tmp_path,
        schedule=lambda o: ReduceLROnPlateau(o, patience=0, factor=0.5, threshold=0.9),
        eval_strategy="steps",
        eval_steps=1,
        metric_for_best_model="loss",
        max_steps=3,
    )
    trainer.train()
    assert wrapper(trainer).base.param_groups[0]["lr"] == 0.0025


def test_measuring_between_forward_and_backward_leaves_the_mask_alone() -> None:
    """Recomputation in the backward needs the mask of the forward that it repeats."""

    def gradients(measure: bool) -> dict[str, Tensor | None]:
        torch.manual_seed(3)
        model = gpt2()
        recompute_activations(model)
        hook = RepresentationHook(model, "transformer.h.*.mlp")
        optimizer = GAPTOptimizer(still(model), hook, COMPRESSING)
        batch = default_data_collator(texts(2))
        loss = model(**batch).loss
        if measure:
            with hook.measuring(), torch.no_grad():
                model(**{**batch, "attention_mask": torch.ones_like(batch["attention_mask"])})
        optimizer.backward(loss)
        return {name: p.grad for name, p in model.named_parameters()}

    assert_same(gradients(True), gradients(False))


@pytest.mark.parametrize(("layers", "refused"), [("transformer.h.*", False), ("transformer.h.*.mlp", True)])
def test_reentrant_checkpointing_is_refused_inside_a_checkpointed_block(
    tmp_path: Path, layers: str, refused: bool
) -> None:
    """The Trainer's models checkpoint the inside of a block, so its output is tapped as without."""
    kwargs = {CHECKPOINTING: True, f"{CHECKPOINTING}_kwargs": {"use_reentrant": True}}
    seen = Seen()
    if refused:
        trainer = make(tmp_path, layers=layers, config=GAPTConfig.penalty(), **kwargs)
        with pytest.raises(RuntimeError, match="use_reentrant=False") as refusal:
            trainer.train()
        # The advice names the argument by which this test turned it on.
        advised = re.search(r'transformers (\w+)=\{"use_reentrant": False\}', str(refusal.value))
        assert advised is not None
        assert advised[1] in kwargs
        return
    trainer = make(tmp_path, layers=layers, seen=seen, max_grad_norm=0.2, **kwargs)
    trainer.train()
    assert [m.loss for m in seen.metrics] == pytest.approx([m.loss for m in plain_run(layers)], rel=1e-4)


def _on_two_gpus(trainer: Trainer) -> None:
    trainer.args._n_gpu = 2


REFUSALS: dict[str, tuple[dict[str, Any], Callable[[Trainer], Any], type[Exception], str]] = {
    "bare optimizer": (
        {"config": None},
        lambda trainer: trainer.add_callback(GAPTCallback(trainer)),
        TypeError,
        r"optimizers=\(GAPTOptimizer\(...\), scheduler\)",
    ),
    "DataParallel": ({}, _on_two_gpus, RuntimeError, "torchrun"),
    "validation signal, no evaluation": (
        {"config": GAPTConfig(gate=GateConfig(signal="validation"))},
        lambda trainer: None,
        ValueError,
        "eval_strategy",
    ),
    "validation signal, several datasets": (
        {"config": GAPTConfig(gate=GateConfig(signal="validation")), "eval_strategy": "steps"},
        lambda trainer: setattr(trainer, "eval_dataset", {"a": texts(2), "b": texts(2)}),
        ValueError,
        r'metric="eval_a_loss"',
    ),
    "validation signal, no such metric": (
        {
            "config": GAPTConfig(gate=GateConfig(signal="validation")),
            "eval_strategy": "steps",
            "eval_steps": 1,
            "callback": {"metric": "eval_bleu"},
        },
        lambda trainer: None,
        ValueError,
        r"'eval_loss'.*metric=",
    ),
    "parameter alignment, loss scaling": (
        {"config": GAPTConfig(alignment=AlignmentConfig(parameter_every=1))},
        lambda trainer: setattr(trainer.accelerator, "scaler", torch.amp.GradScaler("cpu")),
        ValueError,
        "bf16=True",
    ),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_refuses_with_advice(tmp_path: Path, name: str) -> None:
    settings, change, error, message = REFUSALS[name]
    trainer = make(tmp_path, **settings)
    change(trainer)
    with pytest.raises(error, match=message):
        trainer.train()


def test_one_of_several_evaluations_is_judged(tmp_path: Path) -> None:
    gate = RESTLESS.model_copy(update={"signal": "validation"})
    callback = {"metric": "eval_b_loss"}
    seen = Seen()
    trainer = make(
        tmp_path, None, GAPTConfig(gate=gate), seen=seen, callback=callback, eval_strategy="steps", eval_steps=2
    )
    trainer.eval_dataset = {"a": texts(2), "b": texts(5)}
    trainer.train()
    given = [line["eval_b_loss"] for line in trainer.state.log_history if "eval_b_loss" in line]
    assert [m.validation_loss for m in seen.metrics if m.validation_loss is not None] == given[:-1]


class Creates(Trainer):
    """How a Trainer with ``model_init``, or with FSDP, gets its optimizer."""

    def create_optimizer(self, model: Any = None) -> Optimizer:
        if self.optimizer is None:
            self.optimizer = GAPTOptimizer(super().create_optimizer(model), RepresentationHook(self.model))
        return self.optimizer


def test_an_optimizer_made_in_a_subclass(tmp_path: Path) -> None:
    arguments = TrainingArguments(str(tmp_path), use_cpu=True, max_steps=2, report_to="none", disable_tqdm=True)
    trainer = Creates(args=arguments, model_init=lambda: gpt2(), train_dataset=texts())
    trainer.add_callback(GAPTCallback(trainer))
    trainer.train()
    assert wrapper(trainer).metrics.step == 2


def test_refuses_what_is_no_trainer() -> None:
    with pytest.raises(TypeError, match=r"add_callback\(GAPTCallback\(trainer\)\)"):
        GAPTCallback(gpt2())  # type: ignore[arg-type]


def _train_on_rank(rank: int, folder: Path, port: int) -> None:
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port)
    )
    torch.set_num_threads(1)
    seen = Seen()
    trainer = make(
        folder,
        seen=seen,
        base=still,
        max_steps=4,
        ddp_backend="gloo",
        ddp_find_unused_parameters=False,
        dataloader_drop_last=True,
    )
    trainer.train()
    state = {"batches": seen.batches, "metrics": [metrics.as_dict() for metrics in seen.metrics]}
    torch.save(state | {"model": weights(trainer.model)}, folder / f"{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_two_ranks_judge_the_mean_cross_entropy_per_token_of_both(tmp_path: Path) -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    torch.multiprocessing.spawn(_train_on_rank, (tmp_path, port), nprocs=2)
    ranks = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2)]
    model = gpt2().eval()
    model.load_state_dict(ranks[0]["model"])
    assert len(ranks[0]["metrics"]) == 4
    for step, metrics in enumerate(ranks[0]["metrics"]):
        batches = [batch for rank in ranks for batch in rank["batches"][step * 3 : step * 3 + 3]]
        losses = torch.cat([token_losses(model, batch) for batch in batches])
        assert metrics["loss"] == pytest.approx(float(losses.mean().detach()), rel=1e-5)
        other = ranks[1]["metrics"][step]
        assert {**other, "layer_entropy": None} == {**metrics, "layer_entropy": None}
