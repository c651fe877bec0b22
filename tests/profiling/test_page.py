"""The page of a profile in headless Chromium."""

from __future__ import annotations

from pathlib import Path

from torch import nn, randn

from gapt_optim.profiling import profile, write_profile

from ..reporting.browser import opened
from ..reporting.runs import HOSTILE


def test_profile_page_in_the_browser(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 8))
    data = [randn(3, 20, 6)]
    first, second = (profile(model, data, ["1", "2"], name=HOSTILE, data=HOSTILE) for _ in range(2))
    page = write_profile({HOSTILE: first, "second": second}, tmp_path / "page.html", title=HOSTILE)
    with opened(page) as view:
        assert view.console() == []
        assert view.run("return [window.hacked, document.images.length]") == [None, 0]
        empty = "[...document.querySelectorAll('.js-plotly-plot')].filter(c => !c._fullData.some(t => t.visible))"
        assert view.run(f"return {empty}.length") == 0
        assert view.run("return document.querySelectorAll('table').length") >= 3
    several = {HOSTILE: first, "second": second, "third": first}
    for one in (first, several):
        with opened(write_profile(one, tmp_path / "other.html", title=HOSTILE)) as view:
            assert view.console() == []
            assert view.run("return [window.hacked, document.images.length]") == [None, 0]
            assert view.run(f"return {empty}.length") == 0
            assert view.run("return document.querySelectorAll('.heatmaplayer').length") >= 1
