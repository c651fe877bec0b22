"""The main example over two processes of torchrun: the numbers and files of one process."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import gpt2_fineweb
import pytest

from tests.examples.conftest import EXAMPLES, Run, environment, read_lines

# The batch of every step is three micro-batches of two sequences, that of each rank three of one.
SHARED = ["--accumulation", "3", "--eval-sequences", "5", "--methods", "gapt"]


def start(*argv: str) -> subprocess.Popen[str]:
    """The script under torchrun, on a free port of its own."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    return subprocess.Popen(
        [sys.executable, *torchrun, str(EXAMPLES / "gpt2_fineweb.py"), *argv],
        env={**environment(), "GLOO_SOCKET_IFNAME": "lo"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finished(process: subprocess.Popen[str], code: int = 0) -> tuple[str, str]:
    """What it printed. torchrun ends with 1 whatever its processes end with."""
    try:
        out, err = process.communicate(timeout=300)
    except subprocess.TimeoutExpired:
        process.kill()
        raise
    assert process.returncode == code, err
    return out, err


def assert_alike(found: Path, expected: Path) -> None:
    """The same steps, phases and validations, to the rounding of sums in another order."""
    for name in ("metrics.jsonl", "validation.jsonl"):
        here, there = read_lines(found / name), read_lines(expected / name)
        assert [record["step"] for record in here] == [record["step"] for record in there]
        for a, b in zip(here, there, strict=True):
            assert (a.get("phase"), a.get("reason")) == (b.get("phase"), b.get("reason"))
            assert a["loss"] == pytest.approx(b["loss"], rel=1e-5)
            for key in ("entropy", "layer_entropy", "measures"):
                if b[key] is None:  # measures, where they are not due
                    assert a[key] is None
                else:
                    assert a[key] == pytest.approx(b[key], rel=1e-4)


def files(out: Path) -> set[str]:
    found = {path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_file()}
    return found - {"training.png", "report.html"}


@pytest.mark.slow
def test_two_ranks_equal_one_process(tiny: list[str], tmp_path: Path, run: Run) -> None:
    process = start(*tiny, *SHARED, "--out", str(tmp_path / "ranks"))
    run(gpt2_fineweb, [*tiny, *SHARED, "--out", str(tmp_path / "one")])
    out, _ = finished(process)
    assert out.count("Training GPT-2") == 1  # said by the first rank alone
    assert out.count("held-out loss  ") == 1
    assert files(tmp_path / "ranks") == files(tmp_path / "one")
    assert_alike(tmp_path / "ranks" / "gapt", tmp_path / "one" / "gapt")
    assert any(record["reason"] for record in read_lines(tmp_path / "one" / "gapt" / "metrics.jsonl"))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--batch-size 3 --accumulation 1", "--batch-size: 3 sequences cannot be divided among 2 ranks"),
        ("--data nowhere.txt", "there is no such file"),
        ("--context 4000", "tokens are fewer than one sequence"),
    ],
)
def test_what_cannot_work_ends_all_ranks(tiny: list[str], tmp_path: Path, flags: str, message: str) -> None:
    _, err = finished(start(*tiny, *flags.split(), "--out", str(tmp_path / "out")), code=1)
    assert message in err
    assert not (tmp_path / "out" / "results.json").exists()


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupted_ranks_go_on_bit_for_bit(tiny: list[str], tmp_path: Path, number: signal.Signals) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    flags = [*tiny, *SHARED, "--steps", "60", "--dropout", "0.1"]
    finished(start(*flags, "--out", str(whole)))
    process, log = start(*flags, "--out", str(parts)), parts / "gapt" / "metrics.jsonl"
    deadline = time.monotonic() + 240
    while time.monotonic() < deadline and process.poll() is None:
        if log.exists() and log.read_text().count("\n") >= 8:
            break
        time.sleep(0.01)
    process.send_signal(number)
    assert finished(process, code=1)[1].count("gapt: stopped after step ") == 1
    assert 8 <= len(read_lines(log)) < 60
    finished(start("--resume", "--out", str(parts)))
    for name in ("metrics.jsonl", "validation.jsonl"):
        assert (whole / "gapt" / name).read_text() == (parts / "gapt" / name).read_text()


@pytest.mark.slow
def test_run_goes_on_with_other_ranks(tiny: list[str], tmp_path: Path, run: Run) -> None:
    """Two ranks begin, one process makes the run longer."""
    flags: list[Any] = [*tiny, *SHARED, "--warmup", "0"]
    run(gpt2_fineweb, [*flags, "--out", str(tmp_path / "one")])
    finished(start(*flags, "--out", str(tmp_path / "ranks")))
    for name in ("one", "ranks"):
        run(gpt2_fineweb, ["--resume", "--steps", "15", "--out", str(tmp_path / name)])
        assert len(read_lines(tmp_path / name / "gapt" / "metrics.jsonl")) == 15
    assert_alike(tmp_path / "ranks" / "gapt", tmp_path / "one" / "gapt")
