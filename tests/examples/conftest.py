from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = ROOT / "examples"
shards_on_a_cpu = pytest.mark.skipif(
    torch.__version__.startswith("2.6."), reason="fully_shard of torch 2.6 does not run on a CPU"
)
sys.path.insert(0, str(EXAMPLES))

Run = Callable[..., None]


def make_documents(count: int = 30, words: int = 60, seed: int = 0) -> list[str]:
    """Sentences of made-up words, each document different."""
    random_ = random.Random(seed)
    lexicon = ["".join(random_.choices("abcdefghijklmnop", k=random_.randint(2, 8))) for _ in range(300)]
    return [f"{number}. " + " ".join(random_.choices(lexicon, k=words)) + "." for number in range(count)]


def read_lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def environment() -> dict[str, str]:
    """Of a script in a process of its own."""
    return {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


def script(name: str, *argv: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    """What a script prints, and how it ends."""
    command = [sys.executable, str(EXAMPLES / name), *argv]
    return subprocess.run(command, cwd=cwd, env=environment(), capture_output=True, text=True)


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
    """Flags of a run of the main script that takes a second. The impatient gate switches within it."""
    return (
        f"--data {text_file} --layers 2 --width 16 --heads 2 --vocabulary 300 --context 16 --batch-size 2 --steps 12 "
        "--eval-every 4 --eval-sequences 4 --save-every 5 --lr 1e-4 --warmup 2 "
        "--patience-memorization 2 --patience-compression 2"
    ).split()


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> Iterator[Run]:
    """``run(module, argv)`` runs a script in this process, without its picture and page, which take seconds."""
    import comparison

    monkeypatch.setattr(comparison, "draw_runs", lambda *args, **options: None)
    monkeypatch.setattr(comparison, "write_report", lambda *args, **options: None)
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def start(module: ModuleType, argv: list[str]) -> None:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "argv", [module.__name__, *argv])
            module.main()

    yield start
    for number, handler in before.items():
        signal.signal(number, handler)
