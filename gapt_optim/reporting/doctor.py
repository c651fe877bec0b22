"""First aid: what a run's metrics say about its gate, its weight and its entropies."""

from __future__ import annotations

import math
from dataclasses import replace
from statistics import median
from typing import Any

from pandas import DataFrame, Series

from ..config import GAPTConfig
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
    SETTINGS_UNUSED,
    Diagnosis,
)
from .run import Run, compression_spans, section_of, switches

_HIDES = ("centered_cosine_entropy", "norm_ratio", "mean_share")


def diagnose(run: Run) -> list[Diagnosis]:
    """What is wrong with a run, the most basic first; empty where nothing stands out.

    >>> falling = [{"step": i, "phase": "memorization", "loss": 100 / i, "entropy": 1.5} for i in range(1, 500)]
    >>> [found.key for found in diagnose(Run.of(falling))]
    ['never_compressed']
    """
    if run.steps.empty:
        return []
    case = _Case(run)
    found = [*case.gate(), *case.weight(), *case.layers(), *case.evasion(), *case.numbers()]
    order = list(FINDINGS)
    return sorted(found, key=lambda diagnosis: order.index(diagnosis.key))


def verdict(run: Run) -> str:
    """One sentence on a run for which :func:`diagnose` found nothing."""
    if run.steps.empty:
        return NO_STEPS
    case = _Case(run)
    if case.setting("gate", "frozen"):
        return CONSTANT_PENALTY if case.spans else PLAIN_RUN
    columns = {"loss": "loss", "entropy": "entropy", "centered_cosine_entropy": "measures"}
    missing = [name for column, name in columns.items() if run.steps[column].isna().all()]
    return NOT_ALL_SEEN.format(missing=" and no ".join(missing)) if missing else NOTHING_FOUND


def judged_by(run: Run) -> list[str]:
    """Where a run is judged by default settings instead of its own, in a sentence each; empty where its own are known.

    >>> judged_by(Run.of([{"step": 1}]))
    ['No settings of gapt_optim were found: judged by the defaults']
    """
    if run.steps.empty:
        return []
    case = _Case(run)
    held = {section: section_of(run.settings, section) for section in case.defaults}
    if not (any(held.values()) or case.gate_known):
        return [NO_SETTINGS]
    said = [] if case.gate_known else [GATE_UNKNOWN]
    unused = [f"gate.{name}" for name in held["gate"] if name not in case.defaults["gate"]]
    return [*said, SETTINGS_UNUSED.format(found=", ".join(unused))] if unused else said


class _Case:
    """A run, and what its settings say."""

    def __init__(self, run: Run) -> None:
        self.run, self.steps = run, run.steps
        self.n = len(run.steps)
        self.spans = compression_spans(run.steps)
        self.defaults = GAPTConfig().model_dump()
        self.gate_known = bool(section_of(run.settings, "gate"))
        """The run says how its gate was set."""
        rising = section_of(run.settings, "objective").get("direction") == "up"
        self.sign = 1 if rising else -1
        self.moved = "rose" if rising else "fell"

    def setting(self, section: str, name: str) -> Any:
        """A setting of the run; the library's default where the run does not say."""
        table = section_of(self.run.settings, section)
        value, default = table.get(name), self.defaults[section][name]
        return value if isinstance(value, int | float if isinstance(default, float) else type(default)) else default

    def gate(self) -> list[Diagnosis]:
        if self.setting("gate", "frozen"):
            return []
        overfit = self._overfits() if self.setting("gate", "signal") == "train" else []
        if not self.spans:
            return [*self._never(), *overfit]
        return [*overfit, *self._at_once(), *self._short(), *self._stuck()]

    def _never(self) -> list[Diagnosis]:
        patience = self.setting("gate", "patience_memorization")
        if self.setting("gate", "signal") == "validation":
            validations = self.steps.validation_loss.count() or len(self.run.held_out)
            if validations <= patience:
                return [_found("few_validations", validations=validations, steps=self.n, patience=patience)]
        elif self.n <= patience:
            return [_found("too_short", updates=self.n, patience=patience)]
        first, last = _tail(self.steps.loss.dropna()[: _width(self.steps.loss)]), _tail(self.steps.loss)
        if math.isnan(last):
            return []
        improvement = 100 * self.setting("gate", "min_improvement")
        found = _found(
            "never_compressed", steps=self.n, first=first, last=last, patience=patience, improvement=improvement
        )
        return [found if self.gate_known else replace(found, what=f"{found.what} {MAYBE_FROZEN}")]

    def _overfits(self) -> list[Diagnosis]:
        held_out = self.run.held_out.loss.dropna()
        if len(held_out) < 4:
            return []
        at, best, last = int(held_out.idxmin()), held_out.min(), held_out.iloc[-1]
        training, then = _tail(self.steps.loss), _tail(self.steps.loss[:at])
        if last >= 1.02 * best and training <= 0.98 * then:
            return [_found("overfits_unseen", best=best, at=at, last=last, training=training)]
        return []

    def _at_once(self) -> list[Diagnosis]:
        first = self.spans[0][0]
        soon = max(self.setting("gate", "patience_memorization") + 3, 0.03 * self.n)
        then, last = _tail(self.steps.loss[:first]), _tail(self.steps.loss)
        if first <= soon and self.n >= 4 * first and last < 0.8 * then:
            return [_found("compressed_at_once", at=first, steps=self.n, then=then, last=last)]
        return []

    def _short(self) -> list[Diagnosis]:
        lengths = [end - begin + 1 for begin, end in self.spans]
        switched = switches(self.steps)
        exits = switched.reason[switched.next_phase == "memorization"]
        spikes = int((exits == "spike").sum())
        length = median(lengths)
        if len(exits) >= 3 and spikes >= 0.6 * len(exits):
            tolerance = 100 * self.setting("gate", "spike_tolerance")
            return [_found("spiked", spikes=spikes, exits=len(exits), tolerance=tolerance, length=length)]
        if len(lengths) >= 3 and length <= 3:
            return [_found("short_phases", phases=len(lengths), length=length, share=sum(lengths) / self.n)]
        return []

    def _stuck(self) -> list[Diagnosis]:
        begin, end = self.spans[-1]
        length, entropy = end - begin + 1, _tail(self.steps.entropy)
        enough = max(0.4 * self.n, 4 * self.setting("gate", "patience_compression"))
        if end < self.steps.index[-1] or length <= enough or math.isnan(entropy):
            return []
        return [_found("stuck_in_compression", at=begin, length=length, share=length / self.n, entropy=entropy)]

    def weight(self) -> list[Diagnosis]:
        shares = self.steps.entropy_share[self.steps.phase == "compression"].dropna()
        entropy, loss = self._change(self.steps.entropy), self._change(self.steps.loss)
        if len(shares) < 5 or entropy is None:
            return []
        share, found = shares.median(), []
        relative = entropy[1] / entropy[0] - 1 if entropy[0] else 0.0
        if share < 0.01 and self.sign * relative < 0.05:
            found.append(_found("weight_too_small", share=share, change=relative))
        if share > 0.4 and loss is not None and loss[1] > 1.05 * loss[0]:
            found.append(_found("weight_too_large", share=share, before=loss[0], after=loss[1]))
        return found

    def layers(self) -> list[Diagnosis]:
        """A layer that was pressed down to where it holds nothing."""
        if self.sign > 0 or self.setting("entropy", "normalize") or self.evasion():
            return []
        pressed = {}
        for name, values in self.run.layers.get("entropy", DataFrame()).items():
            change = self._change(values)
            if change is not None and _tail(values) < 0.1 and change[0] > 0.3:
                pressed[str(name)] = (_tail(values), change[0])
        if not pressed:
            return []
        name, (after, before) = min(pressed.items(), key=lambda item: item[1][0])
        layers = f"Layer {name}" if len(pressed) == 1 else f"Of {len(pressed)} such layers the lowest, {name},"
        return [_found("pressed_below_use", layers=layers, entropy=after, rank=math.exp(after), before=before)]

    def evasion(self) -> list[Diagnosis]:
        """An entropy that moved while the centred cosine entropy did not: of all layers together, else of the worst."""
        mean = self._evaded("all layers", self.steps, least=0.2, most=0.3)
        if mean is not None:
            return [mean[1]]
        measured = {key: self.run.layers.get(key, DataFrame()) for key in ("entropy", *_HIDES)}
        names = [name for name in measured["entropy"] if all(name in frame for frame in measured.values())]
        layers = {name: DataFrame({key: frame[name] for key, frame in measured.items()}) for name in names}
        found = [
            one
            for name, values in layers.items()
            if (one := self._evaded(f"layer {name}", values, least=0.5, most=0.2))
        ]
        return [max(found, key=lambda one: one[0])[1]] if found else []

    def _evaded(self, where: str, values: DataFrame, least: float, most: float) -> tuple[float, Diagnosis] | None:
        """By how much an entropy moved, and which of the two ways out was taken: that which went further of its way.

        It must have moved by the share ``least``, and the centred cosine entropy at most by the share ``most`` of that.
        """
        changes = [self._change(values[key]) for key in ("entropy", *_HIDES)]
        entropy, cosine, ratio, share = (change or (math.nan, math.nan) for change in changes)
        by, kept = (self.sign * (after / before - 1) if before else math.nan for before, after in (entropy, cosine))
        if not (by >= least and kept <= most * by):
            return None
        first, last = (0, 1) if self.sign < 0 else (1, 0)  # a rise goes the way back
        longer = 1 - ratio[first] / ratio[last] if ratio[last] > 0 else 0.0
        shared = (share[last] - share[first]) / max(1 - share[first], 1e-9)
        if math.isnan(longer + shared) or max(longer, shared) < 0.25:
            return None
        key, hidden = ("norms_alone", ratio) if longer > shared else ("common_vector", share)
        figures = {"by": by, "cosine": kept if kept > 0 else 0.0, "hidden_before": hidden[0], "hidden_after": hidden[1]}
        return by, _found(key, moved=self.moved, where=where, **figures)

    def numbers(self) -> list[Diagnosis]:
        counts = self.steps.nonfinite_steps.dropna()
        if len(counts) and counts.iloc[-1] > 0.002 * self.n:
            return [_found("not_finite", nonfinite=int(counts.iloc[-1]), steps=self.n)]
        return []

    def _change(self, values: Series) -> tuple[float, float] | None:
        """Before the first compression and at the end of the last, of what is there; None where either is missing."""
        there = values.dropna()
        if not self.spans or there.empty:
            return None
        before, after = there[there.index < self.spans[0][0]], there[there.index <= self.spans[-1][1]]
        if after.empty:
            return None
        return (_tail(before) if len(before) else float(there.iloc[0])), _tail(after)


def _found(key: str, **figures: Any) -> Diagnosis:
    return Diagnosis(FINDINGS[key], FINDINGS[key].what.format(**figures))


def _width(values: Series) -> int:
    return max(1, min(20, int(values.count()) // 20))


def _tail(values: Series) -> float:
    """Mean of the last values; NaN for none."""
    return float(values.dropna()[-_width(values) :].mean())
