"""How many mutants of the library's core the tests catch.

    python -m tests.mutation --groups gate entropy --mutants 60 --seed 0 --out gate.json

Tests are collected and run once, and which of them runs which line is kept in ``--baseline``; later runs add tests that
are new to it. Then each mutant is a fork of this process in which the code of the changed function is replaced, so that
nothing is imported or collected again: it runs the tests of the changed line, cheapest first, until one fails.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import signal
import sys
import time
import traceback
from collections import Counter
from collections.abc import Iterable
from difflib import SequenceMatcher
from pathlib import Path
from types import FunctionType
from typing import Any

import pytest
from _pytest.runner import runtestprotocol
from coverage import Coverage
from scipy.stats import binomtest

from tests.mutation.mutants import GROUPS, ROOT, Mutant, changed_functions, sampled

TESTS = [
    "tests/properties/test_entropy_properties.py",
    "tests/properties/test_gate_properties.py",
    "tests/properties/test_state_properties.py",
    *sorted(str(path.relative_to(ROOT)) for path in (ROOT / "tests").glob("test_*.py")),
    "tests/distributed",
]
"""What runs in this process, ranks as threads, and does not compile: a compiler keeps code of its own."""


class Baseline:
    """Seconds of each test, None where it does not pass, and which tests run which line."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.seconds: dict[str, float | None] = {}
        self.lines: dict[str, dict[int, list[str]]] = {}
        if path.exists():
            found = json.loads(path.read_text())
            self.seconds = found["seconds"]
            for of_file, lines in found["lines"].items():
                self.lines[of_file] = moved(lines, found["sources"][of_file], (ROOT / of_file).read_text())

    def measure(self, items: list[pytest.Item]) -> None:
        """Run the tests that are new."""
        items = [item for item in items if item.nodeid not in self.seconds]
        if not items:
            return
        files = [str(ROOT / path) for paths in GROUPS.values() for path in paths]
        coverage = Coverage(data_file=None, config_file=False, include=files)
        coverage.start()
        for item, following in zip(items, [*items[1:], None], strict=True):
            coverage.switch_context(item.nodeid)
            start = time.process_time()
            reports = runtestprotocol(item, nextitem=following, log=False)
            passed = all(report.passed for report in reports)
            self.seconds[item.nodeid] = time.process_time() - start if passed else None
        coverage.stop()
        data = coverage.get_data()
        for file in data.measured_files():
            lines = self.lines.setdefault(str(Path(file).relative_to(ROOT)), {})
            for line, tests in data.contexts_by_lineno(file).items():
                lines.setdefault(line, []).extend(test for test in tests if self.seconds.get(test) is not None)
        sources = {path: (ROOT / path).read_text() for path in self.lines}
        self.path.write_text(json.dumps({"seconds": self.seconds, "sources": sources, "lines": self.lines}))

    def of(self, mutant: Mutant, there: Iterable[str], budget: float) -> list[str]:
        """Tests of the changed statement for ``budget`` seconds, each test function getting as much of it as others."""
        lines = self.lines.get(mutant.path, {})
        tests = {test for line in range(mutant.line, mutant.last_line + 1) for test in lines.get(line, [])}
        of_function: Counter[str] = Counter()  # seconds of its tests so far
        order, spent, ranked = [], 0.0, []
        for seconds, test in sorted((self.seconds[test] or 0.0, test) for test in tests.intersection(there)):
            function = test.split("[")[0]
            of_function[function] += seconds  # type: ignore[assignment]
            ranked.append((of_function[function], seconds, test))
        for _, seconds, test in sorted(ranked):
            order.append(test)
            spent += seconds
            if spent > budget:
                break
        return order


def moved(lines: dict[str, list[str]], before: str, after: str) -> dict[int, list[str]]:
    """Tests by line, where a file has changed: lines that are new get the tests of those that they replace."""
    matcher = SequenceMatcher(None, before.splitlines(), after.splitlines(), autojunk=False)
    found: dict[int, list[str]] = {}
    for tag, i, j, k, n in matcher.get_opcodes():
        if tag == "equal":
            pairs = [(i + offset, k + offset) for offset in range(j - i)]
        else:
            pairs = [(old, new) for new in range(k, n) for old in range(max(i - 1, 0), max(j, i))]
        for old, new in pairs:
            found.setdefault(new + 1, []).extend(lines.get(str(old + 1), []))
    return found


class Mutating:
    """Runs mutants in place of the tests."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.arguments = arguments
        self.results: list[dict[str, Any]] = []

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtestloop(self, session: pytest.Session) -> bool:
        gc.unfreeze()  # functions are looked for among living objects
        items = {item.nodeid: item for item in session.items}
        baseline = Baseline(self.arguments.baseline)
        baseline.measure(session.items)
        functions = _living_functions()
        sound: set[str] = set()
        gc.freeze()  # a collection in a fork would copy all memory
        for group in self.arguments.groups:
            for mutant in sampled(group, self.arguments.mutants, self.arguments.seed):
                tests = [items[test] for test in baseline.of(mutant, items, self.arguments.budget)]
                limit = 20 + 20 * sum(baseline.seconds[item.nodeid] or 0.0 for item in tests)
                start = time.perf_counter()
                of_file = functions.get(str(ROOT / mutant.path), [])
                outcome, by = _outcome(mutant, tests, limit, of_file)
                # A few tests, of threads or processes, fail in any fork: they catch nothing.
                while by in items and by not in sound:
                    if _outcome(None, [items[by]], limit, [])[0] == "survived":
                        sound.add(by)
                    else:
                        del items[by]
                        tests = [item for item in tests if item.nodeid in items]
                        outcome, by = _outcome(mutant, tests, limit, of_file)
                before, after = mutant.described()
                self.results.append(
                    {
                        "group": group,
                        "seed": self.arguments.seed,
                        "file": mutant.path,
                        "line": mutant.place[0],
                        "operator": mutant.operator,
                        "occurrence": mutant.occurrence,
                        "before": before,
                        "after": after,
                        "outcome": outcome,
                        "by": by,
                        "tests": len(tests),
                        "seconds": round(time.perf_counter() - start, 2),
                    }
                )
                self.arguments.out.write_text(json.dumps(self.results, indent=1) + "\n")
        return True


def _outcome(
    mutant: Mutant | None, tests: list[pytest.Item], limit: float, functions: list[FunctionType]
) -> tuple[str, str]:
    """("caught", the test), ("caught", "timeout"), ("survived", "") or ("not run", "")."""
    if not tests:
        return "not run", ""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reading)
        signal.setitimer(signal.ITIMER_PROF, limit)  # seconds of computing, however busy the machine is
        signal.alarm(900)
        try:
            if mutant is not None:
                _apply(mutant, functions)
            os.write(writing, _first_failure(tests).encode())
        except BaseException:
            traceback.print_exc(file=sys.__stderr__)
            os._exit(1)
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading, "rb") as pipe:
        by = pipe.read().decode()
    _, status = os.waitpid(child, 0)
    if os.WIFEXITED(status) and os.WEXITSTATUS(status):
        raise RuntimeError(f"cannot run {mutant}")
    if os.WIFSIGNALED(status):
        return "caught", "timeout" if os.WTERMSIG(status) in (signal.SIGPROF, signal.SIGALRM) else "crash"
    return ("caught", by) if by else ("survived", "")


def _living_functions() -> dict[str, list[FunctionType]]:
    """The functions of the library by file, wherever something holds them."""
    found: dict[str, list[FunctionType]] = {}
    for thing in gc.get_objects():
        if type(thing) is FunctionType:  # isinstance would ask objects for their class, which some of torch's warn of
            found.setdefault(thing.__code__.co_filename, []).append(thing)
    return {file: of_file for file, of_file in found.items() if file.startswith(str(ROOT / "gapt_optim"))}


def _apply(mutant: Mutant, functions: list[FunctionType]) -> None:
    """Changes those of a file that the mutant changes.

    Raises:
        RuntimeError: there are none.
    """
    changed, count = changed_functions(mutant), 0
    for function in functions:
        code = changed.get((function.__code__.co_qualname, function.__code__.co_firstlineno))
        if code is not None:
            function.__code__, count = code, count + 1
    if not count:
        raise RuntimeError(f"no living function of {mutant}")


def _first_failure(tests: list[pytest.Item]) -> str:
    for item, following in zip(tests, [*tests[1:], None], strict=True):
        if any(report.failed for report in runtestprotocol(item, nextitem=following, log=False)):
            return item.nodeid
    return ""


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.mutation", description=__doc__.split("\n")[0])
    parser.add_argument("--groups", nargs="+", choices=GROUPS, default=list(GROUPS))
    parser.add_argument("--mutants", type=int, default=40, help="places of each group")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--budget", type=float, default=20.0, help="seconds of tests for each mutant")
    parser.add_argument("--baseline", type=Path, default=Path("mutation-baseline.json"))
    parser.add_argument("--out", type=Path, default=Path("mutants.json"))
    parser.add_argument("--tests", nargs="+", default=TESTS)
    arguments = parser.parse_args()
    os.environ["GAPT_TEST_RANKS"] = "threads"
    plugin = Mutating(arguments)
    code = pytest.main(["-n", "0", "-q", "-k", "not compile", "-p", "no:cacheprovider", *arguments.tests], [plugin])
    print(summary(plugin.results))
    return int(code)


def summary(results: list[dict[str, Any]]) -> str:
    """A row per group: mutants, caught, the share with Wilson's interval of 95 %."""
    rows = []
    for group in [*dict.fromkeys(result["group"] for result in results), "all"]:
        outcomes = Counter(result["outcome"] for result in results if group in (result["group"], "all"))
        count, caught = sum(outcomes.values()), outcomes["caught"]
        if count:
            low, high = binomtest(caught, count).proportion_ci(method="wilson")
            rows.append(f"{group:10} {count:5} {caught:5} {caught / count:6.1%}  {low:.1%} to {high:.1%}")
    return "\n".join(rows)


if __name__ == "__main__":
    sys.exit(main())
