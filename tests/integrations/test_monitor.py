"""The monitor in training loops that are not ours: two lines, and the same weights."""

from __future__ import annotations

from dataclasses import astuple
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gapt_optim import RepresentationHook, StepMetrics, monitor


def test_curves_of_a_loop_that_is_not_ours_equal_measuring(tmp_path: Path) -> None:
    """Two lines around ``trainer.train()``; then the same batches, once more, with the weights of that step."""
    transformers = pytest.importorskip("transformers")
    weights: list[dict[str, Tensor]] = []
    batches: list[dict[str, Tensor]] = []

    class Keeps(transformers.TrainerCallback):  # type: ignore[misc, name-defined]
        def on_step_begin(self, args: Any, state: Any, control: Any, *, model: nn.Module, **kwargs: Any) -> None:
            weights.append({name: value.clone() for name, value in model.state_dict().items()})

    def collate(rows: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        batches.append(transformers.default_data_collator(rows))
        return batches[-1]

    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=64, n_positions=16, n_embd=8, n_layer=2, n_head=1, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0
    )
    model = transformers.GPT2LMHeadModel(config)
    rows = torch.randint(0, 64, (24, 16))
    keep = torch.ones(24, 16, dtype=torch.long)
    keep[::3, 11:] = 0
    data = [{"input_ids": row, "labels": row, "attention_mask": mask} for row, mask in zip(rows, keep, strict=True)]
    arguments = transformers.TrainingArguments(
        str(tmp_path), max_steps=5, report_to="none", disable_tqdm=True, use_cpu=True, logging_strategy="no",
        save_strategy="no", per_device_train_batch_size=2, gradient_accumulation_steps=2, learning_rate=1e-2,
        warmup_steps=0,
    )  # fmt: skip
    trainer = transformers.Trainer(model, arguments, train_dataset=data, data_collator=collate, callbacks=[Keeps()])
    seen: list[StepMetrics] = []
    with monitor(model, "transformer.h.*", every=2, observers=[seen.append]):
        trainer.train()

    assert [metrics.step for metrics in seen] == [1, 2, 4]
    assert len(batches) >= 10
    hook = RepresentationHook(model, "transformer.h.*")
    model.eval()
    for metrics in seen:
        model.load_state_dict(weights[metrics.step - 1])
        with torch.no_grad(), hook.measuring() as measured:
            for batch in batches[2 * (metrics.step - 1) : 2 * metrics.step]:
                model(**batch)
        assert metrics.layer_entropy == pytest.approx(measured.entropies, rel=1e-5)
        for name, measures in measured.measures.items():
            assert astuple(metrics.layer_measures[name]) == pytest.approx(astuple(measures), rel=1e-5)
    assert seen[0].entropy != pytest.approx(seen[-1].entropy, rel=1e-3)


def test_transformers_trainer(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    from gapt_optim.integrations.transformers import MonitorCallback

    def trained(callbacks: list[Any]) -> list[Tensor]:
        torch.manual_seed(0)
        config = transformers.GPT2Config(vocab_size=64, n_positions=16, n_embd=8, n_layer=2, n_head=1)
        model = transformers.GPT2LMHeadModel(config)
        row = torch.arange(16)
        arguments = transformers.TrainingArguments(
            str(tmp_path), max_steps=5, report_to="none", disable_tqdm=True, use_cpu=True, logging_strategy="no",
            save_strategy="no", per_device_train_batch_size=2, gradient_accumulation_steps=2,
        )  # fmt: skip
        data = [{"input_ids": row, "labels": row}] * 20
        transformers.Trainer(model, arguments, train_dataset=data, callbacks=callbacks).train()
        assert not any(module._forward_hooks for module in model.modules())
        return [parameter.detach() for parameter in model.parameters()]

    seen: list[StepMetrics] = []
    watched = trained([MonitorCallback("transformer.h.*", every=2, observers=[seen.append])])
    assert [metrics.step for metrics in seen] == [1, 2, 4]
    assert all(len(metrics.layer_entropy) == 2 for metrics in seen)
    assert all(torch.equal(a, b) for a, b in zip(watched, trained([]), strict=True))


@pytest.mark.filterwarnings("ignore:.isinstance.treespec, LeafSpec:FutureWarning")
@pytest.mark.filterwarnings("ignore::lightning.pytorch.utilities.rank_zero.LightningDeprecationWarning")
@pytest.mark.filterwarnings("ignore:The .train_dataloader. does not have many workers")
@pytest.mark.filterwarnings("ignore:The number of training batches")
def test_lightning(tmp_path: Path) -> None:
    lightning = pytest.importorskip("lightning.pytorch")
    from gapt_optim.integrations.lightning import MonitorCallback

    class Module(lightning.LightningModule):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.model = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 2))

        def training_step(self, batch: Tensor, index: int) -> Tensor:
            return self.model(batch).square().mean()

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.AdamW(self.parameters(), lr=1e-3)

    def trained(callbacks: list[Any]) -> list[Tensor]:
        torch.manual_seed(0)
        module = Module()
        trainer = lightning.Trainer(
            max_steps=5, callbacks=callbacks, logger=False, enable_checkpointing=False, enable_progress_bar=False,
            enable_model_summary=False, accelerator="cpu", default_root_dir=tmp_path,
        )  # fmt: skip
        trainer.fit(module, torch.utils.data.DataLoader(torch.randn(40, 4), batch_size=8))
        if callbacks:
            assert "gapt/entropy" in trainer.callback_metrics
        return [parameter.detach() for parameter in module.parameters()]

    seen: list[StepMetrics] = []
    watched = trained([MonitorCallback("model.1", every=2, observers=[seen.append])])
    assert [metrics.step for metrics in seen] == [1, 2, 4]
    assert all(torch.equal(a, b) for a, b in zip(watched, trained([]), strict=True))
