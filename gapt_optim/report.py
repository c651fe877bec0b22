"""Pictures from what a run wrote down: loss and entropy with the phases, entropy per layer, alignment.

Read a run with `read_run`, draw it with one of the ``draw_`` functions. They need matplotlib.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from .history import Record, RunHistory, compression_spans, read_metrics, read_run

__all__ = [
    "RunHistory",
    "compression_spans",
    "draw_alignment",
    "draw_entropy_map",
    "draw_training",
    "read_metrics",
    "read_run",
]

COLORS = {"plain": "#7d8590", "penalty": "#d9822b", "gapt": "#1f6feb"}
OTHER_COLORS = ("#8250df", "#1a7f37", "#cf222e", "#0e7490", "#9a6700")
SHADE = "#1f6feb"
INK = "#1f2328"
FAINT = "#656d76"


def draw_training(
    runs: Mapping[str, RunHistory],
    path: str | os.PathLike[str],
    *,
    main: str | None = None,
    title: str = "Loss and representation entropy",
) -> Path:
    """Loss and mean entropy over steps, for one run or several, written to ``path``.

    Lines with dots are held-out values, thin lines those of the training steps. The shaded stretches are the
    compression phases of the run ``main`` (default: the last).
    """
    mpl = _matplotlib()
    main = _main_run(runs, main)
    with mpl.rc_context(_style()):
        figure, (top, bottom) = _subplots(mpl, 2, 1, (9.6, 6.0), sharex=True, gridspec_kw={"hspace": 0.12})
        labels: dict[Any, list[tuple[float, str, str]]] = {top: [], bottom: []}
        for axes, key in ((top, "loss"), (bottom, "entropy")):
            base = _last_value(runs["plain"], key) if "plain" in runs and main != "plain" else None
            for number, (name, run) in enumerate(runs.items()):
                color = _color(name, number)
                emphasis = name == main
                _draw_values(axes, run, key, color, emphasis)
                last = _last_value(run, key)
                if last is not None:
                    change = f" ({last / base - 1:+.1%})" if base and name != "plain" else ""
                    labels[axes].append((last, _minus(f"{name}  {last:.2f}{change}"), color))
            _shade(axes, runs[main].steps)
            axes.set_xlim(0, 1.004 * max((record["step"] for run in runs.values() for record in run.steps), default=1))
            axes.grid(axis="y")
        _fit_after_the_start(top, [*(_values(run.validations, "loss") for run in runs.values()),
                                   *(_values(run.steps, "loss") for run in runs.values())])  # fmt: skip
        bottom.set_ylim(bottom=0.0, top=1.06 * bottom.get_ylim()[1])
        top.set_ylabel("cross-entropy (nats)")
        bottom.set_ylabel("matrix entropy (nats)")
        bottom.set_xlabel("step")
        _name_switches(top, runs[main].steps)
        for axes, names in labels.items():
            _label_ends(axes, names)
        figure.align_ylabels([top, bottom])
        _title(top, title, _phase_summary(main, runs[main].steps))
        return _save(figure, path)


def draw_entropy_map(
    runs: Mapping[str, RunHistory], path: str | os.PathLike[str], *, title: str = "Matrix entropy of each layer"
) -> Path:
    """Entropy per layer over steps as a heat map per run, on one scale; the phases are the strip above each."""
    import numpy as np

    mpl = _matplotlib()
    from matplotlib.ticker import MaxNLocator

    shown = {name: rows for name, run in runs.items() if (rows := _layer_rows(run))}
    if not shown:
        raise ValueError("no run holds layer entropies, so there is nothing to draw; pass runs trained with a hook")
    every_value = [value for rows in shown.values() for _, layers in rows for value in layers.values()]
    low, high = 0.0, float(np.nanpercentile(np.array(every_value, dtype=float), 99.5))
    with mpl.rc_context(_style()):
        columns = len(shown)
        layers = len(next(iter(shown.values()))[0][1])
        width, height = max(7.0, 4.2 * columns), min(7.0, 2.2 + 0.42 * layers)
        figure, grid = _subplots(
            mpl, 2, columns, (width, height), squeeze=False, sharex="col", height_ratios=(1, 4 * layers),
            gridspec_kw={"hspace": 0.04, "wspace": 0.09},
        )  # fmt: skip
        mesh = None
        for column, (name, rows) in enumerate(shown.items()):
            strip, axes = grid[0][column], grid[1][column]
            names = list(rows[0][1])
            steps = np.array([step for step, _ in rows], dtype=float)
            values = np.array([[entropies.get(layer) for layer in names] for _, entropies in rows], dtype=float).T
            mesh = axes.pcolormesh(
                _edges(steps), np.arange(len(names) + 1), values, cmap="viridis", vmin=low, vmax=high, rasterized=True
            )
            axes.set_yticks(np.arange(len(names)) + 0.5, names if column == 0 else [""] * len(names))
            axes.set_xlabel("step")
            axes.xaxis.set_major_locator(MaxNLocator(4, integer=True, prune="upper" if column < columns - 1 else None))
            for place in (strip, axes):
                place.spines[:].set_visible(False)
                place.tick_params(length=0)
            strip.set_yticks([])
            strip.set_ylim(0, 1)
            end = max((int(record["step"]) for record in runs[name].steps), default=int(steps[-1]))
            strip.axvspan(0, end, color="#e7ebef", lw=0)
            for first, last in compression_spans(runs[name].steps):
                strip.axvspan(first - 1, last, color=SHADE, lw=0)
            axes.set_xlim(0, end)
            strip.set_title(name, loc="left", color=_color(name, column), fontweight="bold", fontsize=11, pad=6)
        assert mesh is not None
        bar = figure.colorbar(mesh, ax=grid.ravel().tolist(), pad=0.015, aspect=24)
        bar.set_label("nats")
        bar.outline.set_visible(False)
        figure.suptitle(title, x=0.01, ha="left", y=1.0, va="bottom", fontweight="bold", fontsize=13, color=INK)
        note = "strip above: blue = compression, grey = memorization"
        figure.text(0.01, 0.985, note, ha="left", va="top", color=FAINT, fontsize=9)
        return _save(figure, path)


def draw_alignment(
    runs: Mapping[str, RunHistory],
    path: str | os.PathLike[str],
    *,
    main: str | None = None,
    title: str = "Angle between loss gradient and entropy gradient",
) -> Path:
    """Cosine of the two gradients over steps: activation alignment as lines, parameter alignment as dots.

    Ticks at the foot mark the steps at which the main run's activation cosine changes its sign. Below, its cosine at
    each layer as a heat map.
    """
    mpl = _matplotlib()
    main = _main_run(runs, main)
    with mpl.rc_context(_style()):
        layers = {record["step"]: (record.get("alignment") or {}).get("layers") or {} for record in runs[main].steps}
        names = list(max(layers.values(), key=len, default={}))
        figure, grid = _subplots(
            mpl, 2 if names else 1, 1, (9.6, 6.2 if names else 3.8), squeeze=False, sharex=True,
            gridspec_kw={"hspace": 0.12, "height_ratios": (3, 2) if names else (1,)},
        )  # fmt: skip
        axes = grid[0][0]
        labels = []
        any_activation = any_parameter = False
        for number, (name, run) in enumerate(runs.items()):
            color = _color(name, number)
            activation = _cosines(run.steps, "alignment")
            parameter = _cosines(run.steps, "parameter_alignment")
            any_activation, any_parameter = any_activation or bool(activation), any_parameter or bool(parameter)
            if activation:
                axes.plot(*zip(*activation, strict=True), color=color, lw=0.7, alpha=0.35)
                smooth = _smooth(activation)
                axes.plot(*zip(*smooth, strict=True), color=color, lw=1.8)
                labels.append((smooth[-1][1], _minus(f"{name}  {smooth[-1][1]:+.2f}"), color))
            if parameter:
                axes.plot(*zip(*parameter, strict=True), "o", ms=3.5, color=color, mec="white", mew=0.5)
        if not (any_activation or any_parameter):
            raise ValueError("no run holds alignment; train with AlignmentConfig(activation=True) or parameter_every")
        _shade(axes, runs[main].steps)
        axes.axhline(0.0, color=FAINT, lw=0.8)
        axes.grid(axis="y")
        axes.margins(x=0.0)
        axes.set_ylabel("cosine")
        flips = sign_changes(runs[main].steps)
        axes.plot(
            flips, [0.0] * len(flips), "|", ms=7, mew=0.7, color=_color(main, 0), transform=axes.get_xaxis_transform()
        )
        _label_ends(axes, labels)
        _name_switches(axes, runs[main].steps)
        note = "lines: at the layers' outputs, dots: of the parameters, " if any_parameter else ""
        _title(axes, title, f"{note}ticks: {len(flips)} sign changes, {_phase_summary(main, runs[main].steps)}")
        grid[-1][0].set_xlabel("step")
        if names:
            _draw_layer_cosines(figure, grid[1][0], layers, names)
        return _save(figure, path)


def sign_changes(steps: Sequence[Record]) -> list[int]:
    """The steps at which the activation cosine has another sign than on the step before."""
    cosines = _cosines(steps, "alignment")
    return [int(step) for (_, before), (step, after) in pairwise(cosines) if before * after < 0]


def _draw_layer_cosines(figure: Any, axes: Any, layers: Mapping[int, Record], names: Sequence[str]) -> None:
    import numpy as np

    values = np.array(
        [[(layers[step].get(name) or {}).get("cosine") for step in layers] for name in names], dtype=float
    )
    limit = float(np.nanpercentile(np.abs(values), 98)) or 1.0
    mesh = axes.pcolormesh(
        np.array(list(layers), dtype=float), np.arange(len(names)), values,
        cmap="RdBu", vmin=-limit, vmax=limit, shading="nearest", rasterized=True,
    )  # fmt: skip
    axes.set_yticks(range(len(names)), names)
    axes.tick_params(axis="y", length=0)
    inset = axes.inset_axes((1.02, 0.0, 0.02, 1.0))
    figure.colorbar(mesh, cax=inset, label="cosine")


def _matplotlib() -> Any:
    """matplotlib without pyplot: needs no display, and leaves the caller's backend alone."""
    try:
        import matplotlib.figure
    except ImportError as error:
        raise ImportError("gapt_optim.report draws with matplotlib: pip install matplotlib") from error
    return matplotlib


def _subplots(mpl: Any, rows: int, columns: int, figsize: tuple[float, float], **options: Any) -> tuple[Any, Any]:
    figure = mpl.figure.Figure(figsize=figsize)
    return figure, figure.subplots(rows, columns, **options)


def _style() -> dict[str, Any]:
    return {
        "font.size": 10,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.spines.left": False,
        "axes.edgecolor": "#afb8c1",
        "axes.labelcolor": FAINT,
        "axes.axisbelow": True,
        "grid.color": "#d8dee4",
        "grid.linewidth": 0.7,
        "xtick.color": FAINT,
        "ytick.color": FAINT,
        "ytick.major.size": 0,
        "text.color": INK,
        "figure.facecolor": "white",
    }


def _save(figure: Any, path: str | os.PathLike[str]) -> Path:
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(target, dpi=160, bbox_inches="tight", pad_inches=0.18)
    return target


def _color(name: str, number: int) -> str:
    return COLORS.get(name, OTHER_COLORS[number % len(OTHER_COLORS)])


def _main_run(runs: Mapping[str, RunHistory], main: str | None) -> str:
    if not runs:
        raise ValueError("runs is empty; pass at least one run, for example {'gapt': read_run(folder)}")
    if main is None:
        return list(runs)[-1]
    if main not in runs:
        raise ValueError(f"main={main!r} is none of the runs {list(runs)}")
    return main


def _values(records: Sequence[Record], key: str) -> list[tuple[float, float]]:
    """(step, value) where there is a value."""
    return [(record["step"], record[key]) for record in records if record.get(key) is not None]


def _cosines(records: Sequence[Record], key: str) -> list[tuple[float, float]]:
    return [
        (record["step"], record[key]["cosine"])
        for record in records
        if record.get(key) is not None and record[key].get("cosine") is not None
    ]


def _last_value(run: RunHistory, key: str) -> float | None:
    """The final held-out value, or the average of the last training steps where none was held out."""
    held_out = _values(run.validations, key)
    if held_out:
        return held_out[-1][1]
    steps = _smooth(_values(run.steps, key))
    return steps[-1][1] if steps else None


def _smooth(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """Exponential average over a fiftieth of the run, without the bias of its first value."""
    decay = 1 - 1 / max(1.0, len(points) / 50)
    mean, weight = 0.0, 0.0
    smooth = []
    for step, value in points:
        mean, weight = decay * mean + (1 - decay) * value, decay * weight + (1 - decay)
        smooth.append((step, mean / weight))
    return smooth


def _minus(text: str) -> str:
    """A number's hyphen as the wider minus sign that matplotlib's own ticks have."""
    return text.replace("-", "\N{MINUS SIGN}")


def _draw_values(axes: Any, run: RunHistory, key: str, color: str, emphasis: bool) -> None:
    steps, held_out = _values(run.steps, key), _values(run.validations, key)
    if steps and (emphasis or not held_out):
        axes.plot(*zip(*steps, strict=True), color=color, lw=0.8, alpha=0.35)
    if steps and not held_out:
        axes.plot(*zip(*_smooth(steps), strict=True), color=color, lw=1.8)
    if held_out:
        size = 4.5 if len(held_out) <= 40 else 0.0
        axes.plot(
            *zip(*held_out, strict=True), color=color, lw=2.2 if emphasis else 1.6, marker="o", ms=size, mec="white",
            mew=0.8, zorder=4 if emphasis else 3, clip_on=True,
        )  # fmt: skip


def _shade(axes: Any, steps: Sequence[Record]) -> None:
    for first, last in compression_spans(steps):
        axes.axvspan(first - 1, last, color=SHADE, alpha=0.10, lw=0)


def _name_switches(axes: Any, steps: Sequence[Record]) -> None:
    """Why each phase began, above its first step: entries of compression in the upper row, exits in the lower.

    Words that would run into each other are left out.
    """
    length = max((int(record["step"]) for record in steps), default=1)
    last = {"compression": -math.inf, "memorization": -math.inf}
    for record in steps:
        if not record.get("reason"):
            continue
        step, begins = int(record["step"]), record.get("next_phase", "compression")
        axes.plot([step, step], [1.0, 1.015], color=FAINT, lw=0.8, transform=axes.get_xaxis_transform(), clip_on=False)
        if (step - last[begins]) / length > 0.085:
            axes.annotate(
                record["reason"], (step, 1), (0, 15 if begins == "compression" else 5), ha="center", fontsize=8,
                xycoords=axes.get_xaxis_transform(), textcoords="offset points", color=FAINT,
            )  # fmt: skip
            last[begins] = step


def _fit_after_the_start(axes: Any, curves: list[list[tuple[float, float]]]) -> None:
    """Limits for what comes after the steep first tenth, which would flatten all the rest."""
    end = max((curve[-1][0] for curve in curves if curve), default=0)
    late = [value for curve in curves for step, value in curve if step >= 0.1 * end and math.isfinite(value)]
    if late:
        low, high = min(late), max(late)
        room = 0.06 * (high - low or 1.0)
        axes.set_ylim(low - room, high + room)


def _label_ends(axes: Any, labels: list[tuple[float, str, str]]) -> None:
    """Names at the right end of their lines, moved apart where they would overlap."""
    low, high = axes.get_ylim()
    gap = 0.085 * (high - low)
    places: list[float] = []
    ordered = sorted(labels)
    for value, _, _ in ordered:
        places.append(max(min(value, high), low) if not places else max(min(value, high), places[-1] + gap))
    overflow = max(0.0, places[-1] - high) if places else 0.0
    for index in range(len(places) - 1, -1, -1):
        limit = places[index] - overflow if index == len(places) - 1 else min(places[index], places[index + 1] - gap)
        places[index] = limit
    for (_, text, color), place in zip(ordered, places, strict=True):
        axes.text(
            1.012, (place - low) / (high - low), text, transform=axes.transAxes, va="center", color=color,
            fontweight="bold", fontsize=9.5,
        )  # fmt: skip


def _layer_rows(run: RunHistory) -> list[tuple[float, dict[str, float]]]:
    """Layer entropies over steps: of the training steps, or of the validations where those have none."""
    for records in (run.steps, run.validations):
        rows = [(record["step"], record["layer_entropy"]) for record in records if record.get("layer_entropy")]
        if rows:
            return rows
    return []


def _edges(steps: Any) -> Any:
    """Cell borders around the steps: each cell reaches back to the step before it."""
    import numpy as np

    first = max(0.0, steps[0] - (steps[1] - steps[0])) if len(steps) > 1 else 0.0
    return np.concatenate([[first], steps])


def _phase_summary(name: str, steps: Sequence[Record]) -> str:
    if not steps:
        return ""
    share = sum(record.get("phase") == "compression" for record in steps) / len(steps)
    switches = sum(record.get("reason") is not None for record in steps)
    return f"shaded: compression phases of {name} ({share:.0%} of steps, {switches} switches)"


def _title(axes: Any, title: str, subtitle: str) -> None:
    axes.annotate(
        title, (0, 1), (0, 52), xycoords="axes fraction", textcoords="offset points", fontsize=13, fontweight="bold"
    )
    axes.annotate(
        subtitle, (0, 1), (0, 36), xycoords="axes fraction", textcoords="offset points", fontsize=9.5, color=FAINT
    )
