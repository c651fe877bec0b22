"""The command ``gapt-optim``. Nothing heavy is imported before its flags are read."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from .viewing import Profile


def profile(
    model: str,
    /,
    data: str,
    out: tuple[Path, ...] = (),
    layers: tuple[str, ...] = (),
    windows: tuple[str, ...] = ("8", "all"),
    orders: tuple[float, ...] = (2.0,),
    length: int | None = None,
    batch_size: int = 8,
    tokens: int = 100_000,
    rankme_rows: int = 25_600,
    views: int = 1,
    device: str | None = None,
    dtype: Literal["auto", "float32", "bfloat16", "float16", "float64"] = "auto",
    wide: bool = False,
) -> None:
    """The layers of a model on some data, without training.

    gapt-optim profile ./my-llama --data text.txt --out page.html

    Args:
        model: A transformers folder or hub name, or module:build.
        data: Text (.txt, .jsonl, .parquet) or module:batches.
        out: Files to write: .html, .json or .png.
        layers: Globs over modules; default: the longest list.
        windows: Tokens per window; all = sequences.
        orders: Orders of the entropy.
        length: Tokens per sequence; default: at most 512.
        batch_size: Sequences per batch.
        tokens: Tokens of the text to read.
        rankme_rows: Rows for RankMe; 0 = none.
        views: Views per item, for LiDAR.
        device: Where to run, such as cuda.
        dtype: Of the model's weights.
        wide: Print all columns.
    """
    _check_outputs(out)
    sizes = [_window(text) for text in windows]
    from ._display.tables import print_table
    from .viewing import profile as profile_layers
    from .viewing.model_loading import checked_device, dtype_named, is_python, load_batches, load_model
    from .viewing.profile_view import profile_table, summary_line

    on = checked_device(device)
    loaded = load_model(model)
    batches = load_batches(data, model, model=loaded, length=length, batch_size=batch_size, tokens=tokens)
    name = model if is_python(model) else Path(model).name or model
    try:
        result = profile_layers(
            loaded, batches, layers or None, orders=orders, windows=sizes, views=views, rankme_rows=rankme_rows,
            device=on, dtype=dtype_named(dtype), progress=sys.stderr.isatty(), name=name,
            data=data if is_python(data) else Path(data).name,
        )  # fmt: skip
    except Exception as error:  # whatever a model raises on data that does not fit it
        kind = "" if isinstance(error, ValueError) else f"{type(error).__name__}: "
        raise ValueError(f"{kind}{(str(error).strip() or repr(error)).splitlines()[0]}") from error
    print_table(profile_table(result), summary_line(result), wide=wide)
    for note in result.notes:
        print(f"note: {note}")
    _write_profiles({name: result}, out, f"Layers of {name}")


def compare(first: Path, second: Path, /, out: tuple[Path, ...] = (), wide: bool = False) -> None:
    """Two profiles, with the change of each layer.

    gapt-optim compare base.json tuned.json --out page.html

    Args:
        first: What profile wrote with --out first.json.
        second: The other one.
        out: Files to write: .html, .json or .png.
        wide: Print all columns.
    """
    _check_outputs(out)
    for path in out:
        if path.resolve() in (first.resolve(), second.resolve()):
            raise ValueError(f"--out {path} is one of the profiles to compare; choose another name")
    from ._display.tables import print_table
    from .viewing import Profile
    from .viewing.profile_view import comparison_table

    profiles: dict[str, Profile] = {}
    for path in (first, second):
        name = path.stem if path.stem not in profiles else str(path)
        profiles[name if name not in profiles else f"{name} (2)"] = Profile.load(path)
    (a, before), (b, after) = profiles.items()
    print_table(comparison_table(before, after), f"{b}, and its change from {a}", wide=wide)
    _write_profiles(profiles, out, f"From {a} to {b}")


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
    # The suffix is checked first: a run or a script of the user's would be overwritten.
    _check_outputs([out], (".html", ".png", ".pdf", ".svg"))
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
    from rich.padding import Padding
    from rich.text import Text

    from .reporting import diagnose, find_runs
    from .reporting.doctor import judged_by, verdict

    console = Console()
    width = min(console.width, 100)

    def say(text: str, indent: int) -> None:
        console.print(Padding(Text(text), (0, 0, 0, indent)), width=width)

    for name, seeds in find_runs(runs).items():
        for i, run in enumerate(seeds):
            say(f"{name}{f', seed {i + 1}' if len(seeds) > 1 else ''}", 0)
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


def _write_profiles(profiles: dict[str, Profile], paths: Sequence[Path], title: str) -> None:
    import json

    from .viewing import draw_profile, write_profile

    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix == ".html":
            write_profile(profiles, path, title=title)
        elif path.suffix == ".png":
            draw_profile(profiles, path, title=title)
        elif len(profiles) == 1:
            next(iter(profiles.values())).save(path)
        else:
            tables: dict[str, Any] = {name: one.as_dict() for name, one in profiles.items()}
            path.write_text(json.dumps(tables, allow_nan=False, indent=1) + "\n", encoding="utf-8")
        print(f"wrote {path}")


def _check_outputs(paths: Sequence[Path], suffixes: Sequence[str] = (".html", ".json", ".png")) -> None:
    for path in paths:
        if path.suffix not in suffixes:
            raise ValueError(f"--out {path} must end in {', '.join(suffixes[:-1])} or {suffixes[-1]}")


def _window(text: str) -> int | None:
    if text == "all":
        return None
    if not (text.isdecimal() and int(text) >= 2):
        raise ValueError(f'--windows takes numbers of at least 2 and "all", found {text!r}')
    return int(text)
