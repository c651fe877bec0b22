"""A script over ranks: one of them prepares, all stop together, one says why, and one checkpoint is written or none."""

from __future__ import annotations

import contextlib
import io
import os
import resource
import signal
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from gapt_optim import GAPTOptimizer, RepresentationHook
from gapt_optim.runs import CommandError, RunFolder, on_first_rank, run_script, stopping
from tests.distributed.ranks import Ranks


@pytest.fixture(scope="module")
def leaving() -> Iterator[Ranks]:
    """Ranks that leave the group of the others, so a pool of their own."""
    pool = Ranks()
    yield pool
    pool.close()


# One prepares, all stop


def prepared(error: Exception | None) -> tuple[Any, list[int]]:
    """What this rank got, and the ranks on which the work was done."""
    done: list[int] = []

    def work() -> str:
        done.append(dist.get_rank())
        if error is not None:
            raise error
        return "a corpus"

    try:
        return on_first_rank(work), done
    except (CommandError, OSError) as raised:
        return f"{type(raised).__name__}: {raised}", done


@pytest.mark.parametrize(
    ("error", "answer"),
    [
        (None, "a corpus"),
        (CommandError("--data x: no such file"), "CommandError: --data x: no such file"),
        (OSError(28, "No space left on device"), "OSError: [Errno 28] No space left on device"),
    ],
)
def test_the_first_rank_prepares_for_all(ranks: Ranks, error: Exception | None, answer: str) -> None:
    assert ranks(prepared, error) == [(answer, [0]), (answer, [])]


def joined(port: int) -> list[Any]:
    """A rank as torchrun starts it, in no group yet."""
    dist.destroy_process_group()
    os.environ.update({"MASTER_ADDR": "localhost", "MASTER_PORT": str(port)})
    answer = on_first_rank(lambda: f"from {dist.get_rank()}")
    return [answer, dist.get_rank(), dist.get_world_size(), dist.get_backend()]


def test_ranks_join_as_the_first_one_prepares(leaving: Ranks) -> None:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    assert leaving(joined, port) == [["from 0", rank, 2, backend] for rank in (0, 1)]


def steps_until_stop(signalled: int) -> int:
    """One rank gets a signal in its third step, as when the scheduler of a cluster ends its machine."""
    with stopping() as stop:
        for step in range(1, 6):
            if dist.get_rank() == signalled and step == 3:
                signal.raise_signal(signal.SIGTERM)
            if stop():
                return step
    return 0


@pytest.mark.parametrize(("signalled", "last"), [(0, 3), (1, 3), (None, 0)])
def test_a_signal_to_one_rank_stops_all_after_the_same_step(ranks: Ranks, signalled: int | None, last: int) -> None:
    assert ranks(steps_until_stop, signalled) == [last] * 2


# The end


def ended(errors: list[Exception | None], store: str) -> tuple[Any, str, bool]:
    """Exit code, what was said, and whether the process group was left."""
    error, rank = errors[dist.get_rank()], dist.get_rank()

    def main() -> None:
        if error is not None:
            raise error

    with contextlib.redirect_stderr(io.StringIO()) as said:
        try:
            run_script(main)
        except SystemExit as end:
            code = end.code
    left = not dist.is_initialized()
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    return code, said.getvalue(), left


WRONG = CommandError("--lr: Input should be greater than 0")


@pytest.mark.parametrize(
    ("errors", "codes", "line"),
    [
        ([None, None], (0, 0), ""),
        ([WRONG, WRONG], (2, 2), "error: --lr: Input should be greater than 0\n"),
        ([KeyboardInterrupt(), KeyboardInterrupt()], (130, 130), "stopped\n"),
    ],
)
def test_ranks_leave_together_and_the_first_says_why(
    leaving: Ranks, tmp_path: Path, errors: list[Exception | None], codes: tuple[int, int], line: str
) -> None:
    answers = leaving(ended, errors, str(tmp_path / "store"))
    assert answers == [(codes[0], line, True), (codes[1], "", True)]


# Checkpoints


def trained() -> tuple[Any, Any, Any]:
    model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
    optimizer = GAPTOptimizer(torch.optim.AdamW(model.parameters()), RepresentationHook(model, ["1"]))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (step + 1))
    optimizer.backward(model(torch.randn(8, 4)).square().mean())
    optimizer.step()
    schedule.step()
    return model, optimizer, schedule


def begun(path: Path) -> None:
    RunFolder.claim(path).begin({})


def saved(path: str, limited: int | None = None) -> tuple[Any, list[str], int]:
    """Whether this rank says that a checkpoint was written, or what it raised; what it printed; the step to go on from.

    On the rank that is ``limited`` larger files fail, as on a full disk.
    """
    folder, trainer, said = RunFolder(path), trained(), list[str]()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    if dist.get_rank() == limited:
        resource.setrlimit(resource.RLIMIT_FSIZE, (2500, hard))
    try:
        written: Any = folder.save_checkpoint(1, *trainer, say=said.append)
    except CommandError as error:
        written = str(error)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    dist.barrier()
    return written, said, RunFolder(path).load_checkpoint(*trainer) if written is True else 0


def test_ranks_write_one_checkpoint_and_go_on_from_it(ranks: Ranks, tmp_path: Path) -> None:
    begun(tmp_path)
    assert ranks(saved, str(tmp_path)) == [(True, [], 1)] * 2
    assert RunFolder(tmp_path).checkpoint_step() == 1


def test_no_rank_writes_over_what_is_the_users(ranks: Ranks, tmp_path: Path) -> None:
    begun(tmp_path)
    mine = tmp_path / "checkpoint" / "step-1"
    mine.mkdir(parents=True)
    (mine / "mine").touch()
    message = f"{mine}: was not written by a run of ours; move it away"
    assert ranks(saved, str(tmp_path)) == [(message, [], 0)] * 2
    assert [path.name for path in mine.iterdir()] == ["mine"]


def test_no_rank_writes_where_the_first_finds_no_place(ranks: Ranks, tmp_path: Path) -> None:
    begun(tmp_path)
    (tmp_path / "checkpoint").write_text("in the way")
    said = f"{tmp_path}: no checkpoint at step 1 (File exists); there is none yet, and training goes on"
    assert ranks(saved, str(tmp_path)) == [(False, [said], 0), (False, [], 0)]


@pytest.mark.parametrize("limited", [0, 1])
def test_a_disk_that_is_full_for_one_rank_leaves_no_part_of_a_checkpoint(
    ranks: Ranks, tmp_path: Path, limited: int
) -> None:
    begun(tmp_path)
    (first, said, _), (second, nothing, _) = ranks(saved, str(tmp_path), limited)
    assert (first, second, nothing) == (False, False, [])
    assert said == [f"{tmp_path}: no checkpoint at step 1 (File too large); there is none yet, and training goes on"]
    assert {path.name for path in tmp_path.rglob("*") if path.is_file()} == {"run.json", "settings.json"}
    assert ranks(saved, str(tmp_path)) == [(True, [], 1)] * 2
