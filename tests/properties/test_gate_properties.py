"""Properties of the gate on arbitrary sequences, and the published rule against a twin written from its text."""

from __future__ import annotations

import math
from dataclasses import dataclass

from hypothesis import given, settings
from hypothesis import strategies as st

from gapt_optim import GateConfig, PhaseGate

levels = st.floats(-1e6, 1e6) | st.sampled_from([0.0, 1e-10, -1e-10, 1e-9, 1e-7, 1.0, 0.99, 1.01, -1.0])
sequences = st.lists(st.tuples(levels, levels), min_size=1, max_size=120)
patience = st.integers(1, 6)
share = st.sampled_from([0.0, 0.01, 0.1, 0.5])


@dataclass
class PublishedTwin:
    """State and update word for word as the rule is described; kept slow and plain."""

    min_improvement: float
    spike_tolerance: float
    patience_memorization: int
    patience_compression: int
    compressing: bool = False
    s_m: int = 0
    s_c: int = 0
    E: float = math.inf
    M: float = math.inf

    def update(self, e: float, m: float) -> str | None:
        gain_e = self.gain(self.E, e)
        gain_m = self.gain(self.M, m)
        self.E = min(self.E, e)
        self.M = min(self.M, m)
        if not self.compressing:
            if gain_e > self.min_improvement:
                self.s_m = 0
            else:
                self.s_m = self.s_m + 1
            if self.s_m >= self.patience_memorization:
                self.s_m = 0
                self.compressing = True
                return "plateau"
            return None
        if gain_e < -self.spike_tolerance:
            self.s_c = 0
            self.compressing = False
            return "spike"
        if gain_m > self.min_improvement:
            self.s_c = 0
        else:
            self.s_c = self.s_c + 1
        if self.s_c >= self.patience_compression:
            self.s_c = 0
            self.compressing = False
            return "compressed"
        return None

    @staticmethod
    def gain(minimum: float, value: float) -> float:
        if math.isinf(minimum) or abs(minimum) < 1e-9:
            return 0.0
        return (minimum - value) / max(abs(minimum), 1e-6)


@settings(max_examples=300)
@given(sequences, patience, patience, share, st.sampled_from([0.01, 0.1, 1.0]), st.booleans())
def test_published_rule_is_its_text(
    values: list[tuple[float, float]], p_m: int, p_c: int, improvement: float, spike: float, compressing: bool
) -> None:
    twin = PublishedTwin(improvement, spike, p_m, p_c, compressing)
    gate = PhaseGate(
        GateConfig.published(
            patience_memorization=p_m,
            patience_compression=p_c,
            min_improvement=improvement,
            spike_tolerance=spike,
            initial_phase="compression" if compressing else "memorization",
        )
    )
    for e, m in values:
        reason = twin.update(e, m)
        assert (gate.update(e, m).value == "compression") == twin.compressing
        assert gate.reason == reason


configs = st.builds(
    GateConfig,
    rule=st.sampled_from(["smoothed", "published"]),
    patience_memorization=patience,
    patience_compression=patience,
    min_improvement=share,
    spike_tolerance=st.sampled_from([0.01, 0.2, 5.0]),
    smoothing=st.sampled_from([0.0, 0.5, 0.9, 0.999]),
    initial_phase=st.sampled_from(["memorization", "compression"]),
)


@given(configs, sequences)
def test_every_switch_has_a_reason_that_fits_and_is_counted(
    config: GateConfig, values: list[tuple[float, float]]
) -> None:
    gate = PhaseGate(config)
    switches = 0
    for loss, entropy in values:
        before = gate.phase
        after = gate.update(loss, entropy)
        if before is after:
            assert gate.reason is None
        else:
            switches += 1
            assert gate.reason in (("plateau",) if after.value == "compression" else ("spike", "compressed"))
    assert gate.switches == switches


@given(configs, sequences, st.data())
def test_state_carries_everything(config: GateConfig, values: list[tuple[float, float]], data: st.DataObject) -> None:
    stop = data.draw(st.integers(0, len(values)))
    gate, resumed = PhaseGate(config), PhaseGate(config)
    for value in values[:stop]:
        gate.update(*value)
    resumed.load_state_dict(gate.state_dict())
    for value in values[stop:]:
        assert gate.update(*value) is resumed.update(*value)
    assert gate.state_dict() == resumed.state_dict()


@given(configs, sequences, st.integers(-20, 20))
def test_smoothed_gate_does_not_see_the_unit_of_the_loss(
    config: GateConfig, values: list[tuple[float, float]], exponent: int
) -> None:
    """A loss in bits or summed over tokens leads to the same phases (factors of two are exact)."""
    config = config.model_copy(update={"rule": "smoothed"})
    one, other = PhaseGate(config), PhaseGate(config)
    for loss, entropy in values:
        assert one.update(loss, entropy) is other.update(loss * 2.0**exponent, entropy)


@given(
    st.floats(1e-6, 1e6),
    st.floats(0.5, 0.9999),
    patience,
    st.sampled_from([0.001, 0.01, 0.1, 0.5]),
    st.sampled_from([0.0, 0.5, 0.9, 0.99]),
)
def test_an_entropy_that_decays_to_nothing_ends_its_phase(
    level: float, rate: float, patience: int, improvement: float, smoothing: float
) -> None:
    """At most 1 / min_improvement improvements fit between the level at the start and 0."""
    config = GateConfig(
        initial_phase="compression",
        patience_compression=patience,
        min_improvement=improvement,
        smoothing=smoothing,
    )
    gate, updates = PhaseGate(config), 0
    settling = 2 / -math.log(smoothing) if smoothing else 1
    while gate.phase.value == "compression":
        updates += 1
        gate.update(1.0, level * rate**updates)
        assert updates <= patience * (1 / improvement + 3) + settling
    assert gate.reason == "compressed"
