"""What users hand over by mistake: the commands take it or say in one line what is wrong, without a traceback."""

from __future__ import annotations

import gzip
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from gapt_optim import EntropyConfig, GAPTConfig
from gapt_optim.viewing import RunHistory, diagnose, read_run
from gapt_optim.viewing.command import main
from gapt_optim.viewing.doctor import judged_by, verdict
from gapt_optim.viewing.page import render
from gapt_optim.viewing.report import report_page

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
UNREADABLE = ": 1 line could not be read"
LEFT_OUT = "left out: not finite, or of an unexpected kind"
NO_LOSS = "the records hold no loss"

# (metrics.jsonl, what the doctor says)
RUNS: dict[str, tuple[str | bytes, str]] = {
    "empty": ("", "metrics.jsonl is empty"),
    "blank lines": ("\n\n  \n", "metrics.jsonl is empty"),
    "cut off": (text(STEPS)[:-20], "the last line is cut off"),
    "one step": (text(STEPS[:1]), "Steps so far: 1."),
    "one layer": (text(records(40, layers=1, period=20)), ""),
    "no layers": (each(lambda r: r.update(layer_entropy={}, layer_measures={}, alignment=None)), ""),
    "no entropies": (without("entropy", "layer_entropy", "measures", "layer_measures"), ""),
    "no loss": (without("loss"), NO_LOSS),
    "no phases": (without("phase", "next_phase", "reason"), "40 records without a phase"),
    "no switches": (each(lambda r: r.update(phase="compression", reason=None)), ""),
    "unknown phases": (each(lambda r: r.update(phase="warmup", next_phase="cooldown", reason="so")), ""),
    "nan entropies": (each(lambda r: r.update(entropy=math.nan, layer_entropy={"a": math.nan})), LEFT_OUT),
    "nan losses": (each(lambda r: r.update(loss=math.nan)), NO_LOSS),
    "infinite": (each(lambda r: r.update(loss=math.inf, entropy=-math.inf)), LEFT_OUT),
    "huge": (each(lambda r: r.update(loss=1e308, entropy=1e299)), LEFT_OUT),
    "tiny": (each(lambda r: r.update(loss=1e-300, entropy=1e-300)), ""),
    "zeros": (each(lambda r: r.update(loss=0.0, entropy=0.0, measures=dict.fromkeys(r["measures"], 0.0))), ""),
    "negative": (each(lambda r: r.update(loss=-1.0, entropy=-1.0)), ""),
    "other kinds": (each(lambda r: r.update(loss="2", entropy="x", phase=3, reason=[1], measures="m")), LEFT_OUT),
    "true and false": (each(lambda r: r.update(loss=True, nonfinite_steps=False)), LEFT_OUT),
    "tables within": (each(lambda r: r.update(alignment={"cosine": {"a": 1}, "layers": {"h.0": 3}})), LEFT_OUT),
    "deep": ('{"step": 1, "loss": ' + "[" * 100_000 + "\n" + text(STEPS), UNREADABLE),
    "hostile names": (text(records(40, period=20, prefix=HOSTILE)), ""),
    "other scripts": (text(records(40, period=20, prefix="層.\u202e🙂\0.")), ""),
    "long names": (text(records(40, period=20, prefix="x" * 5000)), ""),
    "byte order mark": (b"\xef\xbb\xbf" + text(STEPS).encode(), ""),
    "Windows lines": (text(STEPS).replace("\n", "\r\n"), ""),
    "gaps": (text(STEPS[::7]), "30 steps are missing"),
    "backwards": (text(STEPS[::-1]), "resumed 39 times, last at step 1;"),
    "twice": (text(STEPS * 2), "the run was resumed at step 1; 40 records"),
    "two versions": (text(records(20, measures=False) + STEPS[20:]), "20 of 40 steps do not hold the other kernel's"),
    "other layers": (text(STEPS[:20] + records(40, layers=5, period=20)[20:]), ""),
    "steps as text": (each(lambda r: r.update(step=str(r["step"]))), ""),
    "steps with a half": (each(lambda r: r.update(step=r["step"] + 0.5)), ""),
    "steps below 0": (each(lambda r: r.update(step=-r["step"])), ""),
    "large steps": (each(lambda r: r.update(step=r["step"] * 10**15)), "steps are missing"),
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
    assert expected in said
    assert "nan" not in said.replace("nan entropies", "")
    assert main(["watch", str(folder), "--once"]) == 0
    assert capsys.readouterr().out
    run = read_run(folder)
    page = render(report_page({"run": run}))  # no NaN, which JSON does not have
    for note in run.notes:
        assert note.split(":")[0] in page
    assert [type(record["step"]) for record in run.steps] == [int] * len(run.steps)


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
        ('{"a":' * 400 + "1" + "}" * 400, "settings.json could not be read"),
        ("{}", "settings.json is empty"),
        ('{"gate": null}', "settings.json holds no settings of gapt_optim, found gate: judged by the defaults"),
        ('{"gate": {"frozen": "yes", "patience_memorization": "x", "min_improvement": null}}', "15 updates"),
        ('{"methods": 3, "config": {"methods": [1, null]}}', "found methods, config: judged by the defaults"),
        ('{"foo": 3}', "settings.json holds no settings of gapt_optim, found foo: judged by the defaults"),
        ('{"a": 1, "b": 1, "c": 1, "d": 1, "e": 1}', "found a, b, c and 2 more: judged by the defaults"),
        ('{"method": ["plain"]}', "found method: judged by the defaults"),
    ],
    ids=range(12),
)
def test_odd_settings(settings: str, expected: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write(tmp_path, text(records(40, plain=True)))
    (folder / "settings.json").write_text(settings)
    assert main(["doctor", str(folder)]) == 0
    assert expected in capsys.readouterr().out
    assert "Settings" in render(report_page({"run": read_run(folder)}))


def test_settings_that_are_not_used_are_said_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write(tmp_path, text(records(40, plain=True)))

    def notes(settings: str | None = None) -> list[str]:
        if settings is not None:
            (folder / "settings.json").write_text(settings)
        assert main(["doctor", str(folder)]) == 0
        said = capsys.readouterr().out
        basis = [line.removeprefix("  note: ") for line in said.splitlines() if line.startswith("  note: ")]
        assert "".join(basis).count("default") == said.count("default")
        assert ("If the gate was frozen" in said) == (not any(name in (settings or "") for name in ('"gate"', "plain")))
        page = render(report_page({"run": read_run(folder)}))
        assert all(sentence in page for sentence in basis)
        return basis

    assert notes() == ["No settings.json: judged by the defaults"]
    assert notes("{") == ["Settings unknown: judged by the defaults", "settings.json could not be read"]
    assert notes('{"config": {"entropy": {"alpha": 1}}}') == [
        "settings.json does not say how the gate was set: judged by its defaults"
    ]
    left_out = "settings.json: {} could not be used and {} left out; the defaults are in {} place"
    assert notes('{"gate": {"patience": 10}}') == [left_out.format("gate.patience", "is", "its")]
    assert notes('{"lr": 1, "gapt": {"gate": {"frozen": "no", "rule": "published"}, "entropy": {"of": 1}}}') == [
        left_out.format("entropy.of, gate.frozen", "are", "their")
    ]
    assert notes(GAPTConfig(entropy=EntropyConfig(window=None)).model_dump_json()) == []
    assert notes('{"method": "plain"}') == []
    assert judged_by(RunHistory([])) == []


def test_odd_neighbours(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write(tmp_path, text(STEPS))
    (folder / "validation.jsonl").write_text("")
    (folder / "run.json").write_text('{"version": {"a": 1}}')
    assert "validation.jsonl is empty: no validation was written yet" in read_run(folder).notes
    (folder / "validation.jsonl").write_text("no\nmetrics\n")
    assert "holds no metrics" in read_run(folder).notes[-1]
    (tmp_path / "folder" / "metrics.jsonl").mkdir(parents=True)
    assert main(["doctor", str(tmp_path / "folder")]) == 2
    assert "metrics.jsonl cannot be read (Is a directory)" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("method", "expected"), [("plain", "plain training"), ("penalty", "constant entropy penalty"), ("gapt", "")]
)
def test_a_frozen_gate_of_a_comparison_is_no_fault(method: str, expected: str, tmp_path: Path) -> None:
    """The settings of the examples lie beside the methods' folders, and hold the gate of gapt alone."""
    settings = {"config": {"methods": ["plain", "penalty", "gapt"]}, "gapt": {"gate": {"frozen": False}}}
    (tmp_path / "settings.json").write_text(json.dumps(settings))
    (tmp_path / method).mkdir()
    steps = records(60, plain=True)
    if method == "penalty":
        steps = [{**record, "phase": "compression"} for record in steps]
    run = read_run(write(tmp_path / method, text(steps)))
    found = diagnose(run)
    if method == "gapt":
        assert [one.key for one in found] == ["never_compressed"]
        assert "If the gate was frozen" not in found[0].what
        assert judged_by(run) == []
    else:
        assert found == []
        assert expected in verdict(run, found)
        page = render(report_page({"gapt": run, method: run}))
        assert "never compressed" not in page


def test_methods_are_shown_in_the_order_of_the_comparison(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for method in ("gapt", "other", "plain"):
        (tmp_path / method).mkdir()
        write(tmp_path / method, text(STEPS))
    (tmp_path / "settings.json").write_text(json.dumps({"config": {"methods": ["plain", "gapt"]}}))
    assert main(["doctor", str(tmp_path)]) == 0
    shown = [line for line in capsys.readouterr().out.splitlines() if not line.startswith(" ")]
    assert shown == ["plain", "gapt", "other"]
