"""Each finding is found in a run that has it, and not in a healthy one; its sentences name settings that exist."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest

from gapt_optim import GAPTConfig
from gapt_optim.viewing import FINDINGS, RunHistory, diagnose
from gapt_optim.viewing.doctor import find_section, verdict
from gapt_optim.viewing.findings import CONSTANT_PENALTY, NO_STEPS, NOTHING_FOUND, PLAIN_RUN

from .runs import history, records

Change = Callable[[list[dict[str, Any]]], None]


def run_of(change: Change | None = None, settings: dict[str, Any] | None = None, **options: Any) -> RunHistory:
    steps = records(**({"steps": 400, "period": 200} | options))
    if change is not None:
        change(steps)
    return RunHistory(steps, [], settings or {})


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


CASES: dict[str, RunHistory] = {
    "too_short": run_of(steps=10, plain=True),
    "few_validations": run_of(plain=True, settings={"gapt": {"gate": {"signal": "validation"}}}),
    "never_compressed": run_of(plain=True),
    "overfits_unseen": RunHistory(
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
    assert verdict(run, []) == NOTHING_FOUND


def test_runs_without_phases_are_not_judged() -> None:
    plain = run_of(plain=True, settings={"config": {"gate": {"frozen": True}}})
    assert (diagnose(plain), verdict(plain, [])) == ([], PLAIN_RUN)
    penalty = run_of(lambda steps: phases(steps, [(1, 400)]), settings={"gate": {"frozen": True}})
    found = diagnose(penalty)
    assert "stuck_in_compression" not in [one.key for one in found]
    assert verdict(penalty, []) == CONSTANT_PENALTY
    empty = RunHistory([])
    assert (diagnose(empty), verdict(empty, [])) == ([], NO_STEPS)


def test_a_run_with_findings_needs_no_verdict() -> None:
    run = CASES["not_finite"]
    assert verdict(run, diagnose(run)) == ""


def test_a_gate_that_saw_enough_validations_is_judged_by_them() -> None:
    def never(validations: int) -> list[str]:
        steps = records(400, plain=True)
        for i in range(validations):
            steps[20 * i]["validation_loss"] = 3.0 - 0.1 * i
        return [one.key for one in diagnose(RunHistory(steps, [], {"gate": {"signal": "validation"}}))]

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
    for path in finding.settings:
        section, name = path.split(".")
        assert name in config[section], path
        assert path in finding.change
    named = set(re.findall(r"\b(?:entropy|gate|objective|layers|alignment)\.[a-z_]+", finding.change))
    assert named == set(finding.settings)
    assert "{" not in finding.filled(**finding.example)
    for text in (finding.title, finding.what, finding.why, finding.change):
        assert text[0].isupper() or text[0] in "{0123456789"
    assert finding.what.endswith(".")
    assert finding.change.endswith(".")


def test_settings_are_found_however_deep() -> None:
    assert find_section({"a": {"b": {"gate": {"frozen": True}}}}, "gate") == {"frozen": True}
    assert find_section({"gate": "text"}, "gate") == {}


def test_normalized_entropies_are_no_nats() -> None:
    run = run_of(pressed, settings={"entropy": {"normalize": True}})
    assert "pressed_below_use" not in [found.key for found in diagnose(run)]
    assert history().steps
