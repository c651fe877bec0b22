"""Every promise of the documentation names tests that exist."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

from .pages import ROOT

sys.path.insert(0, str(ROOT / "docs"))
from promises import Promise, collected, count, outcomes, promises, table, written


@pytest.mark.parametrize("promise", promises(), ids=lambda promise: promise.text[:40])
def test_tests_of_the_promise_exist(promise: Promise) -> None:
    assert promise.tests
    for test in promise.tests:
        file, _, function = test.partition("::")
        path = ROOT / "tests" / file
        assert path.exists(), test
        assert not function or re.search(rf"^def {function}\(", path.read_text(encoding="utf-8"), re.MULTILINE), test


def test_page_holds_the_promises() -> None:
    page = written()
    shown = [line.split(" | ")[0].removeprefix("| ") for line in page.splitlines()[2:] if "**" not in line]
    assert shown == [promise.text for promise in promises()], "run python docs/promises.py"
    assert "| 0 |" not in page
    headings = [line for line in page.splitlines() if "**" in line]
    assert len(set(headings)) == len(headings)


def test_outcomes_of_a_run_are_counted(tmp_path: Path) -> None:
    junit = tmp_path / "junit.xml"
    junit.write_text(
        '<testsuites><testsuite><testcase classname="tests.test_gate" name="test_a[1]"/>'
        '<testcase classname="tests.test_gate" name="test_a[2]"><failure/></testcase>'
        '<testcase classname="tests.properties.test_gate_properties" name="test_b"><skipped/></testcase>'
        "</testsuite></testsuites>",
        encoding="utf-8",
    )
    found = outcomes(junit)
    assert count(Promise("a", "b", ["test_gate.py"]), found) == {"passed": 1, "failed": 1}
    assert count(Promise("a", "b", ["properties/test_gate_properties.py::test_b"]), found) == {"skipped": 1}


def test_collected_cases_are_counted() -> None:
    listed = "tests/test_gate.py::test_a[1]\ntests/test_gate.py::test_a[2]\n\n2 tests collected\n"
    assert count(Promise("a", "b", ["test_gate.py::test_a"]), collected(listed)).total() == 2
    assert "| **Wrapper** | | |" in table(collected(listed))
