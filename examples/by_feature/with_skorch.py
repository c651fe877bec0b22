"""skorch: a net whose training step differentiates the objective, in a pipeline or a search of scikit-learn too."""

from typing import Any

import torch
from skorch import NeuralNetClassifier
from skorch.dataset import unpack_data
from torch import nn

from gapt_optim import GAPTOptimizer, RepresentationHook


class GAPTNet(NeuralNetClassifier):
    """Trains its module with a GAPTOptimizer."""

    optimizer_: Any

    def initialize_optimizer(self, *args: Any) -> "GAPTNet":  # new
        super().initialize_optimizer(*args)
        self.optimizer_ = GAPTOptimizer(self.optimizer_, RepresentationHook(self.module_, ["1", "3"]))
        return self

    def train_step_single(self, batch: Any, **fit_params: Any) -> dict[str, Any]:
        self._set_training(True)
        x, y = unpack_data(batch)
        predicted = self.infer(x, **fit_params)
        loss = self.get_loss(predicted, y, X=x, training=True)
        self.optimizer_.backward(loss)  # new: was loss.backward()
        return {"loss": loss, "y_pred": predicted}


def main() -> None:
    torch.manual_seed(0)
    x = torch.randn(640, 16)
    y = nn.Linear(16, 5)(x).argmax(-1)
    net = GAPTNet(
        nn.Sequential(nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 5)),
        criterion=nn.CrossEntropyLoss,
        optimizer=torch.optim.AdamW,
        lr=3e-3,
        max_epochs=3,
        batch_size=32,
        verbose=0,
    )
    net.fit(x.numpy(), y.numpy())
    metrics = net.optimizer_.metrics
    assert metrics is not None
    print(f"step {metrics.step}: loss {metrics.loss:.3f}, entropy {metrics.entropy:.3f}, score {net.score(x, y):.2f}")


if __name__ == "__main__":
    main()
