"""Profiles side by side. What differs besides the models is refused, or said."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import islice
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
            return next(iter(self.over_profiles().values()))
        from pandas import DataFrame

        first, second = self.profiles.values()
        before, after = self._tables().values()
        ranks = [rankme_at_equal_rows(*pair) for pair in zip(first.layers, second.layers, strict=True)]
        before["RankMe"], after["RankMe"] = (DataFrame(ranks, index=self.names, dtype=float)[i] for i in (0, 1))
        changes, columns = after - before, {}
        for name in before:
            if name == "±":
                columns["± of Δ"] = (before[name] ** 2 + after[name] ** 2) ** 0.5
            elif name in after and changes[name].notna().any():
                columns |= {name: after[name], f"Δ {name}": changes[name]}
        return DataFrame(columns)

    def over_profiles(self) -> dict[str, Any]:
        """By number of the tables, a DataFrame with a row per layer and a column per profile."""
        from pandas import DataFrame

        tables = self._tables()
        return {
            title: DataFrame({name: table.get(title) for name, table in tables.items()}, self.names, dtype=float)
            for title in next(iter(tables.values()))
            if title != "±"
        }

    def _tables(self) -> dict[str, Any]:
        """The numbers of each, of windows and orders that all have where there are such, else of the first's."""
        from .tables import figure_table

        first, *others = self.profiles.values()
        windows = tuple(window for window in first.windows if all(window in one.windows for one in others))
        orders = tuple(order for order in first.orders if all(order in one.orders for one in others))
        like = replace(first, windows=windows or first.windows, orders=orders or first.orders)
        return {name: figure_table(one, like).set_axis(self.names) for name, one in self.profiles.items()}


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
