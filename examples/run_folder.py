"""The folder a run writes to: claimed before anything is computed, and never overwritten by accident."""

from __future__ import annotations

import json
import math
import os
import platform
import shutil
from importlib.metadata import version
from pathlib import Path
from typing import Any

from errors import UserError

SETTINGS = "settings.json"
RESULTS = "results.json"
# Everything a run leaves besides pictures; --overwrite removes these and nothing else.
OUTPUTS = (RESULTS, "table.md", "metrics.jsonl", "validation.jsonl", "checkpoint.pt", SETTINGS)


def claim(folder: Path, *, resume: bool, overwrite: bool) -> dict[str, Any]:
    """Makes sure that ``folder`` can be written and is free; returns the settings to resume with."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / ".writable"
        probe.write_text("")
        probe.unlink()
    except OSError as error:
        raise UserError(f"--out {folder}: cannot write there ({error.strerror}); choose another folder") from error
    finished, begun = (folder / RESULTS).exists(), any((folder / name).exists() for name in OUTPUTS)
    if resume and overwrite:
        raise UserError("--resume and --overwrite contradict each other: give one of them")
    if resume:
        if not (folder / SETTINGS).exists():
            raise UserError(f"--resume: there is no run in {folder}; drop --resume or give the --out of a run")
        settings: dict[str, Any] = json.loads((folder / SETTINGS).read_text())
        return settings
    if begun and not overwrite:
        what = "a finished run" if finished else "an unfinished run"
        raise UserError(f"--out {folder}: holds {what}; give --resume, --overwrite or another --out")
    return {}


def clear(folder: Path, methods: tuple[str, ...]) -> None:
    """Removes an earlier run from ``folder``, and its sub-folders of compared runs."""
    for place in (folder, *(folder / method for method in methods)):
        for name in OUTPUTS:
            (place / name).unlink(missing_ok=True)
    for picture in folder.glob("*.png"):
        picture.unlink()
    for method in methods:
        if (folder / method).is_dir() and not any((folder / method).iterdir()):
            shutil.rmtree(folder / method)


def write_json(path: Path, value: Any) -> None:
    """Writes a file that is whole whenever it exists."""
    partial = path.with_suffix(".tmp")
    partial.write_text(json.dumps(_plain(value), indent=2) + "\n")
    os.replace(partial, path)


def versions() -> dict[str, str]:
    """What the numbers were made with."""
    found = {"python": platform.python_version()}
    for name in ("torch", "transformers", "gapt_optim"):
        try:
            found[name] = version(name)
        except ModuleNotFoundError:  # gapt_optim run from a checkout that is not installed
            found[name] = "not installed"
    return found


def _plain(value: Any) -> Any:
    """JSON has no infinity; a configuration may."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value
