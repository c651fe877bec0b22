"""python -m benchmarks.evidence: run experiments, and make tables and pictures of their results."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import tyro

REPOSITORY = Path(__file__).resolve().parents[2]
GENERATED = REPOSITORY / "docs" / "generated"
RUNS = REPOSITORY / "runs" / "evidence"
FIRST_LOOK = "-first-look"


@dataclass
class Train:
    """Train what an experiment lacks, and write its results."""

    experiment: Annotated[str, tyro.conf.Positional]
    """One of those that `list` names."""
    first_look: bool = False
    """A smaller setting, within 15 minutes on two free cores."""
    seeds: tuple[int, ...] = ()
    """Seeds instead of the experiment's own."""
    only: tuple[str, ...] = ()
    """Only runs with these settings, such as task=text or method=gapt. Several are all needed."""
    limit: int | None = None
    """Only this many of the runs, from the beginning of the list: what there is time for."""
    workers: int = 2
    """Processes of one thread each."""
    estimate: bool = False
    """Say how long it takes, and train nothing."""
    collect: bool = False
    """Train nothing, and write the results of the runs that are finished."""
    go_on: bool = False
    """Count what the committed results hold as finished, also where its files are gone."""
    runs: Path = RUNS
    """Where a file per finished run is kept."""


@dataclass
class Tables:
    """Write the markdown tables of all committed results."""

    check: bool = False
    """Write nothing; exit with 1 where a table differs from its file."""
    out: Path = GENERATED
    """Folder of the tables."""


@dataclass
class Pictures:
    """Draw the pictures of all committed results."""

    experiments: Annotated[tuple[str, ...], tyro.conf.Positional] = ()
    """Of these alone."""
    out: Path = GENERATED
    """Folder of the pictures."""


@dataclass
class List:
    """Name the experiments and what each asks."""


@dataclass
class Options:
    """What the method does, measured over seeds."""

    command: Annotated[
        Annotated[Train, tyro.conf.subcommand("run")]
        | Annotated[Tables, tyro.conf.subcommand("tables")]
        | Annotated[Pictures, tyro.conf.subcommand("pictures")]
        | Annotated[List, tyro.conf.subcommand("list")],
        tyro.conf.OmitSubcommandPrefixes,
    ] = field(default_factory=List)


def main(argv: list[str] | None = None) -> int:
    """The exit code."""
    words = sys.argv[1:] if argv is None else argv
    options = tyro.cli(Options, prog="python -m benchmarks.evidence", args=words)
    try:
        if isinstance(options.command, Train):
            return train(options.command)
        if isinstance(options.command, Tables):
            return tables(options.command)
        if isinstance(options.command, Pictures):
            return pictures(options.command)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    from .experiments import NAMES, load

    for name in NAMES:
        print(f"{name:16s}{(load(name).__doc__ or '').splitlines()[0]}")
    return 0


def train(options: Train) -> int:
    """Train, and write results of what is finished even if something failed."""
    from . import harness
    from .experiments import load

    experiment = load(options.experiment)
    planned = experiment.runs(options.first_look, options.seeds or None)
    runs = [run for run in planned if _wanted(run, options.only)][: options.limit]
    if not runs:
        raise ValueError(f"--only {' '.join(options.only)} leaves no run of {options.experiment}")
    if options.estimate:
        seconds = harness.estimate(runs)
        print(f"{len(runs)} runs, {seconds / 60 / options.workers:.0f} minutes with {options.workers} worker(s)")
        return 0
    folder = options.runs / options.experiment
    name = options.experiment + (FIRST_LOOK if options.first_look else "")
    if options.go_on and (harness.RESULTS / f"{name}.json").exists():
        harness.restore(harness.read_results(name), folder)
    if not options.collect:
        try:
            harness.train_missing(runs, folder, workers=options.workers, say=harness.log)
        except harness.RunFailedError as error:
            print(f"error: {error}", file=sys.stderr)
            return 1
    # All that is there, so that a sweep in parts (--only, --limit) ends with the whole.
    records = harness.finished(planned, folder)
    if not records:
        raise ValueError(f"{folder} holds no finished run of {name}")
    planned_keys = {run.key for run in planned}
    path = harness.write_results(name, records, _command(options), planned=len(planned_keys))
    print(f"Written: {path} ({len(records)} of {len(planned_keys)} runs)")
    for text in experiment.tables(records).values():
        print(f"\n{text}")
    return 0


def _command(options: Train) -> str:
    """What trains the whole of which a results file holds what is finished."""
    words = ["python", "-m", "benchmarks.evidence", "run", options.experiment]
    words += ["--first-look"] if options.first_look else []
    words += ["--seeds", *map(str, options.seeds)] if options.seeds else []
    return " ".join(words)


def _wanted(run: object, only: tuple[str, ...]) -> bool:
    from .harness import Run

    assert isinstance(run, Run)
    known = {**run.described, "task": run.task}
    for condition in only:
        name, _, value = condition.partition("=")
        if name not in known:
            raise ValueError(f"--only {condition}: runs have {', '.join(known)}")
        found = f"{known[name]:g}" if isinstance(known[name], float) else str(known[name])
        if found.lower() != value.lower():
            return False
    return True


def all_tables() -> dict[str, str]:
    """Every table of every committed result, by the name of its file."""
    from . import harness
    from .experiments import load

    found: dict[str, str] = {}
    for path in sorted(harness.RESULTS.glob("*.json")):
        name = path.stem
        for table, text in load(name.split("-")[0]).tables(harness.read_results(name)).items():
            suffix = FIRST_LOOK if name.endswith(FIRST_LOOK) else ""
            found[f"evidence-{table}{suffix}.md"] = (
                f"<!-- Generated by `python -m benchmarks.evidence tables` from {path.name}. -->\n\n{text}\n"
            )
    return found


def tables(options: Tables) -> int:
    """Write them, or compare."""
    made = all_tables()
    there = {path.name: path.read_text(encoding="utf-8") for path in options.out.glob("evidence-*.md")}
    if options.check:
        differing = sorted(name for name in made.keys() | there.keys() if made.get(name) != there.get(name))
        for name in differing:
            print(f"{options.out / name} differs from the results: run python -m benchmarks.evidence tables")
        return 1 if differing else 0
    options.out.mkdir(parents=True, exist_ok=True)
    for name in there.keys() - made.keys():
        (options.out / name).unlink()
    for name, text in made.items():
        (options.out / name).write_text(text, encoding="utf-8")
        print(options.out / name)
    return 0


def pictures(options: Pictures) -> int:
    """Draw."""
    from . import harness
    from .experiments import load

    for path in sorted(harness.RESULTS.glob("*.json")):
        name = path.stem.removesuffix(FIRST_LOOK)
        if options.experiments and name not in options.experiments:
            continue
        if path.stem.endswith(FIRST_LOOK) and (harness.RESULTS / f"{name}.json").exists():
            continue  # the whole experiment's picture stands
        for made in load(name).pictures(harness.read_results(path.stem), options.out):
            print(made)
    return 0


if __name__ == "__main__":
    sys.exit(main())
