"""float16 with a GradScaler and clipping. The entropy is part of the loss that is scaled: nothing else changes."""

import torch
from torch import nn

from gapt_optim import GAPTOptimizer, RepresentationHook


def main() -> None:
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    teacher = nn.Linear(32, 8).to(device)
    model = nn.Sequential(nn.Linear(32, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 8)).to(device)
    hook = RepresentationHook(model, ["1", "3"])
    optimizer = GAPTOptimizer(torch.optim.AdamW(model.parameters(), lr=3e-3), hook)
    scaler = torch.amp.GradScaler(device, init_scale=1024.0)

    for step in range(1, 61):
        x = torch.randn(64, 32, device=device)
        with torch.autocast(device, torch.float16):
            loss = nn.functional.cross_entropy(model(x), teacher(x).argmax(-1))
        scaler.scale(optimizer.objective(loss)).backward()  # type: ignore[no-untyped-call]  # new: was scale(loss)
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        if step % 20 == 0 and optimizer.metrics is not None:
            print(
                f"step {step}: loss {loss.item():.3f}, entropy {optimizer.metrics.entropy:.3f}, {optimizer.phase.value}"
            )


if __name__ == "__main__":
    main()
