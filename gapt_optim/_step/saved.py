"""What a checkpoint holds of a run, checked before anything is loaded.

Imported when a state is loaded: pydantic takes a while to build these models.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from .._version import __version__
from ..config import GAPTConfig
from ..several import START_FRESH, STATE_KEY
from .progress import flattened

_Count = Annotated[int, Field(ge=0, lt=2**63)]


class _Saved(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class _SavedGate(_Saved):
    phase: Literal["memorization", "compression"]
    switches: _Count
    updates: _Count
    stale: _Count
    loss: float | None
    entropy: float | None
    best: float | None
    training_loss: float | None
    entry_loss: float | None
    entry_entropy: float | None = None
    stale_memorization: _Count
    stale_compression: _Count
    lowest_loss: float | None
    lowest_entropy: float | None


class _SavedLevel(_Saved):
    pressed: float
    cosine: float
    norm_ratio: float
    mean_share: float


class _SavedEvasion(_Saved):
    compressed: bool = False
    warned: bool = False
    now: dict[str, _SavedLevel] = {}
    before: dict[str, _SavedLevel] = {}


class _SavedState(_Saved):
    gate: _SavedGate
    evasion: _SavedEvasion = _SavedEvasion()
    steps: _Count
    compression_steps: _Count
    nonfinite_steps: _Count
    nonfinite_run: _Count
    unjudged_loss: float
    unjudged_entropy: float
    unjudged_steps: _Count
    unjudged_validation: list[float]
    learning_rate: float | None = None
    layers: list[str]
    ran: list[str]
    config: GAPTConfig


REQUIRED = (
    "entropy.kernel",
    "entropy.center",
    "entropy.alpha",
    "entropy.window",
    "entropy.normalize",
    "layers.skip_first",
    "layers.skip_last",
    "gate.rule",
    "gate.signal",
)
"""Settings that a saved state depends on, besides the layers: its entropies and losses would be of another kind."""


def checked_state(saved: Any, layers: Sequence[str], config: GAPTConfig) -> tuple[dict[str, Any], str | None]:
    """A saved state, checked by type, range and meaning against the layers and settings of now.

    Args:
        saved: what ``GAPTOptimizer`` has put into a state dict, read from JSON.
        layers: names of the tapped layers.

    Returns:
        The state with the layers' names of now, and one line on the settings that differ, None where none does.

    Raises:
        ValueError: a field does not fit; the message names it, what was found and what to do.
    """
    if not isinstance(saved, dict):
        raise _refusal(STATE_KEY, "must be an object", saved)
    try:
        state = _SavedState.model_validate(saved, strict=True)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        path = ".".join(map(str, first["loc"]))
        if first["type"] == "extra_forbidden":
            raise ValueError(
                f"state_dict: {STATE_KEY}.{path}={first['input']!r:.100} is unknown to gapt_optim {__version__}; load "
                f"it with the version that saved it, or, {START_FRESH}"
            ) from None
        found = "nothing" if first["type"] == "missing" else first["input"]
        raise _refusal(path, f"is refused: {first['msg']}", found, missing=first["type"] == "missing") from None
    if _bare_names(state.layers) != _bare_names(list(layers)):
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
    now = dict(zip(state.layers, layers, strict=True))
    result = state.model_dump() | {"layers": list(layers), "ran": [now[name] for name in state.ran]}
    for when in ("now", "before"):
        result["evasion"][when] = {now[name]: level for name, level in result["evasion"][when].items()}
    return result, notice


def _refuse_contradictions(state: _SavedState) -> None:
    """Numbers that no run can have reached."""
    finite = state.steps - state.nonfinite_steps
    limits = (
        ("compression_steps", state.compression_steps, "steps", state.steps),
        ("nonfinite_steps", state.nonfinite_steps, "steps", state.steps),
        ("nonfinite_run", state.nonfinite_run, "nonfinite_steps", state.nonfinite_steps),
        ("unjudged_steps", state.unjudged_steps, "steps - nonfinite_steps", finite),
        ("gate.switches", state.gate.switches, "steps - nonfinite_steps", finite),
        ("gate.updates", state.gate.updates, "steps - nonfinite_steps", finite),
        ("gate.stale", state.gate.stale, "steps - nonfinite_steps", finite),
        ("gate.stale_memorization", state.gate.stale_memorization, "steps - nonfinite_steps", finite),
        ("gate.stale_compression", state.gate.stale_compression, "steps - nonfinite_steps", finite),
    )
    for path, value, limit, most in limits:
        if value > most:
            raise _refusal(path, f"must be at most {limit} = {most}", value)
    if state.unjudged_steps == 0:
        for path, total in (("unjudged_loss", state.unjudged_loss), ("unjudged_entropy", state.unjudged_entropy)):
            if total != 0:
                raise _refusal(path, "must be 0 where unjudged_steps is 0", total)
    if len(set(state.ran)) != len(state.ran) or not set(state.ran) <= set(state.layers):
        raise _refusal("ran", f"must be some of the layers {state.layers}, each once", state.ran)
    for when, levels in (("now", state.evasion.now), ("before", state.evasion.before)):
        if not set(levels) <= set(state.layers):
            raise _refusal(f"evasion.{when}", f"must be of some of the layers {state.layers}", list(levels))


def _refusal(path: str, why: str, found: Any, *, missing: bool = False) -> ValueError:
    text = "nothing" if missing else f"{found!r:.100} ({type(found).__name__})"
    where = path if path == STATE_KEY else f"{STATE_KEY}.{path}"
    return ValueError(f"state_dict: {where} {why}, found {text}; load an undamaged checkpoint, or, {START_FRESH}")


def _bare_names(names: list[str]) -> list[str]:
    """Names without what DistributedDataParallel and torch.compile put before them."""
    wrappers = ("_orig_mod.", "_checkpoint_wrapped_module.")
    return [
        functools.reduce(lambda name, part: name.replace(part, ""), wrappers, n).removeprefix("module.") for n in names
    ]
