from __future__ import annotations

import json
import random
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "examples"))


def make_documents(count: int = 30, words: int = 120, seed: int = 0) -> list[str]:
    """Sentences of made-up words, each document different."""
    random_ = random.Random(seed)
    lexicon = ["".join(random_.choices("abcdefghijklmnop", k=random_.randint(2, 8))) for _ in range(300)]
    return [f"{number}. " + " ".join(random_.choices(lexicon, k=words)) + "." for number in range(count)]


@pytest.fixture
def documents() -> list[str]:
    return make_documents()


@pytest.fixture
def text_file(tmp_path: Path) -> Path:
    """A corpus of 30 short documents, one a line."""
    path = tmp_path / "corpus.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in make_documents()))
    return path


@pytest.fixture
def tiny(text_file: Path) -> list[str]:
    """Arguments of a run that takes a second. The impatient gate switches within it."""
    return (
        f"--data {text_file} --preset nano --context 16 --batch-size 2 --steps 12 --eval-every 4 --eval-sequences 4 "
        "--checkpoint-every 5 --lr 1e-3 --quiet --patience-memorization 2 --patience-compression 2 "
        "--min-improvement 0.1"
    ).split()


Interrupting = Callable[[int], AbstractContextManager[None]]


@pytest.fixture
def interrupting() -> Interrupting:
    """``with interrupting(index):`` Ctrl-C comes as that batch is drawn."""
    from corpus import Batches

    @contextmanager
    def at(wanted: int) -> Iterator[None]:
        draw = Batches.__call__

        def interrupted(self: Batches, index: int) -> Any:
            if index == wanted:
                signal.raise_signal(signal.SIGINT)
            return draw(self, index)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Batches, "__call__", interrupted)
            yield

    return at
