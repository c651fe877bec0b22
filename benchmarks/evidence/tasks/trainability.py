"""Networks whose data change: permuted pixels, permuted alphabets, more data after half of it, rewired worlds."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gapt_optim import GAPTOptimizer, RepresentationHook

from ..measures import note, watching
from . import remedies
from .poles import Poles
from .settings import TaskSettings
from .text import corpus

BYTES = 256
DORMANT = 0.025
"""A unit whose mean |output| is at most this share of its layer's mean is dormant (Sokar et al. 2023)."""
RANK_EVERY = 10
"""Steps from one reading of the effective rank to the next, for the gate on it."""


@dataclass(frozen=True)
class Settings(TaskSettings):
    """Of one run."""

    window: Any = None
    """None: the whole batch, or sequence, as one matrix."""
    setting: str = "digits"
    """digits, alphabets, warm or poles."""
    tasks: int = 20
    """Into which the steps are divided equally."""
    batch: int = 64
    width: int = 64
    layers_deep: int = 2
    norm: bool = True
    """LayerNorm behind each linear map of the MLP. The transformer has it always."""
    lr: float = 1e-3
    remedy: str = "none"
    strength: float = 0.0
    press: str = "none"
    """How the entropy is pressed: none, floor, up, down, noise (as large as the floor's gradient), or rank (up while
    the effective rank is below its start)."""
    samples: int = 1300
    """Digits in the training data."""
    fresh: bool = False
    """Start afresh at each switch, the optimizer too: what a warm start is compared with."""
    keep_curve: bool = True


Data = tuple[Tensor, Tensor]


class MLP(nn.Module):
    """Linear, LayerNorm, ReLU several times, and a readout."""

    def __init__(self, s: Settings, inputs: int = 64, outputs: int = 10) -> None:
        super().__init__()
        widths = [inputs] + [s.width] * s.layers_deep
        self.layers = nn.ModuleList(
            nn.Sequential(nn.Linear(a, b), nn.LayerNorm(b) if s.norm else nn.Identity(), nn.ReLU())
            for a, b in itertools.pairwise(widths)
        )
        self.readout = nn.Linear(s.width, outputs)
        self.watched = "layers.*"

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        answer: Tensor = self.readout(x)
        return answer

    def units(self) -> list[remedies.Units]:
        """Of every hidden layer."""
        following = [*(layer[0] for layer in list(self.layers)[1:]), self.readout]  # type: ignore[index]
        return [
            remedies.Units(layer[0], layer[1] if isinstance(layer[1], nn.LayerNorm) else None, layer[2], out)  # type: ignore[index]
            for layer, out in zip(self.layers, following, strict=True)
        ]


class Block(nn.Module):
    """Attention and an MLP, each behind a LayerNorm."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.before_attention, self.before_mlp = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.mixed = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.into, self.relu, self.out = nn.Linear(width, 2 * width), nn.ReLU(), nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        rows, tokens, width = x.shape
        q, k, v = self.qkv(self.before_attention(x)).view(rows, tokens, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).reshape(rows, tokens, width)
        x = x + self.mixed(mixed)
        changed: Tensor = x + self.out(self.relu(self.into(self.before_mlp(x))))
        return changed


class Transformer(nn.Module):
    """On bytes."""

    def __init__(self, s: Settings, context: int) -> None:
        super().__init__()
        self.tokens, self.places = nn.Embedding(BYTES, s.width), nn.Embedding(context, s.width)
        self.blocks = nn.ModuleList(Block(s.width, 2) for _ in range(s.layers_deep))
        self.norm, self.readout = nn.LayerNorm(s.width), nn.Linear(s.width, BYTES)
        self.watched = "blocks.*"

    def forward(self, ids: Tensor) -> Tensor:
        x = self.tokens(ids) + self.places.weight[: ids.shape[1]]
        for block in self.blocks:
            x = block(x)
        answer: Tensor = self.readout(self.norm(x))
        return answer

    def units(self) -> list[remedies.Units]:
        """Of the MLP in each block."""
        return [remedies.Units(b.into, None, b.relu, b.out) for b in self.blocks]  # type: ignore[arg-type]


Network = MLP | Transformer


class Labelled:
    """Data with an answer beside each row, which the network has no part in."""

    def begin(self, model: nn.Module) -> None:
        """Told the network that is trained."""

    def loss(self, model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        """Mean cross-entropy, in nats."""
        return F.cross_entropy(model(x).flatten(0, -2), y.flatten())

    def scores(self, answers: Tensor, y: Tensor) -> dict[str, float]:
        """Of held-out data. A network that has diverged guesses."""
        answers = answers.flatten(0, -2)
        if not answers.isfinite().all():
            return {"loss": math.log(answers.shape[-1]), "accuracy": 1 / answers.shape[-1]}
        return {
            "loss": F.cross_entropy(answers, y.flatten()).item(),
            "accuracy": (answers.argmax(-1) == y.flatten()).float().mean().item(),
        }


class Digits(Labelled):
    """scikit-learn's digits, with other pixels for each task."""

    def __init__(self, s: Settings) -> None:
        self.s = s
        draws = torch.Generator().manual_seed(s.seed + 1_000_003)
        images, labels = digits()
        order = torch.randperm(len(images), generator=draws)
        self.images, self.labels = images[order], labels[order]
        self.pixels = [torch.randperm(64, generator=draws) for _ in range(s.tasks)]
        self.draws = draws

    def network(self) -> Network:
        """With weights from torch's global generator."""
        return MLP(self.s)

    def batch(self, task: int) -> Data:
        """Of training data."""
        rows = torch.randint(self.s.samples, (self.s.batch,), generator=self.draws)
        return self.images[rows][:, self.pixels[task]], self.labels[rows]

    def held_out(self, task: int) -> Data:
        """What the training data do not have."""
        return self.images[self.s.samples :][:, self.pixels[task]], self.labels[self.s.samples :]


class Warm(Digits):
    """Half of the digits, then all, their pixels in place."""

    def batch(self, task: int) -> Data:
        known = self.s.samples if task else self.s.samples // 2
        rows = torch.randint(known, (self.s.batch,), generator=self.draws)
        return self.images[rows], self.labels[rows]

    def held_out(self, task: int) -> Data:
        return self.images[self.s.samples :], self.labels[self.s.samples :]


class Alphabets(Labelled):
    """English, in which each task writes other bytes for the bytes of the text."""

    CORPUS = "fineweb"
    CONTEXT = 32
    HELD_OUT = 256

    def __init__(self, s: Settings) -> None:
        self.s = s
        self.draws = torch.Generator().manual_seed(s.seed + 1_000_003)
        self.text, held_out = corpus(self.CORPUS, 300_000, self.HELD_OUT * (self.CONTEXT + 1))
        self.rows = held_out.view(self.HELD_OUT, self.CONTEXT + 1)
        self.alphabets = [torch.randperm(BYTES, generator=self.draws) for _ in range(s.tasks)]
        self.offsets = torch.arange(self.CONTEXT + 1)

    def network(self) -> Network:
        """With weights from torch's global generator."""
        return Transformer(self.s, self.CONTEXT)

    def batch(self, task: int) -> Data:
        """Of training data: bytes, and those that follow."""
        starts = torch.randint(len(self.text) - self.CONTEXT - 1, (self.s.batch, 1), generator=self.draws)
        rows = self.alphabets[task][self.text[starts + self.offsets]]
        return rows[:, :-1], rows[:, 1:]

    def held_out(self, task: int) -> Data:
        """Of text that the training data do not have."""
        rows = self.alphabets[task][self.rows]
        return rows[:, :-1], rows[:, 1:]


Source = Digits | Alphabets | Poles
SETTINGS: dict[str, Callable[[Settings], Source]] = {
    "digits": Digits,
    "alphabets": Alphabets,
    "warm": Warm,
    "poles": lambda s: Poles(s, lambda inputs, outputs: MLP(s, inputs, outputs)),
}


@lru_cache(maxsize=1)
def digits() -> Data:
    """(1797, 64) pixels about their mean, in [-1, 1], and labels."""
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    return torch.tensor(images / 8 - 1, dtype=torch.float32), torch.tensor(labels)


def train(s: Settings) -> dict[str, Any]:
    """One run. The seed alone decides weights, data and their order, so methods share them."""
    data = SETTINGS[s.setting](s)
    torch.manual_seed(s.seed)
    model = data.network()
    data.begin(model)
    layers = list(model.get_submodule(model.watched.removesuffix(".*")).children())
    base = torch.optim.AdamW(model.parameters(), lr=s.lr, weight_decay=0.0, fused=True)
    remedy = remedies.named(s.remedy, s.strength, model, model.units(), base, data.network)
    base = decayed(base, remedy.weight_decay)
    press = Press(s, model, layers, base)
    curve: dict[str, list[float]] = {}
    task = 0
    for step in range(s.steps):
        if step * s.tasks // s.steps != task:
            note(curve, evaluate(model, layers, data, task))
            task = step * s.tasks // s.steps
            remedy.at_switch()
            if s.fresh:
                model.load_state_dict(data.network().state_dict())
                base.state.clear()
        x, y = data.batch(task)
        seen: AbstractContextManager[list[Tensor]]
        seen = watching(layers, graph=True) if s.remedy == "vcreg" else nullcontext([])
        with seen as hidden:
            loss = data.loss(model, x, y)
        added = remedy.penalty(hidden)
        press.step(loss if added is None else loss + added, x)
        remedy.after_step()
        if not math.isfinite(loss.item()):
            break
    press.remove()
    note(curve, evaluate(model, layers, data, task))
    while len(curve["rank"]) < s.tasks:
        note(curve, {name: values[-1] for name, values in curve.items()})
    final = {name: sum(values) / len(values) for name, values in curve.items()}
    if s.setting == "warm":
        final = {name: values[-1] for name, values in curve.items()}
    return {"final": final, "best": {}, "curve": curve if s.keep_curve else {}}


def decayed(base: torch.optim.AdamW, weight_decay: float) -> torch.optim.AdamW:
    """The optimizer with weight decay on its matrices."""
    parameters = base.param_groups[0]["params"]
    matrices = {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": weight_decay}
    rest = {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0}
    base.param_groups.clear()
    base.add_param_group(matrices)
    base.add_param_group(rest)
    return base


class Press:
    """A step of the optimizer, with the entropy pressed as the settings say."""

    def __init__(self, s: Settings, model: Network, layers: Sequence[nn.Module], base: torch.optim.Optimizer) -> None:
        self.s, self.model, self.layers, self.base = s, model, layers, base
        self.parameters = list(model.parameters())
        self.hook = None if s.press == "none" else RepresentationHook(model, model.watched)
        self.gapt = None if self.hook is None else GAPTOptimizer(base, self.hook, s.config())
        self.noise = torch.Generator().manual_seed(s.seed + 7)
        self.steps = 0
        self.rank_at_start = self.rank = math.inf

    def step(self, loss: Tensor, x: Tensor) -> None:
        """Differentiate ``loss`` of a batch ``x``, and step."""
        bare = self.gapt is None or (self.s.press == "rank" and not self._rank_is_low(x))
        if bare:
            loss.backward()  # type: ignore[no-untyped-call]
            self.base.step()
            self.base.zero_grad()
            return
        assert self.gapt is not None
        if self.s.press == "noise":
            self._noisy_backward(loss)
        else:
            self.gapt.backward(loss)
        self.gapt.step()
        self.gapt.zero_grad()

    def remove(self) -> None:
        """Take the hook off."""
        if self.hook is not None:
            self.hook.remove()

    def _noisy_backward(self, loss: Tensor) -> None:
        """The loss's gradient, and noise as large in each parameter as what the floor would add."""
        assert self.gapt is not None
        alone = torch.autograd.grad(loss, self.parameters, retain_graph=True)
        self.gapt.backward(loss)
        for parameter, gradient in zip(self.parameters, alone, strict=True):
            assert parameter.grad is not None
            added = (parameter.grad - gradient).norm()
            noise = torch.randn(gradient.shape, generator=self.noise)
            parameter.grad = gradient + noise * (added / noise.norm())

    def _rank_is_low(self, x: Tensor) -> bool:
        if self.steps % RANK_EVERY == 0:
            assert self.hook is not None
            with torch.no_grad(), self.hook.measuring(), watching(self.layers) as hidden:
                self.model(x)
            self.rank = effective_rank(hidden)
            if self.steps == 0:
                self.rank_at_start = self.rank
        self.steps += 1
        return self.rank < self.rank_at_start


@torch.no_grad()
def evaluate(model: Network, layers: Sequence[nn.Module], data: Source, task: int) -> dict[str, float]:
    """Scores on held-out data, effective rank and the share of dormant units, as means over layers.

    A network that has diverged has neither rank nor units.
    """
    x, y = data.held_out(task)
    units = [unit.nonlinearity for unit in model.units()]
    with watching(layers) as hidden, watching(units) as said:
        answers = model(x)
    found = data.scores(answers, y)
    if not answers.isfinite().all():
        return {**found, "rank": 1.0, "dormant": 1.0}
    return {**found, "rank": effective_rank(hidden), "dormant": sum(map(dormant, said)) / len(said)}


def effective_rank(hidden: Sequence[Tensor]) -> float:
    """exp of the Shannon entropy of the singular values, which sum to 1 (Roy and Vetterli 2007); mean over layers."""
    found = 0.0
    for h in hidden:
        singular = torch.linalg.svdvals(h.flatten(0, -2)[:512])
        p = singular / singular.sum()
        found += math.exp(torch.special.entr(p).sum().item()) / len(hidden)
    return found


def dormant(output: Tensor) -> float:
    """Share of units that say next to nothing."""
    said = output.abs().flatten(0, -2).mean(0)
    return (said <= DORMANT * said.mean()).float().mean().item()
