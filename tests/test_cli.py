"""The command `gapt-optim`, as a user types it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from gapt_optim.cli import COMMANDS, main

from .reporting.runs import HOSTILE, records, write_lines, write_run

pytest.importorskip("tyro", reason="tyro is not installed")


@pytest.fixture
def there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder to stand in."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


ERRORS = [
    (["report", "nowhere"], "there is no folder 'nowhere'"),
    (["report", "empty"], "the folder 'empty' has no metrics.jsonl"),
    (["report", "other"], "holds no metrics"),
    (["report", "run", "--baseline", "b"], "baseline='b' is none of the runs"),
    (["watch", "nowhere"], "there is no folder 'nowhere'"),
    (["watch", "empty", "--once"], "has no metrics.jsonl"),
    (["watch", "run", "--interval", "0"], "--interval must be above 0"),
    (["report", "run", "--out", "run/metrics.jsonl"], "--out run/metrics.jsonl must end in .html, .png"),
    (["report", "run/metrics.jsonl"], "is a file; give the folder of the run, 'run'"),
    (["watch", "run/metrics.jsonl"], "is a file; give the folder of the run, 'run'"),
    (["doctor"], "give the folder of at least one run"),
    (["doctor", "nowhere"], "there is no folder"),
]


@pytest.mark.parametrize(("argv", "message"), ERRORS, ids=lambda value: " ".join(value)[:60])
def test_errors_are_one_clear_line(
    argv: list[str], message: str, there: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (there / "empty").mkdir()
    write_lines(there / "run" / "metrics.jsonl", records(20))
    (there / "other").mkdir()
    (there / "other" / "metrics.jsonl").write_text("no\nmetrics\n")
    assert main(argv) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ")
    assert said.count("\n") == 1
    assert message in said


def test_report_of_runs_comparisons_and_seeds(there: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for seed in (0, 1):
        for name in ("plain", "gapt"):
            write_run(there / f"seed{seed}" / name, seed=seed, plain=name == "plain", steps=60)
    path = there / "seed0" / "gapt" / "metrics.jsonl"
    path.write_text(path.read_text()[:-9])
    assert main(["report", "seed0", "seed1", "other=seed0/gapt", "--out", "page.html", "--title", HOSTILE]) == 0
    shown = capsys.readouterr().out
    assert "note: gapt: metrics.jsonl: the last line is cut off" in shown
    assert "wrote page.html" in shown
    page = (there / "page.html").read_text()
    assert "gapt (2 seeds)" in page
    assert ">other<" in page


def test_doctor_says_what_is_wrong(there: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_run(there / "run", steps=400, period=200, norms=True)
    assert main(["doctor", "run"]) == 0
    shown = capsys.readouterr().out
    assert "The entropy moved by token norms alone." in shown
    assert "Change: Set entropy.kernel to cosine and entropy.center to true." in shown
    assert max(map(len, shown.splitlines())) <= 80


def test_watch_shows_phase_switches_and_lines(there: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_run(there / "run")
    (there / "run" / "results.json").touch()
    assert main(["watch", "run"]) == 0
    shown = capsys.readouterr().out
    assert "step            200  ended" in shown
    assert "held-out loss" in shown
    assert "compressed: memorization" in shown
    assert "plateau: compression" in shown
    assert "█" in shown


def test_in_a_terminal_the_screen_is_drawn_in_place(
    there: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")  # a terminal to rich
    monkeypatch.setenv("TERM", "xterm")
    write_run(there / "run")
    (there / "run" / "results.json").touch()
    assert main(["watch", "run"]) == 0
    shown = capsys.readouterr().out
    assert "\x1b[?25l" in shown  # the cursor is hidden,
    assert "\x1b[?25h" in shown  # and comes back
    assert "compressed: memorization" in shown


def test_watch_of_what_is_no_metrics(there: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_lines(there / "odd" / "metrics.jsonl", []).write_text('{"step": 1e999}\n[3]\nhello\n')
    assert main(["watch", "odd", "--once"]) == 0
    assert "3 lines could not be read" in capsys.readouterr().out
    (there / "folder" / "metrics.jsonl").mkdir(parents=True)
    assert main(["watch", "folder", "--once"]) == 2
    assert "metrics.jsonl cannot be read or written" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["profile", "m"], "--data"),
        (["nothing"], "nothing"),
        (["profile", "m", "--data", "text.txt", "--dtype", "int4"], "--dtype"),
        (["profile", "m", "--data", "text.txt", "--batch-size", "many"], "--batch-size"),
    ],
)
def test_wrong_flags_are_explained(argv: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(argv) == 2
    said = capsys.readouterr()
    assert message in said.err
    assert said.out == ""


def test_a_picture_of_runs(there: Path) -> None:
    write_run(there / "run")
    assert main(["report", "run", "--out", "run.png"]) == 0
    assert (there / "run.png").read_bytes().startswith(b"\x89PNG")


def test_without_arguments_it_shows_its_commands(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2
    shown = capsys.readouterr().out
    assert all(name in shown for name in COMMANDS)
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("gapt-optim ")


def test_a_missing_package_is_one_line() -> None:
    code = "import sys; sys.modules['tyro'] = None; from gapt_optim.cli import main; raise SystemExit(main(['doctor']))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: gapt-optim needs the package tyro; pip install")


def test_a_module_of_ours_that_is_missing_is_no_matter_of_packages(there: Path) -> None:
    """An installation that is broken: pip would not mend it."""
    write_run(there / "run")
    code = "import sys; sys.modules['gapt_optim.reporting'] = None; from gapt_optim.cli import main; main(sys.argv[1:])"
    done = subprocess.run([sys.executable, "-c", code, "doctor", "run"], capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith("ModuleNotFoundError: import of gapt_optim.reporting halted")


@pytest.mark.parametrize("command", ["", *COMMANDS])
def test_help_fits_a_screen_and_imports_nothing_heavy(command: str) -> None:
    code = (
        "import sys; from gapt_optim.cli import main\n"
        "main(sys.argv[1:])\n"
        "print(sorted({'torch', 'numpy', 'pandas', 'transformers', 'plotly', 'matplotlib'} & set(sys.modules)))"
    )
    environment = os.environ | {"COLUMNS": "80", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    argv = [*([command] if command else []), "--help"]
    result = subprocess.run([sys.executable, "-c", code, *argv], capture_output=True, text=True, env=environment)
    assert result.returncode == 0, result.stderr
    *lines, imported = result.stdout.splitlines()
    assert imported == "[]"
    assert 8 < len(lines) <= 50
    assert all(len(line) <= 110 for line in lines)
