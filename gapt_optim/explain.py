"""What a hook reads: how the outputs of the watched modules are understood, and why."""

from __future__ import annotations

import textwrap
from collections.abc import Callable
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .config import EntropyConfig
from .entropy import order_of
from .layout import Reading, has_forward
from .windows import cut, rows_that_count, windows_of

if TYPE_CHECKING:
    from collections.abc import Iterator

    from .hook import RepresentationHook


@dataclass(frozen=True)
class LayerExplanation:
    """How one output of a watched module is read."""

    name: str
    call: int
    """Which call of the module in this pass, from 1."""
    shape: tuple[int, ...]
    axes: str
    why_axes: str
    rows: int
    """That count."""
    masked: int
    why_rows: str
    """Where the mask came from."""
    windows: int
    window: int
    """Rows of a window."""
    usable: int
    """Windows that can have an entropy."""
    documents: int | None
    """Documents, whose ends no window crosses; None where each sequence is taken for one."""
    guess: str | None
    """What is only likely, and what to pass to say it."""


@dataclass(frozen=True)
class Explanation:
    """What one forward pass showed; printed, it is a text of 80 columns."""

    layers: tuple[LayerExplanation, ...]
    silent: tuple[str, ...] = ()
    """Watched modules that did not run."""
    unreadable: dict[str, str] = field(default_factory=dict)
    """Watched modules whose output cannot be read, and why."""

    def __getitem__(self, name: str) -> LayerExplanation:
        for layer in self.layers:
            if layer.name == name:
                return layer
        raise KeyError(f"no layer {name!r} ran; those that did: {[layer.name for layer in self.layers]}")

    def __str__(self) -> str:
        lines: list[str] = []
        for alike in self._alike():
            lines += _said(alike)
        for name, why in self.unreadable.items():
            lines += [*_wrapped(name, ""), *_wrapped(why, "  refused  ")]
        if self.silent:
            lines += _wrapped(", ".join(self.silent), "did not run: ")
        return "\n".join(lines)

    def _alike(self) -> list[list[LayerExplanation]]:
        """Neighbours that differ in their names alone, as the blocks of a transformer do, stand together."""
        groups: list[list[LayerExplanation]] = []
        for layer in self.layers:
            if groups and replace(layer, name="", call=1) == replace(groups[-1][0], name="", call=1):
                groups[-1].append(layer)
            else:
                groups.append([layer])
        return groups


def _said(alike: list[LayerExplanation]) -> list[str]:
    layer = alike[0]
    names = [f"{each.name} (call {each.call})" if each.call > 1 else each.name for each in alike]
    shown = ", ".join(names) if len(names) < 4 else f"{names[0]}, {names[1]}, ... {names[-1]} ({len(names)} alike)"
    masked = f", {layer.masked:,} masked" if layer.masked else ""
    ends = "within sequences" if layer.documents is None else f"within {layer.documents:,} documents"
    lines = [
        *_wrapped(shown, ""),
        *_wrapped(f"{layer.shape} is ({layer.axes}): {layer.why_axes}", "  shape    "),
        *_wrapped(f"{layer.rows:,} count{masked}: {layer.why_rows}", "  rows     "),
        *_wrapped(f"{layer.windows:,} of {layer.window} rows, {ends}", "  windows  "),
    ]
    if not layer.usable:
        lines += _wrapped("none can have an entropy: they have too few rows that count", "           ")
    elif layer.usable < layer.windows:
        few = layer.windows - layer.usable
        lines += _wrapped(f"{few:,} can have no entropy: too few of their rows count", "           ")
    if layer.guess is not None:
        lines += _wrapped(layer.guess, "  guess    ")
    return lines


def explain(hook: RepresentationHook, *args: Any, **kwargs: Any) -> Explanation:
    """Run the model once on these arguments, without gradients, and say how each watched output is read.

    Training modes and random states stay as they are.

    >>> import torch
    >>> from gapt_optim import RepresentationHook
    >>> model = torch.nn.Sequential(torch.nn.Linear(4, 16), torch.nn.ReLU())
    >>> print(explain(RepresentationHook(model, "0"), torch.randn(64, 4)))
    0
      shape    (64, 16) is (batch features): ...

    Raises:
        RuntimeError: the hook was removed, its model no longer exists or has no ``forward``, or ``hook.measuring()``
            is open.
    """
    model = hook.watching.model()
    if model is None:
        raise RuntimeError("the model of this RepresentationHook no longer exists; make a hook on a model that does")
    if not has_forward(model):
        raise RuntimeError(
            f"{type(model).__name__} has no forward(), so that explain() cannot call it; make a hook on the part that "
            "is called, such as RepresentationHook(model.network, ...), and explain that"
        )
    entropy = hook.watching.entropy or EntropyConfig()
    window, fewest = entropy.window, order_of(entropy).fewest
    found: list[LayerExplanation] = []
    unreadable: dict[str, str] = {}

    def read(name: str, reading: Reading) -> None:
        call = 1 + sum(layer.name == name for layer in found)
        found.append(_explained(name, call, reading, window, fewest))

    reads: RepresentationHook | None = hook
    with in_evaluation(model), _randomness_kept(model), torch.no_grad():
        while reads is not None:
            try:
                with reads.reading(read):
                    if not reads.names:  # a first pass shows which modules are the model's blocks
                        model(*args, **kwargs)
                    before = None
                    while before != reads.watching.layout.corrections:  # a pass may show that it was read wrongly
                        before = reads.watching.layout.corrections
                        found.clear()
                        model(*args, **kwargs)
                break
            except (TypeError, ValueError) as error:  # of the first output that cannot be read: go on without it
                name = next((name for name in reads.names if f'"{name}"' in str(error)), None)
                if name is None:
                    raise
                unreadable[name] = str(error)
                found.clear()
                left = [name for name in hook.names if name not in unreadable]
                reads = type(hook)(model, left, **hook.options, placements=hook.placements) if left else None
    ran = {layer.name for layer in found}
    silent = tuple(name for name in hook.names if name not in ran and name not in unreadable)
    return Explanation(tuple(found), silent, unreadable)


def _explained(name: str, call: int, reading: Reading, window: int | None, fewest: int) -> LayerExplanation:
    batch, length = reading.rows.shape[:2]
    live = reading.live
    windows = windows_of(batch, length, window, live, reading.segments)
    counts = rows_that_count(windows, batch, length)
    number = len(cut(reading.rows[..., :1], windows))
    usable = (number if windows.size >= fewest else 0) if counts is None else int((counts >= fewest).sum())
    rows = batch * length if live is None else int(live.sum())
    segments = reading.segments
    documents = None if segments is None else batch + int((segments[:, 1:] != segments[:, :-1]).sum())
    return LayerExplanation(
        name, call, tuple(reading.h.shape) if not reading.h.is_nested else tuple(reading.rows.shape), reading.axes,
        reading.why_axes, rows, batch * length - rows, reading.why_rows, number, windows.size, usable, documents,
        reading.guess,
    )  # fmt: skip


@contextmanager
def in_evaluation(*models: nn.Module) -> Iterator[None]:
    """Models in evaluation mode; afterwards each of their modules is in the mode it had."""
    modes = [(module, module.training) for model in models for module in model.modules()]
    try:
        for model in models:
            model.eval()
        yield
    finally:
        for module, mode in modes:
            module.training = mode


def _randomness_kept(model: nn.Module) -> AbstractContextManager[None]:
    devices = {parameter.device for parameter in model.parameters() if parameter.device.type == "cuda"}
    return torch.random.fork_rng([device.index or 0 for device in devices])


def modules_of(model: nn.Module, run: Callable[[], Any]) -> list[tuple[str, str, str]]:
    """Name, class and shape of the output of each module, in a pass without gradients; "" where it did not run."""
    shapes: dict[str, str] = {}

    def keep(name: str, module: nn.Module, args: Any, output: Any) -> None:
        shapes[name] = _shape(output)

    named = [(name, module) for name, module in model.named_modules() if name]
    handles = [module.register_forward_hook(partial(keep, name)) for name, module in named]
    try:
        with in_evaluation(model), _randomness_kept(model), torch.no_grad():
            run()
    finally:
        for handle in handles:
            handle.remove()
    return [(name, type(module).__name__, shapes.get(name, "did not run")) for name, module in named]


def _shape(output: Any) -> str:
    if isinstance(output, Tensor):
        return str(tuple(output.shape))
    if isinstance(output, tuple | list):
        return f"{type(output).__name__} of {', '.join(_shape(item) for item in output[:3])}"
    return type(output).__name__


def _wrapped(text: str, before: str) -> list[str]:
    return textwrap.wrap(
        text, 80, initial_indent=before, subsequent_indent=" " * (len(before) or 2), break_on_hyphens=False
    )
