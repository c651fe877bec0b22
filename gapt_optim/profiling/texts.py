"""Batches of a text: a file, a data set of the hub, or the words themselves."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .batches import padded
from .loading import is_python, load_python, one_line

TEXT_SUFFIXES = (".txt", ".jsonl", ".parquet")


def load_batches(
    spec: str, tokenizer: Any, *, model: nn.Module, length: int | None, batch_size: int, tokens: int
) -> Iterable[Any]:
    """Batches from ``package.module:name``, or token batches of a file, a prompt with spaces, a data set.

    Raises:
        ValueError: they cannot be made; a text that is too short only when it was read.
    """
    if is_python(spec):
        batches = load_python(spec, "the data")
        if not isinstance(batches, Iterable):
            raise ValueError(f"the data {spec!r} gives {type(batches).__name__}, which has no batches to go through")
        return batches
    if tokenizer is None:
        raise ValueError(
            "a text needs the tokenizer of a transformers folder; give the batches of a model of your own as "
            "--data package.module:name"
        )
    config = getattr(model, "config", None)
    longest = getattr(config, "max_position_embeddings", None) or 512
    if length is not None and length > longest:
        raise ValueError(f"--length {length} is longer than the model takes, {longest} tokens")
    if length is not None and length < 2:
        raise ValueError("--length must be at least 2 tokens")
    if batch_size < 1:
        raise ValueError("--batch-size must be at least 1")
    check_text(spec)
    return TextBatches(spec, tokenizer, length or min(512, longest), batch_size, tokens)


def is_prompt(spec: str) -> bool:
    """Words to read as they are: they have a space, and are no file."""
    return " " in spec.strip() and not Path(spec).is_file()


def check_text(spec: str) -> None:
    """Raises ValueError where ``spec`` looks like a file that is not there, or like none that can be read."""
    path = Path(spec)
    if is_prompt(spec):
        return
    if path.suffix in TEXT_SUFFIXES:
        if not path.is_file():
            raise ValueError(f"there is no file {spec!r}")
    elif path.is_file():
        raise ValueError(f"the data {spec!r} is no {', '.join(TEXT_SUFFIXES)} file, nor package.module:name of batches")


class TextBatches:
    """Batches ``{"input_ids", "attention_mask"}`` of a text's documents, read as they are needed.

    A ``.txt`` file and a prompt are one document, each line of a ``.jsonl``, each row of a ``.parquet`` file and of a
    data set one, in its field ``text``. Documents are cut into sequences of ``length`` tokens, each with the special
    tokens that the tokenizer puts around a text, and padded on the right. Reading stops at about ``tokens`` tokens.
    """

    def __init__(self, spec: str, tokenizer: Any, length: int, batch_size: int, tokens: int) -> None:
        self.spec, self.tokenizer = spec, tokenizer
        self.length, self.batch_size, self.tokens = length, batch_size, tokens
        special = tokenizer("")["input_ids"]
        ends = {tokenizer.eos_token_id, tokenizer.sep_token_id} - {tokenizer.bos_token_id, tokenizer.cls_token_id}
        self.suffix = [token for token in special[-1:] if token in ends]
        self.prefix = special[: len(special) - len(self.suffix)]

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        read = 0
        batch: list[list[int]] = []
        for sequence in self._sequences():
            batch.append(sequence)
            read += len(sequence)
            if len(batch) == self.batch_size:
                yield padded(batch, self.tokenizer.pad_token_id)
                batch = []
            if read >= self.tokens:
                break
        if batch:
            yield padded(batch, self.tokenizer.pad_token_id)
        if read == 0:
            raise ValueError(f"{self.spec} is too short: it has no sequence of 2 tokens")

    def _sequences(self) -> Iterator[list[int]]:
        room = self.length - len(self.prefix) - len(self.suffix)
        if room < 1:
            raise ValueError(f"--length {self.length} has no room beside the tokenizer's special tokens")
        for pieces in documents(self.spec):
            buffer: list[int] = []
            for piece in pieces:
                buffer += self.tokenizer(piece, add_special_tokens=False, verbose=False)["input_ids"]
                while len(buffer) >= room:
                    yield [*self.prefix, *buffer[:room], *self.suffix]
                    buffer = buffer[room:]
            if len(buffer) >= 2:
                yield [*self.prefix, *buffer, *self.suffix]


def documents(spec: str) -> Iterator[Iterator[str]]:
    """The documents of a text, each in pieces.

    Raises:
        ValueError: it cannot be read.
    """
    path = Path(spec)
    if is_prompt(spec):
        yield iter([spec])
    elif path.suffix == ".txt":
        yield _pieces(path)
    elif path.suffix == ".jsonl":
        with path.open(encoding="utf-8", errors="replace") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    yield iter([_text_of(line, path, number)])
    elif path.suffix == ".parquet":
        yield from _rows_of_parquet(path)
    else:
        yield from _rows_of_data_set(spec)


def _rows_of_parquet(path: Path) -> Iterator[Iterator[str]]:
    try:
        from pyarrow import ArrowInvalid, parquet
    except ImportError as error:
        raise ValueError("a .parquet file needs pyarrow: pip install pyarrow") from error
    try:
        with parquet.ParquetFile(path) as table:
            if "text" not in table.schema_arrow.names:
                raise ValueError(f'{path} has no column "text"; it has {table.schema_arrow.names}')
            for rows in table.iter_batches(256, columns=["text"]):
                yield from (iter([str(text)]) for text in rows.column(0).to_pylist() if text)
    except ArrowInvalid as error:
        raise ValueError(f"{path} is no parquet file: {one_line(error)}") from error


def _rows_of_data_set(spec: str) -> Iterator[Iterator[str]]:
    """Rows of the training split of ``name`` or ``name:configuration`` on the hub, or of a folder, streamed."""
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise ValueError(f"the data set {spec!r} needs datasets: pip install datasets") from error
    name, _, configuration = spec.partition(":")
    try:
        rows = load_dataset(name, configuration or None, split="train", streaming=True)
        for row in rows:
            if row.get("text"):
                yield iter([str(row["text"])])
    except Exception as error:
        raise ValueError(f"{spec!r} is no file, and no data set that can be read: {one_line(error)}") from error


def _pieces(path: Path) -> Iterator[str]:
    """A text in pieces of some thousand characters that end between words, where there are words."""
    rest = ""
    with path.open(encoding="utf-8", errors="replace") as file:
        while block := file.read(1 << 16):
            text = rest + block
            # A space goes with the word behind it, as byte-pair tokenizers have it.
            cut = max(text.rfind(" "), text.rfind("\n"))
            cut = cut if cut > 0 else len(text)
            yield text[:cut]
            rest = text[cut:]
    if rest:
        yield rest


def _text_of(line: str, path: Path, number: int) -> str:
    try:
        return str(json.loads(line)["text"])
    except (ValueError, KeyError, TypeError):
        raise ValueError(f'{path}, line {number}, is no JSON object with a "text"') from None
