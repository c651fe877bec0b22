"""Gradient caching (luyug/GradCache): a contrastive loss over more texts than fit into memory at once.

The second forward pass differentiates a surrogate whose gradient is the loss's and whose value means nothing. The gate
needs the value, so it is put back.
"""

from typing import Any

import torch
from grad_cache import GradCache
from torch import Tensor, nn

from gapt_optim import GAPTOptimizer, RepresentationHook


class Cached(GradCache):
    """GradCache whose backward passes are the optimizer's."""

    optimizer: GAPTOptimizer

    def build_cache(self, *reps: Tensor, **options: Any) -> Any:
        cache, self.loss = super().build_cache(*reps, **options)
        return cache, self.loss

    def forward_backward(
        self, model: Any, inputs: Any, gradients: Any, states: Any, *args: Any, **options: Any
    ) -> None:
        share = 1 / (len(self.models) * len(inputs))  # of this chunk in the step
        for x, state, gradient in zip(inputs, states, gradients, strict=True):
            with state:  # random numbers as in the first pass
                reps = self.get_reps(self.model_call(model, x))
            surrogate = torch.dot(reps.flatten(), gradient.flatten())
            value = surrogate + (share * self.loss - surrogate.detach())
            self.optimizer.backward(value, scaled_by=share)  # new: was surrogate.backward()


def contrastive(queries: Tensor, answers: Tensor) -> Tensor:
    """Each query belongs to the answer in the same place."""
    return nn.functional.cross_entropy(queries @ answers.mT, torch.arange(len(queries)))


def main() -> None:
    torch.manual_seed(0)
    encoder = nn.Sequential(nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 8))
    optimizer = GAPTOptimizer(torch.optim.AdamW(encoder.parameters()), RepresentationHook(encoder, ["1", "3"]))  # new
    cached = Cached(models=[encoder, encoder], chunk_sizes=16, loss_fn=contrastive)
    cached.optimizer = optimizer  # new
    for step in range(1, 31):
        x = torch.randn(64, 16)
        cached(x, x + 0.1 * torch.randn(64, 16))
        optimizer.step()
        optimizer.zero_grad()
        metrics = optimizer.metrics
        if metrics is not None and step % 10 == 0:
            print(f"step {step}: loss {metrics.loss:.3f}, entropy {metrics.entropy:.3f}, {optimizer.phase.value}")


if __name__ == "__main__":
    main()
