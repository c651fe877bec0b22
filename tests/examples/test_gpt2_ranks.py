"""The main example over two processes of torchrun: the numbers, files and refusals of one process."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from gapt_optim.viewing import read_metrics

from tests.examples import quick
from tests.examples.conftest import ROOT, shards_on_a_cpu
from tests.examples.test_gpt2_fineweb import _no_pictures, results, run  # noqa: F401

SCRIPT = str(ROOT / "examples" / "gpt2_fineweb.py")
# The batch of every step is three micro-batches of two sequences, that of each rank three of one.
SHARED = ["--accumulation", "3", "--eval-sequences", "5", "--methods", "gapt"]


def start(*argv: str, script: str = SCRIPT) -> subprocess.Popen[str]:
    """The script under torchrun, on a free port of its own."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    return subprocess.Popen(
        [sys.executable, *torchrun, script, *argv],
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"},
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
        here, there = read_metrics(found / name), read_metrics(expected / name)
        assert [record["step"] for record in here] == [record["step"] for record in there]
        for a, b in zip(here, there, strict=True):
            assert (a.get("phase"), a.get("reason")) == (b.get("phase"), b.get("reason"))
            assert_near(a["loss"], b["loss"], 1e-5)
            assert_near(a.get("validation_loss"), b.get("validation_loss"), 1e-5)
            assert_near(a.get("entropy"), b.get("entropy"), 1e-4)
            assert_near(a.get("layer_entropy"), b.get("layer_entropy"), 1e-4)
            assert_near(a.get("measures"), b.get("measures"), 1e-4)


def assert_near(found: Any, expected: Any, tolerance: float) -> None:
    assert (found is None) == (expected is None)
    if expected is not None:
        assert found == pytest.approx(expected, rel=tolerance)


def files(folder: Path) -> set[str]:
    found = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    return {name for name in found if not name.endswith((".distcp", ".png", ".html"))}  # shards differ, pictures too


def assert_same_results(ranks: Path, one: Path) -> None:
    """Losses, entropies, validations and switches, and one set of files."""
    assert files(ranks) == files(one)
    here, there = results(ranks), results(one)
    assert (here["ranks"], there["ranks"]) == (2, 1)
    assert here["runs"]["gapt"]["switch_list"] == there["runs"]["gapt"]["switch_list"]
    assert there["runs"]["gapt"]["switches"] >= 2
    assert_alike(ranks / "gapt", one / "gapt")


@shards_on_a_cpu
def test_two_ranks_equal_one_process(tiny: list[str], tmp_path: Path) -> None:
    """DDP and FSDP2, one after the other in the same two processes, as starting these is what takes the time."""
    one, kinds = tmp_path / "one", ("ddp", "fsdp")
    flags = ["\n".join([*tiny, *SHARED, "--parallel", kind, "--out", str(tmp_path / kind)]) for kind in kinds]
    process = start(*flags, script=quick.__file__)
    run([*tiny, *SHARED, "--out", str(one)])
    out, _ = finished(process)
    assert out.count("Training GPT-2") == 2  # said by the first rank alone
    for kind in kinds:
        assert_same_results(tmp_path / kind, one)


@pytest.mark.slow
@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_the_script_itself_over_two_ranks(tiny: list[str], tmp_path: Path, parallel: str) -> None:
    """With its pictures, and one table."""
    process = start(*tiny, *SHARED, "--parallel", parallel, "--out", str(tmp_path / "ranks"))
    run([*tiny, *SHARED, "--out", str(tmp_path / "one")])
    out, _ = finished(process)
    assert out.count("| held-out loss (nats)") == 1
    assert_same_results(tmp_path / "ranks", tmp_path / "one")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("", "error: --parallel: give ddp or fsdp under torchrun"),
        ("--parallel ddp --data nowhere.txt", "no such file"),
        ("--parallel fsdp --steps 0", "error: --steps: Input should be"),
        ("--parallel ddp --batch-size 3", "error: --batch-size: the 3 sequences of a step"),
        ("--parallel fsdp --optimizer adamw8bit", "error: --optimizer adamw8bit: not over shards"),
        ("--parallel fsdp --gapt.alignment.parameter-every 2", "parameter-every: not over shards"),
        ("--parallel ddp --lr 1e30 --methods plain --steps 40", "error: "),  # in training
    ],
)
def test_refusals_are_printed_once_and_all_ranks_leave(
    tiny: list[str], tmp_path: Path, flags: str, message: str
) -> None:
    _, err = finished(start(*tiny, *flags.split(), "--out", str(tmp_path / "out")), code=1)
    assert err.count(message) == 1
    assert "exitcode: 2" in err.replace(" ", "").replace("exitcode:", "exitcode: ")
    assert not (tmp_path / "out" / "results.json").exists()


@pytest.mark.slow
@pytest.mark.parametrize(("parallel", "number"), [("ddp", signal.SIGINT), ("fsdp", signal.SIGTERM)])
def test_interrupted_ranks_go_on_bit_for_bit(
    tiny: list[str], tmp_path: Path, parallel: str, number: signal.Signals
) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    flags = [*tiny, *SHARED, "--steps", "60", "--dropout", "0.1", "--parallel", parallel]
    finished(start(*flags, "--out", str(whole)))
    process, log = start(*flags, "--out", str(parts)), parts / "gapt" / "metrics.jsonl"
    deadline = time.monotonic() + 240
    while time.monotonic() < deadline and process.poll() is None:
        if log.exists() and len(read_metrics(log)) >= 8:
            break
        time.sleep(0.01)
    process.send_signal(number)
    assert finished(process, code=1)[1].count("gapt: stopped after step ") == 1
    assert 8 <= len(read_metrics(log)) < 60
    finished(start("--resume", "--parallel", parallel, "--out", str(parts)))
    for name in ("metrics.jsonl", "validation.jsonl"):
        assert (whole / "gapt" / name).read_text() == (parts / "gapt" / name).read_text()


@pytest.mark.slow
def test_run_goes_on_with_other_ranks(tiny: list[str], tmp_path: Path) -> None:
    """One process begins, two ranks of every kind go on; what they leave, one process makes longer."""
    flags = [*tiny, *SHARED, "--warmup", "0"]
    whole = tmp_path / "whole"
    run([*flags, "--out", str(whole)])
    for parallel in ("ddp", "fsdp"):
        finished(start(*flags, "--parallel", parallel, "--out", str(tmp_path / parallel)))
    for folder in ("whole", "ddp", "fsdp"):
        run(["--resume", "--parallel", "none", "--steps", "15", "--out", str(tmp_path / folder)])
        assert len(read_metrics(tmp_path / folder / "gapt" / "metrics.jsonl")) == 15
    for folder in ("ddp", "fsdp"):
        assert_alike(tmp_path / folder / "gapt", whole / "gapt")
