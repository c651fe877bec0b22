"""The hook: which modules are watched, and what is made of their outputs."""

from __future__ import annotations

import dataclasses
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ._tell import tell
from ._unsaved import Unsaved, leave_out
from .alignment import Angles
from .config import EntropyConfig
from .entropy import Gram, Order, entropies, gram_of, measures_of, window_weights
from .explain import Explanation, explain
from .kernels import Kernel, measures_of_rows
from .layout import Calls, Candidates, Layers, Layout, Pick, Reading, choose_layers, select_layers
from .metrics import Measures
from .objective import weighted_measures
from .passes import (
    MOST_COMPILED,
    Capture,
    Passes,
    Plan,
    Repeat,
    in_backward,
    nodes_behind,
    recomputing,
    tensors_in,
    transformed,
)
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


class RepresentationHook:
    """Watches the outputs of some modules of a model, without changing the model's code.

    Place it before the first call of a compiled model. Two hooks on one model do not see each other.

    >>> import torch
    >>> blocks = torch.nn.ModuleList(torch.nn.Linear(4, 4) for _ in range(3))
    >>> model = torch.nn.ModuleDict({"blocks": blocks, "head": torch.nn.Linear(4, 2)})
    >>> RepresentationHook(model, "blocks.*").names
    ['blocks.0', 'blocks.1', 'blocks.2']
    >>> RepresentationHook(model, ["blocks.0", "head"]).names
    ['blocks.0', 'head']

    Args:
        model: any module. The hook holds only a weak reference to it.
        layers: a glob over ``model.named_modules()`` (``*`` does not cross a dot), a module, a list of
            globs, names or modules, or None for the model's blocks. Where the model has several lists, the first
            forward pass shows which are blocks: modules that run one behind the other.
        output: picks the hidden tensor from a module's output. By default the output itself, the first item of
            a tuple or list, or ``last_hidden_state``. It may return a view.
        mask: picks the token mask (batch, seq), true or 1 where a token counts, from the arguments of the
            model's call, given by name; or a mapping from globs of layers to such functions. By default masks are
            found in the calls of the model and of the modules around a layer.
        layout: names of the axes, such as ``"batch height width channels"``; or a mapping from globs to such strings.
            By default they are known from the module.
        segments: as ``mask``, gives (batch, seq) numbers of documents; no window crosses from one to the next.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: nothing matches, or the automatic choice finds no blocks; the message lists candidates. Where the
            first forward pass has to choose, it raises there.
    """

    def __init__(
        self,
        model: nn.Module,
        layers: Layers = None,
        *,
        output: Callable[[Any], Tensor] | None = None,
        mask: Pick | Mapping[str, Pick] | None = None,
        layout: str | Mapping[str, str] | None = None,
        segments: Pick | Mapping[str, Pick] | None = None,
    ) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(f"model must be a torch.nn.Module, found {type(model).__name__}")
        self._options = {"output": output, "mask": mask, "layout": layout, "segments": segments}
        self.watching = Watching(model)
        self._handles: list[RemovableHandle | leave_out] = []
        # Also runs when the hook is garbage: a model outlives the hooks placed on it.
        self._finalizer = weakref.finalize(self, _remove, self._handles)
        found = choose_layers(model) if layers is None else select_layers(model, layers)
        if isinstance(found, Candidates):
            self._choose_later(model, found)
        else:
            self._watch(model, found)

    def _watch(self, model: nn.Module, modules: dict[str, nn.Module]) -> None:
        """Place the hooks."""
        watching, handles = self.watching, self._handles
        watching.layout = Layout(model, modules, **self._options)
        for name, module in modules.items():
            watching.watches[name] = watch = Watch(name, watching, module)
            handles += [leave_out(module), module.register_forward_hook(watch)]
        for module, calls in watching.layout.callers():
            begins = Begins(calls, watching, is_model=module is model)
            handles += [
                leave_out(module),
                module.register_forward_pre_hook(begins, with_kwargs=True, prepend=True),
                module.register_forward_hook(Ends(begins), always_call=True),
            ]

    def choose(self, names: list[str]) -> None:
        """Watch these layers, where ``layers=None`` has not chosen yet, as when a checkpoint is loaded."""
        model = self.watching.model()
        if model is not None and not self.names:
            _remove(self._handles)
            self._watch(model, select_layers(model, names))

    def _choose_later(self, model: nn.Module, candidates: Candidates) -> None:
        """The first forward pass shows which of the candidates are the model's blocks."""
        hook = weakref.ref(self)

        def chosen(module: nn.Module, args: Any, output: Any) -> None:
            this = hook()
            if this is None or this.names:
                return
            _remove(this._handles)
            this._watch(module, candidates.chosen())

        self._handles += [*candidates.place(), model.register_forward_hook(chosen)]

    @property
    def names(self) -> list[str]:
        """Of the watched modules, in the order of ``model.named_modules()``, which counts as their depth.

        Empty where ``layers=None`` waits for the first forward pass to choose.
        """
        return list(self.watching.watches)

    @property
    def removed(self) -> bool:
        """True after :meth:`remove`."""
        return not self._finalizer.alive

    def remove(self) -> None:
        """Remove the hook from the model; nothing is captured from then on."""
        self._finalizer()
        self.watching.removed = True
        self.watching.release()

    def __enter__(self) -> RepresentationHook:
        return self

    def __exit__(self, *exception: object) -> None:
        self.remove()

    @contextmanager
    def measuring(self, entropy: EntropyConfig | None = None) -> Iterator[Measurement]:
        """Read entropies in evaluation, with gradients off or on, in any mode.

        ``with hook.measuring() as m: model(x)`` and then ``m.entropies``. Inside, nothing is captured for the
        optimizer. ``entropy`` defaults to the optimizer's settings, or to ``EntropyConfig()``.

        Raises:
            TypeError: ``entropy`` is not an EntropyConfig.
            RuntimeError: the hook was removed, or is already measuring.
        """
        if not isinstance(entropy, EntropyConfig | None):
            raise TypeError(f"entropy must be an EntropyConfig, found {type(entropy).__name__}: EntropyConfig(...)")
        config = entropy or self.watching.entropy or EntropyConfig()
        measurement = Measurement(config)
        with self.reading(measurement.add):
            yield measurement

    @contextmanager
    def reading(self, reader: Reader) -> Iterator[None]:
        """Call ``reader(name, reading)`` for each output of a watched module; nothing is captured for the optimizer.

        The :class:`gapt_optim.layout.Reading` has the rows (batch, length, features), which of them count, and what
        their documents are.

        Raises:
            RuntimeError: the hook was removed, or is already measuring.
        """
        if self.removed:
            raise RuntimeError("this RepresentationHook was removed; make a new one to measure")
        if self.watching.reader is not None:
            raise RuntimeError("hook.measuring() is already open; use the measurement of the outer with block")
        self.watching.reader = reader
        try:
            yield
        finally:
            self.watching.reader = None

    def explain(self, *args: Any, **kwargs: Any) -> Explanation:
        """Run the model once on these arguments, and say how each watched output is read.

        >>> import torch
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 16))
        >>> print(RepresentationHook(model, "0").explain(torch.randn(64, 4)))
        0
          shape    (64, 16) is (batch features): ...
        """
        return explain(self, *args, **kwargs)

    def __reduce__(self) -> tuple[Any, ...]:
        # A deep copy or pickle of (model, optimizer) gives a hook on the copied model.
        model = self.watching.model()
        if model is None:
            raise RuntimeError("cannot copy a RepresentationHook whose model no longer exists")
        return _rebuild, (model, self.names or None, self._options)

    def __repr__(self) -> str:
        return f"RepresentationHook({self.names})"


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
        self.removed = False
        self.told: set[str] = set()
        """What was said of outputs that cannot be read."""
        self.why_not: dict[str, str] = {}
        """Modules that ran in this step and left nothing, and why."""

    def take(self, loss: Tensor) -> dict[str, list[Capture]]:
        """What each layer left for ``loss``, in order of depth, one item per call of it."""
        behind = nodes_behind(loss)
        taken: dict[str, list[Capture]] = {}
        for capture in self.passes.take(behind):
            taken.setdefault(capture.name, []).append(capture)
        for name, watch in self.watches.items():
            of_compiled = watch.take(behind)
            if of_compiled:
                taken.setdefault(name, []).extend(of_compiled)
        return {name: taken[name] for name in self.watches if name in taken}

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
        return torch.stack([watch.angles.take(device) for watch in self.watches.values()])

    def clear_angles(self) -> None:
        for watch in self.watches.values():
            watch.angles.clear()

    def clear(self) -> None:
        """The step is over: forget what no graph would tell to be gone."""
        self.passes.clear()
        self.why_not = {}
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

    def __call__(self, module: nn.Module, args: Any, output: Any) -> Any:
        watching = self.watching
        if watching.reader is not None:
            with torch.no_grad():
                watching.reader(self.name, watching.layout.read(self.name, output))
            return None
        plan = watching.plan
        if plan is None:
            return None
        why_not = self._why_not(module)
        if why_not is not None:
            watching.why_not[self.name] = why_not
            return None
        if in_backward():
            if recomputing():
                self._repeat(args, output)
            return None
        return self._capture(plan, args, output)

    def _why_not(self, module: nn.Module) -> str | None:
        """Why nothing is captured in this call; None where something is."""
        if getattr(module, "_is_replica", False):
            return "replica"
        if not module.training:
            return "evaluation"
        if not torch.is_grad_enabled():
            return "without gradients"
        return "transform" if transformed() else None

    def _capture(self, plan: Plan, args: Any, output: Any) -> Any:
        """Leave the Gram matrices of ``output`` for the objective; at times returns the output with an angle in it."""
        watching, compiling = self.watching, torch.compiler.is_compiling()
        reading = watching.layout.read(self.name, output) if compiling else self._read(plan, output)
        if reading is None:
            return None
        rows, order = reading.rows, plan.order
        batch, length, features = rows.shape
        into = None if compiling else watching.passes.current()
        cutting = windows_of if into is None else into.windows_of
        windows = cutting(batch, length, plan.window, reading.live, reading.segments)
        flows = rows.requires_grad
        # A compiled model is the same at every step of a phase, whether it is due or not.
        differentiated = flows and (self.name in plan.pressed or (not compiling and plan.due and plan.angles))
        gram, live = self._gram(rows, windows, order, differentiated)
        measures = None
        if windows.size > features and (compiling or plan.due):
            with torch.no_grad():
                measures = measures_of_rows(cut(rows.detach(), windows))
        capture = Capture(self.name, gram, live, (windows.size, features), rows.dtype, measures)
        if into is None:
            self.recent = [capture, *self.recent[: MOST_COMPILED - 1]]
            if not (flows and plan.angles):
                return None
            marked = self.angles.in_graph(reading.h, reading.view, windows, order)
            return replaced(output, reading.h, marked)
        capture.nodes = _nodes_of(output, reading.h)
        into.captures.append(capture)
        repeat = Repeat(_address(args), reading.view, windows, differentiated)
        into.repeats.setdefault(self.name, []).append(repeat)
        if not differentiated:
            return None
        capture.saved = gram.grad_fn
        if not (plan.due and plan.angles):
            return None
        seen = reading.h.view_as(reading.h)  # where the loss's gradient arrives alone: the entropy's joins behind it
        result = replaced(output, reading.h, seen)
        if result is not None:
            capture.angled = True
            self.angles.watch(seen, capture, windows, order, reading.view)
        return result

    def _read(self, plan: Plan, output: Any) -> Reading | None:
        """What the output means. Where that is not known, memorization goes on without this layer."""
        try:
            return self.watching.layout.read(self.name, output)
        except (TypeError, ValueError) as error:
            if self.name in plan.pressed:
                raise
            problem = str(error).replace(f'"{self.name}"', "")
            if problem not in self.watching.told:
                self.watching.told.add(problem)
                tell(f"{error}. Until then the layer is left out, and compression will refuse it")
            return None

    def _gram(self, rows: Tensor, windows: Windows, order: Order, differentiated: bool) -> tuple[Tensor, Tensor | None]:
        if not differentiated:
            with torch.no_grad():
                return gram_of(rows.detach(), windows, order)
        name = None if torch.compiler.is_compiling() else self.name
        gram, live = Gram.apply(  # type: ignore[no-untyped-call]
            rows, windows.index, windows.keep, windows.size, order.alpha, *order.kernel, name
        )
        return gram, live

    def _repeat(self, args: Any, output: Any) -> None:
        """A recomputed call saves what the call saved, whatever the phase is now, and records nothing."""
        found = [repeat for each in self.watching.passes.all() for repeat in each.repeats.get(self.name, ())]
        here = [repeat for repeat in found if repeat.place == _address(args)] or found
        if not here:
            return
        first, *others = here
        if any(not _same(first, other) for other in others):
            raise RuntimeError(
                f'module "{self.name}" is recomputed by activation checkpointing after several masked forward passes, '
                "and which mask belongs to it is unknown; call backward after each forward pass"
            )
        repeat = here[-1]
        if repeat.differentiated:
            plan = self.watching.plan
            assert plan is not None  # looked at before
            self._gram(repeat.rows(self.watching.layout.hidden(self.name, output)), repeat.windows, plan.order, True)

    def take(self, behind: set[Any]) -> list[Capture]:
        """Captures of the compiled calls that a loss is made of, oldest first."""
        own = [capture for capture in self.recent if capture.gram is not None]
        if not own:
            return []
        # Without gradients nothing tells which call a loss is of.
        taken = [capture for capture in own if _is_of(capture.gram, behind)]
        self.recent = [Capture(self.name) if capture in taken else capture for capture in self.recent]
        return taken[::-1]

    def clear(self) -> None:
        self.angles.clear()
        if any(capture.gram is not None for capture in self.recent):
            self.recent = [Capture(self.name) for _ in range(MOST_COMPILED)]


class Begins(Unsaved):
    """Forward pre-hook of the model, and of the modules around watched ones whose calls bring tokens."""

    def __init__(self, calls: Calls, watching: Watching, *, is_model: bool) -> None:
        self.calls, self.watching, self.is_model = calls, watching, is_model
        self.opened = False

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        watching = self.watching
        self.calls.enter(args, kwargs)
        if not self.is_model or torch.compiler.is_compiling() or watching.passes.open is not None:
            return
        if watching.plan is not None and watching.reader is None and torch.is_grad_enabled() and not in_backward():
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


class Measurement:
    """Entropies read by :meth:`RepresentationHook.measuring`, averaged over all windows: how data is cut into batches
    does not matter, if batches are cut between windows.

    >>> import torch
    >>> from gapt_optim import RepresentationHook
    >>> model = torch.nn.Sequential(torch.nn.Linear(4, 16), torch.nn.ReLU())
    >>> hook = RepresentationHook(model, "1")
    >>> with torch.no_grad(), hook.measuring() as measured:
    ...     _ = model(torch.randn(64, 4))
    >>> list(measured.entropies), measured.measures["1"].norm_ratio >= 1
    (['1'], True)
    """

    def __init__(self, config: EntropyConfig) -> None:
        self.config = config
        self._sums: dict[str, Tensor] = {}

    def add(self, name: str, reading: Reading) -> None:
        """The windows of one output."""
        order, rows = order_of(self.config), reading.rows
        windows = windows_of(rows.shape[0], rows.shape[1], self.config.window, reading.live, reading.segments)
        gram, live = gram_of(rows.detach(), windows, order)
        shape = windows.size, rows.shape[-1]
        measures = measures_of_rows(cut(rows.detach(), windows)) if shape[0] > shape[1] else None
        numbers = sums_of(gram, live, order, shape, rows.dtype, measures)
        self._sums[name] = self._sums[name] + numbers if name in self._sums else numbers

    @property
    def entropies(self) -> dict[str, float]:
        """Entropy per layer, in nats (or in [0, 1] with ``normalize``); waits for the device. A layer of which no
        window can have an entropy is left out."""
        found = {name: sums.tolist() for name, sums in self._sums.items()}
        return {name: total / weight for name, ((total, *_), (weight, *_)) in found.items() if weight}

    @property
    def measures(self) -> dict[str, Measures]:
        """Per layer, whether its entropy is that of fewer directions; waits for the device."""
        found = {name: sums.tolist() for name, sums in self._sums.items()}
        return {name: Measures.of_sums(totals[1:], weights[1:]) for name, (totals, weights) in found.items()}

    @property
    def mean(self) -> float:
        """Mean over layers. Raises RuntimeError when nothing ran inside the ``with`` block."""
        entropies = self.entropies
        if not entropies:
            raise RuntimeError("no watched module ran inside hook.measuring(); run the model in the with block")
        return sum(entropies.values()) / len(entropies)


def order_of(config: EntropyConfig) -> Order:
    """The entropy that a configuration names."""
    return Order(float(config.alpha), Kernel(config.kernel == "cosine", config.center), config.normalize)


def sums_of(
    gram: Tensor,
    live: Tensor | None,
    order: Order,
    shape: tuple[int, int],
    dtype: torch.dtype,
    beside: tuple[Tensor, Tensor] | None,
) -> Tensor:
    """(2, 5): over windows, the sums of the entropy and of its four measures, and the sums of their weights."""
    with torch.no_grad():
        value, live, _ = entropies(gram, live, order, shape, dtype)
        weight = window_weights(live, value, order.fewest, shape[0])
        measures, weights = weighted_measures(*(measures_of(gram) if beside is None else beside))
        own = torch.stack((torch.where(weight > 0, value, 0).sum(), weight.sum())).to(measures.dtype)
        return torch.cat((own.unsqueeze(1), torch.stack((measures.sum(0), weights.sum(0)))), 1)


def replaced(output: Any, old: Tensor, new: Tensor) -> Any:
    """``output`` with ``old`` replaced by ``new``, in the same kind of container; None where it does not hold it."""
    if output is old:
        return new
    if isinstance(output, (tuple, list)):
        items = [replaced(item, old, new) for item in output]
        if all(item is None for item in items):
            return None
        items = [item if changed is None else changed for item, changed in zip(output, items, strict=True)]
        return type(output)(*items) if hasattr(output, "_fields") else type(output)(items)
    if dataclasses.is_dataclass(output) and not isinstance(output, type):
        pairs: Any = ((field.name, getattr(output, field.name)) for field in dataclasses.fields(output))
    elif isinstance(output, Mapping):
        pairs = output.items()
    else:
        return None
    changed = {key: value for key, value in ((k, replaced(v, old, new)) for k, v in pairs) if value is not None}
    if not changed:
        return None
    if dataclasses.is_dataclass(output) and not isinstance(output, type):
        return dataclasses.replace(output, **changed)
    return type(output)({**output, **changed})


def _nodes_of(output: Any, h: Tensor) -> tuple[Any, ...]:
    """What made ``h``; or all of the module's output, where ``output=`` gave another tensor, such as a view."""
    within = [h] if output is h else list(tensors_in(output))
    made = [h] if any(tensor is h for tensor in within) else within
    return tuple(tensor.grad_fn for tensor in made if tensor.grad_fn is not None)


def _is_of(gram: Tensor | None, behind: set[Any]) -> bool:
    """A compiled call is one node of the graph; with a backend that compiles nothing, it is what it is without."""
    node: Any = None if gram is None else gram.grad_fn
    for _ in range(4):
        if node is None or node in behind:
            return True
        node = next((each for each, _ in node.next_functions if each is not None and each.next_functions), None)
        if node is None:  # parameters are behind every loss
            return False
    return False


def _address(args: Any) -> int:
    """Of the first tensor that a module was called with: a checkpoint calls it with the same one again."""
    first = next((value for value in args if isinstance(value, Tensor)), None)
    return 0 if first is None or first.is_nested else first.data_ptr()


def _same(a: Repeat, b: Repeat) -> bool:
    """Both calls are repeated alike."""
    indices = (a.windows.index, b.windows.index)
    equal = indices[0] is indices[1] or (None not in indices and torch.equal(*indices))  # type: ignore[arg-type]
    keeps = (a.windows.keep, b.windows.keep)
    return equal and (keeps[0] is keeps[1] or (None not in keeps and torch.equal(*keeps)))  # type: ignore[arg-type]


def _remove(handles: list[RemovableHandle | leave_out]) -> None:
    while handles:
        handles.pop().remove()


def _rebuild(model: nn.Module, names: list[str] | None, options: dict[str, Any]) -> RepresentationHook:
    return RepresentationHook(model, names, **options)
