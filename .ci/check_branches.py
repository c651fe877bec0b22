"""Fails where tests take fewer than 95 % of the library's branches. coverage's own total mixes them with lines.

python .ci/check_branches.py .ci/coverage.json    # as `pytest --cov --cov-report=json:FILE` writes it
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

WANTED = 95.0


def main() -> int:
    report = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    taken, count = report["totals"]["covered_branches"], report["totals"]["num_branches"]
    for name, file in sorted(report["files"].items()):
        all_, missed = file["summary"]["num_branches"], len(file["missing_branches"])
        if 100 * (all_ - missed) < WANTED * all_:
            lines = sorted({abs(line) for line, _ in file["missing_branches"]})
            print(f"{name}: {all_ - missed} of {all_} branches; not all from lines {', '.join(map(str, lines))}")
    print(f"{taken} of {count} branches are taken, {100 * taken / count:.1f} %; at least {WANTED:g} % must be")
    return int(100 * taken < WANTED * count)


if __name__ == "__main__":
    sys.exit(main())
