"""Which layers are watched, where their taps are placed, and this step's entropies."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ._torch.unsaved import leave_out
from .config import EntropyConfig
from .hooks import (
    MEASURE_ONLY,
    WITHOUT_GRAD,
    Capture,
    Measurement,
    ModelCall,
    ModelReturn,
    ModuleTap,
    argument_names,
    belongs_to,
    masked_modules,
    nodes_averaged_by_ddp,
    nodes_behind,
    unspent,
)
from .selection import Layers, select_layers
from .tap import Grams, TapMode


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

    Attributes:
        names: of the tapped modules, in the order of ``model.named_modules()``, which is taken for that of depth.

    Raises:
        TypeError: an argument is of another kind.
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
        for argument, value in (("output", output), ("mask", mask)):
            if value is not None and not callable(value):
                raise TypeError(f"{argument} must be a function or None, found {type(value).__name__}")
        modules = select_layers(model, layers)
        self.names: list[str] = list(modules)
        self._model = weakref.ref(model)
        self._output, self._mask = output, mask
        self._capture = Capture(self.names, mask)
        device = next((p.device for p in model.parameters()), torch.device("cpu"))
        self._taps = {name: ModuleTap(name, self._capture, output, device) for name in self.names}
        handles: list[RemovableHandle | leave_out] = [leave_out(module) for module in modules.values()]
        handles += [module.register_forward_hook(self._taps[name]) for name, module in modules.items()]
        for module in masked_modules(model, modules) if mask is None else [model]:
            handles.append(leave_out(module))
            call = ModelCall(self._capture, argument_names(module), is_model=module is model)
            handles.append(module.register_forward_pre_hook(call, with_kwargs=True, prepend=True))
            handles.append(module.register_forward_hook(ModelReturn(call), always_call=True))
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
            TypeError: ``entropy`` is no EntropyConfig.
            RuntimeError: the hook was removed, or is measuring already.
        """
        if self.removed:
            raise RuntimeError("this RepresentationHook was removed; make a new one to measure")
        if self._capture.measurement is not None:
            raise RuntimeError("hook.measuring() is already open; use the measurement of the outer with block")
        if not isinstance(entropy, EntropyConfig | None):
            raise TypeError(f"entropy must be an EntropyConfig, found {type(entropy).__name__}: EntropyConfig(...)")
        mode = self._capture.mode
        config = entropy if entropy is not None else mode.entropy if mode is not None else EntropyConfig()
        self._capture.measurement = Measurement(config)
        try:
            yield self._capture.measurement
        finally:
            self._capture.measurement = None

    # Between hook and optimizer

    @property
    def _attached(self) -> bool:
        return self._capture.mode is not None

    def _set_mode(self, mode: TapMode, compressing: Iterable[str]) -> None:
        self._capture.mode, self._capture.compressing = mode, set(compressing)

    def _take(self, loss: Tensor) -> dict[str, list[Grams]]:
        """What each module that ran for ``loss`` left, one item per call of it; what other forward passes left goes.

        Raises RuntimeError when a module never ran, or none did, saying why where that is known; and for a branch that
        DDP leaves out.
        """
        capture = self._capture
        taken = {name: unspent(calls) or calls for name, calls in capture.calls.items() if calls}
        if any(len(calls) > 1 for calls in taken.values()):
            # A pass whose loss was thrown away, or a module that ran several times in one: the graph tells.
            behind = nodes_behind(loss)
            of_loss = {name: [call for call in calls if belongs_to(call, behind)] for name, calls in taken.items()}
            # A side branch that the loss does not use: its latest call.
            taken = {name: of_loss[name] or calls[-1:] for name, calls in taken.items()}
        if not capture.checked_branches and dist.is_available() and dist.is_initialized():
            capture.checked_branches = True  # once: it takes a walk over the graph
            self._refuse_branches_that_ddp_leaves_out(loss, taken)
        # A module that ran before may rest for a step (layer drop), but not because gradients were off.
        resting = capture.ever_ran - capture.without_grad if taken else set()
        missing = [name for name in self.names if name not in taken and name not in resting]
        capture.ever_ran.update(taken)
        if missing:
            raise RuntimeError(self._why_missing(missing))
        capture.calls = {name: [] for name in self.names}
        capture.waiting = 0
        return taken

    def _refuse_branches_that_ddp_leaves_out(self, loss: Tensor, taken: dict[str, list[Grams]]) -> None:
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

    def _drop(self) -> None:
        """Forget what was captured and not used."""
        for name in self.names:
            if self._capture.calls[name]:
                self._capture.calls[name] = []
        self._capture.mask, self._capture.masked_calls, self._capture.waiting = None, 0, 0
        self._capture.masks.clear()
        self._capture.without_grad.clear()
        self._capture.evaluated.clear()

    @property
    def _release(self) -> Callable[[], None]:
        """Ends the service to an optimizer. Holds no reference to the hook."""
        return self._capture.release

    def _drop_statistics(self) -> None:
        for tap in self._taps.values():
            tap.probe.grad = None

    def _take_statistics(self, device: torch.device) -> Tensor:
        """(layers, 3) sums of <g,d>, |g|², |d|² since the last call, zeros where no backward reached a tap."""
        probes = [self._taps[name].probe for name in self.names]
        rows = [probe.detach() if probe.grad is None else probe.grad for probe in probes]
        for probe in probes:
            probe.grad = None
        return torch.stack([row.to(device, non_blocking=device.type != "cpu") for row in rows])

    def _why_missing(self, missing: list[str]) -> str:
        if self.removed:
            return "the RepresentationHook was removed; make a new hook and optimizer, or step the base optimizer"
        if self._model() is None:
            return "the model of this RepresentationHook no longer exists; make a hook on the model that is trained"
        if self._capture.measurement is not None:
            return "hook.measuring() is open, and captures nothing for the optimizer; train outside its with block"
        name = missing[0]
        more = f" (and {len(missing) - 1} more)" if len(missing) > 1 else ""
        if name in self._capture.ever_ran - self._capture.without_grad - self._capture.evaluated:
            return (
                f'tapped module "{name}"{more} did not run since the last objective(loss); where a forward pass has '
                "several losses, add them and call objective or backward once"
            )
        if name in self._capture.without_grad:
            return f'tapped module "{name}"{more} {WITHOUT_GRAD}'
        if name in self._capture.evaluated:
            return f'tapped module "{name}"{more} ran in evaluation mode; {MEASURE_ONLY}'
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


def _remove(handles: list[RemovableHandle | leave_out]) -> None:
    for handle in handles:
        handle.remove()


def _rebuild(model: nn.Module, names: list[str], output: Any, mask: Any) -> RepresentationHook:
    return RepresentationHook(model, names, output=output, mask=mask)
