"""Hooks on the watched modules and around them: what is captured of a forward pass, and when."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ._tell import tell
from ._unsaved import Unsaved
from .alignment import Angles
from .config import EntropyConfig
from .entropy import Order, gram_of, gram_with_gradient
from .kernels import measures_of_rows
from .layout import Calls, Layout, Reading, replaced
from .passes import (
    MOST_COMPILED,
    Capture,
    Passes,
    Repeat,
    in_backward,
    is_of,
    nodes_behind,
    nodes_of,
    recomputing,
    tensors_in,
    transformed,
)
from .plan import Plan
from .ranks import over_ranks
from .shards import Placed, Shards, digest, placed, read_part, read_whole
from .windows import Windows, cut, windows_of

Reader = Callable[[str, Reading], None]

_MEASURE_ONLY = "layers are captured in training mode with gradients on; use hook.measuring() in evaluation"
_REASONS = {
    "evaluation": f"ran in evaluation mode; {_MEASURE_ONLY}",
    "transform": (
        "ran inside a transform of torch.func, which captures nothing; give the loss of a call of the model outside it"
    ),
    "replica": "ran in a replica of nn.DataParallel, which cannot be watched; use DistributedDataParallel",
}
"""Why a call of a watched module left nothing."""


class Watching:
    """What the watches of one hook share with each other and with the optimizer. It refers to no module."""

    layout: Layout

    def __init__(self, model: nn.Module) -> None:
        self.model: Callable[[], nn.Module | None] = weakref.ref(model)
        self.watches: dict[str, Watch] = {}
        self.passes = Passes()
        self.plan: Plan | None = None
        """What the present step does; None where no optimizer listens."""
        self.entropy: EntropyConfig | None = None
        """The optimizer's."""
        self.reader: Reader | None = None
        """Open in ``hook.measuring()``."""
        self.placements: dict[str, Any] = {}
        """By layer, (mesh, placements) of outputs that are plain parts of a hidden tensor; () of those that are not."""
        self.digest = False
        """The next call of the model leaves a digest of its arguments, by which ranks see if they have the same."""
        self.inputs: Tensor | None = None
        self.removed = False
        self.compiled = False
        """Some watched module ran in compiled code."""
        self.told: set[str] = set()
        """What was said of outputs that cannot be read."""
        self.why_not: dict[str, str] = {}
        """Modules that ran in this step and left nothing, and why."""
        self.unread: set[str] = set()
        """Those whose outputs could not be read in this step, which was told."""

    def reads(self) -> bool:
        """Some of the watched modules are read, if they run now."""
        if self.reader is not None:
            return True
        if self.plan is None or not torch.is_grad_enabled():
            return False
        modules = [watch.module() for watch in self.watches.values()]
        return any(module is not None and module.training for module in modules)

    def take(self, loss: Tensor) -> dict[str, list[Capture]]:
        """What each layer left for ``loss``, in order of depth, one item per call of it."""
        behind = nodes_behind(loss)
        taken: dict[str, list[Capture]] = {}
        for capture in self.passes.take(behind):
            taken.setdefault(capture.name, []).append(capture)
        if self.compiled:
            for name, watch in self.watches.items():
                taken.setdefault(name, []).extend(watch.take(behind))
        return {name: taken[name] for name in self.watches if taken.get(name)}

    def had_a_loss(self, loss: Tensor) -> bool:
        """The entropies of the pass that ``loss`` is of went with an earlier loss."""
        return self.passes.had_a_loss(nodes_behind(loss))

    def why_nothing(self, loss: Tensor) -> str:
        """Why no watched module ran for ``loss``, and what to do."""
        if self.removed:
            return "the RepresentationHook was removed; make a new hook and optimizer, or step the base optimizer"
        if self.model() is None:
            return (
                "the model of this RepresentationHook no longer exists; make a hook on the model that is trained, and "
                "copy or pickle an optimizer together with its model: copy.deepcopy((model, optimizer))"
            )
        if self.reader is not None:
            return "hook.measuring() is open, and captures nothing for the optimizer; train outside its with block"
        if not self.watches:
            return "layers=None waits for a forward pass of the model to choose layers"
        name = next(iter(self.why_not), next(iter(self.watches)))
        more = f" (and {len(self.watches) - 1} more)" if len(self.watches) > 1 else ""
        layer, reason = f'layer "{name}"{more}', self.why_not.get(name)
        if reason == "without gradients":
            if any(node.name() == "CheckpointFunctionBackward" for node in nodes_behind(loss)):
                return (
                    f"{layer} ran in reentrant activation checkpointing, whose gradients would be wrong here: use "
                    'checkpoint(..., use_reentrant=False), in transformers activation_checkpointing_kwargs={"use_'
                    'reentrant": False} (gradient_checkpointing_kwargs in its older versions)'
                )
            return (
                f"{layer} ran with gradients off, so that this loss does not reach its output. Where the model runs "
                "again inside the backward, as with gradient caching, its entropy is not known in time: train without "
                f"the cache. Otherwise, {_MEASURE_ONLY}"
            )
        if reason is not None:
            return f"{layer} {_REASONS[reason]}"
        return (
            f"the loss does not depend on the output of {layer}, or it did not run since the last loss; call the model "
            "in training mode before objective(loss), and where a forward pass has several losses, add them. If the "
            "model was compiled, place the hook before its first call, and call torch._dynamo.reset() before that if "
            "another model of its class was compiled in this process"
        )

    def take_angles(self, device: torch.device) -> Tensor:
        """(layers, 3) sums of <g,d>, |g|² and |d|² since the last call, zeros where no backward reached an angle."""
        if not self.watches:
            return torch.zeros(0, 3, device=device)
        taken = torch.stack([watch.angles.take(device) for watch in self.watches.values()])
        factors = [watch.of_angle for watch in self.watches.values()]
        if any(factor != 1.0 for factor in factors):
            taken = taken * torch.tensor(factors).to(taken).unsqueeze(1)
        return taken

    @contextmanager
    def without_angles(self) -> Iterator[None]:
        """What is differentiated inside is not the loss alone."""
        for watch in self.watches.values():
            watch.angles.paused = True
        try:
            yield
        finally:
            for watch in self.watches.values():
                watch.angles.paused = False

    def clear_angles(self) -> None:
        for watch in self.watches.values():
            watch.angles.clear()

    def clear(self) -> None:
        """The step is over: forget what no graph would tell to be gone."""
        self.passes.clear()
        self.why_not, self.unread = {}, set()
        if self.compiled:
            for watch in self.watches.values():
                watch.clear()

    def release(self) -> None:
        """No optimizer listens any more."""
        self.plan = None
        self.clear()
        self.passes = Passes()


class Watch(Unsaved):
    """The forward hook of one watched module."""

    def __init__(self, name: str, watching: Watching, module: nn.Module) -> None:
        self.name, self.watching = name, watching
        self.module = weakref.ref(module)
        self.angles = Angles(next((p.device for p in module.parameters()), torch.device("cpu")))
        self.recent = [Capture(name) for _ in range(MOST_COMPILED)]
        """Of a compiled model, the last calls. Its length never changes, as each would be traced anew."""
        self.of_angle = 1.0
        """Factor on the sums of its angle, where several ranks have parts or copies of its output."""

    def __call__(self, module: nn.Module, args: Any, output: Any) -> Any:
        watching = self.watching
        if watching.reader is not None:
            with torch.no_grad():
                watching.reader(self.name, self._whole(output))
            return None
        plan = watching.plan
        if plan is None:
            return None
        compiling = torch.compiler.is_compiling()
        why_not = _why_not(module, compiling=compiling)
        if why_not is not None:
            watching.why_not[self.name] = why_not
            return None
        if compiling:
            return self._capture_compiled(plan, output)
        if in_backward():
            if recomputing():
                self._repeat(args, output)
            return None
        return self._capture(plan, args, output)

    def _capture(self, plan: Plan, args: Any, output: Any) -> Any:
        """Leave the Gram matrices of ``output`` for the objective; where angles are due, returns a view of it."""
        try:
            reading, shards, features = self._understood(plan, output)
        except (TypeError, ValueError) as error:
            if plan.pressed and self.name in plan.counted:
                raise
            self._tell_unread(error)
            return None
        into, order = self.watching.passes.current, plan.order
        batch, length, width = reading.rows.shape
        windows = into.windows_of(batch, length, plan.config.entropy.window, reading.live, reading.segments)
        wanted = plan.due or (plan.differentiated and self.name in plan.counted)
        differentiated = wanted and reading.rows.requires_grad
        gram, live = self._gram(reading.rows, windows, order, differentiated)
        measures = self._measures(reading.rows, windows) if plan.due and windows.size > width else None
        capture = Capture(self.name, gram, live, (windows.size, features), reading.rows.dtype, measures, shards)
        capture.nodes = nodes_of(output, reading.h)
        into.add(capture, Repeat(_address(args), reading.view, windows, differentiated))
        if not (differentiated and plan.due):
            return None
        capture.saved = gram.view_as(gram).grad_fn
        seen = reading.h.view_as(reading.h)  # where the loss's gradient arrives alone: the entropy's joins behind it
        result = replaced(output, reading.h, seen)
        if result is not None:
            capture.angled = True
            self.angles.watch(seen, capture, windows, order, reading.view)
        return result

    def _capture_compiled(self, plan: Plan, output: Any) -> Any:
        """The same in code that is traced. It is the same at every step of a phase, whether that is due or not."""
        reading, shards, features = self._understood(plan, output)
        rows, order = reading.rows, plan.order
        batch, length, width = rows.shape
        windows = windows_of(batch, length, plan.config.entropy.window, reading.live, reading.segments)
        differentiated = plan.differentiated and self.name in plan.counted and rows.requires_grad
        gram, live = self._gram(rows, windows, order, differentiated)
        measures = self._measures(rows, windows) if windows.size > width else None
        capture = Capture(self.name, gram, live, (windows.size, features), rows.dtype, measures, shards)
        self.recent = [capture, *self.recent[: MOST_COMPILED - 1]]
        self.watching.compiled = True
        if not (rows.requires_grad and plan.angles):
            return None
        others = () if shards is None else shards.features
        marked = self.angles.in_graph(reading.h, reading.view, windows, order, features, others)
        return replaced(output, reading.h, marked)

    def _placed(self, output: Any) -> tuple[Any, Placed | None]:
        """The hidden tensor, and where its parts lie if this rank does not have all of it."""
        if not over_ranks():
            return None, None
        h = self.watching.layout.hidden(self.name, output)
        return h, placed(self.name, h, self.watching.placements.get(self.name))

    def _whole(self, output: Any) -> Reading:
        """What the output means, on every rank all of it."""
        layout = self.watching.layout
        h, at = self._placed(output)
        return layout.read(self.name, output) if at is None else read_whole(layout, self.name, output, h, at)

    def _understood(self, plan: Plan, output: Any) -> tuple[Reading, Shards | None, int]:
        """What the output means, which sums over ranks it takes part in, and how many features a row has."""
        layout = self.watching.layout
        h, at = self._placed(output)
        if at is None:
            reading = layout.read(self.name, output)
            return reading, None, reading.rows.shape[-1]
        reading, shards, features = read_part(layout, self.name, output, h, at, plan.config.entropy.window)
        self.of_angle = shards.of_angle
        return reading, shards, features

    def _tell_unread(self, error: Exception) -> None:
        """The output cannot be read: memorization goes on without this layer."""
        problem, told = str(error).replace(f'"{self.name}"', ""), self.watching.told
        if not {problem, self.name} & told:  # neither of this layer nor of another
            tell(f"{error}. Until then the layer is left out, and compression will refuse it")
        told |= {problem, self.name}
        self.watching.unread.add(self.name)

    def _gram(self, rows: Tensor, windows: Windows, order: Order, differentiated: bool) -> tuple[Tensor, Tensor | None]:
        if not differentiated:
            with torch.no_grad():
                return gram_of(rows.detach(), windows, order)
        name = None if torch.compiler.is_compiling() else self.name
        return gram_with_gradient(rows, windows, order, name)

    def _measures(self, rows: Tensor, windows: Windows) -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            return measures_of_rows(cut(rows.detach(), windows))

    def _repeat(self, args: Any, output: Any) -> None:
        """A recomputed call saves what the call saved, whatever the phase is now, and records nothing."""
        found = [repeat for each in self.watching.passes.all() for repeat in each.repeats.get(self.name, ())]
        here = [repeat for repeat in found if repeat.place == _address(args)] or found
        if not here:
            return
        repeat = here[-1]
        if repeat.differentiated:
            plan = self.watching.plan
            assert plan is not None  # looked at before
            self._gram(repeat.rows(self.watching.layout.hidden(self.name, output)), repeat.windows, plan.order, True)

    def take(self, behind: set[Any]) -> list[Capture]:
        """Captures of the compiled calls that a loss is made of, oldest first."""
        own = [capture for capture in self.recent if capture.gram is not None]
        # Without gradients nothing tells which call a loss is of.
        taken = [capture for capture in own if is_of(capture.gram, behind)]
        if len(taken) == MOST_COMPILED:
            self._too_many()
        self.recent = [Capture(self.name) if capture in taken else capture for capture in self.recent]
        return taken[::-1]

    def _too_many(self) -> None:
        told, plan = self.watching.told, self.watching.plan
        problem = (
            f'module "{self.name}" ran {MOST_COMPILED} times or more for one loss in a compiled model, where only the '
            "last calls are kept; compile the parts around it, or watch other layers"
        )
        if plan is not None and plan.pressed:
            raise RuntimeError(problem)
        if problem not in told:
            told.add(problem)
            tell(f"{problem}. Until then its entropy is that of the last calls, and compression will refuse it")

    def clear(self) -> None:
        self.angles.clear()
        self.recent = [Capture(self.name) for _ in range(MOST_COMPILED)]


class Begins(Unsaved):
    """Forward pre-hook of the model, and of the modules around watched ones whose calls bring tokens."""

    def __init__(self, calls: Calls, watching: Watching, *, is_model: bool) -> None:
        self.calls, self.watching, self.is_model = calls, watching, is_model
        self.opened = False

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        watching = self.watching
        self.calls.enter(args, kwargs, watching.reads)
        if not self.is_model or torch.compiler.is_compiling():
            return
        if not watching.passes.current.loose and len(watching.layout.calls) > 1:  # not one that an interrupt ended
            return
        if watching.plan is not None and watching.reader is None and torch.is_grad_enabled() and not in_backward():
            if watching.digest:
                watching.inputs, watching.digest = digest(tensors_in([args, kwargs])), False
            watching.passes.begin()
            self.opened = True


class Ends(Unsaved):
    """Forward hook to a :class:`Begins`, also called where the forward raised."""

    def __init__(self, begins: Begins) -> None:
        self.begins = begins

    def __call__(self, module: nn.Module, args: Any, output: Any) -> None:
        begins = self.begins
        begins.calls.leave()
        if begins.opened and not torch.compiler.is_compiling():
            begins.opened = False
            begins.watching.passes.end(output)


def _why_not(module: nn.Module, *, compiling: bool) -> str | None:
    """Why nothing is captured in a call of ``module``; None where something is."""
    if getattr(module, "_is_replica", False):
        return "replica"
    if not module.training:
        return "evaluation"
    if not torch.is_grad_enabled():
        return "without gradients"
    return "transform" if not compiling and transformed() else None


def _address(args: Any) -> int:
    """Of the first tensor that a module was called with: a checkpoint calls it with the same one again."""
    first = next((value for value in args if isinstance(value, Tensor)), None)
    if first is None or first.is_nested or first.layout is not torch.strided:  # it has no storage of its own
        return 0
    return first.data_ptr()
