"""The main example over two processes of torchrun: the numbers, files and refusals of one process."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from errors import StoppedError, UserError
from gpt2_fineweb import run
from parallel import PARALLEL, Ranks

from gapt_optim.viewing import read_metrics
from tests.examples.conftest import ROOT, Interrupting

SCRIPT = str(ROOT / "examples" / "gpt2_fineweb.py")


def start(*argv: str, ranks: int = 2) -> subprocess.Popen[str]:
    """The script under torchrun, on a free port of its own."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    return subprocess.Popen(
        [sys.executable, *torchrun, SCRIPT, *argv],
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


def results(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "results.json").read_text())
    return found


def files(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


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


def assert_near(found: Any, expected: Any, tolerance: float) -> None:
    assert (found is None) == (expected is None)
    if expected is not None:
        assert found == pytest.approx(expected, rel=tolerance)


# The batch of every step is three micro-batches of two sequences, that of each rank three of one; the five
# validation sequences are three batches, so that one rank has one more than the other.
SHARED = ["--accumulation", "3", "--eval-sequences", "5"]


@pytest.mark.parametrize(
    ("parallel", "method"),
    [("ddp", "--compare"), ("fsdp", "--method gapt"), pytest.param("fsdp", "--compare", marks=pytest.mark.slow)],
)
def test_two_ranks_equal_one_process(tiny: list[str], tmp_path: Path, parallel: str, method: str) -> None:
    """Losses, entropies, validations and switches of the methods; one set of files, and one table."""
    flags = [*tiny, *SHARED, *method.split()]
    process = start(*flags, "--parallel", parallel, "--out", str(tmp_path / "ranks"))
    run([*flags, "--out", str(tmp_path / "one")])
    out, _ = finished(process)
    assert out.count("| validation CE (nats)") == 1
    assert files(tmp_path / "ranks") == files(tmp_path / "one")
    here, there = results(tmp_path / "ranks"), results(tmp_path / "one")
    assert there["runs"]["gapt"]["switches"] >= 2
    assert here["tokens_seen"] == there["tokens_seen"]
    assert here["runs"].keys() == there["runs"].keys()
    for name, a in here["runs"].items():
        folder = "." if name == "gapt" else name
        assert_alike(tmp_path / "ranks" / folder, tmp_path / "one" / folder)
        b = there["runs"][name]
        assert (a["ranks"], b["ranks"]) == (2, 1)
        assert a["val_loss"] == pytest.approx(b["val_loss"], rel=1e-5)
        assert a["switch_list"] == b["switch_list"]
        assert a["parameters"] == b["parameters"]
        share = 0.5 if parallel == "fsdp" else 1.0
        assert a["optimizer_state_mb"] == pytest.approx(share * b["optimizer_state_mb"], rel=0.01)


def test_what_torchrun_needs_is_said_once(tiny: list[str], tmp_path: Path) -> None:
    _, err = finished(start(*tiny, "--out", str(tmp_path / "out")), code=1)
    assert err.count("error: --parallel: torchrun started 2 processes") == 1
    assert "exitcode: 2" in err
    assert not (tmp_path / "out" / "settings.json").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--parallel ddp --data nowhere.txt", "error: --data nowhere.txt: no such file"),  # found by the first alone
        ("--parallel fsdp --steps 0", "error: --steps: input should be"),  # by all
        ("--parallel ddp --wieght 1", "error: unrecognized arguments: --wieght"),
        ("--parallel ddp --batch-size 3", "error: --accumulation 1, --batch-size 3: the 3 sequences of a step"),
        ("--parallel fsdp --optimizer adamw8bit", "error: --optimizer adamw8bit: its quantized state cannot"),
        ("--parallel fsdp --parameter-alignment-every 2", "error: --parameter-alignment-every: shards have no"),
        ("--parallel ddp --lr 1e30 --method plain", "error: plain: the loss is nan at step"),  # in training
    ],
)
def test_refusals_are_printed_once_and_all_ranks_leave(
    tiny: list[str], tmp_path: Path, flags: str, message: str
) -> None:
    _, err = finished(start(*tiny, *flags.split(), "--out", str(tmp_path / "out")), code=1)
    assert err.count(message) == 1
    assert "exitcode: 2" in err
    assert not (tmp_path / "out" / "results.json").exists()


# Stopping and going on


def interrupt(process: subprocess.Popen[str], folder: Path, after: int, number: signal.Signals) -> str:
    """Sends a signal to torchrun, which passes it on, when so many steps are done."""
    deadline = time.monotonic() + 240
    while time.monotonic() < deadline and process.poll() is None:
        if (folder / "metrics.jsonl").exists() and len(read_metrics(folder / "metrics.jsonl")) >= after:
            break
        time.sleep(0.01)
    process.send_signal(number)
    return finished(process, code=1)[1]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("parallel", "method", "number"),
    [("ddp", "gapt", signal.SIGINT), ("ddp", "plain", signal.SIGTERM), ("fsdp", "gapt", signal.SIGTERM)],
)
def test_interrupted_ranks_go_on_bit_for_bit(
    tiny: list[str], tmp_path: Path, parallel: str, method: str, number: signal.Signals
) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    flags = [*tiny, *SHARED, "--method", method, "--steps", "100", "--dropout", "0.1", "--parallel", parallel]
    finished(start(*flags, "--out", str(whole)))
    err = interrupt(start(*flags, "--out", str(parts)), parts, 8, number)
    assert err.count(f"{method}: stopped after step ") == 1
    done = len(read_metrics(parts / "metrics.jsonl"))
    assert 8 <= done < 100
    assert torch.load(parts / "checkpoint.pt", weights_only=True)["state"]["step"] == done
    finished(start("--resume", "--quiet", "--parallel", parallel, "--out", str(parts)))
    for name in ("metrics.jsonl", "validation.jsonl"):
        assert (whole / name).read_text() == (parts / name).read_text()
    weights = [torch.load(folder / "checkpoint.pt", weights_only=True)["model"] for folder in (whole, parts)]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


@pytest.mark.slow
@pytest.mark.parametrize("method", ["plain", "gapt"])
def test_run_goes_on_with_other_ranks(tiny: list[str], tmp_path: Path, method: str, interrupting: Interrupting) -> None:
    """One process stops, two ranks of every kind go on; what they leave, one process makes longer."""
    flags = [*tiny, *SHARED, "--method", method, "--out"]
    run([*flags, str(tmp_path / "whole")])

    with interrupting(19), pytest.raises(StoppedError, match="stopped after step 7 of 12"):  # inside the seventh step
        run([*flags, str(tmp_path / "parts")])
    for parallel in ("ddp", "fsdp"):
        shutil.copytree(tmp_path / "parts", tmp_path / parallel)
        finished(start("--resume", "--quiet", "--parallel", parallel, "--out", str(tmp_path / parallel)))
        assert_alike(tmp_path / parallel, tmp_path / "whole")
    for folder in ("whole", "ddp", "fsdp"):
        run(["--resume", "--quiet", "--steps", "15", "--out", str(tmp_path / folder)])
        assert len(read_metrics(tmp_path / folder / "metrics.jsonl")) == 15
    for folder in ("ddp", "fsdp"):
        assert_alike(tmp_path / folder, tmp_path / "whole")


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", ["muon", "adamw8bit"])
@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_other_optimizers_over_ranks(
    tiny: list[str], tmp_path: Path, parallel: str, optimizer: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if optimizer == "adamw8bit" and parallel == "fsdp":
        pytest.skip("refused")
    monkeypatch.setenv("TORCHDYNAMO_DISABLE", "1")  # torchao compiles its step, which takes a minute
    flags = [*tiny, *SHARED, "--optimizer", optimizer]
    finished(start(*flags, "--parallel", parallel, "--out", str(tmp_path / "ranks")))
    with torch.compiler.set_stance("force_eager"):
        run([*flags, "--out", str(tmp_path / "one")])
    here, there = (read_metrics(tmp_path / name / "metrics.jsonl") for name in ("ranks", "one"))
    assert [record["phase"] for record in here] == [record["phase"] for record in there]
    # Muon multiplies in bfloat16, and 8 bits jump where a rounding goes the other way.
    assert [record["loss"] for record in here] == pytest.approx([record["loss"] for record in there], rel=2e-4)


# The parts


@pytest.mark.parametrize(
    ("accumulation", "batch_size", "world", "expected"),
    [
        (1, 8, 1, (1, 8)),
        (16, 4, 8, (2, 4)),
        (4, 4, 8, (1, 2)),
        (6, 4, 4, (3, 2)),
        (1, 8, 8, (1, 1)),
        (3, 2, 2, (3, 1)),
    ],
)
def test_sequences_of_a_step_are_divided(
    accumulation: int, batch_size: int, world: int, expected: tuple[int, int]
) -> None:
    assert Ranks(world=world).divide(accumulation, batch_size) == expected


@pytest.mark.parametrize(("accumulation", "batch_size", "world"), [(1, 3, 2), (2, 3, 4), (5, 1, 4)])
def test_indivisible_sequences_are_refused(accumulation: int, batch_size: int, world: int) -> None:
    message = f"the {accumulation * batch_size} sequences of a step do not divide by {world} ranks"
    with pytest.raises(UserError, match=message):
        Ranks(world=world).divide(accumulation, batch_size)


def test_kinds_are_named_once() -> None:
    assert PARALLEL == ("none", "ddp", "fsdp")
