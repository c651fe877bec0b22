"""The command ``gapt-optim``. Nothing heavy is imported before its flags are read."""

from __future__ import annotations

import os
import sys
import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path

from .profiling.command import check_outputs, compare, explain, profile


def report(
    runs: list[str],
    /,
    out: Path = Path("report.html"),
    baseline: str | None = None,
    title: str = "Training with phases",
) -> None:
    """One self-contained page for a run or several, or a picture.

    gapt-optim report runs/plain runs/gapt --out page.html --baseline plain

    Args:
        runs: Folders of runs or of comparisons; NAME=FOLDER names one. Runs of the same name are seeds.
        out: The page (.html) or a picture (.png, .pdf, .svg).
        baseline: The run that the others are compared with (plain, or the first).
        title: Heading of the page.
    """
    check_outputs([out], (".html", ".png", ".pdf", ".svg"))
    from .reporting import draw_runs, find_runs, write_report

    found = find_runs(runs)
    if out.suffix == ".html":
        write_report(found, out, baseline=baseline, title=title)
    else:
        draw_runs({name: seeds[0] for name, seeds in found.items()}, out, title=title)
    for name, seeds in found.items():
        for note in dict.fromkeys(note for run in seeds for note in run.notes):
            print(f"note: {name}: {note}")
    print(f"wrote {out} ({out.stat().st_size / 1e6:.1f} MB)")


def watch(run: Path, /, interval: float = 1.0, patience: float = 600.0, once: bool = False) -> None:
    """A run in the terminal while it trains, until it ends.

    gapt-optim watch runs/gapt

    Args:
        run: Folder of the run.
        interval: Seconds between two looks.
        patience: Seconds without a new step after which the run counts as ended.
        once: Show it once and stop.
    """
    if interval <= 0 or patience < 0:
        raise ValueError("--interval must be above 0 and --patience at least 0 seconds")
    from rich.console import Console
    from rich.live import Live

    from .reporting.run import check_folder
    from .reporting.watch import follow, screen

    check_folder(run)
    if once and not (run / "metrics.jsonl").exists():
        raise ValueError(f"the folder {str(run)!r} has no metrics.jsonl")
    console = Console()
    looks = (screen(found, console.width, state) for found, state in follow(
        run, interval=interval, patience=patience, once=once
    ))  # fmt: skip
    if console.is_terminal and not once:
        with Live(console=console, auto_refresh=False) as live:
            for shown in looks:
                live.update(shown, refresh=True)
    else:
        *_, shown = looks
        console.print(shown)


def doctor(runs: list[str], /) -> None:
    """What is wrong with a run, and the setting to change.

    gapt-optim doctor runs/gapt

    Args:
        runs: Folders of runs.
    """
    from rich.console import Console

    from .reporting import diagnose, find_runs
    from .reporting.doctor import judged_by, verdict
    from .reporting.run import each_seed

    width = min(Console().width, 100)

    def say(text: str, indent: int) -> None:
        room = " " * indent
        print(textwrap.fill(text, width, initial_indent=room, subsequent_indent=room, break_on_hyphens=False))

    for name, seed, run in each_seed(find_runs(runs)):
        say(f"{name}{seed}", 0)
        for note in (*judged_by(run), *run.notes):
            say(f"note: {note}", 2)
        found = diagnose(run)
        if not found:
            say(verdict(run), 2)
        for one in found:
            say(f"{one.finding.title}.", 2)
            say(f"{one.what} {one.finding.why}", 4)
            say(f"Change: {one.finding.change}", 4)


COMMANDS: dict[str, Callable[..., None]] = {
    "profile": profile,
    "compare": compare,
    "explain": explain,
    "report": report,
    "watch": watch,
    "doctor": doctor,
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command. 0 when done, 2 after one clear line on stderr where it cannot be."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        return _run(arguments)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] == __name__.partition(".")[0]:
            raise
        return _failed(f'gapt-optim needs the package {error.name}; pip install "gapt_optim[viewing]"')
    except BrokenPipeError:  # head, or a closed pager
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except FileNotFoundError as error:
        return _failed(f"there is no file {str(error.filename)!r}")
    except OSError as error:
        return _failed(f"{error.filename} cannot be read or written ({error.strerror})" if error.filename else error)
    except (ValueError, ImportError) as error:
        return _failed(error)
    except KeyboardInterrupt:
        return 130


def _run(arguments: list[str]) -> int:
    if arguments == ["--version"]:
        from ._version import __version__

        print(f"gapt-optim {__version__}")
        return 0
    import tyro

    try:
        tyro.extras.subcommand_cli_from_dict(
            COMMANDS,
            prog="gapt-optim",
            description="The layers of a model, and a run: while it trains, as a page, and what is wrong with it.",
            args=arguments or ["--help"],
            config=(tyro.conf.FlagCreatePairsOff,),
        )
    except SystemExit as end:  # of tyro, after --help or a wrong flag, which it has explained
        return int(end.code or 0) if arguments else 2
    return 0


def _failed(error: object) -> int:
    text = " ".join(str(error).split())
    print(f"error: {text}", file=sys.stderr, flush=True)
    return 2
