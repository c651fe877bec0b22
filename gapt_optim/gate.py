"""The gate: a state machine that picks the phase of the next step from two numbers.

It works on plain numbers. Feed it a loss and an entropy per update and read ``phase``.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from enum import Enum
from typing import Annotated, Any, Literal

from pydantic import Field

from .config import GateConfig


class Phase(str, Enum):
    """What a training step minimizes.

    >>> Phase("compression") is Phase.COMPRESSION
    True
    """

    MEMORIZATION = "memorization"
    """The task loss alone."""

    COMPRESSION = "compression"
    """The task loss plus the weighted entropy of the representations."""

    def __str__(self) -> str:
        return self.value


Count = Annotated[int, Field(ge=0, lt=2**63)]


@dataclass
class GateState:
    """Everything the gate remembers, as a checkpoint holds it. `smoothed` and `published` each use their part."""

    phase: Literal["memorization", "compression"]
    switches: Count = 0
    updates: Count = 0
    """smoothed: counted in the first phase, until its entry_loss has settled"""
    stale: Count = 0
    """smoothed: updates since the watched average last improved"""
    loss: float | None = None
    """smoothed: moving average, as the four below"""
    entropy: float | None = None
    training_loss: float | None = None
    """that of ``loss``, unless that is held out"""
    last_loss: float | None = None
    """smoothed: of the training loss, as the two below"""
    last_move: float = 0.0
    """from the loss before that to the last"""
    spread: float = 0.0
    """of the loss in memorization: what compression does to it is no noise"""
    best: float | None = None
    """smoothed: best value of the watched average in this phase"""
    entry_loss: float | None = None
    """smoothed: averaged training loss when this phase began"""
    entry_entropy: float | None = None
    stale_memorization: Count = 0
    """published: s_m"""
    stale_compression: Count = 0
    """published: s_c"""
    lowest_loss: float | None = None
    """published: E"""
    lowest_entropy: float | None = None
    """published: M"""


Reason = Literal["plateau", "spike", "compressed"]
"""Why a phase ends."""
REASONS: dict[Reason, str] = {
    "plateau": "the loss stopped falling",
    "spike": "the loss rose",
    "compressed": "the entropy stopped moving",
}
"""What each says, in a sentence."""

_SPREAD_DECAY = 0.9
_SPREADS = 20
"""A level is at least so many spreads: the noise of a loss is then a small share of it, whatever its mean is."""


class PhaseGate:
    """Decides between memorization and compression.

    `smoothed` keeps exponential moving averages of loss and entropy. In memorization it watches
    the loss and starts compression when that has not improved for ``patience_memorization``
    updates. In compression it watches the entropy, returns to memorization when that has not improved for
    ``patience_compression`` updates, or immediately when the loss rises by ``spike_tolerance`` over
    its level at the start of compression. Improvements are judged within the present phase.
    The spike threshold is about 95 % of the tolerance, the part of a rise that a moving average
    shows after three time constants: a lasting rise beyond the tolerance ends compression by then.
    A run that starts in compression takes its level from the first two time constants.
    During a learning-rate warm-up, a loss that does not fall does not count as a plateau.

    With ``signal="validation"`` the gate watches a held-out loss, while the rise that ends
    compression is one of the training loss: a held-out loss that rises while the training loss falls
    is overfitting, not harm done by compression.

    `published` is the rule of arXiv 2505.08727: single values against their all-time minima.

    >>> from gapt_optim import GateConfig
    >>> gate = PhaseGate(GateConfig(patience_memorization=5))
    >>> for _ in range(6):
    ...     phase = gate.update(loss=2.0, entropy=1.5)
    >>> print(phase, gate.reason)
    compression plateau

    Args:
        config: rule and thresholds; see :class:`gapt_optim.GateConfig`.

    Attributes:
        reason: why the last update switched, one of ``REASONS``: ``"plateau"`` starts compression, ``"spike"`` and
            ``"compressed"`` start memorization. None when it did not switch.
    """

    def __init__(self, config: GateConfig | None = None) -> None:
        self.config = config if config is not None else GateConfig()
        self.reason: Reason | None = None
        self._state = GateState(phase=self.config.initial_phase)

    @property
    def phase(self) -> Phase:
        return Phase(self._state.phase)

    @property
    def switches(self) -> int:
        """Number of phase switches so far."""
        return self._state.switches

    def update(
        self, loss: float, entropy: float, *, training_loss: float | None = None, warming_up: bool = False
    ) -> Phase:
        """Take one loss and one entropy, return the phase of the next step.

        Non-finite values are ignored, and no rule sees them: the phase stays and nothing is remembered.

        Args:
            loss: the loss that is judged, on any scale; nats for cross-entropy.
            entropy: the entropy that compression minimizes, nats or in [0, 1].
            training_loss: if ``loss`` is held out, the training loss at that time.
            warming_up: the learning rate is rising: `smoothed` then does not count the update towards a plateau.
                `published` ignores it.
        """
        self.reason = None
        loss, entropy = float(loss), float(entropy)  # a tensor or numpy number would stay in the state
        training_loss = loss if training_loss is None else float(training_loss)
        if self.config.frozen or not all(map(math.isfinite, (loss, entropy, training_loss))):
            return self.phase
        if self.config.rule == "smoothed":
            self.reason = self._smoothed(loss, entropy, training_loss, warming_up=warming_up)
        else:
            assert self.config.rule == "published"
            self.reason = self._published(loss, entropy)
        if self.reason is not None:
            compressing = self._state.phase == Phase.COMPRESSION.value
            self._state.phase = (Phase.MEMORIZATION if compressing else Phase.COMPRESSION).value
            self._state.switches += 1
        return self.phase

    def _smoothed(self, loss: float, entropy: float, training_loss: float, *, warming_up: bool) -> Reason | None:
        config, s = self.config, self._state
        self._follow_spread(training_loss)
        s.loss = _average(s.loss, loss, config.smoothing)
        s.entropy = _average(s.entropy, entropy, config.smoothing)
        s.training_loss = _average(s.training_loss, training_loss, config.smoothing)
        if s.switches == 0 and s.updates < _updates_within(2, config.smoothing):
            # A run that starts in compression has no level yet: a single noisy loss is none to judge a rise against.
            s.updates, s.entry_loss, s.entry_entropy = s.updates + 1, s.training_loss, s.entropy
        compressing, watches_training = s.phase == Phase.COMPRESSION.value, config.signal == "train"
        entry = s.training_loss if s.entry_loss is None else s.entry_loss

        watched = s.entropy if compressing else s.loss
        # An entropy that shrinks to nothing goes on falling relative to itself: it is judged by its level at the start.
        level = s.entry_entropy if compressing and s.entry_entropy is not None else s.best
        scale = _scale(level or s.best, s.spread if watches_training and not compressing else 0.0)
        if s.best is None or watched < s.best - config.min_improvement * scale:
            s.best, s.stale = watched, 0
        elif compressing or not warming_up:
            s.stale += 1
        shown = 1 - config.smoothing ** _updates_within(3, config.smoothing)
        tolerance = config.spike_tolerance * shown * _scale(entry, s.spread)
        if compressing and s.training_loss - entry > tolerance:
            reason: Reason = "spike"
        elif not compressing and s.stale >= config.patience_memorization:
            reason = "plateau"
        elif compressing and s.stale >= config.patience_compression:
            reason = "compressed"
        else:
            return None
        s.best, s.stale, s.entry_loss, s.entry_entropy = None, 0, s.training_loss, s.entropy
        return reason

    def _follow_spread(self, loss: float) -> None:
        """Noise bends a curve at every update; a trend hardly does, so its bends are what is averaged."""
        s = self._state
        move = 0.0 if s.last_loss is None else loss - s.last_loss
        if s.phase == Phase.MEMORIZATION.value and s.last_loss is not None:
            bend = abs(move - s.last_move) / math.sqrt(6)
            s.spread = _SPREAD_DECAY * s.spread + (1 - _SPREAD_DECAY) * bend
        s.last_loss, s.last_move = loss, move

    def _published(self, loss: float, entropy: float) -> Reason | None:
        config, s = self.config, self._state
        loss_gain, entropy_gain = _gain(s.lowest_loss, loss), _gain(s.lowest_entropy, entropy)
        s.lowest_loss = loss if s.lowest_loss is None else min(s.lowest_loss, loss)
        s.lowest_entropy = entropy if s.lowest_entropy is None else min(s.lowest_entropy, entropy)
        if s.phase == Phase.MEMORIZATION.value:
            s.stale_memorization = 0 if loss_gain > config.min_improvement else s.stale_memorization + 1
            if s.stale_memorization >= config.patience_memorization:
                s.stale_memorization = 0
                return "plateau"
        elif loss_gain < -config.spike_tolerance:
            s.stale_compression = 0
            return "spike"
        else:
            s.stale_compression = 0 if entropy_gain > config.min_improvement else s.stale_compression + 1
            if s.stale_compression >= config.patience_compression:
                s.stale_compression = 0
                return "compressed"
        return None

    def state_dict(self) -> dict[str, Any]:
        """Everything needed to resume, as plain numbers and strings."""
        return asdict(self._state)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Resume from :meth:`state_dict`. Raises ValueError on unknown fields."""
        unknown = set(state) ^ set(asdict(self._state))
        if unknown:
            raise ValueError(f"gate state has missing or unknown fields {sorted(unknown)}: is it from another version?")
        self._state = GateState(**state)
        self.reason = None

    def __repr__(self) -> str:
        return f"PhaseGate(rule={self.config.rule!r}, phase={self.phase.value!r}, switches={self.switches})"


def _average(mean: float | None, value: float, decay: float) -> float:
    return value if mean is None else decay * mean + (1 - decay) * value


def _scale(level: float | None, spread: float) -> float:
    """What a relative change is relative to."""
    return max(abs(level or 0.0), _SPREADS * spread)


def _updates_within(time_constants: float, decay: float) -> int:
    """Whole updates within so many time constants of a moving average, at least one."""
    return max(1, math.floor(-time_constants / math.log(decay))) if decay > 0 else 1


def _gain(lowest: float | None, value: float) -> float:
    """Relative fall below the minimum; 0 while there is none or it is too small to divide by."""
    if lowest is None or abs(lowest) < 1e-9:
        return 0.0
    return (lowest - value) / max(abs(lowest), 1e-6)
