"""What the first step over ranks shows of them: parts of hidden tensors that nobody declared, and shares of a loss.

Ranks of tensor or sequence parallelism get the same arguments and have the same loss. Where the entropies of their
layers differ all the same, each has a part of a hidden tensor and takes it for the whole. Ranks that have data of their
own differ in their arguments and losses.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

from .objective import Objective

if TYPE_CHECKING:
    from .watching import Watching

_TRIES = 3
"""Steps over ranks that are looked at, where the first tell nothing."""
_HEAD = 5  # of a row: loss, whether it is of a low precision, share of the loss, two numbers of a digest
_SAME = 1e-5
_A_SHARE = 0.67
_SUM = 2  # torch's number for reduction="sum"


class Undeclared:
    """Notes the first loss of this rank, and compares it with those of the others before the first step."""

    def __init__(self) -> None:
        self.wanted = True
        self._tries = 0
        self._row: list[Tensor | float] | None = None
        self._entropies: tuple[list[str], Tensor] | None = None
        self._settled: set[str] = set()

    def note(self, loss: Tensor, scaled_by: float, made: Objective, watching: Watching) -> None:
        """One loss; those after the first are passed over."""
        if self._row is not None:
            return
        low = torch.finfo(loss.dtype).bits < 32
        inputs = watching.inputs
        digest: list[Tensor | float] = [math.nan, math.nan] if inputs is None else [inputs[0], inputs[1]]
        share = share_of(loss) if scaled_by == 1.0 else 1.0
        self._row = [loss.detach().reshape(()), float(low), share, *digest]
        self._entropies = made.layers, made.sums
        self._settled = {name for name, placements in watching.placements.items() if placements == ()}
        watching.inputs = None

    def refuse(self, names: Sequence[str], group: dist.ProcessGroup, device: torch.device) -> None:
        """Raises ValueError on all ranks; all call it together."""
        row = torch.full((_HEAD + len(names),), math.nan, dtype=torch.float32, device=device)
        if self._row is not None and self._entropies is not None:
            row[:_HEAD] = torch.stack([torch.as_tensor(value, dtype=torch.float32).to(device) for value in self._row])
            layers, sums = self._entropies
            totals, weights = sums.to(device=device, dtype=torch.float32)
            for i, name in enumerate(layers):
                if name in self._settled:
                    continue
                row[_HEAD + names.index(name)] = totals[i] / weights[i]  # nan where no window counts
        rows = [torch.empty_like(row) for _ in range(dist.get_world_size(group))]
        dist.all_gather(rows, row, group=group)
        self._row = self._entropies = None
        found = torch.stack(rows).tolist()
        self._tries += 1
        problem = undeclared(found, names)
        # A head of zeros gives all ranks the same first loss: where their arguments are unknown, the next one tells.
        certain = self._tries > 1 or not any(math.isnan(value) for row in found for value in row[3:_HEAD])
        if problem is not None and certain:
            raise ValueError(problem)
        empty = all(math.isnan(value) for row in found for value in row[_HEAD:])
        self.wanted = (problem is not None or empty) and self._tries < _TRIES


def undeclared(rows: Sequence[Sequence[float]], names: Sequence[str]) -> str | None:
    """What is wrong, from the first losses of all ranks; the same on every rank."""
    share = max((row[2] for row in rows if not math.isnan(row[2])), default=1.0)
    if share < _A_SHARE:
        return (
            f"the loss is a sum over the tokens of one rank or micro-batch, divided by {1 / share:.3g} times as many: "
            "a share of a mean over all, whose gradients are summed. The gate would judge the share, and the entropy "
            "would weigh more than it says; tell what the share is: optimizer.objective(loss, scaled_by=own tokens / "
            f"all tokens), here {share:.3g}"
        )
    for rank, first in enumerate(rows):
        for other in range(rank + 1, len(rows)):
            name = _differing(first, rows[other], names)
            if name is not None:
                return (
                    f'ranks {rank} and {other} have the same loss, and different entropies of layer "{name}": each '
                    "has a part of its output and would take it for all of it. Say how it is shared out: "
                    "RepresentationHook(..., placements=(mesh['tp'], Shard(1))) for parts of the sequence, Shard(-1) "
                    "for parts of the features, in a mapping from globs where layers differ; or placements=() if each "
                    "rank has whole outputs of data of its own"
                )
    return None


def _differing(a: Sequence[float], b: Sequence[float], names: Sequence[str]) -> str | None:
    """A layer of two ranks that share their loss and not its entropy; None where they agree, or share nothing."""
    if a[0] != b[0]:  # or none
        return None
    known = not any(math.isnan(value) for value in (*a[3:_HEAD], *b[3:_HEAD]))
    if (known and list(a[3:_HEAD]) != list(b[3:_HEAD])) or (not known and a[1]):
        return None
    for i, name in enumerate(names, _HEAD):
        if abs(a[i] - b[i]) > _SAME * max(abs(a[i]), abs(b[i])):  # not where either is unknown
            return name
    return None


def share_of(loss: Tensor) -> Tensor | float:
    """Tokens in a loss that is their sum divided by the number of more of them, over that number; otherwise 1.

    It waits for no device.
    """
    node = loss.grad_fn
    if node is None or torch.compiler.is_compiling() or node.name() != "DivBackward0":
        return 1.0
    behind: Any = node.next_functions[0][0]
    divisor = getattr(node, "_saved_other", None)
    counted = None if behind is None or divisor is None else _counted(behind)
    if counted is None:
        return 1.0
    divided_by = torch.as_tensor(divisor).to(counted.device, torch.float32, non_blocking=True)
    return torch.where(divided_by > counted.numel(), counted.sum() / divided_by, 1.0)


def _counted(node: Any) -> Tensor | None:
    """Which tokens are in a sum over them: that of torch, or of torchtitan over parts of the vocabulary."""
    if node.name().startswith("NllLoss"):
        if node._saved_reduction != _SUM:
            return None
        found: Tensor = node._saved_target != node._saved_ignore_index
        return found
    if not node.name().startswith("_LossParallelCrossEntropy"):  # torchtitan's; what another gives may be a mean
        return None
    try:
        saved = [t for t in getattr(node, "saved_tensors", ()) if t is not None and t.dtype == torch.int64]
    except RuntimeError:  # changed in place since
        return None
    return saved[0] >= 0 if len(saved) == 1 else None  # below it are those that are left out
