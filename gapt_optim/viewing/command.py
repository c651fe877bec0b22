"""The command ``gapt-optim``. Nothing heavy is imported before its flags are read."""

from __future__ import annotations

import contextlib
import io
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from .errors import CommandError, flag_error

if TYPE_CHECKING:
    from .history import RunHistory
    from .layer_profile import Profile

Positional: Any = tyro.conf.Positional
arg = tyro.conf.arg


@dataclass
class ProfileCommand:
    """The layers of a model on some data, without training: entropies by kernel, norms, curvature, RankMe.

    gapt-optim profile ./my-llama --data text.txt --out page.html
    """

    model: Annotated[str, Positional, arg(metavar="MODEL")]
    """A transformers folder or hub name, or module:build."""
    data: Annotated[str, arg(metavar="DATA")]
    """Text (.txt, .jsonl, .parquet) or module:batches."""
    out: Annotated[list[Path], arg(metavar="FILE ...", help_behavior_hint="")] = field(default_factory=list)
    """Files to write: .html, .json or .png."""
    layers: Annotated[list[str] | None, arg(metavar="NAME ...", help_behavior_hint="")] = None
    """Globs over modules; default: the longest list."""
    windows: Annotated[list[str], arg(metavar="N ...")] = field(default_factory=lambda: ["8", "all"])
    """Tokens per window; all = sequences."""
    orders: Annotated[list[float], arg(metavar="A ...")] = field(default_factory=lambda: [2.0])
    """Orders of the entropy."""
    length: Annotated[int | None, arg(metavar="N", help_behavior_hint="")] = None
    """Tokens per sequence; default: at most 512."""
    batch_size: Annotated[int, arg(metavar="N")] = 8
    """Sequences per batch."""
    tokens: Annotated[int, arg(metavar="N")] = 100_000
    """Tokens of the text to read."""
    rankme_rows: Annotated[int, arg(metavar="N")] = 25_600
    """Rows for RankMe; 0 = none."""
    views: Annotated[int, arg(metavar="N")] = 1
    """Views per item, for LiDAR."""
    device: Annotated[str | None, arg(metavar="NAME", help_behavior_hint="")] = None
    """Where to run, such as cuda."""
    dtype: Annotated[Literal["auto", "float32", "bfloat16", "float16", "float64"], arg(metavar="TYPE")] = "auto"
    """float32, bfloat16, float16 or float64."""


@dataclass
class CompareCommand:
    """Two profiles side by side, with the change of each layer.

    gapt-optim compare base.json tuned.json --out page.html
    """

    first: Annotated[Path, Positional, arg(metavar="FIRST")]
    """What profile wrote with --out first.json."""
    second: Annotated[Path, Positional, arg(metavar="SECOND")]
    """The other one."""
    out: Annotated[list[Path], arg(metavar="FILE ...", help_behavior_hint="")] = field(default_factory=list)
    """Files to write: .html, .json or .png."""


@dataclass
class ReportCommand:
    """One self-contained page for a run or several.

    gapt-optim report runs/plain runs/gapt --out page.html --baseline plain
    """

    runs: Annotated[list[str], Positional, arg(metavar="RUN ...")]
    """Folders of runs or of comparisons; NAME=FOLDER names one. Runs of the same name are seeds."""
    out: Annotated[Path, arg(metavar="FILE")] = Path("report.html")
    """The page."""
    baseline: Annotated[str | None, arg(metavar="NAME", help_behavior_hint="")] = None
    """The run that the others are compared with (plain, or the first)."""
    title: Annotated[str, arg(metavar="TEXT")] = "Training with phases"
    """Heading of the page."""


@dataclass
class WatchCommand:
    """A run in the terminal while it trains, until it ends.

    gapt-optim watch runs/gapt
    """

    run: Annotated[Path, Positional, arg(metavar="RUN")]
    """Folder of the run."""
    interval: Annotated[float, arg(metavar="SECONDS")] = 1.0
    """Seconds between two looks."""
    patience: Annotated[float, arg(metavar="SECONDS")] = 600.0
    """Seconds without a new step after which the run counts as ended."""
    once: bool = False
    """Show it once and stop."""


@dataclass
class DoctorCommand:
    """What is wrong with a run, and the setting to change.

    gapt-optim doctor runs/gapt
    """

    runs: Annotated[list[str], Positional, arg(metavar="RUN ...")]
    """Folders of runs."""


_COMMANDS: dict[str, type[Any]] = {
    "profile": ProfileCommand,
    "compare": CompareCommand,
    "report": ReportCommand,
    "watch": WatchCommand,
    "doctor": DoctorCommand,
}

_USAGE = """usage: gapt-optim COMMAND ...

Look at a model's layers, at a run while it trains, and at a page of it afterwards.

  profile   the layers of a model on some data, without training
  compare   two profiles, with the change of each layer
  report    one self-contained page for a run or several
  watch     a run in the terminal while it trains
  doctor    what is wrong with a run, and the setting to change

gapt-optim COMMAND --help says more."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command. 0 when done, 2 after one clear line on stderr where it cannot be."""
    argv = list(sys.argv[1:] if argv is None else argv)
    if not argv or argv[0] in ("-h", "--help"):
        print(_USAGE)
        return 0 if argv else 2
    if argv[0] == "--version":
        from .._version import __version__

        print(f"gapt-optim {__version__}")
        return 0
    name, *rest = argv
    if name not in _COMMANDS:
        return _failed(f"there is no command {name!r}; choose one of {', '.join(_COMMANDS)}")
    flags, status = _read_flags(name, rest)
    if flags is None:
        return status
    try:
        return _RUN[name](flags)
    except (CommandError, ImportError) as error:
        return _failed(error)
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # head, or a closed pager
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def _read_flags(name: str, argv: list[str]) -> tuple[Any, int]:
    """The flags, or None and the exit code."""
    said = io.StringIO()
    config = (tyro.conf.FlagCreatePairsOff,)
    try:
        with contextlib.redirect_stderr(said):
            return tyro.cli(_COMMANDS[name], prog=f"gapt-optim {name}", args=argv, config=config), 0
    except SystemExit as end:
        if not end.code:
            return None, 0
    return None, _failed(f"{flag_error(said.getvalue())} (gapt-optim {name} --help)")


def _failed(error: object) -> int:
    text = " ".join(str(error).split())
    print(f"error: {text}", file=sys.stderr, flush=True)
    return 2


def _profile(flags: ProfileCommand) -> int:
    _check_outputs(flags.out)
    windows = [_window(text) for text in flags.windows]
    from .layer_profile import profile
    from .model_loading import checked_device, dtype_named, is_python, load_batches, load_model
    from .profile_view import print_table, profile_table, summary_line

    device = checked_device(flags.device)
    model = load_model(flags.model)
    batches = load_batches(
        flags.data, flags.model, model=model, length=flags.length, batch_size=flags.batch_size, tokens=flags.tokens
    )
    name = flags.model if is_python(flags.model) else Path(flags.model).name or flags.model
    data = flags.data if is_python(flags.data) else Path(flags.data).name
    try:
        result = profile(
            model, batches, flags.layers, orders=flags.orders, windows=windows, views=flags.views,
            rankme_rows=flags.rankme_rows, device=device, dtype=dtype_named(flags.dtype), progress=sys.stderr.isatty(),
            name=name, data=data,
        )  # fmt: skip
    except CommandError:
        raise
    except Exception as error:
        # What a model raises on data that does not fit it, and what profile says of layers, orders and windows.
        lines = str(error).strip().splitlines()
        kind = "" if isinstance(error, ValueError) else f"{type(error).__name__}: "
        raise CommandError(f"{kind}{lines[0] if lines else repr(error)}") from error
    print_table(summary_line(result), *profile_table(result))
    for note in result.notes:
        print(f"note: {note}")
    _write_profiles({name: result}, flags.out, f"Layers of {name}")
    return 0


def _compare(flags: CompareCommand) -> int:
    _check_outputs(flags.out)
    compared = {flags.first.resolve(), flags.second.resolve()}
    for path in flags.out:
        if path.resolve() in compared:
            raise CommandError(f"--out {path} is one of the profiles to compare; choose another name")
    from .layer_profile import Profile
    from .profile_view import comparison_table, print_table

    profiles: dict[str, Profile] = {}
    for path in (flags.first, flags.second):
        try:
            one = Profile.load(path)
        except FileNotFoundError:
            raise CommandError(f"there is no file {str(path)!r}") from None
        except (OSError, ValueError) as error:
            raise CommandError(error) from error
        name = path.stem if path.stem not in profiles else str(path)
        profiles[name if name not in profiles else f"{name} (2)"] = one
    (first, before), (second, after) = profiles.items()
    try:
        print_table(f"{second}, and its change from {first}", *comparison_table(before, after))
    except ValueError as error:
        raise CommandError(error) from error
    _write_profiles(profiles, flags.out, f"From {first} to {second}")
    return 0


def _report(flags: ReportCommand) -> int:
    if flags.out.suffix != ".html":  # a run or a script of the user's would be overwritten
        raise CommandError(f"--out {flags.out} must end in .html")
    from .report import write_report

    runs = _given(flags.runs)
    try:
        path = write_report(runs, flags.out, baseline=flags.baseline, title=flags.title)
    except (OSError, ValueError) as error:
        raise CommandError(error) from error
    notes = [f"note: {name}: {note}" for name, seeds in runs.items() for run in seeds for note in run.notes]
    for line in (*notes, f"wrote {path} ({path.stat().st_size / 1e6:.1f} MB)"):
        print(line)
    return 0


def _watch(flags: WatchCommand) -> int:
    _check_folder(flags.run)
    if flags.interval <= 0 or flags.patience < 0:
        raise CommandError("--interval must be above 0 and --patience at least 0 seconds")
    from rich.console import Console
    from rich.live import Live

    from .watch import follow, screen

    console = Console()
    if flags.once and not (flags.run / "metrics.jsonl").exists():
        raise CommandError(f"the folder {str(flags.run)!r} has no metrics.jsonl")
    looks = follow(flags.run, interval=flags.interval, patience=flags.patience, once=flags.once)
    with contextlib.ExitStack() as stack:
        live: Live | None = None
        if console.is_terminal and not flags.once:
            live = stack.enter_context(Live(console=console, auto_refresh=False))
        shown: Any = None
        for follower, state in looks:
            shown = screen(str(flags.run), follower.records, console.width, follower.unreadable, state)
            if live is not None:
                live.update(shown, refresh=True)
    if live is None:
        console.print(shown)
    return 0


def _doctor(flags: DoctorCommand) -> int:
    from .doctor import diagnose, judged_by, verdict

    for name, seeds in _given(flags.runs).items():
        for i, run in enumerate(seeds):
            print(f"{name}{f', seed {i + 1}' if len(seeds) > 1 else ''}")
            for note in (*judged_by(run), *run.notes):
                print(f"  note: {note}")
            found = diagnose(run)
            if not found:
                print(f"  {verdict(run, found)}")
            for one in found:
                print(f"  {one.title}.\n    {one.what} {one.why}\n    Change: {one.change}")
    return 0


_RUN: dict[str, Callable[[Any], int]] = {
    "profile": _profile,
    "compare": _compare,
    "report": _report,
    "watch": _watch,
    "doctor": _doctor,
}


def _given(specs: Sequence[str]) -> dict[str, list[RunHistory]]:
    if not specs:
        raise CommandError("give the folder of at least one run")
    return find_runs(specs)


def find_runs(specs: Sequence[str]) -> dict[str, list[RunHistory]]:
    """Runs by name, from folders of runs, folders that hold folders of runs, and NAME=FOLDER.

    Raises:
        CommandError: a folder is not there or holds no run.
    """
    from .history import methods_of, read_run, read_settings

    found: dict[str, list[RunHistory]] = {}
    for spec in specs:
        name, equals, rest = spec.partition("=")
        named = bool(equals) and not Path(spec).exists()
        folder = Path(rest if named else spec)
        _check_folder(folder)
        folders = {name if named else folder.resolve().name: folder}
        if not (folder / "metrics.jsonl").exists():
            inside = {child.name: child for child in sorted(folder.iterdir()) if (child / "metrics.jsonl").is_file()}
            order = methods_of(read_settings(folder))
            inside = {method: inside[method] for method in order if method in inside} | inside
            if not inside:
                raise CommandError(f"the folder {str(folder)!r} has no metrics.jsonl: no run wrote there")
            folders = {f"{name}/{child}" if named else child: path for child, path in inside.items()}
        for run, path in folders.items():
            try:
                found.setdefault(run, []).append(read_run(path))
            except OSError as error:
                raise CommandError(f"{error.filename or path} cannot be read ({error.strerror})") from error
            except ValueError as error:
                raise CommandError(error) from error
    return found


def _write_profiles(profiles: dict[str, Profile], paths: Sequence[Path], title: str) -> None:
    from .profile_view import draw_profile, write_profile

    for path in paths:
        try:
            if path.suffix == ".json":
                import json

                path.parent.mkdir(parents=True, exist_ok=True)
                if len(profiles) == 1:
                    next(iter(profiles.values())).save(path)
                else:
                    tables = {name: one.as_dict() for name, one in profiles.items()}
                    path.write_text(json.dumps(tables, allow_nan=False, indent=1) + "\n", encoding="utf-8")
            elif path.suffix == ".html":
                write_profile(profiles, path, title=title)
            else:
                draw_profile(profiles, path, title=title)
        except (OSError, ValueError) as error:
            raise CommandError(error) from error
        print(f"wrote {path}")


def _check_folder(path: Path) -> None:
    if path.is_file():
        raise CommandError(f"{str(path)!r} is a file; give the folder of the run, {str(path.parent)!r}")
    if not path.is_dir():
        raise CommandError(f"there is no folder {str(path)!r}")


def _check_outputs(paths: Sequence[Path]) -> None:
    for path in paths:
        if path.suffix not in (".html", ".json", ".png"):
            raise CommandError(f"--out {path} must end in .html, .json or .png")


def _window(text: str) -> int | None:
    if text == "all":
        return None
    try:
        size = int(text)
    except ValueError:
        size = 0
    if size < 2:
        raise CommandError(f'--windows takes numbers of at least 2 and "all", found {text!r}')
    return size
