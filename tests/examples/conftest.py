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
import torch

ROOT = Path(__file__).resolve().parents[2]
shards_on_a_cpu = pytest.mark.skipif(
    torch.__version__.startswith("2.6."), reason="fully_shard of torch 2.6 does not run on a CPU"
)
sys.path.insert(0, str(ROOT / "examples"))


def make_documents(count: int = 30, words: int = 60, seed: int = 0) -> list[str]:
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
    """Flags of a run that takes a second. The impatient gate switches within it."""
    return (
        f"--data {text_file} --size 2 16 2 300 --context 16 --batch-size 2 --steps 12 --eval-every 4 "
        "--eval-sequences 4 --save-every 5 --lr 1e-3 --warmup 2 --quiet --threads 1 "
        "--gapt.gate.patience-memorization 2 --gapt.gate.patience-compression 2 --gapt.gate.min-improvement 0.1"
    ).split()


Interrupting = Callable[..., AbstractContextManager[None]]


@pytest.fixture
def interrupting() -> Interrupting:
    """``with interrupting(index):`` Ctrl-C, or another signal, comes as that batch is drawn."""
    import gpt2_fineweb

    @contextmanager
    def at(wanted: int, number: int = signal.SIGINT) -> Iterator[None]:
        draw = gpt2_fineweb.batch

        def interrupted(*args: Any) -> Any:
            if args[-1] == wanted:
                signal.raise_signal(number)
            return draw(*args)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(gpt2_fineweb, "batch", interrupted)
            yield

    return at
