"""How long a program waits for us before its first line: the import, and `--help` of each command.

    python -m benchmarks.cost.start

CPU time of processes of one thread, so that what else the machine does counts little. All are started in turn; the
first round fills the file cache.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import tyro

from .figures import write_figures

ROOT = Path(__file__).resolve().parents[2]
TORCH, OURS = "import torch", "import torch; from gapt_optim import GAPTOptimizer, RepresentationHook"
CONFIGURED = f"{OURS}, GAPTConfig; GAPTConfig()"
COMMANDS = ("profile", "compare", "report", "watch", "doctor")


@dataclass
class Options:
    """CPU seconds of an import of gapt_optim and of each `--help`."""

    rounds: int = 5
    """Processes of each."""
    json: Path | None = None
    """Write the figures to this file."""


def programs() -> dict[str, list[str]]:
    """Arguments of Python, by what they show."""
    found = {
        TORCH: ["-c", TORCH],
        OURS: ["-c", OURS],
        CONFIGURED: ["-c", CONFIGURED],
        "gapt-optim --help": _command("--help"),
    }
    return found | {f"gapt-optim {name} --help": _command(name, "--help") for name in COMMANDS}


def _command(*words: str) -> list[str]:
    return ["-c", "import sys; from gapt_optim.cli import main; sys.exit(main())", *words]


def cpu_seconds(arguments: list[str]) -> float:
    """Of one process, to its end.

    Raises:
        RuntimeError: it failed.
    """
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    child = subprocess.Popen(
        [sys.executable, *arguments], cwd=ROOT, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    )
    assert child.stderr is not None
    said = child.stderr.read()
    _, status, usage = os.wait4(child.pid, 0)
    child.returncode = os.waitstatus_to_exitcode(status)
    child.stderr.close()
    if child.returncode:
        raise RuntimeError(f"{' '.join(arguments)} failed: {said.decode().strip()}")
    return usage.ru_utime + usage.ru_stime


def main(options: Options) -> None:
    """Start each in turn, and print medians."""
    todo = programs()
    seconds: dict[str, list[float]] = {name: [] for name in todo}
    for i in range(options.rounds + 1):
        for name, arguments in todo.items():
            taken = cpu_seconds(arguments)
            if i:
                seconds[name].append(taken)
    medians = {name: round(statistics.median(of), 3) for name, of in seconds.items()}
    adds, configured = (
        round(statistics.median(more - less for more, less in zip(seconds[a], seconds[b], strict=True)), 3)
        for a, b in ((OURS, TORCH), (CONFIGURED, OURS))
    )
    print(f"import gapt_optim adds {adds:.3f} s to import torch, {medians[TORCH]:.2f} s")
    print(f"the first configuration, which imports pydantic, adds {configured:.3f} s")
    for name, median in medians.items():
        if name.endswith("--help"):
            print(f"{median:6.2f} s  {name}")
    write_figures({"import adds": adds, "configuration adds": configured, **medians}, options.json)


if __name__ == "__main__":
    main(tyro.cli(Options))
