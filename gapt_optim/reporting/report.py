"""One page for a run or several: a summary, first aid, charts over steps and by layer, settings side by side."""

from __future__ import annotations

import html
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from pandas import DataFrame, Series

from .._display.page import Page, bullets
from .._display.pictures import color_of, draw_charts
from .._display.tables import MISSING, html_table, number, with_minus
from .charts import RunCharts
from .doctor import diagnose, judged_by, verdict
from .run import Run, each_seed, flat, is_again, mean_of_last, of_interest, share_in_compression, switches

Runs = Mapping[str, Run | Sequence[Run]]


def write_report(
    runs: Runs, path: str | os.PathLike[str], *, baseline: str | None = None, title: str = "Training with phases"
) -> Path:
    """Write one self-contained HTML page that compares the runs. It opens without a network.

    Long runs are downsampled, keeping the highest and the lowest value of each stretch; every switch of phase is kept.

    >>> steps = [
    ...     {"step": i, "phase": "compression" if i > 5 else "memorization", "loss": 3 - i / 10, "entropy": 1.5,
    ...      "layer_entropy": {"h.0": 1.6, "h.1": 1.4}, "alignment": {"cosine": 0.1 * (-1) ** i}}
    ...     for i in range(1, 11)
    ... ]
    >>> from gapt_optim.reporting import Run
    >>> write_report({"gapt": Run.of(steps)}, "report.html").name
    'report.html'

    Args:
        runs: by name. Several under one name are seeds of one run: their mean is drawn, with a band from the lowest to
            the highest.
        path: of the page.
        baseline: the run that the others are compared with; by default ``plain`` where there is one, else the first.
        title: heading of the page.

    Raises:
        ValueError: ``runs`` is empty, or ``baseline`` is none of them.
        ImportError: plotly is not installed.
    """
    return report_page(runs, baseline=baseline, title=title).write(path)


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
    if not runs:
        raise ValueError("runs is empty; pass at least one run, for example {'gapt': read_run(folder)}")
    main = main or of_interest(runs) or list(runs)[-1]
    if main not in runs:
        raise ValueError(f"main={main!r} is none of the runs {list(runs)}")
    place = list(runs).index(main)
    seeds = {name: [run] for name, run in runs.items()}
    charts = RunCharts(seeds, [color_of(name, i) for i, name in enumerate(runs)], "plain")
    shown = [*charts.over_steps(("loss", "entropy")), *charts.alignment()[:1]]
    shown += [chart for chart in charts.layer_maps() if chart.run == place]
    share = share_in_compression(runs[main].steps)
    shaded = f"shaded: compression of {main}, {share:.0%} of its steps" if share > 0 else "no step in compression"
    heading = f"{title or ', '.join(runs)} ({shaded})"
    return draw_charts(shown or [charts.chart("loss")], path, title=heading, phases=place)


def report_page(runs: Runs, *, baseline: str | None = None, title: str = "Training with phases") -> Page:
    """The page of :func:`write_report`, not yet written."""
    seeds = {name: [run] if isinstance(run, Run) else list(run) for name, run in runs.items()}
    if not seeds or not all(seeds.values()):
        raise ValueError("runs is empty, or a name in it has none; pass at least one, as {'gapt': read_run(folder)}")
    if baseline is None:
        baseline = "plain" if "plain" in seeds else next(iter(seeds))
    if baseline not in seeds:
        raise ValueError(f"baseline={baseline!r} is none of the runs {list(seeds)}")
    colors = [color_of(name, place) for place, name in enumerate(seeds)]
    charts = RunCharts(seeds, colors, baseline)
    shaded = of_interest({name: histories[0] for name, histories in seeds.items()})
    phases = None if shaded is None else list(seeds).index(shaded)
    page = Page(title, _subtitle(seeds), list(zip(seeds, colors, strict=True)), phases)
    page.add("What is missing", bullets(_notes(seeds)))
    said = "At the end: the last held-out values where there are some, else means over the last training steps."
    compared = f" Changes are against {baseline}." if len(seeds) > 1 else ""
    page.add("Summary", html_table(summary(seeds, baseline), said + compared))
    page.add("First aid", _first_aid(seeds))
    page.add("Over the steps", _how_to_read(seeds, baseline, shaded), charts.over_steps())
    page.add("By layer", "", charts.layer_maps())
    if alignment := charts.alignment():
        page.add("Angle between the gradients", _alignment(seeds), alignment)
    page.add("Settings", _settings(seeds))
    return page


def summary(runs: Mapping[str, Sequence[Run]], baseline: str) -> DataFrame:
    """A row per run: means over its seeds of what it ended with, and the change from the baseline.

    >>> from gapt_optim.reporting import Run
    >>> summary({"plain": [Run.of([{"step": 1, "loss": 2.0}])]}, "plain").loc["plain", "loss"]
    '2.000'
    """
    every = [run for seeds in runs.values() for run in seeds]
    held_out = any(run.held_out.loss.notna().any() for run in every)
    columns = {"loss": "held-out loss" if held_out else "loss", "entropy": "pressed entropy",
               "linear_entropy": "linear entropy", "centered_cosine_entropy": "centred cosine entropy",
               "norm_ratio": "norm ratio", "mean_share": "mean share"}  # fmt: skip
    shown = {column: title for column, title in columns.items() if not all(is_again(run, column) for run in every)}
    means = DataFrame(
        {name: {title: mean_of_last(seeds, column) for column, title in shown.items()} for name, seeds in runs.items()}
    ).T.dropna(axis=1, how="all")
    table = means.map(lambda value: number(value, 4))
    changes = means / means.loc[baseline] - 1
    for name in set(runs) - {baseline}:
        for title in table.columns:
            if np.isfinite(changes.loc[name, title]):
                table.loc[name, title] += with_minus(f" ({changes.loc[name, title]:+.1%})")
    table.insert(0, "steps", [f"{max(len(run.steps) for run in seeds):,}" for seeds in runs.values()])
    table["in compression"] = [_share(seeds) for seeds in runs.values()]
    table["switches"] = [_switches(seeds) for seeds in runs.values()]
    table.index = [f"{name} ({len(seeds)} seeds)" if len(seeds) > 1 else name for name, seeds in runs.items()]
    return table


def _share(seeds: Sequence[Run]) -> str:
    share = float(Series([share_in_compression(run.steps) for run in seeds]).mean())
    return MISSING if np.isnan(share) else f"{share:.0%}"


def _switches(seeds: Sequence[Run]) -> str:
    """How many by reason, in all seeds."""
    counts = Series([reason for run in seeds for reason in switches(run.steps).reason], dtype=object).value_counts()
    return ", ".join(f"{count} {reason}" for reason, count in counts.items()) or "none"


def _subtitle(runs: Mapping[str, Sequence[Run]]) -> str:
    every = [run for seeds in runs.values() for run in seeds]
    of_seeds = f" ({len(every)} with their seeds)" if len(every) > len(runs) else ""
    steps = sum(len(run.steps) for run in every)
    return f"{len(runs)} run{'s' * (len(runs) > 1)}{of_seeds}, {steps:,} step{'s' * (steps != 1)}."


def _notes(runs: Mapping[str, Sequence[Run]]) -> list[str]:
    return [
        f"<b>{html.escape(name)}</b>{seed}: {html.escape(note)}"
        for name, seed, run in each_seed(runs)
        for note in (run.notes or (() if len(run.steps) else ("no step is there yet",)))
    ]


def _first_aid(runs: Mapping[str, Sequence[Run]]) -> str:
    parts = []
    for name, seed, run in each_seed(runs):
        found = diagnose(run)
        if not found and run is not runs[name][0]:
            continue
        items = []
        for one in found:
            title, what, why, change = map(
                html.escape, (one.finding.title, one.what, one.finding.why, one.finding.change)
            )
            items.append(f"<b>{title}.</b> {what} {why}<br><b>Change:</b> {change}")
        basis = "".join(f"<p>{html.escape(sentence)}.</p>" for sentence in judged_by(run))
        text = bullets(items) or f"<p>{html.escape(verdict(run))}</p>"
        parts.append(f"<h3>{html.escape(name)}{seed}</h3>{basis}{text}")
    return "".join(parts)


def _how_to_read(runs: Mapping[str, Sequence[Run]], baseline: str, shaded: str | None) -> str:
    said = "Thin lines are training steps, thicker ones their running mean, lines with dots held-out values."
    if any(len(seeds) > 1 for seeds in runs.values()):
        said += " Of several seeds: their mean, and a band from the lowest to the highest."
    if len(runs) > 1:
        said += f" Wide and pale: {baseline}."
    if shaded is None:
        return f"<p>{html.escape(said)} No run was in compression.</p>"
    of_run = f" of {shaded}" if len(runs) > 1 else ""
    said += f" Shaded: compression{of_run}. Triangles are switches of phase, with the reason on hover."
    return f"<p>{html.escape(said)}</p>"


def _alignment(runs: Mapping[str, Sequence[Run]]) -> str:
    """What the angle was in each phase, and how often it changed its sign."""
    rows = {}
    for name, seeds in runs.items():
        cosines = [run.steps.alignment.dropna() for run in seeds]
        if not any(map(len, cosines)):
            continue
        means = DataFrame([run.steps.groupby("phase").alignment.mean() for run in seeds]).mean()
        changed = sum(int((np.diff(np.sign(values)) != 0).sum()) for values in cosines)
        rows[name] = {
            "mean cosine in memorization": number(means.get("memorization")),
            "mean cosine in compression": number(means.get("compression")),
            "changes of sign": f"{changed:,}",
        }
    said = "Between the loss gradient and the entropy gradient: above 0 they agree, below 0 compression costs loss."
    return f"<p>{said}</p>" + (html_table(DataFrame(rows).T) if rows else "")


def _settings(runs: Mapping[str, Sequence[Run]]) -> str:
    """Those that differ, and behind a click all of them."""
    found = DataFrame({name: Series(flat(seeds[0].settings), dtype=object) for name, seeds in runs.items()})
    if found.empty:
        return "<p>No run folder holds its settings.</p>"
    shown = found.map(lambda value: MISSING if value is None or value != value else str(value))
    everything = f'<div class="settings">{html_table(shown)}</div>'
    if len(runs) < 2:
        return everything
    differing = shown[shown.nunique(axis=1) > 1]
    table = f'<div class="settings">{html_table(differing)}</div>' if len(differing) else ""
    differ = f"<p>{len(differing)} setting{'s' * (len(differing) != 1)} differ{'s' * (len(differing) == 1)}.</p>"
    return f"{differ}{table}<details><summary>All {len(shown)} settings</summary>{everything}</details>"
