"""The layers of a model in one pass over some data: entropies, what can hide in them, and more."""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from .._version import __version__
from ..entropy import matrix_entropy
from ..explain import in_evaluation
from ..hook import RepresentationHook
from ..kernels import full_precision
from ..layout import Layers, Pick, Reading
from .batches import MOST_PROMPTS, DataSeen, batch_of_texts, caller, device_of, moved
from .results import (
    DEFAULT_WINDOWS,
    EntropyValue,
    LayerProfile,
    Origin,
    Profile,
    SequenceLevel,
    Shape,
    Token,
)
from .sequences import SimilaritySums
from .statistics import LayerSums, RankMeRows, What, exp_entropy
from .window_values import PRESETS, Kind, all_kinds, clamped_entropy

MOST_DEPTHS = 64
"""Calls of one module in a pass that are layers of their own."""


def profile(
    model: nn.Module,
    batches: Iterable[Any],
    layers: Layers = None,
    *,
    orders: Sequence[float] = (2.0,),
    windows: Sequence[int | None] = DEFAULT_WINDOWS,
    preset: str | None = None,
    rankme_rows: RankMeRows = "auto",
    against: nn.Module | None = None,
    tokenizer: Any = None,
    output: Callable[[Any], Tensor] | None = None,
    mask: Pick | Mapping[str, Pick] | None = None,
    layout: str | Mapping[str, str] | None = None,
    segments: Pick | Mapping[str, Pick] | None = None,
    call: Callable[[nn.Module, Any], Any] | None = None,
    device: str | torch.device | None = None,
    dtype: torch.dtype | None = None,
    progress: bool = False,
    name: str | None = None,
    data: str = "",
) -> Profile:
    """Profile the layers of ``model`` in one pass over ``batches``, without training.

    It takes 1.2 times as long as the forward passes alone (docs/cost.md). Memory does not grow with the data: per
    layer a few numbers, a row for each of at most 1,024 sequences and, for RankMe, one (d, d) float64 matrix (two
    where rows are tokens). The model runs in evaluation mode without gradients and is left in the mode it had.

    A module that runs several times in a pass, as ALBERT's shared layer does, gives a layer for each: ``name (call 2)``
    and so on. The calls of a recurrent cell are pooled, as they are steps in time.

    >>> import math
    >>> model = nn.Sequential(nn.Linear(4, 16), nn.ReLU())
    >>> result = profile(model, [torch.randn(64, 4)], "1")
    >>> 0 < result["1"].entropy("cosine", center=True, window=8).nats < math.log(8)
    True

    Args:
        model: any module.
        batches: what to run it on: a list, a DataLoader, or one tensor, which is a single batch. A mapping is passed as
            keywords, of a tuple or list only the first item (inputs, targets), anything else as it is. Texts, or lists
            of texts, are made ids by ``tokenizer``. For a model with several arguments give a dict of them.
        layers: as for :class:`gapt_optim.RepresentationHook`; None = the longest ``nn.ModuleList`` of one class.
        orders: orders of the entropy, each in (0, inf]. Orders other than 2 to 8 need eigenvalues, which takes long
            for whole sequences.
        windows: tokens per window, each at least 2; None = whole sequences. 8 is what training measures.
        preset: "layer-by-layer" or "diff-erank": one entropy, as that paper takes it, in place of ``orders`` and
            ``windows`` (docs/layers.md).
        rankme_rows: RankMe is taken over the first so many rows; "auto" is 20 for each feature, at most 25,600 as in
            its paper. 0 leaves it out, None takes all. It is what costs most: a (d, d) product in float64.
        against: another model, called with the same batches, whose layers are compared with these by CKA.
        tokenizer: as of ``transformers``; it also names the longest tokens.
        output, mask, layout, segments: as for :class:`gapt_optim.RepresentationHook`.
        call: runs the model on a batch; by default as said under ``batches``.
        device: where to run; by default where the model is.
        dtype: floating-point type of the model and of floating-point inputs; by default as they are.
        progress: show a progress bar on stderr (needs rich).
        name: of the model, for tables and pages; by default its class.
        data: of the data, likewise.

    Returns:
        One :class:`LayerProfile` per layer, in the model's order.

    Raises:
        TypeError, ValueError: an argument does not fit, no layer matches, there is no batch, or a layer's output
            cannot be profiled; the message names what to change.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, found {type(model).__name__}")
    if isinstance(model, torch.jit.ScriptModule):
        raise ValueError(
            "the model is one of TorchScript, which runs no hooks inside; pass the module that it was made from, or, "
            'for its output alone, profile(nn.Sequential(model, nn.Identity()), batches, "1")'
        )
    what = _what(orders, windows, preset, rankme_rows)
    if isinstance(batches, Tensor | Mapping | str):
        batches = [batches]
    if device is not None or dtype is not None:
        model = model.to(device=device, dtype=dtype)
    started = time.perf_counter()
    collector, data_seen = Collector(what, model), DataSeen(tokenizer)
    with ExitStack() as stack:
        hook = stack.enter_context(
            RepresentationHook(model, layers, output=output, mask=mask, layout=layout, segments=segments)
        )
        stack.enter_context(hook.reading(collector.read))
        runs = [_runner(model, hook, call, device, dtype)]
        if against is not None:
            other = stack.enter_context(RepresentationHook(against))
            stack.enter_context(other.reading(collector.read_other))
            runs.append(_runner(against, other, call, device, dtype))
        stack.enter_context(in_evaluation(*([model] if against is None else [model, against])))
        stack.enter_context(torch.no_grad())
        for item in _counted(batches, progress):
            batch = batch_of_texts(item, tokenizer)
            collector.ids = data_seen.add(batch)
            for run in runs:
                run(batch)
            collector.end_of_pass()
        names = hook.names
    if data_seen.batches == 0:
        raise ValueError("batches is empty; pass at least one batch (an iterator that was used up gives none)")
    versions = {"gapt_optim": __version__, "torch": torch.__version__}
    return collector.result(
        model=type(model).__name__ if name is None else name,
        data=data,
        batches=data_seen.batches,
        seconds=time.perf_counter() - started,
        tokenizer=tokenizer,
        names=names,
        origin=Origin(data_seen.digest(), data_seen.batch_size, data_seen.length, collector.dtype, preset, versions),
        prompts=tuple(data_seen.prompts),
    )


def _runner(
    model: nn.Module,
    hook: RepresentationHook,
    call: Callable[[nn.Module, Any], Any] | None,
    device: str | torch.device | None,
    dtype: torch.dtype | None,
) -> Callable[[Any], None]:
    """What runs a model on a batch."""
    run = caller(model, call)
    place = device_of(model) if device is None else torch.device(device)

    def runner(batch: Any) -> None:
        batch = moved(batch, place, dtype)
        if not hook.names:  # a first pass shows which modules are the model's blocks, and is not read
            run(model, batch)
        run(model, batch)

    return runner


class Collector:
    """Reads the outputs of layers, each call of a pass for itself."""

    def __init__(self, what: What, model: nn.Module) -> None:
        self.what, self.modules = what, dict(model.named_modules())
        self.pooled = {name for name, module in self.modules.items() if isinstance(module, nn.RNNCellBase)}
        """Modules whose calls in a pass are steps in time, and are taken together."""
        self.sums: dict[tuple[str, int], LayerSums] = {}
        self.calls: Counter[str] = Counter()
        self.most_calls: Counter[str] = Counter()
        self.similarity = SimilaritySums()
        self.ids: Tensor | None = None
        self.notes: dict[str, None] = {}
        self._outputs: dict[tuple[str, int], tuple[int, int]] = {}

    def read(self, name: str, reading: Reading) -> None:
        """One output of a layer."""
        with torch._C.DisableTorchFunction():  # a first pass is followed through its operations; these are none of it
            self._read(name, reading)

    def _read(self, name: str, reading: Reading) -> None:
        self.calls[name] += 1
        key = (name, 1 if name in self.pooled else min(self.calls[name], MOST_DEPTHS))
        kind = (reading.h.ndim, reading.rows.shape[-1])
        if self._outputs.setdefault(key, kind) != kind:
            (dims, features), (before, width) = kind, self._outputs[key]
            raise ValueError(
                f'layer "{name}" gives {dims} dimensions and {features} features, but {before} and {width} before; '
                "leave it out of layers"
            )
        if reading.guess is not None:
            self.notes[f"layer {name}: a guess, {reading.guess}"] = None
        sums = self.sums.setdefault(key, LayerSums(self.what))
        ids = self.ids if self.ids is not None and self.ids.shape == reading.rows.shape[:2] else None
        with full_precision(reading.rows):
            sums.add(reading, ids)
        self.similarity.add(self.title(key), reading)

    def read_other(self, name: str, reading: Reading) -> None:
        """One output of a layer of the model that these are compared with."""
        self.similarity.add(f"against: {name}", reading)

    def title(self, key: tuple[str, int]) -> str:
        """The name of a layer: of a module, or of one of its calls."""
        name, call = key
        return name if call == 1 else f"{name} (call {call})"

    def end_of_pass(self) -> None:
        """The pass is over."""
        self.most_calls |= self.calls
        self.calls = Counter()
        self.similarity.end_of_pass()

    @property
    def dtype(self) -> str:
        """That of the layers' outputs."""
        return ", ".join(dict.fromkeys(str(sums.dtype).removeprefix("torch.") for sums in self.sums.values()))

    def result(self, *, names: list[str], tokenizer: Any, **about: Any) -> Profile:
        """What was summed of the modules ``names``."""
        if not self.sums:
            raise ValueError(f'layer "{names[0]}" did not run in a forward pass; leave it out of layers')
        if not any(sums.rows for sums in self.sums.values()):
            raise ValueError("no row of any layer counts: all are masked or not finite, or the batches are empty")
        keys = sorted(self.sums, key=lambda key: (names.index(key[0]), key[1]))
        sums = [self.sums[key] for key in keys]
        layers = tuple(layer_of(self.title(key), each, tokenizer) for key, each in zip(keys, sums, strict=True))
        return Profile(
            layers,
            sequences=sums[0].sequences,
            rows=sums[0].rows,
            orders=self.what.orders,
            windows=self.what.windows,
            notes=tuple(self._notes(names, keys)),
            cka_names=tuple(self.similarity.names),
            cka=self.similarity.value(),
            **about,
        )

    def _notes(self, names: list[str], keys: list[tuple[str, int]]) -> Iterator[str]:
        for key in keys:
            if self.sums[key].nonfinite:
                yield f"layer {self.title(key)}: {self.sums[key].nonfinite} rows were not finite and are left out"
        ran = {name for name, _ in self.sums}
        silent = [name for name in names if name not in ran]
        if silent:
            yield f"did not run in any forward pass: {', '.join(silent)}"
        for name, calls in self.most_calls.items():
            if calls > 1:
                said = "are taken together" if name in self.pooled else "are layers of their own"
                yield f"layer {name} runs up to {calls} times in a pass; its calls {said}"
                if calls > MOST_DEPTHS and name not in self.pooled:
                    yield f"layer {name}: its calls from {MOST_DEPTHS} on are taken together"
        for name in names:
            module = self.modules[name]
            if isinstance(module, nn.RNNBase) and module.num_layers > 1:
                yield f"layer {name} has {module.num_layers} layers of its own; only the output of the top one is seen"
        yield from self.notes


def layer_of(name: str, sums: LayerSums, tokenizer: Any) -> LayerProfile:
    """The numbers of a layer from its sums."""
    what, k = sums.what, len(sums.what.kinds)
    entropies, shapes = [], []
    for window, mean in sums.windows.items():
        columns = mean.means()
        for first, part in ((True, columns[: 2 * k + 2]), (False, columns[2 * k + 2 :])):
            if not part or not (first or sums.tokens) or (what.centered_first and not first):
                continue
            for kind, (nats, error), (share, _) in zip(what.kinds, part[:k], part[k : 2 * k], strict=True):
                entropies.append(EntropyValue(*kind[:3], window, first, nats, share, error))
            if not what.centered_first:  # of rows that are not as the layer gave them
                shapes.append(Shape(window, first, part[2 * k][0], part[2 * k + 1][0]))
    (curvature, _), (straightened, _) = sums.curvature.means() or [(None, None)] * 2
    ((first_share, _),) = sums.first_share.means() or [(None, None)]
    return LayerProfile(
        name,
        sums.features,
        sums.rows,
        sums.axes,
        tuple(entropies),
        tuple(shapes),
        first_token_share=first_share,
        curvature=curvature,
        curvature_without_first=straightened,
        rankme=sums.ranks.rankme(True),
        rankme_without_first=sums.ranks.rankme(False) if sums.tokens else None,
        rankme_rows=sums.ranks.rows,
        rankme_at=sums.ranks.at,
        sequence_level=tuple(
            level_of(pooling, rows, what.kinds[what.main]) for pooling, rows in sums.pooled.joined().items()
        ),
        longest=tuple(_with_text(found, tokenizer) for found in sums.where.longest if found.ratio > 0),
        channels=tuple(sums.where.channels()),
        norm_by_position=tuple(sums.where.by_position()),
        by_sequence=tuple(None if value != value else value for value in sums.by_sequence[:MOST_PROMPTS]),
    )


def level_of(pooling: str, rows: Tensor, kind: Kind) -> SequenceLevel:
    """How many directions one row for each sequence, (sequences, d), uses."""
    rows = rows.double()
    rankme = exp_entropy(torch.linalg.svdvals(rows)) if len(rows) else None
    if kind.clamped:
        nats, most = clamped_entropy(rows), min(rows.shape)
        return SequenceLevel(pooling, len(rows), nats, nats / math.log(most) if most > 1 else 0.0, rankme)
    if kind.center == "first" and len(rows):
        rows = rows - rows.mean(0)
    options: dict[str, Any] = {"alpha": kind.alpha, "kernel": kind.kernel, "center": kind.center is True}
    nats, normalized = (float(matrix_entropy(rows, normalize=normalize, **options)) for normalize in (False, True))
    return SequenceLevel(pooling, len(rows), nats, normalized, rankme)


def _what(orders: Sequence[float], windows: Sequence[int | None], preset: str | None, rankme_rows: RankMeRows) -> What:
    if preset is not None and preset not in PRESETS:
        raise ValueError(f"preset must be one of {', '.join(PRESETS)}, found {preset!r}")
    orders, windows = tuple(float(order) for order in orders), tuple(windows)
    if not orders or not all(order > 0 for order in orders):
        raise ValueError(f"orders must hold numbers in (0, inf], found {list(orders)}")
    good = [w is None or (isinstance(w, int) and w >= 2) for w in windows]
    if not good or not all(good):
        raise ValueError(f"windows must hold integers of at least 2 or None, found {list(windows)}")
    if len(set(orders)) < len(orders) or len(set(windows)) < len(windows):
        raise ValueError("orders and windows must not name a value twice")
    if rankme_rows not in (None, "auto") and not (isinstance(rankme_rows, int) and rankme_rows >= 0):
        raise ValueError(f'rankme_rows must be at least 0, "auto", or None for all, found {rankme_rows!r}')
    windows = tuple(sorted(windows, key=lambda window: (window is None, window)))
    if preset is not None:
        return What((PRESETS[preset],), (None,), rankme_rows)
    return What(all_kinds(orders), windows, rankme_rows)


def _with_text(found: Token, tokenizer: Any) -> Token:
    if tokenizer is None or found.token is None:
        return found
    return replace(found, text=str(tokenizer.decode([found.token])))


def _counted(batches: Iterable[Any], progress: bool) -> Iterator[Any]:
    if not progress:
        yield from batches
        return
    from rich.console import Console
    from rich.progress import track

    total = len(batches) if isinstance(batches, Sized) else None
    yield from track(batches, "profiling", total=total, console=Console(stderr=True), transient=True)
