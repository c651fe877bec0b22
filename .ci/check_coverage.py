"""Fails where the tests take fewer than 95 % of the branches, or run fewer than 95 % of the lines, of the library.

python .ci/check_coverage.py coverage.json    # as `coverage json` writes it
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

WANTED = 95.0


def main() -> int:
    totals = json.loads(Path(sys.argv[1]).read_text())["totals"]
    shares = {
        "branches": (totals["covered_branches"], totals["num_branches"]),
        "lines": (totals["covered_lines"], totals["num_statements"]),
    }
    for name, (covered, count) in shares.items():
        print(f"{name}: {covered} of {count}, {100 * covered / count:.1f} %")
    return int(any(100 * covered / count < WANTED for covered, count in shares.values()))


if __name__ == "__main__":
    sys.exit(main())
