"""Stopping and going on: checkpoints, records taken back, and a Ctrl-C that waits for the end of the step."""

from __future__ import annotations

import json
import os
import signal
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from errors import UserError, first_line
from parallel import Ranks
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from gapt_optim.viewing import read_metrics

# Whole tensors under the names of the plain model, however it is spread: what one run saves, any other can load.
WHOLE = StateDictOptions(full_state_dict=True, cpu_offload=True)


def save_checkpoint(
    path: Path,
    state: dict[str, Any],
    identity: dict[str, Any],
    model: nn.Module,
    optimizers: Sequence[Optimizer],
    schedulers: Sequence[LRScheduler],
    ranks: Ranks,
) -> None:
    """Writes everything that training goes on from; a kill in the middle leaves the previous one whole.

    All ranks have to call it, since each may hold a part.
    """
    weights = get_model_state_dict(model, options=WHOLE)
    moments = get_optimizer_state_dict(model, optimizers, options=WHOLE)
    if not ranks.first:
        return
    partial = path.with_suffix(".tmp")
    torch.save(
        {
            "identity": identity,
            "state": state,
            "model": weights,
            "optimizer": moments,
            "schedulers": [scheduler.state_dict() for scheduler in schedulers],
        },
        partial,
    )
    os.replace(partial, path)


def load_checkpoint(
    path: Path,
    identity: dict[str, Any],
    model: nn.Module,
    optimizers: Sequence[Optimizer],
    schedulers: Sequence[LRScheduler],
    ranks: Ranks,
) -> dict[str, Any]:
    """Puts a checkpoint back and returns the run's state; refuses one of another model, naming the difference."""
    saved = ranks.together(lambda: read_checkpoint(path, identity))
    try:
        set_model_state_dict(model, saved["model"], options=WHOLE)
        set_optimizer_state_dict(model, optimizers, saved["optimizer"], options=WHOLE)
        for scheduler, values in zip(schedulers, saved["schedulers"], strict=True):
            scheduler.load_state_dict(values)
    except (torch.OutOfMemoryError, dist.DistError):
        raise
    except (RuntimeError, ValueError, KeyError) as error:
        raise UserError(f"--resume: {path} does not fit this run ({first_line(error)})") from error
    state: dict[str, Any] = saved["state"]
    return state


def read_checkpoint(path: Path, identity: dict[str, Any]) -> dict[str, Any]:
    """What `save_checkpoint` wrote, on the CPU."""
    try:
        saved: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
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
    return saved


def forget_after(path: Path, step: int) -> None:
    """Drops the records of steps after ``step``, which are about to be taken again."""
    if not path.exists():
        return
    kept = [record for record in read_metrics(path) if record["step"] <= step]
    partial = path.with_suffix(".tmp")
    partial.write_text("".join(json.dumps(record) + "\n" for record in kept))
    os.replace(partial, path)


@contextmanager
def stop_after_step(ranks: Ranks) -> Iterator[threading.Event]:
    """Turns the first Ctrl-C, or the SIGTERM of a cluster, into a flag, so that it never tears a step in two.

    The second one is immediate. Under torchrun it is not: torchrun passes a Ctrl-C on that the terminal has sent
    already, and itself ends what takes longer than 30 seconds.
    """
    stop = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return

    def on_signal(number: int, frame: Any) -> None:
        stop.set()
        if ranks.control is None:
            restore()

    def restore() -> None:
        for number, handler in previous.items():
            signal.signal(number, handler)

    previous = {number: signal.signal(number, on_signal) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        restore()
