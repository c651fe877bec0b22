"""The folder that a script writes to, and what it shows at the end. A reader can skip this."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

from gapt_optim import GAPTConfig
from gapt_optim.reporting import draw_runs, read_run, write_report

MADE_BY = "an example of gapt_optim"
OF_A_METHOD = ("settings.json", "metrics.jsonl", "validation.jsonl", "checkpoint.pt")
OF_ALL = ("settings.json", "results.json", "training.png", "report.html")
ROWS = {  # what the table shows, and where it is in a result
    "held-out loss": "loss",
    "entropy (nats)": "entropy",
    "linear entropy (nats)": "linear_entropy",
    "centered cosine entropy (nats)": "centered_cosine_entropy",
    "norm ratio": "norm_ratio",
    "mean share": "mean_share",
    "share of steps in compression": "compression_share",
    "phase switches": "switches",
}


# The folder


def read_settings(out: Path) -> dict[str, Any]:
    """Of the run in a folder; empty where there is none of ours."""
    try:
        settings = json.loads((out / "settings.json").read_text())
    except (OSError, ValueError):
        return {}
    ours = isinstance(settings, dict) and settings.get("made_by") == MADE_BY
    return settings if ours else {}


def files_in(out: Path) -> set[str]:
    return {path.relative_to(out).as_posix() for path in out.rglob("*") if not path.is_dir()}


def files_of_run(out: Path) -> set[str]:
    """What a run of ours lists, and what stands beside such a file while it is written."""
    listed = read_settings(out).get("files", [])
    return {*listed, *(name + ".partial" for name in listed)}


def check_folder(out: Path, *, resume: bool = False, overwrite: bool = False) -> None:
    """Refuse a folder that holds what no run of ours wrote, or a run that is not to be replaced."""
    if resume and overwrite:
        raise SystemExit(
            "--resume goes on with a run and --overwrite replaces it; give one of them"
        )
    if out.exists() and not out.is_dir():
        raise SystemExit(f"--out {out} is a file; give a folder")
    listed, found = files_of_run(out), files_in(out)
    foreign = sorted(found - listed)
    if foreign:
        shown = ", ".join(foreign[:3]) + (", ..." if len(foreign) > 3 else "")
        raise SystemExit(
            f"--out {out} holds what no run of ours wrote ({shown}); give another folder"
        )
    if resume and not listed:
        raise SystemExit(f"--out {out} holds no run to resume; drop --resume")
    if found and not (resume or overwrite):
        raise SystemExit(f"--out {out} holds a run; give --resume, --overwrite or another folder")


def begin_folder(
    out: Path,
    settings: Mapping[str, Any],
    configs: Mapping[str, GAPTConfig],
    more_files: Iterable[str] = (),
    *,
    keep: bool = False,
) -> None:
    """Write the settings, and list what the run may write.

    Args:
        configs: of each method.
        more_files: of the script's own, beside those that all scripts write.
        keep: do not delete what an earlier run listed.
    """
    doomed = set() if keep else files_in(out) & files_of_run(out)
    for name in doomed - {"settings.json"}:  # which lists the others until they are gone
        (out / name).unlink()
    files = [*OF_ALL, *more_files]
    files += [f"{method}/{name}" for method in configs for name in OF_A_METHOD]
    out.mkdir(parents=True, exist_ok=True)
    write_json(out / "settings.json", {"made_by": MADE_BY, **settings, "files": files})
    for method, config in configs.items():
        (out / method).mkdir(exist_ok=True)
        of_method = {"method": method, **settings, "gapt": config.model_dump(mode="json")}
        write_json(out / method / "settings.json", of_method)


def write_json(path: Path, value: Any) -> None:
    write_text(path, json.dumps(value, indent=2) + "\n")


def write_text(path: Path, content: str) -> None:
    """The file before stays whole until this one is."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(content)
    os.replace(partial, path)


# The end


def result_of(folder: Path, held_out: Mapping[str, Any]) -> dict[str, Any]:
    """The held-out values of a method, with what its last training step says of the phases."""
    last = json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])
    phases = {
        "compression_share": last["compression_steps"] / last["step"],
        "switches": last["switches"],
    }
    return {**held_out, **held_out["measures"], **phases}


def conclude(
    out: Path,
    results: Mapping[str, Mapping[str, Any]],
    more_rows: Mapping[str, str] | None = None,
    draw: Callable[[Path], None] | None = None,
) -> None:
    """Write results.json, a picture and a page; print a table and what it means.

    Args:
        more_rows: of the table: what they show, and where it is in a result.
        draw: writes the picture, where it is not that of losses and entropies.
    """
    versions = {name: version(name) for name in ("torch", "transformers")}
    write_json(out / "results.json", {"runs": results, "versions": versions})
    runs = {method: read_run(out / method) for method in results}
    if draw is None:
        draw_runs(runs, out / "training.png")
    else:
        draw(out / "training.png")
    write_report(runs, out / "report.html", baseline="plain" if "plain" in runs else None)
    print()
    print(table(results, {**ROWS, **(more_rows or {})}))
    print()
    print(meaning(results))
    print(f"\nPicture: {out / 'training.png'}\nPage: {out / 'report.html'}", flush=True)


def table(results: Mapping[str, Mapping[str, Any]], rows: Mapping[str, str]) -> str:
    """A column for each method, with the change from plain training."""
    plain = results.get("plain")
    lines = [f"{'':32}" + "".join(f"{method:>18}" for method in results)]
    for name, key in rows.items():
        line = f"{name:32}"
        for method, result in results.items():
            cell = f"{result[key]:.3f}"
            if key in ("compression_share", "switches"):
                cell = f"{result[key]:.0%}" if key == "compression_share" else f"{result[key]}"
            elif plain and plain[key] and method != "plain":
                cell += f" ({result[key] / plain[key] - 1:+.1%})"
            line += f"{cell:>18}"
        lines.append(line)
    return "\n".join(lines)


def meaning(results: Mapping[str, Mapping[str, Any]]) -> str:
    """Two sentences: what GAPT cost, and whether what its entropy shows is compression."""
    if "plain" not in results or "gapt" not in results:
        return "Train plain and gapt in one run to see what compression changes."
    plain, gapt = results["plain"], results["gapt"]
    if gapt["compression_share"] == 0:
        return (
            "The gate never started compression, because the training loss kept falling, so GAPT "
            "trained exactly as plain did. Train for more steps, or lower --patience-memorization."
        )
    change = gapt["loss"] / plain["loss"] - 1
    cost = f"{abs(change):.1%} {'above' if change > 0 else 'below'}"
    if abs(change) < 0.0005:
        cost = "within 0.05% of"
    first = (
        f"GAPT spent {gapt['compression_share']:.0%} of its steps in compression and ended with a "
        f"held-out loss {cost} plain training's."
    )
    before, after = (math.exp(run["centered_cosine_entropy"]) for run in (plain, gapt))
    spread = f"a window spreads over {after:.2f} directions instead of {before:.2f}"
    if gapt["norm_ratio"] > 1.5 * plain["norm_ratio"]:
        hidden = "the longest token of a window grew beside the others, which hides them"
    elif gapt["mean_share"] > plain["mean_share"] + 0.15:
        hidden = "one vector that all tokens share grew"
    else:
        hidden = "neither long tokens nor a vector that all share explain it"
    if after < 0.98 * before:
        return f"{first} Its layers are compressed: {spread}; {hidden}."
    if gapt["linear_entropy"] < 0.9 * plain["linear_entropy"]:
        return (
            f"{first} That is no compression, though the linear entropy fell: {spread}; {hidden}."
        )
    return f"{first} Its layers are hardly compressed: {spread}."
