"""A profile as tables: what a terminal shows, and every number."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

from pandas import DataFrame

from .._display.tables import number
from .results import EntropyValue, LayerProfile, Profile, Token

KINDS: dict[tuple[str, object], str] = {
    ("cosine", True): "cosine, centred",
    ("cosine", False): "cosine",
    ("linear", True): "linear, centred",
    ("linear", False): "linear",
    ("cosine", "first"): "centred, then cosine",
}
FEW_ROWS = "*"
"""Marks a RankMe of fewer than ten rows per feature."""


class Figure(NamedTuple):
    """One number of a layer, as tables and heat maps have it."""

    title: str
    unit: str
    read: Callable[[LayerProfile], float | None]


def window_name(window: int | None) -> str:
    return "whole sequences" if window is None else f"windows of {window}"


def kinds_of(one: Profile) -> list[tuple[str, object]]:
    """The kernels that were measured, in the order of :data:`KINDS`."""
    found = {(value.kernel, value.center) for layer in one.layers for value in layer.entropies}
    return [kind for kind in KINDS if kind in found]


def main_window(one: Profile) -> int | None:
    return 8 if 8 in one.windows else one.windows[0]


def main_order(one: Profile) -> float:
    return 2.0 if 2.0 in one.orders else one.orders[0]


def entropy_of(
    layer: LayerProfile, kind: tuple[str, object], alpha: float, window: int | None, first_token: bool = True
) -> EntropyValue | None:
    """That entropy of a layer; None where it was not measured."""
    for value in layer.entropies:
        if (value.kernel, value.center, value.alpha, value.window, value.first_token) == (
            *kind,
            alpha,
            window,
            first_token,
        ):
            return value
    return None


def shape_of(layer: LayerProfile, window: int | None, name: str, first_token: bool = True) -> float | None:
    """The norm ratio or the mean share of a layer; None where it was not measured."""
    for value in layer.shapes:
        if (value.window, value.first_token) == (window, first_token):
            found: float | None = getattr(value, name)
            return found
    return None


def level_of(layer: LayerProfile, pooling: str | None, name: str) -> float | None:
    """A number of the sequence level, by default of its first pooling; None where there is none."""
    for level in layer.sequence_level:
        if pooling in (None, level.pooling):
            found: float | None = getattr(level, name)
            return found
    return None


def figures(one: Profile) -> list[Figure]:
    """The numbers of a layer in the order of their importance: a narrow terminal leaves the last ones out."""
    window, alpha = main_window(one), main_order(one)

    def entropy(kind: tuple[str, object]) -> Callable[[LayerProfile], float | None]:
        return lambda layer: getattr(entropy_of(layer, kind, alpha, window), "nats", None)

    def error(layer: LayerProfile) -> float | None:
        return getattr(entropy_of(layer, kinds[0], alpha, window), "error", None)

    def rank(layer: LayerProfile) -> float | None:
        return getattr(entropy_of(layer, kinds[0], alpha, window), "effective_rank", None)

    kinds = kinds_of(one)
    main, *others = [Figure(f"{KINDS[kind]} S", "nats", entropy(kind)) for kind in kinds]
    last = others.pop() if others else None
    found = [main, Figure("±", "nats", error), Figure("rank", "effective rank", rank)]
    if last is not None:
        found.append(last)
    return [
        *found,
        Figure("norm ratio", "largest / median norm", lambda layer: shape_of(layer, window, "norm_ratio")),
        Figure("mean share", "share of squared norm", lambda layer: shape_of(layer, window, "mean_share")),
        Figure("RankMe", "effective rank", lambda layer: layer.rankme),
        Figure("sequence S", "nats", lambda layer: level_of(layer, None, "nats")),
        Figure("first token", "share of squared norm", lambda layer: layer.first_token_share),
        Figure("curvature", "degrees", lambda layer: layer.curvature),
        *others,
        Figure("sequence RankMe", "effective rank", lambda layer: level_of(layer, None, "rankme")),
    ]


def profile_table(one: Profile) -> DataFrame:
    """What a terminal shows: a row per layer, columns with nothing in them left out."""
    columns = {figure.title: [figure.read(layer) for layer in one.layers] for figure in figures(one)}
    frame = DataFrame({name: values for name, values in columns.items() if any(v is not None for v in values)})
    frame.index = [layer.name for layer in one.layers]
    if "RankMe" in frame and any(layer.few_rows for layer in one.layers):
        frame["RankMe"] = [number(layer.rankme) + FEW_ROWS * layer.few_rows for layer in one.layers]
    return frame


def every_number(one: Profile) -> DataFrame:
    """A row per layer, a column for each number."""
    return DataFrame([_row(layer) for layer in one.layers], index=[layer.name for layer in one.layers])


def _row(layer: LayerProfile) -> dict[str, object]:
    row: dict[str, object] = {"features": layer.features, "rows": layer.rows, "axes": layer.axes}
    for value in layer.entropies:
        said = f"{KINDS[value.kernel, value.center]}, order {value.alpha:g}, {window_name(value.window)}"
        said += "" if value.first_token else ", without first token"
        row |= {f"S {said}": value.nats, f"S {said}, normalized": value.normalized, f"S {said}, error": value.error}
    for shape in layer.shapes:
        said = window_name(shape.window) + ("" if shape.first_token else ", without first token")
        row |= {f"norm ratio, {said}": shape.norm_ratio, f"mean share, {said}": shape.mean_share}
    for level in layer.sequence_level:
        said = f"sequence level, {level.pooling}"
        row |= {f"{said}, rows": level.rows, f"{said}, S": level.nats, f"{said}, S normalized": level.normalized}
        row[f"{said}, RankMe"] = level.rankme
    names = ("first_token_share", "curvature", "curvature_without_first", "rankme", "rankme_without_first")
    return row | {name: getattr(layer, name) for name in (*names, "rankme_rows")}


def summary_line(one: Profile) -> str:
    """What the profile is of, in a line."""
    return f"{one.model}{_on_what(one)}, {one.seconds:.1f} s"


def summary_of_several(profiles: Mapping[str, Profile]) -> str:
    """What profiles are of; what is the same of several is said once."""
    names: dict[str, list[str]] = {}
    for name, one in profiles.items():
        names.setdefault(_on_what(one), []).append(name)
    return "; ".join(f"{', '.join(of_same)}{said}" for said, of_same in names.items())


def _on_what(one: Profile) -> str:
    of_data = f" on {one.data}" if one.data else ""
    preset = f", preset {one.origin.preset}" if one.origin.preset else ""
    return (
        f"{of_data}: {len(one.layers)} layers, {one.rows:,} rows in {one.sequences:,} sequences, "
        f"{one.batches:,} batches, {one.origin.dtype}{preset}"
    )


def what_is_shown(one: Profile) -> list[str]:
    """Sentences below a table: which entropy it has, and what its marks mean."""
    said = f"S in nats: order {main_order(one):g}, {window_name(main_window(one))}; ± is its standard error."
    if any(layer.few_rows for layer in one.layers):
        said += f" {FEW_ROWS} RankMe of fewer than ten rows per feature: more rows alone would raise it."
    return [said, *(f"note: {note}" for note in one.notes)]


def longest_tokens(one: Profile) -> DataFrame:
    """The longest tokens of each layer with their places, and its largest channels."""
    rows = []
    for layer in one.layers:
        tokens = [
            f"{_token_name(found)} at {found.position} of sequence {found.sequence}: {number(found.ratio)} x"
            for found in layer.longest[:3]
        ]
        channels = [f"{channel}: {share:.1%}" for channel, share in layer.channels[:3]]
        rows.append({"longest tokens, in median norms": "; ".join(tokens), "largest channels": "; ".join(channels)})
    return DataFrame(rows, index=one.names)


def _token_name(found: Token) -> str:
    if found.text is not None:
        return repr(found.text)
    return "token" if found.token is None else f"id {found.token}"


def by_prompt(one: Profile) -> DataFrame:
    """Entropies of whole sequences, one row for each of the first ones, a column per layer."""
    columns = {layer.name: layer.by_sequence for layer in one.layers}
    size = max((len(values) for values in columns.values()), default=0)
    names = [one.prompts[i] if i < len(one.prompts) and one.prompts[i] else f"sequence {i}" for i in range(size)]
    return DataFrame({name: [*values, *[None] * (size - len(values))] for name, values in columns.items()}, index=names)
