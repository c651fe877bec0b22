"""The pages: what stands in them, and in headless Chromium that they load, draw and answer to mouse and keyboard."""

from __future__ import annotations

import base64
import gzip
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from torch import nn, randn

from gapt_optim.viewing import RunHistory, profile, write_profile, write_report
from gapt_optim.viewing.downsampling import band, extremes, heat_map, thinned
from gapt_optim.viewing.page import label, render
from gapt_optim.viewing.report import report_page

from .browser import opened
from .runs import HOSTILE, history, records

plotly = pytest.importorskip("plotly", reason="plotly is not installed")


EMPTY = "return window.gapt.charts.filter(c =>!document.getElementById(c.id)._fullData.some(t => t.visible)).length"
"""JavaScript: how many charts show nothing."""


def charts_of(page: str) -> list[dict[str, Any]]:
    packed = re.search(r'id="charts">([^<]*)<', page)
    assert packed is not None
    charts: list[dict[str, Any]] = json.loads(gzip.decompress(base64.b64decode(packed[1])))
    return charts


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
    for heading in ("Summary", "First aid", "Over the steps", "Phases", "By layer", "Alignment", "Settings"):
        assert f">{heading}</h2>" in page
    outside = re.sub(r'<script type="text/plain".*?</script>', "", page, flags=re.DOTALL)
    assert not re.search(r"""(?:src|href)=(?!["']?(?:#|data:))""", outside.replace("src=x onerror", ""))
    assert "http" not in outside
    parser = Balanced()
    parser.feed(page)
    assert parser.open == []
    assert "img" not in parser.tags
    assert parser.tags.count("script") == 3
    assert "window.hacked=1</script>" not in page.replace("&lt;", "<<")


def test_charts_are_figures_that_plotly_takes() -> None:
    import plotly.graph_objects as go

    charts = charts_of(render(report_page(four_runs())))
    assert len(charts) > 10
    for chart in charts:
        assert chart["data"], chart["id"]
        figure = go.Figure({"data": chart["data"], "layout": chart["layout"]})  # refuses unknown properties
        assert len(figure.data) == len(chart["data"])


def test_the_alignment_map_is_blue_where_gradients_agree() -> None:
    """As its note says, and as matplotlib's scale of that name has it: plotly's begins with blue."""
    (chart,) = [
        c for c in report_page({"a": history()}).sections[-2][3] if c.note.startswith("Blue: the gradients agree")
    ]
    heat = chart.data[0]
    assert (heat["type"], heat["colorscale"], heat["reversescale"], heat["zmin"]) == (
        "heatmap",
        "RdBu",
        True,
        -heat["zmax"],
    )


def test_every_switch_is_in_the_page_with_its_reason() -> None:
    run = history(steps=3000, period=20)
    charts = charts_of(render(report_page({"gapt": run})))
    marks = [trace for trace in charts[0]["data"] if trace["meta"].get("role") == "switch"]
    switches = [record["step"] for record in run.steps if record["reason"]]
    assert [trace["x"] for trace in marks] == [switches]
    assert marks[0]["text"][0] == "plateau: compression from step 11"
    shade = next(trace for trace in charts[0]["data"] if trace["meta"].get("role") == "shade")
    assert shade["x"].count(None) == len(switches) // 2 - 1 + len(switches) % 2


def test_summary_compares_with_the_baseline() -> None:
    page = render(report_page(four_runs(), baseline="plain"))
    plain, gapt = (history(seed=seed, plain=name == "plain") for name, seed in (("plain", 1), ("gapt", 2)))
    change = gapt.validations[-1]["loss"] / plain.validations[-1]["loss"] - 1
    assert f"({change:+.1%})".replace("-", "\N{MINUS SIGN}") in page
    assert "(3 seeds)" in page


def test_settings_that_differ_are_marked() -> None:
    page = render(report_page({"a": history({"lr": 1, "deep": {"x": 2}}), "b": history({"lr": 3, "deep": {"x": 2}})}))
    assert '<tr class="differs"><th scope="row">lr</th><td>1</td><td>3</td><td class="said">differs</td>' in page
    assert '<tr class="same"><th scope="row">deep.x</th>' in page


def test_runs_that_lack_something_are_drawn_and_it_is_said() -> None:
    bare = [{"step": step, "loss": 1.0} for step in (1, 2, 3)]
    empty, begun = RunHistory([], notes=("metrics.jsonl is empty",)), RunHistory([])
    page = report_page({"empty": empty, "begun": begun, "bare": RunHistory(bare)})
    html = render(page)
    assert "metrics.jsonl is empty" in html
    assert "<b>begun</b>: no step is there yet" in html
    assert "<b>bare</b>" not in html
    assert "No run was in compression" in html
    assert len(charts_of(html)) == 2
    mixed = RunHistory(records(30), version="1"), RunHistory(records(30, measures=False), version="2")
    assert "version 1 and version 2" in render(report_page({"a": mixed[0], "b": mixed[1]}))


def test_errors_name_the_argument() -> None:
    with pytest.raises(ValueError, match="runs is empty"):
        report_page({})
    with pytest.raises(ValueError, match="run 'a' has no history"):
        report_page({"a": []})
    with pytest.raises(ValueError, match="baseline='c' is none of the runs"):
        report_page({"a": history()}, baseline="c")
    with pytest.raises(ValueError, match="profiles is empty"):
        write_profile({}, "nowhere.html")


@given(st.text(max_size=80))
def test_labels_hold_no_markup(text: str) -> None:
    shown = label(text)
    assert not set("<>") & set(shown)
    assert "%{" not in shown
    assert "$" not in shown


points = st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=400).map(
    lambda values: [(float(step), value) for step, value in enumerate(values)]
)


@given(points, st.integers(8, 60))
def test_downsampling_keeps_extremes_and_ends(values: list[tuple[float, float]], limit: int) -> None:
    kept = extremes(values, limit)
    assert len(kept) <= limit
    assert kept == sorted(kept)
    assert set(kept) <= set(values)
    for choose in (min, max):
        assert choose(v for _, v in kept) == choose(v for _, v in values)
    assert (kept[0], kept[-1]) == (values[0], values[-1])
    smooth = thinned(values, limit)
    assert len(smooth) <= limit
    assert smooth[-1] == values[-1]


@given(st.lists(points, min_size=1, max_size=4), st.integers(3, 30))
def test_bands_enclose_their_mean(seeds: list[list[tuple[float, float]]], limit: int) -> None:
    steps, low, mean, high = band(seeds, limit)
    assert len(steps) <= limit or len(steps) == len({step for seed in seeds for step, _ in seed})
    assert all(a <= b + 1e-6 and b <= c + 1e-6 for a, b, c in zip(low, mean, high, strict=True))


def test_heat_maps_average_stretches_and_keep_gaps() -> None:
    rows: list[tuple[float, dict[str, Any]]] = [(float(i), {"a": float(i), "b": None}) for i in range(1, 1001)]
    steps, names, values = heat_map(rows)
    assert (names, len(steps), steps[-1]) == (["a", "b"], 500, 1000)
    assert values[0][:2] == [1.5, 3.5]
    assert set(values[1]) == {None}


def test_long_runs_make_small_pages() -> None:
    run = RunHistory(records(6000, layers=2, period=400))
    assert len(render(report_page({"gapt": run}))) < 3_500_000


# In the browser


def test_report_in_the_browser(tmp_path: Path) -> None:
    page = write_report(four_runs(), tmp_path / "page.html", baseline="plain", title=HOSTILE)
    with opened(page) as view:
        assert view.console() == []
        assert [url for url in view.requests() if not url.startswith(("file:", "data:", "blob:"))] == []
        assert view.run("return [window.gapt.errors, window.hacked, document.images.length]") == [[], None, 0]
        assert view.run("return document.title") == HOSTILE
        count = view.run("return window.gapt.charts.length")
        drawn = "return window.gapt.charts.filter(c => document.querySelector('#' + c.id + ' .main-svg')).length"
        assert view.run(drawn) == count > 10
        assert view.run(EMPTY) == 0

        # A checkbox hides a run everywhere.
        shown = (
            "return window.gapt.charts.flatMap(c => document.getElementById(c.id)._fullData)"
            ".filter(t => t.meta && t.meta.run === 1 && t.visible === true).length"
        )
        assert view.run(shown) > 5
        view.run("document.querySelector('input[data-run=\"1\"]').click()")
        view.settle()
        assert view.run(shown) == 0
        assert view.run("return [...document.querySelectorAll('figure[data-run=\"1\"]')].every(f => f.hidden)")

        # The select changes whose phases are shaded, that beside a heat map what it shows.
        view.run("const s = document.getElementById('phases'); s.value = '2'; s.dispatchEvent(new Event('change'))")
        view.settle()
        phases = (
            "return document.getElementById('chart0')._fullData.filter(t => t.visible && 'phases' in (t.meta || {}))"
        )
        assert {trace["meta"]["phases"] for trace in view.run(f"{phases}.map(t => ({{meta: t.meta}}))")} == {2}
        chosen = view.run(
            "const s = document.querySelector('select[data-chart]'); s.value = 'norm_ratio';"
            "s.dispatchEvent(new Event('change'));"
            "const box = document.getElementById(s.dataset.chart);"
            "return box._fullData.filter(t => t.type === 'heatmap' && t.visible).map(t => t.meta.view)"
        )
        assert chosen == ["norm_ratio"]

        # The keyboard zooms all charts over steps, and 0 shows everything again.
        width = "const r = document.getElementById(arguments[0]).layout.xaxis.range; return r[1] - r[0]"
        assert view.run(width, "chart0") == 200
        view.keys("chart0", "+", "+")
        assert view.run(width, "chart0") == view.run(width, "chart1") == 50
        view.keys("chart0", "0")
        assert view.run(width, "chart1") == 200

        # Dark and light.
        ground = "return getComputedStyle(document.body).backgroundColor"
        assert view.run(ground) == "rgb(255, 255, 255)"
        view.run("document.getElementById('theme').click()")
        view.settle()
        assert view.run(ground) == "rgb(13, 17, 23)"
        assert view.printed().startswith(b"%PDF")
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
        unreachable = f"return {controls}.filter(e => e.tabIndex < 0).length"
        assert view.run(unreachable) == 0
        assert view.run(
            "return [...document.querySelectorAll('.plot')].every(e => e.getAttribute('aria-label').length > 30)"
        )


def test_profile_page_in_the_browser(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 8))
    first, second = (profile(model, [randn(3, 20, 6)], ["1", "2"], name=HOSTILE, data=HOSTILE) for _ in range(2))
    page = write_profile({HOSTILE: first, "second": second}, tmp_path / "page.html", title=HOSTILE)
    with opened(page) as view:
        assert view.console() == []
        assert view.run("return [window.gapt.errors, window.hacked, document.images.length]") == [[], None, 0]
        assert view.run(EMPTY) == 0
        assert view.run("return document.querySelectorAll('table').length") > 5


@pytest.mark.slow
def test_a_hundred_thousand_steps_of_48_layers(tmp_path: Path) -> None:
    """Under 10 MB, and every switch is there. How fast it opens is a benchmark's."""
    steps = records(100_000, layers=48, period=500, prefix="transformer.h.")
    page = write_report({"gapt": RunHistory(steps)}, tmp_path / "page.html")
    assert page.stat().st_size < 10_000_000
    switches = sum(record["reason"] is not None for record in steps)
    (marks,) = [t for t in charts_of(page.read_text())[0]["data"] if t["meta"].get("role") == "switch"]
    assert len(marks["x"]) == switches
    with opened(page, patience=120) as view:
        assert view.console() == []
        assert view.run("return window.gapt.errors") == []
