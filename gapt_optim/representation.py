"""Which layers are watched, where their taps are placed, and this step's entropies."""

from __future__ import annotations

import dataclasses
import inspect
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from fnmatch import fnmatchcase
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from .config import EntropyConfig
from .tap import PROBE_SIZE, Grams, Tap, TapMode, entropies_of, grams_of, live_rows, window_shape

Layers: TypeAlias = "str | nn.Module | Iterable[str | nn.Module] | None"

_MEASURE_ONLY = "taps run only in training mode with gradients on; use hook.measuring() in evaluation"
_WITHOUT_GRAD = (
    "ran with gradients off. Reentrant activation checkpointing does that, and its gradients would be wrong here: use "
    'checkpoint(..., use_reentrant=False), in transformers gradient_checkpointing_kwargs={"use_reentrant": False}. '
    f"Otherwise, {_MEASURE_ONLY}"
)


class Measurement:
    """Entropies read by :meth:`RepresentationHook.measuring`, averaged over the calls of each module."""

    def __init__(self, config: EntropyConfig) -> None:
        self.config = config
        self._sums: dict[str, Tensor] = {}
        self._calls: dict[str, int] = {}

    def add(self, name: str, entropy: Tensor) -> None:
        self._sums[name] = self._sums[name] + entropy if name in self._sums else entropy
        self._calls[name] = self._calls.get(name, 0) + 1

    @property
    def entropies(self) -> dict[str, float]:
        """Entropy per layer, in nats (or in [0, 1] with ``normalize``); waits for the device."""
        return {name: float(total) / self._calls[name] for name, total in self._sums.items()}

    @property
    def mean(self) -> float:
        """Mean over layers. Raises RuntimeError when nothing ran inside the ``with`` block."""
        entropies = self.entropies
        if not entropies:
            raise RuntimeError("no tapped module ran inside hook.measuring(); run the model in the with block")
        return sum(entropies.values()) / len(entropies)


class _Capture:
    """What the taps of one hook share. It refers to no module, so that it never keeps a model alive."""

    def __init__(self, names: list[str], pick_mask: Callable[[dict[str, Any]], Tensor | None] | None) -> None:
        self.calls: dict[str, list[Grams]] = {name: [] for name in names}
        self.mode: TapMode | None = None  # None: no optimizer listens
        self.compressing: set[str] = set()  # layers that take part in compression
        self.measurement: Measurement | None = None
        self.pick_mask = pick_mask
        self.mask: Tensor | None = None
        self.inside_model = False
        self.masked_calls = 0  # calls of the model with a mask, since a backward last recomputed one
        self.recomputed = False
        self.ever_ran: set[str] = set()
        self.without_grad: set[str] = set()  # ran in training mode with gradients off
        self.evaluated: set[str] = set()  # ran in evaluation mode


class RepresentationHook:
    """Watches the outputs of some modules of a model, without changing the model's code.

    Place it before the first call of a compiled model. Two hooks on one model do not see each other.

    Args:
        model: any module. It is referred to weakly: the hook keeps no model alive.
        layers: a glob over ``model.named_modules()`` (``*`` does not cross a dot), a module, a list of
            globs, names or modules, or None for the model's longest ``nn.ModuleList`` of one class.
        output: picks the hidden tensor out of a module's output. By default the output itself, the first item of
            a tuple or list, or ``last_hidden_state``. Shapes: (batch, d), (batch, seq, d), or
            (batch, channels, *positions).
        mask: picks the token mask (batch, seq), true or 1 where a token counts, out of the keywords of the
            model's call. By default ``attention_mask`` where the call has one of that shape.

    Raises:
        ValueError: nothing matches, or the automatic choice is ambiguous; the message lists candidates.
    """

    def __init__(
        self,
        model: nn.Module,
        layers: Layers = None,
        *,
        output: Callable[[Any], Tensor] | None = None,
        mask: Callable[[dict[str, Any]], Tensor | None] | None = None,
    ) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(f"model must be a torch.nn.Module, found {type(model).__name__}")
        modules = _select(model, layers)
        self.names: list[str] = list(modules)
        self._model = weakref.ref(model)
        self._output, self._mask = output, mask
        self._capture = _Capture(self.names, mask)
        device = next((p.device for p in model.parameters()), torch.device("cpu"))
        self._taps = {name: _ModuleTap(name, self._capture, output, device) for name in self.names}
        handles = [module.register_forward_hook(self._taps[name]) for name, module in modules.items()]
        root = _ModelCall(self._capture, _parameters(model))
        handles.append(model.register_forward_pre_hook(root, with_kwargs=True, prepend=True))
        handles.append(model.register_forward_hook(_ModelReturn(self._capture), always_call=True))
        # Also runs when the hook is garbage: a model outlives the hooks placed on it.
        self._finalizer = weakref.finalize(self, _remove, handles)

    @property
    def removed(self) -> bool:
        """True after :meth:`remove`."""
        return not self._finalizer.alive

    def remove(self) -> None:
        """Take the taps out of the model; nothing is captured from then on."""
        self._finalizer()
        self._drop()

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
            RuntimeError: the hook was removed, or is measuring already.
        """
        if self.removed:
            raise RuntimeError("this RepresentationHook was removed; make a new one to measure")
        if self._capture.measurement is not None:
            raise RuntimeError("hook.measuring() is already open; use the measurement of the outer with block")
        mode = self._capture.mode
        config = entropy if entropy is not None else mode.entropy if mode is not None else EntropyConfig()
        mask = self._capture.mask
        self._capture.measurement = Measurement(config)
        try:
            yield self._capture.measurement
        finally:
            self._capture.measurement, self._capture.mask = None, mask

    # Between hook and optimizer

    @property
    def _attached(self) -> bool:
        return self._capture.mode is not None

    def _set_mode(self, mode: TapMode, compressing: Iterable[str]) -> None:
        self._capture.mode, self._capture.compressing = mode, set(compressing)

    def _take(self) -> dict[str, list[Grams]]:
        """What each module that ran since the last call left, one item per call of it.

        Raises RuntimeError when a module never ran, or none did, saying why where that is known.
        """
        capture = self._capture
        taken = {name: _unspent(calls) or calls for name, calls in capture.calls.items() if calls}
        # A module that ran before may rest for a step (layer drop), but not because gradients were off.
        resting = capture.ever_ran - capture.without_grad if taken else set()
        missing = [name for name in self.names if name not in taken and name not in resting]
        capture.ever_ran.update(taken)
        if missing:
            raise RuntimeError(self._why_missing(missing))
        capture.calls.update({name: [] for name in taken})
        return taken

    def _drop(self) -> None:
        """Forget what was captured and not used."""
        for name in self.names:
            if self._capture.calls[name]:
                self._capture.calls[name] = []
        self._capture.mask, self._capture.masked_calls, self._capture.inside_model = None, 0, False
        self._capture.without_grad.clear()
        self._capture.evaluated.clear()

    def _take_statistics(self, device: torch.device) -> Tensor:
        """(layers, 3) sums of <g,d>, |g|², |d|² since the last call, zeros where no backward reached a tap."""
        probes = [self._taps[name].probe for name in self.names]
        rows = [probe.detach() if probe.grad is None else probe.grad for probe in probes]
        for probe in probes:
            probe.grad = None
        return torch.stack([row.to(device, non_blocking=True) for row in rows])

    def _why_missing(self, missing: list[str]) -> str:
        if self.removed:
            return "the RepresentationHook was removed; make a new hook and optimizer, or step the base optimizer"
        if self._model() is None:
            return "the model of this RepresentationHook no longer exists; make a hook on the model that is trained"
        name = missing[0]
        more = f" (and {len(missing) - 1} more)" if len(missing) > 1 else ""
        if name in self._capture.without_grad:
            return f'tapped module "{name}"{more} {_WITHOUT_GRAD}'
        if name in self._capture.evaluated:
            return f'tapped module "{name}"{more} ran in evaluation mode; {_MEASURE_ONLY}'
        return (
            f'tapped module "{name}"{more} did not run before objective(loss); call the model in training mode first, '
            "or leave the module out of layers. If the model was compiled, place the hook before its first call"
        )

    def __reduce__(self) -> tuple[Any, ...]:
        # A deep copy or pickle of (model, optimizer) gives a hook on the copied model.
        model = self._model()
        if model is None:
            raise RuntimeError("cannot copy a RepresentationHook whose model no longer exists")
        return _rebuild, (model, self.names, self._output, self._mask)

    def __repr__(self) -> str:
        return f"RepresentationHook({self.names})"


class _ModuleTap:
    """Forward hook of one tapped module."""

    def __init__(
        self, name: str, capture: _Capture, output: Callable[[Any], Tensor] | None, device: torch.device
    ) -> None:
        self.name, self.capture, self.output = name, capture, output
        self.probe = _make_probe(device)
        # Autograd puts a Function's name into the message about an in-place operation on its output.
        self.function: Any = type(f"Tap of module '{name}' ", (Tap,), {})

    def __call__(self, module: nn.Module, args: Any, output: Any) -> Any:
        capture = self.capture
        if capture.measurement is not None:
            with torch.no_grad():
                h = self.hidden(output)
                config = capture.measurement.config
                values, _ = entropies_of([grams_of(h, self.mask_for(h, False), config)], config, with_kernels=False)
                capture.measurement.add(self.name, values[0])
            return None
        mode = capture.mode
        if mode is None:
            return None
        if not (module.training and torch.is_grad_enabled()):
            (capture.without_grad if module.training else capture.evaluated).add(self.name)
            return None
        recomputing = _in_backward()
        if recomputing and self.name not in capture.ever_ran and not capture.calls[self.name]:
            raise RuntimeError(f'tapped module "{self.name}" {_WITHOUT_GRAD}')
        h = self.hidden(output)
        mask = self.mask_for(h, recomputing)
        if not h.requires_grad:  # everything below is frozen: there is an entropy, and nothing to push
            if not recomputing:
                capture.calls[self.name].append(grams_of(h, mask, mode.entropy))
            return None
        if self.probe.device != h.device:
            self.probe = _make_probe(h.device)
        window = mode.entropy.window
        compress = mode.compress and self.name in capture.compressing
        tapped, gram, carrier = self.function.apply(
            h, self.probe, mask, mode.entropy.alpha, window, compress, mode.measure, mode.combine, mode.max_ratio
        )
        if not recomputing:
            calls = capture.calls[self.name]
            if calls and not torch.compiler.is_compiling():
                calls[:] = _unspent(calls)
            calls.append(Grams(gram, live_rows(h, window, mask), window_shape(h, window), h.dtype, carrier))
        return _replace(output, h, tapped, self.name)

    def hidden(self, output: Any) -> Tensor:
        """The hidden tensor in a module's output, checked."""
        h = _default_output(output) if self.output is None else self.output(output)
        if not isinstance(h, Tensor):
            what = "its default choice" if self.output is None else "output="
            raise TypeError(
                f'module "{self.name}" returned {type(output).__name__} and {what} gave {type(h).__name__}, not a '
                "tensor; pass output=lambda out: ... to RepresentationHook to pick the hidden tensor"
            )
        if type(h).__name__ == "DTensor":
            raise TypeError(
                f'module "{self.name}" returned a DTensor; its entropy would be that of one shard. Tap a module whose '
                "output is a plain tensor, for example one that gathers or replicates it"
            )
        if not h.is_floating_point():
            raise TypeError(
                f'module "{self.name}" returned a tensor of {h.dtype}; entropy needs floating point. Choose another '
                "module in layers, or another tensor of its output with output="
            )
        if h.ndim < 2:
            raise ValueError(
                f'module "{self.name}" returned a tensor of shape {tuple(h.shape)}; expected (batch, d), '
                "(batch, seq, d) or (batch, channels, *positions). Choose another module or pass output="
            )
        return h

    def mask_for(self, h: Tensor, recomputing: bool) -> Tensor | None:
        """The token mask of the model call that ``h`` belongs to, where it has one that fits."""
        capture = self.capture
        if capture.mask is None or h.ndim != 3 or not (capture.inside_model or recomputing):
            return None
        if recomputing and not capture.inside_model and capture.masked_calls > 1:
            raise RuntimeError(
                f'module "{self.name}" is recomputed by activation checkpointing after several masked forward passes, '
                "and which mask belongs to it is unknown; call backward after each forward pass"
            )
        if recomputing:
            capture.recomputed = True
        mask = capture.mask
        if mask.shape != h.shape[:2]:
            if capture.pick_mask is None:
                return None
            raise ValueError(
                f'mask= gave shape {tuple(mask.shape)}, but the output of module "{self.name}" has (batch, seq) = '
                f"{tuple(h.shape[:2])}; return a mask of that shape, or None"
            )
        return mask.to(device=h.device, dtype=torch.bool)

    def __reduce__(self) -> tuple[Any, ...]:
        return _Inert, ()  # the copy of a model does not feed this hook


class _ModelCall:
    """Forward pre-hook of the model: remembers the token mask of the call."""

    def __init__(self, capture: _Capture, parameters: list[str]) -> None:
        self.capture, self.parameters = capture, parameters

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        capture = self.capture
        capture.inside_model = True
        if capture.measurement is None and (capture.mode is None or not torch.is_grad_enabled()):
            return  # nothing is captured, and a backward to come may need the mask of the call before
        keywords = dict(zip(self.parameters, args, strict=False)) | kwargs
        pick = capture.pick_mask
        mask = keywords.get("attention_mask") if pick is None else pick(keywords)
        if mask is not None and not isinstance(mask, Tensor):
            if pick is not None:
                raise TypeError(f"mask= must give a tensor (batch, seq) or None, found {type(mask).__name__}")
            mask = None
        capture.mask = mask
        if mask is not None and capture.measurement is None and not torch.compiler.is_compiling():
            capture.masked_calls = 1 if capture.recomputed else capture.masked_calls + 1
            capture.recomputed = False

    def __reduce__(self) -> tuple[Any, ...]:
        return _Inert, ()


class _ModelReturn:
    """Forward hook of the model: a module called by itself afterwards has no mask."""

    def __init__(self, capture: _Capture) -> None:
        self.capture = capture

    def __call__(self, module: nn.Module, args: Any, output: Any) -> None:
        self.capture.inside_model = False

    def __reduce__(self) -> tuple[Any, ...]:
        return _Inert, ()


class _Inert:
    """What a copied or unpickled model has in place of a tap."""

    def __call__(self, *args: Any, **kwargs: Any) -> None:
        return None


def _parameters(model: nn.Module) -> list[str]:
    """Names of the arguments of the model's call, which DDP and torch.compile hide behind *args."""
    parameters = inspect.signature(model.forward).parameters
    inner = getattr(model, "_orig_mod", getattr(model, "module", None))
    if isinstance(inner, nn.Module) and all(p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD) for p in parameters.values()):
        return _parameters(inner)
    return list(parameters)


def _select(model: nn.Module, layers: Layers) -> dict[str, nn.Module]:
    """The modules that ``layers`` names, by name, in the model's own order."""
    named = dict(model.named_modules())
    if layers is None:
        return _longest_list(model)
    wanted = [layers] if isinstance(layers, str | nn.Module) else list(layers)
    if not wanted:
        raise ValueError("layers is empty; name at least one module, or pass None for the automatic choice")
    chosen: set[str] = set()
    for item in wanted:
        if isinstance(item, nn.Module):
            matches = [name for name, module in named.items() if module is item]
            problem = f"layers holds a {type(item).__name__} that is no module of the model"
        elif isinstance(item, str):
            matches = [name for name in named if _matches(name, item)]
            problem = f'layers="{item}" matches no module of the model'
        else:
            raise TypeError(f"layers must hold names, globs or modules, found {type(item).__name__}")
        if not matches:
            raise ValueError(f"{problem}; {_suggest(item, named)}")
        chosen.update(matches)
    return {name: module for name, module in named.items() if name in chosen}


def _matches(name: str, pattern: str) -> bool:
    parts, patterns = name.split("."), pattern.split(".")
    return name == pattern or (len(parts) == len(patterns) and all(map(fnmatchcase, parts, patterns)))


def _suggest(item: str | nn.Module, named: Mapping[str, nn.Module]) -> str:
    if isinstance(item, str):
        for prefix in ("module.", "_orig_mod."):
            if any(_matches(name, prefix + item) for name in named):
                return f'the model is wrapped, use "{prefix}{item}"'
    names = [name for name in named if name]
    shown = ", ".join(f'"{name}"' for name in names[:12])
    return f"its modules are {shown}{', ...' if len(names) > 12 else ''}"


def _longest_list(model: nn.Module) -> dict[str, nn.Module]:
    lists = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) > 0 and len({type(child) for child in module}) == 1
    }
    length = max(map(len, lists.values()), default=0)
    longest = [name for name, module in lists.items() if len(module) == length]
    if len(longest) == 1:
        prefix = f"{longest[0]}." if longest[0] else ""
        return {f"{prefix}{i}": child for i, child in enumerate(lists[longest[0]])}
    if not longest:
        names = ", ".join(f'"{name}"' for name, _ in model.named_children())
        raise ValueError(
            f"layers=None needs an nn.ModuleList of one class, and the model has none; name layers: {names}"
        )
    candidates = ", ".join(f'"{name}.*"' for name in longest)
    raise ValueError(f"layers=None is ambiguous, several lists have {length} modules; pass one of {candidates}")


def _default_output(output: Any) -> Any:
    if isinstance(output, Tensor):
        return output
    if getattr(output, "last_hidden_state", None) is not None:
        return output.last_hidden_state
    if isinstance(output, Mapping):
        tensors = [value for value in output.values() if isinstance(value, Tensor)]
        return output.get("last_hidden_state", tensors[0] if len(tensors) == 1 else None)
    if isinstance(output, tuple | list) and output:
        return output[0]
    return None


def _replace(output: Any, old: Tensor, new: Tensor, name: str) -> Any:
    """``output`` with ``old`` replaced by ``new``, in the same kind of container."""
    replaced = _replace_within(output, old, new)
    if replaced is None:
        raise TypeError(
            f'module "{name}" returned {type(output).__name__}, which does not hold the tensor that output= gave; '
            "output= must return one of the tensors inside a tuple, list, dict or dataclass, not a new one"
        )
    return replaced


def _replace_within(output: Any, old: Tensor, new: Tensor) -> Any:
    if output is old:
        return new
    if isinstance(output, tuple | list):
        items = [_replace_within(item, old, new) for item in output]
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
    changed = {key: value for key, value in ((k, _replace_within(v, old, new)) for k, v in pairs) if value is not None}
    if not changed:
        return None
    if dataclasses.is_dataclass(output) and not isinstance(output, type):
        return dataclasses.replace(output, **changed)
    return type(output)({**output, **changed})


def _in_backward() -> bool:
    """A module that runs within a backward is being recomputed by activation checkpointing."""
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1


def _unspent(calls: list[Grams]) -> list[Grams]:
    """Without the calls that a backward already went through, of another wrapper or of a loss of the user's own."""
    return [call for call in calls if not _spent(call)]


def _spent(call: Grams) -> bool:
    node: Any = call.carrier.grad_fn if call.carrier is not None else None
    try:
        return node is not None and node._raw_saved_tensors is None
    except RuntimeError:  # the buffers of the graph are freed
        return True


def _make_probe(device: torch.device) -> Tensor:
    return torch.zeros(PROBE_SIZE, device=device, requires_grad=True)


def _remove(handles: list[RemovableHandle]) -> None:
    for handle in handles:
        handle.remove()


def _rebuild(model: nn.Module, names: list[str], output: Any, mask: Any) -> RepresentationHook:
    return RepresentationHook(model, names, output=output, mask=mask)
