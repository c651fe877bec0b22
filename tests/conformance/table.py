"""Runs every statement on every input set and writes what came of it: ``python -m tests.conformance.table``.

The counts go to ``tests/conformance/results.json``, the table made of them to ``docs/conformance.md``. Names of
statements as arguments run only those, and keep the counts of the others.
"""

from __future__ import annotations

import json
import sys
import warnings
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "tests" / "conformance" / "results.json"
PAGE = ROOT / "docs" / "conformance.md"
FORMS = ("bare", "alone", "several")

EXPLAINED = {
    "can be copied": "LBFGS cannot be copied or pickled: PyTorch leaves out its list of parameters. It is the same in "
    "the wrapper.",
    "groups are added": "With several optimizers a group is added to one of them, "
    "`optimizer.base[i].add_param_group(...)`; the wrapper's own method refuses and says so.",
    "wrong groups are refused": "As above.",
    "parameter groups can be changed": "With several, `param_groups` is a new list of the optimizers' own groups at "
    "every access: the groups are changed in place, the lists are those of `optimizer.base[i]`.",
    "hooks on all optimizers": "They are called with the wrapped optimizers, once for each of their steps.",
    "goes in the right direction": "With `maximize` not as one of several: AdamW beside it minimizes.",
    "gradient scaler": "Not for LBFGS, which needs a closure, and SparseAdam: a scaler unscales no sparse gradients "
    "on a CPU.",
    "sparse gradients": "For SGD, Adagrad and SparseAdam, without weight decay.",
    "complex parameters": "Not for Adafactor, Muon and SparseAdam, which take none.",
}


def counts(names: list[str]) -> dict[str, Any]:
    """For each statement: how many cases it applies to, and how many of them pass, by form."""
    from tests.conformance import scheduler_statements
    from tests.conformance.statements import STATEMENTS, outcome
    from tests.conformance.subjects import cases

    found: dict[str, Any] = {}
    for name, statement in STATEMENTS.items():
        if names and name not in names:
            continue
        row: dict[str, Any] = {form: {"cases": 0, "passed": 0} for form in FORMS}
        for case in (case for each in cases().values() for case in each):
            for form in FORMS:
                came = outcome(statement, case, form)
                row[form]["cases"] += came != "does not apply"
                row[form]["passed"] += came == "passed"
        found[name] = row
        print(name, row, flush=True)
    for name, statement in scheduler_statements.STATEMENTS.items():
        if names and name not in names:
            continue
        row = {form: {"cases": 0, "passed": 0} for form in FORMS}
        for scheduler in scheduler_statements.SCHEDULERS:
            for form in FORMS:
                row[form]["cases"] += 1
                row[form]["passed"] += scheduler_statements.outcome(statement, scheduler, form) == "passed"
        found[name] = row
        print(name, row, flush=True)
    return found


_TEMPLATE = """\
# Conformance

What PyTorch's own tests say of an optimizer, restated for the wrapper. Each statement is run on every optimizer of
PyTorch's test database with every input set that the database has for it: bare, in the wrapper alone, and in the
wrapper as one of two, the other being AdamW. Counts are input sets for which the statement holds, of those that it
applies to. Where it holds for the bare optimizer it holds in the wrapper: a test checks that case by case.

Run with PyTorch {torch}; `python -m tests.conformance.table` writes this page.

{optimizers}

## Schedulers

The same for every scheduler of `torch.optim.lr_scheduler`, and `SWALR`, on SGD with momentum.

{schedulers}

## Differences

{differences}
- **LBFGS** evaluates its closure several times in a step, so it must be the only optimizer in a wrapper. It has no case
  as one of several.
- `repr` of a wrapper shows the wrapped optimizers within, and loggers that name an optimizer by its class, such as
  Lightning's `LearningRateMonitor`, say `GAPTOptimizer`.

## Other libraries

Every optimizer of torch.optim, torchao, schedulefree and pytorch_optimizer that can be stepped on a CPU trains, saves
to a file, loads into a new model and optimizer, and goes on: {alone} of them alone, {paired} beside AdamW. The weights
are those of the same run without the wrapper, bit for bit (`tests/conformance/test_libraries.py`). Those that evaluate
a closure themselves, as SAM and LBFGS do, must be alone. Not among them:

{not_stepped}
"""


def page(results: dict[str, Any]) -> str:
    """The results as a page."""
    from tests.conformance import scheduler_statements
    from tests.conformance.libraries import NOT_STEPPED, ways
    from tests.conformance.statements import STATEMENTS

    found, stepped = results["statements"], ways().values()
    return _TEMPLATE.format(
        torch=results["torch"],
        optimizers=_rows("optimizers", STATEMENTS, found),
        schedulers=_rows("schedulers", scheduler_statements.STATEMENTS, found),
        differences="\n".join(f"- **{name}**: {why}" for name, why in EXPLAINED.items()),
        alone=len(stepped),
        paired=sum(not way.alone_only for way in stepped),
        not_stepped="\n".join(f"- `{name}`: {why}" for name, why in NOT_STEPPED.items()),
    )


def _rows(what: str, statements: Any, results: dict[str, Any]) -> str:
    lines = ["| statement | bare | wrapped alone | wrapped as one of several |", "|---|---|---|---|"]
    for name, statement in statements.items():
        row = results[name]
        cells = (f"{row[form]['passed']} of {row[form]['cases']}" for form in FORMS)
        sampled = " (first and last input set only)" if row.get("sampled") else ""
        lines.append(f"| {' '.join((statement.__doc__ or '').split())}{sampled} | {' | '.join(cells)} |")
    totals = [[sum(results[name][form][key] for name in statements) for key in ("passed", "cases")] for form in FORMS]
    lines.append(f"| **all {what}** | {' | '.join(f'**{passed} of {cases}**' for passed, cases in totals)} |")
    return "\n".join(lines)


def main(names: list[str]) -> None:
    warnings.simplefilter("error")
    warnings.filterwarnings("ignore", "Sparse invariant checks", UserWarning)
    torch.set_num_threads(1)
    old = json.loads(RESULTS.read_text())["statements"] if names and RESULTS.exists() else {}
    results = {"torch": torch.__version__.split("+")[0], "statements": old | counts(names)}
    RESULTS.write_text(json.dumps(results, indent=1) + "\n")
    PAGE.parent.mkdir(exist_ok=True)
    PAGE.write_text(page(results))


if __name__ == "__main__":
    main(sys.argv[1:])
