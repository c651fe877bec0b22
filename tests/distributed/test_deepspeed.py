"""DeepSpeed's engine, as it is: ZeRO 0 to 3, accumulation, overflows."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn import functional as F

from gapt_optim import AlignmentConfig, GAPTConfig, GAPTOptimizer, RepresentationHook, StepMetrics
from tests.distributed.ranks import Ranks
from tests.distributed.runs import BATCH, COMPRESSING, RESTLESS, Net, data

pytest.importorskip("deepspeed", reason="DeepSpeed is not installed")
pytestmark = pytest.mark.slow


@dataclass(frozen=True)
class Engine:
    stage: int
    precision: str = "fp32"
    micro_batches: int = 1
    steps: int = 8
    config: GAPTConfig = field(default_factory=lambda: GAPTConfig(gate=RESTLESS))
    groups: int = 1
    overflow: bool = False


def made(run: Engine) -> tuple[nn.Module, GAPTOptimizer]:
    torch.manual_seed(0)
    model = Net()
    hook = RepresentationHook(model, "blocks.*")
    parameters: Any = list(model.parameters())
    if run.groups == 2:
        parameters = [{"params": parameters[:4]}, {"params": parameters[4:], "weight_decay": 0.1}]
    return model, GAPTOptimizer(torch.optim.AdamW(parameters, lr=0.01, weight_decay=0.0), hook, run.config)


def quiet() -> None:
    import warnings

    warnings.simplefilter("ignore")
    os.environ["DS_ACCELERATOR"] = "cpu"


def engine_for(run: Engine) -> tuple[Any, GAPTOptimizer]:
    quiet()
    import deepspeed

    compiled = deepspeed.ops.__compatible_ops__
    compiled.update(dict.fromkeys(compiled, False))  # gloo does without

    from gapt_optim.integrations.deepspeed import connect

    model, optimizer = made(run)
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": BATCH // dist.get_world_size(),
        "gradient_accumulation_steps": run.micro_batches,
        "zero_optimization": {"stage": run.stage},
        "zero_allow_untested_optimizer": True,
    }
    if run.precision == "bf16":
        config["bf16"] = {"enabled": True}
    if run.precision == "fp16":
        config["fp16"] = {"enabled": True, "initial_scale_power": 4, "hysteresis": 1}
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config, dist_init_required=False)
    assert connect(engine) is optimizer
    return engine, optimizer


def train_engine(run: Engine) -> tuple[list[StepMetrics], dict[str, torch.Tensor]]:
    from deepspeed.utils import safe_get_full_fp32_param

    engine, optimizer = engine_for(run)
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[run.precision]
    seen: list[StepMetrics] = []
    optimizer._observers.append(seen.append)
    for step in range(run.steps):
        for micro in range(run.micro_batches):
            x, target = data(step * run.micro_batches + micro, dtype)
            loss = F.cross_entropy(engine(x).flatten(0, 1).float(), target.flatten())
            if run.overflow and step in (1, 2) and dist.get_rank() == 1:
                loss = loss * 1e30
            engine.backward(optimizer.objective(loss))
            engine.step()
    names = {name: safe_get_full_fp32_param(p) for name, p in engine.module.named_parameters()}
    weights = {name: p.detach() if names[name] is None else names[name] for name, p in engine.module.named_parameters()}
    return seen, {name: value.clone().float() for name, value in weights.items()}


def train_one(run: Engine, skipped: tuple[int, ...] = ()) -> tuple[list[StepMetrics], dict[str, torch.Tensor]]:
    model, optimizer = made(run)
    seen: list[StepMetrics] = []
    optimizer._observers.append(seen.append)
    for step in range(run.steps):
        if step in skipped:
            continue
        for micro in range(run.micro_batches):
            x, target = data(step * run.micro_batches + micro, torch.float32)
            loss = F.cross_entropy(model(x).flatten(0, 1), target.flatten())
            optimizer.backward(loss, scale=1 / run.micro_batches)
        optimizer.step()
        optimizer.zero_grad()
    return seen, {name: p.detach().clone() for name, p in model.named_parameters()}


def assert_equal(found: list[Any], expected: Any, tolerance: float) -> None:
    metrics, weights = expected
    assert {each.phase for each in metrics} == {"memorization", "compression"}
    for of_rank, there in found:
        assert [(m.step, m.phase, m.reason) for m in of_rank] == [(m.step, m.phase, m.reason) for m in metrics]
        for a, b in zip(of_rank, metrics, strict=True):
            assert a.loss == pytest.approx(b.loss, rel=tolerance)
            assert a.layer_entropy == pytest.approx(b.layer_entropy, rel=tolerance)
        for name, value in weights.items():
            torch.testing.assert_close(there[name], value, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("micro_batches", [1, 2])
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_zero_equals_one_process(ranks: Ranks, stage: int, groups: int, micro_batches: int) -> None:
    run = Engine(stage, micro_batches=micro_batches, groups=groups)
    assert_equal(ranks(train_engine, run, timeout=60), train_one(run), 1e-5)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_bfloat16(ranks: Ranks, stage: int) -> None:
    run = Engine(stage, "bf16")
    assert_equal(ranks(train_engine, run, timeout=60), train_one(run), 0.03)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_steps_that_the_engine_skips_are_not_judged(ranks: Ranks, precision: str) -> None:
    run = Engine(2, precision, overflow=True, config=GAPTConfig(gate=COMPRESSING))
    for seen, _ in ranks(train_engine, run, timeout=60):
        assert len(seen) == run.steps - 2
        assert seen[-1].step == run.steps - 2
        assert all(each.loss < 10 for each in seen)


def refused(config: GAPTConfig) -> str:
    try:
        engine_for(Engine(1, config=config))
    except ValueError as error:
        return str(error)
    return ""


def test_parameter_alignment_is_refused(ranks: Ranks) -> None:
    for message in ranks(refused, GAPTConfig(alignment=AlignmentConfig(parameter_every=1)), timeout=60):
        assert "AlignmentConfig(parameter_every=0)" in message


def train_with_trainer(stage: int, folder: str) -> tuple[list[int], list[str], float]:
    """Steps and phases that a Trainer logs, and the loss that the gate judged last."""
    quiet()
    import deepspeed
    from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments

    from gapt_optim.integrations.transformers import GAPTCallback

    compiled = deepspeed.ops.__compatible_ops__
    compiled.update(dict.fromkeys(compiled, False))
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=32, n_positions=16, n_embd=8, n_layer=2, n_head=1))

    class WithGate(Trainer):
        def create_optimizer(self, *args: Any) -> Any:
            hook = RepresentationHook(self.model, "transformer.h.*")
            base = torch.optim.AdamW(self.model.parameters(), lr=0.01)
            self.optimizer = GAPTOptimizer(base, hook, GAPTConfig(gate=RESTLESS))
            return self.optimizer

    arguments = TrainingArguments(
        folder,
        max_steps=6,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=2,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
        deepspeed={
            "train_micro_batch_size_per_gpu": "auto",
            "gradient_accumulation_steps": "auto",
            "zero_optimization": {"stage": stage},
            "zero_allow_untested_optimizer": True,
        },
    )
    rows = torch.randint(32, (64, 16), generator=torch.Generator().manual_seed(0))
    trainer = WithGate(model, arguments, train_dataset=[{"input_ids": row, "labels": row} for row in rows])
    trainer.add_callback(GAPTCallback(trainer))
    trainer.train()
    logs = [log for log in trainer.state.log_history if "gapt/loss" in log]
    from gapt_optim.integrations.common import unwrapped

    optimizer = unwrapped(trainer.optimizer)
    assert optimizer is not None
    assert optimizer.metrics is not None
    steps = [round(log["step"]) for log in logs]
    phases = ["compression" if log["gapt/compression"] else "memorization" for log in logs]
    return steps, phases, optimizer.metrics.loss


@pytest.mark.parametrize("stage", [1, 3])
def test_a_trainer_with_a_deepspeed_configuration(tmp_path: Any, stage: int) -> None:
    alone = Ranks(1)
    (found,) = alone(train_with_trainer, stage, str(tmp_path), timeout=120)
    alone.close()
    steps, phases, loss = found
    assert steps == [1, 2, 3, 4, 5, 6]
    assert set(phases) == {"memorization", "compression"}
    assert 2 < loss < 4  # nats per token, of log(32) = 3.47
