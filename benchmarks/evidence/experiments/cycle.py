"""The cycle itself: does the angle of loss and entropy gradients swing in plain training, beyond its noise?"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import fields, replace
from pathlib import Path

from ..harness import Record, Run
from ..markdown import p_cell, seeds_line, table
from ..stats import Swings, swings
from ..tasks import cycle, text


def runs(first_look: bool, seeds: Sequence[int] | None) -> list[Run]:
    """Plain training over seeds."""
    base = text.SMALL if first_look else text.PAPER
    shared = {f.name: getattr(base, f.name) for f in fields(base)}
    s = cycle.Settings(**shared, measure_every=5 if first_look else 10)
    return [Run("cycle", replace(s, seed=seed)) for seed in seeds or range(300, 302 if first_look else 305)]


def found_in(record: Record, kernel: str) -> Swings:
    """The tests on one run's series, without the first tenth, in which the learning rate warms up."""
    curve = record.result["curve"]
    skip = len(curve["step"]) // 10
    return swings(curve[f"cosine_{kernel}"][skip:], curve[f"error_{kernel}"][skip:])


def tables(records: list[Record]) -> dict[str, str]:
    """A row per kernel and seed."""
    header = ["kernel", "seed", "mean cosine", "mean error of one", "runs of one sign", "expected by chance", "p",
              "autocorrelation", "p", "variance over noise", "p", "clear reversals"]  # fmt: skip
    rows = []
    for kernel in cycle.KERNELS:
        for record in sorted(records, key=lambda r: int(r.settings["seed"])):
            curve, test = record.result["curve"], found_in(record, kernel)
            rows.append(
                [
                    kernel.replace("centred_cosine", "cosine, centred"),
                    str(record.settings["seed"]),
                    f"{statistics.fmean(curve[f'cosine_{kernel}']):+.3f}",
                    f"{statistics.fmean(curve[f'error_{kernel}']):.3f}",
                    f"{test.runs}",
                    f"{test.expected_runs:.1f}",
                    p_cell(test.p_runs),
                    f"{test.autocorrelation:+.2f}",
                    p_cell(test.p_autocorrelation),
                    f"{test.beyond_noise:.2f}",
                    p_cell(test.p_beyond_noise),
                    f"{test.reversals}",
                ]
            )
    s = records[0].settings
    text_ = (
        f"Plain training on bytes of text, {seeds_line(records)}, {s['steps']} steps, measured every "
        f"{s['measure_every']} from {s['micro_batches']} micro-batches. Clear reversals: from beyond two standard "
        "errors on one side of 0 to beyond two on the other.\n\n"
    )
    return {"cycle": text_ + table(header, rows, text_columns=2)}


def pictures(records: list[Record], folder: Path) -> list[Path]:
    """The series of one seed with a band of two standard errors."""
    from ..pictures import figure, save

    record = min(records, key=lambda r: int(r.settings["seed"]))
    curve = record.result["curve"]
    made, axes = figure(2, width=6.4)
    for axis, kernel in zip(axes, cycle.KERNELS, strict=True):
        x, y, e = curve["step"], curve[f"cosine_{kernel}"], curve[f"error_{kernel}"]
        low, high = [a - 2 * b for a, b in zip(y, e, strict=True)], [a + 2 * b for a, b in zip(y, e, strict=True)]
        axis.fill_between(x, low, high, alpha=0.25, color="#3b6fc4", lw=0)
        axis.plot(x, y, color="#3b6fc4", lw=1)
        axis.axhline(0, color="black", lw=0.8)
        axis.set(
            title=kernel.replace("_", " "),
            xlabel="step",
            ylabel="cosine of loss and entropy gradients",
            ylim=(min(-0.2, min(y) * 1.3), max(0.2, max(y) * 1.3)),
        )
    return [save(made, folder / "cycle.png")]
