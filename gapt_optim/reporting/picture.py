"""One picture of a run or several, by matplotlib."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from .._display.pictures import FAINT, SHADE, STYLE, color_of, save_figure
from .._display.tables import with_minus
from .charts import blocks, short_names, with_noise
from .run import Run, compression_spans, last_value, of_interest, pressed_entropy, share_in_compression, smoothed


def draw_runs(
    runs: Mapping[str, Run], path: str | os.PathLike[str], *, main: str | None = None, title: str = ""
) -> Path:
    """Loss, entropy, the angle between the gradients and the entropy by layer, each where a run has it.

    >>> steps = [
    ...     {"step": i, "phase": "compression" if i > 5 else "memorization", "loss": 3 - i / 10, "entropy": 1.5,
    ...      "layer_entropy": {"h.0": 1.6, "h.1": 1.4}, "alignment": {"cosine": 0.1 * (-1) ** i}}
    ...     for i in range(1, 11)
    ... ]
    >>> from gapt_optim.reporting import Run
    >>> draw_runs({"gapt": Run.of(steps)}, "run.png").name
    'run.png'

    Args:
        runs: by name.
        path: of the picture; its suffix says in which format (``.png``, ``.pdf``, ``.svg``).
        main: the run whose phases are shaded and whose layers are shown; by default the last that compressed.
        title: of the picture.

    Raises:
        ValueError: ``runs`` is empty, or ``main`` is none of them.
        ImportError: matplotlib is not installed.
    """
    import matplotlib as mpl
    from matplotlib.figure import Figure  # without pyplot: needs no display, and leaves the caller's backend alone

    if not runs:
        raise ValueError("runs is empty; pass at least one run, for example {'gapt': read_run(folder)}")
    main = main or of_interest(runs) or list(runs)[-1]
    if main not in runs:
        raise ValueError(f"main={main!r} is none of the runs {list(runs)}")
    columns = [column for column in ("loss", "entropy") if any(run.has(column) for run in runs.values())] or ["loss"]
    if any(run.steps[column].notna().any() for run in runs.values() for column in ("alignment", "parameter_alignment")):
        columns.append("alignment")
    layers = runs[main].layers.get("entropy")
    with mpl.rc_context(STYLE):
        heights = [2.6] * len(columns) + ([] if layers is None else [min(4.0, 0.6 + 0.25 * layers.shape[1])])
        figure = Figure(figsize=(9.6, sum(heights) + 0.6), layout="constrained")
        grid = figure.subplots(len(heights), 1, sharex=True, squeeze=False, height_ratios=heights)[:, 0]
        drawn = sorted(runs.items(), key=lambda item: item[0] != "plain")  # below the others
        for axes, column in zip(grid, columns, strict=False):
            for first, last in compression_spans(runs[main].steps):
                axes.axvspan(first - 1, last, color=SHADE, alpha=0.10, lw=0)
            draw = _draw_alignment if column == "alignment" else _draw_curves
            draw(axes, dict(drawn), {name: color_of(name, i) for i, name in enumerate(runs)}, column)
            axes.grid(axis="y")
        if layers is not None:
            _draw_layers(figure, grid[-1], layers, pressed_entropy(runs[main]))
        grid[-1].set_xlim(0, max(run.end for run in runs.values()))
        grid[-1].set_xlabel("step")
        share = share_in_compression(runs[main].steps)
        shaded = f"shaded: compression of {main}, {share:.0%} of its steps" if share > 0 else "no step in compression"
        heading = title or ", ".join(runs)
        figure.suptitle(heading, x=0.01, ha="left", fontweight="bold", fontsize=13)
        grid[0].set_title(shaded, loc="left", color=FAINT, fontsize=9.5)
        return save_figure(figure, path)


def _draw_curves(axes: Any, runs: Mapping[str, Run], colors: Mapping[str, str], column: str) -> None:
    """Held-out values where there are some, and the running mean of training where not: one line per run."""
    base = last_value(runs["plain"], column) if "plain" in runs else float("nan")
    late = []
    for name, run in runs.items():
        held_out, trained = run.held_out[column].dropna(), run.steps[column].dropna()
        color, last = colors[name], last_value(run, column)
        if np.isnan(last):
            continue
        change = f" ({last / base - 1:+.1%})" if name != "plain" and base > 0 else ""
        wide = name == "plain" and len(runs) > 1
        style = {"color": color, "lw": 5 if wide else 1.8, "alpha": 0.5 if wide else 1.0}
        if len(held_out):
            style |= {"marker": "o", "ms": 4 if len(held_out) <= 60 else 0}
        values = held_out if len(held_out) else smoothed(trained)
        axes.plot(values.index, values, label=with_minus(f"{name}  {last:.3g}{change}"), **style)
        late.append(values[values.index >= 0.1 * values.index[-1]])
    of_held_out = [run.held_out[column].notna().any() for run in runs.values()]
    if all(of_held_out):
        _legend(axes, "held out")
    else:
        _legend(axes, "running mean of training" + ("\ndots: held out" if any(of_held_out) else ""))
    if column == "entropy":
        kernels = {pressed_entropy(run) for run in runs.values()} - {""}
        axes.set_ylabel("entropy (nats)")
        axes.set_title(" / ".join(sorted(kernels)), loc="left", color=FAINT, fontsize=9.5)
        axes.set_ylim(bottom=0.0)
        return
    axes.set_ylabel("loss (nats)")
    if late:  # the steep first tenth would flatten all the rest
        low, high = min(values.min() for values in late), max(values.max() for values in late)
        axes.set_ylim(low - 0.06 * ((high - low) or 1), high + 0.06 * ((high - low) or 1))


def _draw_alignment(axes: Any, runs: Mapping[str, Run], colors: Mapping[str, str], column: str) -> None:
    dotted = False
    for name, run in runs.items():
        color = colors[name]
        single, parameters = run.steps[column].dropna(), run.steps.parameter_alignment.dropna()
        if len(single):
            mean, spread = with_noise(single)
            axes.fill_between(mean.index, mean - spread, mean + spread, color=color, alpha=0.15, lw=0)
            axes.plot(mean.index, mean, color=color, lw=1.8, label=with_minus(f"{name}  {mean.iloc[-1]:+.2f}"))
        if len(parameters):
            dotted = True
            axes.plot(parameters.index, parameters, "o", ms=3, color=color, mec="white", mew=0.4)
    axes.axhline(0.0, color=FAINT, lw=0.8)
    axes.set_ylabel("cosine of loss and\nentropy gradient")
    _legend(axes, "line: running mean\nband: spread of single steps" + ("\ndots: of the parameters" if dotted else ""))


def _draw_layers(figure: Any, axes: Any, layers: Any, kernel: str) -> None:
    shown = blocks(layers, 500)
    steps = shown.index.to_numpy(dtype=float)
    before = max(0.0, steps[0] - (steps[1] - steps[0])) if len(steps) > 1 else 0.0
    mesh = axes.pcolormesh(
        np.concatenate([[before], steps]), np.arange(shown.shape[1] + 1), shown.to_numpy().T, cmap="viridis",
        vmin=0.0, vmax=float(np.nanquantile(shown, 0.995)), rasterized=True,
    )  # fmt: skip
    every = -(-shown.shape[1] // 16)
    axes.set_yticks(np.arange(0, shown.shape[1], every) + 0.5, short_names(shown)[::every])
    axes.invert_yaxis()  # as on the page, the first layer on top
    axes.set_ylabel("layer")
    axes.set_title(f"entropy of each layer{f', {kernel}' if kernel else ''}", loc="left", color=FAINT, fontsize=9.5)
    beside = axes.inset_axes((1.015, 0.0, 0.02, 1.0))
    figure.colorbar(mesh, cax=beside, label="nats").outline.set_visible(False)


def _legend(axes: Any, note: str) -> None:
    legend = axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), title=note)
    legend.get_title().set_color(FAINT)
    legend.get_title().set_fontsize(8)
    legend.set_alignment("left")
