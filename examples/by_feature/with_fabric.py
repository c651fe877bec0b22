"""Lightning Fabric, as in litgpt, with gradient accumulation."""

import torch
from lightning.fabric import Fabric
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from gapt_optim import GAPTOptimizer, RepresentationHook

MICRO_BATCHES = 2


def main() -> None:
    fabric = Fabric(accelerator="cpu", devices=1)
    fabric.seed_everything(0, verbose=False)
    x = torch.randn(512, 16)
    data = TensorDataset(x, nn.Linear(16, 5)(x).argmax(-1))
    model = nn.Sequential(nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 5))
    # new: wrap before setup, and keep the name: setup returns a wrapper of its own
    gapt = GAPTOptimizer(torch.optim.AdamW(model.parameters(), lr=3e-3), RepresentationHook(model, ["1", "3"]))

    model, optimizer = fabric.setup(model, gapt)
    loader = fabric.setup_dataloaders(DataLoader(data, batch_size=32, shuffle=True))
    for _ in range(3):
        for i, (inputs, labels) in enumerate(loader):
            accumulating = (i + 1) % MICRO_BATCHES != 0
            with fabric.no_backward_sync(model, enabled=accumulating):
                loss = nn.functional.cross_entropy(model(inputs), labels)
                fabric.backward(gapt.objective(loss) / MICRO_BATCHES)  # new: was fabric.backward(loss / MICRO_BATCHES)
            if not accumulating:
                optimizer.step()
                optimizer.zero_grad()
    metrics = gapt.metrics  # new
    assert metrics is not None
    print(f"step {metrics.step}: loss {metrics.loss:.3f}, entropy {metrics.entropy:.3f}, {gapt.phase.value}")


if __name__ == "__main__":
    main()
