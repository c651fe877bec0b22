"""Hugging Face Accelerate, with gradient accumulation."""

import torch
from accelerate import Accelerator
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from gapt_optim import GAPTOptimizer, RepresentationHook


def main() -> None:
    torch.manual_seed(0)
    x = torch.randn(512, 16)
    data = TensorDataset(x, nn.Linear(16, 5)(x).argmax(-1))
    model = nn.Sequential(nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 5))
    # new: wrap before prepare, and keep the name: prepare returns a wrapper of its own
    gapt = GAPTOptimizer(torch.optim.AdamW(model.parameters(), lr=3e-3), RepresentationHook(model, ["1", "3"]))

    accelerator = Accelerator(gradient_accumulation_steps=2)
    model, optimizer, loader = accelerator.prepare(model, gapt, DataLoader(data, batch_size=32, shuffle=True))
    for epoch in range(3):
        for inputs, labels in loader:
            with accelerator.accumulate(model):
                loss = nn.functional.cross_entropy(model(inputs), labels)
                accelerator.backward(gapt.objective(loss))  # new: was accelerator.backward(loss)
                optimizer.step()
                optimizer.zero_grad()
        metrics = gapt.metrics  # new
        assert metrics is not None
        accelerator.print(f"epoch {epoch}: loss {metrics.loss:.3f}, entropy {metrics.entropy:.3f}, {gapt.phase.value}")


if __name__ == "__main__":
    main()
