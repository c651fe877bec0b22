"""What a watched module's output means: its hidden tensor, the axes of it, the rows that count, and the documents."""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn
from torch.overrides import _get_current_function_mode

from .._tell import tell
from .axes import Kind, View, check_features, decided, described, given, kind_of, parsed, turns
from .following import Following, Trace, compiled_within
from .operations import BATCH, FEATURES, FLATTENED, LENGTH, Axes
from .outputs import Reading, checked_hidden, hidden_tensor, padded
from .selection import by_layer
from .tokens import (
    Call,
    Caller,
    Choice,
    axes_of,
    by_shape,
    callers_of,
    documents,
    fits,
    followed,
    has_ones,
    is_on_stack,
    live_rows,
    may_be_lengths,
    may_mask,
    may_turn,
    turn_arguments,
)

Pick: TypeAlias = Callable[[dict[str, Any]], Tensor | None]
"""From the arguments of the model's call, by name, to (batch, length), or None."""

_MOST_LOOKS = 32
"""Forward passes under :class:`Following`, of one model: one for each kind of call that it gets."""

_TURN = 'layout="length batch features" if the model is called with the sequence first'
"""What is a guess in a first forward pass: a layer runs before the module that says it."""


class Watched(NamedTuple):
    """What is known of a watched module before it runs."""

    kind: Kind
    layout: str | None
    mask: Pick | None
    segments: Pick | None


class Decision(NamedTuple):
    """What was found out about the outputs of one layer in calls of one kind."""

    axes: Axes
    why_axes: str
    guess: str | None
    mask: Choice | str | None
    """Which one, or what to tell of one that does not fit."""


class Calls(Caller):
    """What the hooks on a caller call: ``enter`` before its forward, ``leave`` after it, also where it raised."""

    def __init__(self, layout: Layout, name: str, module: nn.Module) -> None:
        super().__init__(name, module)
        self._layout = layout

    def enter(self, args: tuple[Any, ...], kwargs: dict[str, Any], reads: Callable[[], bool]) -> None:
        """A call begins; ``reads`` tells whether watched modules are read in it."""
        self._layout.enter(self, args, kwargs, reads)

    def leave(self) -> None:
        """The innermost call ended, or raised."""
        self._layout.leave(self)


class Layout:
    """Reads the outputs of the watched modules of a model.

    Place :meth:`Calls.enter` of each of :meth:`callers` as a forward pre-hook (with keyword arguments,
    before others) and ``leave`` as a forward hook that is always called; then :meth:`read` in the watched modules'.

    Args:
        model: the model that is called, held weakly.
        modules: the watched modules by name.
        output: picks the hidden tensor from an output.
        mask: from the arguments of the model's call, by name, to a mask (batch, length), true or 1 where a row
            counts, false or 0 elsewhere, or None; or a mapping from globs of layers to such functions. By default,
            masks are found.
        layout: what the axes are, as ``"batch height width channels"``; or a mapping from globs to such strings.
        segments: as ``mask``, to the numbers of documents (batch, length).

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: a glob matches none of the modules, or a layout names no batch or no features.
    """

    def __init__(
        self,
        model: nn.Module,
        modules: Mapping[str, nn.Module],
        *,
        output: Callable[[Any], Tensor] | None = None,
        mask: Pick | Mapping[str, Pick] | None = None,
        layout: str | Mapping[str, str] | None = None,
        segments: Pick | Mapping[str, Pick] | None = None,
    ) -> None:
        _check_function("output", output)
        self._model = weakref.ref(model)
        self._output = output
        self._picks_masks = mask is not None
        masks = by_layer("mask", mask, modules)
        layouts = by_layer("layout", layout, modules)
        segment_picks = by_layer("segments", segments, modules)
        for value, argument in ((mask, "mask"), (segments, "segments")):
            if not isinstance(value, Mapping):
                _check_function(argument, value)
                continue
            for glob, pick in value.items():
                _check_function(f"{argument}[{glob!r}]", pick)
        for text in layouts.values():
            parsed(text)
        self._callers = [
            (weakref.ref(module), Calls(self, name, module)) for name, module in callers_of(model, modules)
        ]
        """From the outermost to the innermost."""
        self._watched = {
            name: Watched(kind_of(model, name, module), layouts.get(name), masks.get(name), segment_picks.get(name))
            for name, module in modules.items()
        }
        self._batch_second = any(
            isinstance(module, (nn.RNNBase, nn.MultiheadAttention)) and not module.batch_first
            for module in model.modules()
        )
        self.calls: list[Call] = []
        """Under way, the innermost last."""
        self._following: Following | None = None
        self._decisions: dict[Any, Decision] = {}
        self._plain: dict[Any, tuple[View, tuple[str, str, str, str | None]]] = {}
        """How outputs are read of which every row counts, whatever their sizes are."""
        self._repeated: set[str] = set()
        """Layers that ran more than once in a pass."""
        self._situations: set[Any] = set()
        self._looks = 0
        self.corrections = 0
        """Times that a pass showed, at its end, that its arguments are laid out otherwise than assumed."""
        self._before: dict[Any, Decision] = {}
        """Those of a pass that showed at its end that they may be wrong."""
        self._told: set[str] = set()
        self._checked: set[int] = set()
        """Functions of ``mask=`` whose values are known to be 0 and 1."""

    def callers(self) -> list[tuple[nn.Module, Calls]]:
        """The model and the modules around watched ones whose calls bring tokens, each with what its hooks call."""
        return [(module, calls) for ref, calls in self._callers if (module := ref()) is not None]

    # Calls

    def enter(self, caller: Caller, args: tuple[Any, ...], kwargs: dict[str, Any], reads: Callable[[], bool]) -> None:
        compiling = torch.compiler.is_compiling()
        if not compiling:
            while self.calls and not is_on_stack(self.calls[-1].frame):  # it ended by an interrupt, which runs no hook
                self.calls.pop()
            if not self.calls and self._following is not None:
                self._stop(self._following)
        call = Call(caller, args, kwargs, self.calls[-1] if self.calls else None)
        self.calls.append(call)
        if compiling:
            return
        call.frame = sys._getframe(3)  # the module's call, around the hook that enters
        if len(self.calls) == 1 and self._is_new(call, reads):
            self._following = Following(call.situation)
            self._following.__enter__()  # type: ignore[no-untyped-call]
        if self._following is not None:
            for name, tensor in call.tensors.items():
                axes, known = axes_of(call, name)
                self._following.begin(tensor, (call, name), axes, known=known)

    def leave(self, caller: Caller) -> None:
        if self.calls and self.calls[-1].caller is caller:
            self.calls.pop().frame = None
            if self._following is not None and not self.calls and not torch.compiler.is_compiling():
                self._stop(self._following)

    def _is_new(self, call: Call, reads: Callable[[], bool]) -> bool:
        """No pass of this kind was looked at yet."""
        if call.situation in self._situations or self._looks >= _MOST_LOOKS or not reads():
            return False
        model = self._model()
        return model is not None and not compiled_within(model)

    def _stop(self, following: Following) -> None:
        """A pass ended: what it showed counts from now on."""
        self._following = None
        if _get_current_function_mode() is following:  # type: ignore[no-untyped-call]
            following.__exit__(None, None, None)
        if following.read:  # else, the next pass is looked at
            self._situations.add(following.situation)
            self._looks += 1
        if following.changed:
            name, axes = next(iter(following.changed.items()))
            self.tell_once(
                f"the first forward pass of {', '.join(following.changed)} was read otherwise than this one: a module "
                "in it showed that the model is called with the sequence or the channels first. To say it from the "
                f'start, pass layout={{"{name}": "{axes}"}}'
            )
        if turn_arguments(following):
            self.corrections += 1
            self._before = dict(self._decisions)
            for known in (self._decisions, self._plain, self._situations):  # read them anew
                known.clear()
        elif following.batch_first:
            self._decisions = {
                key: each._replace(guess=None) if each.guess == _TURN else each for key, each in self._decisions.items()
            }

    # Outputs

    def read(self, name: str, output: Any, whole: Tensor | None = None) -> Reading:
        """What ``output``, of the watched module ``name``, means.

        Where this rank has a part of the hidden tensor only, ``whole`` has the shape of all of it.

        Raises:
            TypeError: it holds no hidden tensor of floating point.
            ValueError: its axes are ambiguous, or it does not have those of ``layout=``, or the shape of a mask or of
                segments that was given, or a mask has other values than 0 and 1.
        """
        own = h = checked_hidden(name, output, self._output)
        if whole is not None:
            h = whole
        kind = (name, h.ndim, self.calls[-1].situation if self.calls else ())
        keeps = whole is None and self._following is None and not torch.compiler.is_compiling() and not h.is_nested
        if keeps and kind in self._plain:
            view, why = self._plain[kind]
            return Reading(h, view(h), None, None, *why, view)
        watched = self._watched[name]
        if self._output is not None and own is not hidden_tensor(output):
            # The module's flags are not about this tensor.
            watched = watched._replace(kind=watched.kind._replace(sequence_first=False))
        if h.is_nested:
            return self._read_nested(name, h, watched)
        decision = self._decision(name, kind, h, watched, own)
        check_features(name, h, watched.kind, decision.axes)
        view = self._view(decision.axes, h)
        if view.axes != decision.axes:  # not as many rows as tokens this time
            decision = decision._replace(axes=view.axes, mask=None)
        rows = view(h)
        live, why_rows, guess = self._live(name, watched, rows, h, decision)
        if live is not None and live.shape != rows.shape[:2]:
            # flat rows, which do not cross sequences
            view = View(view.axes, view.flat, (live.shape[0], live.shape[1]))
            rows = view(h)
        segments, why_segments = self._segments(name, watched, rows, live)
        why_rows += f"; documents by {why_segments}" if why_segments else ""
        why = described(decision.axes), decision.why_axes, why_rows, guess
        if keeps and live is None and segments is None and self._is_plain(name, watched, view):
            self._plain[kind] = view, why
        return Reading(h, rows, live, segments, *why, view)

    def _view(self, axes: Axes, h: Tensor) -> View:
        """Flat rows are those of the tokens of a call, or else samples."""
        if axes[0] not in FLATTENED:
            return View(axes)
        sizes = next((sizes for sizes in self._sizes() if sizes[0] * sizes[1] == len(h)), None)
        return View((BATCH, FEATURES)) if sizes is None else View(axes, sizes)

    def _is_plain(self, name: str, watched: Watched, view: View) -> bool:
        """Outputs of this kind are always read so: nothing in the calls under way could mask them or cut them."""
        if self._picks_masks or watched.segments is not None or name in self._repeated or view.flat is not None:
            return False
        return not any(call.masks or call.knows_documents or any(map(may_mask, call.tensors)) for call in self.calls)

    def hidden(self, name: str, output: Any) -> Tensor:
        """The hidden tensor in an output of the watched module ``name``."""
        return checked_hidden(name, output, self._output)

    def _decision(self, name: str, kind: Any, h: Tensor, watched: Watched, own: Tensor) -> Decision:
        """What is known of outputs of this kind; found out once where the pass is followed."""
        turn = 0
        if self.calls and not torch.compiler.is_compiling():
            turn = self.calls[0].runs.get(name, 0)
            self.calls[0].runs[name] = turn + 1
            if turn:
                self._repeated.add(name)
        key = (kind, turn)
        if self._following is None:
            known = self._decisions.get(key, self._decisions.get((kind, 0)))
            return self._decided(name, h, watched, None) if known is None else known
        self._following.read = True
        decision = self._decided(name, h, watched, self._following.of(own))
        before = self._before.pop(key, None)
        if before is not None and turns(before.axes, decision.axes):
            self._following.changed[name] = described(decision.axes)
        self._decisions[key] = decision
        return decision

    def _decided(self, name: str, h: Tensor, watched: Watched, trace: Trace | None) -> Decision:
        if watched.layout is not None:
            axes, why, guess = given(name, watched.layout, h), "layout=", None
        else:
            axes, why, guess = decided(name, h, watched.kind, None if trace is None else trace.axes, self._sizes())
            if trace is not None and self._is_assumed(axes, trace):
                why, guess = "assumed, with the batch first", guess or _TURN
        if self._picks_masks or FEATURES not in axes:
            return Decision(axes, why, guess, None)
        batch, length = self._view(axes, h)(h).shape[:2]
        if trace is not None and trace.spans:
            return Decision(axes, why, guess, followed(self.calls, trace, (batch, length), flat=h.ndim == 2))
        mask, guessed = by_shape(self.calls, name, (batch, length))
        if self._following is not None:
            guessed = "its rows could not be followed from the arguments of the call"
            if h.ndim == 2 or not isinstance(mask, Choice):
                mask = guessed = None
        return Decision(axes, why, guess or guessed, mask)

    def _is_assumed(self, axes: Axes, trace: Trace) -> bool:
        """Nothing but habit says so far that the batch of a layer comes first."""
        if self._following is None or not self._batch_second or axes[:2] != (BATCH, LENGTH):
            return False
        known = self._following.batch_first | self._following.sequence_first
        return any(source not in known and may_turn(source) for source in trace.spans)

    def _sizes(self) -> list[tuple[int, int]]:
        """(batch, length) of the tokens that the calls under way were given, the innermost first."""
        found = []
        for call in reversed(self.calls):
            for name in call.tensors:
                axes, _ = axes_of(call, name)
                if axes[:2] == (BATCH, LENGTH):
                    found.append((call.tensors[name].shape[0], call.tensors[name].shape[1]))
        return found

    # Rows

    def _live(
        self, name: str, watched: Watched, rows: Tensor, h: Tensor, decision: Decision
    ) -> tuple[Tensor | None, str, str | None]:
        """(batch, length) of the rows that count, why, and what of it is a guess."""
        if self._picks_masks:
            return self._picked(name, "mask", watched.mask, rows, h), "mask=", decision.guess
        sizes = rows.shape[0], rows.shape[1]
        mask, guess = decision.mask, decision.guess
        if isinstance(mask, Choice) and not fits(self.calls[mask.call], mask, sizes):
            mask = self.calls[mask.call].with_shape(mask.name)
        if guess is not None and not guess.startswith("layout="):
            self.tell_once(f'which rows of layer "{name}" count is a guess: {guess}; pass mask=')
        if not isinstance(mask, Choice):
            pooled = h.ndim == 2 and decision.axes[0] == BATCH  # one vector for each sequence has no tokens left
            if mask is not None and not pooled:
                self._tell_misfit(name, mask, sizes)
            elif not any(call.masks for call in self.calls):
                self._tell_bypassed(name)
                self._tell_unknown(name, sizes)
            return None, "no mask of its tokens" if mask is None else f"{mask} does not fit", guess
        live = live_rows(self.calls[mask.call], mask, sizes[1]).to(rows.device)
        return live if live.shape[0] == sizes[0] else live.expand(sizes[0], -1), mask.why, guess

    def _picked(self, name: str, argument: str, pick: Pick | None, rows: Tensor, h: Tensor) -> Tensor | None:
        """What ``mask=`` or ``segments=`` gives for these rows."""
        call = next((call for call in reversed(self.calls) if call.caller.is_model), None)
        if pick is None or call is None:
            return None
        if torch.compiler.is_compiling():
            found = pick(call.arguments)
        else:  # once for all layers
            if (argument, id(pick)) not in call.picked:
                call.picked[argument, id(pick)] = pick(call.arguments)
            found = call.picked[argument, id(pick)]
        if found is None:
            return None
        if not isinstance(found, Tensor):
            raise TypeError(f"{argument}= must give a tensor (batch, seq) or None, found {type(found).__name__}")
        if argument == "mask":
            found = self._as_bools(name, pick, found)
        found = found.to(device=rows.device)
        about_tokens = found.ndim <= 2
        if not about_tokens:
            found = found.flatten(1)
        shape = tuple(rows.shape[:2])
        if h.ndim == 2 and found.shape == (shape[0] * shape[1],):  # a value for each sample
            return found.reshape(shape)
        if found.shape == shape or (h.ndim == found.ndim == 2 and found.numel() == len(h)):
            return found
        if h.ndim == 2 and len(found) == len(h):
            return None  # a vector for each sequence, which has no tokens left
        if h.ndim > 3 and about_tokens:
            return None  # the positions of an image, beside tokens
        raise ValueError(
            f'{argument}= gave shape {tuple(found.shape)}, but the output of module "{name}" has '
            + (f"(batch, seq) = {shape}" if h.ndim > 2 else f"{len(h)} rows")
            + "; return a tensor of that shape, or None"
        )

    def _as_bools(self, name: str, pick: Pick, mask: Tensor) -> Tensor:
        """``mask`` as bools. Its values wait for the device: they are looked at until a batch shows what they are."""
        known = mask.dtype == torch.bool or id(pick) in self._checked or torch.compiler.is_compiling()
        if not known and has_ones(name, mask):
            self._checked.add(id(pick))
        return mask.to(torch.bool)

    def _segments(self, name: str, watched: Watched, rows: Tensor, live: Tensor | None) -> tuple[Tensor | None, str]:
        if watched.segments is not None:
            found = self._picked(name, "segments", watched.segments, rows, rows)
            return found, "segments="
        return documents(self.calls, rows, live)

    def _read_nested(self, name: str, h: Tensor, watched: Watched) -> Reading:
        """In evaluation, ``nn.TransformerEncoder`` packs masked sequences into a nested tensor."""
        if torch.is_grad_enabled() and h.requires_grad:
            raise TypeError(
                f'module "{name}" returned a nested tensor, which cannot be watched in training; watch a module with '
                "padded sequences in its output, and pass mask="
            )
        length = max((size[1] for size in self._sizes()), default=0)
        rows, live = padded(h, length)
        why = "a nested tensor", "its own lengths"
        picked = self._picked(name, "mask", watched.mask, rows, rows)
        live = live if picked is None else live & picked
        return Reading(h, rows, live, None, "batch length features", *why, None, lambda _: rows)

    # Telling

    def _tell_misfit(self, name: str, problem: str, rows: tuple[int, int]) -> None:
        argument = problem.split(" ")[0]
        self.tell_once(
            f'{problem} does not fit layer "{name}", whose output has (batch, length) = {rows}: all of its rows count. '
            f"Pass mask= with a function of the call's arguments that gives such a mask, as "
            f'mask={{"{name}": lambda call: shortened(call["{argument}"])}}',
            subject=f"{argument} does not fit {name}",  # once, whatever the sizes of later batches
        )

    def _tell_bypassed(self, name: str) -> None:
        """A module around the layer takes a mask, but did not run as a module: its forward was called."""
        if not self.calls or torch.compiler.is_compiling():
            return
        around = [calls for _, calls in self._callers if f"{name}.".startswith(f"{calls.name}.") or calls.is_model]
        innermost = around[-1]
        if innermost.masks and all(call.caller is not innermost for call in self.calls):
            self.tell_once(
                f'module "{innermost.name}" takes {innermost.masks[0]}, but its forward was called past '
                f'its hooks, so that the mask of layer "{name}" is not known; call the module itself, or pass mask='
            )

    def _tell_unknown(self, name: str, rows: tuple[int, int]) -> None:
        """A call was given what may be a mask of these rows, or how many there are of each sequence."""
        for call in self.calls:
            for argument, value in call.tensors.items():
                if self._following is not None and may_be_lengths(argument, value, rows):
                    tokens = (f'call["{k}"].shape[1]' for k, v in call.tensors.items() if v.shape[:2] == rows)
                    self.tell_once(
                        f'argument "{argument}" of shape {tuple(value.shape)} may say how many rows of each sequence '
                        f'count in layer "{name}": all {rows[1]} do until mask= says otherwise, as mask=lambda call: '
                        f'torch.arange({next(tokens, rows[1])}, device=call["{argument}"].device) < '
                        f'call["{argument}"][:, None], or lambda call: None',
                        subject=f"argument {argument}",
                    )
                if may_mask(argument) and value.shape == rows and not value.is_floating_point():
                    self.tell_once(
                        f'argument "{argument}" of shape {tuple(value.shape)} may mask the rows of layer "{name}", but '
                        "which of its values do is not known: all rows count. Pass mask=lambda call: "
                        f'call.get("{argument}") if it is true where a token counts, or lambda call: None',
                        subject=f"argument {argument}",
                    )

    def tell_once(self, message: str, subject: str | None = None) -> None:
        if torch.compiler.is_compiling() or (subject or message) in self._told:
            return
        self._told.add(subject or message)
        tell(message)


def _check_function(argument: str, value: Any) -> None:
    if value is not None and not callable(value):
        raise TypeError(f"{argument} must be a function or None, found {type(value).__name__}")
