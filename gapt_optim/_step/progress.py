"""How far a run is: the gate, what is counted, and what a checkpoint holds of it."""

from __future__ import annotations

import functools
import math
import warnings
from dataclasses import asdict, dataclass, fields
from typing import Any

from .._torch.wrapper import START_FRESH
from ..config import GateConfig
from ..gate import Phase, PhaseGate

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

    @property
    def phase(self) -> Phase:
        """Phase of the step that is being computed."""
        return self.gate.phase

    def advance(self, loss: float, entropy: float, validation: float) -> str | None:
        """One step more; returns why the phase switches after it, None where it does not."""
        counts, phase = self.counts, self.phase
        finite = math.isfinite(loss) and math.isfinite(entropy)
        counts.steps += 1
        counts.compression_steps += phase is Phase.COMPRESSION
        counts.nonfinite_steps += not finite
        counts.nonfinite_run = 0 if finite else counts.nonfinite_run + 1
        self.validation = []
        if finite:
            self._judge(loss, entropy, validation)
        elif not math.isnan(validation):
            self.validation = [validation]  # judged with the next entropy that is finite
        return self.gate.reason if self.phase is not phase else None

    def _judge(self, loss: float, entropy: float, validation: float) -> None:
        counts = self.counts
        if self.gate.config.signal == "train":
            self.gate.update(loss, entropy)
            return
        counts.unjudged_loss += loss
        counts.unjudged_entropy += entropy
        counts.unjudged_steps += 1
        if counts.unjudged_steps == _UNJUDGED_STEPS == counts.steps - counts.nonfinite_steps:  # none since the start
            warnings.warn(
                f'{_UNJUDGED_STEPS} steps with signal="validation" and no finite validation loss: the gate stays. '
                "Call optimizer.record_validation(loss)",
                UserWarning,
                stacklevel=6,
            )
        if math.isfinite(validation):
            mean_loss, mean_entropy = (
                total / counts.unjudged_steps for total in (counts.unjudged_loss, counts.unjudged_entropy)
            )
            self.gate.update(validation, mean_entropy, training_loss=mean_loss)
            counts.unjudged_loss, counts.unjudged_entropy, counts.unjudged_steps = 0.0, 0.0, 0

    def state_dict(self) -> dict[str, Any]:
        """Plain values."""
        return {
            "gate": self.gate.state_dict(),
            **asdict(self.counts),
            "unjudged_validation": list(self.validation),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.gate.load_state_dict(state["gate"])
        self.counts = _Counts(**{part.name: state[part.name] for part in fields(_Counts)})
        self.validation = list(state["unjudged_validation"])


def refuse_other_state(saved: dict[str, Any], here: dict[str, Any], config: GateConfig) -> None:
    """Raises ValueError where a saved state is of other layers, another configuration or another version."""
    unknown = set(saved) ^ set(here)
    if unknown:
        raise ValueError(f"state_dict has missing or unknown fields {sorted(unknown)}; {START_FRESH}")
    if _bare_names(saved["layers"]) != _bare_names(here["layers"]):
        raise ValueError(
            f"state_dict is of the layers {saved['layers']}, this hook has {here['layers']}; {START_FRESH}"
        )
    for section, values in saved["config"].items():
        for name, value in values.items():
            found = here["config"].get(section, {}).get(name)
            if found != value:
                raise ValueError(
                    f"state_dict was saved with {section}.{name}={value!r}, found {found!r}; {START_FRESH}"
                )
    PhaseGate(config).load_state_dict(saved["gate"])


def _bare_names(names: list[str]) -> list[str]:
    """Names without what DistributedDataParallel and torch.compile put before them."""
    wrappers = ("_orig_mod.", "_checkpoint_wrapped_module.")
    return [
        functools.reduce(lambda name, part: name.replace(part, ""), wrappers, n).removeprefix("module.") for n in names
    ]
