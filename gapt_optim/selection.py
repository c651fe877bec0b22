"""Which modules of a model are meant: globs, names, modules, or the automatic choice."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase
from typing import TypeAlias

from torch import nn

_CONTAINERS = (nn.ModuleList, nn.ModuleDict, nn.ParameterList, nn.ParameterDict)
_MOST_PROPOSED = 6

Layers: TypeAlias = str | nn.Module | Iterable[str | nn.Module] | None


def select_layers(model: nn.Module, layers: Layers) -> dict[str, nn.Module]:
    """The modules that ``layers`` names, by name, in the model's own order."""
    named = dict(model.named_modules())
    if layers is None:
        return _longest_list(model)
    if not isinstance(layers, str | nn.Module | Iterable):
        raise TypeError(
            f"layers must be a glob, a name, a module, a list of these or None, found {type(layers).__name__}"
        )
    wanted = [layers] if isinstance(layers, str | nn.Module) else list(layers)
    if not wanted:
        raise ValueError("layers is empty; name at least one module, or pass None for the automatic choice")
    chosen: set[str] = set()
    for item in wanted:
        if isinstance(item, nn.Module):
            matches = [name for name, module in named.items() if module is item]
            problem = f"layers holds a {type(item).__name__} that is no module of the model"
        elif isinstance(item, str):
            matches = [name for name in named if _matches(name, item)]
            problem = f'layers="{item}" matches no module of the model'
        else:
            raise TypeError(f"layers must hold names, globs or modules, found {type(item).__name__}")
        if not matches:
            raise ValueError(f"{problem}; {_suggest(item, named)}")
        chosen.update(matches)
    return {name: module for name, module in named.items() if name in chosen}


def _matches(name: str, pattern: str) -> bool:
    parts, patterns = name.split("."), pattern.split(".")
    fits = len(parts) == len(patterns) and all(map(fnmatchcase, parts, patterns))
    return name == pattern or (fits and name != "")  # no glob means the model as a whole


def _suggest(item: str | nn.Module, named: Mapping[str, nn.Module]) -> str:
    if isinstance(item, str):
        for prefix in ("module.", "_orig_mod."):
            if any(_matches(name, prefix + item) for name in named):
                return f'the model is wrapped, use "{prefix}{item}"'
    names = [name for name in named if name]
    shown = ", ".join(f'"{name}"' for name in names[:12])
    return f"its modules are {shown}{', ...' if len(names) > 12 else ''}"


def _longest_list(model: nn.Module) -> dict[str, nn.Module]:
    lists = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) > 0 and len({type(child) for child in module}) == 1
    }
    length = max(map(len, lists.values()), default=0)
    longest = [name for name, module in lists.items() if len(module) == length]
    if len(longest) == 1:
        within = set(lists[longest[0]])
        # named_modules has a module that stands in several places once, and so it has one tap.
        return {name: module for name, module in model.named_modules() if module in within}
    if not longest:
        raise ValueError(f"layers=None needs an nn.ModuleList of one class, and the model has none; {_propose(model)}")
    globs = dict.fromkeys(_glob(f"{name}.0" if name else "0", within_words=False) for name in longest)
    raise ValueError(f"layers=None is ambiguous, several lists have {length} modules; {_pass(list(globs))}")


def _propose(model: nn.Module) -> str:
    """Globs that match modules which go together, the blocks of a model first; or single modules where there are none.

    Containers that are never called themselves are not proposed.
    """
    named = {name: module for name, module in model.named_modules() if name and not isinstance(module, _CONTAINERS)}
    alike: dict[str, list[str]] = {}
    for name in named:
        alike.setdefault(_glob(name), []).append(name)

    def rank(glob: str) -> tuple[bool, int]:
        modules = [named[name] for name in alike[glob]]
        kind, *others = {type(module) for module in modules}
        blocks = not others and any(True for module in modules for _ in module.children())
        return not blocks or issubclass(kind, nn.Sequential), glob.count(".")

    def fits(glob: str) -> bool:
        found = [name for name, _ in model.named_modules() if _matches(name, glob)]
        trains = any(True for name in found if name in named for _ in named[name].parameters())
        return len(found) > 1 and found == alike[glob] and trains

    globs = sorted(filter(fits, alike), key=rank)[:_MOST_PROPOSED]
    if globs:
        return _pass(globs)
    names = list(named)[:_MOST_PROPOSED]
    if not names:
        return "it is a single module; to watch its output, pass it: RepresentationHook(model, model)"
    return f"name layers: {', '.join(map(_quoted, names))}"


def _glob(name: str, *, within_words: bool = True) -> str:
    """``name`` with * for each number in it: for a part that is one, or also at the end of a word, as in ``fc1``."""
    starred = (re.sub(r"\d+$" if within_words else r"^\d+$", "*", part) for part in name.split("."))
    return ".".join(starred)


def _pass(globs: list[str]) -> str:
    return f"pass {'one of ' if len(globs) > 1 else ''}{', '.join(map(_quoted, globs))}"


def _quoted(name: str) -> str:
    return f'"{name}"'
