"""The commands `gapt-optim profile` and `compare`, as a user types them."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers
from transformers import BertConfig, BertModel, GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from gapt_optim import Profile
from gapt_optim.cli import main
from gapt_optim.profiling.texts import TextBatches, check_text, documents

from ..reporting.runs import write_lines

TEXT = "the quick brown fox jumps over the lazy dog and runs away from all the others. " * 60

MODULE = """
import torch
from torch import nn
def build(): return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 8))
def batches(): return [torch.randn(16, 4) for _ in range(3)]
def broken(): raise RuntimeError("out of luck\\nsecond line")
def wrong(): return [torch.randn(16, 5)]
def broken_off(): return [torch.randn(16, 4), torch.full((8, 4), float("nan"))]
number = 3
"""


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A GPT-2 with random weights and a tokenizer, as `save_pretrained` leaves them."""
    folder = tmp_path_factory.mktemp("models") / "tiny"
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=["<s>"], show_progress=False)
    tokenizer.train_from_iterator([TEXT], trainer)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>").save_pretrained(folder)
    config = GPT2Config(vocab_size=300, n_positions=32, n_embd=16, n_layer=3, n_head=2, bos_token_id=0, eos_token_id=0)
    torch.manual_seed(0)
    GPT2LMHeadModel(config).save_pretrained(folder)
    return folder


@pytest.fixture
def there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty folder to stand in, with a module of the user's."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "users_module.py").write_text(MODULE)
    (tmp_path / "text.txt").write_text(TEXT)
    path = list(sys.path)
    yield tmp_path
    sys.path[:] = path
    sys.modules.pop("users_module", None)


def test_profile_of_a_folder_and_a_text(there: Path, model_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    outs = ["a.json", "a.html", "a.png"]
    assert main(["profile", str(model_folder), "--data", "text.txt", "--tokens", "500", "--out", *outs]) == 0
    shown = capsys.readouterr().out
    assert "tiny on text.txt: 3 layers" in shown
    assert "\nh.* " in shown
    assert [name for name in "012" if f"\n{name} " in shown] == ["0", "1", "2"]
    result = Profile.load("a.json")
    assert result.rows >= 500
    assert (there / "a.png").read_bytes().startswith(b"\x89PNG")
    assert "Layers of tiny" in (there / "a.html").read_text()

    assert main(["profile", str(model_folder), "--data", "text.txt", "--tokens", "200", "--out", "b.json"]) == 0
    assert main(["compare", "a.json", "b.json"]) == 2
    assert "a and b were not profiled on the same data" in capsys.readouterr().err
    assert main(["compare", "a.json", "b.json", "--anyway", "--out", "c.html", "c.json", "c.csv"]) == 0
    shown = capsys.readouterr().out
    assert "b, and its change (Δ) from a" in shown
    assert "warning: a and b were not profiled on the same data" in shown
    assert set(json.loads((there / "c.json").read_text())) == {"a", "b"}


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_texts_of_other_kinds(there: Path, model_folder: Path, suffix: str) -> None:
    texts = [TEXT[:300], "", TEXT[:90]]
    if suffix == "jsonl":
        path = write_lines(there / "data.jsonl", [{"text": text} for text in texts])
        path.write_text(path.read_text().replace("\n", "\n\n"))  # a line between two documents is none
    else:
        parquet = pytest.importorskip("pyarrow.parquet")
        import pyarrow

        parquet.write_table(pyarrow.table({"text": texts}), there / "data.parquet")
    assert main(["profile", str(model_folder), "--data", f"data.{suffix}", "--out", "p.json"]) == 0
    tokenizer = PreTrainedTokenizerFast.from_pretrained(model_folder)
    expected = sum(len(tokenizer(text)["input_ids"]) for text in texts)
    assert expected - 1 <= Profile.load("p.json").rows <= expected


def test_a_table_without_texts_names_its_columns(
    there: Path, model_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    parquet = pytest.importorskip("pyarrow.parquet")
    import pyarrow

    parquet.write_table(pyarrow.table({"words": ["a"], "n": [1]}), there / "words.parquet")
    assert main(["profile", str(model_folder), "--data", "words.parquet"]) == 2
    assert capsys.readouterr().err == "error: words.parquet has no column \"text\"; it has ['words', 'n']\n"


@pytest.mark.parametrize("kind", ["gpt2", "bert"])
def test_a_folder_without_a_tokenizer(there: Path, kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    """transformers makes an empty tokenizer for a GPT-2, and one that knows no word for a BERT."""
    small = {"vocab_size": 300, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = GPT2LMHeadModel(GPT2Config(**small)) if kind == "gpt2" else BertModel(BertConfig(**small))
    model.save_pretrained("bare")
    assert main(["profile", "./bare", "--data", "text.txt"]) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: the folder './bare' has no tokenizer (tokenizer.json or the like)")
    assert said.count("\n") == 1


def test_a_sequence_has_room_beside_its_special_tokens(there: Path, model_folder: Path) -> None:
    tokenizer = PreTrainedTokenizerFast.from_pretrained(model_folder)
    around = processors.TemplateProcessing(single="<s> $A <s>", special_tokens=[("<s>", 0)])
    tokenizer.backend_tokenizer.post_processor = around
    tokenizer.eos_token = "<s>"
    batches = TextBatches("text.txt", tokenizer, 5, 4, 100)
    rows = [row.tolist() for batch in batches for row in batch["input_ids"]]
    assert all(len(row) == 5 and row[0] == 0 for row in rows)
    with pytest.raises(ValueError, match="--length 1 has no room beside the tokenizer's special tokens"):
        list(TextBatches("text.txt", tokenizer, 1, 4, 100))


def test_batches_hold_the_whole_text_once(there: Path, model_folder: Path) -> None:
    tokenizer = PreTrainedTokenizerFast.from_pretrained(model_folder)
    batches = list(TextBatches(str(there / "text.txt"), tokenizer, 10, 4, 10**6))
    rows = [row[live.bool()].tolist() for batch in batches for row, live in zip(*batch.values(), strict=True)]
    read, whole = [token for row in rows for token in row], tokenizer(TEXT)["input_ids"]
    assert read == whole[: len(read)]
    assert len(whole) - len(read) < 2  # a last token by itself is no sequence
    assert {len(row) for row in rows[:-1]} == {10}


def test_model_and_batches_of_the_users_own(there: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--data", "users_module:batches", "--layers", "0", "2", "--windows", "4", "all", "--orders", "1", "inf"]
    assert main(["profile", "users_module:build", *flags]) == 0
    assert "users_module:build on users_module:batches: 2 layers, 48 rows" in capsys.readouterr().out


def test_what_a_profile_leaves_out_is_said(there: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["profile", "users_module:build", "--data", "users_module:broken_off", "--layers", "0"]) == 0
    shown = capsys.readouterr().out
    assert "note: " in shown
    assert "finite" in shown


ERRORS = [
    (["profile", "./nowhere", "--data", "text.txt"], "there is no folder './nowhere'"),
    (["profile", "empty", "--data", "text.txt"], "has no config.json"),
    (["profile", "text.txt", "--data", "text.txt"], "'text.txt' is a file"),
    (["profile", "users_module:nothing", "--data", "x.txt"], "cannot be imported: AttributeError"),
    (["profile", "no_such_module:build", "--data", "x.txt"], "cannot be imported: ModuleNotFoundError"),
    (["profile", "users_module:broken", "--data", "x.txt"], "broken() raised RuntimeError: out of luck"),
    (["profile", "users_module:number", "--data", "x.txt"], "gives int, not a torch.nn.Module"),
    (["profile", "users_module:build", "--data", "users_module:number"], "which has no batches"),
    (["profile", "users_module:build", "--data", "text.txt"], "a text needs the tokenizer"),
    (["profile", "users_module:build", "--data", "users_module:wrong", "--layers", "0"], "RuntimeError: mat1"),
    (["profile", "users_module:build", "--data", "users_module:batches", "--out", "x.doc"], "must end in"),
    (["profile", "users_module:build", "--data", "users_module:batches", "--layers", "x"], "matches no module"),
    (["profile", "MODEL", "--data", "nowhere.txt"], "there is no file 'nowhere.txt'"),
    (["profile", "MODEL", "--data", "users_module.py"], "is no .txt, .jsonl, .parquet file"),
    (["profile", "MODEL", "--data", "short.txt"], "short.txt is too short"),
    (["profile", "MODEL", "--data", "bad.jsonl"], "bad.jsonl, line 1, is no JSON object"),
    (["profile", "MODEL", "--data", "text.txt", "--length", "1"], "--length must be at least 2 tokens"),
    (["profile", "MODEL", "--data", "text.txt", "--batch-size", "0"], "--batch-size must be at least 1"),
    (["profile", "MODEL", "--data", "text.txt", "--length", "99"], "longer than the model takes, 32 tokens"),
    (["profile", "MODEL", "--data", "text.txt", "--windows", "one"], "--windows takes numbers of at least 2"),
    (["profile", "MODEL", "--data", "text.txt", "--orders", "0"], "orders must hold numbers"),
    (["profile", "MODEL", "--data", "text.txt", "--device", "teapot"], "--device teapot cannot be used"),
    (
        ["profile", "MODEL", "--data", "text.txt", "--out", "page.py"],
        "must end in .html, .json, .csv, .png, .pdf or .svg",
    ),
    (["compare", "nowhere.json", "b.json"], "there is no file 'nowhere.json'"),
    (["compare", "bad.jsonl", "bad.jsonl"], "holds no profile"),
    (["compare", "a.json", "b.json", "--out", "c.html", "./b.json"], "--out b.json is one of the profiles to compare"),
]


@pytest.mark.parametrize(("argv", "message"), ERRORS, ids=lambda value: " ".join(value)[:60])
def test_errors_are_one_clear_line(
    argv: list[str], message: str, there: Path, model_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (there / "empty").mkdir()
    (there / "short.txt").write_text("")
    (there / "bad.jsonl").write_text("[1]\n")
    assert main([str(model_folder) if word == "MODEL" else word for word in argv]) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ")
    assert said.count("\n") == 1
    assert message in said


def test_checkpoints_of_a_run_are_a_heat_map(
    there: Path, model_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """From a run's folder to the map in one command."""
    tokenizer = PreTrainedTokenizerFast.from_pretrained(model_folder)
    for step in (20, 100, 3):
        folder = there / "run" / f"checkpoint-{step}"
        tokenizer.save_pretrained(folder)
        config = GPT2Config.from_pretrained(model_folder)
        torch.manual_seed(step)
        GPT2LMHeadModel(config).save_pretrained(folder)
    assert main(["profile", "run", "--data", "text.txt", "--tokens", "300", "--out", "map.html", "map.csv"]) == 0
    shown = capsys.readouterr().out
    assert "cosine, centred S by layer, of checkpoint-*" in shown
    (header,) = [line.split() for line in shown.splitlines() if line.startswith("h.*")]
    assert header == ["h.*", "3", "20", "100"]
    assert "Layers over profiles" in (there / "map.html").read_text()
    assert (there / "map.csv").read_text().splitlines()[0] == "layer,checkpoint-3,checkpoint-20,checkpoint-100"


def test_beside_the_same_architecture_untrained(
    there: Path, model_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--data", "the quick brown fox jumps", "--baseline", "random", "--preset", "diff-erank"]
    assert main(["profile", str(model_folder), *flags, "--out", "p.json"]) == 0
    shown = capsys.readouterr().out
    assert "random, and its change (Δ) from tiny" in shown
    assert "centred, then cosine S" in " ".join(shown.split()) or "cosine" in shown


def test_cka_against_another_model_is_in_the_files(there: Path, model_folder: Path) -> None:
    flags = ["--data", "text.txt", "--tokens", "300", "--against", str(model_folder), "--out", "p.json", "p.html"]
    assert main(["profile", str(model_folder), *flags]) == 0
    found = Profile.load("p.json")
    assert found.cka is not None
    assert len(found.cka) == 6
    assert "CKA with the other model" in (there / "p.html").read_text()


@pytest.mark.parametrize("columns", [80, 120])
def test_a_narrow_terminal_breaks_no_number(
    columns: int, there: Path, model_folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    assert main(["profile", str(model_folder), "--data", "text.txt", "--tokens", "300", "--out", "p.json"]) == 0
    shown = capsys.readouterr().out
    assert max(map(len, shown.splitlines())) <= columns
    rank = Profile.load("p.json").layers[0].entropy().effective_rank
    (row,) = [line for line in shown.splitlines() if line.startswith("0 ")]
    assert f" {rank:#.3g} " in row
    assert main(["profile", str(model_folder), "--data", "text.txt", "--tokens", "300", "--wide"]) == 0
    wide = capsys.readouterr().out
    assert "curvature" in wide
    assert "Not shown" not in wide


def test_explain_lists_modules_and_how_layers_are_read(
    there: Path, model_folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("COLUMNS", raising=False)
    assert main(["explain", str(model_folder), "--data", "text.txt"]) == 0
    shown = capsys.readouterr().out
    assert "(4, 32, 16) is (batch length features)" in shown
    assert "h.*.attn.c_attn" in shown
    monkeypatch.setenv("COLUMNS", "60")
    assert main(["explain", str(model_folder), "--data", "text.txt"]) == 0
    listed, _, _ = capsys.readouterr().out.partition("\n\n")
    assert max(map(len, listed.splitlines())) <= 60
    assert [line.split()[0] for line in listed.splitlines()[3:6]] == ["h", "*", "ln_1"]  # a tree
    assert main(["explain", str(model_folder), "--data", "text.txt", "--wide"]) == 0
    assert capsys.readouterr().out == shown
    assert main(["explain", "users_module:build", "--data", "users_module:batches", "--layers", "0"]) == 0
    assert "(16, 8) is (batch features)" in capsys.readouterr().out


def test_files_that_hold_no_text_are_refused(tmp_path: Path) -> None:
    (tmp_path / "data.bin").write_bytes(b"0")
    with pytest.raises(ValueError, match=r"data\.bin' is no .*\.txt.* file"):
        check_text(str(tmp_path / "data.bin"))
    with pytest.raises(ValueError, match="there is no file"):
        check_text(str(tmp_path / "data.txt"))
    check_text("name/of_a_data_set")


def test_rows_of_a_data_set_are_its_texts(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def load_dataset(name: str, configuration: str | None, **options: Any) -> Iterator[dict[str, Any]]:
        asked.append((name, configuration, options))
        return iter([{"text": "a b"}, {"text": ""}, {"label": 1}, {"text": "c"}])

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    assert ["".join(pieces) for pieces in documents("some/name:small")] == ["a b", "c"]
    assert asked == [("some/name", "small", {"split": "train", "streaming": True})]
