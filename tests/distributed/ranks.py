"""Processes that form a group over gloo and run functions together."""

from __future__ import annotations

import os
import pickle
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

_IGNORED = (  # what torch itself says of its own ways
    (".*should not be instantiated", DeprecationWarning),
    ("The .grad attribute of a Tensor that is not a leaf", UserWarning),
    ("`torch.distributed.reduce_op` is deprecated", FutureWarning),
    ("DTensor random operators may not have complete support", UserWarning),  # by torch 2.6, on CPUs
)


class _AbortedError(RuntimeError):
    """A process was ended by its own abort(), not by an exception."""


class Ranks:
    """Runs a function of a module, with arguments that can be pickled, on all ranks.

    The processes are forked from one that has imported what they need, and live from call to call; a call that fails
    ends them, since a rank may be left waiting for the other.
    """

    def __init__(self, world: int = 2) -> None:
        self.world = world
        self._processes: list[Any] = []
        self._pipes: list[Connection] = []

    def __call__(self, function: Callable[..., Any], *args: Any, timeout: float = 120) -> list[Any]:
        """Results by rank. Raises RuntimeError with the traceback of the first rank that failed.

        Where FSDP2 was used, gloo aborts a process now and then, also without us: it is run once more.
        """
        try:
            return self._run(function, args, timeout)
        except _AbortedError:
            return self._run(function, args, timeout)

    def _run(self, function: Callable[..., Any], args: tuple[Any, ...], timeout: float) -> list[Any]:
        if not self._processes:
            self._start()
        for pipe in self._pipes:
            pipe.send_bytes(pickle.dumps((function, args)))
        deadline, results, failures = time.monotonic() + timeout, {}, []
        while len(results) < self.world and not failures and time.monotonic() < deadline:
            for rank, pipe in enumerate(self._pipes):
                if rank in results or not pipe.poll(0.02):
                    continue
                try:
                    done, result = pickle.loads(pipe.recv_bytes())
                except EOFError:
                    done, result = False, "the process ended"
                results[rank] = result
                if not done:
                    failures.append(f"rank {rank}:\n{result}")
        if failures or len(results) < self.world:
            processes = self._processes
            self.close()
            if "'Stream' object has no attribute 'record_event'" in "".join(failures):
                pytest.skip("fully_shard of torch 2.6 does not run on a CPU")
            waiting = [rank for rank in range(self.world) if rank not in results]
            aborted = any(process.exitcode == -signal.SIGABRT for process in processes)
            kind = _AbortedError if aborted else RuntimeError
            raise kind("\n".join(failures) or f"ranks {waiting} did not finish within {timeout} s")
        return [results[rank] for rank in range(self.world)]

    def _start(self) -> None:
        context = mp.get_context("forkserver")
        context.set_forkserver_preload(["torch.distributed.fsdp", "tests.distributed.test_over_ranks"])
        handle, store = tempfile.mkstemp()
        os.close(handle)
        for rank in range(self.world):
            here, there = context.Pipe()
            process = context.Process(target=_serve, args=(rank, self.world, store, there), daemon=True)
            process.start()
            there.close()
            self._processes.append(process)
            self._pipes.append(here)

    def close(self) -> None:
        for pipe in self._pipes:
            pipe.close()
        for process in self._processes:
            process.join(2)
            if process.is_alive():
                process.kill()
                process.join()
        self._processes, self._pipes = [], []


def _serve(rank: int, world: int, store: str, pipe: Connection) -> None:
    os.environ.update({"GLOO_SOCKET_IFNAME": "lo", "RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_RANK": "0"})
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world)
    while True:
        try:
            function, args = pickle.loads(pipe.recv_bytes())
        except (EOFError, ConnectionResetError):
            break
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                for message, category in _IGNORED:
                    warnings.filterwarnings("ignore", message, category)
                torch.manual_seed(0)
                answer = (True, function(*args))
        except Exception:
            answer = (False, traceback.format_exc())
        pipe.send_bytes(pickle.dumps(answer))
    # Not by the interpreter's own end, at which gloo aborts now and then where FSDP2 was used.
    coverage = sys.modules.get("coverage")
    measured = None if coverage is None else coverage.Coverage.current()
    if measured is not None:
        measured.stop()
        measured.save()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
