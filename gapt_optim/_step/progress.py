"""How far a run is: the gate, and what is counted."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import TYPE_CHECKING, Any

from .._tell import tell
from ..gate import Phase, PhaseGate

if TYPE_CHECKING:
    from ..config import GateConfig

_UNJUDGED_STEPS = 2000


@dataclass
class _Counts:
    steps: int = 0
    compression_steps: int = 0
    nonfinite_steps: int = 0
    nonfinite_run: int = 0
    unjudged_loss: float = 0.0  # sums and count since the gate last judged a validation loss
    unjudged_entropy: float = 0.0
    unjudged_steps: int = 0


class Progress:
    """Goes on by one step at a time, with the numbers of that step."""

    def __init__(self, config: GateConfig) -> None:
        self.gate = PhaseGate(config)
        self.counts = _Counts()
        self.validation: list[float] = []
        """Held-out losses since the last step."""
        self.learning_rate: float | None = None
        """The largest of the last step: a rise from one step to the next is a warm-up."""

    @property
    def phase(self) -> Phase:
        """Phase of the step that is being computed."""
        return self.gate.phase

    def advance(self, loss: float, entropy: float, validation: float, learning_rate: float | None = None) -> str | None:
        """One step more; returns why the phase switches after it, None where it does not."""
        counts, phase = self.counts, self.phase
        before, self.learning_rate = self.learning_rate, learning_rate
        warming_up = before is not None and learning_rate is not None and learning_rate > before
        finite = math.isfinite(loss) and math.isfinite(entropy)
        counts.steps += 1
        counts.compression_steps += phase is Phase.COMPRESSION
        counts.nonfinite_steps += not finite
        counts.nonfinite_run = 0 if finite else counts.nonfinite_run + 1
        self.validation = []
        if finite:
            self._judge(loss, entropy, validation, warming_up)
        elif not math.isnan(validation):
            self.validation = [validation]  # judged with the next entropy that is finite
        return self.gate.reason if self.phase is not phase else None

    def _judge(self, loss: float, entropy: float, validation: float, warming_up: bool) -> None:
        counts = self.counts
        if self.gate.config.signal == "train":
            self.gate.update(loss, entropy, warming_up=warming_up)
            return
        counts.unjudged_loss += loss
        counts.unjudged_entropy += entropy
        counts.unjudged_steps += 1
        if counts.unjudged_steps == _UNJUDGED_STEPS == counts.steps - counts.nonfinite_steps:  # none since the start
            tell(
                f'{_UNJUDGED_STEPS} steps with signal="validation" and no finite validation loss: the gate stays. '
                "Call optimizer.record_validation(loss)"
            )
        if math.isfinite(validation):
            mean_loss, mean_entropy = (
                total / counts.unjudged_steps for total in (counts.unjudged_loss, counts.unjudged_entropy)
            )
            self.gate.update(validation, mean_entropy, training_loss=mean_loss, warming_up=warming_up)
            counts.unjudged_loss, counts.unjudged_entropy, counts.unjudged_steps = 0.0, 0.0, 0

    def state_dict(self) -> dict[str, Any]:
        """Plain values."""
        return {
            "gate": self.gate.state_dict(),
            **asdict(self.counts),
            "unjudged_validation": list(self.validation),
            "learning_rate": self.learning_rate,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.gate.load_state_dict(state["gate"])
        self.counts = _Counts(**{part.name: state[part.name] for part in fields(_Counts)})
        self.validation = list(state["unjudged_validation"])
        self.learning_rate = state["learning_rate"]


def flat_state(state: Mapping[str, Any]) -> dict[str, str]:
    """A state by dotted paths, for ranks to compare: what may differ between them is left out.

    A layer may rest on some ranks, and each rank records the held-out losses that it has.
    """
    own = ("ran", "unjudged_validation", "evasion")
    return {path: repr(value) for path, value in flattened(state).items() if path.split(".")[0] not in own}


def flattened(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in values.items():
        flat |= flattened(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {prefix + name: value}
    return flat
