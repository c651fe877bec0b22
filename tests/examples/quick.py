"""The main example without its pictures, which take a second; for processes of torchrun as well."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "examples"))

import gpt2_fineweb  # noqa: E402

from gapt_optim import runs, viewing  # noqa: E402


def conclude(folder: runs.RunFolder, methods: Any, facts: Any) -> None:
    """The numbers of a run, without its pictures and its page."""
    found = {method: viewing.figures(viewing.read_run(folder.path / method)) for method in methods}
    folder.write_json("results.json", {"runs": found, **facts})


def main() -> None:
    """One run after another in the same ranks. Each argument holds the flags of one, separated by line feeds."""
    viewing.conclude = conclude
    for flags in sys.argv[1:]:
        sys.argv = [sys.argv[0], *flags.split("\n")]
        gpt2_fineweb.main()


if __name__ == "__main__":
    runs.run_script(main)
