"""First aid: what a run's metrics say about its gate, its weight and its entropies."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from statistics import median
from typing import Any, NamedTuple

from ..config import GAPTConfig, GateConfig
from .findings import (
    CONSTANT_PENALTY,
    FINDINGS,
    GATE_UNKNOWN,
    MAYBE_FROZEN,
    NO_SETTINGS,
    NO_STEPS,
    NOT_ALL_SEEN,
    NOTHING_FOUND,
    PLAIN_RUN,
    SETTINGS_FOREIGN,
    SETTINGS_UNKNOWN,
    SETTINGS_UNUSED,
    Diagnosis,
)
from .history import Record, RunHistory, compression_spans, switches_of, values_of

Points = list[tuple[float, float]]


def diagnose(run: RunHistory) -> list[Diagnosis]:
    """What is wrong with a run, the most basic first; empty where nothing stands out.

    >>> falling = [{"step": i, "phase": "memorization", "loss": 100 / i, "entropy": 1.5} for i in range(1, 500)]
    >>> [found.key for found in diagnose(RunHistory(falling))]
    ['never_compressed']
    """
    if not run.steps:
        return []
    case = _Case(run)
    found = [*case.gate(), *case.weight(), *case.layers(), *case.kernels(), *case.numbers()]
    order = list(FINDINGS)
    return sorted(found, key=lambda diagnosis: order.index(diagnosis.key))


def verdict(run: RunHistory, found: Sequence[Diagnosis]) -> str:
    """One sentence on a run for which :func:`diagnose` found nothing; empty where it found something."""
    if found:
        return ""
    if not run.steps:
        return NO_STEPS
    case = _Case(run)
    if not case.spans and case.setting("gate", "frozen"):
        return PLAIN_RUN
    if case.setting("gate", "frozen"):
        return CONSTANT_PENALTY
    keys = {"loss": "loss", "entropy": "entropy", "measures.centered_cosine_entropy": "measures"}
    missing = [name for key, name in keys.items() if not values_of(run.steps, key)]
    return NOT_ALL_SEEN.format(missing=" and no ".join(missing)) if missing else NOTHING_FOUND


def judged_by(run: RunHistory) -> list[str]:
    """Where a run is judged by default settings instead of its own, in a sentence each; empty where its own are known.

    >>> judged_by(RunHistory([{"step": 1}]))
    ['No settings.json: judged by the defaults']
    """
    if not run.steps:
        return []
    settings, case = run.settings, _Case(run)
    if not settings:
        # The note that it is empty or could not be read is shown beside this.
        useless = any(note.startswith("settings.json") for note in run.notes)
        return [SETTINGS_UNKNOWN if useless else NO_SETTINGS]
    held = {section: table for section in case.defaults if (table := find_section(settings, section))}
    if not (held or case.gate_known):
        return [SETTINGS_FOREIGN.format(found=_listed(list(settings)))]
    said = [] if case.gate_known else [GATE_UNKNOWN]
    unused = [
        f"{section}.{name}"
        for section, table in held.items()
        for name, value in table.items()
        if name not in case.defaults[section] or (section == "gate" and not _fits(value, case.defaults[section][name]))
    ]
    if unused:
        are, their = ("is", "its") if len(unused) == 1 else ("are", "their")
        said.append(SETTINGS_UNUSED.format(found=_listed(unused), are=are, their=their))
    return said


# What the methods of a comparison are, besides the one whose gate its settings hold.
_GATES = {
    "plain": GateConfig(frozen=True),
    "penalty": GateConfig(frozen=True, initial_phase="compression"),
    "published": GateConfig.published(),
}


class _Evasion(NamedTuple):
    fell: float
    """Share by which the pressed entropy fell."""
    kept: float
    """Share by which the centred cosine entropy fell, at least 0."""
    before: float
    after: float
    """What may hide in the entropy, before compression and after."""


class _Case:
    def __init__(self, run: RunHistory) -> None:
        self.run = run
        self.steps = run.steps
        self.n = len(run.steps)
        self.spans = compression_spans(run.steps)
        self.switches = switches_of(run.steps)
        self.losses = values_of(run.steps, "loss")
        self.method = str(run.settings.get("method"))
        self.defaults = GAPTConfig().model_dump()

    def setting(self, section: str, name: str) -> Any:
        """A setting of the run; the library's default where the run does not say."""
        table = find_section(self.run.settings, section)
        if section == "gate" and self.method in _GATES:
            table = _GATES[self.method].model_dump()  # its own, not that of the method beside it
        value, default = table.get(name), self.defaults[section][name]
        return value if _fits(value, default) else default

    @property
    def gate_known(self) -> bool:
        """The run says how its gate was set."""
        return bool(find_section(self.run.settings, "gate")) or self.method in _GATES

    def gate(self) -> list[Diagnosis]:
        if self.setting("gate", "frozen"):
            return []
        found = [] if self.spans else self._never()
        overfit = self._overfits()
        if overfit is not None and self.setting("gate", "signal") == "train":
            found.append(overfit)
        if not self.spans:
            return found
        first = self.spans[0][0]
        patience = self.setting("gate", "patience_memorization")
        then, last = _near(self.losses, first), _tail(self.losses)
        soon = first <= max(patience + 3, 0.03 * self.n) and self.n >= 4 * first
        if soon and then is not None and last is not None and last < 0.8 * then:
            found.append(_diagnosis("compressed_at_once", at=first, steps=self.n, then=then, last=last))
        lengths = [end - begin + 1 for begin, end in self.spans]
        exits = [reason for _, phase, reason in self.switches if phase == "memorization"]
        spikes = exits.count("spike")
        if len(exits) >= 3 and spikes >= 0.6 * len(exits):
            found.append(
                _diagnosis(
                    "spiked",
                    spikes=spikes,
                    exits=len(exits),
                    tolerance=100 * self.setting("gate", "spike_tolerance"),
                    length=median(lengths),
                )
            )
        elif len(self.spans) >= 3 and median(lengths) <= 3:
            share = sum(lengths) / self.n
            found.append(_diagnosis("short_phases", phases=len(lengths), length=median(lengths), share=share))
        begin, end = self.spans[-1]
        if end >= self.steps[-1]["step"] and lengths[-1] > max(0.4 * self.n, 4 * self._patience_compression()):
            entropy = _tail(values_of(self.steps, "entropy"))
            if entropy is not None:
                found.append(
                    _diagnosis(
                        "stuck_in_compression",
                        at=begin,
                        length=lengths[-1],
                        share=lengths[-1] / self.n,
                        entropy=entropy,
                    )
                )
        return found

    def _patience_compression(self) -> int:
        return int(self.setting("gate", "patience_compression"))

    def _never(self) -> list[Diagnosis]:
        patience = self.setting("gate", "patience_memorization")
        if self.setting("gate", "signal") == "validation":
            validations = len(values_of(self.steps, "validation_loss")) or len(self.run.validations)
            if validations <= patience:
                return [_diagnosis("few_validations", validations=validations, steps=self.n, patience=patience)]
        elif self.n <= patience:
            return [_diagnosis("too_short", updates=self.n, patience=patience)]
        head, last = _head(self.losses), _tail(self.losses)
        if head is None or last is None:
            return []
        improvement = 100 * self.setting("gate", "min_improvement")
        found = _diagnosis(
            "never_compressed", steps=self.n, first=head, last=last, patience=patience, improvement=improvement
        )
        return [found if self.gate_known else replace(found, what=f"{found.what} {MAYBE_FROZEN}")]

    def _overfits(self) -> Diagnosis | None:
        held_out = values_of(self.run.validations, "loss")
        if len(held_out) < 4:
            return None
        at, best = min(held_out, key=lambda point: point[1])
        last, training = held_out[-1][1], _tail(self.losses)
        then = _near(self.losses, at)
        if training is None or then is None or last < 1.02 * best or training > 0.98 * then:
            return None
        return _diagnosis("overfits_unseen", best=best, at=int(at), last=last, training=training)

    def weight(self) -> list[Diagnosis]:
        if not self.spans:
            return []
        inside = [record for record in self.steps if record.get("phase") == "compression"]
        shares = [share for _, share in values_of(inside, "entropy_share")]
        change = self._change("entropy")
        if len(shares) < 5 or change is None:
            return []
        share, (before, after) = median(shares), change
        found = []
        relative = after / before - 1 if before else 0.0
        if share < 0.01 and relative > -0.05:
            found.append(_diagnosis("weight_too_small", share=share, change=relative))
        loss = self._change("loss")
        if share > 0.4 and loss is not None and loss[1] > 1.05 * loss[0]:
            found.append(_diagnosis("weight_too_large", share=share, before=loss[0], after=loss[1]))
        return found

    def layers(self) -> list[Diagnosis]:
        if not self.spans or self.setting("entropy", "normalize"):
            return []
        rows = [(record["step"], record["layer_entropy"]) for record in self.steps if record.get("layer_entropy")]
        if not rows:
            return []
        pressed = {}
        for name in rows[-1][1]:
            points = [(step, values[name]) for step, values in rows if values.get(name) is not None]
            before, after = _before(points, self.spans[0][0]), _tail(points)
            if before is not None and after is not None and after < 0.1 and before > 0.3:
                pressed[name] = (before, after)
        if not pressed or self._by_norms() is not None or self._by_mean() is not None:
            return []
        name = min(pressed, key=lambda layer: pressed[layer][1])
        before, after = pressed[name]
        layers = f"Layer {name}" if len(pressed) == 1 else f"Of {len(pressed)} such layers the lowest, {name},"
        return [_diagnosis("pressed_below_use", layers=layers, entropy=after, rank=math.exp(after), before=before)]

    def kernels(self) -> list[Diagnosis]:
        found = [self._by_norms(), self._by_mean()]
        return [diagnosis for diagnosis in found if diagnosis is not None]

    def _by_norms(self) -> Diagnosis | None:
        found = self._evasion("measures.linear_entropy", "measures.norm_ratio")
        if found is None or found.after < 1.5 * found.before:
            return None
        ratios = {"ratio_before": found.before, "ratio_after": found.after}
        return _diagnosis("norms_alone", linear=found.fell, cosine=found.kept, **ratios)

    def _by_mean(self) -> Diagnosis | None:
        found = self._evasion("entropy", "measures.mean_share")
        if found is None or found.after < found.before + 0.2:
            return None
        shares = {"share_before": found.before, "share_after": found.after}
        return _diagnosis("common_vector", pressed=found.fell, cosine=found.kept, **shares)

    def _evasion(self, pressed: str, hides: str) -> _Evasion | None:
        """An entropy that fell while the centred cosine entropy did not, and what may hide in it; None otherwise."""
        entropy, cosine, hidden = (self._change(key) for key in (pressed, "measures.centered_cosine_entropy", hides))
        if entropy is None or cosine is None or hidden is None or not entropy[0] or not cosine[0]:
            return None
        fell, kept = 1 - entropy[1] / entropy[0], 1 - cosine[1] / cosine[0]
        return None if fell < 0.2 or kept > 0.3 * fell else _Evasion(fell, max(kept, 0.0), *hidden)

    def numbers(self) -> list[Diagnosis]:
        counts = [count for _, count in values_of(self.steps, "nonfinite_steps")]
        if counts and counts[-1] > 0.002 * self.n:
            return [_diagnosis("not_finite", nonfinite=int(counts[-1]), steps=self.n)]
        return []

    def _change(self, key: str) -> tuple[float, float] | None:
        """A value before the first compression and at the end of the last; None where either is missing."""
        if not self.spans:
            return None
        points = values_of(self.steps, key)
        before, after = _before(points, self.spans[0][0]), _near(points, self.spans[-1][1])
        return None if before is None or after is None else (before, after)


def find_section(settings: Record, section: str) -> Record:
    """The table of that name in a run's settings, however deep it lies; empty where there is none."""
    value = settings.get(section)
    if isinstance(value, dict):
        return value
    for inner in settings.values():
        if isinstance(inner, dict) and (found := find_section(inner, section)):
            return found
    return {}


def _fits(value: Any, default: Any) -> bool:
    """A value is of the kind of a setting's default."""
    if isinstance(default, bool) or not isinstance(default, int | float):
        return isinstance(value, type(default))
    return isinstance(value, int | float) and not isinstance(value, bool)


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _diagnosis(key: str, **figures: Any) -> Diagnosis:
    return Diagnosis(FINDINGS[key], FINDINGS[key].filled(**figures))


def _width(points: Points) -> int:
    return max(1, min(20, len(points) // 20))


def _tail(points: Points) -> float | None:
    values = [value for _, value in points[-_width(points) :]]
    return sum(values) / len(values) if values else None


def _head(points: Points) -> float | None:
    values = [value for _, value in points[: _width(points)]]
    return sum(values) / len(values) if values else None


def _near(points: Points, step: float) -> float | None:
    """Mean of the last values up to a step."""
    return _tail([point for point in points if point[0] <= step])


def _before(points: Points, step: float) -> float | None:
    """Mean of the last values before a step; the first value where there is none."""
    earlier = [point for point in points if point[0] < step]
    return _tail(earlier) if earlier else points[0][1] if points else None
