"""Every error and warning that the library can raise, read from its source.

A placeholder in a message is shown as …
"""

from __future__ import annotations

import ast
import itertools
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Message:
    kind: str
    """Class of the error or warning."""
    text: str
    """With … where a value stands."""
    path: str
    """Of the module, from the root of the repository."""


def messages(folder: Path) -> list[Message]:
    """All messages of the modules under ``folder``, in the order of the files and lines."""
    trees = {path: ast.parse(path.read_text(encoding="utf-8")) for path in sorted(folder.rglob("*.py"))}
    named: dict[str, list[ast.expr]] = {}  # constants of the package, and what its functions return
    for tree in trees.values():
        _collect(tree.body, named)
    found: dict[tuple[str, str], Message] = {}
    for path, tree in trees.items():
        for function in ast.walk(tree):
            if not isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef):
                continue
            local = dict(named)
            _collect([node for node in ast.walk(function) if isinstance(node, ast.Assign)], local)
            for node in ast.walk(function):
                for kind, argument in _raised(node):
                    for text in (" ".join(text.split()) for text in _texts(argument, local)):
                        if len(text.replace("…", "").split()) > 2:  # a bare variable
                            found.setdefault((kind, text), Message(kind, text, str(path.relative_to(ROOT))))
    return list(found.values())


def _raised(node: ast.AST) -> Iterator[tuple[str, ast.expr]]:
    """What a statement or call says, and as what."""
    if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call) and node.exc.args:
        yield ast.unparse(node.exc.func), node.exc.args[0]
    elif isinstance(node, ast.Return) and isinstance(node.value, ast.Call) and node.value.args:
        called = ast.unparse(node.value.func)
        if called.endswith("Error"):  # made here, raised by the caller
            yield called, node.value.args[0]
    elif isinstance(node, ast.Call) and ast.unparse(node.func) in ("warnings.warn", "tell") and node.args:
        yield (ast.unparse(node.args[1]) if len(node.args) > 1 else "UserWarning"), node.args[0]
    elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith(".tell_once"):
        yield "UserWarning", node.args[0]
    elif isinstance(node, ast.Call) and ast.unparse(node.func) in ("self.once", "self._notices.once"):
        yield "UserWarning", node.args[1]
    elif isinstance(node, ast.Call) and re.fullmatch(r"_?log(ger)?\.\w+", ast.unparse(node.func), re.IGNORECASE):
        yield from (("logging", part) for part in node.args[:1])
    elif isinstance(node, ast.Return) and isinstance(node.value, ast.Tuple):
        first, *others = node.value.elts  # no state, and what to warn of
        if isinstance(first, ast.Constant) and first.value is None:
            yield from (("UserWarning", part) for part in others if isinstance(part, ast.Constant))


def _collect(body: Sequence[ast.AST], named: dict[str, list[ast.expr]]) -> None:
    """What names stand for: what is assigned to them, or returned by functions of theirs."""
    for node in body:
        if isinstance(node, ast.Assign):
            for target in node.targets:
                if isinstance(target, ast.Name):
                    named[target.id] = [*named.get(target.id, []), node.value]
        elif isinstance(node, ast.ClassDef):
            _collect([part for part in node.body if isinstance(part, ast.FunctionDef)], named)
        elif isinstance(node, ast.FunctionDef):
            returned = [part.value for part in ast.walk(node) if isinstance(part, ast.Return) and part.value]
            named[node.name + "()"] = [*named.get(node.name + "()", []), *returned]


def _texts(node: ast.expr, named: dict[str, list[ast.expr]], depth: int = 0) -> list[str]:
    """What an expression may say, with … where a value stands."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str | int):
        return [re.sub(r"%\.?\d*[sdg]", "…", str(node.value))]
    if isinstance(node, ast.JoinedStr):
        parts = [_texts(part, named, depth) for part in node.values]
        return ["".join(choice) for choice in itertools.islice(itertools.product(*parts), 8)]
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return [a + b for a in _texts(node.left, named, depth) for b in _texts(node.right, named, depth)]
    if isinstance(node, ast.IfExp):
        return [*_texts(node.body, named, depth), *_texts(node.orelse, named, depth)]
    if isinstance(node, ast.Dict):
        return [text for value in node.values for text in _texts(value, named, depth)]
    if isinstance(node, ast.Subscript) and ast.unparse(node.value) in named:
        node = node.value  # any of a table
    if isinstance(node, ast.FormattedValue):
        texts = _texts(node.value, named, depth)
        return texts if _says_something(texts) else ["…"]
    name = ast.unparse(node.func).split(".")[-1] + "()" if isinstance(node, ast.Call) else ast.unparse(node)
    if name in named and depth < 4:
        texts = [text for value in named[name] for text in _texts(value, named, depth + 1)]
        return texts if _says_something(texts) else ["…"]
    return ["…"]


def _says_something(texts: list[str]) -> bool:
    return any(len(text.split()) > 2 or text.isdigit() for text in texts)


def messages_by_module() -> str:
    """A section per module, a list item per message."""
    lines: list[str] = []
    for path, found in itertools.groupby(messages(ROOT / "gapt_optim"), key=lambda message: message.path):
        lines += ["", f"## `{path}`", ""]
        lines += [f"- `{message.text.replace('`', chr(39))}` ({message.kind})" for message in found]
    return "\n".join(lines).strip()
