"""The hook: which layers are watched, and where their taps are placed."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from fnmatch import fnmatchcase
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

import gapt_optim  # for its configurations: pydantic, which is slow to import, comes with the first one

from .masks import ModelCall, ModelReturn, argument_names, masked_modules, padding_argument
from .measurement import Measurement
from .module_tap import ModuleTap
from .outputs import puts_sequence_first
from .selection import Layers, select_layers
from .store import CaptureStore, PickMask
from .unsaved import leave_out


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
            globs, names or modules, or None for the model's longest ``nn.ModuleList`` of one class.
        output: picks the hidden tensor from a module's output. By default the output itself, the first item of
            a tuple or list, or ``last_hidden_state``. Shapes: (batch, d), (batch, seq, d), or
            ``(batch, channels, *positions)``.
        mask: picks the token mask (batch, seq), true or 1 where a token counts, from the arguments of the
            model's call, given by name. Layers of several sequences, as of an encoder and a decoder, take a mapping
            from globs to such functions. By default the ``attention_mask`` of the model's call or of the module around
            a layer, if it has that shape, or the mask of padding of torch's own transformers. For an output
            (batch * seq, d) it masks rows; an output with one vector per sequence has nothing to mask.
        batch_first: False where outputs of three dimensions are (seq, batch, d). By default each module's own
            ``batch_first``, where it has one, as ``nn.LSTM`` and the parts of ``nn.Transformer`` do, else True.

    Attributes:
        names: of the tapped modules, in the order of ``model.named_modules()``, which counts as their depth.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: nothing matches, or the automatic choice is ambiguous; the message lists candidates.
    """

    def __init__(
        self,
        model: nn.Module,
        layers: Layers = None,
        *,
        output: Callable[[Any], Tensor] | None = None,
        mask: PickMask | Mapping[str, PickMask] | None = None,
        batch_first: bool | None = None,
    ) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(f"model must be a torch.nn.Module, found {type(model).__name__}")
        picks = {"mask": mask} if not isinstance(mask, Mapping) else {f"mask[{key!r}]": mask[key] for key in mask}
        for argument, value in ({"output": output} | picks).items():
            if value is not None and not callable(value):
                raise TypeError(f"{argument} must be a function or None, found {type(value).__name__}")
        if not isinstance(batch_first, bool | None):
            raise TypeError(f"batch_first must be True, False or None, found {batch_first!r}")
        modules = select_layers(model, layers)
        self.names: list[str] = list(modules)
        self._output, self._mask, self._batch_first = output, mask, batch_first
        mask_of = _matched(mask, self.names) if isinstance(mask, Mapping) else {}
        self._store = store = CaptureStore(model, self.names, dict(mask) if isinstance(mask, Mapping) else mask)
        handles: list[RemovableHandle | leave_out] = [leave_out(module) for module in modules.values()]
        for name, module in modules.items():
            sequence_first = puts_sequence_first(model, name) if batch_first is None else not batch_first
            tap = ModuleTap(name, store, output, sequence_first=sequence_first, mask_of=mask_of.get(name))
            handles.append(module.register_forward_hook(tap))
        for module in masked_modules(model, modules) if mask is None else [model]:
            handles.append(leave_out(module))
            call = ModelCall(store, argument_names(module), padding_argument(module), is_model=module is model)
            handles.append(module.register_forward_pre_hook(call, with_kwargs=True, prepend=True))
            handles.append(module.register_forward_hook(ModelReturn(call), always_call=True))
        # Also runs when the hook is garbage: a model outlives the hooks placed on it.
        self._finalizer = weakref.finalize(self, _remove, handles)

    @property
    def removed(self) -> bool:
        """True after :meth:`remove`."""
        return not self._finalizer.alive

    def remove(self) -> None:
        """Remove the taps from the model; nothing is captured from then on."""
        self._finalizer()
        self._store.removed = True
        self._store.clear()

    def __enter__(self) -> RepresentationHook:
        return self

    def __exit__(self, *exception: object) -> None:
        self.remove()

    @contextmanager
    def measuring(self, entropy: gapt_optim.EntropyConfig | None = None) -> Iterator[Measurement]:
        """Read entropies in evaluation, with gradients off or on, in any mode.

        ``with hook.measuring() as m: model(x)`` and then ``m.entropies``. Inside, nothing is captured for the
        optimizer. ``entropy`` defaults to the optimizer's settings, or to ``EntropyConfig()``.

        Raises:
            TypeError: ``entropy`` is not an EntropyConfig.
            RuntimeError: the hook was removed, or is already measuring.
        """
        if self.removed:
            raise RuntimeError("this RepresentationHook was removed; make a new one to measure")
        if self._store.measurement is not None:
            raise RuntimeError("hook.measuring() is already open; use the measurement of the outer with block")
        if not isinstance(entropy, gapt_optim.EntropyConfig | None):
            raise TypeError(f"entropy must be an EntropyConfig, found {type(entropy).__name__}: EntropyConfig(...)")
        plan = self._store.plan
        config = entropy if entropy is not None else plan.entropy if plan is not None else gapt_optim.EntropyConfig()
        self._store.measurement = Measurement(config)
        try:
            yield self._store.measurement
        finally:
            self._store.measurement = None

    def __reduce__(self) -> tuple[Any, ...]:
        # A deep copy or pickle of (model, optimizer) gives a hook on the copied model.
        model = self._store.model()
        if model is None:
            raise RuntimeError("cannot copy a RepresentationHook whose model no longer exists")
        return _rebuild, (model, self.names, self._output, self._mask, self._batch_first)

    def __repr__(self) -> str:
        return f"RepresentationHook({self.names})"


def store_of(hook: RepresentationHook) -> CaptureStore:
    """What stands between ``hook`` and its optimizer."""
    return hook._store


def _matched(masks: Mapping[str, PickMask], names: list[str]) -> dict[str, str]:
    """The first glob of ``masks`` that matches each layer; a layer that none matches has no mask.

    Raises:
        ValueError: a glob matches no layer.
    """
    found = {name: glob for glob in reversed(list(masks)) for name in names if fnmatchcase(name, glob)}
    unused = [glob for glob in masks if not any(fnmatchcase(name, glob) for name in names)]
    if unused:
        raise ValueError(f"mask has a key {unused[0]!r} that matches none of the layers {', '.join(names)}")
    return found


def _remove(handles: list[RemovableHandle | leave_out]) -> None:
    for handle in handles:
        handle.remove()


def _rebuild(
    model: nn.Module, names: list[str], output: Any, mask: Any, batch_first: bool | None = None
) -> RepresentationHook:
    return RepresentationHook(model, names, output=output, mask=mask, batch_first=batch_first)
