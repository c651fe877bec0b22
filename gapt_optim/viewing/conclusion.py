"""The end of a comparison in a terminal: a table, and two sentences that say what it means."""

from __future__ import annotations

import math
import platform
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from .._version import __version__
from ..runs.run_folder import RESULTS, RunFolder

Run = Mapping[str, Any]
_ROWS: dict[str, Callable[[Run], float]] = {
    "held-out loss (nats)": lambda run: run["loss"],
    "pressed entropy (nats)": lambda run: run["entropy"],
    "linear entropy (nats)": lambda run: run["measures"]["linear_entropy"],
    "centered cosine entropy (nats)": lambda run: run["measures"]["centered_cosine_entropy"],
    "norm ratio": lambda run: run["measures"]["norm_ratio"],
    "mean share": lambda run: run["measures"]["mean_share"],
}


def figures(history: Any) -> dict[str, Any]:
    """The figures of a run that a comparison shows, from a `RunHistory`.

    >>> from gapt_optim.viewing import RunHistory
    >>> run = RunHistory([{"step": 1, "phase": "memorization"}], validations=[{"step": 1, "loss": 2.0}])
    >>> figures(run)["compression_share"]
    0.0

    Returns:
        its last validation (``step``, ``loss``, ``entropy``, ``layer_entropy``, ``measures``, ``layer_measures``),
        ``compression_share`` (of its steps), ``switches`` (how many) and ``switch_list``.
    """
    steps = history.steps
    switches = [
        {"step": record["step"], "to": record["next_phase"], "reason": record["reason"]}
        for record in steps
        if record.get("reason")
    ]
    return {
        **history.validations[-1],
        "compression_share": sum(record["phase"] == "compression" for record in steps) / len(steps),
        "switches": len(switches),
        "switch_list": switches,
    }


def summary(runs: Mapping[str, Run]) -> str:
    """A column for each run, with the change against ``plain`` in parentheses, and what it means in plain English.

    Args:
        runs: what `figures` gives, by method.

    Example:
        >>> measures = {"linear_entropy": 1.0, "centered_cosine_entropy": 1.0, "norm_ratio": 1.5, "mean_share": 0.3}
        >>> run = {"loss": 2.2, "entropy": 1.0, "measures": measures, "compression_share": 0.0, "switches": 0}
        >>> print(summary({"plain": run}).splitlines()[-1])
        Train plain and gapt in one run to see what compression changes.
    """
    rows = [["", *runs]]
    for name, read in _ROWS.items():
        values = {method: read(run) for method, run in runs.items()}
        plain = values.get("plain")
        changes = [f" ({v / plain - 1:+.1%})" if plain and method != "plain" else "" for method, v in values.items()]
        rows.append([name, *(f"{value:.3f}{change}" for value, change in zip(values.values(), changes, strict=True))])
    rows.append(["steps in compression", *(f"{run['compression_share']:.0%}" for run in runs.values())])
    rows.append(["phase switches", *(str(run["switches"]) for run in runs.values())])
    first, *others = (max(len(row[column]) for row in rows) for column in range(len(rows[0])))
    lines = [
        f"| {row[0]:<{first}} | " + " | ".join(f"{cell:>{w}}" for cell, w in zip(row[1:], others, strict=True)) + " |"
        for row in rows
    ]
    lines.insert(1, f"|{'-' * (first + 2)}|" + "".join(f"{'-' * (w + 1)}:|" for w in others))
    return "\n".join([*lines, "", meaning(runs)])


def meaning(runs: Mapping[str, Run]) -> str:
    """Two sentences: what GAPT cost, and whether what its entropy shows is compression."""
    if not {"plain", "gapt"} <= set(runs):
        return "Train plain and gapt in one run to see what compression changes."
    plain, gapt = runs["plain"], runs["gapt"]
    if gapt["switches"] == 0 and gapt["compression_share"] == 0:
        return (
            "The gate never started compression, because the loss it judges kept falling, so GAPT trained exactly as "
            "plain did. Train for more steps, or lower --gapt.gate.patience-memorization, to see it compress."
        )
    loss = gapt["loss"] / plain["loss"] - 1
    cost = f"{abs(loss):.1%} {'above' if loss > 0 else 'below'}" if abs(loss) >= 0.0005 else "within 0.05 % of"
    first = (
        f"GAPT spent {gapt['compression_share']:.0%} of its steps in compression and ended with a held-out loss {cost} "
        "plain training's."
    )
    before, after = plain["measures"], gapt["measures"]
    ranks = [math.exp(measures["centered_cosine_entropy"]) for measures in (before, after)]
    linear = 1 - after["linear_entropy"] / max(before["linear_entropy"], 1e-9)
    tokens = (
        f"the tokens of a window spread over {ranks[1]:.2f} directions instead of {ranks[0]:.2f} (centered, by cosine)"
    )
    if after["norm_ratio"] > 1.5 * before["norm_ratio"]:
        grew = after["norm_ratio"] / before["norm_ratio"]
        other = f"the longest token of a window grew {grew:.1f} times longer beside the others, which hides them"
    elif after["mean_share"] > before["mean_share"] + 0.15:
        shared = after["mean_share"] - before["mean_share"]
        other = f"one vector that all tokens share took {shared:.0%} more of their squared norm"
    else:
        other = "neither long tokens nor a vector that all share, which can fake a fall, explain it"
    if 1 - ranks[1] / ranks[0] >= 0.02:
        return f"{first} Its layers are compressed: {tokens}; {other}."
    if linear > 0.1:
        return f"{first} That is no compression: the linear entropy fell by {linear:.0%}, but {tokens}; {other}."
    return f"{first} Its layers are hardly compressed: {tokens}."


def conclude(folder: RunFolder, methods: Sequence[str], facts: Mapping[str, Any]) -> dict[str, Any]:
    """The end of a comparison: pictures, the page, ``results.json``, and the summary, which is printed.

    >>> import contextlib, io, json
    >>> measures = {"linear_entropy": 1.2, "centered_cosine_entropy": 1.4, "norm_ratio": 2.0, "mean_share": 0.1}
    >>> held_out = {"step": 1, "loss": 2.0, "entropy": 1.4, "layer_entropy": {"h.0": 1.4}, "measures": measures}
    >>> record = {"step": 1, "phase": "memorization", "loss": 2.1, "entropy": 1.4, "layer_entropy": {"h.0": 1.4},
    ...           "alignment": {"cosine": 0.1, "layers": {"h.0": {"cosine": 0.1}}}}
    >>> folder = RunFolder.claim("comparison")
    >>> plain = folder.child("plain")
    >>> for name, written in (("metrics.jsonl", record), ("validation.jsonl", held_out)):
    ...     size = plain.file(name).write_text(json.dumps(written))
    >>> with contextlib.redirect_stdout(io.StringIO()) as said:
    ...     results = conclude(folder, ["plain"], {"seed": 0})
    >>> results["runs"]["plain"]["loss"], "report.html" in said.getvalue()
    (2.0, True)

    Args:
        folder: of the comparison, with a sub-folder for each of ``methods``.
        facts: what else belongs into ``results.json``, such as the seed.

    Returns:
        the results: ``runs`` (`figures` of each method), ``facts`` and ``versions``.
    """
    from .history import read_run
    from .pictures import draw_alignment, draw_entropy_map, draw_training
    from .report import write_report

    histories = {method: read_run(folder.path / method) for method in methods}
    runs = {method: figures(history) for method, history in histories.items()}
    pictures = [folder.file(name) for name in ("training.png", "layers.png", "alignment.png")]
    draw_training(histories, pictures[0])
    draw_entropy_map(histories, pictures[1])
    draw_alignment(histories, pictures[2])
    page = folder.file("report.html")
    write_report(histories, page, baseline="plain" if "plain" in runs else None)
    results = {"runs": runs, **facts, "versions": versions()}
    folder.write_json(RESULTS, results)  # last: a folder with results is a finished run
    print(f"\n{summary(runs)}\n\nPictures: {', '.join(map(str, pictures))}\nPage: {page}", flush=True)
    return results


def versions() -> dict[str, str]:
    """What the numbers were made with."""
    found = {"python": platform.python_version(), "gapt_optim": __version__}
    for name in ("torch", "transformers"):
        with suppress(PackageNotFoundError):
            found[name] = version(name)
    return found
