"""Which rows count: the calls under way, the masks that they were given, and the tokens that these are of."""

from __future__ import annotations

import dataclasses
import inspect
import sys
from collections.abc import Iterable, Mapping
from types import FrameType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .following import POOLED, Following, Source, Span, Trace
from .operations import BATCH, FEATURES, LENGTH, Axes

_MASKS = ("attention_mask", "key_padding_mask", "padding_mask", "input_mask")
"""How arguments that mask tokens are called, or end."""
_NOT_OF_TOKENS = ("global_attention_mask", "image_attention_mask", "cross_attention_mask")
_OF_SOMETHING_ELSE = (
    "head_mask",
    "tokens_mask",
    "token_mask",
    "loss_mask",
    "labels_mask",
    "global_attention_mask",
    "lm_mask",
)
_NOT_TEXT = ("vision", "visual", "image", "img", "pixel", "patch", "audio", "video", "speech")
TRANSFORMERS = (
    nn.Transformer,
    nn.TransformerEncoder,
    nn.TransformerDecoder,
    nn.TransformerEncoderLayer,
    nn.TransformerDecoderLayer,
)
_ENDS_OF_DOCUMENTS = ("cu_seqlens", "cu_seq_lens", "cu_seqlens_q", "cu_seq_lens_q")
_DOCUMENTS = ("seq_idx", "document_ids", "sequence_ids")
SEQUENCE_FIRST = (LENGTH, BATCH, FEATURES)
CHANNELS_FIRST = (BATCH, FEATURES, LENGTH)
IGNORED = -100
"""The label of what no loss is taken of: in encoder-decoders, padding."""


class Caller:
    """A module whose calls bring tokens and masks: the model, or one around a watched module."""

    def __init__(self, name: str, module: nn.Module) -> None:
        self.name = name
        self.is_model = not name
        self.kind = type(module).__name__
        self.parameters = argument_names(module)
        self.sequence_first = sequence_first(module)
        self.shown: dict[str, Axes] = {}
        """The axes of arguments that a forward pass showed to be others than assumed."""
        self.masks = [name for name in self.parameters if is_mask(name)]
        self.decodes = "decoder_input_ids" in self.parameters


class Call:
    """One call of it, with its arguments by name; those inside a mapping or dataclass under their own names."""

    def __init__(self, caller: Caller, args: tuple[Any, ...], kwargs: dict[str, Any], around: Call | None) -> None:
        self.caller = caller
        names = list(caller.parameters)
        names += [f"argument {i}" for i in range(len(names), len(args))]
        given = {**dict(zip(names, args)), **kwargs}  # noqa: B905 - Dynamo of torch 2.6
        self.arguments: dict[str, Any] = {**{name: given[name] for name in names if name in given}, **given}
        self.tensors = tensors_of(self.arguments, within=caller.is_model)
        self.masks = [name for name in self.tensors if is_mask(name) and self.tensors[name].ndim in (2, 3, 4)]
        own = (caller.name, *[(name, value.ndim) for name, value in self.tensors.items()])
        self.situation: tuple[Any, ...] = (own,) if around is None else (*around.situation, own)
        """What kind of call it is, behind what kinds of calls it is in."""
        ids = any(name.endswith(("input_ids", "inputs_embeds")) for name in self.tensors)
        self.counts_tokens = "position_ids" in self.tensors and (caller.is_model or ids)
        """It was given the positions of the tokens of a whole model, not of a layer in it."""
        named = any(name in self.tensors for name in (*_DOCUMENTS, *_ENDS_OF_DOCUMENTS))
        self.knows_documents = self.counts_tokens or named
        self.documents: tuple[Tensor | None, Tensor] | None = None
        """The mask, and the documents of the rows that count by it."""
        self.live: dict[str, Tensor] = {}
        """Where tokens count, by each mask that was read."""
        self.picked: dict[tuple[str, int], Any] = {}
        """What functions of ``mask=`` and ``segments=`` gave."""
        self.runs: dict[str, int] = {}
        """How often each layer ran."""
        self.frame: FrameType | None = None
        """Of the module's call; a frame that is no longer on the stack ended."""

    @property
    def reads_memory(self) -> bool:
        """It is of a decoder in a model, and was given what the encoder made."""
        parameters, given = self.caller.parameters, self.tensors
        decodes = "encoder_hidden_states" in parameters or "tgt_key_padding_mask" in parameters
        return decodes and not self.caller.is_model and ("encoder_hidden_states" in given or "memory" in given)

    def with_shape(self, name: str) -> str:
        """The argument ``name``, as errors and warnings call it."""
        return f"{name} of shape {tuple(self.tensors[name].shape)}"

    def sizes(self, mask: str) -> tuple[int, int]:
        """(batch, length) of the tokens that the argument ``mask`` is of."""
        shape = self.tensors[mask].shape
        return shape[0], shape[-1]

    def tokens(self, mask: str) -> list[str]:
        """The arguments that have the tokens of the argument ``mask``, by names and shapes; the first ones count."""
        batch, length = self.sizes(mask)
        fitting = [
            name
            for name in of_prefix(prefix_of(mask), self.tensors, self.caller.parameters)
            if fits_tokens(self.tensors[name], batch, length)
        ]
        if mask == "key_padding_mask" and "key" in fitting:
            return ["key"]
        exact = [name for name in fitting if {*self.tensors[name].shape[:2]} == {batch, length}]
        fitting = exact or fitting  # before an image of as many pixels
        ids = [name for name in fitting if not self.tensors[name].is_floating_point()]
        embedded = [name for name in fitting if name.endswith(("embeds", "hidden_states"))]
        return list(dict.fromkeys([*fitting[:1], *ids, *embedded]))

    def others(self, mask: str) -> list[str]:
        """Arguments of floating point that are not tokens of ``mask``."""
        tokens = self.tokens(mask)
        return [
            name
            for name, value in self.tensors.items()
            if value.is_floating_point() and value.ndim > 2 and name not in tokens and not is_mask(name)
        ]


class Choice(NamedTuple):
    """Which mask a layer's rows have: an argument of one of the calls under way, and the row of its first token."""

    call: int
    name: str
    start: int
    why: str


# Arguments


def argument_names(module: nn.Module) -> list[str]:
    """Names of the arguments of a module's call, which DDP and torch.compile hide behind *args."""
    parameters = inspect.signature(module.forward).parameters
    inner = getattr(module, "_orig_mod", getattr(module, "module", None))
    if isinstance(inner, nn.Module) and all(p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD) for p in parameters.values()):
        return argument_names(inner)
    return [name for name, p in parameters.items() if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]


def tensors_of(arguments: Mapping[str, Any], *, within: bool) -> dict[str, Tensor]:
    """The tensors among the arguments by name, and those ``within`` mappings, sequences and dataclasses among them."""
    found: dict[str, Tensor] = {}
    for name, value in arguments.items():
        if isinstance(value, Tensor):
            if not value.is_nested:  # which has no shape
                found[name] = value
        elif within and not isinstance(value, (str, int, float, bool, type(None))):
            for key, item in _items(name, value):
                if isinstance(item, Tensor):
                    found.setdefault(key, item)
    return found


def _items(name: str, value: Any) -> list[tuple[str, Any]]:
    if isinstance(value, Mapping):
        return [(str(key), value[key]) for key in value]
    if isinstance(value, (tuple, list)):
        return [(f"{name}[{i}]", item) for i, item in enumerate(value)]
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return [(field.name, getattr(value, field.name)) for field in dataclasses.fields(value)]
    return []


def is_mask(name: str) -> bool:
    return name.endswith(_MASKS) and name not in _NOT_OF_TOKENS


def may_mask(name: str) -> bool:
    """An argument whose name says that it is a mask, of one kind or another."""
    return name == "mask" or (name.endswith("_mask") and not name.endswith(_OF_SOMETHING_ELSE) and not is_mask(name))


def may_be_lengths(name: str, value: Tensor, rows: tuple[int, int]) -> bool:
    """The name says lengths of sequences, and they may be of ``rows`` (batch, length); waits for the device."""
    if not (name.endswith(("lengths", "_lens", "_len")) or name == "lens"):
        return False
    counts = value.shape == rows[:1] and not value.is_floating_point() and value.dtype != torch.bool
    return bool(counts and rows[1] > 1 and value.numel() and int(value.max()) <= rows[1])


def prefix_of(mask: str) -> str:
    """``"decoder_"`` of ``decoder_attention_mask``."""
    return mask[: -len(next(end for end in _MASKS if mask.endswith(end)))]


def of_prefix(prefix: str, tensors: Mapping[str, Tensor], parameters: Iterable[str]) -> list[str]:
    """The arguments that go with a mask of this prefix."""
    names = [name for name in tensors if not is_mask(name) and name != "labels"]
    if prefix:
        own = [name for name in names if name.startswith(prefix) or name == prefix[:-1]]
        if own:
            return own
    prefixes = {prefix_of(name) for name in parameters if is_mask(name)} | {"encoder_", "decoder_", "memory_"}
    return [name for name in names if not any(p and (name.startswith(p) or name == p[:-1]) for p in prefixes)]


def fits_tokens(tensor: Tensor, batch: int, length: int) -> bool:
    """``tensor`` has as many tokens as a mask (batch, length), or fewer where those before them are cached."""
    if tensor.ndim < 2 or tensor.dtype == torch.bool:
        return False
    if tensor.shape[0] != batch:
        floats = tensor.ndim == 2 and tensor.is_floating_point()
        return bool(tensor.ndim < 4 and not floats and tensor.shape[1] == batch and tensor.shape[0] == length)
    return length in tensor.shape[1:] or (not tensor.is_floating_point() and tensor.shape[1] < length)


def axes_of(call: Call, name: str) -> tuple[Axes, bool]:
    """The axes of an argument before anything is computed from it, and whether more than habit says so."""
    tensor = call.tensors[name]
    n = tensor.ndim
    unknown = (None,) * n
    if n not in (2, 3) or (n == 2 and tensor.is_floating_point()):
        return unknown, False
    shown = call.caller.shown.get(name)
    if shown == CHANNELS_FIRST and n == 3:
        return CHANNELS_FIRST, True
    if call.caller.sequence_first or shown == SEQUENCE_FIRST:
        return SEQUENCE_FIRST[:n], True
    shapes = [call.sizes(mask) for mask in call.masks if name in call.tokens(mask)]
    for batch, length in shapes:
        if batch != length and (length, batch) == tuple(tensor.shape[:2]):
            return SEQUENCE_FIRST[:n], True
        if (batch, length) == tuple(tensor.shape[:2]):
            return (BATCH, LENGTH, FEATURES)[:n], batch != length
    if shapes and n == 3:
        return unknown, False  # (batch, channels, length), as of audio
    return (BATCH, LENGTH, *unknown[2:]), False


def may_turn(source: Source) -> bool:
    """That an argument has the batch first is only assumed: neither its module nor the sizes of a mask say so."""
    return not axes_of(*source)[1]


def turn_arguments(following: Following) -> bool:
    """From now on, read the arguments as the modules took them that were followed; whether that is news."""
    channels_first = following.channels_first - following.batch_first - following.features_last
    turned = [source for source in following.sequence_first | channels_first if may_turn(source)]
    for call, name in turned:
        call.caller.shown[name] = CHANNELS_FIRST if (call, name) in channels_first else SEQUENCE_FIRST
    return bool(turned)


# Which mask


def followed(calls: list[Call], trace: Trace, rows: tuple[int, int], *, flat: bool) -> Choice | str | None:
    """The mask of rows that were followed, from the innermost call on; or what to tell of the one that does not fit.

    Rows in another order have none where they are ``flat``, as those that were sent to an expert. In the shape of the
    tokens they were put back.
    """
    problem = None
    masks = [(position, name) for position in reversed(range(len(calls))) for name in calls[position].masks]
    masks.sort(key=lambda mask: calls[mask[0]].tensors[mask[1]].ndim > 2)  # those of (batch, length) first
    for position, name in masks:
        call = calls[position]
        spans = [trace.spans[call, token] for token in call.tokens(name) if (call, token) in trace.spans]
        spans = [span for span in spans if span != POOLED]
        if not spans:
            continue
        span = next((span for span in spans if span is not None), None)
        if span is None and not flat:
            span = Span(0, call.sizes(name)[1])
        if span is not None and fits_span(call.sizes(name), span, rows):
            return Choice(position, name, span.start, f"{name} of {call.caller.kind}")
        problem = problem or call.with_shape(name)
    return _labels(calls, trace, rows) or problem


def _labels(calls: list[Call], trace: Trace, rows: tuple[int, int]) -> Choice | None:
    """The labels of an encoder-decoder that was given no mask for its decoder."""
    for position in reversed(range(len(calls))):
        call = calls[position]
        if call.caller.decodes and "decoder_attention_mask" not in call.tensors and "labels" in call.tensors:
            span = trace.spans.get((call, "labels")) or trace.spans.get((call, "decoder_input_ids"))
            if span is not None and fits_span(call.sizes("labels"), span, rows):
                return Choice(position, "labels", span.start, f"labels of {IGNORED}")
    return None


def fits_span(mask: tuple[int, int], span: Span, rows: tuple[int, int]) -> bool:
    """A mask of these sizes has a value for each of the rows (batch, length)."""
    batch, length = mask
    if batch not in (1, rows[0]):
        return False
    if span.length is None:
        return length == rows[1]
    return span.length == rows[1] and length >= rows[1] - max(span.start, 0)


def by_shape(calls: list[Call], layer: str, rows: tuple[int, int]) -> tuple[Choice | str | None, str | None]:
    """The mask by nesting and shape alone, where nothing was followed, or what does not fit; what makes it a guess."""
    problem = None
    for position in reversed(range(len(calls))):
        call = calls[position]
        decoding = call.caller.decodes and "decoder" in layer
        if call.caller.decodes:
            names = [name for name in call.masks if name.startswith("decoder_") == decoding]
        else:
            names = [name for name in call.masks if prefix_of(name) in ("", "src_", "tgt_")]
        for name in sorted(names, key=lambda name: call.tensors[name].ndim):
            choice = Choice(position, name, 0, f"{name} of {call.caller.kind}, by its shape")
            if fits(call, choice, rows):
                others = call.others(name)
                if others and any(word in layer for word in _NOT_TEXT):
                    return None, f"{name} is not taken for that of {others[0]}"
                return choice, f"{name} may belong to another argument than {others[0]}" if others else None
            problem = problem or call.with_shape(name)
        if decoding and not names and "labels" in call.tensors and call.tensors["labels"].shape == rows:
            return Choice(position, "labels", 0, f"labels of {IGNORED}"), None
        if not names and (decoding or call.reads_memory):
            return None, None  # the mask around a decoder is that of the tokens which the encoder has
    return problem, None


def fits(call: Call, choice: Choice, rows: tuple[int, int]) -> bool:
    """The mask has the sizes of these rows; or it is also of tokens that are cached, before those of this call."""
    batch, length = call.sizes(choice.name)
    tokens = rows[1] - choice.start
    if batch not in (1, rows[0]) or length < tokens:
        return False
    others = [value.shape[:2] for name, value in call.tensors.items() if not is_mask(name)]
    return length == tokens or any(tuple(shape) == (rows[0], tokens) for shape in others)


# Reading it


def live_rows(call: Call, choice: Choice, length: int) -> Tensor:
    """(batch, length) bool, true where a row counts: rows before the first token do."""
    if choice.name not in call.live:
        call.live[choice.name] = keep(choice.name, call)
    live = call.live[choice.name]
    tokens = length - max(choice.start, 0)
    if live.shape[1] != tokens:
        live = live[:, -tokens:]
    return F.pad(live, (choice.start, 0), value=True) if choice.start > 0 else live


def keep(name: str, call: Call) -> Tensor:
    """Where tokens count: (batch, length) bool. What kind of mask it is, its values tell, on the device."""
    mask = call.tensors[name]
    if name == "labels":
        return mask != IGNORED
    inverted = (
        name.endswith("key_padding_mask")
        or (name.endswith("padding_mask") and mask.dtype == torch.bool)
        or (name == "input_mask" and "attention_mask" in call.caller.parameters)  # as in XLNet
    )
    if mask.is_floating_point():
        if inverted and name != "input_mask":
            return _seen(mask >= 0)
        # Added to the scores: 0 for what counts, and a large number, negative but for some local attention.
        additive = (mask < 0).any() | (mask == 0).all() | (mask >= 1000).any()
        least = 0 if mask.ndim == 2 else -1000  # with a bias of positions in it
        kept = torch.where(additive, mask >= least, mask != 0)
        return _seen(~kept if inverted else kept)
    keep = mask == 0 if inverted else mask != 0
    if mask.ndim > 2 and mask.shape[-1] == mask.shape[-2] > 1:
        # Causal, and true where a key is hidden, as in MPT: all keys that come later are.
        later = keep.masked_fill(torch.ones_like(keep, dtype=torch.bool).tril(), True)
        hides = later.all() & ~keep.diagonal(dim1=-2, dim2=-1).all()
        keep = keep ^ hides
    return _seen(keep)


def _seen(keep: Tensor) -> Tensor:
    """Of (batch, heads, queries, keys): keys that any query sees."""
    return keep.flatten(1, -2).any(1) if keep.ndim > 2 else keep


def has_ones(name: str, mask: Tensor) -> bool:
    """Of what ``mask=`` gave for the layer ``name``: some 1, and not zeros alone, as a mask that is added may have.

    Raises:
        ValueError: it has another value than 0 and 1, so that which rows count is not known.
    """
    wrong = (mask != 0) & (mask != 1)
    others, ones = torch.stack([wrong.any(), mask.any()]).tolist()
    if others:
        raise ValueError(
            f'mask= gave {mask.dtype} with the value {mask[wrong][0].item():g} for module "{name}"; return bools, or 0 '
            "and 1, true or 1 where a token counts: mask == 0 for the inverse of integers or for a mask that is added "
            "to scores, ids != padding for tokens"
        )
    return bool(ones)


# Documents


def documents(calls: list[Call], rows: Tensor, live: Tensor | None) -> tuple[Tensor | None, str]:
    """(batch, length) numbers of documents, from the outermost call that knows them; of the rows that are ``live``."""
    batch, length = rows.shape[:2]
    for call in calls:
        if not call.knows_documents:
            continue
        for name in _DOCUMENTS:
            if name in call.tensors and call.tensors[name].shape == (batch, length):
                return call.tensors[name], name
        for name in _ENDS_OF_DOCUMENTS:
            if name in call.tensors and call.tensors[name].ndim == 1 and batch == 1:
                ends = call.tensors[name]
                places = torch.arange(length, device=ends.device, dtype=ends.dtype)
                return torch.searchsorted(ends, places, right=True)[None], name
        if not call.counts_tokens or not length:
            continue
        positions = call.tensors["position_ids"]
        positions = positions[None] if positions.ndim == 1 else positions
        if positions.shape in ((batch, length), (1, length)):  # all sequences may share them
            if call.documents is None or call.documents[0] is not live:  # once for all layers of one mask
                call.documents = live, restarted(positions, live)
            return call.documents[1].expand(batch, -1), "position_ids that restart"
    return None, ""


def restarted(positions: Tensor, live: Tensor | None) -> Tensor:
    """Numbers of the documents that ``positions`` count, one sequence's smallest being where each document begins.

    Positions that also go back or stay elsewhere, as those of an image or of reversed tokens, mark no documents. Those
    of padding say nothing. All is decided on the device, where nobody waits for it.

    >>> restarted(torch.tensor([[0, 1, 2, 0, 0, 1], [5, 4, 3, 2, 1, 0]]), None)
    tensor([[1, 1, 1, 2, 3, 3],
            [1, 1, 1, 1, 1, 1]])
    """
    live = torch.ones_like(positions, dtype=torch.bool) if live is None else live.to(positions.device)
    known = torch.where(live, positions, torch.iinfo(torch.int32).max)
    smallest = known.amin(1, keepdim=True)
    before, after = positions[:, :-1], positions[:, 1:]
    counted = (after == before + 1) | (after == smallest) | ~(live[:, 1:] & live[:, :-1])
    counting = counted.all(1, keepdim=True) & (live & (positions > smallest)).any(1, keepdim=True)
    first = live & (live.cumsum(1) == 1)  # of a document that began in another sequence, perhaps
    begins = first | (live & counting & (positions == smallest))
    return begins.cumsum(1).clamp(min=1)


# Modules


def sequence_first(module: Any) -> bool | None:
    """A module returns (seq, batch, d), by its ``batch_first``; that of a transformer lies in its attention."""
    flag = getattr(module, "batch_first", None)
    if isinstance(flag, bool):
        return not flag
    for wrapper in ("_orig_mod", "_checkpoint_wrapped_module"):
        if isinstance(getattr(module, wrapper, None), nn.Module):
            return sequence_first(getattr(module, wrapper))
    if isinstance(module, (nn.TransformerEncoder, nn.TransformerDecoder)):
        return sequence_first(module.layers[0]) if len(module.layers) else None
    if isinstance(module, (nn.TransformerEncoderLayer, nn.TransformerDecoderLayer)):
        return sequence_first(module.self_attn)
    return None


def callers_of(model: nn.Module, names: Mapping[str, nn.Module]) -> list[tuple[str, nn.Module]]:
    """The model, and the modules around or at the named ones whose call takes a mask of tokens, from the outermost."""
    around = {".".join(parts[:i]) for parts in (name.split(".") for name in names) for i in range(1, len(parts) + 1)}
    found = [(name, module) for name, module in model.named_modules() if name and name in around]
    return [("", model), *((name, module) for name, module in found if _brings_tokens(module))]


def _brings_tokens(module: nn.Module) -> bool:
    """A call of it takes a mask of tokens."""
    return isinstance(module, (nn.MultiheadAttention, *TRANSFORMERS)) or any(map(is_mask, argument_names(module)))


def is_on_stack(frame: FrameType | None) -> bool:
    """The call that it belongs to is under way."""
    now: FrameType | None = sys._getframe()
    while now is not None and now is not frame:
        now = now.f_back
    return now is not None
