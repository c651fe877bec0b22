"""The tests that hold each promise of `promises.toml`, and how many cases they have.

python docs/promises.py                        # counts the cases and writes docs/promises.md
python docs/promises.py --check junit.xml      # fails where a promise has no case in that run, or one that failed
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

DOCS = Path(__file__).parent
PAGE = DOCS / "promises.md"
BEGIN, END = "<!-- written by promises.py -->\n", "<!-- end -->"
Cases = Mapping[str, Counter[str]]
"""By `file::function`, relative to `tests`: how many cases there are of each outcome."""


@dataclass(frozen=True)
class Promise:
    area: str
    text: str
    tests: list[str]


def promises() -> list[Promise]:
    table: dict[str, Any] = tomllib.loads((DOCS / "promises.toml").read_text(encoding="utf-8"))
    return [Promise(**each) for each in table["promise"]]


def outcomes(junit: Path) -> Cases:
    """What a run of the suite with --junitxml says."""
    found: dict[str, Counter[str]] = {}
    for case in ElementTree.parse(junit).iter("testcase"):
        parts = case.attrib["classname"].split(".")[1:]
        name = f"{'/'.join(parts)}.py::{case.attrib['name'].partition('[')[0]}"
        kinds = {child.tag for child in case}
        outcome = "failed" if kinds & {"failure", "error"} else "skipped" if "skipped" in kinds else "passed"
        found.setdefault(name, Counter())[outcome] += 1
    return found


def collected(lines: str) -> Cases:
    """What `pytest --collect-only -q` prints."""
    found: dict[str, Counter[str]] = {}
    for line in lines.splitlines():
        if line.startswith("tests/") and "::" in line:
            name = line.removeprefix("tests/").partition("[")[0]
            found.setdefault(name, Counter())["collected"] += 1
    return found


def count(promise: Promise, cases: Cases) -> Counter[str]:
    total: Counter[str] = Counter()
    for test in promise.tests:
        for name, counter in cases.items():
            if name == test or ("::" not in test and name.startswith(test + "::")):
                total += counter
    return total


def table(cases: Cases) -> str:
    lines = ["| promise | cases | held by |", "|---|---:|---|"]
    area = ""
    for promise in promises():
        if promise.area != area:
            area = promise.area
            lines.append(f"| **{area}** | | |")
        held = "<br>".join(f"`{test.replace('::', '` `')}`" for test in promise.tests)
        lines.append(f"| {promise.text} | {count(promise, cases).total()} | {held} |")
    return "\n".join(lines) + "\n"


def written() -> str:
    """The table that the page has."""
    return PAGE.read_text(encoding="utf-8").partition(BEGIN)[2].partition(END)[0].strip()


def write(rows: str) -> None:
    before, begin, rest = PAGE.read_text(encoding="utf-8").partition(BEGIN)
    PAGE.write_text(f"{before}{begin}\n{rows.strip()}\n\n{END}{rest.partition(END)[2]}", encoding="utf-8")


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--check", type=Path, metavar="JUNIT", help="what pytest wrote with --junitxml")
    arguments = parser.parse_args()
    if arguments.check is None:
        command = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-n", "0"]
        listed = subprocess.run(command, capture_output=True, text=True, cwd=DOCS.parent, check=True)
        write(table(collected(listed.stdout)))
        print(PAGE)
        return 0
    cases = outcomes(arguments.check)
    counts = {promise.text: count(promise, cases) for promise in promises()}
    broken = {text: found for text, found in counts.items() if not found["passed"] or found["failed"]}
    for text, found in broken.items():
        print(f"not held by the suite: {text} ({found['passed']} passed, {found['failed']} failed)")
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
