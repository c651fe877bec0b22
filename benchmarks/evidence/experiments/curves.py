"""Gate against penalty as curves: loss over centred cosine entropy, five weights or more each, on text."""

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
    group_name,
    mean_cell,
    p_cell,
    seeds_line,
    table,
    values,
    versus,
)
from ..stats import Interval, at_equal, compare
from ..tasks import text

WEIGHTS = {"penalty": (0.005, 0.01, 0.02, 0.05, 0.1), "gapt": (0.01, 0.02, 0.035, 0.05, 0.1, 0.2)}
SHORT_PHASES = {"patience_memorization": 8, "patience_compression": 12}
"""The way to press that came out best on the tuning seeds of `pressing`."""
WEIGHTS_OF_SHORT_PHASES = (0.02, 0.035, 0.05, 0.1, 0.2)
SEEDS = range(300, 305)
CONFIRMING_SEEDS = range(305, 321)
"""On which the one lead among those of `SEEDS` is tested: short phases of the largest weight against the largest
penalty, which have about the same entropy. Sixteen, because the first eight left it open (p 0.07)."""
GATES = {"": "gapt", group_name(SHORT_PHASES): "gapt, short phases"}
"""Names of the gates, by their settings as `group` has them."""


def runs(first_look: bool, seeds: Sequence[int] | None) -> list[Run]:
    """Plain, the penalty and two gates at their weights; seed by seed."""
    base = text.SMALL if first_look else text.PAPER
    found = []
    for seed in seeds or SEEDS:
        of_seed = replace(base, seed=seed)
        found.append(Run("text", of_seed))
        for method, weights in WEIGHTS.items():
            found += [Run("text", replace(of_seed, method=method, weight=w)) for w in weights]
        for w in WEIGHTS_OF_SHORT_PHASES:
            found.append(Run("text", replace(of_seed, method="gapt", weight=w, gate=SHORT_PHASES)))
    for seed in () if seeds else CONFIRMING_SEEDS:
        of_seed = replace(base, seed=seed)
        strongest = {name: max(weights) for name, weights in WEIGHTS.items()}
        found += [
            Run("text", replace(of_seed, method="penalty", weight=strongest["penalty"])),
            Run("text", replace(of_seed, method="gapt", weight=strongest["gapt"], gate=SHORT_PHASES)),
        ]
    return found


def tables(records: list[Record]) -> dict[str, str]:
    """The points of all curves, the penalty's loss at the gate's entropy, and what fresh seeds say of the one lead."""
    confirming = [r for r in records if r.settings["seed"] in CONFIRMING_SEEDS]
    records = [r for r in records if r.settings["seed"] not in CONFIRMING_SEEDS]
    by_method = _by_method(records)
    plain, penalty = by_method["plain"][0.0], by_method["penalty"]
    header = ["method", "weight", "seeds", "loss", "change", "centred cosine", "change", "cosine", "linear",
              "norm ratio", "mean share", "compression", "switches"]  # fmt: skip
    rows = []
    for method, groups in by_method.items():
        for weight, found in sorted(groups.items()):
            rows.append(
                [
                    method,
                    f"{weight:g}",
                    str(len(found)),
                    mean_cell(found, "loss"),
                    "" if method == "plain" else change_cell(versus(found, plain, "loss")),
                    mean_cell(found, "centred_cosine"),
                    "" if method == "plain" else change_cell(versus(found, plain, "centred_cosine"), digits=0),
                    mean_cell(found, "cosine"),
                    mean_cell(found, "linear"),
                    mean_cell(found, "norm_ratio", digits=1),
                    mean_cell(found, "mean_share", digits=2),
                    compression_cell(found),
                    mean_cell(found, "switches", digits=0),
                ]
            )
    first = f"Bytes of text, {seeds_line(records)}, {records[0].settings['steps']} steps.\n\n" + table(header, rows)
    lead = []
    constant = [r for found in (penalty | {0.0: plain}).values() for r in found]
    for name, gate in by_method.items():
        for weight, found in sorted(gate.items()) if name in GATES.values() else ():
            ours, theirs = at_equal_entropy(found, constant)
            if len(ours) > 1:
                c = compare(ours, theirs)
                lead.append([name, f"{weight:g}", f"{len(ours)}", difference_cell(c), p_cell(c.p_t)])
    second = (
        "Loss of the gate less that of a penalty (plain being one of weight 0) at the same centred cosine entropy, by "
        "straight lines between its weights, seed by seed. Negative: the gate's curve lies beyond.\n\n"
    )
    made = {
        "curves": first,
        "curves-lead": second + table(["gate", "weight", "seeds", "difference (nats)", "p"], lead),
    }
    return made | ({"curves-strong": _strong(records, confirming)} if confirming else {})


def _strong(records: list[Record], confirming: list[Record]) -> str:
    """The strongest gate of short phases against the strongest penalty, where it was found and on fresh seeds."""
    header = ["", "loss, penalty", "gate", "its difference (nats)", "p", "centred cosine, penalty", "gate"]
    rows = []
    for found in (records, confirming):
        by_method = _by_method(found)
        penalty = by_method["penalty"][max(WEIGHTS["penalty"])]
        gate = by_method["gapt, short phases"][max(WEIGHTS_OF_SHORT_PHASES)]
        loss = versus(gate, penalty, "loss")
        if loss is None:
            continue
        rows.append(
            [
                seeds_line(gate),
                mean_cell(penalty, "loss"),
                mean_cell(gate, "loss"),
                difference_cell(loss),
                p_cell(loss.p_t),
                mean_cell(penalty, "centred_cosine"),
                mean_cell(gate, "centred_cosine"),
            ]
        )
    weights = f"{max(WEIGHTS['penalty']):g} and {max(WEIGHTS_OF_SHORT_PHASES):g}"
    title = (
        f"Where nearly all of the entropy goes: a penalty and a gate of short phases, of weights {weights}, at about "
        "the same entropy. The first row is where the lead was seen, the second a test of it alone.\n\n"
    )
    return title + table(header, rows)


def _by_method(records: list[Record]) -> dict[str, dict[float, list[Record]]]:
    """The records of each method, by weight: plain, penalty, and the gates."""
    methods: dict[str, dict[float, list[Record]]] = {}
    for (method, gate, weight), found in group(records, "method", "gate", "weight").items():
        methods.setdefault(GATES[gate] if method == "gapt" else method, {})[weight] = found
    return {name: methods[name] for name in ("plain", "penalty", *GATES.values()) if name in methods}


def at_equal_entropy(gate: list[Record], penalty: list[Record]) -> tuple[list[float], list[float]]:
    """The gate's losses, and those of penalties of the same seed at the same entropy where they reach it."""
    return where_equal(gate, penalty, "centred_cosine", "loss")


def where_equal(gate: list[Record], penalty: list[Record], x: str, y: str) -> tuple[list[float], list[float]]:
    """The gate's ``y``, and those of penalties of the same seed at the same ``x`` where they reach it."""
    ours, theirs = [], []
    for record in gate:
        same = [r for r in penalty if r.settings["seed"] == record.settings["seed"]]
        if len(same) < 2:
            continue
        found = at_equal(record.result["final"][x], values(same, x), values(same, y))
        if found == found:  # not nan: within the curve
            ours.append(record.result["final"][y])
            theirs.append(found)
    return ours, theirs


def pictures(records: list[Record], folder: Path) -> list[Path]:
    """Both curves."""
    from ..pictures import curves_of_methods, percent

    points: dict[str, list[tuple[Interval, Interval]]] = {}
    by_method = _by_method([r for r in records if r.settings["seed"] not in CONFIRMING_SEEDS])
    plain = by_method.pop("plain")[0.0]
    for name, weights in by_method.items():
        for found in weights.values():
            x, y = versus(found, plain, "centred_cosine"), versus(found, plain, "loss")
            if x is not None and y is not None:
                points.setdefault(name, []).append((percent(x.change, of_whole=True), percent(y.change)))
    return [
        curves_of_methods(
            points,
            folder / "curves.png",
            labels=("centred cosine entropy, % of plain's", "held-out loss against plain (%)"),
            title="What compression costs: gate and constant penalty",
            marked={"plain": (100.0, 0.0)},
        )
    ]
