"""Keras on torch (KERAS_BACKEND=torch): a training step of your own. Keras's own optimizers are no torch ones."""

import os
from typing import Any

os.environ["KERAS_BACKEND"] = "torch"

import keras
import torch
from torch import Tensor, nn

from gapt_optim import GAPTOptimizer, RepresentationHook


class Classifier(keras.Model):
    """Layers that are attributes are modules of the model; those of a functional model are not."""

    gapt: GAPTOptimizer

    def __init__(self) -> None:
        super().__init__()
        self.first = keras.layers.Dense(64, activation="relu")
        self.second = keras.layers.Dense(64, activation="relu")
        self.head = keras.layers.Dense(5)

    def call(self, x: Tensor) -> Tensor:
        return self.head(self.second(self.first(x)))

    def train_step(self, data: Any) -> dict[str, Any]:
        x, y = data
        predicted = self(x, training=True)
        loss = self.compute_loss(x, y, predicted)
        self.gapt.backward(loss)  # new: was loss.backward()
        self.gapt.step()  # new: was self.optimizer.apply(gradients, weights)
        self.gapt.zero_grad()
        for metric in self.metrics:
            metric.update_state(loss) if metric.name == "loss" else metric.update_state(y, predicted)
        return {metric.name: metric.result() for metric in self.metrics}


def main() -> None:
    keras.utils.set_random_seed(0)
    x = torch.randn(512, 16)
    y = nn.Linear(16, 5)(x).argmax(-1)
    model = Classifier()
    model(x[:1])  # makes its parameters
    hook = RepresentationHook(model, ["first", "second"])  # new
    model.gapt = GAPTOptimizer(torch.optim.AdamW(model.parameters(), lr=3e-3), hook)  # new
    model.compile(loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    model.fit(x.numpy(), y.numpy(), batch_size=32, epochs=3, verbose=0)
    metrics = model.gapt.metrics
    assert metrics is not None
    print(f"step {metrics.step}: loss {metrics.loss:.3f}, entropy {metrics.entropy:.3f}, {model.gapt.phase.value}")


if __name__ == "__main__":
    main()
