"""The page: what stands in it, and in headless Chromium that it loads, draws and answers to its controls."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pandas import DataFrame, Series

from gapt_optim._display.page import Chart, label
from gapt_optim.reporting import Run, write_report
from gapt_optim.reporting.charts import blocks, extremes, with_noise
from gapt_optim.reporting.report import report_page, summary
from gapt_optim.reporting.run import compression_spans

from .browser import opened
from .runs import HOSTILE, held_out, history, records

pytest.importorskip("plotly", reason="plotly is not installed")

EMPTY = "return [...document.querySelectorAll('.js-plotly-plot')].filter(c => !c._fullData.some(t => t.visible)).length"
"""JavaScript: how many charts show nothing."""


def charts_of(runs: dict[str, Any], **options: Any) -> list[Chart]:
    return [chart for _, _, charts in report_page(runs, **options).sections for chart in charts]


def titled(charts: list[Chart], title: str) -> Chart:
    (found,) = [chart for chart in charts if chart.title == title]
    return found


def four_runs() -> dict[str, Any]:
    return {
        "plain": history({"objective": {"weight": 0.0}, "lr": 1e-3}, plain=True, seed=1),
        "gapt": history({"objective": {"weight": 0.1}, "lr": 1e-3}, seed=2),
        "seeds": [history(seed=seed) for seed in (3, 4, 5)],
        HOSTILE: history({HOSTILE: HOSTILE, "name": HOSTILE}, prefix=f"{HOSTILE}."),
    }


class Balanced(HTMLParser):
    """Fails where a tag closes that is not the last open one."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.tags.append(tag)
        if tag not in ("meta", "link", "input", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_report_holds_all_parts_and_no_outside_reference(tmp_path: Path) -> None:
    page = write_report(four_runs(), tmp_path / "sub" / "page.html", baseline="plain", title=HOSTILE).read_text()
    for heading in ("Summary", "First aid", "Over the steps", "By layer", "Angle between the gradients", "Settings"):
        assert f"<h2>{heading}</h2>" in page
    without_scripts = re.sub(r"<script.*?</script>", "", page, flags=re.DOTALL)
    assert not re.search(r"""(?:src|href)=(?!["']?data:)""", without_scripts.replace("src=x onerror", ""))
    assert "http" not in without_scripts
    parser = Balanced()
    parser.feed(page)
    assert parser.open == []
    assert "img" not in parser.tags
    assert "hacked=1</script>" not in page


def test_the_alignment_map_is_blue_where_gradients_agree() -> None:
    """The scale of that name goes the other way in plotly.js than in plotly for Python, which writes its colours."""
    import plotly.graph_objects as go

    trace = titled(charts_of({"gapt": history()}), "Cosine at each layer, gapt").traces[0]
    assert trace["zmin"] == -trace["zmax"]
    scale = go.Figure({"data": [trace]}).data[0]
    low, high = ([int(part) for part in scale.colorscale[end][1][4:-1].split(",")] for end in (0, -1))
    assert low[0] > low[2]  # more red than blue
    assert high[2] > high[0]
    assert not scale.reversescale


def test_every_switch_is_in_the_page_with_its_reason() -> None:
    run = history(steps=3000, period=20)
    traces = titled(charts_of({"gapt": run}), "Loss").traces
    (marks,) = [trace for trace in traces if trace["mode"] == "markers" and "text" in trace]
    assert marks["x"].tolist() == run.steps.index[run.steps.reason.notna()].tolist()
    assert marks["text"][0] == "plateau: compression from step 11"
    (shade,) = [trace for trace in traces if trace.get("fill") == "toself"]
    assert shade["x"].count(None) == len(compression_spans(run.steps)) - 1


def test_no_entropy_is_shown_twice() -> None:
    """Under the default kernel the pressed entropy is the centred cosine one."""
    rows = records(60)
    for record in rows:
        record["measures"] = {**record["measures"], "centered_cosine_entropy": record["entropy"]}
    run = Run.of(rows, settings={"entropy": {"kernel": "cosine", "center": True, "window": 8}})
    titles = [chart.title for chart in charts_of({"gapt": run})]
    assert "Pressed entropy" in titles
    assert "Cosine entropy, centred" not in titles
    assert "Linear entropy, not centred" in titles
    assert "Cosine kernel, centred, windows of 8." in titled(charts_of({"gapt": run}), "Pressed entropy").note
    assert "centred cosine entropy" not in summary({"gapt": [run]}, "gapt")
    both = [chart.title for chart in charts_of({"gapt": run, "other": history()})]
    assert "Cosine entropy, centred" in both  # it is another one for the other run


def test_the_baseline_lies_wide_and_pale_below_the_others() -> None:
    lines = [
        t for t in titled(charts_of({"gapt": history(), "plain": history()}), "Pressed entropy").traces if "line" in t
    ]
    held = [trace for trace in lines if "held out" in trace["name"]]
    assert [trace["name"] for trace in held] == ["plain, held out", "gapt, held out"]
    assert held[0]["line"]["width"] > 2 * held[1]["line"]["width"]
    assert held[0]["line"]["color"].endswith("0.5)")


def test_measures_of_every_tenth_step_are_connected() -> None:
    rows = records(200)
    for record in rows:
        if record["step"] % 10:
            del record["measures"]
    ratio = titled(charts_of({"gapt": Run.of(rows)}), "Norm ratio").traces[0]
    assert ratio["mode"] == "lines"
    assert ratio["x"].tolist() == [*range(10, 201, 10)]
    assert np.isfinite(ratio["y"]).all()


def test_summary_compares_with_the_baseline() -> None:
    runs = four_runs()
    table = summary({name: run if isinstance(run, list) else [run] for name, run in runs.items()}, "plain")
    change = runs["gapt"].held_out.loss.iloc[-1] / runs["plain"].held_out.loss.iloc[-1] - 1
    assert f"({change:+.1%})".replace("-", "\N{MINUS SIGN}") in table.loc["gapt", "held-out loss"]
    assert "seeds (3 seeds)" in table.index
    assert table.loc["plain", "switches"] == "none"
    assert table.loc["gapt", "switches"] == "4 plateau, 4 compressed"


def test_settings_that_differ_come_first() -> None:
    page = report_page({"a": history({"lr": 1, "deep": {"x": 2}}), "b": history({"lr": 3, "deep": {"x": 2}})})
    settings = page.sections[-1][1]
    differing, everything = settings.split("<details>")
    assert "1 setting differs." in differing
    assert "lr" in differing
    assert "deep.x" not in differing
    assert "deep.x" in everything


def test_runs_that_lack_something_are_drawn_and_it_is_said() -> None:
    bare = [{"step": step, "loss": 1.0} for step in (1, 2, 3)]
    runs = {"begun": Run.of([]), "bare": Run.of(bare)}
    html = report_page(runs).html()
    assert "<b>begun</b>: no step is there yet" in html
    assert "<b>bare</b>" not in html
    assert "No run was in compression" in html
    assert [chart.title for chart in charts_of(runs)] == ["Loss"]


def test_errors_name_the_argument() -> None:
    for runs in ({}, {"a": []}):
        with pytest.raises(ValueError, match="runs is empty"):
            report_page(runs)
    with pytest.raises(ValueError, match="baseline='c' is none of the runs"):
        report_page({"a": history()}, baseline="c")


@given(st.text(max_size=80))
def test_labels_hold_no_markup(text: str) -> None:
    shown = label(text)
    assert not set("<>") & set(shown)
    assert "%{" not in shown
    assert "$" not in shown


values = st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=400).map(
    lambda found: Series(found, index=range(1, len(found) + 1), dtype=float)
)


@given(values, st.integers(8, 60))
def test_downsampling_keeps_extremes_and_ends(whole: Any, limit: int) -> None:
    kept = extremes(whole, limit)
    assert len(kept) <= limit
    assert kept.index.is_monotonic_increasing
    assert kept.equals(whole[kept.index])
    assert (kept.min(), kept.max()) == (whole.min(), whole.max())
    assert {whole.index[0], whole.index[-1]} <= set(kept.index)


def test_heat_maps_average_stretches_and_keep_gaps() -> None:
    frame = DataFrame({"a": np.arange(1.0, 1001.0), "b": np.nan}, index=range(1, 1001))
    shown = blocks(frame, 500)
    assert (len(shown), shown.index[-1]) == (500, 1000)
    assert shown["a"].tolist()[:2] == [1.5, 3.5]
    assert shown["b"].isna().all()


def test_the_noise_is_that_of_single_steps() -> None:
    white = Series(np.random.default_rng(0).normal(0, 0.3, 5000))
    mean, spread = with_noise(white)
    assert float(spread.iloc[-1]) == pytest.approx(0.3, rel=0.2)
    assert float(mean.abs().max()) < 0.1
    assert float(with_noise(Series(np.zeros(50)))[1].max()) == 0.0


# In the browser


def test_report_in_the_browser(tmp_path: Path) -> None:
    page = write_report(four_runs(), tmp_path / "page.html", baseline="plain", title=HOSTILE)
    with opened(page) as view:
        assert view.console() == []
        assert [url for url in view.requests() if not url.startswith(("file:", "data:", "blob:"))] == []
        assert view.run("return [window.hacked, document.images.length]") == [None, 0]
        assert view.run("return document.title") == HOSTILE
        drawn = "return [...document.querySelectorAll('.plot')].filter(p => p.querySelector('.main-svg')).length"
        assert view.run(drawn) == view.run("return document.querySelectorAll('.plot').length") > 10
        assert view.run(EMPTY) == 0

        # A checkbox hides a run everywhere.
        shown = (
            "return [...document.querySelectorAll('.js-plotly-plot')].flatMap(c => c._fullData)"
            ".filter(t => t.meta && t.meta.run === 1 && t.visible === true).length"
        )
        assert view.run(shown) > 5
        view.run("document.querySelector('input[data-run=\"1\"]').click()")
        view.settle()
        assert view.run(shown) == 0
        assert view.run("return [...document.querySelectorAll('figure[data-run=\"1\"]')].every(f => f.hidden)")

        # The select changes whose phases are shaded, that beside a heat map what it shows, and its title says it.
        view.run("const s = document.getElementById('phases'); s.value = '2'; s.dispatchEvent(new Event('change'))")
        view.settle()
        phases = (
            "return [...new Set(document.getElementById('chart0')._fullData"
            ".filter(t => t.visible && 'phases' in (t.meta || {})).map(t => t.meta.phases))]"
        )
        assert view.run(phases) == [2]
        chosen = view.run(
            "const s = document.querySelector('select[id$=\"-view\"]'); s.value = 'norm_ratio';"
            "s.dispatchEvent(new Event('change'));"
            "const box = document.getElementById(s.id.replace('-view', ''));"
            "return [box._fullData.filter(t => t.type === 'heatmap' && t.visible).map(t => t.meta.view),"
            " box.closest('figure').querySelector('.view').textContent]"
        )
        assert chosen == [["norm_ratio"], "norm ratio"]

        # Charts over steps zoom together, and all is shown again.
        width = "const r = document.getElementById(arguments[0]).layout.xaxis.range; return r[1] - r[0]"
        assert view.run(width, "chart1") == 200
        view.run("Plotly.relayout('chart0', {'xaxis.range': [50, 100]})")
        view.settle()
        assert view.run(width, "chart1") == view.run(width, "chart2") == 50
        view.run("Plotly.relayout('chart0', {'xaxis.range': [0, 200]})")
        view.settle()
        assert view.run(width, "chart1") == 200

        # Dark and light.
        ground = "return getComputedStyle(document.body).backgroundColor"
        assert view.run(ground) == "rgb(255, 255, 255)"
        view.run("document.getElementById('theme').click()")
        view.settle()
        assert view.run(ground) == "rgb(13, 17, 23)"
        assert view.printed().startswith(b"%PDF")
        assert view.run(ground) == "rgb(13, 17, 23)"  # paper is light, the screen as it was
        assert view.console() == []


def test_every_control_and_chart_has_a_name_for_those_who_do_not_see_it(tmp_path: Path) -> None:
    page = write_report({"plain": history(plain=True), "gapt": history()}, tmp_path / "page.html")
    with opened(page, width=390, dark=True) as view:
        assert view.run("return document.documentElement.scrollWidth") <= 390
        assert view.run("return document.documentElement.dataset.theme") == "dark"
        unnamed = (
            "return [...document.querySelectorAll('button, select, input, [role=img], [role=region]')].filter(e =>"
            "!(e.getAttribute('aria-label') || e.textContent.trim() || (e.labels && e.labels[0].textContent.trim())))"
            ".length"
        )
        assert view.run(unnamed) == 0
        controls = "[...document.querySelectorAll('button, select, input, .plot, summary')]"
        assert view.run(f"return {controls}.filter(e => e.tabIndex < 0).length") == 0
        assert view.run(
            "return [...document.querySelectorAll('.plot')].every(e => e.getAttribute('aria-label').length > 30)"
        )


@pytest.mark.slow
def test_a_hundred_thousand_steps_of_48_layers(tmp_path: Path) -> None:
    """Under 10 MB, and every switch is there. How fast it opens is a benchmark's."""
    steps = records(100_000, layers=48, period=500, prefix="transformer.h.")
    run = Run.of(steps, held_out(steps))
    page = write_report({"gapt": run}, tmp_path / "page.html")
    assert page.stat().st_size < 10_000_000
    traces = titled(charts_of({"gapt": run}), "Loss").traces
    (marks,) = [trace for trace in traces if trace["mode"] == "markers" and "text" in trace]
    assert len(marks["x"]) == sum(record["reason"] is not None for record in steps)
    with opened(page, patience=120) as view:
        assert view.console() == []
