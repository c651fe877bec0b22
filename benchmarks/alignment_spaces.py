"""How activation alignment relates to parameter alignment over a run that measured both.

    python examples/gpt2_fineweb.py --parameter-alignment-every 10 --out runs/alignment
    python benchmarks/alignment_spaces.py runs/alignment/metrics.jsonl

Prints, for memorization, compression and both: steps measured, correlation of the two cosines, and the
share of steps on which their signs agree.
"""

from __future__ import annotations

import statistics
import sys
from pathlib import Path

from gapt_optim.viewing import read_metrics


def main() -> None:
    rows = []
    for line in read_metrics(Path(sys.argv[1])):
        activation = (line.get("alignment") or {}).get("cosine")
        parameter = (line.get("parameter_alignment") or {}).get("cosine")
        if activation is not None and parameter is not None:
            rows.append((line["phase"], activation, parameter))
    print("| phase | steps | correlation | signs agree | activation cosine | parameter cosine |")
    print("|---|---|---|---|---|---|")
    for phase in ("memorization", "compression", "both"):
        pairs = [(a, p) for name, a, p in rows if phase in (name, "both")]
        if len(pairs) < 3:
            continue
        activations, parameters = zip(*pairs, strict=True)
        correlation = statistics.correlation(activations, parameters)
        agree = statistics.fmean((a > 0) == (p > 0) for a, p in pairs)
        means = f"{statistics.fmean(activations):+.3f} | {statistics.fmean(parameters):+.3f}"
        print(f"| {phase} | {len(pairs)} | {correlation:+.2f} | {agree:.0%} | {means} |")


if __name__ == "__main__":
    main()
