"""Lightning's own Trainer, with a GAPTOptimizer: automatic and manual optimization."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pandas
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import Optimizer

from gapt_optim import (
    AlignmentConfig,
    GAPTConfig,
    GAPTOptimizer,
    GateConfig,
    LayerConfig,
    RepresentationHook,
    StepMetrics,
)
from gapt_optim.integrations.lightning import GAPTCallback
from tests.loops import COMPRESSING, RESTLESS, Net, adamw, assert_same, batch, make_net, matrices_and_rest, weights

pytestmark = [
    pytest.mark.filterwarnings("ignore:.isinstance.treespec, LeafSpec:FutureWarning"),
]

CYCLES = GAPTConfig(gate=RESTLESS)
MEMORIZING = GAPTConfig(gate=GateConfig(frozen=True))
BATCHES = 6
STEPS = 10


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    logger = logging.getLogger("lightning.pytorch")
    level = logger.level
    logger.setLevel(logging.ERROR)
    yield
    logger.setLevel(level)


class Module(pl.LightningModule):
    """A net on `batch`; ``config=None`` trains with the bare base."""

    def __init__(self, config: GAPTConfig | None = CYCLES, base: Callable[[nn.Module], Any] = adamw) -> None:
        super().__init__()
        self.model = make_net()
        self.config, self.base = config, base
        self.metrics: list[StepMetrics] = []

    def configure_optimizers(self) -> Any:
        optimizer = self.base(self.model)
        if self.config is not None:
            hook = RepresentationHook(self.model, "layers.*")
            optimizer = GAPTOptimizer(optimizer, hook, self.config, observers=[self.metrics.append])
        return {"optimizer": optimizer, "lr_scheduler": torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)}

    def loss(self, data: tuple[Tensor, Tensor]) -> Tensor:
        tokens, target = data
        return F.cross_entropy(self.model(tokens), target)

    def training_step(self, data: tuple[Tensor, Tensor], i: int) -> Any:
        return {"loss": self.loss(data), "extra": i}

    def validation_step(self, data: tuple[Tensor, Tensor], i: int) -> None:
        self.log("val_loss", self.loss(data))


class TwoLines(Module):
    """Without the callback: ``objective`` on what training_step returns."""

    def training_step(self, data: tuple[Tensor, Tensor], i: int) -> Any:
        return self.optimizers().objective(self.loss(data))


class Manual(Module):
    def __init__(self, config: GAPTConfig | None = CYCLES, base: Callable[[nn.Module], Any] = adamw) -> None:
        super().__init__(config, base)
        self.automatic_optimization = False

    def training_step(self, data: tuple[Tensor, Tensor], i: int) -> None:
        optimizer = self.optimizers()
        self.manual_backward(optimizer.objective(self.loss(data)))
        optimizer.step()
        optimizer.zero_grad()
        self.lr_schedulers().step() if self.trainer.is_last_batch else None


class Advised(Module):
    """Manual, as the error about parameter alignment recommends; every call goes through Lightning's proxy."""

    def __init__(self, config: GAPTConfig) -> None:
        super().__init__(config)
        self.automatic_optimization = False

    def training_step(self, data: tuple[Tensor, Tensor], i: int) -> None:
        optimizer = self.optimizers()
        optimizer.zero_grad()
        optimizer.backward(self.loss(data) + 0.0, scale=1.0)
        optimizer.step()


class Overflowing(Module):
    """Manual; the gradients of every third step are thrown away by ``zero_grad`` without a step."""

    def __init__(self) -> None:
        super().__init__(CYCLES)
        self.automatic_optimization = False
        self.losses: list[float] = []

    def training_step(self, data: tuple[Tensor, Tensor], i: int) -> None:
        optimizer, loss = self.optimizers(), self.loss(data)
        optimizer.backward(loss * (1000.0 if i % 3 == 2 else 1.0))
        if i % 3 == 2:
            optimizer.zero_grad()
            return
        self.losses.append(loss.item())
        optimizer.step()
        optimizer.zero_grad()


class Batches:
    """An iterable that says where it stands, so that Lightning goes on within an epoch."""

    def __init__(self, n: int = BATCHES, first: int = 0) -> None:
        self.n, self.first, self.position = n, first, 0

    def __len__(self) -> int:
        return self.n

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        while self.position < self.n:
            self.position += 1
            yield batch(self.first + self.position - 1)
        self.position = 0

    def state_dict(self) -> dict[str, int]:
        return {"position": self.position}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.position = state["position"]


def fit(
    module: pl.LightningModule, folder: Path, *callbacks: Any, resume: str | None = None, **settings: Any
) -> pl.Trainer:
    options: dict[str, Any] = {
        "max_steps": STEPS,
        "accelerator": "cpu",
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": False,
        "logger": False,
        "log_every_n_steps": 1,
        "check_val_every_n_epoch": None,
        "val_check_interval": 3,
        "num_sanity_val_steps": 1,
        "default_root_dir": folder,
    }
    trainer = pl.Trainer(callbacks=list(callbacks), **(options | settings))
    validation = [Batches(2, first=100)] if isinstance(module, Module) else []
    trainer.fit(module, Batches(), *validation, ckpt_path=resume)
    return trainer


def by_hand(
    config: GAPTConfig, base: Callable[[nn.Module], Any] = adamw, accumulate: int = 1, clip: float = 0.0
) -> Module:
    """The same training in a plain loop."""
    module = Module(config, base)
    parts = module.configure_optimizers()
    optimizer, scheduler = parts["optimizer"], parts["lr_scheduler"]
    for i in range(STEPS * accumulate):
        optimizer.backward(module.loss(batch(i % BATCHES)) / 1, scale=1 / accumulate)
        if (i + 1) % accumulate == 0:
            if clip:
                nn.utils.clip_grad_norm_(module.model.parameters(), clip)
            optimizer.step()
            optimizer.zero_grad()
        if (i + 1) % BATCHES == 0:
            scheduler.step()
    return module


def assert_same_run(module: Module, expected: Module) -> None:
    assert [(m.phase, m.reason) for m in module.metrics] == [(m.phase, m.reason) for m in expected.metrics]
    assert [m.loss for m in module.metrics] == pytest.approx([m.loss for m in expected.metrics], rel=1e-5)
    for name, value in weights(module.model).items():
        torch.testing.assert_close(value, expected.model.state_dict()[name], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("way", [Module, TwoLines, Manual])
def test_trains_as_a_plain_loop_does(tmp_path: Path, way: type[Module]) -> None:
    module = way()
    fit(module, tmp_path, *([GAPTCallback()] if way is Module else []))
    assert {m.phase for m in module.metrics} == {"memorization", "compression"}
    assert_same_run(module, by_hand(CYCLES))


@pytest.mark.parametrize("schedule", ["all", "rotate"])
def test_the_proxy_measures_parameter_alignment_and_moves_schedules(tmp_path: Path, schedule: str) -> None:
    config = GAPTConfig(
        gate=COMPRESSING.gate,
        layers=LayerConfig(schedule=schedule),  # type: ignore[arg-type]
        alignment=AlignmentConfig(parameter_every=3),
    )
    module, expected = Advised(config), Module(config)
    fit(module, tmp_path)
    optimizer = expected.configure_optimizers()["optimizer"]
    for i in range(STEPS):
        optimizer.backward(expected.loss(batch(i % BATCHES)))
        optimizer.step()
        optimizer.zero_grad()
    assert [m.as_dict() for m in module.metrics] == [m.as_dict() for m in expected.metrics]
    assert [m.parameter_alignment is not None for m in module.metrics] == [i == 0 or i % 3 == 2 for i in range(STEPS)]
    assert_same(weights(module.model), weights(expected.model))


def test_the_proxy_notices_zero_grad(tmp_path: Path) -> None:
    module = Overflowing()
    fit(module, tmp_path)
    assert len(module.metrics) >= STEPS
    assert [m.loss for m in module.metrics] == pytest.approx(module.losses)


def test_accumulates_and_clips_as_a_plain_loop_does(tmp_path: Path) -> None:
    module = Module()
    fit(module, tmp_path, GAPTCallback(), accumulate_grad_batches=3, gradient_clip_val=0.1)
    assert_same_run(module, by_hand(CYCLES, accumulate=3, clip=0.1))


def test_a_pair_of_optimizers_counts_as_one(tmp_path: Path) -> None:
    module = Module(base=matrices_and_rest)
    fit(module, tmp_path, GAPTCallback())
    assert_same_run(module, by_hand(CYCLES, matrices_and_rest))


def test_in_memorization_the_parameters_are_those_of_the_bare_optimizer(tmp_path: Path) -> None:
    bare, ours = Module(None), Module(MEMORIZING)
    fit(bare, tmp_path, accumulate_grad_batches=3, gradient_clip_val=0.1)
    fit(ours, tmp_path, GAPTCallback(), accumulate_grad_batches=3, gradient_clip_val=0.1)
    assert_same(weights(ours), weights(bare))


@pytest.mark.parametrize("way", [Module, Manual])
@pytest.mark.parametrize("stop", [3, 7])
def test_resumes_bit_equal(tmp_path: Path, way: type[Module], stop: int) -> None:
    class Stop(pl.Callback):
        def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
            if trainer.global_step == stop:
                trainer.save_checkpoint(tmp_path / "saved.ckpt")

    whole = way()
    ended = fit(whole, tmp_path, GAPTCallback(), Stop())
    resumed = way()
    trainer = fit(resumed, tmp_path, GAPTCallback(), resume=str(tmp_path / "saved.ckpt"))
    assert len(resumed.metrics) == STEPS - stop
    assert resumed.metrics == whole.metrics[stop:]
    assert_same(weights(resumed), weights(whole))
    assert_same(trainer.optimizers[0].state_dict(), ended.optimizers[0].state_dict())


class Logs(pl.Callback):
    """Keeps what was logged after each batch."""

    def __init__(self) -> None:
        self.rows: list[dict[str, float]] = []

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        self.rows.append({name: float(value) for name, value in trainer.callback_metrics.items()})


@pytest.mark.parametrize("way", [Module, Manual])
def test_logs_hold_phase_and_entropies_of_the_step(tmp_path: Path, way: type[Module]) -> None:
    module, logs = way(), Logs()
    fit(module, tmp_path, GAPTCallback(), logs, logger=CSVLogger(tmp_path))
    for row, metrics in zip(logs.rows, module.metrics, strict=True):
        assert row["gapt/compression"] == (metrics.phase == "compression")
        assert row["gapt/entropy"] == pytest.approx(metrics.entropy)
        assert row["gapt/loss"] == pytest.approx(metrics.loss)
        assert row["gapt/entropy/layers.1"] == pytest.approx(metrics.layer_entropy["layers.1"])
    (written,) = tmp_path.rglob("metrics.csv")
    rows = pandas.read_csv(written).dropna(subset="gapt/loss").set_index("step")
    assert list(rows.index + 1) == [metrics.step for metrics in module.metrics]
    for metrics in module.metrics:  # what is measured now and then is in the rows of its own steps alone
        row = rows.loc[metrics.step - 1].dropna()
        expected = metrics.scalars()
        assert {name: row[name] for name in row.index if name.startswith("gapt/")} == pytest.approx(expected)
    assert {metrics.measures is None for metrics in module.metrics} == {True, False}


def test_a_gate_on_validation_judges_what_the_module_logs(tmp_path: Path) -> None:
    module = Module(GAPTConfig(gate=RESTLESS.model_copy(update={"signal": "validation"})))
    logs = Logs()
    fit(module, tmp_path, GAPTCallback(layers=False), logs)
    judged = [(m.step, m.validation_loss) for m in module.metrics if m.validation_loss is not None]
    # Validations are after steps 3, 6 and 9: each is judged at the step that follows.
    expected = [(step, pytest.approx(logs.rows[step - 1]["val_loss"])) for step in (4, 7, 10)]
    assert judged == expected
    assert not any(name.startswith("gapt/entropy/") for name in logs.rows[-1])


class Adversaries(pl.LightningModule):
    """Two wrapped optimizers and a bare one, of three models."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.a, self.b, self.c = make_net(1), make_net(2), make_net(3)
        self.wrapped: list[GAPTOptimizer] = []

    def configure_optimizers(self) -> list[Optimizer]:
        first = GAPTOptimizer(adamw(self.a), RepresentationHook(self.a, "layers.*"), MEMORIZING)
        second = GAPTOptimizer(adamw(self.b), RepresentationHook(self.b, "layers.*"), COMPRESSING)
        self.wrapped = [first, second]
        return [first, adamw(self.c), second]

    def training_step(self, data: tuple[Tensor, Tensor], i: int) -> None:
        tokens, target = data
        for model, optimizer in zip((self.a, self.c, self.b), self.optimizers(), strict=True):
            loss = F.cross_entropy(model(tokens), target)
            self.manual_backward(optimizer.objective(loss) if isinstance(optimizer, GAPTOptimizer) else loss)
            optimizer.step()
            optimizer.zero_grad()


def test_several_optimizers_keep_apart(tmp_path: Path) -> None:
    module, logs = Adversaries(), Logs()
    fit(module, tmp_path, GAPTCallback(), logs, max_steps=3 * BATCHES)
    alone = by_hand_of(2, COMPRESSING)
    assert_same(weights(module.b), weights(alone))
    assert [optimizer.metrics.step for optimizer in module.wrapped] == [BATCHES, BATCHES]
    assert logs.rows[-1]["gapt0/compression"] == 0
    assert logs.rows[-1]["gapt1/compression"] == 1


def by_hand_of(seed: int, config: GAPTConfig) -> Net:
    model = make_net(seed)
    optimizer = GAPTOptimizer(adamw(model), RepresentationHook(model, "layers.*"), config)
    for i in range(BATCHES):
        tokens, target = batch(i)
        optimizer.backward(F.cross_entropy(model(tokens), target))
        optimizer.step()
        optimizer.zero_grad()
    return model


def test_a_batch_that_is_skipped_moves_nothing(tmp_path: Path) -> None:
    class Skips(Module):
        def training_step(self, data: tuple[Tensor, Tensor], i: int) -> Any:
            return None if i == 1 else super().training_step(data, i)

    module = Skips()
    with pytest.warns(UserWarning, match="training_step. returned .None."):
        fit(module, tmp_path, GAPTCallback(), max_steps=4)
    assert len(module.metrics) == 3


@pytest.mark.parametrize("fails", [False, True])
def test_the_module_is_as_before_after_training(tmp_path: Path, fails: bool) -> None:
    class Fails(pl.Callback):
        def on_train_batch_end(self, *_: Any) -> None:
            raise MemoryError("no memory")

    module = Module()
    if fails:
        with pytest.raises(MemoryError):
            fit(module, tmp_path, GAPTCallback(), Fails())
    else:
        fit(module, tmp_path, GAPTCallback())
    assert "training_step" not in vars(module)


def test_bfloat16_stays_close(tmp_path: Path) -> None:
    exact, module = Module(COMPRESSING), Module(COMPRESSING)
    fit(exact, tmp_path, GAPTCallback(), max_steps=4)
    fit(module, tmp_path, GAPTCallback(), max_steps=4, precision="bf16-mixed")
    for metrics, expected in zip(module.metrics, exact.metrics, strict=True):
        assert metrics.loss != expected.loss
        assert (metrics.loss, metrics.entropy) == pytest.approx((expected.loss, expected.entropy), rel=0.03)


def test_a_second_fit_starts_anew(tmp_path: Path) -> None:
    """configure_optimizers runs again: a new hook, on a model whose old hook may still be alive."""
    twice, once = Module(), Module()
    fit(twice, tmp_path, GAPTCallback(), max_steps=4)
    once.model.load_state_dict(twice.model.state_dict())
    twice.metrics.clear()
    fit(twice, tmp_path, GAPTCallback())
    fit(once, tmp_path, GAPTCallback())
    assert twice.metrics == once.metrics
    assert_same(weights(twice), weights(once))


def test_refuses_with_advice(tmp_path: Path) -> None:
    validated = Module(GAPTConfig(gate=GateConfig(signal="validation")))
    with pytest.raises(ValueError, match=r"'val_loss'.*metric="):
        fit(validated, tmp_path, GAPTCallback(metric="valid_loss"))
    with pytest.raises(TypeError, match=r"return GAPTOptimizer\(optimizer, hook\)"):
        fit(Module(None), tmp_path, GAPTCallback())
    measuring = Module(GAPTConfig(alignment=AlignmentConfig(parameter_every=1)))
    with pytest.raises(ValueError, match="optimize manually"):
        fit(measuring, tmp_path, GAPTCallback())


class Writes(pl.Callback):
    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_train_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        metrics = [m.as_dict() for m in pl_module.metrics]
        torch.save({"metrics": metrics, "weights": weights(pl_module)}, self.folder / f"{trainer.global_rank}.pt")


@pytest.mark.slow
def test_two_ranks_on_the_same_data_train_as_one(tmp_path: Path) -> None:
    fit(Module(), tmp_path, GAPTCallback(), Writes(tmp_path), strategy="ddp_spawn", devices=2)
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2))
    assert_same(first, second)
    alone = by_hand(CYCLES)
    assert [m["phase"] for m in first["metrics"]] == [m.phase for m in alone.metrics]
    assert [m["loss"] for m in first["metrics"]] == pytest.approx([m.loss for m in alone.metrics], rel=1e-5)
    for name, value in first["weights"].items():
        torch.testing.assert_close(value, weights(alone)[name], rtol=1e-4, atol=1e-6)
