"""What one optimizer step reports, and observers that record it."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field, fields
from operator import attrgetter
from pathlib import Path
from typing import Any, Protocol

from .alignment import Alignment
from .gate import Reason


@dataclass(frozen=True)
class Measures:
    """Measures beside an entropy that show whether it fell through compression. Each is a mean over windows.

    An entropy can fall without any compression in two ways: the norms of a few tokens grow, which ``norm_ratio`` and
    the centered cosine entropy show, or all tokens come to share one large vector, which ``mean_share`` shows. Tokens
    that are masked, or all zero, do not count.

    >>> long_tokens = Measures(linear_entropy=0.1, centered_cosine_entropy=1.1, norm_ratio=26.0, mean_share=0.2)
    >>> usual = Measures(linear_entropy=1.1, centered_cosine_entropy=1.1, norm_ratio=2.0, mean_share=0.2)
    >>> Measures.mean([long_tokens, usual]).norm_ratio
    14.0
    """

    linear_entropy: float
    """Order-2 entropy of the linear kernel, not centered, in nats: the one of arXiv 2505.08727."""
    centered_cosine_entropy: float
    """Order-2 entropy of the centered cosine kernel, in nats."""
    norm_ratio: float
    """Largest over median norm of the window's tokens, at least 1."""
    mean_share: float
    """Share of the squared norm of the window's tokens that lies in their mean, in [0, 1]."""

    @classmethod
    def of_sums(cls, totals: Sequence[float], weights: Sequence[float]) -> Measures:
        """From sums over windows, and the weights of these; a window that says nothing of a measure has none of it.

        Where no window says anything, entropies are 0, norms equal and nothing is shared.
        """
        linear, cosine, ratio, share = (
            total / weight if weight else nothing
            for total, weight, nothing in zip(totals, weights, (0.0, 0.0, 1.0, 0.0), strict=True)
        )
        return cls(linear, cosine, ratio, share)

    @classmethod
    def mean(cls, measures: Iterable[Measures]) -> Measures:
        """Mean of several, for example over layers."""
        rows = [_numbers(each) for each in measures]  # dataclasses.astuple copies, which takes longer than all the rest
        return cls(*(math.fsum(column) / len(rows) for column in zip(*rows, strict=True)))


_numbers = attrgetter(*(part.name for part in fields(Measures)))


@dataclass(frozen=True)
class StepMetrics:
    """One optimizer step, over its micro-batches and ranks: losses are means of theirs, entropies of all their windows.

    >>> phase = "memorization"
    >>> metrics = StepMetrics(1, phase, next_phase=phase, reason=None, loss=2.0, entropy=1.5, layer_entropy={})
    >>> metrics.scalars()["gapt/loss"]
    2.0
    """

    step: int
    """Optimizer steps so far, this one included."""
    phase: str
    """Phase that this step ran in: "memorization" or "compression"."""
    next_phase: str
    """Phase of the next step."""
    reason: Reason | None
    """Why the phase switches after this step: "plateau", "spike", "compressed", or None."""
    loss: float | None
    """Task loss (nats for cross-entropy); None if none was recorded."""
    entropy: float | None
    """Mean entropy over the layers that count, the value that the gate judges; None where no watched layer had one."""
    layer_entropy: dict[str, float]
    """Entropy per watched layer, in nats (or in [0, 1] with ``normalize``)."""
    measures: Measures | None = None
    """Whether the entropy fell through compression: means over the layers that count. None on steps where they are not
    due (``AlignmentConfig.every``)."""
    layer_measures: dict[str, Measures] = field(default_factory=dict)
    """The same per watched layer."""
    entropy_share: float | None = None
    """Share of the objective that is entropy, ``|weight * entropy| / (|loss| + |weight * entropy|)``, in [0, 1]; None
    in memorization."""
    alignment: Alignment | None = None
    """Angles at the layers; None on steps where they are not due."""
    parameter_alignment: Alignment | None = None
    """Parameter alignment, on the steps where it is due."""
    validation_loss: float | None = None
    """Held-out loss recorded since the last step."""
    switches: int = 0
    """Phase switches so far."""
    compression_steps: int = 0
    """Steps in compression so far, this one included."""
    nonfinite_steps: int = 0
    """Steps so far whose loss or entropy was not finite."""

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON, non-finite numbers as None."""
        values: dict[str, Any] = _finite(asdict(self))
        return values

    def scalars(self, *, layers: bool = True, prefix: str = "gapt") -> dict[str, float]:
        """Numbers to log by name, such as ``gapt/loss``; those that are missing or not finite are left out.

        Args:
            layers: include the entropy and measures of each layer.
            prefix: of the names.
        """
        values: dict[str, float | None] = {
            "loss": self.loss,
            "entropy": self.entropy,
            "compression": float(self.phase == "compression"),
            "switches": float(self.switches),
            "validation_loss": self.validation_loss,
            "entropy_share": self.entropy_share,
            "activation_cosine": None if self.alignment is None else self.alignment.cosine,
            "parameter_cosine": None if self.parameter_alignment is None else self.parameter_alignment.cosine,
        }
        if self.measures is not None:
            values |= asdict(self.measures)
        if layers:
            values |= {f"entropy/{name}": entropy for name, entropy in self.layer_entropy.items()}
            for name, measures in self.layer_measures.items():
                values |= {f"{measure}/{name}": value for measure, value in asdict(measures).items()}
        return {f"{prefix}/{name}": v for name, v in values.items() if v is not None and math.isfinite(v)}


class Observer(Protocol):
    """Called once per optimizer step. Whoever made it calls its ``close``, if it has one.

    >>> def switches(metrics: StepMetrics) -> None:
    ...     if metrics.reason is not None:
    ...         print(metrics.step, metrics.phase, "ends:", metrics.reason)
    >>> observer: Observer = switches
    """

    def __call__(self, metrics: StepMetrics) -> None: ...


class JSONLines:
    """Appends one JSON object per step to a file and flushes it.

    A killed process loses at most the line being written. A file never mixes two runs by accident: one that already
    holds records is refused unless ``resume`` or ``overwrite`` is set.

        log = JSONLines("run/metrics.jsonl", resume=checkpoint is not None)

    Args:
        path: of the file; missing folders are created.
        resume: append to the records that the file holds, if any. A last line that was cut short is terminated first.
        overwrite: start over; records that the file holds are lost.

    >>> phase = "memorization"
    >>> metrics = StepMetrics(1, phase, next_phase=phase, reason=None, loss=2.0, entropy=1.5, layer_entropy={})
    >>> with JSONLines("runs/first/metrics.jsonl") as log:
    ...     log(metrics)  # GAPTOptimizer(..., observers=[log]) does this after each step
    >>> json.loads(log.path.read_text())["loss"]
    2.0

    Raises:
        FileExistsError: the file holds records, and neither ``resume`` nor ``overwrite`` is set.
        ValueError: both are set.
        OSError: the file cannot be opened for appending.
    """

    def __init__(self, path: str | os.PathLike[str], *, resume: bool = False, overwrite: bool = False) -> None:
        if resume and overwrite:
            raise ValueError("resume=True keeps the records of the file and overwrite=True drops them; set one of them")
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        holds_records = self.path.is_file() and self.path.stat().st_size > 0
        if holds_records and not (resume or overwrite):
            raise FileExistsError(
                f"{self.path} holds the records of another run; go on with resume=True, begin anew with "
                "overwrite=True, or choose another path"
            )
        self._file = self.path.open("w" if overwrite else "a", encoding="utf-8")
        if holds_records and resume and _last_byte(self.path) != b"\n":
            self._file.write("\n")

    def __call__(self, metrics: StepMetrics) -> None:
        self._file.write(json.dumps(metrics.as_dict(), allow_nan=False) + "\n")
        self._file.flush()

    def close(self) -> None:
        self._file.close()

    def __enter__(self) -> JSONLines:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


class ProgressBar:
    """A `tqdm` bar with phase, loss and entropy. ``options`` go to `tqdm`.

    >>> bar = ProgressBar(total=1000, disable=True)  # GAPTOptimizer(..., observers=[bar])
    >>> bar.close()
    """

    def __init__(self, total: int | None = None, **options: Any) -> None:
        try:
            from tqdm.auto import tqdm
        except ImportError as error:
            raise ImportError("ProgressBar needs tqdm: pip install tqdm") from error
        self._bar = tqdm(total=total, **({"unit": "step", "dynamic_ncols": True} | options))

    def __call__(self, metrics: StepMetrics) -> None:
        values = {"loss": metrics.loss, "entropy": metrics.entropy}
        self._bar.set_postfix(
            {"phase": metrics.phase} | {name: f"{value:.3f}" for name, value in values.items() if value is not None},
            refresh=False,
        )
        self._bar.update(1)

    def close(self) -> None:
        self._bar.refresh()  # the last step may be younger than what is shown
        self._bar.close()

    def __enter__(self) -> ProgressBar:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def _last_byte(path: Path) -> bytes:
    with path.open("rb") as file:
        file.seek(-1, os.SEEK_END)
        return file.read(1)


def _finite(value: Any) -> Any:
    """Without empty tables, and with None for numbers that JSON does not have."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items() if item != {}}
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
