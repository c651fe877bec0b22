"""Pictures from what a run wrote down: loss and entropy with the phases, entropy per layer, alignment.

Read a run with `read_run`, draw it with one of the ``draw_`` functions. They need matplotlib.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .charts import (
    FAINT,
    INK,
    SHADE,
    add_title,
    cell_edges,
    chart_style,
    color_of,
    fit_after_the_start,
    import_matplotlib,
    label_ends,
    name_switches,
    save_figure,
    shade_compression,
    subplots,
    with_minus,
)
from .history import (
    Record,
    RunHistory,
    compression_spans,
    cosines_of,
    last_value,
    layer_rows,
    read_metrics,
    read_run,
    sign_changes,
    smoothed,
    values_of,
)

__all__ = [
    "RunHistory",
    "compression_spans",
    "draw_alignment",
    "draw_entropy_map",
    "draw_training",
    "read_metrics",
    "read_run",
    "sign_changes",
]


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

    >>> steps = [
    ...     {"step": i, "phase": "compression" if i > 5 else "memorization", "loss": 3 - i / 10, "entropy": 1.5,
    ...      "layer_entropy": {"h.0": 1.6, "h.1": 1.4}, "alignment": {"cosine": 0.1 * (-1) ** i, "layers": {}}}
    ...     for i in range(1, 11)
    ... ]
    >>> run = RunHistory(steps)
    >>> picture = draw_training({"gapt": run}, "draw_training.png")
    """
    mpl = import_matplotlib()
    main = _main_run(runs, main)
    with mpl.rc_context(chart_style()):
        figure, (top, bottom) = subplots(mpl, 2, 1, (9.6, 6.0), sharex=True, gridspec_kw={"hspace": 0.12})
        labels: dict[Any, list[tuple[float, str, str]]] = {top: [], bottom: []}
        for axes, key in ((top, "loss"), (bottom, "entropy")):
            base = last_value(runs["plain"], key) if "plain" in runs and main != "plain" else None
            for number, (name, run) in enumerate(runs.items()):
                color = color_of(name, number)
                emphasis = name == main
                _draw_values(axes, run, key, color, emphasis)
                last = last_value(run, key)
                if last is not None:
                    change = f" ({last / base - 1:+.1%})" if base and name != "plain" else ""
                    labels[axes].append((last, with_minus(f"{name}  {last:.2f}{change}"), color))
            shade_compression(axes, runs[main].steps)
            axes.set_xlim(0, 1.004 * max((record["step"] for run in runs.values() for record in run.steps), default=1))
            axes.grid(axis="y")
        fit_after_the_start(top, [*(values_of(run.validations, "loss") for run in runs.values()),
                                   *(values_of(run.steps, "loss") for run in runs.values())])  # fmt: skip
        bottom.set_ylim(bottom=0.0, top=1.06 * bottom.get_ylim()[1])
        top.set_ylabel("cross-entropy (nats)")
        bottom.set_ylabel("matrix entropy (nats)")
        bottom.set_xlabel("step")
        name_switches(top, runs[main].steps)
        for axes, names in labels.items():
            label_ends(axes, names)
        figure.align_ylabels([top, bottom])
        add_title(top, title, _phase_summary(main, runs[main].steps))
        return save_figure(figure, path)


def draw_entropy_map(
    runs: Mapping[str, RunHistory], path: str | os.PathLike[str], *, title: str = "Matrix entropy of each layer"
) -> Path:
    """Entropy per layer over steps as a heat map per run, on one scale; the phases are the strip above each.

    >>> steps = [
    ...     {"step": i, "phase": "compression" if i > 5 else "memorization", "loss": 3 - i / 10, "entropy": 1.5,
    ...      "layer_entropy": {"h.0": 1.6, "h.1": 1.4}, "alignment": {"cosine": 0.1 * (-1) ** i, "layers": {}}}
    ...     for i in range(1, 11)
    ... ]
    >>> run = RunHistory(steps)
    >>> picture = draw_entropy_map({"gapt": run}, "draw_entropy_map.png")
    """
    import numpy as np

    mpl = import_matplotlib()
    from matplotlib.ticker import MaxNLocator

    shown = {name: rows for name, run in runs.items() if (rows := layer_rows(run))}
    if not shown:
        raise ValueError("no run holds layer entropies, so there is nothing to draw; pass runs trained with a hook")
    every_value = [value for rows in shown.values() for _, layers in rows for value in layers.values()]
    low, high = 0.0, float(np.nanpercentile(np.array(every_value, dtype=float), 99.5))
    with mpl.rc_context(chart_style()):
        columns = len(shown)
        layers = len(next(iter(shown.values()))[0][1])
        width, height = max(7.0, 4.2 * columns), min(7.0, 2.2 + 0.42 * layers)
        figure, grid = subplots(
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
                cell_edges(steps),
                np.arange(len(names) + 1),
                values,
                cmap="viridis",
                vmin=low,
                vmax=high,
                rasterized=True,
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
            strip.set_title(name, loc="left", color=color_of(name, column), fontweight="bold", fontsize=11, pad=6)
        assert mesh is not None
        bar = figure.colorbar(mesh, ax=grid.ravel().tolist(), pad=0.015, aspect=24)
        bar.set_label("nats")
        bar.outline.set_visible(False)
        figure.suptitle(title, x=0.01, ha="left", y=1.0, va="bottom", fontweight="bold", fontsize=13, color=INK)
        note = "strip above: blue = compression, grey = memorization"
        figure.text(0.01, 0.985, note, ha="left", va="top", color=FAINT, fontsize=9)
        return save_figure(figure, path)


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

    >>> steps = [
    ...     {"step": i, "phase": "compression" if i > 5 else "memorization", "loss": 3 - i / 10, "entropy": 1.5,
    ...      "layer_entropy": {"h.0": 1.6, "h.1": 1.4}, "alignment": {"cosine": 0.1 * (-1) ** i, "layers": {}}}
    ...     for i in range(1, 11)
    ... ]
    >>> run = RunHistory(steps)
    >>> picture = draw_alignment({"gapt": run}, "draw_alignment.png")
    """
    mpl = import_matplotlib()
    main = _main_run(runs, main)
    with mpl.rc_context(chart_style()):
        layers = {record["step"]: (record.get("alignment") or {}).get("layers") or {} for record in runs[main].steps}
        names = list(max(layers.values(), key=len, default={}))
        figure, grid = subplots(
            mpl, 2 if names else 1, 1, (9.6, 6.2 if names else 3.8), squeeze=False, sharex=True,
            gridspec_kw={"hspace": 0.12, "height_ratios": (3, 2) if names else (1,)},
        )  # fmt: skip
        axes = grid[0][0]
        labels = []
        any_activation = any_parameter = False
        for number, (name, run) in enumerate(runs.items()):
            color = color_of(name, number)
            activation = cosines_of(run.steps, "alignment")
            parameter = cosines_of(run.steps, "parameter_alignment")
            any_activation, any_parameter = any_activation or bool(activation), any_parameter or bool(parameter)
            if activation:
                axes.plot(*zip(*activation, strict=True), color=color, lw=0.7, alpha=0.35)
                smooth = smoothed(activation)
                axes.plot(*zip(*smooth, strict=True), color=color, lw=1.8)
                labels.append((smooth[-1][1], with_minus(f"{name}  {smooth[-1][1]:+.2f}"), color))
            if parameter:
                axes.plot(*zip(*parameter, strict=True), "o", ms=3.5, color=color, mec="white", mew=0.5)
        if not (any_activation or any_parameter):
            raise ValueError("no run holds alignment; train with AlignmentConfig(activation=True) or parameter_every")
        shade_compression(axes, runs[main].steps)
        axes.axhline(0.0, color=FAINT, lw=0.8)
        axes.grid(axis="y")
        axes.margins(x=0.0)
        axes.set_ylabel("cosine")
        flips = sign_changes(runs[main].steps)
        axes.plot(
            flips, [0.0] * len(flips), "|", ms=7, mew=0.7, color=color_of(main, 0), transform=axes.get_xaxis_transform()
        )
        label_ends(axes, labels)
        name_switches(axes, runs[main].steps)
        note = "lines: at the layers' outputs, dots: of the parameters, " if any_parameter else ""
        add_title(axes, title, f"{note}ticks: {len(flips)} sign changes, {_phase_summary(main, runs[main].steps)}")
        grid[-1][0].set_xlabel("step")
        if names:
            _draw_layer_cosines(figure, grid[1][0], layers, names)
        return save_figure(figure, path)


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


def _main_run(runs: Mapping[str, RunHistory], main: str | None) -> str:
    if not runs:
        raise ValueError("runs is empty; pass at least one run, for example {'gapt': read_run(folder)}")
    if main is None:
        return list(runs)[-1]
    if main not in runs:
        raise ValueError(f"main={main!r} is none of the runs {list(runs)}")
    return main


def _draw_values(axes: Any, run: RunHistory, key: str, color: str, emphasis: bool) -> None:
    steps, held_out = values_of(run.steps, key), values_of(run.validations, key)
    if steps and (emphasis or not held_out):
        axes.plot(*zip(*steps, strict=True), color=color, lw=0.8, alpha=0.35)
    if steps and not held_out:
        axes.plot(*zip(*smoothed(steps), strict=True), color=color, lw=1.8)
    if held_out:
        size = 4.5 if len(held_out) <= 40 else 0.0
        axes.plot(
            *zip(*held_out, strict=True), color=color, lw=2.2 if emphasis else 1.6, marker="o", ms=size, mec="white",
            mew=0.8, zorder=4 if emphasis else 3, clip_on=True,
        )  # fmt: skip


def _phase_summary(name: str, steps: Sequence[Record]) -> str:
    if not steps:
        return ""
    share = sum(record.get("phase") == "compression" for record in steps) / len(steps)
    switches = sum(record.get("reason") is not None for record in steps)
    return f"shaded: compression phases of {name} ({share:.0%} of steps, {switches} switches)"
