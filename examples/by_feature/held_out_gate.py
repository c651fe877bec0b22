"""A gate that judges held-out loss: compression starts when the model stops generalizing, not when it stops fitting."""

import torch
from torch import nn

from gapt_optim import GAPTConfig, GAPTOptimizer, GateConfig, ObjectiveConfig, RepresentationHook


def main() -> None:
    torch.manual_seed(0)
    x, y = torch.randn(512, 20), torch.randint(0, 4, (512,))  # noise has nothing to generalize: this overfits
    train, held_out = (x[:128], y[:128]), (x[128:], y[128:])
    model = nn.Sequential(nn.Linear(20, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 4))
    hook = RepresentationHook(model, ["1", "3"])
    # new: patience counts validations; compression is short and strong, to undo what was learned by heart
    config = GAPTConfig(gate=GateConfig.validation(), objective=ObjectiveConfig(weight=3.0))
    optimizer = GAPTOptimizer(torch.optim.AdamW(model.parameters(), lr=3e-3), hook, config)

    for step in range(1, 201):
        loss = nn.functional.cross_entropy(model(train[0]), train[1])
        optimizer.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        if step % 5 == 0:
            model.eval()
            with torch.no_grad():
                judged = nn.functional.cross_entropy(model(held_out[0]), held_out[1])
            model.train()
            optimizer.record_validation(judged.item())  # new: the gate judges it at the next step
        metrics = optimizer.metrics
        if metrics is not None and metrics.reason is not None:
            print(f"step {step}: {metrics.phase} -> {metrics.next_phase} ({metrics.reason})")
    print(f"switches: {optimizer.metrics.switches if optimizer.metrics else 0}")


if __name__ == "__main__":
    main()
