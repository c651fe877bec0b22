"""A rank's training as an object, so that what many engines do can be stopped, counted and gone on with alike."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple
from unittest import mock

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)

from gapt_optim import GAPTOptimizer
from tests.distributed.runs import Seen


class Loop:
    """A model or a part of one, its optimizer, and a step."""

    model: nn.Module
    optimizer: GAPTOptimizer

    def step(self, step: int) -> Seen:
        raise NotImplementedError

    flat = False
    """Checkpoints have the optimizer's state as one flat mapping, as stages of a pipeline need it."""

    def state(self) -> dict[str, Any]:
        options = StateDictOptions(flatten_optimizer_state_dict=self.flat)
        return {
            "model": get_model_state_dict(self.model),
            "optimizer": get_optimizer_state_dict(self.model, self.optimizer, options=options),
        }

    def save(self, folder: str) -> None:
        dcp.save(self.state(), checkpoint_id=folder)

    def load(self, folder: str) -> None:
        with torch.no_grad():
            for p in self.model.parameters():
                p.zero_()
        state = self.state()
        dcp.load(state, checkpoint_id=folder)
        set_model_state_dict(self.model, state["model"])
        options = StateDictOptions(flatten_optimizer_state_dict=self.flat)
        set_optimizer_state_dict(self.model, self.optimizer, state["optimizer"], options=options)


class Run(NamedTuple):
    """Of one rank."""

    seen: list[Seen]
    resumed: list[Seen]
    """From the checkpoint on, by objects that are made anew."""
    sent: list[list[tuple[int, int]]]
    """By step, numbers and bytes of each collective of ours."""


def run_and_resume(make: Callable[[], Loop], folder: str, steps: int, half: int) -> Run:
    warnings.filterwarnings("ignore", ".* is put together from the parts", UserWarning)
    loop, seen, sent = make(), [], []
    for step in range(steps):
        if step == half:
            loop.save(folder)
        with sent_by_us() as own:
            seen.append(loop.step(step))
        sent.append(own)
    return Run(seen, resume(make, folder, steps, half), sent)


def resume(make: Callable[[], Loop], folder: str, steps: int, half: int) -> list[Seen]:
    loop = make()
    loop.load(folder)
    return [loop.step(step) for step in range(half, steps)]


@contextmanager
def sent_by_us() -> Iterator[list[tuple[int, int]]]:
    """Numbers and bytes that a rank gives to each collective that this package calls."""
    sizes: list[tuple[int, int]] = []

    def counting(real: Callable[..., Any], place: int) -> Callable[..., Any]:
        def call(*args: Any, **options: Any) -> Any:
            if sys._getframe(1).f_globals["__name__"].startswith("gapt_optim"):
                sizes.append((args[place].numel(), args[place].nbytes))
            return real(*args, **options)

        return call

    with (
        mock.patch.object(dist, "all_reduce", counting(dist.all_reduce, 0)),
        mock.patch.object(dist, "all_gather", counting(dist.all_gather, 1)),
    ):
        yield sizes
