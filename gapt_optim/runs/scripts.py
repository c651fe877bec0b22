"""What a script around a training run needs: flags from a typed configuration, errors of one line, a stop that waits
for the end of a step, a device that works.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import io
import logging
import os
import re
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import timedelta
from typing import Any, NoReturn, TypeVar

from ..config import GAPTConfig, GateConfig
from .errors import CommandError, flag_error
from .run_folder import SETTINGS, RunFolder

T = TypeVar("T")
C = TypeVar("C", bound=Any)
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # of glibc's malloc.h


class StoppedError(Exception):
    """The user stopped training. What was done is stored; the message says how to go on."""


def read_flags(kind: type[T], argv: Sequence[str], default: T | None = None, prefix: str = "") -> tuple[T, list[str]]:
    """Reads ``kind`` from ``argv`` by `tyro`; ``default`` holds what is not given. Returns it and the unknown flags.

    ``prefix`` is put before the names of flags in errors.

    >>> read_flags(GateConfig, ["--patience-memorization", "30"])[0].patience_memorization
    30

    Raises:
        CommandError: a value is impossible. `tyro` explains it in a box of many lines, of which the message is kept.
        SystemExit: after ``--help``.
    """
    import tyro

    said = io.StringIO()
    options: dict[str, Any] = {} if default is None else {"default": default}
    try:
        with contextlib.redirect_stderr(said):
            read: tuple[T, list[str]] = tyro.cli(
                kind, args=argv, config=(tyro.conf.FlagCreatePairsOff,), return_unknown_args=True, **options
            )
    except SystemExit as end:
        if not end.code:
            raise
        line = re.sub(r"(?<![\w-])--(?=[a-z])", f"--{prefix}", flag_error(said.getvalue()))
        named = functools.partial(_named, prefix)
        line = re.sub(r"^Error parsing ([\w.-]+): \d+ validation errors? for \w+ ([\w.]*) ", named, line)
        line = re.sub(r" \[type=\w+, input_value=(.*?), input_type=\w+\]", r", found \1", line)
        raise CommandError(line) from None
    return read


def _named(prefix: str, match: re.Match[str]) -> str:
    """The flag of a field that pydantic refused: of the configuration itself, or of a part of it."""
    section, field = match.groups()
    return f"--{prefix}{field if section[:1].isupper() else f'{section}.{field}'}: ".replace("_", "-")


def open_run(
    kind: type[C],
    argv: Sequence[str],
    presets: Mapping[str, Mapping[str, Any]] | None = None,
    gapt_default: Callable[[C], GAPTConfig] = lambda config: GAPTConfig(),
) -> tuple[C, GAPTConfig, RunFolder]:
    """A run from its flags, those of ``kind`` and those of ``GAPTConfig`` after ``--gapt.``, and its folder.

    What is not given comes from the run to resume, or from the preset, or from the defaults.

    >>> from pydantic import BaseModel
    >>> class Config(BaseModel):
    ...     out: str = "runs/first"
    ...     overwrite: bool = False
    >>> config, gapt, folder = open_run(Config, ["--gapt.objective.weight", "0.1"])
    >>> gapt.objective.weight
    0.1

    Args:
        kind: a pydantic model with ``out``, ``overwrite`` and, where runs can be resumed, ``resume``.
        presets: by the name in ``preset``, other defaults.
        gapt_default: the configuration of the method where no flag says otherwise.

    Raises:
        CommandError: a value is impossible, or the folder cannot be used.
    """
    typed, _ = read_flags(kind, argv)
    resume = getattr(typed, "resume", False)
    folder = RunFolder.claim(typed.out, resume=resume, overwrite=typed.overwrite)
    stored = folder.read_json(SETTINGS) if resume else {}
    if resume:  # switches say how it is run, and are given anew
        stored["config"] = {name: value for name, value in stored["config"].items() if not isinstance(value, bool)}
    preset = dict((presets or {}).get(getattr(typed, "preset", ""), {}))
    if preset:
        preset["preset"] = typed.preset
    config, rest = read_flags(kind, argv, kind(**(stored["config"] if resume else preset)))
    default = GAPTConfig(**stored["gapt"]) if resume else gapt_default(config)
    unknown = [flag for flag in rest if flag.startswith("--") and not flag.startswith("--gapt.")]
    if not unknown:
        flags = [re.sub(r"^--gapt\.", "--", flag) for flag in rest]
        gapt, left = read_flags(GAPTConfig, flags, default, "gapt.")
        unknown = [re.sub("^--", "--gapt.", flag) for flag in left]
    if unknown:
        raise CommandError(f"{unknown[0]}: there is no such flag; see --help and --gapt.help")
    return config, gapt, folder


def config_of(method: str, gapt: GAPTConfig) -> GAPTConfig:
    """The configuration of one of the methods that are compared, so that one loop trains them all.

    ``plain`` freezes the gate in memorization, which is the bare optimizer bit for bit; ``penalty`` freezes it in
    compression, a constant entropy penalty; ``published`` uses the rule of arXiv 2505.08727; ``gapt`` is as given.

    Example:
        >>> config_of("plain", GAPTConfig()).gate.frozen
        True
    """
    gates = {
        "plain": GateConfig(frozen=True),
        "penalty": GateConfig(initial_phase="compression", frozen=True),
        "published": GateConfig.published(),
        "gapt": gapt.gate,
    }
    return gapt.model_copy(update={"gate": gates[method]})


def run_script(main: Callable[[], object]) -> NoReturn:
    """Runs a script and ends it: with 0, 2 for what the user can mend, or 130 after Ctrl-C, and one line about why.

    Of the ranks that torchrun starts, the first one says it.

    >>> try:
    ...     run_script(lambda: None)
    ... except SystemExit as end:
    ...     print("exit code", end.code)
    exit code 0
    """
    # transformers imports torchao where it is installed, whose GPU libraries do not load on every machine.
    for name in ("torchao", "torch.utils._pytree"):
        logging.getLogger(name).setLevel(logging.ERROR)
    try:
        main()
        code, line = 0, ""
    except (CommandError, FloatingPointError) as error:
        code, line = 2, f"error: {error}"
    except ModuleNotFoundError as error:
        code, line = 2, f'error: {error}; install what the examples use: pip install "gapt_optim[examples]"'
    except OSError as error:
        code, line = 2, f"error: {error.filename or 'a file'}: {error.strerror or error}; mend that and run again"
    except (StoppedError, KeyboardInterrupt) as stopped:
        code, line = 130, str(stopped) or "stopped"
    if line and os.environ.get("RANK", "0") == "0":
        print(" ".join(line.split()), file=sys.stderr, flush=True)
    _leave_ranks(failed=code != 0)
    sys.exit(code)


def _leave_ranks(failed: bool) -> None:
    """torchrun ends all ranks as soon as one has failed, so they leave together, after the first has said why."""
    dist: Any = sys.modules.get("torch.distributed")
    if dist is not None and dist.is_initialized():
        if failed:
            with contextlib.suppress(RuntimeError):  # a rank that has failed alone does not wait for the others long
                dist.monitored_barrier(timeout=timedelta(seconds=10))
        dist.destroy_process_group()


@contextlib.contextmanager
def stopping() -> Iterator[Callable[[], bool]]:
    """``with stopping() as stop:`` turns the first Ctrl-C, or the SIGTERM of a cluster, into a true ``stop()``.

    A loop that asks at the end of each step is never torn inside one. All ranks ask together, and get the same answer.
    The second Ctrl-C is immediate. Not so under torchrun, which passes one on that the terminal has sent already.

    >>> with stopping() as stop:
    ...     for step in range(3):
    ...         if stop():
    ...             break
    >>> step
    2
    """
    asked = threading.Event()
    previous: dict[int, Any] = {}

    def on_signal(number: int, frame: Any) -> None:
        asked.set()
        if "TORCHELASTIC_RUN_ID" not in os.environ:
            restore()

    def restore() -> None:
        for number, handler in previous.items():
            signal.signal(number, handler)

    def stop() -> bool:
        import torch
        import torch.distributed as dist

        if not dist.is_initialized():
            return asked.is_set()
        flag = torch.tensor(int(asked.is_set()))
        dist.all_reduce(flag)
        return bool(flag)

    if threading.current_thread() is threading.main_thread():
        previous |= {number: signal.signal(number, on_signal) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        restore()


def on_first_rank(work: Callable[[], T]) -> T:
    """What ``work`` gives on the first of the ranks that torchrun started, for all of them, however long it takes.

    Joins the process group. What the user has to mend is raised on all ranks, so that none waits for another.

    >>> on_first_rank(lambda: "prepared")
    'prepared'
    """
    import torch
    import torch.distributed as dist

    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return work()
    if not dist.is_initialized():
        dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")
    control = dist.new_group(backend="gloo", timeout=timedelta(days=7))
    outcome: list[Any] = [None, None]
    if dist.get_rank() == 0:
        try:
            outcome[0] = work()
        except (CommandError, ImportError, OSError, SystemExit) as error:
            outcome[1] = error
    dist.broadcast_object_list(outcome, group=control)
    if outcome[1] is not None:
        raise outcome[1]
    result: T = outcome[0]
    return result


def problem_within(seconds: float, work: Callable[[], object]) -> str | None:
    """Why ``work`` did not succeed in so many seconds, or None. It goes on in a thread that ends with the script.

    >>> problem_within(5.0, lambda: open("missing.txt"))
    "FileNotFoundError: [Errno 2] No such file or directory: 'missing.txt'"
    """
    found: list[str | None] = [f"no answer in {seconds:g} s"]

    def run() -> None:
        try:
            work()
            found[0] = None
        except Exception as error:  # whatever it raises, it did not succeed
            found[0] = " ".join(f"{type(error).__name__}: {error}".split())[:100]

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    return found[0]


def pick_device(name: str = "auto") -> Any:
    """A ``torch.device`` that works here. ``auto`` takes the first GPU where there is one, or this rank's own.

    >>> pick_device("cpu").type
    'cpu'

    Raises:
        CommandError: it cannot be used.
    """
    import torch

    try:
        device = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name)
        if device.type == "cuda" and "LOCAL_RANK" in os.environ:
            device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
            torch.cuda.set_device(device)
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError, ValueError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise CommandError(f"--device {name!r}: cannot be used here ({reason}); try --device cpu") from error
    if device.type == "cpu":
        keep_freed_memory()
    return device


def keep_freed_memory() -> None:
    """Lets this process keep memory that it frees, for the next step on a CPU.

    Each step allocates tensors of the same sizes. glibc gives the large ones back to the system as they are freed, and
    to be handed them again, cleared, takes a tenth to a third of a step of a small model. No effect with another C
    library.
    """
    with contextlib.suppress(OSError, AttributeError, TypeError):  # TypeError: Windows
        allocator = ctypes.CDLL(None)
        allocator.mallopt(_M_MMAP_MAX, 0)
        allocator.mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)
