"""How large the page of a long run is, and how soon headless Chromium has drawn it.

    python -m benchmarks.cost.page                       # 100,000 steps, 48 layers

A made-up run, with what is per layer on every 25th step. Each time is in a
fresh browser, from the start of the navigation. The CPU time of the page's main thread does not depend on what else the
machine does; on an idle one the clock shows little more.
"""

from __future__ import annotations

import json
import math
import os
import random
import shutil
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro

from gapt_optim.reporting import Run, write_report

from .figures import write_figures


@dataclass
class Options:
    """Size of the page of a long run, and the time until it is drawn."""

    steps: int = 100_000
    layers: int = 48
    period: int = 500
    """Steps from one compression to the next."""
    times: int = 3
    """Times to open it."""
    out: Path | None = None
    """Keep the page as this file."""
    json: Path | None = None
    """Write the figures to this file."""


def made_up(options: Options) -> Run:
    """A run that compresses in the second half of each period."""
    noise = random.Random(0)
    names = [f"transformer.h.{i}" for i in range(options.layers)]
    steps: list[dict[str, Any]] = []
    for step in range(1, options.steps + 1):
        phase, following = (
            "compression" if at % options.period >= options.period // 2 else "memorization" for at in (step - 1, step)
        )
        entropy = 1 + 0.3 * math.cos(2 * math.pi * step / options.period) + noise.gauss(0, 0.02)
        shown = ("linear_entropy", "centered_cosine_entropy", "norm_ratio", "mean_share")
        record = {
            "step": step,
            "phase": phase,
            "next_phase": following,
            "reason": None if phase == following else "plateau" if following == "compression" else "compressed",
            "loss": 2 + 5 * math.exp(-5 * step / options.steps) + noise.gauss(0, 0.05),
            "entropy": entropy,
            "entropy_share": 0.05 if phase == "compression" else None,
            "measures": {name: entropy + i for i, name in enumerate(shown)},
            "alignment": {"cosine": noise.gauss(0, 0.1)},
        }
        if step % 25 == 0:
            record["layer_entropy"] = {name: entropy + noise.random() for name in names}
            record["layer_measures"] = {name: {m: entropy + noise.random() for m in shown} for name in names}
            record["alignment"]["layers"] = {name: {"cosine": noise.gauss(0, 0.1)} for name in names}  # type: ignore[index]
        steps.append(record)
    return Run.of(steps)


def seconds_to_open(page: Path) -> dict[str, float]:
    """Seconds on the clock until the first chart and until the last, and CPU seconds of the page's main thread."""
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))))
    for argument in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--window-size=1280,900"):
        options.add_argument(argument)
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(shutil.which("chromedriver")))
    try:
        driver.execute_cdp_cmd("Performance.enable", {"timeDomain": "threadTicks"})
        driver.get(page.as_uri())
        while not driver.execute_script("return Boolean(document.body && document.body.dataset.ready)"):
            time.sleep(0.1)
        last: float = driver.execute_script("return performance.now()")
        first: float = driver.execute_script("return performance.getEntriesByName('first-chart')[0].startTime")
        found = driver.execute_cdp_cmd("Performance.getMetrics", {})["metrics"]
        (thread,) = (metric["value"] for metric in found if metric["name"] == "ThreadTime")
        return {"first_chart": first / 1000, "all_charts": last / 1000, "main_thread_cpu": thread}
    finally:
        driver.quit()


def main(argv: list[str] | None = None) -> int:
    """Print the figures."""
    options = tyro.cli(Options, args=argv, prog="python -m benchmarks.cost.page")
    with tempfile.TemporaryDirectory() as folder:
        page = options.out or Path(folder) / "page.html"
        run = made_up(options)
        made = time.process_time()
        write_report({"gapt": run}, page)
        written = time.process_time()
        found = [seconds_to_open(page.resolve()) for _ in range(options.times)]
        figures: dict[str, float] = {
            "megabytes": page.stat().st_size / 1e6,
            "cpu_seconds_to_write": written - made,
            "load": os.getloadavg()[0],
        }
        for name in found[0] if found else ():
            figures[f"seconds_{name}"] = statistics.median(one[name] for one in found)
    print(json.dumps(figures, indent=1))
    write_figures(figures, options.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
