"""What a profile holds: the numbers of each layer, and what they were taken on."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from pydantic import ConfigDict, TypeAdapter, ValidationError

from .._version import __version__

DEFAULT_WINDOWS: tuple[int | None, ...] = (8, None)


@dataclass(frozen=True)
class EntropyValue:
    """One entropy of one layer, a mean over the windows that can have one."""

    kernel: Literal["linear", "cosine"]
    center: bool | Literal["first"]
    """"first": the mean is taken off before rows are scaled to unit length."""
    alpha: float
    window: int | None
    """Tokens per window; None = whole sequences."""
    first_token: bool
    """False: the first token of each sequence is left out."""
    nats: float | None
    normalized: float | None
    """In [0, 1]: each window's entropy over the largest that its rows and features allow."""
    error: float | None
    """Standard error of the nats over sequences; None for fewer than two."""

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
class SequenceLevel:
    """One row for each sequence: how many directions the sequences of the data use."""

    pooling: str
    """Which row: the "mean" of a sequence, its "last" or "first" token, or the "sample" itself."""
    rows: int
    nats: float
    """By the kernel and order that stand first in the profile, or centred cosine of order 2 where that is among them.
    """
    normalized: float
    rankme: float | None


@dataclass(frozen=True)
class Token:
    """One of the longest tokens of a layer."""

    ratio: float
    """Its norm over the median norm of its sequence."""
    sequence: int
    """Which one of the data, from 0."""
    position: int
    """In its sequence, padding included, from 0."""
    token: int | None
    """Its id, where the batch has ids of this shape."""
    text: str | None = None


@dataclass(frozen=True)
class LayerProfile:
    """One layer. What its outputs do not have (a first token, successive tokens) is None.

    >>> import torch
    >>> from gapt_optim import profile
    >>> model = torch.nn.Sequential(torch.nn.Linear(4, 16), torch.nn.ReLU())
    >>> layer = profile(model, [torch.randn(64, 4)], "1")["1"]
    >>> layer.features, layer.shape().norm_ratio >= 1
    (16, True)
    """

    name: str
    features: int
    rows: int
    """That counted: tokens, samples or positions."""
    axes: str
    """What the axes of its output are."""
    entropies: tuple[EntropyValue, ...]
    shapes: tuple[Shape, ...]
    first_token_share: float | None = None
    """Share of a sequence's squared norm that its first token has."""
    curvature: float | None = None
    """Mean angle between successive token differences, in degrees."""
    curvature_without_first: float | None = None
    rankme: float | None = None
    rankme_without_first: float | None = None
    rankme_rows: int = 0
    rankme_at: dict[int, float] = field(default_factory=dict)
    """RankMe of the first so many rows: it grows with rows alone."""
    sequence_level: tuple[SequenceLevel, ...] = ()
    longest: tuple[Token, ...] = ()
    channels: tuple[tuple[int, float], ...] = ()
    """Those with the largest shares of the rows' squared norm."""
    norm_by_position: tuple[tuple[int, float], ...] = ()
    """Mean norm of the tokens from each position on, up to the next."""
    by_sequence: tuple[float | None, ...] = ()
    """The main entropy of the longest windows, in nats, of each of the first sequences."""

    def entropy(
        self,
        kernel: str = "cosine",
        center: bool | Literal["first"] = True,
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

    @property
    def few_rows(self) -> bool:
        """RankMe was taken on fewer than ten rows per feature: more rows alone would raise it."""
        return self.rankme is not None and self.rankme_rows < 10 * self.features


@dataclass(frozen=True)
class Origin:
    """What the numbers were taken on: where it differs, profiles cannot be compared."""

    digest: str = ""
    """Of the data without its padding: equal for the same samples in the same order, however they are batched."""
    batch_size: int = 0
    length: int | None = None
    """The longest sequence."""
    dtype: str = ""
    """Of the outputs, as the module returned them."""
    preset: str | None = None
    versions: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Profile:
    """The layers of one model on some data, in the model's order. Made by :func:`gapt_optim.profile`.

    >>> import torch
    >>> from gapt_optim import Profile, profile
    >>> model = torch.nn.Sequential(torch.nn.Linear(4, 16), torch.nn.ReLU())
    >>> found = profile(model, [torch.randn(64, 4)], "1")
    >>> Profile.load(found.save("profile.json")).names
    ['1']
    >>> int(found.to_pandas().loc["1", "features"])
    16
    """

    __pydantic_config__ = ConfigDict(ser_json_inf_nan="strings")

    layers: tuple[LayerProfile, ...]
    model: str = ""
    data: str = ""
    sequences: int = 0
    rows: int = 0
    """Rows of the first layer that counted: tokens, samples or positions."""
    batches: int = 0
    orders: tuple[float, ...] = (2.0,)
    windows: tuple[int | None, ...] = DEFAULT_WINDOWS
    seconds: float = 0.0
    notes: tuple[str, ...] = ()
    """What a reader must know, such as outputs that were not finite."""
    origin: Origin = field(default_factory=Origin)
    prompts: tuple[str, ...] = ()
    """The beginnings of the first sequences, where there is a tokenizer."""
    cka_names: tuple[str, ...] = ()
    cka: tuple[tuple[float, ...], ...] | None = None
    """CKA between the layers, and those of the model that they were compared ``against``, by ``cka_names``."""
    version: str = __version__
    kind: Literal["profile"] = "profile"

    @property
    def names(self) -> list[str]:
        return [layer.name for layer in self.layers]

    def __getitem__(self, name: str) -> LayerProfile:
        for layer in self.layers:
            if layer.name == name:
                return layer
        raise KeyError(f"no layer {name!r}; the profile has {self.names}")

    def to_pandas(self) -> Any:
        """A DataFrame: one row per layer, a column for each number."""
        from .tables import every_number

        return every_number(self)

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write it as JSON; :meth:`load` reads it back."""
        return save_profiles({"": self}, path)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Profile:
        """Read what :meth:`save` wrote.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: it holds no profile, or several.
        """
        found = load_profiles(path)
        if len(found) > 1:
            raise ValueError(f"{path} holds {len(found)} profiles; read them with load_profiles(path)")
        return next(iter(found.values()))


def save_profiles(profiles: Mapping[str, Profile], path: str | os.PathLike[str]) -> Path:
    """Write one profile, or several by name, as JSON; see :func:`load_profiles`.

    >>> import torch
    >>> from gapt_optim.profiling import profile, save_profiles
    >>> model = torch.nn.Sequential(torch.nn.Linear(4, 16), torch.nn.ReLU())
    >>> save_profiles({"base": profile(model, [torch.randn(64, 4)], "1")}, "base.json").name
    'base.json'
    """
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    if len(profiles) == 1:
        text = TypeAdapter(Profile).dump_json(next(iter(profiles.values())), indent=1)
    else:
        text = TypeAdapter(dict[str, Profile]).dump_json(dict(profiles), indent=1)
    target.write_bytes(text + b"\n")
    return target


def load_profiles(path: str | os.PathLike[str]) -> dict[str, Profile]:
    """Read what ``--out NAME.json`` wrote: one profile, named as the file, or several.

    >>> import torch
    >>> from gapt_optim.profiling import load_profiles, profile, save_profiles
    >>> model = torch.nn.Sequential(torch.nn.Linear(4, 16), torch.nn.ReLU())
    >>> path = save_profiles({"base": profile(model, [torch.randn(64, 4)], "1")}, "base.json")
    >>> list(load_profiles(path))
    ['base']

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it holds none.
    """
    several: TypeAdapter[Any] = TypeAdapter(Profile | dict[str, Profile])
    try:
        found = several.validate_json(Path(path).read_bytes())
    except ValidationError:
        raise ValueError(
            f"{path} holds no profile of this version; make one with gapt-optim profile MODEL --data DATA --out "
            "NAME.json"
        ) from None
    return {Path(path).stem: found} if isinstance(found, Profile) else dict(found)
