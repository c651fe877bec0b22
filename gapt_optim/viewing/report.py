"""One page for a run or several: tables, charts over steps and by layer, settings side by side, first aid."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from .charts import color_of
from .doctor import diagnose, judged_by, verdict
from .history import (
    RunHistory,
    compression_spans,
    layer_rows,
    switches_of,
    values_of,
)
from .page import Markup, Page, escaped, number, table, write_page
from .run_charts import RunCharts, finals, layer_signs, plain_mean, share_in_compression

Runs = Mapping[str, "RunHistory | Sequence[RunHistory]"]


def write_report(
    runs: Runs,
    path: str | os.PathLike[str],
    *,
    baseline: str | None = None,
    title: str = "Training with phases",
) -> Path:
    """Write one self-contained HTML page that compares the runs. It opens without a network.

    Long runs are downsampled, keeping the highest and the lowest value of each stretch; every switch of phase is kept.

    >>> steps = [
    ...     {"step": i, "phase": "compression" if i > 5 else "memorization", "loss": 3 - i / 10, "entropy": 1.5,
    ...      "layer_entropy": {"h.0": 1.6, "h.1": 1.4}, "alignment": {"cosine": 0.1 * (-1) ** i, "layers": {}}}
    ...     for i in range(1, 11)
    ... ]
    >>> run = RunHistory(steps)
    >>> write_report({"gapt": run}, "report.html").name
    'report.html'

    Args:
        runs: by name. Several histories under one name are seeds of one run: their mean is drawn, with a band from the
            lowest to the highest.
        path: of the page.
        baseline: the run that the others are compared with; by default ``plain`` where there is one, else the first.
        title: heading of the page.

    Returns:
        The path.

    Raises:
        ValueError: ``runs`` is empty, or ``baseline`` is none of them.
        ImportError: plotly is not installed.
    """
    return write_page(report_page(runs, baseline=baseline, title=title), path)


def report_page(runs: Runs, *, baseline: str | None = None, title: str = "Training with phases") -> Page:
    """The page of :func:`write_report`, not yet written."""
    if not runs:
        raise ValueError("runs is empty; pass at least one run, for example {'gapt': read_run(folder)}")
    seeds = {name: [run] if isinstance(run, RunHistory) else list(run) for name, run in runs.items()}
    for name, histories in seeds.items():
        if not histories:
            raise ValueError(f"run {name!r} has no history; pass at least one")
    if baseline is None:
        baseline = "plain" if "plain" in seeds else next(iter(seeds))
    if baseline not in seeds:
        raise ValueError(f"baseline={baseline!r} is none of the runs {list(seeds)}")
    return _Report(seeds, baseline, title).page()


class _Report:
    def __init__(self, runs: dict[str, list[RunHistory]], baseline: str, title: str) -> None:
        self.runs, self.baseline = runs, baseline
        self.colors = [color_of(name, i) for i, name in enumerate(runs)]
        self.end = max((record["step"] for run in self._all() for record in run.steps), default=1)
        self.end = max([self.end, *(record["step"] for run in self._all() for record in run.validations)])
        self.charts = RunCharts(runs, self.colors, self.end)
        spans = [sum(len(compression_spans(run.steps)) for run in histories) for histories in runs.values()]
        # The last run is the one of interest, as in the pictures, unless it never compressed.
        compressed = [i for i, count in enumerate(spans) if count]
        self.main = compressed[-1] if compressed else None
        self.page_ = Page(title, self._subtitle(), list(zip(runs, self.colors, strict=True)), self.main)

    def _all(self) -> Iterable[RunHistory]:
        return (run for histories in self.runs.values() for run in histories)

    def _subtitle(self) -> str:
        steps = sum(len(run.steps) for run in self._all())
        seeds = sum(map(len, self.runs.values()))
        of_seeds = f" ({seeds} with their seeds)" if seeds > len(self.runs) else ""
        versions = sorted({run.version for run in self._all() if run.version})
        made = f", trained with gapt_optim {' and '.join(versions)}" if versions else ""
        return f"{_count(len(self.runs), 'run')}{of_seeds}, {_count(steps, 'step')}{made}."

    def page(self) -> Page:
        page = self.page_
        if notes := self._notes():
            page.add("notes", "What is missing", f'<ul class="notes">{notes}</ul>')
        page.add("summary", "Summary", self._summary())
        page.add("findings", "First aid", self._findings())
        page.add("steps", "Over the steps", self._phases_line(), self.charts.over_steps())
        page.add("phases", "Phases", "", self.charts.phases())
        if maps := self.charts.layer_maps():
            note = (
                "<p>One row per layer, the first at the top. The strip above shows the phases: blue is compression.</p>"
            )
            page.add("layers", "By layer", note, maps)
        if alignment := self.charts.alignment():
            note = (
                "<p>The cosine between the loss gradient and the entropy gradient: above 0 they agree, below 0 "
                "compression "
                "costs loss.</p>"
            )
            page.add("alignment", "Alignment", note + self._sign_table(), alignment)
        page.add("settings", "Settings", self._settings())
        return page

    def _notes(self) -> str:
        items = []
        for name, histories in self.runs.items():
            for i, run in enumerate(histories):
                of_seed = f", seed {i + 1} of {len(histories)}" if len(histories) > 1 else ""
                items += [f"<li><b>{escaped(name)}</b>{of_seed}: {escaped(note)}</li>" for note in run.notes]
                if not run.steps and not run.notes:
                    items.append(f"<li><b>{escaped(name)}</b>{of_seed}: no step is there yet</li>")
        versions = {run.version for run in self._all()}
        if len(versions) > 1:
            shown = " and ".join(sorted("an unnamed version" if v is None else f"version {v}" for v in versions))
            items.append(f"<li>The runs were made by {escaped(shown)}; fields may differ.</li>")
        return "".join(items)

    def _summary(self) -> str:
        columns = ["run", "steps", "held-out loss" if self._held_out() else "loss", "entropy", "linear entropy",
                   "centred cosine entropy", "norm ratio", "mean share", "in compression", "switches"]  # fmt: skip
        rows: list[list[object]] = []
        base = self.runs[self.baseline]
        for name, histories in self.runs.items():
            several = f" ({len(histories)} seeds)" if len(histories) > 1 else ""
            row: list[object] = [f"{name}{several}", f"{max((len(run.steps) for run in histories), default=0):,}"]
            for key in ("loss", "entropy", "measures.linear_entropy", "measures.centered_cosine_entropy"):
                row.append(_with_change(finals(histories, key), finals(base, key), name != self.baseline))
            row += [plain_mean(finals(histories, f"measures.{key}")) for key in ("norm_ratio", "mean_share")]
            shares = [share_in_compression(run.steps) for run in histories if run.steps]
            row.append(f"{fmean(shares):.0%}" if shares else number(None))
            row.append(f"{fmean(len(switches_of(run.steps)) for run in histories):g}")
            rows.append(row)
        keep = [i for i in range(len(columns)) if i < 2 or any(row[i] != number(None) for row in rows)]
        rows = [[row[i] for i in keep] for row in rows]
        held = "the last held-out values where there are some, else means over the last training steps"
        caption = f"At the end: {held}. Changes are against {self.baseline}."
        return table([columns[i] for i in keep], rows, caption)

    def _held_out(self) -> bool:
        return any(values_of(run.validations, "loss") for run in self._all())

    def _findings(self) -> str:
        parts = []
        for name, histories in self.runs.items():
            many = len(histories) > 1
            for i, run in enumerate(histories):
                found = diagnose(run)
                of_seed = f", seed {i + 1}" if many else ""
                if not found and many and i:
                    continue
                items = "".join(
                    f"<li><b>{escaped(one.title)}.</b> {escaped(one.what)} {escaped(one.why)} "
                    f'<span class="change-line"><b>Change:</b> {escaped(one.change)}</span></li>'
                    for one in found
                )
                text = f'<ul class="findings">{items}</ul>' if items else f"<p>{escaped(verdict(run, found))}</p>"
                basis = "".join(f"<p>{escaped(sentence)}.</p>" for sentence in judged_by(run))
                parts.append(f"<h3>{escaped(name)}{of_seed}</h3>{basis}{text}")
        return "".join(parts)

    def _settings(self) -> str:
        flat = {name: _flat(histories[0].settings) for name, histories in self.runs.items()}
        keys = sorted({key for settings in flat.values() for key in settings})
        if not keys:
            return "<p>No run folder holds its settings.</p>"
        rows = []
        differing = 0
        for key in keys:
            values = [settings.get(key) for settings in flat.values()]
            differs = any(value != values[0] for value in values)
            differing += differs
            cells = "".join(f"<td>{escaped(_shown(value))}</td>" for value in values)
            mark = "differs" if differs else "same"
            said = '<td class="said">differs</td>' if differs else "<td></td>"
            rows.append(
                f'<tr class="{mark}"><th scope="row">{escaped(key)}</th>{cells}{said if len(flat) > 1 else ""}</tr>'
            )
        names = "".join(f'<th scope="col">{escaped(name)}</th>' for name in flat)
        several = len(flat) > 1
        head = f'<tr><th scope="col">setting</th>{names}{"<th scope=col></th>" if several else ""}</tr>'
        choose, kind = "", "settings all"
        if several:
            kind = "settings" if differing else "settings all"
            checked = "" if differing else " checked"
            choose = (
                f"<p>{_count(differing, 'setting')} differ{'s' if differing == 1 else ''}. <label "
                'class="no-print"><input '
                f'type="checkbox" id="all-settings"{checked}> Show all {len(keys)}</label></p>'
            )
        return (
            f'{choose}<div class="scroll" tabindex="0" role="region" aria-label="Settings"><table '
            f'class="{kind}"><thead>'
            f"{head}</thead><tbody>{''.join(rows)}</tbody></table></div>"
        )

    def _phases_line(self) -> str:
        if self.main is None:
            return "<p>No run was in compression.</p>"
        return (
            "<p>Shaded: compression. Triangles mark the switches of phase, with the reason on hover. Thin lines "
            "are training "
            "steps, thick ones their running mean, dots held-out values.</p>"
        )

    def _sign_table(self) -> str:
        tables = {}
        for name, histories in self.runs.items():
            if per_layer := layer_rows(histories[0], "cosine"):
                tables[name] = layer_signs(per_layer)
        if not tables:
            return ""
        layers = list(dict.fromkeys(layer for counts in tables.values() for layer in counts))
        rows = [
            [layer, *(f"{tables[n][layer][1]:,}" if layer in tables[n] else "" for n in tables)] for layer in layers
        ]
        inner = table(["layer", *tables], rows, "Steps at which the cosine at a layer changed its sign")
        return f"<details><summary>Sign changes by layer</summary>{inner}</details>"


def _with_change(values: Sequence[float], base: Sequence[float], compared: bool) -> str:
    if not values:
        return number(None)
    mean = fmean(values)
    text = number(mean, 4)
    if compared and base and fmean(base):
        percent = f"{mean / fmean(base) - 1:+.1%}".replace("-", "\N{MINUS SIGN}")
        return Markup(f'{escaped(text)} <span class="change">({escaped(percent)})</span>')
    return text


def _flat(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in settings.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping) and value:
            flat |= _flat(value, f"{name}.")
        else:
            flat[name] = value
    return flat


def _shown(value: Any) -> str:
    return "\N{EN DASH}" if value is None else str(value)


def _count(number_of: int, what: str) -> str:
    return f"{number_of:,} {what}{'' if number_of == 1 else 's'}"
