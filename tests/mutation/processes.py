"""Mutants that no fork can catch, run against tests in processes of their own.

    python -m tests.mutation.processes step.json --tests tests/distributed/test_over_ranks.py -k branch

Takes those of a results file that survived or that no test ran, puts each into a scratch copy of the source, and runs
the named tests there until one fails. What is caught is marked so in the file.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from tests.mutation.mutants import ROOT, every_mutant


def caught_by(result: dict[str, Any], tests: list[str]) -> str:
    """The test that fails with a mutant; empty where none does.

    Raises:
        RuntimeError: pytest could not run them.
    """
    mutant = next(
        mutant
        for mutant in every_mutant(result["file"])
        if (mutant.operator, mutant.occurrence) == (result["operator"], result["occurrence"])
    )
    if mutant.described() != (result["before"], result["after"]):
        raise RuntimeError(f"{result['file']} has changed since {result['before']!r} was mutated")
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder)
        for part in ("gapt_optim", "tests"):
            shutil.copytree(ROOT / part, copy / part, ignore=shutil.ignore_patterns("__pycache__"))
        shutil.copy(ROOT / "pyproject.toml", copy)
        (copy / mutant.path).write_text(mutant.source())
        command = [sys.executable, "-m", "pytest", "-x", "-q", "-n", "0", "-p", "no:cacheprovider", *tests]
        environment = os.environ | {"PYTHONPATH": os.pathsep.join([folder, os.environ.get("PYTHONPATH", "")])}
        done = subprocess.run(command, cwd=copy, env=environment, capture_output=True, text=True)
    if done.returncode not in (0, 1):
        raise RuntimeError(done.stdout[-2000:] + done.stderr[-2000:])
    failed = re.search(r"^(?:FAILED|ERROR) (.*?)(?: - .*)?$", done.stdout, re.MULTILINE)
    return failed[1] if failed else ""


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.mutation.processes", description=__doc__.split("\n")[0])
    parser.add_argument("results", type=Path)
    parser.add_argument("--lines", nargs="*", help="FILE:LINE of the mutants to take; all that were not caught")
    parser.add_argument("--tests", nargs="+", required=True)
    parser.add_argument("-k", default="", help="as of pytest")
    arguments = parser.parse_args()
    results = json.loads(arguments.results.read_text())
    for result in results:
        place = f"{result['file']}:{result['line']}"
        if result["outcome"] == "caught" or (arguments.lines and place not in arguments.lines):
            continue
        by = caught_by(result, [*arguments.tests, *(["-k", arguments.k] if arguments.k else [])])
        print(place, by or "survived")
        if by:
            result.update(outcome="caught", by=f"in a process: {by}")
            arguments.results.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
