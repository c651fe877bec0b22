"""The folder that a run writes to: only files of our own are ever touched, and a damaged one is found before training.

``run.json`` is the marker. It lists every file that the run wrote, and the SHA-256 of those that do not change any
more. A folder that holds anything else is refused, and only what the marker lists is ever deleted.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import warnings
import weakref
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, is_dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from .._version import __version__
from .errors import CommandError

fcntl: Any
try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

MARKER, SETTINGS, RESULTS = "run.json", "settings.json", "results.json"
METRICS, VALIDATION, CHECKPOINT = "metrics.jsonl", "validation.jsonl", "checkpoint/latest.json"
PARTIAL = ".partial"  # ends the name of a file that is being written
_SHARD = re.compile(r"__\d+_\d+\.distcp|\.metadata|\.metadata\.tmp")  # what torch.distributed.checkpoint writes
_ANEW = "start the run anew with --overwrite, or in another folder"


class RunFolderError(CommandError):
    """Says in one line what is wrong with a run's folder, and what to do."""


class RunFolder:
    """A run on disk. Make it with :meth:`claim`; :meth:`child` gives those of the methods that a run compares.

    On ranks other than the first only :meth:`save_checkpoint` and :meth:`load_checkpoint` may be called.

    Example:
        >>> import tempfile
        >>> folder = RunFolder.claim(tempfile.mkdtemp() + "/run")
        >>> folder.write_json("settings.json", {"lr": 0.1})
        >>> sorted(path.name for path in folder.path.iterdir())
        ['run.json', 'settings.json']
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self._files: list[str] = []
        self._checksums: dict[str, str] = {}
        try:
            text = (self.path / MARKER).read_text(encoding="utf-8")
        except FileNotFoundError:
            return
        except (OSError, ValueError) as error:
            raise RunFolderError(f"{self.path / MARKER}: cannot be read ({error}); {_ANEW}") from error
        try:
            marker = json.loads(text)
            ours = marker["made_by"] == "gapt_optim"
            files, checksums = marker["files"], marker.get("checksums", {})
            if not (ours and isinstance(files, list) and isinstance(checksums, dict)):
                raise ValueError
            if not all(_is_inside(name) for name in [*files, *checksums]):
                raise ValueError
            self._files, self._checksums = list(files), dict(checksums)
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise RunFolderError(
                f"{self.path / MARKER}: is no marker of a run (empty, damaged or of another program), so what is "
                "beside it stays; choose another folder, or delete this one yourself"
            ) from error

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_kept_lock"}

    @classmethod
    def claim(cls, path: str | os.PathLike[str], *, resume: bool = False, overwrite: bool = False) -> RunFolder:
        """Makes sure that a run may write to ``path``, before anything is computed. Deletes nothing.

        Args:
            path: a folder; it is made where it is missing.
            resume: go on with the run in it. Every file of that run is checked first.
            overwrite: replace the run in it, once :meth:`clear` is called.

        Raises:
            RunFolderError: the folder cannot be written, holds what no run wrote, or a run that is not to be replaced;
                or another process writes to it; or a file of the run to resume is damaged.
        """
        if not os.fspath(path):
            raise RunFolderError("the name of the folder is empty, which would be the current one; give it a name")
        if resume and overwrite:
            raise RunFolderError("--resume and --overwrite contradict each other; give one of them")
        try:
            path = Path(path)
            path.mkdir(parents=True, exist_ok=True)
            probe = path / (MARKER + PARTIAL)
            with probe.open("a"):
                pass
            probe.unlink()
        except (OSError, ValueError) as error:
            reason = error.strerror if isinstance(error, OSError) else error
            shown = str(path).replace("\0", "\\0")
            raise RunFolderError(f"{shown}: cannot be written to ({reason}); choose another folder") from error
        folder = cls(path)
        folder._lock()
        marked = (path / MARKER).exists()
        foreign = sorted(set(_files_below(path)) - set(folder._owned()))
        if foreign and not (resume and marked):
            shown = ", ".join(foreign[:3]) + (", ..." if len(foreign) > 3 else "")
            raise RunFolderError(f"{path}: holds what no run of ours wrote ({shown}); choose another folder")
        begun = SETTINGS in folder._files
        if resume and not begun:
            raise RunFolderError(f"{path}: there is no run to resume; drop --resume, or give the folder of a run")
        if begun and not resume and not overwrite:
            what = "a finished run" if (path / RESULTS).exists() else "an unfinished run"
            raise RunFolderError(f"{path}: holds {what}; give --resume, --overwrite or another folder")
        if resume:
            folder.check()
        folder._write_marker()
        return folder

    def child(self, name: str) -> RunFolder:
        """The folder of one of several methods. It is part of this one, also when this is deleted."""
        folder = RunFolder(self.path / name)
        if not (folder.path / MARKER).exists():
            self.file(f"{name}/{MARKER}")
            folder._write_marker()
        return folder

    def file(self, name: str) -> Path:
        """Where to write a file of this name; it is listed in the marker from now on.

        Raises:
            RunFolderError: a file of that name is there that no run wrote.
        """
        if not _is_inside(name):
            raise ValueError(f"name must be a path within the folder, found {name!r}")
        path = self.path / name
        if name not in self._files:
            if os.path.lexists(path):
                raise RunFolderError(f"{path}: was not written by a run of ours; move it away")
            self._files.append(name)
            self._write_marker()
        path.parent.mkdir(parents=True, exist_ok=True)
        return path

    def seal(self, *names: str) -> None:
        """Notes the checksums of files that do not change any more."""
        self._checksums |= {name: _checksum(self.path / name) for name in names}
        self._write_marker()

    def is_sealed(self, name: str) -> bool:
        """Whether the file is there as it was when it was sealed."""
        return name in self._checksums and self._damage(name) is None

    def write_json(self, name: str, value: Any) -> None:
        """Writes a file that is whole whenever it exists, and seals it. Numbers that JSON lacks become text."""
        _replace(self.file(name), json.dumps(_plain(value), indent=2) + "\n")
        self.seal(name)

    def read_json(self, name: str) -> Any:
        """What :meth:`write_json` wrote."""
        self._check_file(name)
        return json.loads((self.path / name).read_text(encoding="utf-8"))

    def begin(
        self,
        settings: dict[str, Any],
        *,
        free: Collection[str] = (),
        children: Sequence[str] = (),
        replace: bool = False,
        keep: str = "",
    ) -> None:
        """Stores the settings of a run, and refuses others than those of the run that is resumed.

        Args:
            settings: nested tables.
            free: settings that may change when a run is resumed, as paths like ``config.steps``.
            children: sub-folders of the methods that it compares.
            replace: first `clear` what the last run left, but for files whose names begin with ``keep``.

        Raises:
            RunFolderError: names a setting that differs, and both values.
        """
        if replace:
            self.clear(keep=keep)
        if SETTINGS in self._files and (self.path / SETTINGS).exists():
            was, now = _flat(self.read_json(SETTINGS)), _flat(json.loads(json.dumps(_plain(settings))))
            for name in (name for name in {**was, **now} if name not in free and was.get(name) != now.get(name)):
                raise RunFolderError(
                    f"--{name.removeprefix('config.').replace('_', '-')}: the run to resume has {was.get(name)}, found "
                    f"{now.get(name)}; drop the flag, or choose another folder"
                )
        self.write_json(SETTINGS, settings)
        for name in children:
            self.child(name)

    def append(self, name: str, record: dict[str, Any]) -> None:
        """Adds a line to a ``.jsonl`` file."""
        with self.file(name).open("a", encoding="utf-8") as file:
            file.write(json.dumps(_plain(record)) + "\n")

    def clear(self, *, keep: str = "", say: Callable[[str], object] = print) -> None:
        """Deletes what earlier runs wrote, after it has said what, and nothing else.

        Args:
            keep: files whose names begin with this stay.
        """
        keeps = [name for name in self._files if keep and name.startswith(keep)]
        kept = {MARKER, *keeps}
        owned = dict.fromkeys(self._owned())
        doomed = [name for name in owned if name not in kept and os.path.lexists(self.path / name)]
        if doomed:
            say(f"Deleting what the last run in {self.path} wrote: {', '.join(doomed)}.")
        for name in doomed:
            (self.path / name).unlink()
        for parent in sorted({p for name in doomed for p in PurePosixPath(name).parents}, reverse=True):
            place = self.path / parent
            if parent.name and place.is_dir() and not any(place.iterdir()):
                place.rmdir()
        self._files = keeps
        self._checksums = {name: sum_ for name, sum_ in self._checksums.items() if name in kept}
        self._write_marker()

    def check(self) -> None:
        """Refuses a run of which a file is damaged, here and in the folders of its methods.

        Raises:
            RunFolderError: names the file, what is wrong with it and the remedy.
        """
        for name in self._checksums:
            self._check_file(name)
        step = self.checkpoint_step()
        records = list(_records(self.path / METRICS))
        list(_records(self.path / VALIDATION))
        if len(records) < step or [record["step"] for record in records[:step]] != list(range(1, step + 1)):
            raise RunFolderError(
                f"{self.path / METRICS}: is damaged (not every step up to {step}, that of the checkpoint, is in it "
                f"in order); {_ANEW}"
            )
        for name in self._children():
            if (self.path / name / MARKER).exists():
                RunFolder(self.path / name).check()

    def rewind(self, step: int) -> None:
        """Drops the records of what comes after ``step`` steps, which is about to be taken again."""
        for name, last in ((METRICS, step), (VALIDATION, step - 1)):  # a validation comes after the step's checkpoint
            path = self.path / name
            if path.exists():
                kept = [record for record in _records(path) if record["step"] <= last]
                _replace(path, "".join(json.dumps(record) + "\n" for record in kept))

    @contextmanager
    def recording(self, done: int, steps: int, *, name: str, quiet: bool = False) -> Iterator[Callable[[Any], None]]:
        """Writes each step's metrics to ``metrics.jsonl`` and moves a progress bar, on the first rank.

        Args:
            done: steps of the run that were taken before; the records of later ones are dropped.
            steps: of the whole run.
            name: of the bar, which is shown in a terminal unless ``quiet``.
        """
        if os.environ.get("RANK", "0") != "0":
            yield lambda metrics: None
            return
        from ..metrics import JSONLines, ProgressBar

        self.rewind(done)
        bar = ProgressBar(steps, initial=done, desc=name, disable=quiet or None, leave=False)
        with bar, JSONLines(self.file(METRICS), resume=True) as log:

            def record(metrics: Any) -> None:
                log(metrics)
                bar(metrics)

            yield record

    # Checkpoints

    def checkpoint_step(self) -> int:
        """Steps that the last good checkpoint holds; 0 without one.

        Raises:
            RunFolderError: a file of it is damaged.
        """
        return 0 if (latest := self._latest()) is None else int(latest["step"])

    def save_checkpoint(
        self, step: int, model: Any, optimizer: Any, schedule: Any, *, say: Callable[[str], object] = print
    ) -> bool:
        """Writes all that training goes on from by `torch.distributed.checkpoint`, in shards where the model is spread.

        All ranks call it together. The checkpoint before stays until this one is whole. Where it cannot be written, as
        on a full disk, that is said in one line, what was begun is deleted, and training can go on.

        Args:
            step: optimizer steps that are done.
            model: the module with the plain names, not one that wraps it.
            optimizer: of all its parameters.
            schedule: a scheduler of ``torch.optim.lr_scheduler``.

        Returns:
            Whether it was written.
        """
        import torch.distributed as dist

        dcp = _checkpointing()

        state = _state(model, optimizer, schedule)
        first = not dist.is_initialized() or dist.get_rank() == 0
        name = f"checkpoint/step-{step}"
        before = self._latest(check=False)
        if before is not None and before["step"] == step:
            name += "-again"
        try:
            problem: BaseException | None = None
            refused = self._claim_checkpoint(name) if first else None
            if dist.is_initialized():  # no rank writes before the first has claimed the folder
                answer = [refused]
                dist.broadcast_object_list(answer)
                refused = answer[0]
            if refused is not None:
                if not first and isinstance(refused, OSError):
                    return False
                raise refused
            try:
                with warnings.catch_warnings():
                    warnings.filterwarnings("ignore", "torch.distributed is disabled")
                    dcp.save(state, checkpoint_id=self.path / name)
            except dcp.CheckpointException as error:
                problem = next(iter(error.failures.values()))[0]
            if not first:
                return problem is None
            if problem is not None:
                raise problem
            sums = {path.name: _checksum(path) for path in sorted((self.path / name).iterdir())}
            _replace(self.path / CHECKPOINT, json.dumps({"step": step, "folder": name, "files": sums}, indent=2) + "\n")
        except (OSError, RuntimeError) as error:
            self._drop_shards(name)
            reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error).splitlines()[0]
            left = "there is none yet" if before is None else f"that of step {before['step']} is whole"
            say(f"{self.path}: no checkpoint at step {step} ({reason}); {left}, and training goes on")
            return False
        if before is not None:
            self._drop_shards(before["folder"])
        return True

    def _claim_checkpoint(self, name: str) -> OSError | RunFolderError | None:
        """List the files of a checkpoint as ours; what stands against it."""
        try:
            self.file(f"{name}/")
            self.file(CHECKPOINT)
        except (OSError, RunFolderError) as error:
            return error
        return None

    def load_checkpoint(self, model: Any, optimizer: Any, schedule: Any) -> int:
        """Reads the last checkpoint, in place, and returns its step; 0 without one. All ranks call it together.

        Raises:
            RunFolderError: it is of another model.
        """
        dcp = _checkpointing()
        import torch.distributed.checkpoint.state_dict as shards

        latest = self._latest(check=False)
        if latest is None:
            return 0
        state = _state(model, optimizer, schedule)
        try:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", "torch.distributed is disabled")
                dcp.load(state, checkpoint_id=self.path / latest["folder"])
            shards.set_model_state_dict(model, state["model"])
            shards.set_optimizer_state_dict(model, optimizer, state["optimizer"])
            schedule.load_state_dict(state["schedule"])
        except (dcp.CheckpointException, OSError, ValueError, KeyError) as error:
            reason = str(error).strip().splitlines()[-1] if str(error).strip() else type(error).__name__
            raise RunFolderError(
                f"{self.path / latest['folder']}: does not fit this run ({reason}); {_ANEW}"
            ) from error
        return int(latest["step"])

    def _latest(self, check: bool = True) -> dict[str, Any] | None:
        """What ``checkpoint/latest.json`` says, after the files that it lists were compared with their checksums."""
        path = self.path / CHECKPOINT
        if not path.exists():
            return None
        try:
            latest: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
            place, files = latest["folder"], dict(latest["files"])
            if not (_is_inside(place) and isinstance(latest["step"], int) and latest["step"] > 0 and files):
                raise ValueError
            for name, noted in files.items() if check else ():
                path = self.path / place / str(name)
                if not _is_inside(name) or _checksum(path) != noted:
                    raise ValueError
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise RunFolderError(
                f"{path}: the checkpoint is damaged (this file of it is missing, cut or changed); {_ANEW}"
            ) from error
        return latest

    def _drop_shards(self, name: str) -> None:
        for path in self._shards(name):
            (self.path / path).unlink(missing_ok=True)
        if (self.path / name).is_dir() and not any((self.path / name).iterdir()):
            (self.path / name).rmdir()
        with suppress(NotADirectoryError):  # a file of the user's is where the folder would be
            (self.path / (CHECKPOINT + PARTIAL)).unlink(missing_ok=True)
        if f"{name}/" in self._files:
            self._files.remove(f"{name}/")
            try:
                self._write_marker()
            except OSError:  # a full disk: the marker then lists a folder that is gone
                (self.path / (MARKER + PARTIAL)).unlink(missing_ok=True)

    # What is ours

    def _lock(self) -> None:
        """Keep other processes out for as long as this object, or another of this process, stands for the folder.

        The system gives the lock back when the process ends, however it ends. Where there are no such locks, as on
        Windows and on some network disks, nothing is kept out.
        """
        if fcntl is None:
            return
        place = os.stat(self.path)
        key = (place.st_dev, place.st_ino)
        lock = _LOCKS.get(key)
        if lock is None:
            lock = _Lock(self.path)
            try:
                fcntl.flock(lock.handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise RunFolderError(
                    f"{self.path}: another process is writing to it; wait until it has ended, or choose another folder"
                ) from None
            except OSError:
                return
            _LOCKS[key] = lock
        self._kept_lock = lock

    def _owned(self) -> Iterator[str]:
        """Every file of ours that may be there, those of methods first and the marker last."""
        for name in self._children():
            yield from (f"{name}/{each}" for each in RunFolder(self.path / name)._owned())
        for name in self._files:
            if name.endswith("/"):
                yield from self._shards(name[:-1])
            else:
                yield from (name, name + PARTIAL)
        yield from (MARKER, MARKER + PARTIAL)

    def _shards(self, name: str) -> list[str]:
        place = self.path / name
        found = sorted(place.iterdir()) if place.is_dir() and not place.is_symlink() else []
        return [f"{name}/{path.name}" for path in found if _SHARD.fullmatch(path.name)]

    def _children(self) -> list[str]:
        return [name.removesuffix(f"/{MARKER}") for name in self._files if name.endswith(f"/{MARKER}")]

    def _damage(self, name: str) -> str | None:
        try:
            changed = _checksum(self.path / name) != self._checksums.get(name)
        except OSError as error:
            return f"is missing or cannot be read ({error.strerror})"
        return "is damaged (its checksum is not the one that was noted)" if changed else None

    def _check_file(self, name: str) -> None:
        problem = self._damage(name)
        if problem is not None:
            raise RunFolderError(f"{self.path / name}: {problem}; put it back, or {_ANEW}")

    def _write_marker(self) -> None:
        self.path.mkdir(parents=True, exist_ok=True)
        marker = {"made_by": "gapt_optim", "version": __version__, "files": self._files, "checksums": self._checksums}
        _replace(self.path / MARKER, json.dumps(marker, indent=2) + "\n")


class _Lock:
    """An open folder, closed with the last that holds it."""

    def __init__(self, path: Path) -> None:
        self.handle = os.open(path, os.O_RDONLY)
        self.close = weakref.finalize(self, os.close, self.handle)


_LOCKS: weakref.WeakValueDictionary[tuple[int, int], _Lock] = weakref.WeakValueDictionary()
"""Of this process, by device and inode of the folder."""


def _close_locks() -> None:
    for lock in list(_LOCKS.values()):
        lock.close()
    _LOCKS.clear()


if fcntl is not None:  # a worker that outlives a killed run would keep the folder locked
    os.register_at_fork(after_in_child=_close_locks)


def _checkpointing() -> Any:
    """`torch.distributed.checkpoint`, which takes a second to import."""
    import torch.distributed.checkpoint

    return torch.distributed.checkpoint


def _state(model: Any, optimizer: Any, schedule: Any) -> dict[str, Any]:
    """What a checkpoint holds. Of a new optimizer its state is made first, so that there is something to read into."""
    import torch.distributed.checkpoint.state_dict as shards

    moments = shards.get_optimizer_state_dict(model, optimizer)
    return {"model": shards.get_model_state_dict(model), "optimizer": moments, "schedule": schedule.state_dict()}


def _is_inside(name: Any) -> bool:
    """A relative path that does not leave its folder."""
    if not isinstance(name, str) or not name or "\0" in name:
        return False
    path = PurePosixPath(name)
    return not path.is_absolute() and ".." not in path.parts and path.parts != ()


def _files_below(folder: Path) -> Iterator[str]:
    """Everything but folders, without following links."""
    for place, folders, files in os.walk(folder):
        links = [name for name in folders if os.path.islink(os.path.join(place, name))]
        yield from (Path(place, name).relative_to(folder).as_posix() for name in (*files, *links))


def _records(path: Path) -> Iterator[dict[str, Any]]:
    """The lines of a ``.jsonl`` file in order of steps; the last one may be cut, as by a kill."""
    try:
        lines = path.read_bytes().split(b"\n") if path.exists() else [b""]
    except OSError as error:
        raise RunFolderError(f"{path}: cannot be read ({error.strerror}); {_ANEW}") from error
    last = 0
    for number, line in enumerate(lines[:-1], start=1):
        try:
            record = json.loads(line)
            if type(record["step"]) is not int or record["step"] <= last:
                raise ValueError
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise RunFolderError(f"{path}: line {number} is damaged (no record of a later step); {_ANEW}") from error
        last = record["step"]
        yield record


def _checksum(path: Path) -> str:
    with path.open("rb") as file:
        digest = hashlib.sha256()
        while chunk := file.read(1 << 22):
            digest.update(chunk)
    return digest.hexdigest()


def _replace(path: Path, text: str) -> None:
    """Writes a file so that a reader sees the old one or the new one, also after a kill or on a full disk."""
    partial = path.with_name(path.name + PARTIAL)
    try:
        with partial.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except OSError:
        partial.unlink(missing_ok=True)
        raise


def _plain(value: Any) -> Any:
    """JSON has no infinity and no dataclasses; what is written may."""
    if is_dataclass(value) and not isinstance(value, type):
        value = asdict(value)
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value


def _flat(table: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in table.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return flat
