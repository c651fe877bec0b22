"""Parts of hidden tensors of any kind, drawn at random, against one process: placements, windows, masks, documents."""

from __future__ import annotations

import math
import random
import warnings
from dataclasses import astuple, dataclass
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard

from gapt_optim import AlignmentConfig, EntropyConfig, GAPTConfig, GAPTOptimizer, RepresentationHook
from tests.distributed.ranks import Ranks
from tests.distributed.runs import COMPRESSING
from tests.training import distance


@dataclass(frozen=True)
class Case:
    placements: tuple[int | None, ...]
    """Of each dimension of the mesh, the axis that is shared out."""
    plain: bool
    """The module returns a plain part, which is declared."""
    shape: tuple[int, int, int]
    entropy: EntropyConfig
    masked: str
    documents: bool
    first: bool
    """The sequence is the first axis."""
    seed: int


def drawn(seed: int, dimensions: int) -> Case:
    draw = random.Random(seed)
    axes: list[int | None] = [None] * dimensions
    for place, axis in zip(draw.sample(range(dimensions), dimensions), draw.sample(range(3), dimensions), strict=True):
        axes[place] = draw.choice([axis, axis, axis, None])
    window = draw.choice([None, 2, 3, 4, 5, 7, 8])
    center = draw.random() < 0.5 and window != 2
    alpha = draw.choice([2.0, 2.0, 1.0, 3.0, math.inf])
    entropy = EntropyConfig(
        window=window,
        kernel=draw.choice(["cosine", "linear"]),
        center=center,
        alpha=alpha,
        normalize=draw.random() < 0.3,
    )
    shape = draw.choice([2, 4]), draw.choice([4, 8, 12]), draw.choice([2, 4, 6, 12])
    masked = draw.choice(["", "", "left", "right", "holes", "none of one"])
    first = draw.random() < 0.2
    return Case(tuple(axes), draw.random() < 0.5, shape, entropy, masked, draw.random() < 0.3, first, seed)


class Model(nn.Module):
    """A hidden tensor of all ranks, of which a module returns the part of this one."""

    def __init__(self, case: Case, mesh: DeviceMesh | None) -> None:
        super().__init__()
        width = case.shape[2]
        self.before, self.spread, self.after = nn.Linear(5, width), nn.Identity(), nn.Linear(width, 3)
        self.case, self.mesh = case, mesh

    def forward(self, x: Tensor, mask: Tensor | None = None, documents: Tensor | None = None) -> Tensor:
        h = torch.tanh(self.before(x))
        if self.mesh is None:
            return self.after(self.spread(h))
        whole = DTensor.from_local(h, self.mesh, [Replicate()] * self.mesh.ndim, run_check=False)
        part = whole.redistribute(placements=placements_of(self.case))
        if not self.case.plain:
            return self.after(self.spread(part).full_tensor())
        local = self.spread(part.to_local())
        return self.after(DTensor.from_local(local, self.mesh, placements_of(self.case), run_check=False).full_tensor())


def placements_of(case: Case) -> list[Placement]:
    return [Replicate() if axis is None else Shard(axis) for axis in case.placements]


def mask_of(case: Case, generator: torch.Generator) -> Tensor | None:
    batch, length, _ = case.shape
    starts = torch.randint(length - 1, (batch, 1), generator=generator)
    places = torch.arange(length)
    masks = {
        "left": places >= starts,
        "right": places <= starts + 1,
        "holes": torch.rand(batch, length, generator=generator) < 0.7,
        "none of one": (torch.arange(batch) > 0)[:, None].expand(batch, length),
    }
    return masks[case.masked].long() if case.masked else None


@dataclass
class Outcome:
    gradients: dict[str, Tensor]
    entropy: float | None
    measured: float | None
    """In evaluation."""
    measures: tuple[float, ...]
    loss_norm: float | None
    entropy_norm: float | None
    cosine: float | None


def outcome(case: Case, mesh: DeviceMesh | None) -> Outcome:
    torch.manual_seed(case.seed)
    model = Model(case, mesh).double()
    generator = torch.Generator().manual_seed(case.seed)
    batch, length, _ = case.shape
    x = torch.randn(batch, length, 5, generator=generator, dtype=torch.float64)
    mask, documents = mask_of(case, generator), None
    if case.documents:
        documents = torch.randint(2, (batch, length), generator=generator).cumsum(1)
    if case.first:
        x = x.transpose(0, 1)
    hook = RepresentationHook(
        model,
        "spread",
        layout="length batch features" if case.first else "batch length features",
        mask=None if mask is None else lambda call: call["mask"],
        segments=None if documents is None else lambda call: call["documents"],
        placements=(mesh, tuple(placements_of(case))) if mesh is not None and case.plain else None,
    )
    config = GAPTConfig(gate=COMPRESSING, entropy=case.entropy, alignment=AlignmentConfig(every=1))
    optimizer = GAPTOptimizer(torch.optim.SGD(model.parameters(), 0.05), hook, config)
    with torch.no_grad(), hook.measuring() as measurement:
        model(x, mask, documents)
    optimizer.backward(model(x, mask, documents).square().mean())
    gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
    optimizer.step()
    metrics: Any = optimizer.metrics
    angle = metrics.alignment
    return Outcome(
        gradients,
        metrics.layer_entropy.get("spread"),
        measurement.entropies.get("spread"),
        astuple(metrics.measures) if metrics.measures is not None else (),
        None if angle is None else angle.layers["spread"].loss_norm,
        None if angle is None else angle.layers["spread"].entropy_norm,
        None if angle is None else angle.layers["spread"].cosine,
    )


def outcomes(cases: list[Case], dimensions: int) -> list[Outcome | str]:
    warnings.simplefilter("ignore")
    mesh = init_device_mesh("cpu", (2,) * dimensions)
    found: list[Outcome | str] = []
    for case in cases:
        try:
            found.append(outcome(case, mesh))
        except Exception as error:
            found.append(f"{type(error).__name__}: {error}")
            dist.barrier()
    return found


def close(a: float | None, b: float | None, tolerance: float) -> bool:
    return a == b if a is None or b is None else abs(a - b) <= tolerance * max(1.0, abs(b))


def alike(a: float | None, b: float | None) -> bool:
    return close(a, b, 1e-6)


def problem(case: Case, found: Outcome | str) -> str:
    """What is not as in one process; nothing where all is."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected = outcome(case, None)
    if isinstance(found, str):
        return found
    # Powers and eigenvalues of rows that are almost alike lose digits, in one process too.
    if distance(found.gradients, expected.gradients) > 1e-6:
        return f"gradients differ by {distance(found.gradients, expected.gradients):.1e}"
    if not close(found.entropy, expected.entropy, 1e-7) or not close(found.measured, expected.measured, 1e-7):
        return f"entropy {found.entropy} and {found.measured}, not {expected.entropy} and {expected.measured}"
    if len(found.measures) != len(expected.measures) or not all(map(alike, found.measures, expected.measures)):
        return f"measures {found.measures}, not {expected.measures}"
    if expected.entropy_norm is not None and expected.entropy_norm < 1e-9:
        found.cosine = expected.cosine = None  # of rounding alone, where no window has an entropy
    for name in ("loss_norm", "entropy_norm", "cosine"):
        if not close(getattr(found, name), getattr(expected, name), 1e-4):
            return f"{name} {getattr(found, name)}, not {getattr(expected, name)}"
    return ""


@pytest.mark.parametrize(
    ("start", "count"), [(0, 24), pytest.param(1000, 1000, marks=pytest.mark.slow)], ids=["some", "many"]
)
@pytest.mark.parametrize("dimensions", [1, 2])
def test_any_parts_equal_one_process(ranks: Ranks, four: Ranks, dimensions: int, start: int, count: int) -> None:
    cases = [drawn(seed, dimensions) for seed in range(start, start + count)]
    pool = ranks if dimensions == 1 else four
    of_ranks = pool(outcomes, cases, dimensions, timeout=30 + count)
    problems = [
        f"{case}, rank {rank}: {what}"
        for i, case in enumerate(cases)
        for rank, found in enumerate(of_ranks)
        if (what := problem(case, found[i]))
    ]
    assert not problems, f"{len(problems)}: " + "\n".join(problems[:10])
