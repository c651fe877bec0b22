"""Every code block of the README and of the documentation runs, page by page, in the order in which it is read."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from gapt_optim.cli import main

from .pages import ROOT, after, blocks, pages

README_BEGINS_WITH = """
import torch
from transformers import GPT2Config, GPT2LMHeadModel

model = GPT2LMHeadModel(GPT2Config(vocab_size=64, n_positions=16, n_embd=32, n_layer=2, n_head=2))
rows = torch.randint(0, 64, (2, 4, 16))
loader = [{"input_ids": row, "labels": row} for row in rows]
"""
"""What its diff takes for granted: a model of transformers and a loader."""


@pytest.fixture(autouse=True)
def _no_process_group_stays() -> Iterator[None]:
    yield
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()


@pytest.mark.parametrize("page", pages(), ids=lambda page: str(page.relative_to(ROOT)))
def test_code_of_the_page_runs(
    page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])  # the command puts the current folder there
    names: dict[str, Any] = {"__name__": "page"}
    if page.name == "README.md":
        exec(README_BEGINS_WITH, names)
    for block in blocks(page):
        if block.language == "bash":
            for command in commands_of_ours(block.code):
                code = main(command)
                printed = capsys.readouterr()
                assert code == 0, f"{page}:{block.line}: {shlex.join(command)}\n{printed.out}{printed.err}"
                assert printed.out
            continue
        code = after(block.code) if block.language == "diff" else block.code
        # Blank lines in front, so that a traceback names the line of the page.
        exec(compile("\n" * (block.line - 1) + code, str(page), "exec"), names)


def commands_of_ours(script: str) -> list[list[str]]:
    """Flags of what a shell block runs of the library's command; what it imports takes seconds in a new process."""
    lines = [shlex.split(line, comments=True) for line in script.replace("\\\n", " ").splitlines()]
    return [line[1:] for line in lines if line and line[0] == "gapt-optim"]


def test_pages_have_code_to_run() -> None:
    assert len(pages()) > 8
