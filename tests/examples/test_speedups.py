"""What makes steps faster and changes no number."""

from __future__ import annotations

import platform
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"
COUNT_FAULTS = """
import resource
import torch
from speedups import keep_freed_memory

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(10):
        torch.ones(1 << 23)  # 32 MiB, as much as the logits of a small preset
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

before = faults()
keep_freed_memory()
faults()
print(before, faults())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc has the setting")
def test_freed_memory_is_kept_for_the_next_step() -> None:
    """The setting is of the whole process, so another one counts the pages that are handed out anew."""
    printed = subprocess.run(
        [sys.executable, "-c", COUNT_FAULTS], cwd=EXAMPLES, check=True, capture_output=True, text=True
    ).stdout
    before, after = map(int, printed.split())
    assert before > 200  # of a large page each, where the system has those
    assert after < before / 20
