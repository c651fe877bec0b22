"""Pages in headless Chromium. Tests that need it are skipped where none is installed."""

from __future__ import annotations

import base64
import json
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest


def _driver(width: int, dark: bool) -> Any:
    webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed")
    browser = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
    driver = shutil.which("chromedriver")
    if browser is None or driver is None:
        pytest.skip("no Chromium with chromedriver is installed (apt-get install chromium chromium-driver)")
    options = webdriver.ChromeOptions()
    options.binary_location = browser
    for argument in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", f"--window-size={width},900"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    chrome = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
    scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
    chrome.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [scheme]})
    metrics = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 600}
    chrome.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    return chrome


class Opened:
    """A page that is drawn."""

    def __init__(self, driver: Any) -> None:
        self.driver = driver

    def run(self, script: str, *arguments: Any) -> Any:
        return self.driver.execute_script(script, *arguments)

    def settle(self) -> None:
        self.driver.execute_async_script("setTimeout(arguments[0], 150)")

    def console(self) -> list[str]:
        return [entry["message"] for entry in self.driver.get_log("browser")]

    def requests(self) -> list[str]:
        events = [json.loads(entry["message"])["message"] for entry in self.driver.get_log("performance")]
        return [e["params"]["request"]["url"] for e in events if e["method"] == "Network.requestWillBeSent"]

    def printed(self) -> bytes:
        data: str = self.driver.execute_cdp_cmd("Page.printToPDF", {"printBackground": True})["data"]
        return base64.b64decode(data)


@contextmanager
def opened(page: Path, *, width: int = 1280, dark: bool = False, patience: float = 60) -> Iterator[Opened]:
    """The page, once its charts are drawn."""
    driver = _driver(width, dark)
    try:
        driver.get(page.as_uri())
        until = time.monotonic() + patience
        while not driver.execute_script("return Boolean(document.body && document.body.dataset.ready)"):
            assert time.monotonic() < until, "the charts were not drawn in time"
            time.sleep(0.05)
        yield Opened(driver)
    finally:
        driver.quit()
