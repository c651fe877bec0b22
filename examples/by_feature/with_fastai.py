"""fastai: a callback adds the entropy to the loss that is differentiated; the optimizer is wrapped once more."""

import fastai.callback.progress
import fastai.callback.schedule  # noqa: F401, adds fit_one_cycle to Learner
import torch
from fastai.callback.core import Callback
from fastai.data.core import DataLoaders
from fastai.learner import Learner
from fastai.optimizer import OptimWrapper
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from gapt_optim import GAPTOptimizer, RepresentationHook


class GAPT(Callback):  # new
    """fastai logs the loss itself, and differentiates this one."""

    def after_loss(self) -> None:
        if self.training:
            self.learn.loss_grad = self.opt.opt.objective(self.loss_grad)


def main() -> None:
    torch.manual_seed(0)
    x = torch.randn(640, 16)
    data = TensorDataset(x, nn.Linear(16, 5)(x).argmax(-1))
    train, valid = torch.utils.data.random_split(data, [512, 128])
    loaders = DataLoaders(DataLoader(train, batch_size=32, shuffle=True), DataLoader(valid, batch_size=32))
    model = nn.Sequential(nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 5))
    gapt = GAPTOptimizer(torch.optim.AdamW(model.parameters()), RepresentationHook(model, ["1", "3"]))  # new
    learner = Learner(
        loaders,
        model,
        loss_func=nn.functional.cross_entropy,
        opt_func=lambda parameters, **options: OptimWrapper(opt=gapt),  # new: was OptimWrapper(parameters, AdamW)
        cbs=[GAPT()],  # new
    )
    with learner.no_bar(), learner.no_logging():
        learner.fit_one_cycle(3, 3e-3)
    metrics = gapt.metrics
    assert metrics is not None
    print(f"step {metrics.step}: loss {metrics.loss:.3f}, entropy {metrics.entropy:.3f}, {gapt.phase.value}")


if __name__ == "__main__":
    main()
