"""A profile as tables: every number, and what a terminal shows of them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
from pandas import DataFrame

from .._display.tables import number
from .results import LayerProfile, Profile, Token

KINDS: dict[tuple[str, object], str] = {
    ("cosine", True): "cosine, centred",
    ("cosine", False): "cosine",
    ("linear", True): "linear, centred",
    ("linear", False): "linear",
    ("cosine", "first"): "centred, then cosine",
}
WITHOUT_FIRST = ", without first token"
FEW_ROWS = "*"
"""Marks a RankMe of fewer than ten rows per feature."""


class Figure(NamedTuple):
    """One number of a layer, as tables and heat maps have it."""

    title: str
    unit: str
    column: str
    """Of :func:`every_number`."""


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


def entropy_column(kind: tuple[str, object], alpha: float, window: int | None) -> str:
    """The column of :func:`every_number` that has this entropy."""
    return f"S {KINDS[kind]}, order {alpha:g}, {window_name(window)}"


def every_number(one: Profile) -> DataFrame:
    """A row per layer, a column for each number."""
    return DataFrame([_row(layer) for layer in one.layers], index=one.names)


def _row(layer: LayerProfile) -> dict[str, object]:
    row: dict[str, object] = {"features": layer.features, "rows": layer.rows, "axes": layer.axes}
    for value in layer.entropies:
        said = entropy_column((value.kernel, value.center), value.alpha, value.window)
        said += "" if value.first_token else WITHOUT_FIRST
        row |= {said: value.nats, f"{said}, normalized": value.normalized, f"{said}, error": value.error}
    for shape in layer.shapes:
        said = window_name(shape.window) + ("" if shape.first_token else WITHOUT_FIRST)
        row |= {f"norm ratio, {said}": shape.norm_ratio, f"mean share, {said}": shape.mean_share}
    for level in layer.sequence_level:
        said = f"sequence level, {level.pooling}"
        row |= {f"{said}, rows": level.rows, f"{said}, S": level.nats, f"{said}, S normalized": level.normalized}
        row[f"{said}, RankMe"] = level.rankme
    names = ("first_token_share", "curvature", "curvature_without_first", "rankme", "rankme_without_first")
    return row | {name: getattr(layer, name) for name in (*names, "rankme_rows")}


def figures(one: Profile) -> list[Figure]:
    """The numbers of a layer in the order of their importance: a narrow terminal leaves the last ones out."""
    window, alpha = main_window(one), main_order(one)
    main, *others = [Figure(f"{KINDS[kind]} S", "nats", entropy_column(kind, alpha, window)) for kind in kinds_of(one)]
    last = [others.pop()] if others else []
    return [
        main,
        Figure("±", "nats", f"{main.column}, error"),
        Figure("rank", "effective rank", f"{main.column}, rank"),
        *last,
        Figure("norm ratio", "largest / median norm", f"norm ratio, {window_name(window)}"),
        Figure("mean share", "share of squared norm", f"mean share, {window_name(window)}"),
        Figure("RankMe", "effective rank", "rankme"),
        Figure("sequence S", "nats", "sequence level, S"),
        Figure("first token", "share of squared norm", "first_token_share"),
        Figure("curvature", "degrees", "curvature"),
        *others,
        Figure("sequence RankMe", "effective rank", "sequence level, RankMe"),
    ]


def poolings(one: Profile) -> list[str]:
    """How rows of sequences were made."""
    return list(dict.fromkeys(level.pooling for layer in one.layers for level in layer.sequence_level))


def figure_table(one: Profile, like: Profile | None = None) -> DataFrame:
    """A row per layer, a column for each of the :func:`figures` (of another profile, if given) that some layer has."""
    every, wanted = every_number(one), figures(like or one)
    main = wanted[0].column
    if main in every:
        every[f"{main}, rank"] = np.exp(every[main].astype(float))
    for name in ("S", "RankMe") if poolings(one) else ():  # by the first pooling of each layer
        columns = [f"sequence level, {pooling}, {name}" for pooling in poolings(one)]
        every[f"sequence level, {name}"] = every[columns].bfill(axis=1).iloc[:, 0]
    shown = {figure.title: every[figure.column] for figure in wanted if figure.column in every}
    return DataFrame(shown, index=one.names).astype(float).dropna(axis=1, how="all")


def profile_table(one: Profile) -> DataFrame:
    """What a terminal shows: :func:`figure_table`, with a mark where RankMe is of few rows."""
    frame = figure_table(one)
    if "RankMe" in frame and any(layer.few_rows for layer in one.layers):
        frame["RankMe"] = [number(layer.rankme) + FEW_ROWS * layer.few_rows for layer in one.layers]
    return frame


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


def what_is_shown(one: Profile) -> str:
    """Sentences below a table: which entropy it has, and what its marks mean."""
    said = f"S in nats: order {main_order(one):g}, {window_name(main_window(one))}; ± is its standard error."
    if any(layer.few_rows for layer in one.layers):
        said += f" {FEW_ROWS} RankMe of fewer than ten rows per feature: more rows alone would raise it."
    return said


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
    frame = DataFrame([layer.by_sequence for layer in one.layers], index=one.names, dtype=float).T
    names = dict(enumerate(one.prompts))
    return frame.rename(index=lambda i: names.get(i) or f"sequence {i}")
