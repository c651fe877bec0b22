"""A corpus as token ids on disk, split into training and validation, and the batches drawn from it."""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import platform
import re
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from errors import UserError
from numpy.typing import NDArray
from text_data import Source, unique
from text_tokenizers import GPT2_VOCABULARY, GPT2BPE, Tokenizer, learn_bpe

Tokens = NDArray[np.uint16]

VALIDATION_SHARE = 0.1  # of a text that is one document
LEARN_CHARACTERS = 20_000_000  # a vocabulary of a few thousand tokens needs no more text than this
PIECE = 100_000  # characters; long documents are encoded in pieces, on all cores
# A cut here falls between two words of every tokenizer used, so the pieces give the tokens of the whole.
CUT = re.compile(r"(?<=\n)(?=\S)")


@dataclass(frozen=True)
class Corpus:
    """Tokens of both parts, and what a model for them needs to know."""

    name: str
    train: Tokens
    validation: Tokens
    vocabulary: int
    separator: int
    """The id that ends a document."""
    unigram_entropy: float
    """Entropy of the training tokens' frequencies, in nats: the loss of a model that ignores context."""


def prepare(source: Source, folder: Path, *, vocabulary: int | None, tokens: int) -> Corpus:
    """Tokenizes ``source`` into ``folder``, or takes what an earlier call left there.

    ``vocabulary`` is the size of the BPE to learn, None for GPT-2's. ``tokens`` is how many training tokens
    to take from an endless source.
    """
    status = source.path.stat() if source.path else None
    key: dict[str, Any] = {
        "source": source.name,
        "file": [status.st_size, status.st_mtime_ns] if status else None,
        "vocabulary": vocabulary,
        "tokens": tokens if source.endless else None,
    }
    try:
        if json.loads((folder / "corpus.json").read_text())["key"] == key:
            return load(folder)
    except (OSError, ValueError, KeyError):
        pass  # nothing of use there
    if source.path is not None and source.path.suffix == ".bin":
        facts = _check_bin(source.path)
    else:
        facts = _tokenize(source, folder, vocabulary, tokens)
    _replace(folder / "corpus.json", json.dumps({"key": key, "name": source.name, **facts}, indent=2))
    return load(folder)


def load(folder: Path) -> Corpus:
    """The corpus that `prepare` left in ``folder``."""
    try:
        facts = json.loads((folder / "corpus.json").read_text())
    except FileNotFoundError as error:  # a rank on another machine than the one that prepared it
        raise UserError(f"--out: {folder} is empty on {platform.node()}; give a folder that all machines share") from (
            error
        )
    if "bin" in facts:
        path = Path(facts["bin"])
        if not path.exists() or path.stat().st_size != 2 * (facts["train"] + facts["validation"]):
            raise UserError(f"--data {path}: the file is gone or has changed since the run began; put it back")
        whole = np.memmap(path, dtype="<u2", mode="r")
        train, validation = whole[: facts["train"]], whole[facts["train"] :]
    else:
        train = np.memmap(folder / "train.bin", dtype="<u2", mode="r")
        validation = np.memmap(folder / "validation.bin", dtype="<u2", mode="r")
    return Corpus(facts["name"], train, validation, facts["vocabulary"], facts["separator"], facts["unigram_entropy"])


def first_tokens(corpus: Corpus, count: int) -> Corpus:
    """The same corpus with only its first ``count`` training tokens, to be seen more than once."""
    if count > len(corpus.train):
        raise UserError(f"--train-tokens: {corpus.name} has {len(corpus.train):,} training tokens, found {count:,}")
    if count < 1:
        raise UserError(f"--train-tokens: needs at least 1, found {count}")
    train = corpus.train[:count]
    return dataclasses.replace(corpus, train=train, unigram_entropy=_entropy(_count(train, corpus.vocabulary)))


def check_length(corpus: Corpus, context: int) -> None:
    """Refuses a corpus with a part too short for one sequence."""
    for part, tokens in (("training", corpus.train), ("validation", corpus.validation)):
        if len(tokens) < context + 1:
            raise UserError(
                f"--data {corpus.name}: {len(tokens)} {part} tokens are fewer than one sequence of {context} + 1; "
                "give a longer text or a smaller --context"
            )


def _check_bin(path: Path) -> dict[str, Any]:
    """Facts about a file of little-endian uint16 GPT-2 ids; its tail is the validation part."""
    size = path.stat().st_size
    if size % 2:
        raise UserError(f"--data {path}: {size} bytes is an odd length; a .bin holds uint16 tokens of 2 bytes each")
    tokens = np.memmap(path, dtype="<u2", mode="r")
    counts = _count(tokens, 1 << 16)
    if counts[GPT2_VOCABULARY:].any():
        largest = int(np.flatnonzero(counts)[-1])
        place = int(np.argmax(tokens >= GPT2_VOCABULARY))
        raise UserError(
            f"--data {path}: token ids go up to {largest} (first bad one at token {place}), but GPT-2's vocabulary "
            f"ends at {GPT2_VOCABULARY - 1}; write GPT-2 ids as uint16 without a header, or give the text itself"
        )
    validation = max(1, int(len(tokens) * VALIDATION_SHARE))
    return {
        "bin": str(path.resolve()),
        "train": len(tokens) - validation,
        "validation": validation,
        "vocabulary": GPT2_VOCABULARY,
        "separator": GPT2BPE.separator,
        "unigram_entropy": _entropy(_count(tokens[: len(tokens) - validation], GPT2_VOCABULARY)),
    }


def _tokenize(source: Source, folder: Path, vocabulary: int | None, tokens: int) -> dict[str, Any]:
    """Writes train.bin and validation.bin under ``folder``."""
    documents = source.documents() if source.endless else unique(source.documents())
    # Six characters a token is plenty: an endless source is not read beyond what the run needs.
    head = _head(documents, min(LEARN_CHARACTERS, 6 * tokens) if source.endless else LEARN_CHARACTERS, source.every)
    if not head:
        raise UserError(f"--data {source.name}: there is no text in it")
    every = min(source.every, len(head))  # fewer than source.every documents are the whole corpus
    if every == 1:
        head = _cut(head[0])
        every = 2

    tokenizer: Tokenizer
    if vocabulary is None:
        tokenizer = GPT2BPE()
    else:
        training_text = (text for held_out, text in _split(head, every) if not held_out)
        tokenizer = learn_bpe(training_text, vocabulary, folder / "tokenizer.json")

    written = {"train": 0, "validation": 0}
    with ExitStack() as files:
        part_files = {part: files.enter_context((folder / f"{part}.tmp").open("wb")) for part in written}
        for held_out, ids in _encode(_split(itertools.chain(head, documents), every), tokenizer):
            part = "validation" if held_out else "train"
            part_files[part].write(ids.tobytes())
            written[part] += len(ids)
            if source.endless and written["train"] >= tokens and written["validation"] >= tokens // (2 * every):
                break
    if 0 in written.values():
        raise UserError(f"--data {source.name}: too little text for a training and a validation part; give more")
    for part in written:
        os.replace(folder / f"{part}.tmp", folder / f"{part}.bin")
    train = np.memmap(folder / "train.bin", dtype="<u2", mode="r")
    return {
        **written,
        "vocabulary": tokenizer.vocabulary,
        "separator": tokenizer.separator,
        "unigram_entropy": _entropy(_count(train, tokenizer.vocabulary)),
    }


def _head(documents: Iterator[str], characters: int, count: int) -> list[str]:
    """Takes documents off the front until there are enough characters and at least ``count`` documents."""
    head: list[str] = []
    while (characters > 0 or len(head) < count) and (document := next(documents, None)) is not None:
        head.append(document)
        characters -= len(document)
    return head


def _split(documents: Iterable[str], every: int) -> Iterator[tuple[bool, str]]:
    """Marks every ``every``-th document as held out, which is fair to a corpus in order of time."""
    for number, document in enumerate(documents, start=1):
        yield number % every == 0, document


def _cut(text: str) -> list[str]:
    """The only document of a corpus as two, the second for validation, cut between lines or words."""
    middle = int(len(text) * (1 - VALIDATION_SHARE))
    line, word = (text.rfind(gap, max(0, middle - 2000), middle) + 1 for gap in "\n ")
    cut = line or word or middle
    return [text[:cut], text[cut:]]


def _encode(parts: Iterable[tuple[bool, str]], tokenizer: Tokenizer) -> Iterator[tuple[bool, Tokens]]:
    """Token ids of every document with the separator after it."""
    pieces = ((held_out, piece, last) for held_out, text in parts for piece, last in _pieces(text))
    while batch := list(itertools.islice(pieces, 64)):
        encoded = tokenizer.encode([piece for _, piece, _ in batch])
        for (held_out, _, last), ids in zip(batch, encoded, strict=True):
            yield held_out, np.array([*ids, tokenizer.separator] if last else ids, dtype="<u2")


def _pieces(text: str) -> Iterator[tuple[str, bool]]:
    """Cuts a long document; the flag marks its last piece."""
    start = 0
    while (cut := CUT.search(text, start + PIECE)) is not None and cut.start() < len(text):
        yield text[start : cut.start()], False
        start = cut.start()
    yield text[start:], True


def _count(tokens: Tokens, vocabulary: int) -> NDArray[np.int64]:
    """How often each id occurs, in pieces: a corpus may be larger than memory."""
    counts = np.zeros(vocabulary, dtype=np.int64)
    for start in range(0, len(tokens), 1 << 24):
        counts += np.bincount(tokens[start : start + (1 << 24)], minlength=vocabulary)
    return counts


def _entropy(counts: NDArray[np.int64]) -> float:
    share = counts[counts > 0] / counts.sum()
    return float(-(share * np.log(share)).sum())


def _replace(path: Path, text: str) -> None:
    """Writes a file so that a reader sees the old one or the new one, never half of one."""
    partial = path.with_name(path.name + ".tmp")
    partial.write_text(text)
    os.replace(partial, path)


class Batches:
    """Batch number ``index`` of a run, as a pure function of seed and index: a resumed run and a compared run
    see the same ones. Each epoch visits every window of the text once, in an order and at an offset of its own.
    """

    def __init__(self, tokens: Tokens, context: int, batch_size: int, seed: int) -> None:
        self.tokens, self.context, self.batch_size, self.seed = tokens, context, batch_size, seed
        self.windows = max(1, (len(tokens) - context) // context)
        self._epoch = -1
        self._starts: NDArray[np.int64] = np.empty(0, dtype=np.int64)

    def __call__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        first = index * self.batch_size
        rows = [self._start(number) for number in range(first, first + self.batch_size)]
        return sequences(self.tokens, rows, self.context)

    def _start(self, number: int) -> int:
        epoch, position = divmod(number, self.windows)
        if epoch != self._epoch:
            random = np.random.default_rng([self.seed, epoch])
            offset = random.integers(0, min(self.context, len(self.tokens) - self.windows * self.context))
            self._epoch, self._starts = epoch, offset + self.context * random.permutation(self.windows)
        return int(self._starts[position])


def validation_batches(
    tokens: Tokens, context: int, batch_size: int, count: int, *, first: int = 0, every: int = 1
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """``count`` sequences spread evenly over the validation part, the same ones every time.

    Of their batches only every ``every``-th, from number ``first`` on: what one of several ranks takes.
    """
    windows = (len(tokens) - 1) // context
    chosen = np.unique(np.linspace(0, windows - 1, min(count, windows)).astype(np.int64)) * context
    for start in range(first * batch_size, len(chosen), every * batch_size):
        yield sequences(tokens, [int(row) for row in chosen[start : start + batch_size]], context)


def sequences(tokens: Tokens, starts: list[int], context: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Inputs of ``context`` tokens, and the token that follows each of them."""
    rows = torch.from_numpy(np.stack([tokens[start : start + context + 1] for start in starts]).astype(np.int64))
    return rows[:, :-1].contiguous(), rows[:, 1:].contiguous()
