"""Gate against penalty in what compression buys: loss after a cut over the loss before it, five weights each.

Both press order 1/2 over whole sequences, the entropy under which a model needs fewer directions (`use`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from ..harness import Record, Run
from ..markdown import (
    change_cell,
    compression_cell,
    difference_cell,
    group,
    mean_cell,
    p_cell,
    seeds_line,
    table,
    values,
    versus,
)
from ..stats import compare
from .curves import where_equal
from .use import OPERATIONS, settings

WEIGHTS = {"gapt": (0.02, 0.035, 0.05, 0.1, 0.2), "penalty": (0.005, 0.01, 0.02, 0.035, 0.05)}
CUTS = ("project_16", "project_8", "project_4", "rank_16", "rank_8")


def runs(first_look: bool, seeds: Sequence[int] | None) -> list[Run]:
    """Plain, and both methods at five weights; seed by seed."""
    base = settings(first_look)
    found = []
    for seed in seeds or range(300, 305):
        found.append(Run("use", replace(base, seed=seed)))
        for method, weights in WEIGHTS.items():
            for weight in weights:
                pressed = replace(base, method=method, weight=weight, alpha=0.5, window=base.context, seed=seed)
                found.append(Run("use", pressed))
    return found


def tables(records: list[Record]) -> dict[str, str]:
    """The points of both curves, and the gate's loss after each cut less the penalty's at the same loss before it."""
    plain = [r for r in records if r.settings["method"] == "plain"]
    groups = group(records, "method", "weight")
    names = ("loss", *CUTS)
    header = ["method", "weight", "loss", *(OPERATIONS[name] for name in CUTS), "compression", "switches"]
    rows = [
        [
            method,
            f"{weight:g}" if weight else "",
            *(_cell(found, plain, name) for name in names),
            compression_cell(found),
            mean_cell(found, "switches", digits=0),
        ]
        for (method, weight), found in sorted(groups.items(), key=lambda item: (item[0][0] != "plain", item[0]))
    ]
    where = (
        f"Bytes of text, {seeds_line(records)}, {records[0].settings['steps']} steps, order 1/2 over whole sequences. "
    )
    points = where + "Held-out loss as it is and after each cut, and its change against plain after the same one.\n\n"
    lead = []
    for (method, weight), found in sorted(groups.items()):
        for cut in CUTS if method == "gapt" else ():
            ours, theirs = where_equal(found, [r for r in records if r.settings["method"] != "gapt"], "loss", cut)
            if len(ours) > 1:
                c = compare(ours, theirs)
                lead.append([f"{weight:g}", OPERATIONS[cut], f"{len(ours)}", difference_cell(c), p_cell(c.p_t)])
    title = (
        "Loss of the gate after a cut less that of a penalty (plain being one of weight 0) with the same loss before "
        "it, by straight lines between its weights, seed by seed. Negative: the gate's curve lies beyond.\n\n"
    )
    return {
        "directions": points + table(header, rows),
        "directions-lead": title
        + table(["gate's weight", "kept", "seeds", "difference (nats)", "p"], lead, text_columns=2),
    }


def _cell(found: list[Record], plain: list[Record], name: str) -> str:
    change = "" if found == plain else f" ({change_cell(versus(found, plain, name))})"
    return mean_cell(found, name) + change


def pictures(records: list[Record], folder: Path) -> list[Path]:
    """Both curves, a panel per kind of cut."""
    from ..pictures import COLORS, NAMES, figure, save
    from ..stats import mean_interval

    made, axes = figure(2)
    for axis, cut in zip(axes, ("project_8", "rank_8"), strict=True):
        for method in ("penalty", "gapt"):
            curve = [r for r in records if r.settings["method"] in ("plain", method)]
            found = group(curve, "weight").values()
            points = [(mean_interval(values(g, "loss")).mean, mean_interval(values(g, cut))) for g in found]
            points.sort(key=lambda point: point[0])
            x, y = [x for x, _ in points], [y.mean for _, y in points]
            errors = [[i.mean - i.low for _, i in points], [i.high - i.mean for _, i in points]]
            axis.errorbar(x, y, yerr=errors, color=COLORS[method], marker="o", ms=4, lw=1.4, elinewidth=0.8,
                          label=NAMES[method])  # fmt: skip
        axis.set(xlabel="held-out loss (nats)", ylabel="the same with " + OPERATIONS[cut])
    axes[0].legend(frameon=False, fontsize=8)
    return [save(made, folder / "directions.png")]
