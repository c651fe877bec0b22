"""Configuration: what is refused, how, and that the rest survives a round trip."""

from __future__ import annotations

import math
from typing import Any

import pytest
from pydantic import BaseModel, ValidationError

from gapt_optim import AlignmentConfig, EntropyConfig, GAPTConfig, GateConfig, LayerConfig, ObjectiveConfig

SECTIONS = [AlignmentConfig, EntropyConfig, GAPTConfig, GateConfig, LayerConfig, ObjectiveConfig]


@pytest.mark.parametrize("section", SECTIONS)
def test_unknown_field_is_refused_by_name(section: type[BaseModel]) -> None:
    with pytest.raises(ValidationError, match="patience_memorisation"):
        section(patience_memorisation=3)


@pytest.mark.parametrize(
    ("section", "field", "values"),
    [
        (EntropyConfig, "kernel", ["rbf", "Cosine", None]),
        (EntropyConfig, "center", ["maybe", None]),
        (EntropyConfig, "alpha", [0.0, -1.0, math.nan, "two", None]),
        (EntropyConfig, "window", [1, 0, -8, 2.5, "eight"]),
        (EntropyConfig, "normalize", ["maybe", None]),
        (GateConfig, "rule", ["smooth", None]),
        (GateConfig, "patience_memorization", [0, -1, 1.5, None]),
        (GateConfig, "patience_compression", [0, -1, 1.5, None]),
        (GateConfig, "min_improvement", [-0.01, 1.0, math.nan]),
        (GateConfig, "spike_tolerance", [0.0, -0.1, math.nan]),
        (GateConfig, "smoothing", [-0.1, 1.0, math.nan]),
        (GateConfig, "signal", ["test"]),
        (GateConfig, "initial_phase", ["compressed"]),
        (GateConfig, "frozen", ["maybe"]),
        (ObjectiveConfig, "weight", [-1.0, math.inf, math.nan]),
        (ObjectiveConfig, "direction", ["sideways", None]),
        (ObjectiveConfig, "target", [-1.0, math.inf, math.nan]),
        (ObjectiveConfig, "target_share", [0.0, -1.0, math.inf, math.nan]),
        (ObjectiveConfig, "start", [-1, 0.5, None]),
        (ObjectiveConfig, "max_nonfinite", [0, -1]),
        (LayerConfig, "schedule", ["none", "valley"]),
        (LayerConfig, "skip_first", [-1]),
        (LayerConfig, "skip_last", [-1]),
        (LayerConfig, "reduce", ["median", "max"]),
        (AlignmentConfig, "every", [-1, 0.5, None]),
        (AlignmentConfig, "parameter_every", [-1, 0.5]),
        (GAPTConfig, "gate", [None, 3, {"patience": 1}]),
    ],
)
def test_impossible_value_is_refused_with_the_field_name(section: Any, field: str, values: list[Any]) -> None:
    for value in values:
        with pytest.raises(ValidationError, match=field):
            section(**{field: value})


def test_every_field_but_flags_has_a_refused_value() -> None:
    """Keeps the table above complete."""
    table = test_impossible_value_is_refused_with_the_field_name.pytestmark[0].args[1]
    tried = {(section, field) for section, field, _ in table}
    sections = [section for section in SECTIONS if section is not GAPTConfig]
    fields = {(s, name) for s in sections for name, field in s.model_fields.items() if field.annotation is not bool}
    assert not fields - tried


@pytest.mark.parametrize("section", SECTIONS)
def test_frozen_and_documented(section: type[BaseModel]) -> None:
    config = section()
    for name in section.model_fields:
        with pytest.raises(ValidationError, match="frozen"):
            setattr(config, name, getattr(config, name))
        assert section is GAPTConfig or section.model_fields[name].description


def test_a_reduction_over_the_whole_profile_needs_all_layers() -> None:
    LayerConfig(reduce="largest_drop")
    with pytest.raises(ValidationError, match=r'largest_drop.*schedule="rotate"'):
        LayerConfig(reduce="largest_drop", schedule="rotate")


def test_one_target_at_most() -> None:
    with pytest.raises(ValidationError, match=r"target=0\.5 and target_share=0\.9 both say where pressing stops"):
        ObjectiveConfig(target=0.5, target_share=0.9)


@pytest.mark.parametrize("direction", ["down", "up"])
def test_a_target_that_no_entropy_reaches_is_refused(direction: str) -> None:
    def config(target: float, **entropy: Any) -> GAPTConfig:
        objective = ObjectiveConfig(target=target, direction=direction)
        return GAPTConfig(objective=objective, entropy=EntropyConfig(**entropy))

    for target, entropy in (
        (math.log(7), {}),
        (math.log(8), {"center": False}),
        (math.log(63), {"window": 64}),
        (100.0, {"window": None}),
        (1.0, {"window": None, "normalize": True}),
    ):
        config(target, **entropy)
        if target < 100:
            with pytest.raises(ValidationError, match=r"objective\.target=.* is above .*lower target"):
                config(target + 1e-6, **entropy)


def test_the_methods_that_are_compared() -> None:
    plain, penalty = GAPTConfig.plain(), GAPTConfig.penalty(objective=ObjectiveConfig(weight=0.5))
    assert (plain.gate.frozen, plain.gate.initial_phase) == (True, "memorization")
    assert (penalty.gate.frozen, penalty.gate.initial_phase) == (True, "compression")
    assert penalty.objective.weight == 0.5


def test_a_centered_window_of_two_is_refused_with_what_to_do() -> None:
    for kernel in ("linear", "cosine"):
        with pytest.raises(ValidationError, match=r"window=2 .*always 0; set window to 3 or more, or center=False"):
            EntropyConfig(kernel=kernel, window=2)
        EntropyConfig(kernel=kernel, window=3)
        EntropyConfig(kernel=kernel, center=False, window=2)


def test_published_is_the_late_protocol_of_the_author() -> None:
    config = GAPTConfig.published()
    assert config.objective == ObjectiveConfig(weight=20)
    assert config.layers == LayerConfig(skip_first=1, skip_last=1, reduce="largest_drop")
    assert config.gate == GateConfig.published()
    assert config.entropy == EntropyConfig(kernel="linear", center=False)
    other = EntropyConfig(kernel="linear", center=False, alpha=1)
    assert GAPTConfig.published(entropy=other) == config.model_copy(update={"entropy": other})


def test_published_gate_has_the_settings_of_the_paper() -> None:
    gate = GateConfig.published()
    assert gate.rule == "published"
    assert (gate.patience_memorization, gate.patience_compression) == (125, 75)
    assert (gate.min_improvement, gate.spike_tolerance) == (0.01, 0.1)
    assert GateConfig.published(patience_memorization=9) == gate.model_copy(update={"patience_memorization": 9})
    with pytest.raises(ValidationError, match="spike_tolerance"):
        GateConfig.published(spike_tolerance=-1)


def test_validation_gate_judges_held_out_losses_one_by_one() -> None:
    gate = GateConfig.validation()
    assert (gate.signal, gate.rule, gate.smoothing) == ("validation", "smoothed", 0.0)
    assert (gate.patience_memorization, gate.patience_compression) == (2, 2)
    assert (gate.min_improvement, gate.spike_tolerance) == (0.0, 0.1)
    assert GateConfig.validation(patience_memorization=9) == gate.model_copy(update={"patience_memorization": 9})
    with pytest.raises(ValidationError, match="spike_tolerance"):
        GateConfig.validation(spike_tolerance=-1)


@pytest.mark.parametrize(
    "config",
    [
        GAPTConfig(),
        GAPTConfig(
            entropy=EntropyConfig(kernel="linear", center=False, alpha=math.inf, window=None, normalize=True),
            gate=GateConfig.published(signal="validation", initial_phase="compression", frozen=True),
            objective=ObjectiveConfig(weight=0.0, direction="up", target_share=0.9, start=3, max_nonfinite=1),
            layers=LayerConfig(skip_first=1, skip_last=2, reduce="largest_drop"),
            alignment=AlignmentConfig(every=0, parameter_every=5),
        ),
    ],
)
def test_round_trip(config: GAPTConfig) -> None:
    assert GAPTConfig(**config.model_dump()) == config
    assert GAPTConfig.model_validate_json(config.model_dump_json()) == config
    assert hash(config) == hash(config.model_copy(deep=True))


def test_parts_can_be_given_as_plain_dicts() -> None:
    assert GAPTConfig(gate={"smoothing": 0.5}) == GAPTConfig(gate=GateConfig(smoothing=0.5))
