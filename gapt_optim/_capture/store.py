"""The capture store: what the taps of one hook leave until an optimizer takes it.

It stands between hook and optimizer and refers to no module, so that it never keeps a model alive.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any, TypeAlias

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .._plan import StepPlan
from .._tell import tell
from .grams import Grams
from .graph import belongs_to, nodes_averaged_by_ddp, nodes_behind, unspent
from .measurement import Measurement
from .tap import PROBE_SIZE

PickMask: TypeAlias = Callable[[dict[str, Any]], Tensor | None]
"""From the arguments of the model's call, by name, to a mask (batch, seq)."""
TokenMask: TypeAlias = Tensor | dict[str, Tensor | None] | None
"""That of a call: one for all layers, or one for each glob of ``mask=``."""

MOST_WAITING = 64
"""Calls of a model that are kept for a loss to come."""

MEASURE_ONLY = "taps run only in training mode with gradients on; use hook.measuring() in evaluation"
WITHOUT_GRAD = (
    "ran with gradients off. Reentrant activation checkpointing does that, and its gradients would be wrong here: use "
    'checkpoint(..., use_reentrant=False), in transformers activation_checkpointing_kwargs={"use_reentrant": False} '
    f"(gradient_checkpointing_kwargs in its older versions). Otherwise, {MEASURE_ONLY}"
)


class CaptureStore:
    """What the taps of one hook share with each other and with the optimizer.

    The optimizer calls :meth:`follow` before a step, :meth:`take` with the loss of each micro-batch,
    :meth:`take_statistics` after the last backward pass, and :meth:`clear` at the end of the step.

    Args:
        model: the model that is watched, held weakly.
        names: of the tapped modules, in order of depth.
        pick_mask: the hook's ``mask=``.
    """

    def __init__(self, model: nn.Module, names: list[str], pick_mask: PickMask | dict[str, PickMask] | None) -> None:
        self.model: Callable[[], nn.Module | None] = weakref.ref(model)
        self.names = names
        self.pick_mask = pick_mask
        self.removed = False
        self.plan: StepPlan | None = None
        """What the present step does; None where no optimizer listens."""
        self.measurement: Measurement | None = None
        """Open in ``hook.measuring()``."""
        self.ran: set[str] = set()
        """Modules that ran in some step."""
        self.calls: dict[str, list[Grams]] = {name: [] for name in names}
        self.without_grad: set[str] = set()
        """Modules that ran in training mode with gradients off."""
        self.evaluated: set[str] = set()
        """Modules that ran in evaluation mode."""
        self.transformed: set[str] = set()
        """Modules that ran inside a transform of torch.func."""
        device = next((p.device for p in model.parameters()), torch.device("cpu"))
        self._probes = {name: _make_probe(device) for name in names}
        # Masks
        self.masks: list[TokenMask] = []
        """Of the model calls under way, the innermost last."""
        self.mask: TokenMask = None
        """The last one, for recomputation."""
        self.masked_calls = 0
        """Calls of the model with a mask, since a backward last recomputed one."""
        self.recomputed = False
        # Warnings and errors
        self._waiting = 0  # calls of the model whose loss has not come
        self._warned_waiting = False
        self._checked_branches = False  # for those that DDP leaves out
        self._dropped: set[str] = set()  # captured by a forward pass whose loss had not come when another's did

    # For the optimizer

    def follow(self, plan: StepPlan) -> None:
        """From now on, taps do what ``plan`` says."""
        self.plan = plan

    def release(self) -> None:
        """No optimizer listens any more: what was captured for it goes."""
        self.plan = None
        for calls in self.calls.values():
            calls.clear()

    def take(self, loss: Tensor) -> dict[str, list[Grams]]:
        """What each module that ran for ``loss`` left, one item per call of it; what other forward passes left goes.

        Raises:
            RuntimeError: a module never ran, or none did, saying why where that is known; or DDP leaves a branch out.
        """
        waiting = {name: unspent(calls) or calls for name, calls in self.calls.items() if calls}
        taken = waiting
        if any(len(calls) > 1 for calls in waiting.values()):
            # A pass whose loss was thrown away, or a module that ran several times in one: the graph tells.
            behind = nodes_behind(loss)
            of_loss = {name: [call for call in calls if belongs_to(call, behind)] for name, calls in waiting.items()}
            # A side branch that the loss does not use: its latest call.
            taken = {name: of_loss[name] or calls[-1:] for name, calls in waiting.items()}
        if not self._checked_branches and dist.is_available() and dist.is_initialized():
            self._checked_branches = True  # once: it takes a walk over the graph
            _refuse_branches_that_ddp_leaves_out(loss, taken)
        # A module that ran before may rest for a step (layer drop), but not because gradients were off.
        resting = self.ran - self.without_grad if taken else set()
        missing = [name for name in self.names if name not in taken and name not in resting]
        self.ran.update(taken)
        if missing:
            raise RuntimeError(self._why_missing(missing))
        self._dropped = {name for name, calls in taken.items() if len(calls) < len(waiting[name])}
        self.calls = {name: [] for name in self.names}
        self._waiting = 0
        return taken

    def take_statistics(self, device: torch.device) -> Tensor:
        """(layers, 3) sums of <g,d>, |g|² and |d|² since the last call, zeros where no backward reached a tap."""
        probes = [self._probes[name] for name in self.names]
        rows = [probe.detach() if probe.grad is None else probe.grad for probe in probes]
        self.clear_statistics()
        return torch.stack([row.to(device, non_blocking=device.type != "cpu") for row in rows])

    def clear_statistics(self) -> None:
        """Forget the statistics of backward passes so far."""
        for probe in self._probes.values():
            probe.grad = None

    def clear(self) -> None:
        """Forget what was captured and not used."""
        for name in self.names:
            if self.calls[name]:
                self.calls[name] = []
        self.mask, self.masked_calls, self._waiting = None, 0, 0
        self._dropped = set()
        self.masks.clear()
        self.without_grad.clear()
        self.evaluated.clear()
        self.transformed.clear()

    # For the taps

    def probe(self, name: str, device: torch.device) -> Tensor:
        """The leaf of three numbers whose gradient collects the statistics of a tap."""
        if self._probes[name].device != device:
            self._probes[name] = _make_probe(device)
        return self._probes[name]

    def wait_for_loss(self) -> None:
        """Count a call of the model, and forget earlier ones where no loss comes of them: they hold graphs."""
        self._waiting += 1
        if self._waiting <= MOST_WAITING:
            return
        self._waiting = 1
        lost = any(unspent(calls) for calls in self.calls.values())  # not where another wrapper trains the model
        for calls in self.calls.values():
            calls.clear()
        if lost and not self._warned_waiting:
            self._warned_waiting = True
            tell(
                f"{MOST_WAITING} calls of the model in training mode with gradients on, and no optimizer.backward(); "
                "what they captured is dropped. Evaluate under torch.no_grad() or hook.measuring(); where one loss "
                "is of more calls than that, the entropy is of the last ones: call backward more often"
            )

    def _why_missing(self, missing: list[str]) -> str:
        if self.removed:
            return "the RepresentationHook was removed; make a new hook and optimizer, or step the base optimizer"
        if self.model() is None:
            return (
                "the model of this RepresentationHook no longer exists; make a hook on the model that is trained, and "
                "copy or pickle an optimizer together with its model: copy.deepcopy((model, optimizer))"
            )
        if self.measurement is not None:
            return "hook.measuring() is open, and captures nothing for the optimizer; train outside its with block"
        name = missing[0]
        more = f" (and {len(missing) - 1} more)" if len(missing) > 1 else ""
        if name in self._dropped:
            return (
                f'the outputs of tapped module "{name}"{more} for this loss are gone: several forward passes ran '
                "before the first backward, which took its own and dropped the others. Call optimizer.backward(loss) "
                "after each forward pass, or once for the sum: optimizer.backward(loss_a + loss_b)"
            )
        if name in self.ran - self.without_grad - self.evaluated:
            return (
                f'tapped module "{name}"{more} did not run since the last objective(loss); where a forward pass has '
                "several losses, add them and call objective or backward once"
            )
        if name in self.without_grad:
            return f'tapped module "{name}"{more} {WITHOUT_GRAD}'
        if name in self.evaluated:
            return f'tapped module "{name}"{more} ran in evaluation mode; {MEASURE_ONLY}'
        if name in self.transformed:
            return (
                f'tapped module "{name}"{more} ran inside a transform of torch.func, which captures nothing; give the '
                "loss of a call of the model outside of it"
            )
        return (
            f'tapped module "{name}"{more} did not run before objective(loss); call the model in training mode first, '
            "or leave the module out of layers. If the model was compiled, place the hook before its first call, and "
            "call torch._dynamo.reset() before that if another model of its class was compiled in this process"
        )


def _make_probe(device: torch.device) -> Tensor:
    return torch.zeros(PROBE_SIZE, device=device, requires_grad=True)


def _refuse_branches_that_ddp_leaves_out(loss: Tensor, taken: dict[str, list[Grams]]) -> None:
    """Where DDP looks for parameters that the loss does not use, those that only an entropy uses are not averaged.

    find_unused_parameters=True fails in the backward. static_graph=True notes in its first step who has a gradient:
    where that is a step of memorization, ranks would drift apart in compression without a word.
    """
    nodes = nodes_averaged_by_ddp(loss)
    if nodes is None:
        return
    unused = [name for name, calls in taken.items() if not all(belongs_to(call, nodes) for call in calls)]
    if unused:
        more = f" (and {len(unused) - 1} more)" if len(unused) > 1 else ""
        raise RuntimeError(
            f'the loss does not depend on the output of tapped module "{unused[0]}"{more}, whose entropy gradients '
            "DistributedDataParallel does not average with find_unused_parameters=True or static_graph=True; leave "
            "the module out of layers, or make it part of the loss by adding 0 * output.sum() to what the model "
            "returns"
        )
