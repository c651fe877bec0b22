"""The angle between the gradients of loss and entropy: at the layers at every step, of the parameters now and then."""

import torch
from torch import nn

from gapt_optim import AlignmentConfig, GAPTConfig, GAPTOptimizer, RepresentationHook


def main() -> None:
    torch.manual_seed(0)
    teacher = nn.Linear(16, 5)
    model = nn.Sequential(nn.Linear(16, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 5))
    hook = RepresentationHook(model, ["1", "3"])
    # new: every tenth step one more gradient is computed; what reaches .grad stays bit for bit the same
    config = GAPTConfig(alignment=AlignmentConfig(parameter_every=10))
    optimizer = GAPTOptimizer(torch.optim.AdamW(model.parameters(), lr=3e-3), hook, config)

    for step in range(1, 101):
        x = torch.randn(64, 16)
        loss = nn.functional.cross_entropy(model(x), teacher(x).argmax(-1))
        optimizer.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        metrics = optimizer.metrics
        assert metrics is not None
        # new: negative where what lowers the entropy raises the loss; the two are different quantities
        if metrics.parameter_alignment is not None and metrics.alignment is not None:
            layers, parameters = metrics.alignment.cosine, metrics.parameter_alignment.cosine
            print(
                f"step {step:>3} ({metrics.phase}): cosine {layers:+.3f} at the layers, {parameters:+.3f} of parameters"
            )


if __name__ == "__main__":
    main()
