"""A model and batches for it from what stands on the command line."""

from __future__ import annotations

import importlib
import json
import os
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

TEXT_SUFFIXES = (".txt", ".jsonl", ".parquet")
TOKENIZER_FILES = ("tokenizer*", "vocab*", "merges*", "*.model", "*.spm", "*.tiktoken")


def load_python(spec: str, what: str) -> Any:
    """What ``package.module:name`` names, called where it is a function.

    Raises:
        ValueError: it cannot be imported, or calling it raises.
    """
    module_name, _, attribute = spec.partition(":")
    here = os.getcwd()
    if here not in sys.path:
        sys.path.insert(0, here)
    try:
        value = importlib.import_module(module_name)
        for part in attribute.split("."):
            value = getattr(value, part)
    except Exception as error:
        raise ValueError(f"{what} {spec!r} cannot be imported: {_one_line(error)}") from error
    if isinstance(value, nn.Module) or not callable(value):
        return value
    try:
        return value()
    except Exception as error:
        raise ValueError(f"{what} {spec!r} cannot be built, {attribute}() raised {_one_line(error)}") from error


def is_python(spec: str) -> bool:
    """``package.module:name``, and no path."""
    module_name, colon, attribute = spec.partition(":")
    parts = [*module_name.split("."), *attribute.split(".")]
    return bool(colon) and all(part.isidentifier() for part in parts)


def load_model(spec: str) -> nn.Module:
    """A model from a ``transformers`` folder or hub name, without its head, or from ``package.module:name``.

    Raises:
        ValueError: there is none.
    """
    if is_python(spec):
        model = load_python(spec, "the model")
        if not isinstance(model, nn.Module):
            raise ValueError(f"the model {spec!r} gives {type(model).__name__}, not a torch.nn.Module")
        return model
    _check_folder(spec)
    try:
        from transformers import AutoModel
        from transformers.utils import logging
    except ImportError as error:
        raise ValueError("a model's folder needs transformers: pip install transformers") from error
    logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        # The layers are all that is looked at; a head would only cost time and memory.
        model = AutoModel.from_pretrained(spec, dtype="auto")
    except Exception as error:
        raise ValueError(f"the model {spec!r} cannot be loaded: {_one_line(error)}") from error
    assert isinstance(model, nn.Module)
    return model


def load_batches(
    spec: str, model_spec: str, *, model: nn.Module, length: int | None, batch_size: int, tokens: int
) -> Iterable[Any]:
    """Batches from ``package.module:name``, or token batches of a text file by the model's tokenizer.

    Raises:
        ValueError: they cannot be made; a text that is too short only when it was read.
    """
    if is_python(spec):
        batches = load_python(spec, "the data")
        if not isinstance(batches, Iterable):
            raise ValueError(f"the data {spec!r} gives {type(batches).__name__}, which has no batches to go through")
        return batches
    path = Path(spec)
    if path.suffix not in TEXT_SUFFIXES:
        raise ValueError(f"the data {spec!r} is no {', '.join(TEXT_SUFFIXES)} file, nor package.module:name of batches")
    if not path.is_file():
        raise ValueError(f"there is no file {spec!r}")
    if is_python(model_spec):
        raise ValueError(
            "a text needs the tokenizer of a transformers folder; give the batches of a model of your own as "
            "--data package.module:name"
        )
    folder = Path(model_spec)
    # Without them transformers makes an empty tokenizer, to which all text is nothing or unknown.
    if folder.is_dir() and not any(next(folder.glob(pattern), None) for pattern in TOKENIZER_FILES):
        raise ValueError(
            f"the folder {model_spec!r} has no tokenizer (tokenizer.json or the like), which a text needs; write it "
            "with tokenizer.save_pretrained(folder), or give batches of tokens as --data package.module:name"
        )
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(model_spec)
    except Exception as error:
        raise ValueError(f"the tokenizer of {model_spec!r} cannot be loaded: {_one_line(error)}") from error
    config = getattr(model, "config", None)
    longest = getattr(config, "max_position_embeddings", None) or 512
    if length is not None and length > longest:
        raise ValueError(f"--length {length} is longer than the model takes, {longest} tokens")
    if length is not None and length < 2:
        raise ValueError("--length must be at least 2 tokens")
    return TextBatches(path, tokenizer, length or min(512, longest), batch_size, tokens)


class TextBatches:
    """Batches ``{"input_ids", "attention_mask"}`` of a text's documents, read as they are needed.

    A ``.txt`` file is one document, each line of a ``.jsonl`` and each row of a ``.parquet`` file one, in its field
    ``text``. Documents are cut into sequences of ``length`` tokens, each with the special tokens that the tokenizer
    puts around a text, and padded on the right. Reading stops at about ``tokens`` tokens.
    """

    def __init__(self, path: Path, tokenizer: Any, length: int, batch_size: int, tokens: int) -> None:
        self.path, self.tokenizer = path, tokenizer
        self.length, self.batch_size, self.tokens = length, batch_size, tokens
        special = tokenizer("")["input_ids"]
        ends = {tokenizer.eos_token_id, tokenizer.sep_token_id} - {tokenizer.bos_token_id, tokenizer.cls_token_id}
        self.suffix = [token for token in special[-1:] if token in ends]
        self.prefix = special[: len(special) - len(self.suffix)]
        self.read = 0

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        self.read = 0
        batch: list[list[int]] = []
        for sequence in self._sequences():
            batch.append(sequence)
            self.read += len(sequence)
            if len(batch) == self.batch_size:
                yield self._padded(batch)
                batch = []
            if self.read >= self.tokens:
                break
        if batch:
            yield self._padded(batch)
        if self.read == 0:
            raise ValueError(f"{self.path} is too short: it has no sequence of 2 tokens")

    def _sequences(self) -> Iterator[list[int]]:
        room = self.length - len(self.prefix) - len(self.suffix)
        if room < 1:
            raise ValueError(f"--length {self.length} has no room beside the tokenizer's special tokens")
        for pieces in self._documents():
            buffer: list[int] = []
            for piece in pieces:
                buffer += self.tokenizer(piece, add_special_tokens=False, verbose=False)["input_ids"]
                while len(buffer) >= room:
                    yield [*self.prefix, *buffer[:room], *self.suffix]
                    buffer = buffer[room:]
            if len(buffer) >= 2:
                yield [*self.prefix, *buffer, *self.suffix]

    def _documents(self) -> Iterator[Iterator[str]]:
        if self.path.suffix == ".txt":
            yield _pieces(self.path)
        elif self.path.suffix == ".jsonl":
            with self.path.open(encoding="utf-8", errors="replace") as file:
                for number, line in enumerate(file, 1):
                    if line.strip():
                        yield iter([_text_of(line, self.path, number)])
        else:
            try:
                from pyarrow import ArrowInvalid, parquet
            except ImportError as error:
                raise ValueError("a .parquet file needs pyarrow: pip install pyarrow") from error
            try:
                with parquet.ParquetFile(self.path) as table:
                    if "text" not in table.schema_arrow.names:
                        raise ValueError(f'{self.path} has no column "text"; it has {table.schema_arrow.names}')
                    for rows in table.iter_batches(256, columns=["text"]):
                        yield from (iter([str(text)]) for text in rows.column(0).to_pylist() if text)
            except ArrowInvalid as error:
                raise ValueError(f"{self.path} is no parquet file: {_one_line(error)}") from error

    def _padded(self, batch: list[list[int]]) -> dict[str, torch.Tensor]:
        length = max(map(len, batch))
        pad = self.tokenizer.pad_token_id
        pad = pad if pad is not None else 0  # masked: which token stands there does not matter
        ids = [sequence + [pad] * (length - len(sequence)) for sequence in batch]
        mask = [[1] * len(sequence) + [0] * (length - len(sequence)) for sequence in batch]
        return {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(mask)}


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


def _check_folder(spec: str) -> None:
    path = Path(spec)
    looks_like_path = path.is_absolute() or spec.startswith((".", "~")) or spec.count("/") > 1
    if path.is_dir() and not (path / "config.json").is_file():
        raise ValueError(f"the folder {spec!r} has no config.json: is it what model.save_pretrained wrote?")
    if path.is_file():
        raise ValueError(f"{spec!r} is a file; give the folder of a transformers model, or package.module:name")
    if looks_like_path and not path.exists():
        raise ValueError(f"there is no folder {spec!r}")


def _one_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
    return text if len(text) <= 300 else text[:297] + "..."


def dtype_named(name: str) -> torch.dtype | None:
    """The torch type of a flag's value; None for "auto"."""
    return None if name == "auto" else getattr(torch, name)


def checked_device(name: str | None) -> torch.device | None:
    """The device of a flag. Raises ValueError where it is none, or not there."""
    if name is None:
        return None
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except Exception as error:
        raise ValueError(f"--device {name} cannot be used: {_one_line(error)}") from error
    return device
