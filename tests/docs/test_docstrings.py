"""Every public class and function has an example in its docstring, and every example in a docstring runs."""

from __future__ import annotations

import doctest
import importlib
import inspect
import pkgutil
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any, get_type_hints

import pytest
from pandas import DataFrame

import gapt_optim

PUBLIC_MODULES = [
    "gapt_optim",
    "gapt_optim.profiling",
    "gapt_optim.reporting",
    "gapt_optim.integrations.lightning",
    "gapt_optim.integrations.trackers",
    "gapt_optim.integrations.transformers",
]


def public() -> dict[str, Any]:
    """Classes and functions that others import, by their full name."""
    found: dict[str, Any] = {}
    for module_name in PUBLIC_MODULES:
        module = importlib.import_module(module_name)
        for name in getattr(module, "__all__", None) or _defined_in(module):
            value = getattr(module, name)
            is_error = inspect.isclass(value) and issubclass(value, BaseException)
            if inspect.isfunction(value) or (inspect.isclass(value) and not is_error):
                found[f"{module_name}.{name}"] = value
    return found


def _defined_in(module: ModuleType) -> list[str]:
    return [
        name
        for name, value in vars(module).items()
        if not name.startswith("_") and getattr(value, "__module__", None) == module.__name__
    ]


def modules() -> Iterator[str]:
    yield "gapt_optim"
    for found in pkgutil.walk_packages(gapt_optim.__path__, "gapt_optim."):
        yield found.name


@pytest.mark.parametrize("name", sorted(public()))
def test_public_name_has_an_example(name: str) -> None:
    assert ">>> " in (inspect.getdoc(public()[name]) or ""), f"{name} has no example in its docstring"


@pytest.mark.parametrize("name", sorted(public()))
def test_hints_of_a_public_name_resolve(name: str) -> None:
    """For tools that read them at run time, such as a command line made of a signature."""
    value = public()[name]
    for member in [value, *(vars(value).values() if inspect.isclass(value) else ())]:
        called = member.fget if isinstance(member, property) else getattr(member, "__func__", member)
        if inspect.isclass(called) or inspect.isfunction(called):
            get_type_hints(called, localns={"DataFrame": DataFrame})  # pandas is imported when it is used


@pytest.mark.parametrize("name", sorted(modules()))
def test_examples_of_the_module_run(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")  # DeepSpeed, where it is installed, says otherwise what it found
    options = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
    result = doctest.testmod(importlib.import_module(name), optionflags=options)
    assert result.failed == 0
