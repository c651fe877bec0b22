"""Mutants of a module: the operators of cosmic-ray, one change each, inside functions."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import CodeType
from typing import Any

import parso
from cosmic_ray.ast import Visitor, ast_nodes
from cosmic_ray.operators.provider import OperatorProvider

ROOT = Path(__file__).resolve().parents[2]
GROUPS: dict[str, list[str]] = {
    "entropy": ["gapt_optim/entropy.py", "gapt_optim/kernels.py", "gapt_optim/windows.py"],
    "gate": ["gapt_optim/gate.py"],
    "alignment": ["gapt_optim/alignment.py", "gapt_optim/comparison.py"],
    "layout": sorted(str(path.relative_to(ROOT)) for path in (ROOT / "gapt_optim" / "layout").glob("*.py")),
    "capture": ["gapt_optim/hook.py", "gapt_optim/watching.py", "gapt_optim/passes.py", "gapt_optim/shards.py"],
    "objective": ["gapt_optim/objective.py", "gapt_optim/sums.py"],
    "step": [
        f"gapt_optim/{name}.py" for name in ("step", "progress", "notices", "gradients", "undeclared", "optimizer")
    ],
}

# Within a family, so that a mutant computes something else and does not merely raise TypeError at once.
_ARITHMETIC = {"Add", "Sub", "Mul", "Div", "FloorDiv", "Mod", "Pow"}
_BITS = {"BitOr", "BitAnd", "BitXor"}
_ORDER = {"Eq", "NotEq", "Lt", "LtE", "Gt", "GtE"}
_IDENTITY = {"Is", "IsNot"}
_NEEDS_ARGUMENTS = {"VariableReplacer", "VariableInserter"}
_OF_IMPORTS = {"RemoveDecorator"}  # what a decorator does is done before the tests


def _operators() -> Iterator[tuple[str, Any]]:
    provider = OperatorProvider()
    for name in provider:
        if name in _NEEDS_ARGUMENTS | _OF_IMPORTS:
            continue
        if name.startswith(("ReplaceBinaryOperator_", "ReplaceComparisonOperator_")):
            _, before, after = name.split("_")
            if not any({before, after} <= family for family in (_ARITHMETIC, _BITS, _ORDER, _IDENTITY)):
                continue
        yield name, provider[name]()


@dataclass(frozen=True)
class Mutant:
    """One change of one file."""

    path: str
    operator: str
    occurrence: int
    line: int
    last_line: int
    """Of the statement."""
    place: tuple[int, int]

    def source(self) -> str:
        """The whole file with the change."""
        visitor = _OneChange(dict(_operators())[self.operator], self.occurrence)
        code: str = visitor.walk(parso.parse((ROOT / self.path).read_text())).get_code()
        return code

    def described(self) -> tuple[str, str]:
        """The line before and after."""
        number = self.place[0] - 1
        before, after = (ROOT / self.path).read_text().splitlines(), self.source().splitlines()
        return before[number].strip(), after[number].strip()


class _OneChange(Visitor):
    """Changes the ``occurrence``-th place at which ``operator`` can change something."""

    def __init__(self, operator: Any, occurrence: int) -> None:
        self.operator, self.occurrence, self.count = operator, occurrence, 0

    def visit(self, node: Any) -> Any:
        for index, _ in enumerate(list(self.operator.mutation_positions(node))):
            if self.count == self.occurrence:
                self.count += 1
                return self.operator.mutate(node, index)
            self.count += 1
        return node


def every_mutant(path: str) -> list[Mutant]:
    """All of one file, whether inside a function or not."""
    tree, found = parso.parse((ROOT / path).read_text()), []
    for name, operator in _operators():
        occurrence = 0
        for node in ast_nodes(tree):
            for start, _ in list(operator.mutation_positions(node)):
                occurrence += 1
                if _says_nothing(node):
                    continue
                statement = _statement(node)
                first, last = statement.start_pos[0], statement.end_pos[0]
                found.append(Mutant(path, name, occurrence - 1, first, last, start))
    return found


def _says_nothing(node: Any) -> bool:
    """The ``True`` of ``zip(..., strict=True)``, a check that two lengths are equal, and the ``*`` of a signature."""
    around = node.parent
    strict = around is not None and around.type == "argument" and around.children[0].get_code().strip() == "strict"
    return strict or (around is not None and around.type in ("parameters", "param"))


def _statement(node: Any) -> Any:
    """The smallest statement around a node; of a compound one, its head stands for it."""
    while node.parent is not None and node.type not in (
        "simple_stmt", "if_stmt", "while_stmt", "for_stmt", "with_stmt", "try_stmt", "funcdef",
    ):  # fmt: skip
        node = node.parent
    return node.children[1] if node.type in ("if_stmt", "while_stmt", "for_stmt") else node


def functions(path: str, source: str) -> dict[tuple[str, int], CodeType]:
    """Code of every function, by qualified name and line. Lines stay what they are in a mutant."""
    found: dict[tuple[str, int], CodeType] = {}

    def walk(code: CodeType) -> None:
        for constant in code.co_consts:
            if isinstance(constant, CodeType):
                if constant.co_flags & 1:  # optimized: a function, not the body of a class
                    found[constant.co_qualname, constant.co_firstlineno] = constant
                walk(constant)

    walk(compile(source, str(ROOT / path), "exec"))
    return found


def changed_functions(mutant: Mutant) -> dict[tuple[str, int], CodeType]:
    """New code of the functions that a mutant changes; nothing where it changes none, or is no Python any more."""
    try:
        after = functions(mutant.path, mutant.source())
    except SyntaxError:
        return {}
    before = functions(mutant.path, (ROOT / mutant.path).read_text())
    return {key: code for key, code in after.items() if key in before and code != before[key]}


def sampled(group: str, count: int, seed: int) -> list[Mutant]:
    """``count`` places of a group, drawn at random, with one mutant each, drawn at random too."""
    drawn = random.Random(f"{group} {seed}")
    places: dict[tuple[str, tuple[int, int]], list[Mutant]] = {}
    for path in GROUPS[group]:
        for mutant in every_mutant(path):
            places.setdefault((path, mutant.place), []).append(mutant)
    order = sorted(places)
    drawn.shuffle(order)
    chosen: list[Mutant] = []
    for place in order:
        of_place = drawn.sample(places[place], len(places[place]))
        chosen += next(([mutant] for mutant in of_place if changed_functions(mutant)), [])
        if len(chosen) == count:
            break
    return chosen
