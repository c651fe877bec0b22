"""What there is to see of profiles, for pages and pictures alike: lines over the layers, and heat maps."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

from .._display.pictures import OTHER_COLORS
from .._display.tables import number, shared_start
from .comparison import Comparison
from .results import LayerProfile, Profile
from .tables import (
    KINDS,
    entropy_of,
    figures,
    kinds_of,
    level_of,
    main_order,
    shape_of,
    window_name,
)

COLORS = ("#1f6feb", "#d9822b", *OTHER_COLORS, "#8250df")
WITHOUT_FIRST = "dashed: without first tokens"
_POOLINGS = ("mean", "last", "first", "sample")


@dataclass
class Line:
    """One line over the layers."""

    name: str
    values: list[float | None]
    color: str
    dashed: bool = False
    errors: list[float | None] | None = None
    """Standard errors."""
    run: int | None = None
    """Number of the profile it belongs to, where there are several."""
    view: str | None = None


@dataclass
class Panel:
    """One chart over the layers."""

    title: str
    unit: str
    note: str
    lines: list[Line]
    layers: list[str]
    limits: list[tuple[str, float]] = field(default_factory=list)
    """What the values cannot exceed, or would be by chance."""
    views: list[tuple[str, str]] = field(default_factory=list)

    def bounds(self) -> tuple[float, float]:
        """The axis, fitted to the data; a limit that is near is shown too."""
        values = [v for line in self.lines for v in line.values if v is not None and math.isfinite(v)]
        low, high = min(values, default=0.0), max(values, default=1.0)
        room = (high - low) or abs(high) or 1.0
        for _, limit in self.limits:
            if low - 0.5 * room <= limit <= high + 0.5 * room:
                low, high = min(low, limit), max(high, limit)
        edge = 0.06 * ((high - low) or abs(high) or 1.0)
        return low - edge, high + edge


@dataclass
class Heat:
    """One heat map."""

    title: str
    unit: str
    note: str
    x: list[str]
    y: list[str]
    values: dict[str, list[list[float | None]]]
    """Rows of y by what a select chooses; one entry where there is nothing to choose."""
    x_title: str = ""
    bounds: tuple[float, float] | None = None


def entropy_panels(profiles: Mapping[str, Profile]) -> list[Panel]:
    """Entropies by window: of one profile a line for each kernel, of several a view for each."""
    several = len(profiles) > 1
    first = next(iter(profiles.values()))
    alpha = main_order(first)
    found = []
    for window in first.windows:
        panel = Panel(_titled("Entropy", window, alpha), "nats", "", [], first.names)
        for place, kind in enumerate(kinds_of(first)):
            name = KINDS[kind]
            if several:
                panel.views.append((name, f"{name} kernel"))
            for i, (profile_name, one) in enumerate(profiles.items()):
                for first_token in (True, False):
                    values = [entropy_of(layer, kind, alpha, window, first_token) for layer in one.layers]
                    if all(value is None for value in values):
                        continue
                    said = "" if first_token else ", without first token"
                    line = Line(
                        f"{profile_name if several else name}{said}",
                        [getattr(value, "nats", None) for value in values],
                        COLORS[(i if several else place) % len(COLORS)],
                        dashed=not first_token,
                        errors=[getattr(value, "error", None) for value in values] if first_token else None,
                    )
                    if several:
                        line.run, line.view = i, name
                    panel.lines.append(line)
        panel.limits = _entropy_limits(first, window)
        panel.note = _note(panel, "Bars are standard errors over sequences.")
        found.append(panel)
    return found


def other_panels(profiles: Mapping[str, Profile]) -> list[Panel]:
    """What can hide in an entropy, ranks, and one row for each sequence."""
    several = len(profiles) > 1
    first = next(iter(profiles.values()))
    found = []
    for title, unit, note, limits, read in _readings(first):
        panel = Panel(title, unit, note, [], first.names, limits)
        for i, (name, one) in enumerate(profiles.items()):
            for first_token in (True, False):
                values = [read(layer, first_token) for layer in one.layers]
                if any(value is not None for value in values):
                    said = "all tokens" if first_token else "without first token"
                    text = f"{name}{'' if first_token else f', {said}'}" if several else said
                    panel.lines.append(Line(text, values, COLORS[i % len(COLORS)], not first_token))
                    panel.lines[-1].run = i if several else None
        if panel.lines:
            panel.note = _note(panel, note)
            found.append(panel)
    return [*found, *_sequence_panels(profiles)]


def _sequence_panels(profiles: Mapping[str, Profile]) -> list[Panel]:
    several = len(profiles) > 1
    first = next(iter(profiles.values()))
    found = []
    for title, unit, name in (
        ("Sequence level: entropy", "nats", "nats"),
        ("Sequence level: RankMe", "effective rank", "rankme"),
    ):
        panel = Panel(title, unit, "", [], first.names)
        for i, (profile_name, one) in enumerate(profiles.items()):
            for place, pooling in enumerate(_POOLINGS):
                values = [level_of(layer, pooling, name) for layer in one.layers]
                if all(value is None for value in values):
                    continue
                said = "samples" if pooling == "sample" else f"{pooling} token"
                color = COLORS[(i if several else place) % len(COLORS)]
                line = Line(profile_name if several else said, values, color)
                if several:
                    line.run, line.view = i, said
                    panel.views = list(dict.fromkeys([*panel.views, (said, said)]))
                panel.lines.append(line)
        if panel.lines:
            rows = max(level.rows for layer in first.layers for level in layer.sequence_level)
            panel.note = f"One row for each of {rows:,} sequences: how many directions the sequences of the data use."
            found.append(panel)
    return found


_Reading = tuple[str, str, str, list[tuple[str, float]], Callable[[LayerProfile, bool], float | None]]


def _readings(first: Profile) -> list[_Reading]:
    """Title, unit, note, limits and reader (of a layer, with the first token or without) of each chart."""
    long = "A few long tokens lower the linear entropy by themselves."
    common = "One vector that all tokens share lowers what is not centred."
    readings: list[_Reading] = []
    for window in first.windows:
        where = window_name(window)
        ratio, share = (partial(_shape, window, name) for name in ("norm_ratio", "mean_share"))
        readings.append((f"Norm ratio, {where}", "largest / median norm", long, [], ratio))
        readings.append((f"Share of the mean token, {where}", "share of squared norm", common, [], share))
    few = " Fewer than ten rows per feature: more rows alone would raise it."
    ranked = "Of all rows together, not of windows." + few * any(layer.few_rows for layer in first.layers)
    features = sorted({layer.features for layer in first.layers})
    most = [(f"{d} features", float(d)) for d in features[-1:]]
    chance = [("independent tokens", 120.0), ("random walk", 90.0)]
    rankme = partial(_field, "rankme", "rankme_without_first")
    return [
        *readings,
        ("RankMe", "effective rank", ranked, most, rankme),
        ("Curvature", "degrees", "Mean angle between successive steps from token to token.", chance,
         partial(_field, "curvature", "curvature_without_first")),
        ("Share of the first token", "share of squared norm", "Of each sequence.", [],
         partial(_field, "first_token_share", None)),
    ]  # fmt: skip


def similarity(one: Profile) -> Heat | None:
    """CKA between the layers of a model, and with those of the model it was compared against."""
    if one.cka is None:
        return None
    names = list(one.cka_names)
    other = [i for i, name in enumerate(names) if name.startswith("against: ")]
    own = [i for i in range(len(names)) if i not in other]
    columns = other or own
    rows: list[list[float | None]] = [[one.cka[i][j] for j in columns] for i in own]
    note = "1 where two layers hold the same up to rotation and one scale, 0 where they share nothing. Linear kernel."
    x = [names[j].removeprefix("against: ") for j in columns]
    title = "CKA with the other model" if other else "CKA between layers"
    return Heat(
        title,
        "CKA",
        note,
        x,
        [names[i] for i in own],
        {"": rows},
        "layer of the other" if other else "layer",
        (0.0, 1.0),
    )


def norms_by_position(one: Profile) -> Heat | None:
    """Mean norms by layer and position, relative to the layer's mean over positions."""
    edges = sorted({edge for layer in one.layers for edge, _ in layer.norm_by_position})
    if not edges:
        return None
    rows: list[list[float | None]] = []
    for layer in one.layers:
        norms = dict(layer.norm_by_position)
        usual = norms[max(norms)] if norms else 0
        rows.append([norms[edge] / usual if edge in norms and usual else None for edge in edges])
    names = [
        f"{a}" if b == a + 1 else f"{a} to {b - 1}" for a, b in zip(edges, [*edges[1:], edges[-1] + 1], strict=True)
    ]
    names[-1] = f"{edges[-1]} on" if edges[-1] >= 4 else names[-1]
    note = "Mean norm of the tokens at a position over that of the last ones. First tokens that are long are sinks."
    return Heat("Norm by position", "ratio", note, names, one.names, {"": rows}, "position in the sequence")


def over_profiles(found: Comparison) -> Heat:
    """Each number of the tables by layer and profile: how layers develop over the checkpoints of a run."""
    values: dict[str, list[list[float | None]]] = {}
    for figure in figures(next(iter(found.profiles.values()))):
        rows = [[figure.read(one.layers[i]) for one in found.profiles.values()] for i in range(len(found.names))]
        if figure.title != "±" and any(value is not None for row in rows for value in row):
            values[f"{figure.title} ({figure.unit})"] = rows
    start = shared_start(list(found.profiles))
    names = [name.removeprefix(start) for name in found.profiles]
    title = f"profile {start}*" if start else "profile"
    return Heat("Layers over profiles", "", "A column for each profile.", names, found.names, values, title)


def _titled(text: str, window: int | None, alpha: float) -> str:
    return f"{text}, {window_name(window)}{'' if alpha == 2 else f', order {alpha:g}'}"


def _note(panel: Panel, note: str) -> str:
    """With what a line's style means, and the limits."""
    limits = "; ".join(f"{name}: {number(value)}" for name, value in panel.limits)
    said = [note, f"{WITHOUT_FIRST.capitalize()}." if any(line.dashed for line in panel.lines) else ""]
    return " ".join(part for part in (*said, f"Dotted where near: {limits}." if limits else "") if part)


def _entropy_limits(one: Profile, window: int | None) -> list[tuple[str, float]]:
    if window is None:
        return []
    most = min(window, max(layer.features for layer in one.layers))
    centered = any(kind[1] for kind in kinds_of(one))
    return [(f"centred at most log {most - 1}", math.log(most - 1))] if centered and most > 2 else []


def _shape(window: int | None, name: str, layer: LayerProfile, first_token: bool) -> float | None:
    return shape_of(layer, window, name, first_token)


def _field(name: str, without_first: str | None, layer: LayerProfile, first_token: bool) -> float | None:
    field_name = name if first_token else without_first
    value: float | None = None if field_name is None else getattr(layer, field_name)
    return value


def short_names(names: Sequence[str]) -> list[str]:
    """The ends of modules' names that tell them from their neighbours."""
    found = []
    for name in names:
        parts = name.split(".")
        numbers = [i for i, part in enumerate(parts) if part.split(" ")[0].isdigit()]
        found.append(".".join(parts[numbers[0] :]) if numbers else name)
    return found
