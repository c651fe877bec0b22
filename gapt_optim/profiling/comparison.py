"""Profiles side by side. What differs besides the models is refused, or said."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import islice
from math import hypot
from typing import Any

from .results import LayerProfile, Profile


@dataclass(frozen=True)
class Comparison:
    """Profiles that may be compared. Made by :func:`gapt_optim.compare`.

    >>> import torch
    >>> from gapt_optim import compare, profile
    >>> models = {name: torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU()) for name in ("base", "tuned")}
    >>> data = [torch.randn(64, 4)]
    >>> compare({name: profile(model, data, "*") for name, model in models.items()}).names
    ['0', '1']
    """

    profiles: dict[str, Profile]
    warnings: tuple[str, ...]
    """What differs besides the models, and what it changes."""

    @property
    def names(self) -> list[str]:
        """Of the layers; both names where the first and another profile call a layer differently."""
        first, *others = [one.names for one in self.profiles.values()]
        if all(names == first for names in others):
            return first
        return [" / ".join(dict.fromkeys(names)) for names in zip(first, *others, strict=True)]

    def to_pandas(self) -> Any:
        """A DataFrame: of two profiles, the second's numbers and their changes; of more, the first number of each."""
        if len(self.profiles) > 2:
            return self.over_profiles()
        from pandas import DataFrame

        from .tables import figures

        first, second = self.profiles.values()
        pairs = list(zip(first.layers, second.layers, strict=True))
        columns: dict[str, list[float | None]] = {}
        for figure in figures(_common(first, second)):
            before, after = ([figure.read(pair[i]) for pair in pairs] for i in (0, 1))
            if figure.title == "±":
                columns["± of Δ"] = [
                    None if a is None or b is None else hypot(a, b) for a, b in zip(before, after, strict=True)
                ]
                continue
            if figure.title == "RankMe":
                both = [rankme_at_equal_rows(*pair) for pair in pairs]
                before, after = [found[0] for found in both], [found[1] for found in both]
            changes = [None if a is None or b is None else b - a for a, b in zip(before, after, strict=True)]
            if any(change is not None for change in changes):
                columns |= {figure.title: after, f"Δ {figure.title}": changes}
        order = [name for name in columns if name != "± of Δ"]
        order.insert(2, "± of Δ")
        return DataFrame({name: columns[name] for name in order if name in columns}, index=self.names)

    def over_profiles(self, title: str | None = None) -> Any:
        """A DataFrame of one number of the tables, by default the first: a row per layer, a column per profile."""
        from pandas import DataFrame

        from .tables import figures

        one = next(iter(self.profiles.values()))
        figure = next(found for found in figures(one) if title in (None, found.title))
        columns = {name: [figure.read(layer) for layer in each.layers] for name, each in self.profiles.items()}
        return DataFrame(columns, index=self.names, dtype=float)


def compare(profiles: Mapping[str, Profile], *, anyway: bool = False) -> Comparison:
    """Check that profiles can be compared, and say what differs besides the models.

    >>> import torch
    >>> from gapt_optim import compare, profile
    >>> models = {name: torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU()) for name in ("base", "tuned")}
    >>> data = [torch.randn(64, 4)]
    >>> found = compare({name: profile(model, data, "*") for name, model in models.items()})
    >>> found.warnings, list(found.to_pandas().index)
    ((), ['0', '1'])

    Args:
        profiles: at least two, by name; each is compared with the first.
        anyway: compare profiles of other data too; it is a warning then.

    Raises:
        ValueError: they are of other data, have other numbers of layers, or no window, order and kernel in common.
    """
    if len(profiles) < 2:
        raise ValueError(f"profiles must hold at least two profiles by name, found {len(profiles)}")
    (base, first), *others = profiles.items()
    warnings: list[str] = []
    for name, other in others:
        named = f"{base} and {name}"
        if len(first.layers) != len(other.layers):
            raise ValueError(
                f"{named} have {len(first.layers)} and {len(other.layers)} layers, which cannot be paired; choose "
                "layers with layers=, or see which are alike with profile(model, batches, against=other)"
            )
        _check_settings(named, first, other)
        if first.origin.digest != other.origin.digest:
            refusal = (
                f"{named} were not profiled on the same data: {_data(first)}, and {_data(other)}. Entropies and RankMe "
                "depend on the data"
            )
            if not anyway:
                raise ValueError(f"{refusal}; profile both on the same, or compare anyway (anyway=True, --anyway)")
            warnings.append(refusal)
        warnings += _differences(named, first, other)
    return Comparison(dict(profiles), tuple(dict.fromkeys(warnings)))


def rankme_at_equal_rows(first: LayerProfile, second: LayerProfile) -> tuple[float | None, float | None]:
    """RankMe of both over the largest number of rows that both have; it grows with rows alone."""
    tables = []
    for layer in (first, second):
        found = dict(layer.rankme_at)
        if layer.rankme is not None:
            found[layer.rankme_rows] = layer.rankme
        tables.append(found)
    rows = max(tables[0].keys() & tables[1].keys(), default=None)
    return (None, None) if rows is None else (tables[0][rows], tables[1][rows])


def _check_settings(named: str, first: Profile, other: Profile) -> None:
    if first.origin.preset != other.origin.preset:
        raise ValueError(
            f"{named} have the presets {first.origin.preset} and {other.origin.preset}; profile both with the same"
        )
    if not set(first.windows) & set(other.windows) or not set(first.orders) & set(other.orders):
        raise ValueError(
            f"{named} have no window and order in common; profile both with the same windows and orders (--windows, "
            "--orders)"
        )


def _common(first: Profile, second: Profile) -> Profile:
    """The first profile with the windows and orders that both have."""
    from dataclasses import replace

    return replace(
        first,
        windows=tuple(window for window in first.windows if window in second.windows),
        orders=tuple(order for order in first.orders if order in second.orders),
    )


def _differences(named: str, first: Profile, other: Profile) -> list[str]:
    """What else differs, and what it changes."""
    found = []
    pairs = list(zip(first.layers, other.layers, strict=True))
    renamed = [(a.name, b.name) for a, b in pairs if a.name != b.name]
    if renamed:
        shown = ", ".join(f"{a} with {b}" for a, b in islice(renamed, 3))
        found.append(f"{named} name their layers differently; they are paired by place: {shown}")
    widths = [(a.features, b.features) for a, b in pairs if a.features != b.features]
    if widths:
        found.append(f"{named} have {widths[0][0]} and {widths[0][1]} features; limits of entropies and RankMe differ")
    axes = [(a.name, a.axes, b.axes) for a, b in pairs if a.axes != b.axes]
    if axes:
        found.append(f"{named}: the output of {axes[0][0]} is read as ({axes[0][1]}) and ({axes[0][2]})")
    rows = [(a.name, a.rows, b.rows) for a, b in pairs if a.rows != b.rows]
    if rows:
        found.append(
            f"{named} have {rows[0][1]:,} and {rows[0][2]:,} rows at {rows[0][0]}; RankMe grows with rows alone"
        )
    if any(a.rankme_rows != b.rankme_rows for a, b in pairs):
        both = any(rankme_at_equal_rows(*pair)[0] is not None for pair in pairs)
        said = "is taken of as many rows of each" if both else "is left out"
        found.append(f"{named} have RankMe of other numbers of rows; it {said}")
    if first.origin.batch_size != other.origin.batch_size and any(a.axes == "batch features" for a, _ in pairs):
        found.append(
            f"{named} have batches of {first.origin.batch_size} and {other.origin.batch_size}; windows of samples are "
            "cut within a batch"
        )
    if first.origin.dtype != other.origin.dtype:
        found.append(f"{named} ran in {first.origin.dtype} and {other.origin.dtype}")
    for package, version in first.origin.versions.items():
        if other.origin.versions.get(package) != version:
            found.append(f"{named} were made with {package} {version} and {other.origin.versions.get(package)}")
    return found


def _data(one: Profile) -> str:
    said = one.data or "data without a name"
    length = "" if one.origin.length is None else f" of at most {one.origin.length}"
    return f"{said} ({one.sequences:,} sequences{length}, {one.rows:,} rows, digest {one.origin.digest[:8]})"
