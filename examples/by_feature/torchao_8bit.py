"""AdamW with a state of 8 bits per number, from torchao. Its first step compiles, which takes a while."""

import torch
import torchao.optim
from torch import nn

from gapt_optim import GAPTOptimizer, RepresentationHook


def main() -> None:
    torch.manual_seed(0)
    teacher = nn.Linear(64, 10)
    model = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 10))
    # new: the wrapper takes any torch.optim.Optimizer, and never touches its state
    base = torchao.optim.AdamW8bit(model.parameters(), lr=1e-3)
    optimizer = GAPTOptimizer(base, RepresentationHook(model, ["1", "3"]))

    for step in range(1, 41):
        x = torch.randn(64, 64)
        loss = nn.functional.cross_entropy(model(x), teacher(x).argmax(-1))
        optimizer.backward(loss)  # new: was loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if step % 10 == 0 and optimizer.metrics is not None:
            print(
                f"step {step}: loss {loss.item():.3f}, entropy {optimizer.metrics.entropy:.3f}, {optimizer.phase.value}"
            )
    state = base.state[model[2].weight]["exp_avg"]
    print(f"moments of the largest matrix: {type(state).__name__}")


if __name__ == "__main__":
    main()
