"""Which modules of a model are meant: globs, names, modules, or the blocks that a forward pass shows."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from fnmatch import fnmatchcase
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from .._unsaved import Unsaved, leave_out
from .operations import tensors_within

_CONTAINERS = (nn.ModuleList, nn.ModuleDict, nn.ParameterList, nn.ParameterDict)
_MOST_PROPOSED = 6

Layers: TypeAlias = str | nn.Module | Iterable[str | nn.Module] | None


def select_layers(model: nn.Module, layers: str | nn.Module | Iterable[str | nn.Module]) -> dict[str, nn.Module]:
    """The modules that ``layers`` names, by name, in the model's own order.

    Raises:
        TypeError: it is, or holds, something else than globs, names and modules.
        ValueError: it is empty, or a part of it matches no module.
    """
    named = dict(model.named_modules())
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
    scripted = [name for name in chosen if isinstance(named[name], torch.jit.ScriptModule)]
    if scripted:
        raise ValueError(
            f'layer "{min(scripted)}" is a module of TorchScript, which runs no hooks; watch a module around it, or '
            "give the model that it was made from"
        )
    return {name: module for name, module in named.items() if name in chosen}


def by_layer(argument: str, value: Any, names: Mapping[str, Any]) -> dict[str, Any]:
    """What ``argument`` says of each layer: one value for all, or the first glob of a mapping that matches it.

    Raises:
        ValueError: a glob matches no layer.
    """
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        return dict.fromkeys(names, value)
    for glob in value:
        if not any(fnmatchcase(name, glob) for name in names):
            raise ValueError(f"{argument} has a key {glob!r} that matches none of the layers {', '.join(names)}")
    return {name: value[glob] for glob in reversed(list(value)) for name in names if fnmatchcase(name, glob)}


def has_forward(model: nn.Module) -> bool:
    """It can be called itself, and not by methods of its own alone."""
    return type(model).forward is not nn.Module.forward or "forward" in vars(model)


def choose_layers(model: nn.Module) -> dict[str, nn.Module] | Candidates:
    """The blocks of a model that has one list of them; else the candidates, among which a forward pass chooses.

    Raises:
        ValueError: the model has no modules that go together.
    """
    lists = _outer_lists(model)
    if len(lists) == 1:
        (only,) = lists.values()
        within = set(only.children())
        kinds = {type(block) for block in within}
        if isinstance(only, nn.ModuleList) and len(kinds) == 1 and not issubclass(next(iter(kinds)), _CONTAINERS):
            # named_modules has a module that stands in several places once, and so it is watched once.
            return select_layers(model, list(within))
    if not has_forward(model):
        raise ValueError(
            f"layers=None waits for a forward pass to show the blocks, and {type(model).__name__} has no forward(); "
            f"{propose(model)}"
        )
    candidates = Candidates(model)
    if not candidates.modules:
        raise ValueError(f"layers=None finds no blocks in this model; {propose(model)}")
    return candidates


class _Ran(Unsaved):
    """Forward hook of a candidate."""

    def __init__(self, candidates: Candidates, name: str) -> None:
        self._candidates, self._name = candidates, name

    def __call__(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        self._candidates.ran(self._name, args, kwargs, output)


class Candidates:
    """Modules that may be the model's blocks, for hooks during one forward pass: it tells which are.

    Blocks run one behind the other: the output of one is an input of the next. Of several such chains, the longest is
    chosen, and all of the longest, as those of an encoder and a decoder; first those in which
    nothing stands between, and blocks with parts before single layers.

    >>> from torch import nn, randn
    >>> stages = nn.Sequential(*(nn.Sequential(nn.Linear(4, 4), nn.Tanh()) for _ in range(3)))
    >>> model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), stages)
    >>> candidates = Candidates(model)
    >>> handles = candidates.place()
    >>> _ = model(randn(2, 4))
    >>> list(candidates.chosen())
    ['2.0', '2.1', '2.2']
    """

    def __init__(self, model: nn.Module) -> None:
        called = {
            name: module
            for name, module in model.named_modules()
            if not isinstance(module, (*_CONTAINERS, torch.jit.ScriptModule))
        }
        sizes = Counter(glob for name in called for glob in _globs(name))
        self._ran: dict[str, list[str]] = {glob: [] for glob, size in sizes.items() if size > 1}
        self.modules = {name: module for name, module in called.items() if self._chains_of(name)}
        """Where hooks belong, by name."""
        self._links: Counter[str] = Counter()
        self._last: dict[str, list[Tensor]] = {}
        self._passed_on: dict[str, set[str]] = {}  # the chains whose last output a module returned as its own

    def _chains_of(self, name: str) -> list[str]:
        return [glob for glob in _globs(name) if glob in self._ran]

    def place(self) -> list[Any]:
        """Hooks on the candidates; returns their handles."""
        handles: list[Any] = []
        for name, module in self.modules.items():
            handles += [leave_out(module), module.register_forward_hook(_Ran(self, name), with_kwargs=True)]
        return handles

    def ran(self, name: str, args: Any, kwargs: Any, output: Any) -> None:
        """A candidate ran: note whether it goes on with what the one before it gave."""
        given, gave = (
            [tensor for tensor in tensors_within(values) if tensor.is_floating_point() and tensor.ndim > 1]
            for values in ([args, kwargs], [output])
        )
        for glob in self._chains_of(name):
            before = self._last.get(glob, [])
            if name not in self._passed_on:
                self._passed_on[name] = {
                    inner for inner, last in self._last.items() if any(_same(a, b) for a in gave for b in last)
                }
            if name not in self._ran[glob]:
                self._links[glob] += any(_same(a, b) for a in given for b in before)
                self._ran[glob].append(name)
            self._last[glob] = gave

    def chosen(self) -> dict[str, nn.Module]:
        """The blocks, after a forward pass.

        Raises:
            ValueError: nothing that ran is a chain; names globs of modules that ran.
        """
        self._last.clear()
        chains = {glob: self._blocks(glob) for glob, ran in self._ran.items() if self._is_chain(glob, ran)}
        parted = {glob for glob, blocks in chains.items() if any(self.modules[blocks[0]].children())}
        # A number at the end of a word, as in fc1, may count the parts of a block; but not where these have parts.
        chains = _preferred(chains, lambda glob: glob in parted or not _counts_words(glob))
        chains = _preferred(chains, lambda glob: not self._is_inside_blocks(glob, chains))
        longest = max(map(len, chains.values()), default=0)
        chains = _preferred(chains, lambda glob: len(chains[glob]) == longest)
        chains = _preferred(chains, lambda glob: len(self._ran[glob]) == longest)
        chains = _preferred(chains, lambda glob: glob in parted)
        found = {name for blocks in chains.values() for name in blocks}
        if not found:
            ran = [glob for glob, names in self._ran.items() if len(names) > 1]
            globs = sorted(ran, key=lambda glob: (glob.count("."), -len(self._ran[glob])))[:_MOST_PROPOSED]
            raise ValueError(f"layers=None finds no blocks that follow each other in this model; {_pass(globs)}")
        inner = {name for name in found if any(name.startswith(other + ".") for other in found)}
        return {name: module for name, module in self.modules.items() if name in found - inner}

    def _is_chain(self, glob: str, ran: list[str]) -> bool:
        """More than half go on with what the one before gave; between stages, something may stand."""
        return len(ran) > 1 and 2 * self._links[glob] >= len(ran) - 1

    def _is_inside_blocks(self, glob: str, chains: Mapping[str, list[str]]) -> bool:
        """A chain inside the blocks of another one, which do more than to pass on its last output, as a stage does."""
        for other, blocks in chains.items():
            around = [block for block in blocks if any(name.startswith(block + ".") for name in chains[glob])]
            passing = [block for block in around if glob in self._passed_on[block]]
            if other != glob and len(around) > 1 and 2 * len(passing) < len(around):
                return True
        return False

    def _blocks(self, glob: str) -> list[str]:
        """Those of a chain that are of its most frequent class, those with weights first."""
        names = self._ran[glob]
        weighted = [name for name in names if any(True for _ in self.modules[name].parameters())]
        names = weighted if len(weighted) > 1 else names
        (kind, _), *_ = Counter(type(self.modules[name]) for name in names).most_common(1)
        return [name for name in names if type(self.modules[name]) is kind]


def _same(first: Tensor, second: Tensor) -> bool:
    if first is second:
        return True
    return first.shape == second.shape and first.numel() > 0 and first.data_ptr() == second.data_ptr()


def _preferred(chains: dict[str, list[str]], wanted: Callable[[str], bool]) -> dict[str, list[str]]:
    """The chains whose globs are wanted, or all where none is."""
    return {glob: blocks for glob, blocks in chains.items() if wanted(glob)} or chains


def _outer_lists(model: nn.Module) -> dict[str, nn.Module]:
    """Lists of several modules, those inside of others left out."""
    found: dict[str, nn.Module] = {}
    for name, module in model.named_modules():
        inside = any(name.startswith(outer + ".") or not outer for outer in found)
        if isinstance(module, (nn.ModuleList, nn.Sequential)) and len(module) > 0 and not inside:
            found[name] = module
    return found


def propose(model: nn.Module) -> str:
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


def _glob(name: str) -> str:
    """``name`` with * for each number in it: for a part that is one, or also at the end of a word, as in ``fc1``."""
    return ".".join(re.sub(r"\d+$", "*", part) for part in name.split("."))


def _globs(name: str) -> list[str]:
    """``name`` with all of its numbers starred; also but the last, as of the third part of each block of a list."""
    head, _, last = name.rpartition(".")
    starred = _glob(name)
    if starred == name:
        return []
    if _glob(last) == last or _glob(head) == head:
        return [starred]
    return [starred, f"{_glob(head)}.{last}"]


def _counts_words(glob: str) -> bool:
    """A number ends a word in it, as in fc1."""
    last = glob.rpartition(".")[2]
    return last.endswith("*") and last != "*"


def _pass(globs: list[str]) -> str:
    return f"pass {'one of ' if len(globs) > 1 else ''}{', '.join(map(_quoted, globs))}"


def _quoted(name: str) -> str:
    return f'"{name}"'
