"""Every promise of the documentation names tests that exist."""

from __future__ import annotations

import re
import sys

import pytest

from .pages import ROOT

sys.path.insert(0, str(ROOT / "docs"))
from promises import Promise, count, promises, table


@pytest.mark.parametrize("promise", promises(), ids=lambda promise: promise.text[:40])
def test_tests_of_the_promise_exist(promise: Promise) -> None:
    assert promise.tests
    for test in promise.tests:
        file, _, function = test.partition("::")
        path = ROOT / "tests" / file
        assert path.exists(), test
        assert not function or re.search(rf"^def {function}\(", path.read_text(encoding="utf-8"), re.MULTILINE), test


def test_cases_are_counted(tmp_path: pytest.TempPathFactory) -> None:
    junit = tmp_path / "junit.xml"  # type: ignore[operator]
    junit.write_text(
        '<testsuites><testsuite><testcase classname="tests.test_gate" name="test_a[1]"/>'
        '<testcase classname="tests.test_gate" name="test_a[2]"><failure/></testcase>'
        '<testcase classname="tests.properties.test_gate_properties" name="test_b"><skipped/></testcase>'
        "</testsuite></testsuites>",
        encoding="utf-8",
    )
    from promises import outcomes

    found = outcomes(junit)
    assert count(Promise("a", "b", ["test_gate.py"]), found).cases == 2
    assert count(Promise("a", "b", ["test_gate.py::test_a"]), found).failed == 1
    assert count(Promise("a", "b", ["properties/test_gate_properties.py::test_b"]), found).skipped == 1
    assert "| Numbers |" in table(junit)
