"""What users hand over by mistake: the commands take it or say in one line what is wrong, without a traceback."""

from __future__ import annotations

import gzip
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from gapt_optim.cli import main
from gapt_optim.reporting import read_run
from gapt_optim.reporting.report import report_page

from .runs import HOSTILE, records

Record = dict[str, Any]


def text(found: list[Record]) -> str:
    return "".join(json.dumps(record) + "\n" for record in found)


def each(change: Callable[[Record], object], **options: Any) -> str:
    found = records(**({"steps": 40, "period": 20} | options))
    for record in found:
        change(record)
    return text(found)


def without(*keys: str) -> str:
    return each(lambda record: [record.pop(key) for key in keys])


STEPS = records(40, period=20)
UNREADABLE = "1 unreadable line left out"
NO_LOSS = "hold no loss"

NO_SETTINGS = "No settings of gapt_optim were found: judged by the defaults"

# (metrics.jsonl, what the doctor says)
RUNS: dict[str, tuple[str | bytes, str]] = {
    "empty": ("", "nothing was written yet"),
    "blank lines": ("\n\n  \n", "nothing was written yet"),
    "cut off": (text(STEPS)[:-20], "the last line is cut off"),
    "one step": (text(STEPS[:1]), "Steps so far: 1."),
    "one layer": (text(records(40, layers=1, period=20)), ""),
    "no layers": (each(lambda r: r.update(layer_entropy={}, layer_measures={}, alignment=None)), ""),
    "no entropies": (without("entropy", "layer_entropy", "measures", "layer_measures"), ""),
    "no loss": (without("loss"), NO_LOSS),
    "no phases": (without("phase", "next_phase", "reason"), "the gate was frozen"),
    "no switches": (each(lambda r: r.update(phase="compression", reason=None)), ""),
    "unknown phases": (each(lambda r: r.update(phase="warmup", next_phase="cooldown", reason="so")), ""),
    "nan entropies": (each(lambda r: r.update(entropy=math.nan, layer_entropy={"a": math.nan})), ""),
    "nan losses": (each(lambda r: r.update(loss=math.nan)), NO_LOSS),
    "infinite": (each(lambda r: r.update(loss=math.inf, entropy=-math.inf)), ""),
    "huge": (each(lambda r: r.update(loss=1e308, entropy=1e299)), ""),
    "tiny": (each(lambda r: r.update(loss=1e-300, entropy=1e-300)), ""),
    "zeros": (each(lambda r: r.update(loss=0.0, entropy=0.0, measures=dict.fromkeys(r["measures"], 0.0))), ""),
    "negative": (each(lambda r: r.update(loss=-1.0, entropy=-1.0)), ""),
    "other kinds": (each(lambda r: r.update(loss="2", entropy="x", phase=3, reason=[1], measures="m")), ""),
    "true and false": (each(lambda r: r.update(loss=True, nonfinite_steps=False)), ""),
    "tables within": (each(lambda r: r.update(alignment={"cosine": {"a": 1}, "layers": {"h.0": 3}})), ""),
    "deep": ('{"step": 1, "loss": ' + "[" * 100_000 + "\n" + text(STEPS), UNREADABLE),
    "hostile names": (text(records(40, period=20, prefix=HOSTILE)), ""),
    "other scripts": (text(records(40, period=20, prefix="層.\u202e🙂\0.")), ""),
    "long names": (text(records(40, period=20, prefix="x" * 5000)), ""),
    "byte order mark": (b"\xef\xbb\xbf" + text(STEPS).encode(), ""),
    "Windows lines": (text(STEPS).replace("\n", "\r\n"), ""),
    "gaps": (text(STEPS[::7]), ""),
    "backwards": (text(STEPS[::-1]), "resumed 39 times, last at step 1;"),
    "twice": (text(STEPS * 2), "the run was resumed at step 1;"),
    "two versions": (text(records(20, measures=False) + STEPS[20:]), ""),
    "other layers": (text(STEPS[:20] + records(40, layers=5, period=20)[20:]), ""),
    "steps as text": (each(lambda r: r.update(step=str(r["step"]))), ""),
    "steps with a half": (each(lambda r: r.update(step=r["step"] + 0.5)), ""),
    "steps below 0": (each(lambda r: r.update(step=-r["step"])), ""),
    "large steps": (each(lambda r: r.update(step=r["step"] * 10**15)), ""),
}
NO_RUNS: dict[str, bytes] = {
    "lists": b"[1, 2]\n[3]\n",
    "no steps": each(lambda r: r.update(step=None)).encode(),
    "binary": bytes(range(256)) * 20,
    "compressed": gzip.compress(text(STEPS).encode()),
    "UTF-16": text(STEPS).encode("utf-16"),
}


def write(folder: Path, content: str | bytes) -> Path:
    (folder / "metrics.jsonl").write_bytes(content.encode() if isinstance(content, str) else content)
    return folder


@pytest.mark.parametrize("name", RUNS)
def test_odd_metrics_are_shown_and_it_is_said(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    content, expected = RUNS[name]
    folder = write(tmp_path, content)
    assert main(["doctor", str(folder)]) == 0
    said = capsys.readouterr().out
    assert expected in " ".join(said.split())
    assert "nan" not in said.replace("nan entropies", "")
    assert main(["watch", str(folder), "--once"]) == 0
    assert capsys.readouterr().out
    run = read_run(folder)
    page = report_page({"run": run}).html()
    for note in run.notes:
        assert note.split(":")[0] in page
    assert run.steps.index.dtype.kind == "i" or run.steps.empty


@pytest.mark.parametrize("name", NO_RUNS)
def test_what_is_no_run_is_one_clear_line(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write(tmp_path, NO_RUNS[name])
    for command in (["report", str(folder), "--out", str(tmp_path / "page.html")], ["doctor", str(folder)]):
        assert main(command) == 2
        said = capsys.readouterr().err
        assert said.startswith("error: ")
        assert said.count("\n") == 1
        assert "holds no metrics" in said
    assert not (tmp_path / "page.html").exists()
    assert main(["watch", str(folder), "--once"]) == 0
    assert "could not be read" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ('{"a":', "settings.json could not be read"),
        ("[1]", "settings.json could not be read"),
        ("null", "settings.json could not be read"),
        ('{"a":' * 90_000 + "1" + "}" * 90_000, "settings.json could not be read"),
        ("{}", "settings.json is empty"),
        ('{"gate": null}', NO_SETTINGS),
        ('{"gate": {"frozen": "yes", "patience_memorization": "x", "min_improvement": null}}', "15 updates"),
        ('{"methods": 3, "config": {"methods": [1, null]}}', NO_SETTINGS),
        ('{"foo": 3}', NO_SETTINGS),
        ('{"a": 1, "b": 1, "c": 1, "d": 1, "e": 1}', NO_SETTINGS),
        ('{"method": ["plain"]}', NO_SETTINGS),
    ],
    ids=range(11),
)
def test_odd_settings(settings: str, expected: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write(tmp_path, text(records(40, plain=True)))
    (folder / "settings.json").write_text(settings)
    assert main(["doctor", str(folder)]) == 0
    assert expected in " ".join(capsys.readouterr().out.split())
    assert "Settings" in report_page({"run": read_run(folder)}).html()


def test_a_folder_in_the_place_of_a_file_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "folder" / "metrics.jsonl").mkdir(parents=True)
    assert main(["doctor", str(tmp_path / "folder")]) == 2
    said = capsys.readouterr().err
    assert "metrics.jsonl cannot be read or written (Is a directory)" in said
    assert said.count("\n") == 1
