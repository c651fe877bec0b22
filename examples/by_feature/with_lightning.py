"""Lightning with automatic optimization: wrap the optimizer in configure_optimizers, and add a callback."""

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from gapt_optim import GAPTOptimizer, RepresentationHook
from gapt_optim.integrations.lightning import GAPTCallback


class Classifier(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 5))

    def training_step(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        base = torch.optim.AdamW(self.parameters(), lr=3e-3)
        return GAPTOptimizer(base, RepresentationHook(self.net, ["1", "3"]))  # new: was return base


def main() -> None:
    torch.manual_seed(0)
    x = torch.randn(512, 16)
    data = TensorDataset(x, nn.Linear(16, 5)(x).argmax(-1))
    trainer = pl.Trainer(
        max_epochs=3,
        accelerator="cpu",
        callbacks=[GAPTCallback()],  # new: adds the entropy to the loss, and logs phase and entropies
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(Classifier(), DataLoader(data, batch_size=32))
    print(
        {name: round(float(value), 3) for name, value in trainer.callback_metrics.items() if name.startswith("gapt/")}
    )


if __name__ == "__main__":
    main()
