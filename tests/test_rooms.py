"""Nothing outside a room of the package uses a private name of it. `lint-imports` checks that imports point one way.

A room is a module or folder directly under `gapt_optim`. A name is private to it when it begins with one underscore and
is defined there: a function, a class, a method, an attribute or a variable.
"""

from __future__ import annotations

import ast
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "gapt_optim"
OUTSIDE = ("examples", "benchmarks", "docs")
OF_NAMED_TUPLES = {"_asdict", "_fields", "_make", "_replace"}  # public, whatever they look like


def room_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def trees(folder: Path) -> Iterator[tuple[Path, ast.Module]]:
    for path in sorted(folder.rglob("*.py")):
        yield path, ast.parse(path.read_text(encoding="utf-8"), str(path))


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__") and name != "_" and name not in OF_NAMED_TUPLES


def defined(tree: ast.AST) -> set[str]:
    """Private names that a module defines."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            found.add(node.name)
        elif isinstance(node, ast.Name | ast.Attribute) and isinstance(node.ctx, ast.Store):
            found.add(node.id if isinstance(node, ast.Name) else node.attr)
    return set(filter(is_private, found))


def used(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Private names that a module reads from elsewhere: attributes, and names that it imports."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and is_private(node.attr):
            # What a class inherits is its own.
            if not (isinstance(node.value, ast.Name) and node.value.id in ("self", "cls")):
                yield node.lineno, node.attr
        elif isinstance(node, ast.ImportFrom):
            yield from ((node.lineno, alias.name) for alias in node.names if is_private(alias.name))


MODULES = list(trees(PACKAGE))
ROOMS = {room_of(path) for path, _ in MODULES}
PRIVATE = {room: set[str]().union(*(defined(t) for p, t in MODULES if room_of(p) == room)) for room in ROOMS}


def trespasses(path: Path, tree: ast.AST, own: Iterable[str], rooms: Iterable[str]) -> list[str]:
    theirs = {name: room for room in rooms for name in PRIVATE[room]}
    return [
        f"{path.relative_to(ROOT)}:{line} uses {name} of {theirs[name]}"
        for line, name in used(tree)
        if name in theirs and name not in own and name not in ROOMS
    ]


@pytest.mark.parametrize("room", sorted(ROOMS))
def test_no_private_name_of_another_room_is_used(room: str) -> None:
    found = []
    for path, tree in MODULES:
        if room_of(path) == room:
            found += trespasses(path, tree, PRIVATE[room], ROOMS - {room})
    assert found == []


@pytest.mark.parametrize("folder", OUTSIDE)
def test_no_private_name_is_used_outside_the_package(folder: str) -> None:
    found = []
    for path, tree in trees(ROOT / folder):
        found += trespasses(path, tree, defined(tree), ROOMS)
    assert found == []


@pytest.mark.parametrize("folder", OUTSIDE)
def test_no_private_module_is_imported_outside_the_package(folder: str) -> None:
    found = []
    for path, tree in trees(ROOT / folder):
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "gapt_optim":
                parts = [*(node.module or "").split("."), *(alias.name for alias in node.names)]
                found += [
                    f"{path.relative_to(ROOT)}:{node.lineno} imports {part}" for part in parts if is_private(part)
                ]
    assert found == []


def test_a_trespass_is_found() -> None:
    room = next(room for room in sorted(ROOMS) if PRIVATE[room])
    name = sorted(PRIVATE[room])[0]
    assert trespasses(ROOT / "x.py", ast.parse(f"other.{name}()"), set(), ROOMS)
    assert not trespasses(ROOT / "x.py", ast.parse(f"other.{name}()"), {name}, ROOMS)
