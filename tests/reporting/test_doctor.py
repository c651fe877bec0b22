"""Each finding is found in a run that has it, and not in a healthy one; its sentences name settings that exist."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest

from gapt_optim import GAPTConfig
from gapt_optim.reporting import FINDINGS, Run, diagnose
from gapt_optim.reporting.doctor import judged_by, verdict
from gapt_optim.reporting.findings import CONSTANT_PENALTY, NO_STEPS, NOTHING_FOUND, PLAIN_RUN
from gapt_optim.reporting.run import section_of

from .runs import records

Change = Callable[[list[dict[str, Any]]], None]


def run_of(change: Change | None = None, settings: dict[str, Any] | None = None, **options: Any) -> Run:
    steps = records(**({"steps": 400, "period": 200} | options))
    if change is not None:
        change(steps)
    return Run.of(steps, settings=settings)


def phases(steps: list[dict[str, Any]], spans: list[tuple[int, int]], reason: str = "spike") -> None:
    for record in steps:
        inside = any(first <= record["step"] <= last for first, last in spans)
        record |= {"phase": "compression" if inside else "memorization", "reason": None}
        for first, last in spans:
            if record["step"] == first - 1:
                record |= {"reason": "plateau", "next_phase": "compression"}
            if record["step"] == last:
                record |= {"reason": reason, "next_phase": "memorization"}


def at_once(steps: list[dict[str, Any]]) -> None:
    phases(steps, [(10, 40)], "compressed")


def spiking(steps: list[dict[str, Any]]) -> None:
    phases(steps, [(first, first + 9) for first in range(150, 390, 40)])


def fluttering(steps: list[dict[str, Any]]) -> None:
    phases(steps, [(first, first) for first in range(150, 390, 20)], "compressed")


def stuck(steps: list[dict[str, Any]]) -> None:
    phases(steps, [(100, 400)])


def pressed(steps: list[dict[str, Any]]) -> None:
    for record in steps[250:]:
        record["layer_entropy"]["h.1"] = 0.02


def vector(steps: list[dict[str, Any]]) -> None:
    for record in steps[100:]:
        record["measures"] = {**record["measures"], "mean_share": 0.9, "centered_cosine_entropy": 1.6}


def heavy(steps: list[dict[str, Any]]) -> None:
    for record in steps[100:]:
        record["loss"] = 5.0
        if record["phase"] == "compression":
            record["entropy_share"] = 0.6


def light(steps: list[dict[str, Any]]) -> None:
    for record in steps:
        record["entropy"] = 1.6
        if record["phase"] == "compression":
            record["entropy_share"] = 0.001


def broken(steps: list[dict[str, Any]]) -> None:
    steps[-1]["nonfinite_steps"] = 30


CASES: dict[str, Run] = {
    "too_short": run_of(steps=10, plain=True),
    "few_validations": run_of(plain=True, settings={"gapt": {"gate": {"signal": "validation"}}}),
    "never_compressed": run_of(plain=True),
    "overfits_unseen": Run.of(
        records(400, plain=True), [{"step": 80 * i, "loss": 3 - 0.5 * i if i < 3 else 2 + 0.3 * i} for i in range(1, 6)]
    ),
    "compressed_at_once": run_of(at_once),
    "spiked": run_of(spiking),
    "short_phases": run_of(fluttering),
    "stuck_in_compression": run_of(stuck),
    "weight_too_small": run_of(light),
    "weight_too_large": run_of(heavy),
    "pressed_below_use": run_of(pressed),
    "norms_alone": run_of(norms=True),
    "common_vector": run_of(vector),
    "not_finite": run_of(broken),
}


@pytest.mark.parametrize("key", FINDINGS)
def test_each_finding_is_found(key: str) -> None:
    assert key in [found.key for found in diagnose(CASES[key])]


def test_a_healthy_run_has_none() -> None:
    run = run_of()
    assert diagnose(run) == []
    assert verdict(run) == NOTHING_FOUND


def test_a_frozen_gate_is_no_fault() -> None:
    plain = run_of(plain=True, settings={"config": {"gate": {"frozen": True}}})
    assert (diagnose(plain), verdict(plain)) == ([], PLAIN_RUN)
    penalty = run_of(lambda steps: phases(steps, [(1, 400)]), settings={"gate": {"frozen": True}})
    found = diagnose(penalty)
    assert "stuck_in_compression" not in [one.key for one in found]
    assert verdict(penalty) == CONSTANT_PENALTY
    empty = Run.of([])
    assert (diagnose(empty), verdict(empty)) == ([], NO_STEPS)


def test_a_gate_that_saw_enough_validations_is_judged_by_them() -> None:
    def never(validations: int) -> list[str]:
        steps = records(400, plain=True)
        for i in range(validations):
            steps[20 * i]["validation_loss"] = 3.0 - 0.1 * i
        return [one.key for one in diagnose(Run.of(steps, settings={"gate": {"signal": "validation"}}))]

    assert "few_validations" in never(1)
    assert "few_validations" not in never(16)


def test_a_phase_without_entropies_is_not_called_stuck() -> None:
    def without(steps: list[dict[str, Any]]) -> None:
        stuck(steps)
        for record in steps:
            del record["entropy"]

    assert "stuck_in_compression" in [one.key for one in diagnose(run_of(stuck))]
    assert "stuck_in_compression" not in [one.key for one in diagnose(run_of(without))]


def test_findings_are_in_their_order() -> None:
    run = run_of(lambda steps: (spiking(steps), broken(steps)))  # type: ignore[func-returns-value]
    keys = [found.key for found in diagnose(run)]
    assert keys == [key for key in FINDINGS if key in keys]
    assert {"spiked", "not_finite"} <= set(keys)


@pytest.mark.parametrize("finding", FINDINGS.values(), ids=list(FINDINGS))
def test_sentences_name_settings_that_exist(finding: Any) -> None:
    config = GAPTConfig().model_dump()
    named = re.findall(r"\b(entropy|gate|objective|layers|alignment)\.([a-z_]+)", finding.change)
    assert named
    for section, name in named:
        assert name in config[section], (section, name)
    assert "{" not in finding.what.format(**finding.example)
    for text in (finding.title, finding.what, finding.why, finding.change):
        assert text[0].isupper() or text[0] in "{0123456789"
    assert finding.what.endswith(".")
    assert finding.change.endswith(".")


def test_settings_are_found_however_deep() -> None:
    assert section_of({"a": {"b": {"gate": {"frozen": True}}}}, "gate") == {"frozen": True}
    assert section_of({"gate": "text"}, "gate") == {}


def test_normalized_entropies_are_no_nats() -> None:
    run = run_of(pressed, settings={"entropy": {"normalize": True}})
    assert "pressed_below_use" not in [found.key for found in diagnose(run)]


def sparse(steps: list[dict[str, Any]]) -> None:
    for record in steps:
        if record["step"] % 10:
            del record["measures"], record["layer_measures"], record["alignment"]


@pytest.mark.parametrize("key", ["norms_alone", "common_vector"])
def test_measures_of_every_tenth_step_are_enough(key: str) -> None:
    def change(steps: list[dict[str, Any]]) -> None:
        if key == "common_vector":
            vector(steps)
        sparse(steps)

    assert [found.key for found in diagnose(run_of(change, norms=key == "norms_alone"))] == [key]
    assert diagnose(run_of(sparse)) == []


def test_one_layer_that_evades_is_named() -> None:
    """The mean over layers hides it."""

    def one_layer(steps: list[dict[str, Any]]) -> None:
        for record in steps:
            compressed = record["step"] > 150
            record["entropy"] = 1.5
            record["layer_entropy"] = {f"h.{i}": 0.2 if compressed and i == 1 else 1.6 for i in range(3)}
            usual = {"centered_cosine_entropy": 1.4, "norm_ratio": 2.0, "mean_share": 0.2, "linear_entropy": 1.6}
            evading = usual | {"norm_ratio": 20.0} if compressed else usual
            record["measures"] = usual
            record["layer_measures"] = {f"h.{i}": evading if i == 1 else usual for i in range(3)}

    found = {one.key: one.what for one in diagnose(run_of(one_layer))}
    assert "layer h.1 fell by 88%" in found["norms_alone"]
    assert "from 2 to 20 times the median" in found["norms_alone"]
    assert "pressed_below_use" not in found


def test_a_rise_is_judged_as_a_rise() -> None:
    """With direction="up" the entropy is to grow: what evaded on the way down is the goal of nothing on the way up."""
    up = {"objective": {"direction": "up"}}

    def rising(steps: list[dict[str, Any]]) -> None:
        for record in steps:
            late = record["step"] > 100
            record["entropy"] = 1.5 if late else 0.5
            record["measures"] = {"linear_entropy": record["entropy"], "centered_cosine_entropy": 0.8,
                                  "norm_ratio": 2.0 if late else 20.0, "mean_share": 0.2}  # fmt: skip

    (found,) = diagnose(run_of(rising, settings=up))
    assert found.key == "norms_alone"
    assert "rose by 200%" in found.what
    assert diagnose(run_of(rising)) == []  # on the way down it is no evasion
    assert "pressed_below_use" not in [found.key for found in diagnose(run_of(pressed, settings=up))]

    def still(steps: list[dict[str, Any]]) -> None:
        light(steps)
        for record in steps[150:]:
            record["entropy"] = 2.4

    assert "weight_too_small" in [found.key for found in diagnose(run_of(still))]
    assert "weight_too_small" not in [found.key for found in diagnose(run_of(still, settings=up))]


def test_where_the_defaults_are_the_judge_it_is_said() -> None:
    assert judged_by(run_of()) == ["No settings of gapt_optim were found: judged by the defaults"]
    assert judged_by(run_of(settings={"lr": 1})) == judged_by(run_of())
    known = "settings.json does not say how the gate was set: judged by its defaults"
    assert judged_by(run_of(settings={"config": {"entropy": {"alpha": 1}}})) == [known]
    assert judged_by(run_of(settings={"gate": {"patience": 10, "rule": "smoothed"}})) == [
        "settings.json: gate.patience could not be used; the defaults are in place of it"
    ]
    assert judged_by(run_of(settings=GAPTConfig().model_dump())) == []
    assert judged_by(Run.of([])) == []
