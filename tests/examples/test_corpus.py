"""Tokens on disk: the split, the tokenizers, the batches."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

import corpus as corpus_module
import numpy as np
import pytest
import torch
from corpus import Batches, Corpus, check_length, load, prepare, validation_batches
from errors import UserError
from text_data import Source, open_source
from text_tokenizers import END_OF_TEXT, GPT2BPE, SmallBPE, learn_bpe


def prepared(source: Source, folder: Path, vocabulary: int | None = 400, tokens: int = 10_000) -> Corpus:
    folder.mkdir(exist_ok=True)
    return prepare(source, folder, vocabulary=vocabulary, tokens=tokens)


def split_documents(tokens: np.ndarray, separator: int, tokenizer: SmallBPE) -> list[str]:
    ends = np.flatnonzero(tokens == separator)
    starts = [0, *(ends[:-1] + 1)]
    return [tokenizer.decode(tokens[start:end].tolist()) for start, end in zip(starts, ends, strict=True)]


def test_every_tenth_document_is_held_out_whole(tmp_path: Path, documents: list[str]) -> None:
    corpus = prepared(Source("some", lambda: iter(documents)), tmp_path / "data")
    tokenizer = SmallBPE(tmp_path / "data" / "tokenizer.json")
    held_out = documents[9::10]
    assert split_documents(corpus.validation, corpus.separator, tokenizer) == held_out
    assert split_documents(corpus.train, corpus.separator, tokenizer) == [d for d in documents if d not in held_out]
    assert corpus.vocabulary == tokenizer.vocabulary <= 400


def test_repeated_document_is_in_one_part_only(tmp_path: Path, documents: list[str]) -> None:
    repeated = [*documents[:9], *documents[:9], *documents[9:]]
    corpus = prepared(Source("some", lambda: iter(repeated)), tmp_path / "data")
    tokenizer = SmallBPE(tmp_path / "data" / "tokenizer.json")
    train = split_documents(corpus.train, corpus.separator, tokenizer)
    validation = split_documents(corpus.validation, corpus.separator, tokenizer)
    assert sorted(train + validation) == sorted(documents)


def test_vocabulary_is_learned_from_the_training_part_only(tmp_path: Path, documents: list[str]) -> None:
    odd = [*documents[:9], "\u0416\u0417\u0418" * 500, *documents[10:]]
    prepared(Source("some", lambda: iter(odd)), tmp_path / "data")
    tokens = SmallBPE(tmp_path / "data" / "tokenizer.json").encode(["\u0416\u0417\u0418"])
    assert len(tokens[0]) == 6  # two bytes a letter and no merge of them


def test_one_document_is_cut_near_its_end(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("".join(f"line {i} of this text\n" for i in range(400)))
    source, _ = open_source(str(path))
    corpus = prepared(source, tmp_path / "data")
    tokenizer = SmallBPE(tmp_path / "data" / "tokenizer.json")
    [train] = split_documents(corpus.train, corpus.separator, tokenizer)
    [validation] = split_documents(corpus.validation, corpus.separator, tokenizer)
    assert train + validation == path.read_text()
    assert train.endswith("\n")
    assert 0.05 < len(validation) / len(train) < 0.2


def test_few_documents_hold_out_the_last(tmp_path: Path, documents: list[str]) -> None:
    corpus = prepared(Source("some", lambda: iter(documents[:3])), tmp_path / "data")
    tokenizer = SmallBPE(tmp_path / "data" / "tokenizer.json")
    assert split_documents(corpus.validation, corpus.separator, tokenizer) == documents[2:3]


def test_blank_corpus_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="there is no text in it"):
        prepared(Source("some", lambda: iter([" ", "\n"])), tmp_path / "data")


def test_endless_source_is_read_no_further_than_needed(tmp_path: Path, documents: list[str]) -> None:
    taken = 0

    def endless() -> Iterator[str]:
        nonlocal taken
        while True:
            for document in documents:
                taken += 1
                yield f"{taken} {document}"

    corpus = prepared(Source("stream", endless, every=20, endless=True), tmp_path / "data", tokens=3000)
    assert len(corpus.train) >= 3000
    assert taken < 150


def test_long_document_gives_the_same_tokens_in_pieces(tmp_path: Path, documents: list[str]) -> None:
    text = "\n".join(documents) + "\n\n  indented\n" + "\n".join(documents)
    tokenizer = learn_bpe(documents, 400, tmp_path / "tokenizer.json")
    whole = tokenizer.encode([text])[0]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(corpus_module, "PIECE", 1000)
        pieces = list(corpus_module._encode([(False, text)], tokenizer))
    assert len(pieces) > 5
    assert np.concatenate([ids for _, ids in pieces]).tolist() == [*whole, tokenizer.separator]


def test_separator_in_the_text_is_text(tmp_path: Path, documents: list[str]) -> None:
    tokenizer = learn_bpe(documents, 400, tmp_path / "tokenizer.json")
    assert tokenizer.separator not in tokenizer.encode([f"a {END_OF_TEXT} b"])[0]


def test_prepared_corpus_is_used_again(tmp_path: Path, documents: list[str]) -> None:
    passes = 0

    def counted() -> Iterator[str]:
        nonlocal passes
        passes += 1
        return iter(documents)

    first = prepared(Source("some", counted), tmp_path / "data")
    second = prepared(Source("some", counted), tmp_path / "data")
    assert passes == 1
    assert np.array_equal(first.train, second.train)
    prepared(Source("some", counted), tmp_path / "data", vocabulary=300)
    assert passes == 2


def test_gpt2_tokenizer_is_gpt2s(tmp_path: Path) -> None:
    tokenizer = GPT2BPE()
    assert tokenizer.encode(["Hello world"]) == [[15496, 995]]
    assert tokenizer.vocabulary == 50257
    assert tokenizer.separator == 50256
    text = "It's 3 o'clock;\n\n  isn't it? \u00e9\U0001f600"
    assert tokenizer.decode(tokenizer.encode([text])[0]) == text


def test_gpt2_vocabulary_for_a_corpus(tmp_path: Path, documents: list[str]) -> None:
    corpus = prepared(Source("some", lambda: iter(documents)), tmp_path / "data", vocabulary=None)
    assert corpus.vocabulary == 50257
    assert (
        GPT2BPE().decode(corpus.validation[:20].tolist())
        == documents[9][: len(GPT2BPE().decode(corpus.validation[:20].tolist()))]
    )


def test_bin_is_gpt2_ids_and_stays_where_it_is(tmp_path: Path) -> None:
    path = tmp_path / "a.bin"
    ids = np.arange(2000, dtype="<u2")
    ids.tofile(path)
    corpus = prepared(open_source(str(path))[0], tmp_path / "data")
    assert corpus.vocabulary == 50257
    assert np.array_equal(np.concatenate([corpus.train, corpus.validation]), ids)
    assert len(corpus.validation) == 200
    assert sorted(p.name for p in (tmp_path / "data").iterdir()) == ["corpus.json"]
    ids[:-1].tofile(path)
    with pytest.raises(UserError, match="gone or has changed"):
        load(tmp_path / "data")


def test_bad_bins(tmp_path: Path) -> None:
    path = tmp_path / "a.bin"
    path.write_bytes(b"abc")
    with pytest.raises(UserError, match=r"3 bytes is an odd length; a \.bin holds uint16"):
        prepared(open_source(str(path))[0], tmp_path / "data")
    np.array([5, 50256, 50257, 60000], dtype="<u2").tofile(path)
    with pytest.raises(UserError, match=r"token ids go up to 60000 \(first bad one at token 2\).*ends at 50256"):
        prepared(open_source(str(path))[0], tmp_path / "data")


def test_unigram_entropy(tmp_path: Path) -> None:
    path = tmp_path / "a.bin"
    np.tile(np.array([1, 2, 3, 4], dtype="<u2"), 500).tofile(path)
    corpus = prepared(open_source(str(path))[0], tmp_path / "data")
    assert corpus.unigram_entropy == pytest.approx(math.log(4))


def test_text_shorter_than_a_sequence_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("A short text. " * 12)
    corpus = prepared(open_source(str(path))[0], tmp_path / "data")
    with pytest.raises(UserError, match=r"tokens are fewer than one sequence of 128 \+ 1; give a longer text or"):
        check_length(corpus, 128)


def test_an_epoch_sees_every_window_once() -> None:
    tokens = np.arange(1000, dtype=np.uint16)
    batches = Batches(tokens, context=10, batch_size=9, seed=1)
    assert batches.windows == 99
    first = torch.cat([batches(i)[0] for i in range(11)])
    assert len(first.unique()) == 990
    second = torch.cat([batches(i)[0] for i in range(11, 22)])
    assert len(second.unique()) == 990
    assert not torch.equal(first, second)


def test_batches_depend_on_seed_and_index_alone() -> None:
    tokens = np.arange(1000, dtype=np.uint16)
    ahead = Batches(tokens, 10, 4, seed=1)
    for index in range(40):
        ahead(index)
    inputs, targets = ahead(7)
    again, _ = Batches(tokens, 10, 4, seed=1)(7)
    other, _ = Batches(tokens, 10, 4, seed=2)(7)
    assert torch.equal(inputs, again)
    assert not torch.equal(inputs, other)
    assert torch.equal(inputs[:, 1:], targets[:, :-1])
    assert torch.equal(targets, inputs + 1)


@pytest.mark.parametrize("length", [11, 12, 20, 21, 30, 31])
def test_batches_of_the_shortest_texts(length: int) -> None:
    batches = Batches(np.arange(length, dtype=np.uint16), context=10, batch_size=2, seed=0)
    for index in range(20):
        assert batches(index)[1].max() < length


def test_validation_sequences_are_fixed_and_do_not_overlap() -> None:
    tokens = np.arange(1001, dtype=np.uint16)
    chosen = torch.cat([inputs for inputs, _ in validation_batches(tokens, 10, 4, 7)])
    assert chosen.shape == (7, 10)
    assert len(chosen.unique()) == 70
    assert chosen[0, 0] == 0
    assert chosen[-1, -1] == 999
    assert sum(len(inputs) for inputs, _ in validation_batches(tokens, 10, 4, 500)) == 100
