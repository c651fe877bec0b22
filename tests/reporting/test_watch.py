"""A run in the terminal while it is written."""

from __future__ import annotations

import json
import threading
import time
from pathlib import Path

import pytest

from gapt_optim.reporting.records import Records
from gapt_optim.reporting.watch import RunFollower, follow, phase_line, sparkline

from .runs import records, write_lines, write_run


def test_it_follows_a_file_that_is_being_written(tmp_path: Path) -> None:
    lines = [json.dumps(record) + "\n" for record in records(60, period=20)]

    def write() -> None:
        with (tmp_path / "metrics.jsonl").open("w") as file:
            for line in lines:
                file.write(line[:30])
                file.flush()
                time.sleep(0.002)
                file.write(line[30:])
                file.flush()
        (tmp_path / "results.json").write_text("{}")

    writer = threading.Thread(target=write)
    writer.start()
    states = [(len(run.metrics.rows), state) for run, state in follow(tmp_path, interval=0.02, patience=60)]
    writer.join()
    assert states[-1] == (60, "ended")
    assert states == sorted(states, key=lambda pair: pair[0])
    assert len({count for count, _ in states}) > 2


def test_it_gives_up_on_a_run_that_is_silent(tmp_path: Path) -> None:
    write_run(tmp_path)
    *_, (run, state) = follow(tmp_path, interval=0.01, patience=0.05)
    assert (len(run.metrics.rows), state) == (200, "no new step for 0.05 s")


def test_a_run_that_goes_on_from_an_earlier_step_is_read_anew(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "m.jsonl", records(10))
    follower = Records(path)
    follower.read()
    with path.open("a") as file:
        file.write("not JSON\n" + json.dumps({"step": 4, "loss": 9.0}) + "\n")
    assert follower.read() == 1  # not silent, although fewer are there than before
    assert [row["step"] for row in follower.rows] == [1, 2, 3, 4]
    assert follower.unreadable == 1
    write_lines(path, records(2))
    follower.read()
    assert [row["step"] for row in follower.rows] == [1, 2]


@pytest.mark.parametrize("own_file", [True, False])
def test_held_out_losses_are_read_from_either_file(tmp_path: Path, own_file: bool) -> None:
    rows = records(20)
    if own_file:
        write_lines(tmp_path / "validation.jsonl", [{"step": 10, "loss": 3.0}, {"step": 20, "loss": 2.5}])
    else:
        rows[10]["validation_loss"], rows[19]["validation_loss"] = 3.0, 2.5
    write_lines(tmp_path / "metrics.jsonl", rows)
    run = RunFollower(tmp_path)
    run.read()
    assert run.values("validation_loss") == [3.0, 2.5]
    assert len(run.values("loss")) == 20


def test_sparklines() -> None:
    assert sparkline([0, 1, 2, 3, 4, 5, 6, 7], 8) == "▁▂▃▄▅▆▇█"
    assert sparkline([5.0, 5.0], 8) == "▁▁"
    assert sparkline([], 8) == ""
    assert len(sparkline(list(range(1000)), 20)) == 20
    rows = [{"phase": phase} for phase in ("compression", "memorization", "memorization")]
    assert phase_line(rows, 3) == "█··"
    assert phase_line([], 3) == ""
