"""The layers of a model in one pass over some data: entropies, what can hide in them, and RankMe."""

from __future__ import annotations

import contextlib
import inspect
import json
import math
import os
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .._version import __version__
from ._core import Layers, hidden_rows, puts_sequence_first, select_layers
from .layer_statistics import LayerSums, What

DEFAULT_WINDOWS: tuple[int | None, ...] = (8, None)


@dataclass(frozen=True)
class EntropyValue:
    """One entropy of one layer, a mean over the windows whose rows can have one."""

    kernel: str
    """"linear" or "cosine"."""
    center: bool
    alpha: float
    window: int | None
    """Tokens per window; None = whole sequences."""
    first_token: bool
    """False: the first token of each sequence is left out."""
    nats: float | None
    normalized: float | None
    """In [0, 1]: each window's entropy over the largest that its rows and features allow."""

    @property
    def effective_rank(self) -> float | None:
        """exp of the entropy: how many directions the rows use."""
        return None if self.nats is None else math.exp(self.nats)


@dataclass(frozen=True)
class Shape:
    """What can hide in an entropy, for one window length; means over windows."""

    window: int | None
    first_token: bool
    norm_ratio: float | None
    """Largest over median row norm, at least 1."""
    mean_share: float | None
    """Share of the squared norm that lies in the mean row, in [0, 1]."""


@dataclass(frozen=True)
class LayerProfile:
    """One layer. What its outputs do not have (a first token, successive tokens, two views) is None.

    >>> model = nn.Sequential(nn.Linear(4, 16), nn.ReLU())
    >>> layer = profile(model, [torch.randn(64, 4)], "1")["1"]
    >>> layer.features, layer.shape().norm_ratio >= 1
    (16, True)
    """

    name: str
    features: int
    entropies: tuple[EntropyValue, ...]
    shapes: tuple[Shape, ...]
    first_token_share: float | None = None
    """Share of a sequence's squared norm that its first token has."""
    curvature: float | None = None
    """Mean angle between successive token differences, in degrees."""
    curvature_without_first: float | None = None
    rankme: float | None = None
    rankme_without_first: float | None = None
    lidar: float | None = None

    def entropy(
        self,
        kernel: str = "cosine",
        center: bool = True,
        *,
        alpha: float = 2.0,
        window: int | None = 8,
        first_token: bool = True,
    ) -> EntropyValue:
        """The entropy of that kind.

        Raises:
            KeyError: it was not measured; the message names the orders and windows that were.
        """
        wanted = (kernel, center, alpha, window, first_token)
        for value in self.entropies:
            if (value.kernel, value.center, value.alpha, value.window, value.first_token) == wanted:
                return value
        orders, windows = ({getattr(v, name) for v in self.entropies} for name in ("alpha", "window"))
        raise KeyError(
            f"no entropy of kernel={kernel!r}, center={center}, alpha={alpha}, window={window}, "
            f"first_token={first_token} in layer {self.name!r}; measured: orders {sorted(orders)}, "
            f"windows {sorted(windows, key=str)}"
        )

    def shape(self, *, window: int | None = 8, first_token: bool = True) -> Shape:
        """Norm ratio and mean share for a window length. Raises KeyError where it was not measured."""
        for value in self.shapes:
            if (value.window, value.first_token) == (window, first_token):
                return value
        raise KeyError(f"window={window}, first_token={first_token} was not measured in layer {self.name!r}")


@dataclass(frozen=True)
class Profile:
    """The layers of one model on some data, in the model's order. Made by :func:`profile`.

    >>> model = nn.Sequential(nn.Linear(4, 16), nn.ReLU())
    >>> found = profile(model, [torch.randn(64, 4)], "1")
    >>> Profile.load(found.save("profile.json")).names
    ['1']
    """

    layers: tuple[LayerProfile, ...]
    model: str = ""
    data: str = ""
    sequences: int = 0
    rows: int = 0
    """Rows per layer that counted: tokens, samples or positions."""
    batches: int = 0
    views: int = 1
    orders: tuple[float, ...] = (2.0,)
    windows: tuple[int | None, ...] = DEFAULT_WINDOWS
    seconds: float = 0.0
    notes: tuple[str, ...] = ()
    """What a reader must know, such as outputs that were not finite."""
    version: str = field(default=__version__)

    @property
    def names(self) -> list[str]:
        return [layer.name for layer in self.layers]

    def __getitem__(self, name: str) -> LayerProfile:
        for layer in self.layers:
            if layer.name == name:
                return layer
        raise KeyError(f"no layer {name!r}; the profile has {self.names}")

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON; an infinite order is the string "inf"."""
        values: dict[str, Any] = _plain({"made_by": "gapt_optim", "kind": "profile", **asdict(self)})
        return values

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write it as JSON; :meth:`load` reads it back."""
        target = Path(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(json.dumps(self.as_dict(), allow_nan=False, indent=1) + "\n", encoding="utf-8")
        return target

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Profile:
        """Read what :meth:`save` wrote.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: it holds no profile.
        """
        try:
            values = json.loads(Path(path).read_text(encoding="utf-8", errors="replace"))
            if values.get("kind") != "profile":
                raise TypeError
            layers = tuple(_layer(layer) for layer in values["layers"])
            plain = {key: values[key] for key in ("model", "data", "sequences", "rows", "batches", "views", "seconds")}
            return cls(
                layers=layers,
                orders=tuple(map(float, values["orders"])),
                windows=tuple(values["windows"]),
                notes=tuple(values["notes"]),
                version=str(values["version"]),
                **plain,
            )
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
            raise ValueError(
                f"{path} holds no profile; make one with gapt-optim profile MODEL --data DATA --out NAME.json"
            ) from None


def profile(
    model: nn.Module,
    batches: Iterable[Any],
    layers: Layers = None,
    *,
    orders: Sequence[float] = (2.0,),
    windows: Sequence[int | None] = DEFAULT_WINDOWS,
    views: int = 1,
    rankme_rows: int | None = 25_600,
    output: Callable[[Any], Tensor] | None = None,
    mask: Callable[[Any], Tensor | None] | None = None,
    call: Callable[[nn.Module, Any], Any] | None = None,
    device: str | torch.device | None = None,
    dtype: torch.dtype | None = None,
    progress: bool = False,
    name: str | None = None,
    data: str = "",
) -> Profile:
    """Profile the layers of ``model`` in one pass over ``batches``, without training.

    At the defaults it takes 1.1 to 1.2 times as long as the forward passes alone, and 1.2 to 1.25 times while RankMe
    takes rows (6 layers of width 512 on a CPU; docs/cost.md). Memory does not grow with the data: per layer a few
    numbers and, for RankMe, one (d, d) float64 matrix (two where rows are tokens). The model runs in evaluation mode
    without gradients and is left in the mode it had.

    >>> model = nn.Sequential(nn.Linear(4, 16), nn.ReLU())
    >>> result = profile(model, [torch.randn(64, 4)], "1")
    >>> 0 < result["1"].entropy("cosine", center=True, window=8).nats < math.log(8)
    True

    Args:
        model: any module.
        batches: what to run it on. A mapping is passed as keywords, of a tuple or list only the first item (inputs,
            targets), anything else as it is. For a model with several arguments give a dict of them.
        layers: as for :class:`gapt_optim.RepresentationHook`; None = the longest ``nn.ModuleList`` of one class.
        orders: orders of the entropy, each in (0, inf]. Orders other than 2 to 8 need eigenvalues, which takes long
            for whole sequences.
        windows: tokens per window, each at least 2; None = whole sequences. 8 is what training measures.
        views: with more than 1, each item of ``batches`` is a sequence of so many batches that hold the same samples
            in the same order in different views, and LiDAR is measured too.
        rankme_rows: RankMe is taken over the first so many rows (25,600, as in its paper); 0 leaves it out, None
            takes all. It is what costs most: a (d, d) product in float64.
        output: picks the hidden tensor out of a module's output, where that is not clear.
        mask: picks the token mask (batch, seq) out of a batch; by default ``attention_mask`` of a mapping.
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
    what = What(tuple(float(order) for order in orders), tuple(windows), rankme_rows, views)
    _check(what)
    if device is not None or dtype is not None:
        model = model.to(device=device, dtype=dtype)
    where = next((p.device for p in model.parameters()), torch.device("cpu" if device is None else device))
    modules = select_layers(model, layers)
    sequence_first = {name for name in modules if puts_sequence_first(model, name)}
    collector = _Collector(list(modules), what, output, sequence_first)
    # The attention_mask of a batch is then that of the tokens which the encoder has.
    decodes = mask is None and getattr(getattr(model, "config", None), "is_encoder_decoder", False)
    collector.decoder = {name for name in modules if decodes and "decoder" in name.split(".")}
    handles = [module.register_forward_hook(collector.tap(name)) for name, module in modules.items()]
    modes = {module: module.training for module in model.modules()}
    model.eval()
    started, count = time.perf_counter(), 0
    run = call if call is not None else _default_call(model)
    try:
        with torch.no_grad():
            for item in _counted(batches, progress):
                parts = item if views > 1 else (item,)
                if views > 1 and (not isinstance(item, Sequence) or len(item) != views):
                    raise ValueError(f"views={views}: each item of batches must be a sequence of {views} batches")
                for part in parts:
                    batch = _moved(part, where, dtype)
                    collector.mask = _mask_of(batch, mask)
                    collector.decoder_mask = _mask_of(batch, _decoder_mask) if collector.decoder else None
                    collector.calls = dict.fromkeys(collector.sums, 0)
                    run(model, batch)
                    collector.end_of_call()
                collector.end_of_views()
                count += 1
    finally:
        for handle in handles:
            handle.remove()
        for module, mode in modes.items():
            module.training = mode
    if count == 0:
        raise ValueError("batches is empty; pass at least one batch (an iterator that was used up gives none)")
    if not any(int(sums.rows) for sums in collector.sums.values()):
        raise ValueError("no row of any layer counts: all are masked or not finite, or the batches are empty")
    seconds = time.perf_counter() - started
    profiles = tuple(_result(name, sums) for name, sums in collector.sums.items())
    first = next(iter(collector.sums.values()))
    notes = [
        f"layer {name}: {int(sums.nonfinite)} rows were not finite and are left out"
        for name, sums in collector.sums.items()
        if int(sums.nonfinite)
    ]
    return Profile(
        profiles,
        model=type(model).__name__ if name is None else name,
        data=data,
        sequences=first.sequences,
        rows=int(first.rows),
        batches=count,
        views=views,
        orders=what.orders,
        windows=what.windows,
        seconds=seconds,
        notes=tuple(notes),
    )


class _Collector:
    """Forward hooks, and the sums that they add to."""

    def __init__(
        self, names: list[str], what: What, output: Callable[[Any], Tensor] | None, sequence_first: set[str]
    ) -> None:
        self.sums = {name: LayerSums(what) for name in names}
        self.output, self.sequence_first = output, sequence_first
        self.mask: Tensor | None = None
        self.decoder_mask: Tensor | None = None
        self.decoder: set[str] = set()  # layers that have the latter
        self.calls = dict.fromkeys(names, 0)
        self.embeddings: dict[str, list[Tensor]] = {name: [] for name in names}  # of the views of an item
        self.latest: dict[str, Tensor] = {}
        self.kinds: dict[str, tuple[int, int]] = {}  # dimensions and features of the outputs

    def tap(self, name: str) -> Callable[[nn.Module, Any, Any], None]:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            self.calls[name] += 1
            h, mask = self._hidden(name, output)
            kind = (h.ndim, h.shape[1] if h.ndim > 3 else h.shape[-1])
            if self.kinds.setdefault(name, kind) != kind:
                (dims, features), (before, width) = kind, self.kinds[name]
                raise ValueError(
                    f'layer "{name}" gives {dims} dimensions and {features} features, but {before} and {width} before; '
                    "leave it out of layers"
                )
            embedding = self.sums[name].add(h, mask)
            if self.sums[name].lidar is not None:
                self.latest[name] = embedding

        return hook

    def _hidden(self, name: str, output: Any) -> tuple[Tensor, Tensor | None]:
        mask = self.decoder_mask if name in self.decoder else self.mask
        length = 0 if mask is None else mask.shape[1]
        h, inside = hidden_rows(name, output, self.output, name in self.sequence_first, length)
        if mask is not None and (h.ndim != 3 or mask.shape != h.shape[:2]):
            mask = None
        if mask is not None:
            mask = mask.to(device=h.device, dtype=torch.bool)
        return h, inside if mask is None else mask if inside is None else mask & inside

    def end_of_call(self) -> None:
        silent = [name for name, calls in self.calls.items() if calls == 0]
        if silent:
            raise ValueError(f'layer "{silent[0]}" did not run in a forward pass; leave it out of layers')
        for name, embedding in self.latest.items():  # of a layer that ran several times, the last
            self.embeddings[name].append(embedding)
        self.latest = {}

    def end_of_views(self) -> None:
        for name, sums in self.sums.items():
            if sums.lidar is not None and self.embeddings[name]:
                shapes = {tuple(embedding.shape) for embedding in self.embeddings[name]}
                if len(shapes) > 1:
                    raise ValueError(f'the views of a batch differ in shape at layer "{name}": {sorted(shapes)}')
                sums.lidar.add(torch.stack(self.embeddings[name]))
            self.embeddings[name] = []


def _result(name: str, sums: LayerSums) -> LayerProfile:
    entropies, shapes = [], []
    for (window, first), one in sums.windows.items():
        nats, normalized, shape = (mean.means() for mean in (one.entropies, one.normalized, one.shape))
        if not nats:
            continue
        for kind, value, share in zip(sums.what.kinds, nats, normalized, strict=True):
            entropies.append(EntropyValue(kind.kernel, kind.center, kind.alpha, window, first, value, share))
        shapes.append(Shape(window, first, shape[0], shape[1]))
    curved = {first: next(iter(mean.means()), None) for first, mean in sums.curvature.items()}
    return LayerProfile(
        name,
        sums.features,
        tuple(entropies),
        tuple(shapes),
        first_token_share=next(iter(sums.first_share.means()), None),
        curvature=curved[True],
        curvature_without_first=curved[False],
        rankme=sums.rankme(True),
        rankme_without_first=sums.rankme(False) if sums.tokens else None,
        lidar=None if sums.lidar is None else sums.lidar.value(),
    )


def _check(what: What) -> None:
    if not what.orders or not all(order > 0 for order in what.orders):
        raise ValueError(f"orders must hold numbers in (0, inf], found {list(what.orders)}")
    good = [w is None or (isinstance(w, int) and w >= 2) for w in what.windows]
    if not good or not all(good):
        raise ValueError(f"windows must hold integers of at least 2 or None, found {list(what.windows)}")
    if len(set(what.orders)) < len(what.orders) or len(set(what.windows)) < len(what.windows):
        raise ValueError("orders and windows must not name a value twice")
    if what.rankme_rows is not None and what.rankme_rows < 0:
        raise ValueError(f"rankme_rows must be at least 0, or None for all, found {what.rankme_rows}")
    if what.views < 1:
        raise ValueError(f"views must be at least 1, found {what.views}")


def _default_call(model: nn.Module) -> Callable[[nn.Module, Any], Any]:
    with contextlib.suppress(TypeError, ValueError):
        # A cache of keys and values for generation would only cost memory.
        if "use_cache" in inspect.signature(model.forward).parameters:
            return lambda model, batch: _called(model, batch, use_cache=False)
    return _called


def _called(model: nn.Module, batch: Any, **more: Any) -> Any:
    if isinstance(batch, Mapping):
        return model(**{**more, **batch})
    if not isinstance(batch, tuple | list):
        return model(batch, **more)
    try:
        return model(batch[0], **more)
    except TypeError as error:
        # The words of Python. The signature would not do: a wrapper of the model takes any arguments.
        if not re.search(r"missing \d+ required positional argument", str(error)):
            raise
        raise TypeError(
            f"{error}; of a {type(batch).__name__} in batches only the first item is passed to the model; for several "
            "arguments give a dict, with their names as keys"
        ) from error


def _mask_of(batch: Any, pick: Callable[[Any], Tensor | None] | None) -> Tensor | None:
    mask = pick(batch) if pick is not None else batch.get("attention_mask") if isinstance(batch, Mapping) else None
    if mask is not None and (not isinstance(mask, Tensor) or mask.ndim != 2):
        if pick is None:
            return None
        found = tuple(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
        raise ValueError(f"mask= must give a tensor (batch, seq) or None, found {found}")
    return mask


def _decoder_mask(batch: Any) -> Tensor | None:
    return batch.get("decoder_attention_mask") if isinstance(batch, Mapping) else None


def _moved(value: Any, device: torch.device, dtype: torch.dtype | None) -> Any:
    if isinstance(value, Tensor):
        return value.to(device, dtype if dtype is not None and value.is_floating_point() else value.dtype)
    if isinstance(value, Mapping):
        return {key: _moved(item, device, dtype) for key, item in value.items()}
    if isinstance(value, tuple | list) and not hasattr(value, "_fields"):
        return type(value)(_moved(item, device, dtype) for item in value)
    return value


def _counted(batches: Iterable[Any], progress: bool) -> Iterator[Any]:
    if not progress:
        yield from batches
        return
    from rich.console import Console
    from rich.progress import track

    total = len(batches) if isinstance(batches, Sized) else None
    yield from track(batches, "profiling", total=total, console=Console(stderr=True), transient=True)


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, tuple | list):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return "inf" if value == math.inf else None
    return value


def _layer(values: dict[str, Any]) -> LayerProfile:
    entropies = tuple(EntropyValue(**{**e, "alpha": float(e["alpha"])}) for e in values["entropies"])
    shapes = tuple(Shape(**{**s, "norm_ratio": _number(s["norm_ratio"])}) for s in values["shapes"])
    return replace(LayerProfile(**{**values, "entropies": (), "shapes": ()}), entropies=entropies, shapes=shapes)


def _number(value: Any) -> float | None:
    return None if value is None else float(value)
