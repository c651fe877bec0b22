"""Ranks that are threads of this process, so that coverage, a debugger and mutation testing see what they run.

For what ranks do with each other's numbers. What a backend itself does shows on the processes of :mod:`.ranks` alone.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import torch.distributed as dist
from torch._C._distributed_c10d import _set_thread_isolation_mode
from torch.testing._internal.distributed.multi_threaded_pg import (
    ProcessLocalGroup,
    _install_threaded_pg,
    _uninstall_threaded_pg,
)


def on_threads(function: Callable[..., Any], *args: Any, world: int = 2, timeout: float = 30) -> list[Any]:
    """Results by rank of ``function``, which all ranks call at once in a group of theirs.

    Raises:
        RuntimeError: a rank raised, with what the first one did; or ranks wait for one that does not come.
    """
    store, results = dist.HashStore(), [None] * world
    errors: list[Exception] = []

    def serve(rank: int) -> None:
        try:
            dist.init_process_group("threaded", rank=rank, world_size=world, store=store)
            results[rank] = function(*args)
            dist.destroy_process_group()
        except Exception as error:
            errors.append(error)
            ProcessLocalGroup.exception_handle(error)  # releases the others

    _install_threaded_pg()
    _set_thread_isolation_mode(True)
    try:
        threads = [threading.Thread(target=serve, args=(rank,), daemon=True) for rank in range(world)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(timeout)
        waiting = [rank for rank, thread in enumerate(threads) if thread.is_alive()]
        if waiting:
            ProcessLocalGroup.exception_handle(None)
    finally:
        _set_thread_isolation_mode(False)
        ProcessLocalGroup.reset()
        _uninstall_threaded_pg()
    if errors:
        raise RuntimeError("a rank raised") from errors[0]
    if waiting:
        raise RuntimeError(f"ranks {waiting} did not finish within {timeout} s")
    return results
