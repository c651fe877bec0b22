"""The main example end to end, at a size that takes a second."""

from __future__ import annotations

import json
import math
import os
import signal
import sys
from pathlib import Path
from typing import Any

import gpt2_fineweb
import numpy as np
import pytest
import torch
import training
from comparison import changes, table
from corpus import Batches
from errors import StoppedError, UserError, exit_code
from gpt2 import PRESETS, build
from gpt2_fineweb import run
from gpt2_options import make_config, make_parser
from methods import METHODS, of_method
from training import learning_rate_factor

from gapt_optim import GAPTConfig, GateConfig
from gapt_optim.viewing import read_metrics
from tests.examples.conftest import Interrupting

DATA = Path(os.environ.get("GAPT_TEST_DATA", Path(__file__).resolve().parents[3] / "shared" / "data"))


def read_results(folder: Path) -> dict[str, Any]:
    results: dict[str, Any] = json.loads((folder / "results.json").read_text())
    return results


def call_main(monkeypatch: pytest.MonkeyPatch, *argv: str) -> int:
    monkeypatch.setattr(sys, "argv", ["gpt2_fineweb.py", *argv])
    return exit_code(run)


def assert_same_run(a: Path, b: Path) -> None:
    """The same numbers to the last bit, apart from the time taken."""
    assert (a / "metrics.jsonl").read_text() == (b / "metrics.jsonl").read_text()
    assert (a / "validation.jsonl").read_text() == (b / "validation.jsonl").read_text()
    weights = [torch.load(folder / "checkpoint.pt", weights_only=True)["model"] for folder in (a, b)]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


# What a run leaves


def test_compare_leaves_everything(tiny: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    run([*tiny, "--compare", "--out", str(out)])
    results = read_results(out)

    assert results["corpus"].endswith("corpus.jsonl")
    assert results["tokens_seen"] == 12 * 2 * 16
    assert set(results["runs"]) == {"plain", "penalty", "gapt"}
    for entry in results["runs"].values():
        assert math.isfinite(entry["val_loss"])
        assert entry["entropy"] >= 0
        assert list(entry["layer_entropy"]) == ["transformer.h.0", "transformer.h.1", "transformer.h.2"]
        assert entry["entropy"] == pytest.approx(sum(entry["layer_entropy"].values()) / 3)
    gapt = results["runs"]["gapt"]
    assert gapt["switches"] == len(gapt["switch_list"]) >= 1
    assert 0 < gapt["compression_share"] < 1
    assert results["runs"]["plain"]["compression_share"] == 0
    assert results["runs"]["penalty"]["compression_share"] == 1
    for method in ("penalty", "gapt"):
        for name in ("val_loss", "entropy"):
            expected = results["runs"][method][name] / results["runs"]["plain"][name] - 1
            assert results["relative"][method][name] == pytest.approx(expected)
    assert set(results["versions"]) == {"python", "torch", "transformers", "gapt_optim"}
    assert results["config"]["gapt"]["gate"]["patience_memorization"] == 2
    assert results["config"]["steps"] == 12
    assert results["unigram_entropy"] > 0

    for folder in (out, out / "plain", out / "penalty"):
        assert [record["step"] for record in read_metrics(folder / "metrics.jsonl")] == list(range(1, 13))
        assert [record["step"] for record in read_metrics(folder / "validation.jsonl")] == [4, 8, 12]
        assert (folder / "checkpoint.pt").exists()
    for picture in ("training.png", "layers.png", "alignment.png"):
        assert (out / picture).read_bytes().startswith(b"\x89PNG")
    printed = capsys.readouterr().out
    assert (out / "table.md").read_text().strip() in printed
    assert "unigram entropy" in printed


def test_compared_runs_start_from_the_same_weights_and_batches(tiny: list[str], tmp_path: Path) -> None:
    run([*tiny, "--compare", "--out", str(tmp_path / "out")])
    first = [read_metrics(tmp_path / "out" / name / "metrics.jsonl")[0]["loss"] for name in (".", "plain", "penalty")]
    assert first[0] == first[1] == first[2]


def test_plain_is_untouched_by_measuring(tiny: list[str], tmp_path: Path) -> None:
    """Bare AdamW without any of ours gives the same losses; so does GAPT until its first switch."""
    run([*tiny, "--compare", "--out", str(tmp_path / "out")])
    config = make_config(vars(make_parser()[0].parse_args(tiny)), make_parser()[1])
    corpus = gpt2_fineweb.load(tmp_path / "out" / "data")
    torch.manual_seed(0)
    model = build(
        *PRESETS["nano"].size,
        vocabulary=corpus.vocabulary,
        separator=corpus.separator,
        context=config.context,
        dropout=0.0,
    )
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    others = [p for p in model.parameters() if p.ndim < 2]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}],
        lr=config.lr,
        betas=(0.9, 0.95),
        fused=True,
    )
    batches = Batches(corpus.train, config.context, config.batch_size, seed=0)
    losses = []
    for step in range(config.steps):
        for group in optimizer.param_groups:
            group["lr"] = config.lr * learning_rate_factor(step, config.steps, config.warmup, config.final_lr)
        inputs, targets = batches(step)
        logits = model(input_ids=inputs).logits
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert [record["loss"] for record in read_metrics(tmp_path / "out" / "plain" / "metrics.jsonl")] == losses
    gapt = read_metrics(tmp_path / "out" / "metrics.jsonl")
    alike = next(i for i, record in enumerate(gapt) if record["reason"]) + 1
    assert [record["loss"] for record in gapt[:alike]] == losses[:alike]


@pytest.mark.parametrize("method", METHODS)
def test_one_method_alone(tiny: list[str], tmp_path: Path, method: str) -> None:
    run([*tiny, "--method", method, "--out", str(tmp_path / "out")])
    results = read_results(tmp_path / "out")
    assert list(results["runs"]) == [method]
    assert results["relative"] == {}


def test_accumulated_batches_equal_one_large_batch(tiny: list[str], tmp_path: Path) -> None:
    run([*tiny, "--method", "gapt", "--batch-size", "4", "--out", str(tmp_path / "one")])
    run([*tiny, "--method", "gapt", "--accumulation", "2", "--out", str(tmp_path / "two")])
    one, two = (read_metrics(tmp_path / name / "metrics.jsonl") for name in ("one", "two"))
    assert [r["loss"] for r in one] == pytest.approx([r["loss"] for r in two], rel=1e-3)
    assert [r["phase"] for r in one] == [r["phase"] for r in two]
    assert read_results(tmp_path / "one")["tokens_seen"] == read_results(tmp_path / "two")["tokens_seen"]


FLAGS = [
    "--gate published",
    "--signal validation --patience-memorization 1",
    "--alpha inf --window none",
    "--alpha 1 --schedule rotate --reduce max --combine project",
    "--combine cap --max-ratio 0.5 --skip-first 1 --layers transformer.h.*.mlp",
    "--parameter-alignment-every 4 --dropout 0.1",
    "--dtype bfloat16 --seed 3 --weight 0.1 --threads 1",
]


@pytest.mark.parametrize("flags", FLAGS)
def test_flags_reach_the_run(tiny: list[str], tmp_path: Path, flags: str) -> None:
    run([*tiny, *flags.split(), "--out", str(tmp_path / "out")])
    assert math.isfinite(read_results(tmp_path / "out")["runs"]["gapt"]["val_loss"])


def test_published_gate_has_the_papers_settings_unless_given(tiny: list[str]) -> None:
    parser, flags = make_parser()
    config = make_config(vars(parser.parse_args(["--gate", "published", "--patience-compression", "9"])), flags)
    assert config.gapt.gate.patience_memorization == 125
    assert config.gapt.gate.patience_compression == 9
    assert config.gapt.gate.smoothing == 0.0


def test_comparison_on_validations_leaves_out_what_its_weight_does_not_suit(tiny: list[str], tmp_path: Path) -> None:
    run([*tiny, "--compare", "--signal", "validation", "--out", str(tmp_path / "out")])
    assert list(read_results(tmp_path / "out")["runs"]) == ["plain", "gapt"]


def test_gate_on_validations_has_settings_that_suit_it_unless_given() -> None:
    parser, flags = make_parser()
    config = make_config(vars(parser.parse_args(["--signal", "validation"])), flags)
    assert config.gapt.gate == GateConfig.validation()
    assert config.gapt.objective.weight > 1
    assert config.steps / config.eval_every >= 20
    given = ["--signal", "validation", "--weight", "2", "--eval-every", "3", "--patience-memorization", "9"]
    config = make_config(vars(parser.parse_args(given)), flags)
    assert config.gapt.gate == GateConfig.validation(patience_memorization=9)
    assert (config.gapt.objective.weight, config.eval_every) == (2.0, 3)


def test_gate_on_validations_starts_no_compression_in_the_last_steps(tiny: list[str], tmp_path: Path) -> None:
    restless = "--signal validation --patience-memorization 1 --patience-compression 1 --min-improvement 0.9"
    run([*tiny, *restless.split(), "--steps", "40", "--eval-every", "1", "--out", str(tmp_path / "out")])
    switches = read_results(tmp_path / "out")["runs"]["gapt"]["switch_list"]
    assert max(s["step"] for s in switches if s["reason"] == "plateau") in (34, 35)  # 85 % of the steps
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
    run([*tiny, "--data", str(path), "--steps", "2", "--out", str(tmp_path / "out")])
    results = read_results(tmp_path / "out")
    assert results["corpus"] == str(path)
    assert (results["vocabulary"] == 50257) == (suffix == ".bin")


# Stopping and going on


@pytest.mark.parametrize("method", ["plain", "gapt"])
def test_interrupted_run_goes_on_bit_for_bit(
    tiny: list[str], tmp_path: Path, method: str, interrupting: Interrupting
) -> None:
    flags = [*tiny, "--method", method, "--dropout", "0.1", "--accumulation", "2"]
    run([*flags, "--out", str(tmp_path / "whole")])

    with interrupting(13), pytest.raises(StoppedError, match="stopped after step 7 of 12"):  # inside the seventh step
        run([*flags, "--out", str(tmp_path / "parts")])
    assert len(read_metrics(tmp_path / "parts" / "metrics.jsonl")) == 7
    run(["--resume", "--quiet", "--out", str(tmp_path / "parts")])
    assert_same_run(tmp_path / "whole", tmp_path / "parts")
    whole, parts = (read_results(tmp_path / name)["runs"][method] for name in ("whole", "parts"))
    for name in ("val_loss", "layer_entropy", "switch_list", "compression_share", "tokens_seen"):
        assert whole[name] == parts[name]


def test_sigterm_stops_after_the_step(tiny: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a cluster sends before it takes the machine away."""
    draw = Batches.__call__

    def terminated(self: Batches, index: int) -> Any:
        if index == 3:
            signal.raise_signal(signal.SIGTERM)
        return draw(self, index)

    monkeypatch.setattr(Batches, "__call__", terminated)
    with pytest.raises(StoppedError, match="stopped after step 4 of 12"):
        run([*tiny, "--out", str(tmp_path / "out")])
    assert torch.load(tmp_path / "out" / "checkpoint.pt", weights_only=True)["state"]["step"] == 4


def test_killed_comparison_goes_on_bit_for_bit(
    tiny: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run([*tiny, "--compare", "--out", str(tmp_path / "whole")])

    calls = 0
    draw = Batches.__call__

    def killed(self: Batches, index: int) -> Any:
        nonlocal calls
        calls += 1
        if calls == 12 + 9:  # in the second run, after its first checkpoint and a validation
            raise MemoryError
        return draw(self, index)

    with monkeypatch.context() as patch:
        patch.setattr(Batches, "__call__", killed)
        with pytest.raises(MemoryError):
            run([*tiny, "--compare", "--out", str(tmp_path / "parts")])
    with (tmp_path / "parts" / "penalty" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 9, "pha')
    run(["--resume", "--quiet", "--out", str(tmp_path / "parts")])
    for name in (".", "plain", "penalty"):
        assert_same_run(tmp_path / "whole" / name, tmp_path / "parts" / name)


def test_finished_run_can_be_made_longer(tiny: list[str], tmp_path: Path) -> None:
    run([*tiny, "--out", str(tmp_path / "out")])
    run(["--resume", "--quiet", "--steps", "15", "--out", str(tmp_path / "out")])
    assert len(read_metrics(tmp_path / "out" / "metrics.jsonl")) == 15
    assert read_results(tmp_path / "out")["config"]["steps"] == 15


def test_ctrl_c_says_how_to_go_on(
    tiny: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    draw = Batches.__call__
    before = signal.getsignal(signal.SIGINT)  # ignored in a shell's background job

    def interrupted(self: Batches, index: int) -> Any:
        if index == 3:
            signal.raise_signal(signal.SIGINT)
        return draw(self, index)

    monkeypatch.setattr(Batches, "__call__", interrupted)
    assert call_main(monkeypatch, *tiny, "--out", str(tmp_path / "out")) == 130
    assert "gapt: stopped after step 4 of 12. Go on with the same command and --resume." in capsys.readouterr().err
    assert signal.getsignal(signal.SIGINT) is before


# What is refused, before anything is lost


def refused(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    """The one line on stderr of a call that ends with code 2."""
    assert call_main(monkeypatch, *argv) == 2
    message = capsys.readouterr().err
    assert message.startswith("error: ")
    assert message.count("\n") == 1
    return message


BAD_VALUES = {
    "--window 1": "--window: input should be greater than or equal to 2, found 1",
    "--weight -1": "--weight: input should be greater than or equal to 0",
    "--weight inf": "--weight: input should be a finite number",
    "--alpha 0": "--alpha: input should be greater than 0",
    "--alpha nan": "--alpha: input should be greater than 0",
    "--combine both": "--combine: input should be 'sum', 'project' or 'cap', found 'both'",
    "--gate open": "--gate: input should be 'smoothed' or 'published', found 'open'",
    "--schedule none": "--schedule: input should be",
    "--patience-memorization 0": "--patience-memorization: input should be greater than or equal to 1",
    "--smoothing 1": "--smoothing: input should be less than 1",
    "--lr 0": "--lr: input should be greater than 0",
    "--steps 0": "--steps: input should be greater than or equal to 1",
    "--context 1": "--context: input should be greater than or equal to 2",
    "--batch-size 0": "--batch-size: input should be greater than or equal to 1",
    "--window few": "argument --window: invalid window value: 'few'",
    "--preset tiny": "argument --preset: invalid choice: 'tiny'",
    "--wieght 1": "unrecognized arguments: --wieght",
    "--threads 0": "--threads: needs at least 1, found 0",
    "--device abacus": "--device abacus: cannot be used here",
    "--compare --method plain": "--method: --compare trains all methods",
    "--resume --overwrite": "--resume and --overwrite contradict each other",
    "--resume": "there is no run in",
    "--layers transformer.x.*": "--layers: ",
    "--data nowhere.txt": "--data nowhere.txt: no such file",
    "--parallel ddp": "--parallel ddp: found one process without torchrun; start the script by torchrun",
    "--float8": "--float8: needs a CUDA GPU of compute capability 8.9 or higher",
    "--compile --parameter-alignment-every 2": "--parameter-alignment-every: a compiled model keeps no graph for it",
    "--optimizer adam": "argument --optimizer: invalid choice: 'adam'",
    "--context 4000": "training tokens are fewer than one sequence of 4000 + 1",
}


@pytest.mark.parametrize("flags", BAD_VALUES)
def test_impossible_value_is_named_with_its_flag(
    tiny: list[str], tmp_path: Path, flags: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    message = refused(monkeypatch, capsys, *tiny, "--out", str(tmp_path / "out"), *flags.split())
    assert BAD_VALUES[flags] in message
    assert not (tmp_path / "out" / "results.json").exists()


def test_unwritable_out_is_refused_before_the_data_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("in the way")
    for out in (tmp_path / "file", tmp_path / "file" / "below"):
        message = refused(monkeypatch, capsys, "--data", "nowhere.txt", "--out", str(out))
        assert f"--out {out}: cannot write there" in message
    assert (tmp_path / "file").read_text() == "in the way"


def test_finished_run_is_never_overwritten_silently(
    tiny: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    run([*tiny, "--compare", "--out", str(out)])
    (out / "notes.txt").write_text("mine")
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    message = refused(monkeypatch, capsys, *tiny, "--out", str(out))
    assert "holds a finished run; give --resume, --overwrite or another --out" in message
    # Bad input together with --overwrite leaves the old run alone too.
    for flags in ("--window 1", "--data nowhere.txt", "--layers x", "--context 4000"):
        refused(monkeypatch, capsys, *tiny, "--out", str(out), "--overwrite", *flags.split())
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before
    run([*tiny, "--steps", "3", "--overwrite", "--out", str(out)])
    assert read_results(out)["config"]["steps"] == 3
    assert len(read_metrics(out / "metrics.jsonl")) == 3
    assert not (out / "plain").exists()
    assert (out / "notes.txt").read_text() == "mine"


def test_unfinished_run_is_not_overwritten_either(
    tiny: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run([*tiny, "--out", str(tmp_path / "out")])
    (tmp_path / "out" / "results.json").unlink()
    assert "holds an unfinished run" in refused(monkeypatch, capsys, *tiny, "--out", str(tmp_path / "out"))


def test_resume_with_other_settings_is_refused(
    tiny: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = str(tmp_path / "out")
    run([*tiny, "--out", out])
    run([*tiny, "--resume", "--out", out])  # the same ones are welcome
    capsys.readouterr()
    for flags, message in {
        "--preset micro": "--preset: the run to resume has nano, found micro; drop the flag",
        "--weight 0.5": "--weight: the run to resume has 0.1, found 0.5",
        "--seed 1": "--seed: the run to resume has 0, found 1",
        "--compare": "--compare: the run to resume has False, found True",
        "--data sotu": "found sotu",
    }.items():
        assert message in refused(monkeypatch, capsys, *tiny, "--resume", "--out", out, *flags.split())


def test_checkpoint_of_another_model_is_refused(
    tiny: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    run([*tiny, "--out", str(out)])
    checkpoint = out / "checkpoint.pt"
    saved = torch.load(checkpoint, weights_only=True)
    torch.save({**saved, "identity": {**saved["identity"], "width": 192}}, checkpoint)
    message = refused(monkeypatch, capsys, "--resume", "--quiet", "--out", str(out))
    assert "checkpoint.pt is of another model (width 192, this run has 64)" in message
    checkpoint.write_bytes(b"not one")
    message = refused(monkeypatch, capsys, "--resume", "--quiet", "--out", str(out))
    assert "is not a checkpoint of this script" in message
    assert len(read_metrics(out / "metrics.jsonl")) == 12  # and nothing was cut


def test_diverged_plain_run_stops_with_advice(
    tiny: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    loss = training.token_loss
    monkeypatch.setattr(training, "token_loss", lambda *args: loss(*args) * math.nan)
    argv = [*tiny, "--method", "plain", "--out", str(tmp_path / "out")]
    assert "plain: the loss is nan at step 1; try a smaller --lr" in refused(monkeypatch, capsys, *argv)


# The parts


def test_presets_are_the_published_sizes() -> None:
    from transformers import GPT2LMHeadModel

    sizes = {}
    for name, preset in PRESETS.items():
        with torch.device("meta"):
            model = build(
                *preset.size,
                vocabulary=preset.vocabulary or 50257,
                separator=0,
                context=preset.context,
                dropout=0.0,
            )
        assert isinstance(model, GPT2LMHeadModel)
        sizes[name] = sum(p.numel() for p in model.parameters())
    assert sizes["small"] == sizes["sprint"] == 124_439_808
    assert sizes["medium"] == 354_823_168
    assert sizes["large"] == 774_030_080
    assert 300_000 < sizes["nano"] < 500_000 < sizes["micro"] < 3_000_000 < sizes["mini"] < 20_000_000


def test_methods() -> None:
    config = GAPTConfig()
    assert of_method("plain", config) is None
    penalty = of_method("penalty", config)
    assert penalty is not None
    assert penalty.gate.frozen
    assert penalty.gate.initial_phase == "compression"
    published = of_method("published", config)
    assert published is not None
    assert published.gate == GateConfig.published()
    assert of_method("gapt", config) == config


def test_learning_rate_warms_up_and_ends_where_it_should() -> None:
    factors = [learning_rate_factor(step, 100, 10, 0.1) for step in range(100)]
    assert factors[0] == pytest.approx(1 / 11)
    assert max(factors) == factors[10] == 1.0
    assert factors[:11] == sorted(factors[:11])
    assert factors[10:] == sorted(factors[10:], reverse=True)
    assert learning_rate_factor(100, 100, 10, 0.1) == pytest.approx(0.1)


def test_changes_and_table_without_a_plain_run() -> None:
    entry = {
        "val_loss": 2.0,
        "entropy": 1.0,
        "layer_entropy": {"h.0": 1.0},
        "compression_share": 0.25,
        "switches": 3,
        "optimizer_state_mb": 1.25,
        "tokens_per_second": 1234.5,
    }
    assert changes({"gapt": entry}) == {}
    assert "| phase switches       |     3 |" in table({"gapt": entry})
    better = {**entry, "val_loss": 1.5}
    assert changes({"plain": entry, "gapt": better}) == {"gapt": {"val_loss": -0.25, "entropy": 0.0}}
    assert "1.500 (-25.0%)" in table({"plain": entry, "gapt": better})


def test_bad_input_is_a_user_error(tiny: list[str], tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--steps"):
        run([*tiny, "--steps", "0", "--out", str(tmp_path / "out")])


# Real text


@pytest.mark.parametrize("name", ["fineweb_300docs.jsonl", "fineweb_edu_val.bin", "sotu"])
def test_learns_real_text(tmp_path: Path, name: str) -> None:
    """Forty steps of the smallest model already beat guessing, and on text they approach the unigram entropy."""
    if name != "sotu" and not (DATA / name).exists():
        pytest.skip(f"no {name} in {DATA}; set GAPT_TEST_DATA to the folder that has it")
    data = name if name == "sotu" else str(DATA / name)
    flags = [
        "--preset",
        "nano",
        "--context",
        "64",
        "--steps",
        "40",
        "--eval-every",
        "40",
        "--eval-sequences",
        "16",
        "--quiet",
    ]
    if name.endswith(".bin"):
        flags += ["--batch-size", "2"]
    run([*flags, "--data", data, "--out", str(tmp_path / "out")])
    results = read_results(tmp_path / "out")
    assert results["runs"]["gapt"]["val_loss"] < math.log(results["vocabulary"]) - 0.5
