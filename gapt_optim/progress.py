"""How far a run is: the gate, what is counted, and what a checkpoint holds of it."""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from ._tell import tell
from ._version import __version__
from .config import GAPTConfig
from .gate import Count, GateState, Phase, PhaseGate, Reason
from .several import START_FRESH, STATE_KEY

_UNJUDGED_STEPS = 2000


@dataclass
class Counts:
    """What is counted beside the gate."""

    steps: Count = 0
    compression_steps: Count = 0
    nonfinite_steps: Count = 0
    nonfinite_run: Count = 0
    unjudged_loss: float = 0.0
    """Sums and count since the gate last judged a validation loss, as the two below."""
    unjudged_entropy: float = 0.0
    unjudged_steps: Count = 0
    unjudged_validation: list[float] = field(default_factory=list)
    """Held-out losses since the last step."""
    learning_rate: float | None = None
    """The largest of the last step: a rise from one step to the next is a warm-up."""
    targets: dict[str, float] = field(default_factory=dict)
    """Where pressing stops, by layer, once step ``objective.start`` has measured it."""


class Progress:
    """Goes on by one step at a time, with the numbers of that step."""

    def __init__(self, config: GAPTConfig) -> None:
        self.config = config
        self.gate = PhaseGate(config.gate)
        self.counts = Counts()

    @property
    def phase(self) -> Phase:
        """Phase of the step that is being computed."""
        return self.gate.phase

    @property
    def targets(self) -> dict[str, float] | None:
        """Where pressing stops, by layer; None where it has no end."""
        return None if self.config.objective.target_share is None else self.counts.targets

    def advance(
        self,
        loss: float,
        entropy: float | None,
        layers: Mapping[str, float],
        validation: float,
        learning_rate: float | None = None,
    ) -> Reason | None:
        """One step more; returns why the phase switches after it, None where it does not.

        Args:
            loss, entropy: of the step; the gate stays where there is no entropy.
            layers: entropies by layer.
            validation: held-out loss, nan for none.
            learning_rate: the largest of the step.
        """
        counts, phase, objective = self.counts, self.phase, self.config.objective
        before, counts.learning_rate = counts.learning_rate, learning_rate
        warming_up = before is not None and learning_rate is not None and learning_rate > before
        finite = math.isfinite(loss) and (entropy is None or math.isfinite(entropy))
        if objective.target_share is not None and counts.steps >= objective.start:
            for name, value in layers.items():
                if math.isfinite(value):
                    counts.targets.setdefault(name, objective.target_share * value)
        counts.steps += 1
        counts.compression_steps += phase is Phase.COMPRESSION
        counts.nonfinite_steps += not finite
        counts.nonfinite_run = 0 if finite else counts.nonfinite_run + 1
        counts.unjudged_validation = []
        if finite and entropy is not None:
            self._judge(loss, entropy, validation, warming_up)
        elif not math.isnan(validation):
            counts.unjudged_validation = [validation]  # judged with the next entropy that is finite
        return self.gate.reason if self.phase is not phase else None

    def _judge(self, loss: float, entropy: float, validation: float, warming_up: bool) -> None:
        counts = self.counts
        # The gate follows what compression lowers: that is the entropy's negative where it is pressed up.
        lowered = entropy if self.config.objective.direction == "down" else -entropy
        if self.gate.config.signal == "train":
            self.gate.update(loss, lowered, warming_up=warming_up)
            return
        counts.unjudged_loss += loss
        counts.unjudged_entropy += lowered
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
        return {"gate": self.gate.state_dict(), **asdict(self.counts)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a state that was checked."""
        self.gate.load_state_dict(state["gate"])
        self.counts = Counts(**{each.name: state[each.name] for each in fields(Counts)})


class SavedState(BaseModel):
    """What a checkpoint holds of ours."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    gate: GateState
    counts: Counts
    layers: list[str]
    config: GAPTConfig


REQUIRED = (
    "entropy.kernel",
    "entropy.center",
    "entropy.alpha",
    "entropy.window",
    "entropy.normalize",
    "layers.skip_first",
    "layers.skip_last",
    "objective.direction",
    "gate.rule",
    "gate.signal",
)
"""Settings that a saved state depends on, besides the layers: its entropies and losses would be of another kind."""


def checked_state(saved: Any, layers: Sequence[str], config: GAPTConfig) -> tuple[dict[str, Any], str | None]:
    """A saved state, checked by type, range and meaning against the layers and settings of now.

    Args:
        saved: what ``GAPTOptimizer`` has put into a state dict, read from JSON.
        layers: names of the watched layers.

    Returns:
        The state with the layers' names of now, and one line on the settings that differ, None where none does.

    Raises:
        ValueError: a field does not fit; the message names it, what was found and what to do.
    """
    if not isinstance(saved, dict):
        raise _refusal(STATE_KEY, "must be an object", saved)
    state = _validated(saved)
    # Of layers=None, a state that was saved before the first forward pass has none.
    if state.layers and [bare_name(n) for n in state.layers] != [bare_name(n) for n in layers]:
        raise ValueError(
            f"state_dict: {STATE_KEY}.layers: it is of the layers {state.layers}, this hook has {list(layers)}; make "
            f"the hook on the same layers, or, {START_FRESH}"
        )
    _refuse_contradictions(state)
    given = flattened(saved["config"])
    for path in REQUIRED:
        if path not in given:
            raise _refusal(f"config.{path}", "is required", None, missing=True)
    old, new = (flattened(each.model_dump()) for each in (state.config, config))
    for path in REQUIRED:
        if old[path] != new[path]:
            raise ValueError(
                f"state_dict was saved with {path}={old[path]!r}, found {new[path]!r}, and its numbers depend on it; "
                f"set it as it was, or, {START_FRESH}"
            )
    if config.gate.frozen and state.gate.phase != config.gate.initial_phase:
        raise ValueError(
            f"state_dict: {STATE_KEY}.gate.phase is {state.gate.phase!r}, and gate.frozen=True keeps "
            f"gate.initial_phase={config.gate.initial_phase!r}; set initial_phase={state.gate.phase!r}, or, "
            f"{START_FRESH}"
        )
    changed = [f"{path}: {old[path]!r} -> {new[path]!r}" for path in new if old[path] != new[path]]
    notice = f"the state goes on with other settings than it was saved with: {', '.join(changed)}" if changed else None
    names = dict(zip(state.layers, layers, strict=False))  # none of a state from before the first forward pass
    counts = asdict(state.counts)
    counts["targets"] = {names[name]: target for name, target in counts["targets"].items()}
    return {"gate": asdict(state.gate), **counts}, notice


def _validated(saved: dict[str, Any]) -> SavedState:
    apart = {"gate", "layers", "config"}
    nested = {name: saved[name] for name in apart & saved.keys()}
    nested["counts"] = {name: value for name, value in saved.items() if name not in apart}
    try:
        return SavedState.model_validate_json(
            json.dumps(nested), strict=True
        )  # strict Python takes no dict for a class
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        path = ".".join(map(str, first["loc"])).removeprefix("counts.")
        if first["type"] in ("extra_forbidden", "unexpected_keyword_argument"):
            raise ValueError(
                f"state_dict: {STATE_KEY}.{path}={first['input']!r:.100} is unknown to gapt_optim {__version__}; load "
                f"it with the version that saved it, or, {START_FRESH}"
            ) from None
        missing = first["type"].startswith("missing")
        found = "nothing" if missing else first["input"]
        raise _refusal(path, f"is refused: {first['msg']}", found, missing=missing) from None


def _refuse_contradictions(state: SavedState) -> None:
    """Numbers that no run can have reached."""
    counts, gate = state.counts, state.gate
    finite = counts.steps - counts.nonfinite_steps
    limits = (
        ("compression_steps", counts.compression_steps, "steps", counts.steps),
        ("nonfinite_steps", counts.nonfinite_steps, "steps", counts.steps),
        ("nonfinite_run", counts.nonfinite_run, "nonfinite_steps", counts.nonfinite_steps),
        ("unjudged_steps", counts.unjudged_steps, "steps - nonfinite_steps", finite),
        *(
            (f"gate.{name}", value, "steps - nonfinite_steps", finite)
            for name, value in asdict(gate).items()
            if isinstance(value, int)
        ),
    )
    for path, value, limit, most in limits:
        if value > most:
            raise _refusal(path, f"must be at most {limit} = {most}", value)
    if counts.unjudged_steps == 0:
        for path in ("unjudged_loss", "unjudged_entropy"):
            if getattr(counts, path) != 0:
                raise _refusal(path, "must be 0 where unjudged_steps is 0", getattr(counts, path))
    if not set(counts.targets) <= set(state.layers):
        raise _refusal("targets", f"must be of some of the layers {state.layers}", counts.targets)


def _refusal(path: str, why: str, found: Any, *, missing: bool = False) -> ValueError:
    text = "nothing" if missing else f"{found!r:.100} ({type(found).__name__})"
    where = path if path == STATE_KEY else f"{STATE_KEY}.{path}"
    return ValueError(f"state_dict: {where} {why}, found {text}; load an undamaged checkpoint, or, {START_FRESH}")


def bare_name(name: str) -> str:
    """A name without what DistributedDataParallel, torch.compile and checkpoints put into it."""
    wrappers = ("_orig_mod.", "_checkpoint_wrapped_module.")
    return functools.reduce(lambda name, part: name.replace(part, ""), wrappers, name).removeprefix("module.")


def flat_state(state: Mapping[str, Any]) -> dict[str, str]:
    """A state by dotted paths, for ranks to compare: each rank records the held-out losses that it has."""
    return {path: repr(value) for path, value in flattened(state).items() if path != "unjudged_validation"}


def flattened(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in values.items():
        flat |= flattened(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {prefix + name: value}
    return flat
