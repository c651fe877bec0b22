"""The hooks that sit on a model's modules, and what those of one RepresentationHook share.

They refer to no module, so that they never keep a model alive, and a copy of the model gets inert ones.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from .config import EntropyConfig
from .metrics import Measures
from .outputs import hidden_tensor, padded, replace_tensor
from .tap import PROBE_SIZE, Grams, Tap, TapMode, captured, entropies_of, grams_of, kernel_of

MOST_WAITING = 64
"""Calls of a model that are kept for a loss to come."""

MEASURE_ONLY = "taps run only in training mode with gradients on; use hook.measuring() in evaluation"
WITHOUT_GRAD = (
    "ran with gradients off. Reentrant activation checkpointing does that, and its gradients would be wrong here: use "
    'checkpoint(..., use_reentrant=False), in transformers activation_checkpointing_kwargs={"use_reentrant": False} '
    f"(gradient_checkpointing_kwargs in its older versions). Otherwise, {MEASURE_ONLY}"
)


class Measurement:
    """Entropies read by :meth:`RepresentationHook.measuring`, averaged over the calls of each module."""

    def __init__(self, config: EntropyConfig) -> None:
        self.config = config
        self._sums: dict[str, Tensor] = {}  # (5,): the entropy, then its measures
        self._calls: dict[str, int] = {}

    def add(self, name: str, entropy: Tensor, measures: Tensor) -> None:
        row = torch.cat((entropy.reshape(1), measures.to(entropy.dtype)))
        self._sums[name] = self._sums[name] + row if name in self._sums else row
        self._calls[name] = self._calls.get(name, 0) + 1

    @property
    def entropies(self) -> dict[str, float]:
        """Entropy per layer, in nats (or in [0, 1] with ``normalize``); waits for the device."""
        return {name: float(total[0]) / self._calls[name] for name, total in self._sums.items()}

    @property
    def measures(self) -> dict[str, Measures]:
        """What can hide in the entropy of each layer; waits for the device."""
        return {
            name: Measures(*(value / self._calls[name] for value in total[1:].tolist()))
            for name, total in self._sums.items()
        }

    @property
    def mean(self) -> float:
        """Mean over layers. Raises RuntimeError when nothing ran inside the ``with`` block."""
        entropies = self.entropies
        if not entropies:
            raise RuntimeError("no tapped module ran inside hook.measuring(); run the model in the with block")
        return sum(entropies.values()) / len(entropies)


class Capture:
    """What the taps of one hook share. It refers to no module, so that it never keeps a model alive."""

    def __init__(self, names: list[str], pick_mask: Callable[[dict[str, Any]], Tensor | None] | None) -> None:
        self.calls: dict[str, list[Grams]] = {name: [] for name in names}
        self.mode: TapMode | None = None  # None: no optimizer listens
        self.compressing: set[str] = set()  # layers that take part in compression
        self.measurement: Measurement | None = None
        self.pick_mask = pick_mask
        self.masks: list[Tensor | None] = []  # of the calls under way, the innermost last
        self.mask: Tensor | None = None  # the last one, for recomputation
        self.masked_calls = 0  # calls of the model with a mask, since a backward last recomputed one
        self.recomputed = False
        self.ever_ran: set[str] = set()
        self.checked_branches = False  # for those that DDP leaves out
        self.waiting = 0  # calls of the model whose loss has not come
        self.warned_waiting = False
        self.without_grad: set[str] = set()  # ran in training mode with gradients off
        self.evaluated: set[str] = set()  # ran in evaluation mode

    def wait_for_loss(self) -> None:
        """Count a call of the model, and forget earlier ones where no loss comes of them: they hold graphs."""
        self.waiting += 1
        if self.waiting <= MOST_WAITING:
            return
        self.waiting = 1
        lost = any(unspent(calls) for calls in self.calls.values())  # not where another wrapper trains the model
        for calls in self.calls.values():
            calls.clear()
        if lost and not self.warned_waiting:
            self.warned_waiting = True
            warnings.warn(
                f"{MOST_WAITING} calls of the model in training mode with gradients on, and no optimizer.backward(); "
                "what they captured is forgotten. Evaluate under torch.no_grad() or hook.measuring(); where one loss "
                "is of more calls than that, the entropy is of the last ones: call backward more often",
                UserWarning,
                stacklevel=4,
            )

    def release(self) -> None:
        """No optimizer listens any more: what was captured for it goes."""
        self.mode = None
        for calls in self.calls.values():
            calls.clear()


class ModuleTap:
    """Forward hook of one tapped module."""

    def __init__(
        self, name: str, capture: Capture, output: Callable[[Any], Tensor] | None, device: torch.device
    ) -> None:
        self.name, self.capture, self.output = name, capture, output
        self.probe = _make_probe(device)
        # Autograd puts a Function's name into the message about an in-place operation on its output.
        self.function: Any = type(f"Tap of module '{name}' ", (Tap,), {})

    def __call__(self, module: nn.Module, args: Any, output: Any) -> Any:
        if getattr(module, "_is_replica", False):
            raise RuntimeError("the replicas of nn.DataParallel cannot be watched; use DistributedDataParallel")
        capture = self.capture
        if capture.measurement is not None:
            with torch.no_grad():
                h = self.hidden(output)
                config = capture.measurement.config
                mask: Tensor | None = None
                if h.is_nested:
                    picked = capture.masks[-1] if capture.masks else None
                    h, mask = padded(h, 0 if picked is None else picked.shape[1])
                given = self.mask_for(h, False)
                mask = given if mask is None else mask if given is None else mask & given
                found = entropies_of([grams_of(h, mask, config)], config, with_factors=False)
                capture.measurement.add(self.name, found.values[0], found.measures[0])
            return None
        mode = capture.mode
        if mode is None:
            return None
        if not (module.training and torch.is_grad_enabled()):
            (capture.without_grad if module.training else capture.evaluated).add(self.name)
            return None
        recomputing = _in_backward()
        if recomputing and self.name not in capture.ever_ran and not capture.calls[self.name]:
            raise RuntimeError(f'tapped module "{self.name}" {WITHOUT_GRAD}')
        h = self.hidden(output)
        if h.is_nested:
            raise TypeError(
                f'module "{self.name}" returned a nested tensor, which has no taps in training; tap a module with '
                "padded sequences in its output, and pass mask="
            )
        mask = self.mask_for(h, recomputing)
        if not h.requires_grad:  # everything below is frozen: there is an entropy, and nothing to push
            if not recomputing:
                capture.calls[self.name].append(grams_of(h, mask, mode.entropy))
            return None
        if self.probe.device != h.device:
            self.probe = _make_probe(h.device)
        entropy, kernel = mode.entropy, kernel_of(mode.entropy)
        compress = mode.compress and self.name in capture.compressing
        tapped, gram, carrier, *beside = self.function.apply(
            h,
            self.probe,
            mask,
            entropy.alpha,
            kernel.cosine,
            kernel.center,
            entropy.window,
            compress,
            mode.measure,
            mode.combine,
            mode.max_ratio,
        )
        if not recomputing:
            calls = capture.calls[self.name]
            if calls and not torch.compiler.is_compiling():
                calls[:] = unspent(calls)
            calls.append(captured(h, mask, entropy, gram, carrier, beside))
        return replace_tensor(output, h, tapped, self.name)

    def hidden(self, output: Any) -> Tensor:
        """The hidden tensor in a module's output, checked."""
        h = hidden_tensor(output) if self.output is None else self.output(output)
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
        mask = capture.masks[-1] if capture.masks else capture.mask if recomputing else None
        if mask is None or h.ndim != 3:
            return None
        if recomputing and not capture.masks and capture.masked_calls > 1:
            raise RuntimeError(
                f'module "{self.name}" is recomputed by activation checkpointing after several masked forward passes, '
                "and which mask belongs to it is unknown; call backward after each forward pass"
            )
        if recomputing:
            capture.recomputed = True
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


class ModelCall:
    """Forward pre-hook of the model, or of a module around the taps that takes an attention_mask: keeps the mask."""

    def __init__(self, capture: Capture, parameters: list[str], *, is_model: bool) -> None:
        self.capture, self.parameters, self.is_model = capture, parameters, is_model
        self.kept: list[bool] = []  # of the calls under way: it brought a mask, or is the model's own

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        capture = self.capture
        self.kept.append(False)
        listening = capture.mode is not None and torch.is_grad_enabled()
        # Where nothing is captured, a backward to come may need the mask of the call before.
        mask = self.token_mask(args, kwargs) if listening or capture.measurement is not None else None
        if mask is None and not self.is_model:
            return  # that of the call around it holds
        masked_already = any(outer is not None for outer in capture.masks)
        capture.masks.append(mask)
        self.kept[-1] = True
        if listening and capture.measurement is None:
            capture.mask = mask
            if self.is_model and not torch.compiler.is_compiling():
                capture.wait_for_loss()
            if mask is not None and not masked_already and not torch.compiler.is_compiling():
                capture.masked_calls = 1 if capture.recomputed else capture.masked_calls + 1
                capture.recomputed = False

    def token_mask(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
        keywords = dict(zip(self.parameters, args, strict=False)) | kwargs
        if self.capture.pick_mask is None:
            mask = keywords.get("attention_mask")
            return mask if isinstance(mask, Tensor) and mask.ndim == 2 else None
        mask = self.capture.pick_mask(keywords)
        if not isinstance(mask, Tensor | None):
            raise TypeError(f"mask= must give a tensor (batch, seq) or None, found {type(mask).__name__}")
        return mask

    def __reduce__(self) -> tuple[Any, ...]:
        return _Inert, ()


class ModelReturn:
    """Forward hook to a :class:`ModelCall`: a module called by itself afterwards has no mask."""

    def __init__(self, call: ModelCall) -> None:
        self.call = call

    def __call__(self, module: nn.Module, args: Any, output: Any) -> None:
        masks = self.call.capture.masks
        if self.call.kept and self.call.kept.pop() and masks:
            masks.pop()

    def __reduce__(self) -> tuple[Any, ...]:
        return _Inert, ()


class _Inert:
    """What a copied or unpickled model has in place of a tap."""

    def __call__(self, *args: Any, **kwargs: Any) -> None:
        return None


def _in_backward() -> bool:
    """A module that runs within a backward is being recomputed by activation checkpointing."""
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1


def nodes_behind(loss: Tensor) -> set[Any]:
    """Every node of the graph that ``loss`` was computed by."""
    found: set[Any] = set()
    waiting = [loss.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is not None and node not in found:
            found.add(node)
            waiting.extend(following for following, _ in node.next_functions)
    return found


def nodes_averaged_by_ddp(loss: Tensor) -> set[Any] | None:
    """Nodes behind ``loss`` whose parameters DistributedDataParallel knows to be in use.

    None where it does not look: without find_unused_parameters and after the first step with static_graph. The first
    takes for used what the model returns, the second only what gets a gradient in that step.
    """
    sinks = [node for node in nodes_behind(loss) if node.name() == "_DDPSinkBackward"]
    if not sinks:
        return None
    if not any(sink.ddp_weakref().static_graph for sink in sinks):
        return nodes_behind(loss)
    found: set[Any] = set()
    waiting: list[tuple[Any, int]] = [(loss.grad_fn, loss.output_nr)]
    while waiting:
        node, output = waiting.pop()
        if node in sinks:  # passes all that the model returns, each by itself
            needed = [i for i, needs in enumerate(node.needs_input_grad[1:]) if needs]
            edges = [edge for edge in node.next_functions if edge[0] is not None]
            waiting.append(edges[needed.index(output)])
        elif node is not None and node not in found:
            found.add(node)
            waiting.extend(node.next_functions)
    return found


def belongs_to(call: Grams, nodes: set[Any]) -> bool:
    """The call is one of ``nodes``; above frozen layers it has no graph, and counts."""
    return call.carrier is None or call.carrier.grad_fn in nodes


def unspent(calls: list[Grams]) -> list[Grams]:
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


def argument_names(model: nn.Module) -> list[str]:
    """Names of the arguments of the model's call, which DDP and torch.compile hide behind *args."""
    parameters = inspect.signature(model.forward).parameters
    inner = getattr(model, "_orig_mod", getattr(model, "module", None))
    if isinstance(inner, nn.Module) and all(p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD) for p in parameters.values()):
        return argument_names(inner)
    return list(parameters)


def masked_modules(model: nn.Module, names: Iterable[str]) -> list[nn.Module]:
    """The model, and the modules around or at the named ones whose call takes an attention_mask."""
    around = {".".join(parts[:i]) for parts in (name.split(".") for name in names) for i in range(1, len(parts) + 1)}
    modules = [module for name, module in model.named_modules() if name in around and module is not model]
    return [model, *(module for module in modules if "attention_mask" in argument_names(module))]
