"""PyTorch's own statements on optimizers and schedulers hold in the wrapper wherever they hold without it."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch

from tests.conformance import scheduler_statements
from tests.conformance.statements import STATEMENTS, outcome
from tests.conformance.subjects import BARE_OF, cases
from tests.conformance.table import EXPLAINED, PAGE, RESULTS, page

pytestmark = pytest.mark.filterwarnings("ignore:Sparse invariant checks:UserWarning")

CASES = cases()


def as_bare(statement: str, inputs: list[Any], *, compare: bool = True) -> int:
    """How many of the inputs the statement held for, in the wrapper.

    Args:
        compare: run it on the bare optimizer also where it holds in the wrapper, which is most of the work.
    """
    held = 0
    for case in inputs:
        for form, bare in BARE_OF.items():
            ours = outcome(STATEMENTS[statement], case, form)
            held += ours == "passed"
            if ours == "passed" and not compare:
                continue
            theirs = outcome(STATEMENTS[statement], case, bare)
            if theirs == "does not apply":  # two bare optimizers have no such method together
                theirs = ours if ours == "does not apply" else "passed"
            assert ours == theirs or (ours != "passed" and theirs != "passed"), (form, case.kwargs, ours, theirs)
            assert ours in ("passed", "does not apply") or statement in EXPLAINED, (form, case.kwargs, ours)
    return held


@pytest.mark.parametrize("optimizer", CASES)
@pytest.mark.parametrize("statement", STATEMENTS)
def test_statement_on_one_input_set(statement: str, optimizer: str) -> None:
    """The one with the most settings."""
    as_bare(statement, [max(CASES[optimizer], key=lambda case: len(case.kwargs))], compare=False)


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", CASES)
@pytest.mark.parametrize("statement", STATEMENTS)
def test_statement_on_every_input_set(statement: str, optimizer: str) -> None:
    as_bare(statement, CASES[optimizer])


@pytest.mark.parametrize("scheduler", scheduler_statements.SCHEDULERS)
@pytest.mark.parametrize("form", [pytest.param("bare", marks=pytest.mark.slow), "alone", "several"])
def test_statements_on_a_scheduler(scheduler: str, form: str) -> None:
    for name, statement in scheduler_statements.STATEMENTS.items():
        assert scheduler_statements.outcome(statement, scheduler, form) == "passed", name


def test_every_scheduler_of_torch_is_among_them() -> None:
    module = torch.optim.lr_scheduler
    there = {
        name
        for name, value in vars(module).items()
        if isinstance(value, type) and issubclass(value, module.LRScheduler) and name in module.__all__
    }
    assert there - {"LRScheduler"} <= scheduler_statements.SCHEDULERS.keys()


def test_the_page_is_made_of_the_results() -> None:
    results = json.loads(RESULTS.read_text())
    assert PAGE.read_text() == page(results)
    for name, row in results["statements"].items():
        if name not in EXPLAINED:
            for form in ("bare", "alone", "several"):
                assert row[form]["passed"] == row[form]["cases"] > 0, name
        assert row["alone"] == row["bare"], name


@pytest.mark.skipif(
    torch.__version__.split("+")[0] != json.loads(RESULTS.read_text())["torch"], reason="another test database"
)
def test_the_results_are_of_every_input_set() -> None:
    results = json.loads(RESULTS.read_text())["statements"]
    count = sum(map(len, CASES.values()))
    assert results.keys() == STATEMENTS.keys() | scheduler_statements.STATEMENTS.keys()
    assert results["trains as bare"]["bare"]["cases"] == count
    assert results["trains as bare"]["several"]["cases"] == count - len(CASES["LBFGS"])
    assert all(row["bare"]["cases"] <= count for row in results.values())
