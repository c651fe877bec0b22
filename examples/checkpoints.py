"""Stopping and going on: checkpoints, records taken back, and a Ctrl-C that waits for the end of the step."""

from __future__ import annotations

import json
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from errors import UserError
from torch import nn

from gapt_optim.report import read_metrics


def save_checkpoint(
    path: Path,
    state: dict[str, Any],
    identity: dict[str, Any],
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    scheduler: torch.optim.lr_scheduler.LRScheduler,
) -> None:
    """Writes everything that training goes on from; a kill in the middle leaves the previous one whole."""
    partial = path.with_suffix(".tmp")
    torch.save(
        {
            "identity": identity,
            "state": state,
            "model": model.state_dict(),
            "optimizer": optimizer.state_dict(),
            "scheduler": scheduler.state_dict(),
            "rng": torch.get_rng_state(),
            "cuda_rng": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        },
        partial,
    )
    os.replace(partial, path)


def load_checkpoint(
    path: Path,
    identity: dict[str, Any],
    device: torch.device,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    scheduler: torch.optim.lr_scheduler.LRScheduler,
) -> dict[str, Any]:
    """Puts a checkpoint back and returns the run's state; refuses one of another model, naming the difference."""
    try:
        saved = torch.load(path, map_location=device, weights_only=True)
        found = saved["identity"]
    except Exception as error:  # torch.load raises many kinds for a file that is not its own
        raise UserError(f"--resume: {path} is not a checkpoint of this script; delete it or pick another --out") from (
            error
        )
    for name, wanted in identity.items():
        if found.get(name) != wanted:
            raise UserError(
                f"--resume: {path} is of another model ({name} {found.get(name)}, this run has {wanted}); "
                "give the flags it was started with, or another --out"
            )
    try:
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
    except (RuntimeError, ValueError, KeyError) as error:
        raise UserError(f"--resume: {path} does not fit this run ({str(error).splitlines()[0]})") from error
    scheduler.load_state_dict(saved["scheduler"])
    torch.set_rng_state(saved["rng"].cpu())
    if saved["cuda_rng"] and torch.cuda.is_available():
        torch.cuda.set_rng_state_all([rng.cpu() for rng in saved["cuda_rng"]])
    state: dict[str, Any] = saved["state"]
    return state


def forget_after(path: Path, step: int) -> None:
    """Drops the records of steps after ``step``, which are about to be taken again."""
    if not path.exists():
        return
    kept = [record for record in read_metrics(path) if record["step"] <= step]
    partial = path.with_suffix(".tmp")
    partial.write_text("".join(json.dumps(record) + "\n" for record in kept))
    os.replace(partial, path)


@contextmanager
def stop_after_step() -> Iterator[threading.Event]:
    """Turns the first Ctrl-C into a flag, so that it never tears a step in two; the second one is immediate."""
    stop = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return

    def on_signal(number: int, frame: Any) -> None:
        stop.set()
        signal.signal(signal.SIGINT, previous)

    previous = signal.signal(signal.SIGINT, on_signal)
    try:
        yield stop
    finally:
        signal.signal(signal.SIGINT, previous)
