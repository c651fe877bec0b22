"""A run's folder: nothing of the user's is touched, and every damaged file is found before training."""

from __future__ import annotations

import json
import math
import os
import pickle
import resource
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gapt_optim import GAPTOptimizer, RepresentationHook, StepMetrics
from gapt_optim.runs import RunFolder, RunFolderError

ROOT = Path(__file__).resolve().parents[2]


def files(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def begun(path: Path) -> RunFolder:
    """A run that has written one of everything."""
    folder = RunFolder.claim(path)
    folder.file("data/train.bin").write_bytes(b"1234")
    folder.seal("data/train.bin")
    folder.begin({"config": {"lr": 0.1, "steps": 3}})
    child = folder.child("gapt")
    for step in (1, 2, 3):
        child.append("metrics.jsonl", {"step": step})
    child.append("validation.jsonl", {"step": 3})
    child.save_checkpoint(2, *trained())
    folder.file("training.png").write_bytes(b"picture")
    return folder


def trained(steps: int = 2) -> tuple[Any, Any, Any]:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
    optimizer = GAPTOptimizer(torch.optim.AdamW(model.parameters()), RepresentationHook(model, ["1"]))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (step + 1))
    for _ in range(steps):
        optimizer.backward(model(torch.randn(8, 4)).square().mean())
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    return model, optimizer, schedule


# What is the user's


@pytest.mark.parametrize(
    "name", ["data/train.bin", "mine.png", "notes.txt", "checkpoint.pt", "plain/metrics.jsonl", ".x"]
)
@pytest.mark.parametrize("flags", [{}, {"overwrite": True}, {"resume": True}])
def test_folder_of_the_user_is_refused_and_left_alone(tmp_path: Path, name: str, flags: dict[str, bool]) -> None:
    (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / name).write_text("mine")
    with pytest.raises(RunFolderError, match=r"holds what no run of ours wrote|there is no run to resume"):
        RunFolder.claim(tmp_path, **flags)
    assert files(tmp_path) == {name: b"mine"}


@pytest.mark.parametrize(
    "name", ["mine.png", "data/val.bin", "gapt/mine.txt", "gapt/checkpoint/step-2/mine.distcp", "new/x"]
)
def test_what_the_user_adds_to_a_run_is_never_deleted(tmp_path: Path, name: str) -> None:
    begun(tmp_path)
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text("mine")
    before = files(tmp_path)
    with pytest.raises(RunFolderError, match=f"holds what no run of ours wrote .{name}."):
        RunFolder.claim(tmp_path, overwrite=True)
    assert files(tmp_path) == before
    RunFolder(tmp_path).clear(say=lambda line: None)
    assert (tmp_path / name).read_text() == "mine"


def test_link_to_files_of_the_user_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "mine.txt").write_text("mine")
    begun(tmp_path / "run")
    (tmp_path / "run" / "link").symlink_to(tmp_path / "home")
    with pytest.raises(RunFolderError, match="link"):
        RunFolder.claim(tmp_path / "run", overwrite=True)
    (tmp_path / "run" / "link").unlink()
    (tmp_path / "run" / "training.png").unlink()
    (tmp_path / "run" / "training.png").symlink_to(tmp_path / "home" / "mine.txt")
    RunFolder.claim(tmp_path / "run", overwrite=True).clear(say=lambda line: None)
    assert (tmp_path / "home" / "mine.txt").read_text() == "mine"


@pytest.mark.parametrize("name", ["../mine.txt", "/etc/hostname", "a/../../mine.txt", "", "a\0b", 3, None])
def test_marker_that_points_elsewhere_is_refused(tmp_path: Path, name: Any) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    run = tmp_path / "run"
    begun(run)
    marker = json.loads((run / "run.json").read_text())
    (run / "run.json").write_text(json.dumps({**marker, "files": [*marker["files"], name]}))
    for flags in ({}, {"overwrite": True}, {"resume": True}):
        with pytest.raises(RunFolderError, match="is no marker of a run"):
            RunFolder.claim(run, **flags)
    assert (tmp_path / "mine.txt").exists()


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.binary(max_size=60) | st.recursive(st.none() | st.text(), st.lists).map(lambda x: json.dumps(x).encode()))
def test_any_marker_is_read_or_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "run.json").write_bytes(content)
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(RunFolderError):
        RunFolder.claim(tmp_path, overwrite=True)
    assert files(tmp_path) == {"run.json": content, "mine.txt": b"mine"}


def test_empty_name_and_names_that_cannot_be(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("in the way")
    for name, message in (("", "is empty"), ("file", "cannot be"), ("file/x", "cannot be"), ("a\0b", "cannot be")):
        with pytest.raises(RunFolderError, match=message) as caught:
            RunFolder.claim(name)
        assert "\0" not in str(caught.value)
    assert files(tmp_path) == {"file": b"in the way"}


def test_file_that_no_run_wrote_is_not_written_over(tmp_path: Path) -> None:
    folder = begun(tmp_path)
    (tmp_path / "layers.png").write_text("mine")
    with pytest.raises(RunFolderError, match=r"layers\.png: was not written by a run"):
        folder.file("layers.png")


@pytest.mark.parametrize("name", ["../mine.txt", "/mine.txt", "", "a\0b"])
def test_a_name_that_leaves_the_folder_is_refused(tmp_path: Path, name: str) -> None:
    folder = RunFolder.claim(tmp_path / "run")
    with pytest.raises(ValueError, match=r"^name must be a path within the folder, found "):
        folder.file(name)
    assert set(files(tmp_path)) == {"run/run.json"}


# One run after another


def test_run_is_replaced_or_resumed_only_when_told(tmp_path: Path) -> None:
    RunFolder.claim(tmp_path)
    folder = RunFolder.claim(tmp_path)  # claimed, but not begun: a flag was wrong, and is mended
    folder.begin({})
    with pytest.raises(RunFolderError, match="holds an unfinished run; give --resume, --overwrite"):
        RunFolder.claim(tmp_path)
    folder.write_json("results.json", {})
    with pytest.raises(RunFolderError, match="holds a finished run"):
        RunFolder.claim(tmp_path)
    with pytest.raises(RunFolderError, match="contradict each other"):
        RunFolder.claim(tmp_path, resume=True, overwrite=True)
    with pytest.raises(RunFolderError, match="no run to resume"):
        RunFolder.claim(tmp_path / "other", resume=True)
    RunFolder.claim(tmp_path, resume=True)


def test_overwriting_says_what_it_deletes_and_deletes_that(tmp_path: Path) -> None:
    begun(tmp_path)
    before = set(files(tmp_path))
    said: list[str] = []
    folder = RunFolder.claim(tmp_path, overwrite=True)
    assert set(files(tmp_path)) == before  # not yet
    folder.clear(keep="data/", say=said.append)
    assert set(files(tmp_path)) == {"run.json", "data/train.bin"}
    assert len(said) == 1
    for name in before - {"run.json", "data/train.bin"}:
        assert name in said[0]
    assert folder.is_sealed("data/train.bin")
    assert not (tmp_path / "gapt").exists()


def test_a_run_that_begins_anew_replaces_the_last_one_and_makes_its_methods_folders(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    begun(tmp_path)
    RunFolder.claim(tmp_path, overwrite=True).begin({"seed": 1}, children=("plain", "gapt"), replace=True, keep="data/")
    assert f"Deleting what the last run in {tmp_path} wrote: " in capsys.readouterr().out
    assert set(files(tmp_path)) == {
        "run.json", "settings.json", "data/train.bin", "plain/run.json", "gapt/run.json",
    }  # fmt: skip
    folder = RunFolder.claim(tmp_path, resume=True)
    assert folder.read_json("settings.json") == {"seed": 1}
    folder.clear()
    capsys.readouterr()
    folder.clear()  # there is nothing left of which to say that it is deleted
    assert capsys.readouterr().out == ""


def test_a_method_whose_folder_was_deleted_begins_anew(tmp_path: Path) -> None:
    begun(tmp_path)
    shutil.rmtree(tmp_path / "gapt")
    child = RunFolder.claim(tmp_path, resume=True).child("gapt")
    child.rewind(0)
    assert child.checkpoint_step() == 0
    assert set(files(tmp_path / "gapt")) == {"run.json"}


def test_other_settings_are_named_with_both_values(tmp_path: Path) -> None:
    begun(tmp_path)
    folder = RunFolder.claim(tmp_path, resume=True)
    folder.begin({"config": {"lr": 0.1, "steps": 9}}, free={"config.steps"})
    with pytest.raises(RunFolderError, match=r"--lr: the run to resume has 0\.1, found inf"):
        folder.begin({"config": {"lr": float("inf"), "steps": 9}}, free={"config.steps"})
    with pytest.raises(RunFolderError, match=r"--gapt\.gate\.rule: the run to resume has None, found x"):
        folder.begin({"config": {"lr": 0.1, "steps": 9}, "gapt": {"gate": {"rule": "x"}}})


# Damage


def damages(path: Path) -> dict[str, bytes | None]:
    content = path.read_bytes()
    flipped = bytearray(content)
    flipped[len(content) // 2] ^= 1
    return {
        "empty": b"", "cut": content[: len(content) // 2], "garbage": os.urandom(len(content)),
        "flipped": bytes(flipped), "another type": b"[1, 2]\n", "missing": None,
    }  # fmt: skip


HOW = ("empty", "cut", "garbage", "flipped", "another type", "missing")
DAMAGED = [
    *((name, how) for how in HOW for name in (
        "run.json", "settings.json", "data/train.bin", "gapt/checkpoint/step-2/.metadata",
        "gapt/checkpoint/step-2/__0_0.distcp",
    )),
    # Records are judged by what they say: a cut last line is what a kill leaves.
    *(("gapt/metrics.jsonl", how) for how in ("empty", "cut", "garbage", "another type", "missing")),
    ("gapt/validation.jsonl", "another type"),
    *(("gapt/checkpoint/latest.json", how) for how in HOW if how != "missing"),  # without it there is no checkpoint yet
]  # fmt: skip


@pytest.mark.parametrize(("name", "how"), DAMAGED)
def test_damaged_file_is_one_line_with_the_remedy(tmp_path: Path, name: str, how: str) -> None:
    begun(tmp_path)
    path = tmp_path / name
    content = damages(path)[how]
    path.unlink()
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(RunFolderError) as caught:
        RunFolder.claim(tmp_path, resume=True)
    message = str(caught.value)
    assert "\n" not in message
    if not (name == "run.json" and how == "missing"):
        assert str(path.parent) in message
    assert "--overwrite" in message or "another folder" in message


def test_records_that_were_mixed_are_refused(tmp_path: Path) -> None:
    begun(tmp_path)
    with (tmp_path / "gapt" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 1}\n')
    with pytest.raises(RunFolderError, match=r"metrics\.jsonl: line 4 is damaged"):
        RunFolder.claim(tmp_path, resume=True)


def test_last_record_may_be_cut_as_by_a_kill(tmp_path: Path) -> None:
    begun(tmp_path)
    with (tmp_path / "gapt" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "lo')
    child = RunFolder.claim(tmp_path, resume=True).child("gapt")
    child.rewind(2)
    assert (tmp_path / "gapt" / "metrics.jsonl").read_text() == '{"step": 1}\n{"step": 2}\n'


# Records


@dataclass(frozen=True)
class Facts:
    seeds: tuple[int, ...]
    loss: float


def test_what_json_lacks_is_written_as_text(tmp_path: Path) -> None:
    folder = RunFolder.claim(tmp_path)
    folder.write_json("facts.json", {1: Facts((1, 2), math.inf), "loss": [math.nan, 0.5, None]})
    assert folder.read_json("facts.json") == {"1": {"seeds": [1, 2], "loss": "inf"}, "loss": ["nan", 0.5, None]}


def test_steps_are_recorded_and_those_taken_again_replace_the_first(tmp_path: Path) -> None:
    folder = begun(tmp_path).child("gapt")
    folder.append("validation.jsonl", {"step": 4})
    steps = [StepMetrics(step, "memorization", "memorization", None, 2.0, 0.5, {}) for step in (3, 4)]
    with folder.recording(2, 4, name="gapt", quiet=True) as record:
        for metrics in steps:
            record(metrics)
    lines = [json.loads(line) for line in (tmp_path / "gapt" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    assert lines[:2] == [{"step": 1}, {"step": 2}]
    assert lines[2]["loss"] == 2.0
    assert (tmp_path / "gapt" / "validation.jsonl").read_text() == ""  # they come after the checkpoint of step 2


def test_other_ranks_record_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "1")
    folder = begun(tmp_path).child("gapt")
    before = files(tmp_path)
    with folder.recording(0, 4, name="gapt") as record:
        record(StepMetrics(1, "memorization", "memorization", None, 2.0, 0.5, {}))
    assert files(tmp_path) == before


# Checkpoints


@pytest.mark.parametrize("change", [{"step": 0}, {"step": "2"}, {"folder": "../gapt"}, {"files": {}}, {"files": None}])
def test_a_checkpoint_that_says_what_cannot_be_is_damaged(tmp_path: Path, change: dict[str, Any]) -> None:
    folder = begun(tmp_path).child("gapt")
    latest = tmp_path / "gapt" / "checkpoint" / "latest.json"
    latest.write_text(json.dumps(json.loads(latest.read_text()) | change))
    with pytest.raises(RunFolderError, match=r"latest\.json: the checkpoint is damaged"):
        folder.checkpoint_step()
    with pytest.raises(RunFolderError, match=r"latest\.json: the checkpoint is damaged"):
        RunFolder.claim(tmp_path, resume=True)


def test_checkpoint_goes_on_bit_for_bit(tmp_path: Path) -> None:
    folder = begun(tmp_path).child("gapt")
    model, optimizer, schedule = trained(0)
    assert folder.load_checkpoint(model, optimizer, schedule) == folder.checkpoint_step() == 2
    wanted, _, other = trained(2)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), wanted.parameters(), strict=True))
    assert schedule.state_dict()["last_epoch"] == other.state_dict()["last_epoch"]
    assert RunFolder(tmp_path / "none").load_checkpoint(model, optimizer, schedule) == 0


def test_only_the_last_checkpoint_is_kept(tmp_path: Path) -> None:
    folder = begun(tmp_path).child("gapt")
    assert folder.save_checkpoint(3, *trained(3))
    assert folder.save_checkpoint(3, *trained(3))
    assert [path.name for path in (tmp_path / "gapt" / "checkpoint").iterdir() if path.is_dir()] == ["step-3-again"]
    assert folder.checkpoint_step() == 3


def test_checkpoint_of_another_model_is_refused(tmp_path: Path) -> None:
    folder = begun(tmp_path).child("gapt")
    model = torch.nn.Sequential(torch.nn.Linear(4, 9), torch.nn.ReLU(), torch.nn.Linear(9, 2))
    optimizer = torch.optim.AdamW(model.parameters())
    with pytest.raises(RunFolderError, match="does not fit this run"):
        folder.load_checkpoint(model, optimizer, torch.optim.lr_scheduler.ConstantLR(optimizer))


FULL_DISK = """
import resource, sys
sys.path.insert(0, {root!r})
from gapt_optim.runs import RunFolder
from tests.runs.test_run_folder import trained
folder = RunFolder.claim({path!r}, resume=True).child("gapt")
model, optimizer, schedule = trained(3)
for limit in (3000, 0):  # larger files fail as on a full disk
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
    print(folder.save_checkpoint(3, model, optimizer, schedule))
    print(folder.checkpoint_step())
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))  # for who counts branches
"""


@pytest.mark.skipif(not hasattr(resource, "RLIMIT_FSIZE"), reason="needs a limit on the size of files")
def test_full_disk_leaves_the_last_checkpoint_and_goes_on(tmp_path: Path) -> None:
    """A disk that fills up while the files are written, and one that is full before."""
    begun(tmp_path)
    before = files(tmp_path)
    code = FULL_DISK.format(root=str(ROOT), path=str(tmp_path))
    run = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=True)
    lines = run.stdout.splitlines()
    assert len(lines) == 6
    for line, written, step in (lines[:3], lines[3:]):
        assert "no checkpoint at step 3 (" in line
        assert "that of step 2 is whole, and training goes on" in line
        assert (written, step) == ("False", "2")
    after = files(tmp_path)
    assert set(after) == set(before)
    assert {name for name in after if after[name] != before[name]} <= {"gapt/run.json"}


# Other processes


CLAIMS = """
import sys
from gapt_optim.runs import RunFolder, RunFolderError

try:
    RunFolder.claim(sys.argv[1], **{sys.argv[2]: True})
    print("taken")
except RunFolderError as error:
    print(error)
"""


def claimed_elsewhere(path: Path, flag: str) -> str:
    command = [sys.executable, "-c", CLAIMS, str(path), flag]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.run(command, capture_output=True, text=True, check=True, env=environment).stdout.strip()


def test_two_processes_do_not_write_to_one_run(tmp_path: Path) -> None:
    folder = RunFolder.claim(tmp_path / "run")
    folder.begin({"config": {"lr": 0.1}})
    before = files(tmp_path)
    for flag in ("resume", "overwrite"):
        assert "another process is writing to it" in claimed_elsewhere(tmp_path / "run", flag)
    assert files(tmp_path) == before
    again = RunFolder.claim(tmp_path / "run", resume=True)  # in this process there is no other run
    del folder
    assert "another process" in claimed_elsewhere(tmp_path / "run", "resume")
    copied = pickle.loads(pickle.dumps(again))
    del again
    assert copied.read_json("settings.json") == {"config": {"lr": 0.1}}
    assert claimed_elsewhere(tmp_path / "run", "resume") == "taken"


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")  # of Python 3.12, where there are threads
def test_a_worker_that_lives_on_does_not_hold_the_folder(tmp_path: Path) -> None:
    folder = RunFolder.claim(tmp_path / "run")
    folder.begin({"config": {"lr": 0.1}})
    end, begin = os.pipe()
    worker = os.fork()
    if worker == 0:
        os.close(begin)
        os.read(end, 1)
        os._exit(0)
    os.close(end)
    try:
        del folder
        assert claimed_elsewhere(tmp_path / "run", "resume") == "taken"
    finally:
        os.close(begin)
        os.waitpid(worker, 0)


@pytest.mark.parametrize("listed", ["abc", {"a": 1}, None, 3])
def test_a_marker_whose_list_is_none_owns_nothing(listed: Any, tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text(json.dumps({"made_by": "gapt_optim", "files": listed}))
    for name in "abc":
        (tmp_path / name).write_text("mine")
    before = files(tmp_path)
    with pytest.raises(RunFolderError, match="is no marker of a run"):
        RunFolder.claim(tmp_path, overwrite=True)
    assert files(tmp_path) == before
