"""What can be wrong with a run, in words, and the setting to change.

The command, the page and the documentation take their sentences from here.

:data:`FINDINGS` has them all, in the order in which they are looked for. ``what`` has named places for a run's figures;
``example`` fills them, so that each can be shown without a run.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Finding:
    """One thing that can be wrong.

    >>> FINDINGS["spiked"].title
    'Compression kept raising the loss'
    """

    key: str
    title: str
    what: str
    """What the run shows, with places for its figures."""
    why: str
    change: str
    """What to change; settings as paths in a ``GAPTConfig``."""
    example: dict[str, Any]
    """Figures to show it with."""


@dataclass(frozen=True)
class Diagnosis:
    """A finding in one run.

    >>> Diagnosis(FINDINGS["not_finite"], "12 of 2,000 steps had a loss that was not finite.").key
    'not_finite'
    """

    finding: Finding
    what: str

    @property
    def key(self) -> str:
        return self.finding.key


_ALL = [
    Finding(
        "too_short",
        "The run ended before the gate could act",
        "Steps so far: {updates}. The gate waits for {patience} updates without improvement before it starts "
        "compression.",
        "With this patience, compression cannot start in a run this short.",
        "Train longer, or lower gate.patience_memorization.",
        {"updates": 12, "patience": 15},
    ),
    Finding(
        "few_validations",
        "The gate has seen too few validation losses",
        "The gate judges held-out losses (gate.signal = validation) and was given {validations} in {steps:,} steps. "
        "It needs more than {patience} before it can start compression.",
        'With signal="validation" patience counts calls of optimizer.record_validation, not steps.',
        "Validate more often: about thirty times in a run. Or lower gate.patience_memorization, or set gate.signal to "
        "train.",
        {"validations": 1, "steps": 400, "patience": 2},
    ),
    Finding(
        "never_compressed",
        "The run never compressed",
        "All {steps:,} steps were memorization. The loss went from {first:.3g} to {last:.3g} and never went "
        "{patience} updates without improving by {improvement:.3g} %.",
        "The gate starts compression when the loss stops falling, and this loss kept falling.",
        "Lower gate.patience_memorization, or raise gate.min_improvement so that small gains no longer count. Where "
        "the held-out loss has stopped falling but the training loss has not, use GateConfig.validation(), which sets "
        "gate.signal to validation.",
        {"steps": 2000, "first": 9.21, "last": 3.4, "patience": 15, "improvement": 1.0},
    ),
    Finding(
        "overfits_unseen",
        "The model overfits and the gate cannot see it",
        "The held-out loss rose from its best, {best:.3f} at step {at:,}, to {last:.3f}, while the training loss fell "
        "to {training:.3f}. The gate judges the training loss.",
        "Where a model overfits, the training loss goes on falling, so compression starts late or never.",
        "Use GateConfig.validation(), which sets gate.signal to validation, and call optimizer.record_validation.",
        {"best": 3.912, "at": 1200, "last": 4.377, "training": 2.031},
    ),
    Finding(
        "compressed_at_once",
        "The run compressed at once",
        "Compression began at step {at:,} of {steps:,}, at a loss of {then:.3g}. Later the loss fell to {last:.3g}.",
        "The model had not learned much that could be kept. A noisy or warming-up loss looks like one that has "
        "stalled.",
        "Raise gate.patience_memorization, or lower gate.min_improvement. If gate.initial_phase is compression, set it "
        "to memorization. With a long warm-up, raise gate.smoothing.",
        {"at": 16, "steps": 2000, "then": 8.9, "last": 3.2},
    ),
    Finding(
        "spiked",
        "Compression kept raising the loss",
        "{spikes} of {exits} compression phases ended because the loss rose by {tolerance:.3g} % or more. Their median "
        "length was {length:g} steps.",
        "The entropy pushes harder than the task allows.",
        "Lower objective.weight, for example to a third. If the rises are only noise, raise gate.spike_tolerance or "
        "gate.smoothing.",
        {"spikes": 9, "exits": 10, "tolerance": 20.0, "length": 7},
    ),
    Finding(
        "short_phases",
        "Compression phases last only a few steps",
        "Counted in steps, the median length of {phases} compression phases was {length:g}. Together they are "
        "{share:.1%} of the run.",
        "Judging single minibatches, the gate takes their noise for a rise or a standstill.",
        "Set gate.rule to smoothed, raise gate.smoothing, or raise gate.patience_compression.",
        {"phases": 14, "length": 1, "share": 0.005},
    ),
    Finding(
        "stuck_in_compression",
        "The run stays in compression",
        "Compression began at step {at:,} and lasted for the last {length:,} steps, {share:.0%} of the run. The "
        "entropy came to {entropy:.3g} nats.",
        "An entropy that still moves by a percent or so never counts as compressed, however little that is in nats.",
        "Set objective.target, beyond which a layer is pushed no further. Or lower gate.patience_compression, or raise "
        "gate.min_improvement.",
        {"at": 230, "length": 1770, "share": 0.885, "entropy": 0.004},
    ),
    Finding(
        "weight_too_small",
        "Compression changed almost nothing",
        "In compression the entropy was {share:.2%} of the objective, and it ended at {change:+.1%} of where it was "
        "before.",
        "The weight is too small to be felt beside the loss.",
        "Raise objective.weight, for example threefold.",
        {"share": 0.002, "change": -0.01},
    ),
    Finding(
        "weight_too_large",
        "The entropy outweighs the task",
        "In compression the entropy was {share:.0%} of the objective, and the loss rose from {before:.3g} to "
        "{after:.3g}.",
        "Most of the gradient then serves the entropy.",
        "Lower objective.weight, for example to a third.",
        {"share": 0.61, "before": 2.1, "after": 3.4},
    ),
    Finding(
        "pressed_below_use",
        "A layer was pressed below use",
        "{layers} ended at {entropy:.3g} nats, an effective rank of {rank:.3g}: nearly all tokens of a window point "
        "the same way. Before compression it was {before:.3g} nats.",
        "A layer that tells its tokens apart no longer cannot hold what the task needs.",
        "Set objective.target (in nats), or lower objective.weight. To leave such layers out, use layers.skip_first or "
        "layers.skip_last.",
        {"layers": "Layer h.3", "entropy": 0.02, "rank": 1.02, "before": 1.4},
    ),
    Finding(
        "norms_alone",
        "The entropy moved by token norms alone",
        "The entropy of {where} {moved} by {by:.0%}, but its centred cosine entropy by {cosine:.0%}, while the largest "
        "token norm went from {hidden_before:.3g} to {hidden_after:.3g} times the median.",
        "Under the linear kernel a few long tokens hide all others, which keep their directions. That is no "
        "compression.",
        "Set entropy.kernel to cosine and entropy.center to true.",
        {"moved": "fell", "where": "all layers", "by": 0.88, "cosine": 0.02, "hidden_before": 3.0,
         "hidden_after": 26.0},
    ),
    Finding(
        "common_vector",
        "The entropy moved by one vector that all tokens share",
        "The entropy of {where} {moved} by {by:.0%}, but its centred cosine entropy by {cosine:.0%}, while the share "
        "of the squared norm in the mean token went from {hidden_before:.0%} to {hidden_after:.0%}.",
        "One large common vector makes all tokens look alike to a kernel that is not centred. That is no compression.",
        "Set entropy.center to true.",
        {"moved": "fell", "where": "layer h.3", "by": 0.7, "cosine": 0.05, "hidden_before": 0.2, "hidden_after": 0.9},
    ),
    Finding(
        "not_finite",
        "Some steps were not finite",
        "{nonfinite:,} of {steps:,} steps had a loss or an entropy that was not finite. They followed the loss alone.",
        "Half precision overflowed, or the learning rate is too high.",
        "Lower the learning rate, clip gradients, or use bfloat16 instead of float16. objective.max_nonfinite says "
        "after how many in a row the run stops.",
        {"nonfinite": 12, "steps": 2000},
    ),
]  # fmt: skip

FINDINGS = {finding.key: finding for finding in _ALL}

NOTHING_FOUND = "Nothing stands out: the gate switched as it should, and the entropies agree on what compression did."
NOT_ALL_SEEN = (
    "Nothing stands out in what is there, but the records hold no {missing}, so not everything could be judged."
)
NO_STEPS = "The run has no steps yet, so there is nothing to judge."
PLAIN_RUN = "The gate is frozen in memorization, so this is plain training: there is no compression to judge."
CONSTANT_PENALTY = "The gate is frozen in compression: a constant entropy penalty, without phases to judge."
MAYBE_FROZEN = "If the gate was frozen, this is plain training, and nothing is wrong."
NO_SETTINGS = "No settings of gapt_optim were found: judged by the defaults"
GATE_UNKNOWN = "settings.json does not say how the gate was set: judged by its defaults"
SETTINGS_UNUSED = "settings.json: {found} could not be used; the defaults are in place of it"
