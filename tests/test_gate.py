"""The gate by itself: both rules, their guarantees under noise and spikes, and their state."""

from __future__ import annotations

import json
import math
import random
import subprocess
import sys
from collections.abc import Iterable, Iterator
from typing import get_args

import pytest

from gapt_optim import GateConfig, Phase, PhaseGate
from gapt_optim.gate import REASONS, Reason

M, C = Phase.MEMORIZATION, Phase.COMPRESSION
RULES = get_args(GateConfig.model_fields["rule"].annotation)


def falling(start: float = 2.0, rate: float = 0.998) -> Iterator[float]:
    while True:
        yield start
        start *= rate


def feed(gate: PhaseGate, losses: Iterable[float], entropies: Iterable[float]) -> list[tuple[Phase, str | None]]:
    return [(gate.update(loss, entropy), gate.reason) for loss, entropy in zip(losses, entropies, strict=False)]


def in_compression(config: GateConfig, level: float = 2.0) -> PhaseGate:
    """A gate that has settled on a constant loss and just entered compression."""
    gate = PhaseGate(config)
    while gate.update(level, 100.0) is M:
        pass
    return gate


def test_each_reason_has_a_sentence() -> None:
    assert set(REASONS) == set(get_args(Reason))


def test_starts_in_memorization_by_default() -> None:
    assert PhaseGate().phase is M


@pytest.mark.parametrize("rule", RULES)
def test_plateau_of_the_loss_starts_compression(rule: str) -> None:
    gate = PhaseGate(GateConfig(rule=rule, patience_memorization=5))
    seen = feed(gate, [1.0] * 6, falling())
    assert seen == [(M, None)] * 5 + [(C, "plateau")] if rule == "smoothed" else seen[4] == (C, "plateau")
    assert gate.switches == 1


@pytest.mark.parametrize("rule", RULES)
def test_falling_loss_stays_in_memorization(rule: str) -> None:
    gate = PhaseGate(GateConfig(rule=rule, patience_memorization=5, smoothing=0.5))
    assert {phase for phase, _ in feed(gate, (0.9**i for i in range(100)), falling())} == {M}


@pytest.mark.parametrize("rule", RULES)
def test_plateau_of_the_entropy_ends_compression(rule: str) -> None:
    gate = PhaseGate(GateConfig(rule=rule, initial_phase="compression", patience_compression=5))
    seen = feed(gate, [1.0] * 8, [0.5] * 8)
    assert [reason for _, reason in seen if reason] == ["compressed"]
    assert gate.phase is M


@pytest.mark.parametrize("rule", RULES)
def test_frozen_never_leaves_its_phase(rule: str) -> None:
    for phase in ("memorization", "compression"):
        config = GateConfig(
            rule=rule, initial_phase=phase, frozen=True, patience_memorization=1, patience_compression=1
        )
        gate = PhaseGate(config)
        assert feed(gate, [1.0, 5.0, 1.0] * 20, [1.0] * 60) == [(Phase(phase), None)] * 60


def test_reason_is_that_of_the_last_update_only() -> None:
    gate = PhaseGate(GateConfig(rule="published", patience_memorization=1, patience_compression=9))
    assert gate.update(1.0, 1.0) is C
    assert gate.reason == "plateau"
    gate.update(1.0, 0.5)
    assert gate.reason is None


def test_improvement_is_judged_within_the_present_phase() -> None:
    """The published rule stays stuck on the minimum of the run; smoothed asks for progress from here on."""
    seen = {}
    for rule in ("smoothed", "published"):
        gate = PhaseGate(GateConfig(rule=rule, patience_memorization=3, patience_compression=3, smoothing=0.0))
        feed(gate, [1.0] * 4, falling())
        assert gate.phase is C
        assert gate.update(9.0, 1.0) is M
        seen[rule] = [phase for phase, _ in feed(gate, [9 * 0.8**i for i in range(8)], falling())]
    assert set(seen["smoothed"]) == {M}
    assert C in seen["published"]


@pytest.mark.parametrize("floor", [0.0, 0.3])
def test_phases_alternate_while_an_entropy_decays_under_noise(floor: float) -> None:
    """Each compression halves the entropy in 40 steps, each memorization leaves it; both numbers scatter by 5 %."""
    for seed in range(20):
        noise, gate = random.Random(seed), PhaseGate()
        entropy, reasons = 2.0, []
        for _ in range(1500):
            if gate.phase is C:
                entropy = floor + (entropy - floor) * 0.5 ** (1 / 40)
            gate.update(3.0 * noise.uniform(0.95, 1.05), entropy * noise.uniform(0.95, 1.05))
            reasons += [gate.reason] if gate.reason else []
        assert set(reasons) == {"plateau", "compressed"}
        assert len(reasons) >= 6


@pytest.mark.parametrize("rule", RULES)
def test_patience_counts_anew_in_every_phase(rule: str) -> None:
    """`smoothed` takes one update more, for the value that the phase begins with."""
    gate = PhaseGate(GateConfig(rule=rule, patience_memorization=4, patience_compression=3))
    seen = feed(gate, [1.0] * 24, [1.0] * 24)
    memorization, compression = (5, 4) if rule == "smoothed" else (4, 3)
    ends = [i + 1 for i, (_, reason) in enumerate(seen) if reason]
    lengths = [end - start for start, end in zip([0, *ends], ends, strict=False)]
    assert lengths[:4] == [memorization, compression] * 2
    assert [reason for _, reason in seen if reason][:4] == ["plateau", "compressed"] * 2


def test_published_patience_counts_anew_after_a_spike() -> None:
    gate = PhaseGate(GateConfig(rule="published", patience_memorization=2, patience_compression=4))
    losses = [1.0] * 5 + [9.0] + [1.0] * 6
    reasons = [reason for _, reason in feed(gate, losses, [1.0] * 12)]
    assert reasons == [None, "plateau", None, None, None, "spike", None, "plateau", None, None, None, "compressed"]


@pytest.mark.parametrize("phase", ["memorization", "compression"])
@pytest.mark.parametrize("rule", RULES)
def test_patience_counts_anew_after_an_improvement(rule: str, phase: str) -> None:
    config = GateConfig(rule=rule, initial_phase=phase, patience_memorization=3, patience_compression=3, smoothing=0.0)
    falls_once = [2.0, 2.0, 1.0, 1.0, 1.0, 1.0, 1.0]
    other = [1.0] * 7
    numbers = (falls_once, other) if phase == "memorization" else (other, falls_once)
    reasons = [reason for _, reason in feed(PhaseGate(config), *numbers)]
    assert reasons[:6] == [None] * 5 + ["plateau" if phase == "memorization" else "compressed"]


@pytest.mark.parametrize("phase", ["memorization", "compression"])
@pytest.mark.parametrize("rule", RULES)
def test_patience_that_is_lowered_on_resuming_is_kept_to_at_once(rule: str, phase: str) -> None:
    def gate(patience: int) -> PhaseGate:
        return PhaseGate(
            GateConfig(rule=rule, initial_phase=phase, patience_memorization=patience, patience_compression=patience)
        )

    patient, other = gate(10), gate(3)
    feed(patient, [1.0] * 7, [1.0] * 7)
    assert patient.switches == 0
    other.load_state_dict(patient.state_dict())
    other.update(1.0, 1.0)
    assert other.switches == 1


def test_compression_is_judged_by_the_level_at_which_it_began() -> None:
    """Under 1 % of that level in 5 updates is a plateau, however large a part of what is left it is."""
    config = GateConfig(initial_phase="compression", smoothing=0.0, patience_compression=5, min_improvement=0.01)
    gate = PhaseGate(config)
    assert {phase for phase, _ in feed(gate, [1.0] * 50, [1.0 - i / 90 for i in range(50)])} == {C}
    seen = feed(gate, [1.0] * 10, [0.004 * 0.5**i for i in range(10)])
    assert [reason for _, reason in seen if reason] == ["compressed"]


# With a held-out loss


def stalled(**changes: float) -> PhaseGate:
    """A gate on a held-out loss that has just begun to compress, at a held-out loss of 3 and a training loss of 2."""
    settings = {"patience_memorization": 2, "patience_compression": 2, "smoothing": 0.0, **changes}
    gate = PhaseGate(GateConfig.model_validate({"signal": "validation", **settings}))
    while gate.update(3.0, 1.0, training_loss=2.0) is M:
        pass
    return gate


def test_overfitting_is_no_spike() -> None:
    """The held-out loss rises as the training loss falls: compression goes on while it lowers the entropy."""
    gate = stalled()
    assert {gate.update(3.0 + step, 0.9**step, training_loss=2.0 / step) for step in range(1, 20)} == {C}
    assert feed(gate, [9.0] * 2, [1.0] * 2) == [(M, "spike"), (M, None)]


def test_rise_of_the_training_loss_ends_compression_whatever_the_held_out_loss_does() -> None:
    gate = stalled()
    assert gate.update(2.9, 0.5, training_loss=2.5) is M
    assert gate.reason == "spike"


def test_without_a_training_loss_the_held_out_one_stands_for_it() -> None:
    gate, other = stalled(), stalled()
    for value in (3.1, 3.0, 2.9, 4.0, 3.0):
        assert gate.update(value, 1.0) is other.update(value, 1.0, training_loss=value)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_training_loss_that_is_not_finite_is_ignored(bad: float) -> None:
    gate = stalled()
    before = gate.state_dict()
    assert gate.update(3.0, 1.0, training_loss=bad) is C
    assert gate.state_dict() == before


# Under noise


@pytest.mark.parametrize(
    "config",
    [GateConfig(), GateConfig(initial_phase="compression"), GateConfig(patience_memorization=25)],
    ids=str,
)
def test_noise_does_not_end_compression(config: GateConfig) -> None:
    """Constant loss with 20 % independent noise, falling entropy: 90 % of the steps once entered, at least."""
    shares = []
    for seed in range(200):
        noise = random.Random(seed)
        gate = PhaseGate(config)
        seen = feed(gate, (3.0 * noise.uniform(0.8, 1.2) for _ in range(500)), falling())
        phases = [phase for phase, _ in seen]
        entered = phases.index(C)
        shares.append(sum(phase is C for phase in phases[entered:]) / len(phases[entered:]))
    assert min(shares) >= 0.9


def test_published_rule_does_not_hold_under_the_same_noise() -> None:
    """Why it is not the default."""
    noise = random.Random(0)
    gate = PhaseGate(GateConfig.published())
    phases = [phase for phase, _ in feed(gate, (3.0 * noise.uniform(0.8, 1.2) for _ in range(2000)), falling())]
    assert phases.count(C) < 0.1 * len(phases)


# Under a lasting rise


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.3, 0.5, 0.75, 0.9, 0.95, 0.98, 0.995])
@pytest.mark.parametrize("factor", [1.0001, 1.01, 1.5, 3.0])
@pytest.mark.parametrize("tolerance", [0.05, 0.2, 1.0])
def test_lasting_rise_ends_compression_within_three_time_constants(
    smoothing: float, factor: float, tolerance: float
) -> None:
    gate = in_compression(GateConfig(smoothing=smoothing, spike_tolerance=tolerance, patience_compression=10**6))
    within = max(1, math.floor(-3 / math.log(smoothing))) if smoothing else 1
    seen = feed(gate, [2.0 * (1 + factor * tolerance)] * within, falling(1.0))
    assert (M, "spike") in seen


def test_rise_is_noticed_in_a_run_that_starts_in_compression() -> None:
    gate = PhaseGate(GateConfig(initial_phase="compression", spike_tolerance=0.2, smoothing=0.9))
    feed(gate, [2.0] * 18, falling())
    assert (M, "spike") in feed(gate, [2.0 * 1.2001] * 28, falling(1.0))


def test_a_run_that_starts_in_compression_takes_its_level_from_two_time_constants() -> None:
    gate, levels = PhaseGate(GateConfig(initial_phase="compression", smoothing=0.5)), []
    for loss in (4.0, 2.0, 1.0, 0.0):
        gate.update(loss, 1.0 + loss)
        levels.append((gate.state_dict()["entry_loss"], gate.state_dict()["entry_entropy"]))
    assert levels == [(4.0, 5.0), (3.0, 4.0), (3.0, 4.0), (3.0, 4.0)]  # 2 / log(2) is between 2 and 3


@pytest.mark.parametrize("smoothing", [0.0, 0.5, 0.9])
def test_rise_within_the_tolerance_is_tolerated(smoothing: float) -> None:
    gate = in_compression(GateConfig(smoothing=smoothing, spike_tolerance=0.2))
    entropies = [100 - i / 5 for i in range(500)]  # by 0.2 % a step of the 100 at which compression began
    assert {phase for phase, _ in feed(gate, [2.0 * 1.17] * 500, entropies)} == {C}


def test_short_burst_is_smoothed_away() -> None:
    gate = in_compression(GateConfig(smoothing=0.9, spike_tolerance=0.2))
    assert {phase for phase, _ in feed(gate, [2.0 * 2, *[2.0] * 50], falling())} == {C}


def test_rise_of_a_negative_loss_is_a_spike_too() -> None:
    gate = in_compression(GateConfig(smoothing=0.5, spike_tolerance=0.2), level=-3.0)
    assert (M, "spike") in feed(gate, [-2.0] * 20, falling())


# Odd numbers


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_non_finite_values_are_ignored(rule: str, bad: float) -> None:
    config = GateConfig(rule=rule, patience_memorization=4, patience_compression=4)
    clean, dirty = PhaseGate(config), PhaseGate(config)
    for i in range(40):
        loss, entropy = 1.0 + i % 3, 1.0 + i % 2
        assert clean.update(loss, entropy) is dirty.update(loss, entropy)
        assert clean.reason == dirty.reason
        for values in ((bad, 1.0), (1.0, bad), (bad, bad)):
            assert dirty.update(*values) is clean.phase
            assert dirty.reason is None
        assert dirty.state_dict() == clean.state_dict()


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("level", [0.0, -1.0, 1e-12, 1e300, -1e300])
def test_any_finite_level_is_a_plateau(rule: str, level: float) -> None:
    gate = PhaseGate(GateConfig(rule=rule, patience_memorization=5))
    assert "plateau" in [reason for _, reason in feed(gate, [level] * 10, falling())]


def test_numbers_of_other_libraries_leave_plain_floats() -> None:
    import numpy as np
    import torch

    gate = PhaseGate()
    gate.update(np.float32(1.5), torch.tensor(0.5))  # type: ignore[arg-type]
    assert json.loads(json.dumps(gate.state_dict())) == gate.state_dict()


# State


@pytest.mark.parametrize("config", [GateConfig(patience_memorization=7, patience_compression=4),
                                    GateConfig.published(patience_memorization=5, patience_compression=4)])  # fmt: skip
@pytest.mark.parametrize("stop", [0, 1, 17, 60])
def test_saved_gate_goes_on_as_if_never_stopped(config: GateConfig, stop: int) -> None:
    noise = random.Random(stop)
    values = [(noise.uniform(0.5, 2.0), noise.uniform(0.5, 2.0)) for _ in range(150)]
    whole, first, second = PhaseGate(config), PhaseGate(config), PhaseGate(config)
    expected = feed(whole, *zip(*values, strict=True))
    assert whole.switches > 2
    before = feed(first, *zip(*values[:stop], strict=True)) if stop else []
    second.load_state_dict(json.loads(json.dumps(first.state_dict(), allow_nan=False)))
    assert before + feed(second, *zip(*values[stop:], strict=True)) == expected
    assert second.state_dict() == whole.state_dict()


def test_level_of_a_saved_gate_stays_under_less_smoothing() -> None:
    first, second = (PhaseGate(GateConfig(initial_phase="compression", smoothing=s)) for s in (0.9, 0.5))
    feed(first, [2.0] * 15, [1.0] * 15)
    second.load_state_dict(first.state_dict())
    second.update(2.05, 1.0)
    assert second.state_dict()["entry_loss"] == pytest.approx(2.0)


def test_state_of_another_version_is_refused_and_changes_nothing() -> None:
    gate = in_compression(GateConfig())
    before = gate.state_dict()
    with pytest.raises(ValueError, match="novelty"):
        gate.load_state_dict(PhaseGate().state_dict() | {"novelty": 1})
    with pytest.raises(ValueError, match="phase"):
        gate.load_state_dict({key: value for key, value in before.items() if key != "phase"})
    assert gate.state_dict() == before


def test_gate_needs_no_torch() -> None:
    used = (
        "import sys; from gapt_optim import PhaseGate; PhaseGate().update(1.0, 2.0); "
        "print({'torch', 'numpy'} & sys.modules.keys())"
    )
    done = subprocess.run([sys.executable, "-c", used], capture_output=True, text=True, check=True, timeout=120)
    assert done.stdout == "set()\n"
