"""The main example, at a size that takes a second."""

from __future__ import annotations

import json
import math
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import gpt2_fineweb
import numpy as np
import pytest
import text
import torch
from gapt_optim.viewing import read_metrics
from gpt2_fineweb import PRESETS, Config, batch, build_model, learning_rate, make_optimizers

from gapt_optim import GAPTConfig, GateConfig, viewing
from gapt_optim.runs import CommandError, StoppedError, run_script
from tests.examples import quick
from tests.examples.conftest import ROOT, Interrupting

DATA = Path(os.environ.get("GAPT_TEST_DATA", Path(__file__).resolve().parents[3] / "shared" / "data"))
SCRIPT = str(ROOT / "examples" / "gpt2_fineweb.py")


@pytest.fixture(autouse=True)
def _no_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """One test, in a process of its own, makes them."""
    monkeypatch.setattr(viewing, "conclude", quick.conclude)


def run(argv: list[str]) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["gpt2_fineweb.py", *argv])
        gpt2_fineweb.main()


def results(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "results.json").read_text())
    return found


def weights(folder: Path) -> dict[str, torch.Tensor]:
    """Of the checkpoint."""
    from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

    latest = json.loads((folder / "checkpoint" / "latest.json").read_text())
    dcp_to_torch_save(folder / latest["folder"], folder.parent / "whole.pt")
    model: dict[str, torch.Tensor] = torch.load(folder.parent / "whole.pt", weights_only=False)["model"]
    (folder.parent / "whole.pt").unlink()
    return model


def assert_same_run(a: Path, b: Path) -> None:
    """The same numbers to the last bit."""
    for name in ("metrics.jsonl", "validation.jsonl"):
        assert (a / name).read_text() == (b / name).read_text()
    here, there = weights(a), weights(b)
    assert all(torch.equal(here[name], there[name]) for name in here)


def begin(argv: list[str], out: Path) -> tuple[Config, GAPTConfig]:
    return gpt2_fineweb.begin([*argv, "--out", str(out)])[:2]


def test_another_process_is_kept_out_while_it_trains(
    tiny: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    claim = "import sys; from gapt_optim.runs import RunFolder; RunFolder.claim(sys.argv[1], overwrite=True)"

    def train(*args: Any) -> None:
        command = [sys.executable, "-c", claim, str(tmp_path / "run")]
        environment = os.environ | {"PYTHONPATH": str(ROOT)}
        said.append(subprocess.run(command, capture_output=True, text=True, env=environment).stderr)
        raise CommandError("enough")

    monkeypatch.setattr(gpt2_fineweb, "train", train)
    with pytest.raises(CommandError, match="enough"):
        run([*tiny, "--methods", "plain", "--out", str(tmp_path / "run")])
    assert "another process is writing to it" in said[0]


# What a run leaves


def test_comparison_leaves_everything(tiny: list[str], tmp_path: Path) -> None:
    """The script as a user starts it: a line at once, losses, a table, two sentences, paths of pictures and page."""
    pytest.importorskip("plotly", reason="the page needs it")
    argv = [*tiny, "--methods", "plain", "penalty", "gapt", "--out", "out"]
    done = subprocess.run(
        [sys.executable, SCRIPT, *argv], cwd=tmp_path, capture_output=True, text=True, check=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    lines = done.stdout.splitlines()
    assert lines[0].startswith("Training GPT-2 (demo), plain and penalty and gapt, on ")
    assert re.match(r" +plain, step 1: loss \d\.\d{3}$", lines[1])
    for row in ("held-out loss", "pressed entropy", "linear entropy", "centered cosine entropy", "norm ratio",
                "mean share", "steps in compression", "phase switches"):  # fmt: skip
        assert any(line.startswith(f"| {row}") for line in lines)
    assert "GAPT spent " in done.stdout
    for name in ("training.png", "layers.png", "alignment.png", "report.html"):
        assert f"out/{name}" in done.stdout
        assert (tmp_path / "out" / name).stat().st_size > 1000
    found = results(tmp_path / "out")
    runs = found["runs"]
    assert list(runs) == ["plain", "penalty", "gapt"]
    assert (runs["plain"]["compression_share"], runs["penalty"]["compression_share"]) == (0, 1)
    assert runs["gapt"]["switches"] == len(runs["gapt"]["switch_list"]) >= 1
    assert set(found["versions"]) == {"python", "torch", "transformers", "gapt_optim"}
    for method, entry in runs.items():
        assert math.isfinite(entry["loss"])
        assert entry["entropy"] == pytest.approx(sum(entry["layer_entropy"].values()) / 2)
        assert entry["measures"]["norm_ratio"] >= 1
        assert set(entry["layer_measures"]) == {"transformer.h.0", "transformer.h.1"}
        folder = tmp_path / "out" / method
        assert [record["step"] for record in read_metrics(folder / "metrics.jsonl")] == list(range(1, 13))
        assert [record["step"] for record in read_metrics(folder / "validation.jsonl")] == [4, 8, 12]
    first = [read_metrics(tmp_path / "out" / method / "metrics.jsonl")[0]["loss"] for method in runs]
    assert first[0] == first[1] == first[2]


def test_plain_is_bare_adamw(tiny: list[str], tmp_path: Path) -> None:
    """Without any of ours the same losses; so GAPT until its first switch."""
    run([*tiny, "--out", str(tmp_path / "out")])
    stored = json.loads((tmp_path / "out" / "settings.json").read_text())
    config, corpus = Config(**stored["config"]), text.load(tmp_path / "out" / stored["corpus"])
    torch.manual_seed(0)
    model = build_model(config, corpus.vocabulary)
    decayed, others = ([p for p in model.parameters() if (p.ndim >= 2) == wanted] for wanted in (True, False))
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=config.lr, betas=(0.9, 0.95), fused=True)
    losses = []
    for step in range(config.steps):
        for group in optimizer.param_groups:
            group["lr"] = config.lr * learning_rate(config, step)
        inputs, targets = batch(corpus.train, config.context, config.batch_size, 0, step)
        loss = torch.nn.functional.cross_entropy(model(input_ids=inputs).logits.flatten(0, 1), targets.flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    plain, gapt = (read_metrics(tmp_path / "out" / name / "metrics.jsonl") for name in ("plain", "gapt"))
    assert [record["loss"] for record in plain] == losses
    alike = next(i for i, record in enumerate(gapt) if record.get("reason")) + 1
    assert [record["loss"] for record in gapt[:alike]] == losses[:alike]


def test_accumulated_batches_equal_one_large_batch(tiny: list[str], tmp_path: Path) -> None:
    run([*tiny, "--methods", "gapt", "--batch-size", "4", "--out", str(tmp_path / "one")])
    run([*tiny, "--methods", "gapt", "--accumulation", "2", "--out", str(tmp_path / "two")])
    one, two = (read_metrics(tmp_path / name / "gapt" / "metrics.jsonl") for name in ("one", "two"))
    assert [r["loss"] for r in one] == pytest.approx([r["loss"] for r in two], rel=1e-3)
    assert [r["phase"] for r in one] == [r["phase"] for r in two]


FLAGS = [
    "--methods published",
    "--signal validation --gapt.gate.patience-memorization 1",
    "--gapt.entropy.alpha inf --gapt.entropy.window None",
    "--gapt.entropy.kernel linear --gapt.layers.schedule rotate --gapt.layers.reduce max",
    "--gapt.objective.combine project --gapt.layers.skip-first 1 --layers transformer.h.*.mlp",
    "--gapt.objective.floor 1.0",
    "--gapt.alignment.parameter-every 4 --dropout 0.1",
    "--dtype bfloat16 --seed 3 --gapt.objective.weight 0.1 --optimizer muon --train-tokens 100",
]


@pytest.mark.parametrize("flags", FLAGS)
def test_flags_reach_the_run(tiny: list[str], tmp_path: Path, flags: str) -> None:
    run([*tiny, "--steps", "5", "--methods", "gapt", *flags.split(), "--out", str(tmp_path / "out")])
    (entry,) = results(tmp_path / "out")["runs"].values()
    assert math.isfinite(entry["loss"])


def test_gate_on_validations_has_settings_that_suit_it_unless_given(tiny: list[str], tmp_path: Path) -> None:
    tiny = tiny[: tiny.index("--gapt.gate.patience-memorization")]
    config, gapt = begin([*tiny, "--signal", "validation"], tmp_path / "a")
    assert gapt.gate == GateConfig.validation()
    assert gapt.objective.weight > 1
    _, gapt = begin(
        [*tiny, "--signal", "validation", "--gapt.objective.weight", "2", "--gapt.gate.patience-memorization", "9"],
        tmp_path / "b",
    )
    assert gapt.gate == GateConfig.validation(patience_memorization=9)
    assert gapt.objective.weight == 2
    assert begin(tiny, tmp_path / "c")[1] == GAPTConfig()
    assert config.preset == "demo"


def test_gate_on_validations_starts_no_compression_in_the_last_steps(tiny: list[str], tmp_path: Path) -> None:
    gate = "--gapt.gate.patience-memorization 1 --gapt.gate.patience-compression 1 --gapt.gate.min-improvement 0.9"
    restless = ["--signal", "validation", *gate.split(), "--steps", "40", "--eval-every", "1", "--methods", "gapt"]
    run([*tiny, *restless, "--out", str(tmp_path / "out")])
    switches = results(tmp_path / "out")["runs"]["gapt"]["switch_list"]
    assert max(s["step"] for s in switches if s["reason"] == "plateau") in range(30, 36)  # 85 % of the steps
    assert switches[-1]["to"] == "memorization"


@pytest.mark.parametrize("suffix", [".txt", ".parquet", ".bin"])
def test_every_kind_of_file(tiny: list[str], tmp_path: Path, suffix: str, documents: list[str]) -> None:
    path = tmp_path / f"corpus{suffix}"
    if suffix == ".txt":
        path.write_text("\n".join(documents))
    elif suffix == ".parquet":
        import pyarrow as pa
        from pyarrow import parquet

        parquet.write_table(pa.table({"text": documents}), path)
    else:
        np.random.default_rng(0).integers(0, 500, 2000).astype("<u2").tofile(path)
    run([*tiny, "--methods", "plain", "--data", str(path), "--steps", "2", "--out", str(tmp_path / "out")])
    assert results(tmp_path / "out")["corpus"] == str(path)


# Stopping and going on


@pytest.mark.parametrize(
    ("method", "optimizer", "number"),
    [("plain", "adamw", signal.SIGINT), ("gapt", "adamw", signal.SIGTERM), ("gapt", "muon", signal.SIGINT)],
)
def test_interrupted_run_goes_on_bit_for_bit(
    tiny: list[str], tmp_path: Path, method: str, optimizer: str, number: int, interrupting: Interrupting
) -> None:
    flags = [*tiny, "--methods", method, "--dropout", "0.1", "--accumulation", "2", "--optimizer", optimizer]
    run([*flags, "--out", str(tmp_path / "whole")])
    before = signal.getsignal(number)
    with interrupting(13, number), pytest.raises(StoppedError, match="stopped after step 7 of 12; go on with --resume"):
        run([*flags, "--out", str(tmp_path / "parts")])  # inside the seventh step
    assert signal.getsignal(number) is before
    assert len(read_metrics(tmp_path / "parts" / method / "metrics.jsonl")) == 7
    run(["--resume", "--out", str(tmp_path / "parts")])
    assert_same_run(tmp_path / "whole" / method, tmp_path / "parts" / method)
    whole, parts = (results(tmp_path / name)["runs"] for name in ("whole", "parts"))
    assert whole == parts


def test_killed_comparison_goes_on_bit_for_bit(
    tiny: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run([*tiny, "--out", str(tmp_path / "whole")])
    calls, draw = 0, gpt2_fineweb.batch

    def killed(*args: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 12 + 9:  # in the second run, after its first checkpoint and a validation
            raise MemoryError
        return draw(*args)

    with monkeypatch.context() as patch:
        patch.setattr(gpt2_fineweb, "batch", killed)
        with pytest.raises(MemoryError):
            run([*tiny, "--out", str(tmp_path / "parts")])
    with (tmp_path / "parts" / "gapt" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 9, "pha')
    run(["--resume", "--out", str(tmp_path / "parts")])
    for method in ("plain", "gapt"):
        assert_same_run(tmp_path / "whole" / method, tmp_path / "parts" / method)


def test_finished_run_can_be_made_longer(tiny: list[str], tmp_path: Path) -> None:
    run([*tiny, "--methods", "gapt", "--out", str(tmp_path / "out")])
    run(["--resume", "--steps", "15", "--out", str(tmp_path / "out")])
    assert len(read_metrics(tmp_path / "out" / "gapt" / "metrics.jsonl")) == 15
    assert results(tmp_path / "out")["config"]["steps"] == 15


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")  # inductor's own
@pytest.mark.parametrize("flags", ["--compile", "--optimizer adamw8bit"])
def test_compiled_run_learns_the_same(tiny: list[str], tmp_path: Path, flags: str) -> None:
    run([*tiny, "--methods", "gapt", *flags.split(), "--out", str(tmp_path / "compiled")])
    with torch.compiler.set_stance("force_eager"):
        run([*tiny, "--methods", "gapt", *flags.split(), "--out", str(tmp_path / "eager")])
    here, there = (read_metrics(tmp_path / way / "gapt" / "metrics.jsonl") for way in ("compiled", "eager"))
    assert [record["phase"] for record in here] == [record["phase"] for record in there]
    assert [record["loss"] for record in here] == pytest.approx([record["loss"] for record in there], rel=1e-3)


# What is refused, before anything is lost


def refused(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    """The one line on stderr of a call that ends with code 2."""
    monkeypatch.setattr(sys, "argv", ["gpt2_fineweb.py", *argv])
    with pytest.raises(SystemExit) as ended:
        run_script(gpt2_fineweb.main)
    message = capsys.readouterr().err
    assert ended.value.code == 2, message
    assert message.startswith("error: ")
    assert message.count("\n") == 1
    return message


BAD_VALUES = {
    "--gapt.entropy.window 1": "--gapt.entropy.window: Input should be greater than or equal to 2, found 1",
    "--gapt.objective.weight -1": "--gapt.objective.weight: Input should be greater than or equal to 0",
    "--gapt.objective.weight inf": "--gapt.objective.weight: Input should be a finite number",
    "--gapt.entropy.alpha 0": "--gapt.entropy.alpha: Input should be greater than 0",
    "--gapt.objective.combine both": "invalid choice 'both'",
    "--gapt.gate.smoothing 1": "--gapt.gate.smoothing: Input should be less than 1",
    "--lr 0": "--lr: Input should be greater than 0",
    "--steps 0": "--steps: Input should be greater than or equal to 1",
    "--context 1": "--context: Input should be greater than or equal to 2",
    "--batch-size 0": "--batch-size: Input should be greater than or equal to 1",
    "--steps few": "--steps",
    "--preset giant": "invalid choice 'giant'",
    "--wieght 1": "--wieght: there is no such flag; see --help",
    "--gapt.wieght 1": "wieght: there is no such flag; see --help",
    "--threads 99999999999": "--threads: Input should be less than or equal to 1024",
    "--seed -1": "--seed: Input should be greater than or equal to 0",
    "--device abacus": "--device 'abacus': cannot be used here",
    "--device meta": "--device 'meta': cannot be used here",
    "--resume --overwrite": "--resume and --overwrite contradict each other",
    "--resume": "there is no run to resume",
    "--layers transformer.x.*": "--layers: ",
    "--data nowhere.txt": "no such file",
    "--data a\0b.txt": "null",
    "--parallel ddp": "--parallel: give ddp or fsdp under torchrun",
    "--compile --gapt.alignment.parameter-every 2": "parameter-every: not in a compiled model",
    "--optimizer adam": "invalid choice 'adam'",
    "--size 2 15 2 300": "--size: width must be a multiple of heads",
    "--context 4000": "tokens are fewer than one sequence of 4000 + 1",
}


@pytest.mark.parametrize("flags", BAD_VALUES)
def test_impossible_value_is_named_with_its_flag(
    tiny: list[str], tmp_path: Path, flags: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    message = refused(monkeypatch, capsys, *tiny, "--out", str(tmp_path / "out"), *flags.split(" "))
    assert BAD_VALUES[flags] in message
    assert not (tmp_path / "out" / "settings.json").exists()


@pytest.mark.parametrize("out", ["", "a\0b", "file", "file/below"])
def test_impossible_out_is_refused_before_the_data_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], out: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("in the way")
    refused(monkeypatch, capsys, "--data", "nowhere.txt", "--out", out)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize("name", ["data/train.bin", "picture.png"])
def test_folder_of_the_user_is_refused(
    tiny: list[str], tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    mine = tmp_path / "out" / name
    mine.parent.mkdir(parents=True)
    mine.write_text("mine")
    for flags in ([], ["--overwrite"], ["--resume"]):
        refused(monkeypatch, capsys, *tiny, *flags, "--out", str(tmp_path / "out"))
    assert [path for path in (tmp_path / "out").rglob("*") if path.is_file()] == [mine]


def test_finished_run_is_never_overwritten_silently(
    tiny: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    run([*tiny, "--out", str(out)])

    def content() -> dict[Path, bytes]:
        return {path: path.read_bytes() for path in out.rglob("*") if path.is_file() and path.name != "run.json"}

    before = content()
    message = refused(monkeypatch, capsys, *tiny, "--out", str(out))
    assert "holds a finished run; give --resume, --overwrite or another folder" in message
    # Bad input together with --overwrite leaves the old run alone too.
    for flags in ("--gapt.entropy.window 1", "--data nowhere.txt", "--layers x", "--context 4000"):
        refused(monkeypatch, capsys, *tiny, "--out", str(out), "--overwrite", *flags.split())
    assert content() == before
    run([*tiny, "--methods", "gapt", "--steps", "3", "--overwrite", "--out", str(out)])
    assert "Deleting what the last run" in capsys.readouterr().out
    assert len(read_metrics(out / "gapt" / "metrics.jsonl")) == 3
    assert not (out / "plain").exists()


def test_resume_with_other_settings_is_refused(
    tiny: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = str(tmp_path / "out")
    run([*tiny, "--methods", "gapt", "--steps", "4", "--out", out])
    run([*tiny, "--methods", "gapt", "--steps", "4", "--resume", "--out", out])  # the same ones are welcome
    capsys.readouterr()
    for flags, message in {
        "--preset micro": "--preset: the run to resume has demo, found micro; drop the flag",
        "--gapt.objective.weight 0.5": "--gapt.objective.weight: the run to resume has",
        "--seed 1": "--seed: the run to resume has 0, found 1",
        "--methods plain": "--methods: the run to resume has ['gapt'], found ['plain']",
        "--data sotu": "found sotu",
    }.items():
        assert message in refused(monkeypatch, capsys, "--resume", "--out", out, *flags.split())


@pytest.mark.parametrize("name", ["settings.json", "run.json", "gapt/metrics.jsonl", "gapt/checkpoint/latest.json"])
def test_damaged_run_is_refused_before_training(
    tiny: list[str], tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    run([*tiny, "--methods", "gapt", "--steps", "2", "--out", str(out)])
    (out / name).write_bytes(b"[1, 2]\n")
    message = refused(monkeypatch, capsys, "--resume", "--steps", "4", "--out", str(out))
    assert str(out / name) in message


def test_diverged_run_stops_with_advice(
    tiny: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    loss = gpt2_fineweb.token_loss
    monkeypatch.setattr(gpt2_fineweb, "token_loss", lambda *args: loss(*args) * math.nan)
    for steps in ("3", "40"):
        argv = [*tiny, "--methods", "plain", "--steps", steps, "--out", str(tmp_path / steps)]
        assert re.search("nan|finite", refused(monkeypatch, capsys, *argv))


# The parts


def test_help_is_one_screen_and_at_once(tmp_path: Path) -> None:
    """Without torch, which takes seconds to load: it is made impossible to import."""
    (tmp_path / "torch.py").write_text("raise ImportError('too heavy for --help')")
    for script in ("gpt2_fineweb.py", "arithmetic.py", "forgetting.py"):
        shown = subprocess.run(
            [sys.executable, str(ROOT / "examples" / script), "--help"], capture_output=True, text=True, check=True,
            env={**os.environ, "COLUMNS": "100", "PYTHONPATH": f"{tmp_path}:{ROOT}"},
        )  # fmt: skip
        lines = shown.stdout.splitlines()
        assert len(lines) <= 40
        assert max(map(len, lines)) <= 100
        assert "--gapt.objective.weight" in shown.stdout


def test_presets_are_the_published_sizes() -> None:
    sizes = {}
    for name, preset in PRESETS.items():
        config = Config(preset=name, **preset)
        with torch.device("meta"):
            model = build_model(config, config.size[3] or 50257)
        sizes[name] = sum(p.numel() for p in model.parameters())
    assert sizes["small"] == sizes["sprint"] == 124_439_808
    assert sizes["medium"] == 354_823_168
    assert sizes["large"] == 774_030_080
    assert 100_000 < sizes["demo"] < 300_000 < sizes["nano"] < 500_000
    assert 500_000 < sizes["micro"] < 3_000_000 < sizes["mini"] < 20_000_000
    assert Config() == Config(preset="demo", **PRESETS["demo"])


def test_learning_rate_warms_up_and_ends_where_it_should() -> None:
    config = Config(steps=100, warmup=10)
    factors = [learning_rate(config, step) for step in range(100)]
    assert factors[0] == pytest.approx(1 / 11)
    assert max(factors) == factors[10] == 1.0
    assert factors[10:] == sorted(factors[10:], reverse=True)
    assert learning_rate(config, 100) == pytest.approx(0.1)


def test_muon_takes_the_matrices_of_the_blocks() -> None:
    config = Config(size=(3, 16, 2, 300), optimizer="muon")
    net = build_model(config, 300)
    muon, adamw = make_optimizers(config, net)
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
def test_learns_real_text(tmp_path: Path, name: str) -> None:
    """Forty steps of the smallest model already beat guessing."""
    if name != "sotu" and not (DATA / name).exists():
        pytest.skip(f"no {name} in {DATA}; set GAPT_TEST_DATA to the folder that has it")
    data = name if name == "sotu" else str(DATA / name)
    size = f"--preset nano --context 64 --batch-size {2 if name.endswith('.bin') else 8}"
    flags = f"{size} --steps 40 --eval-every 40 --eval-sequences 16 --quiet --methods gapt".split()
    run([*flags, "--data", data, "--out", str(tmp_path / "out")])
    vocabulary = 50257 if name.endswith(".bin") else 4096
    assert results(tmp_path / "out")["runs"]["gapt"]["loss"] < math.log(vocabulary) - 0.5


@pytest.mark.slow
def test_main_job_speaks_soon(tmp_path: Path) -> None:
    """A line of what it does, and a first loss, before it ends."""
    process = subprocess.Popen(
        [sys.executable, SCRIPT, "--data", "sotu", "--out", str(tmp_path / "out")], stdout=subprocess.PIPE, text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    try:
        assert process.stdout is not None
        assert process.stdout.readline().startswith("Training GPT-2 (demo)")
        assert "step 1: loss" in process.stdout.readline()
        assert process.poll() is None
    finally:
        process.kill()
        process.communicate()


def test_folder_of_another_run_does_not_fit(tmp_path: Path) -> None:
    with pytest.raises(CommandError, match="there is no run to resume"):
        gpt2_fineweb.begin(["--resume", "--out", str(tmp_path)])
