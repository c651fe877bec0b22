"""The hook: which modules are watched, and entropies read in evaluation."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ._unsaved import Unsaved, leave_out
from .config import EntropyConfig
from .entropy import Order, entropies, gram_of, measures_of, order_of, window_weights
from .explain import Explanation, explain
from .kernels import measures_of_rows
from .layout import Candidates, Layers, Layout, Pick, Reading, by_layer, choose_layers, select_layers
from .metrics import Measures
from .objective import weighted_measures
from .progress import bare_name
from .shards import checked_placements
from .watching import Begins, Ends, Reader, Watch, Watching
from .windows import cut, windows_of


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
        placements: where outputs are plain tensors that hold a part of the hidden tensor on each rank, as with sequence
            parallelism: ``(mesh, Shard(1))``, or a mapping from globs to such pairs; ``()`` says that none is a part.
            The ranks of the mesh share one loss. DTensors tell their own placements.

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
        placements: Any = None,
    ) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(f"model must be a torch.nn.Module, found {type(model).__name__}")
        self.options: dict[str, Any] = {"output": output, "mask": mask, "layout": layout, "segments": segments}
        self.placements = checked_placements(placements)
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
        watching.layout = Layout(model, modules, **self.options)
        watching.placements = by_layer("placements", self.placements, modules)
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
            present = {bare_name(name): name for name, _ in model.named_modules()}
            modules = select_layers(model, [present.get(bare_name(name), name) for name in names])
            _remove(self._handles)
            self._watch(model, modules)

    def _choose_later(self, model: nn.Module, candidates: Candidates) -> None:
        """The first forward pass shows which of the candidates are the model's blocks."""
        chooses = model.register_forward_hook(_Chooses(self, candidates))
        self._handles += [*candidates.place(), leave_out(model), chooses]

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
        return _rebuild, (model, self.names or None, {**self.options, "placements": self.placements})

    def __repr__(self) -> str:
        return f"RepresentationHook({self.names})"


class _Chooses(Unsaved):
    """Forward hook of a model, until its first forward pass has shown which layers to watch."""

    def __init__(self, hook: RepresentationHook, candidates: Candidates) -> None:
        self._hook, self._candidates = weakref.ref(hook), candidates

    def __call__(self, module: nn.Module, args: Any, output: Any) -> None:
        hook = self._hook()
        if hook is not None and not hook.names:
            _remove(hook._handles)
            hook._watch(module, self._candidates.chosen())


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
        self.sums: dict[str, Tensor] = {}
        """(2, 5) of each layer: sums over windows of the entropy and its measures, and of their weights. Those of
        several measurements, such as those of ranks, may be added."""

    def add(self, name: str, reading: Reading) -> None:
        """The windows of one output."""
        order, rows = order_of(self.config), reading.rows
        windows = windows_of(rows.shape[0], rows.shape[1], self.config.window, reading.live, reading.segments)
        gram, live = gram_of(rows.detach(), windows, order)
        shape = windows.size, rows.shape[-1]
        measures = measures_of_rows(cut(rows.detach(), windows)) if shape[0] > shape[1] else None
        numbers = sums_of(gram, live, order, shape, rows.dtype, measures)
        self.sums[name] = self.sums[name] + numbers if name in self.sums else numbers

    @property
    def entropies(self) -> dict[str, float]:
        """Entropy per layer, in nats (or in [0, 1] with ``normalize``); waits for the device. A layer of which no
        window can have an entropy is left out."""
        found = {name: sums.tolist() for name, sums in self.sums.items()}
        return {name: total / weight for name, ((total, *_), (weight, *_)) in found.items() if weight}

    @property
    def measures(self) -> dict[str, Measures]:
        """Per layer, whether its entropy is that of fewer directions; waits for the device."""
        found = {name: sums.tolist() for name, sums in self.sums.items()}
        return {name: Measures.of_sums(totals[1:], weights[1:]) for name, (totals, weights) in found.items()}

    @property
    def mean(self) -> float:
        """Mean over layers. Raises RuntimeError when nothing ran inside the ``with`` block."""
        entropies = self.entropies
        if not entropies:
            raise RuntimeError("no watched module ran inside hook.measuring(); run the model in the with block")
        return sum(entropies.values()) / len(entropies)


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


def _remove(handles: list[RemovableHandle | leave_out]) -> None:
    while handles:
        handles.pop().remove()


def _rebuild(model: nn.Module, names: list[str] | None, options: dict[str, Any]) -> RepresentationHook:
    return RepresentationHook(model, names, **options)
