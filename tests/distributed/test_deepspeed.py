"""DeepSpeed's engine, as it is: ZeRO 0 to 3, accumulation, overflows."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn import functional as F

from gapt_optim import AlignmentConfig, GAPTConfig, GAPTOptimizer, RepresentationHook, StepMetrics
from tests.distributed import table
from tests.distributed.loop import Loop
from tests.distributed.ranks import Ranks
from tests.distributed.runs import BATCH, COMPRESSING, RESTLESS, Net, Seen, data

ADAMW = partial(torch.optim.AdamW, lr=0.01, weight_decay=0.0)
SGD = partial(torch.optim.SGD, lr=0.05, momentum=0.9)
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
    base: Any = ADAMW


def made(run: Engine) -> tuple[nn.Module, GAPTOptimizer]:
    torch.manual_seed(0)
    model = Net()
    hook = RepresentationHook(model, "blocks.*")
    parameters: Any = list(model.parameters())
    if run.groups == 2:
        parameters = [{"params": parameters[:4]}, {"params": parameters[4:], "weight_decay": 0.1}]
    return model, GAPTOptimizer(run.base(parameters), hook, run.config)


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
        # What it asks of the device is whether its kernels are fast there.
        deepspeed.accelerator.get_accelerator().is_fp16_supported = lambda: True
        config["fp16"] = {"enabled": True, "initial_scale_power": 4, "hysteresis": 1}
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config, dist_init_required=False)
    assert connect(engine) is optimizer
    return engine, optimizer


class OfEngine(Loop):
    """What DeepSpeed makes of a model and the wrapper."""

    def __init__(self, run: Engine) -> None:
        self.run = run
        self.engine, self.optimizer = engine_for(run)
        self.model = self.engine.module

    def step(self, step: int) -> Seen:
        from deepspeed.utils import safe_get_full_grad

        run, gradients = self.run, {}
        dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[run.precision]
        for micro in range(run.micro_batches):
            x, target = data(step * run.micro_batches + micro, dtype)
            loss = F.cross_entropy(self.engine(x).flatten(0, 1).float(), target.flatten())
            if run.overflow and step in (1, 2) and dist.get_rank() == 1:
                loss = loss * 1e30
            self.engine.backward(self.optimizer.objective(loss))
            if self.engine.is_gradient_accumulation_boundary():
                gradients = {name: safe_get_full_grad(p) for name, p in self.model.named_parameters()}
            self.engine.step()
        metrics: Any = self.optimizer.metrics
        return Seen(metrics, {name: g.clone() for name, g in gradients.items() if g is not None}, 0.0)

    def save(self, folder: str) -> None:
        self.engine.save_checkpoint(folder)

    def load(self, folder: str) -> None:
        path, _ = self.engine.load_checkpoint(folder)
        assert path is not None


def train_engine(run: Engine) -> tuple[list[StepMetrics], dict[str, torch.Tensor]]:
    from deepspeed.utils import safe_get_full_fp32_param

    loop = OfEngine(run)
    seen: list[StepMetrics] = []
    loop.optimizer._observers.append(seen.append)
    for step in range(run.steps):
        loop.step(step)
    names = {name: safe_get_full_fp32_param(p) for name, p in loop.model.named_parameters()}
    weights = {name: p.detach() if names[name] is None else names[name] for name, p in loop.model.named_parameters()}
    return seen, {name: value.clone().float() for name, value in weights.items()}


class Plain(Loop):
    """The same without DeepSpeed, on one process."""

    def __init__(self, run: Engine) -> None:
        self.model, self.optimizer = made(run)

    def step(self, step: int) -> Seen:
        x, target = data(step, torch.float32)
        self.optimizer.backward(F.cross_entropy(self.model(x).flatten(0, 1), target.flatten()))
        gradients = {name: p.grad.clone() for name, p in self.model.named_parameters()}
        self.optimizer.step()
        self.optimizer.zero_grad()
        return Seen(self.optimizer.metrics, gradients, 0.0)


def row(stage: int, precision: str) -> table.Engine:
    run = Engine(stage, precision, base=SGD)
    return table.Engine(2, partial(OfEngine, run), partial(Plain, run))


ENGINES = {f"ZeRO {stage}, {precision}": row(stage, precision) for stage in range(4) for precision in ("fp32", "bf16")}


@pytest.mark.parametrize("name", ENGINES)
def test_an_engine_is_one_process(ranks: Ranks, name: str) -> None:
    table.assert_right(table.measure(ranks, ENGINES[name]), name, 0.05 if "bf16" in name else 1e-5)


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


def train_with_accelerate(stage: int) -> tuple[list[StepMetrics], list[StepMetrics]]:
    """Steps of Accelerate's own loop with a DeepSpeed configuration, and the same without."""
    quiet()
    import deepspeed
    from accelerate import Accelerator, DeepSpeedPlugin
    from accelerate.state import AcceleratorState

    from gapt_optim.integrations.deepspeed import connect

    compiled = deepspeed.ops.__compatible_ops__
    compiled.update(dict.fromkeys(compiled, False))
    AcceleratorState._reset_state(True)
    run = Engine(stage, micro_batches=2, base=SGD)
    model, gapt = made(run)
    told: list[StepMetrics] = []
    gapt._observers.append(told.append)
    config = {
        "train_micro_batch_size_per_gpu": BATCH,
        "gradient_accumulation_steps": run.micro_batches,
        "zero_optimization": {"stage": stage},
        "zero_allow_untested_optimizer": True,
    }
    accelerator = Accelerator(
        gradient_accumulation_steps=run.micro_batches,
        deepspeed_plugin=DeepSpeedPlugin(hf_ds_config=config),
    )
    called, optimizer = accelerator.prepare(model, gapt)
    connect(accelerator.deepspeed_engine_wrapped.engine)
    for step in range(run.steps * run.micro_batches):
        x, target = data(step, torch.float32)
        with accelerator.accumulate(called):
            loss = F.cross_entropy(called(x).flatten(0, 1), target.flatten())
            accelerator.backward(gapt.objective(loss))
            optimizer.step()
            optimizer.zero_grad()
    return told, train_one(run)[0]


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_accelerate_with_a_deepspeed_configuration(stage: int) -> None:
    alone = Ranks(1)
    ((found, expected),) = alone(train_with_accelerate, stage, timeout=120)
    alone.close()
    assert {each.phase for each in expected} == {"memorization", "compression"}
    assert len(found) == len(expected)
    for here, there in zip(found, expected, strict=True):
        assert (here.step, here.phase, here.reason) == (there.step, there.phase, there.reason)
        assert here.loss == pytest.approx(there.loss, rel=1e-5)
        assert here.layer_entropy == pytest.approx(there.layer_entropy, rel=1e-5)
