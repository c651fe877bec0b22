"""A directive that lists the fields of one configuration class, from the fields and their docstrings.

```{settings} gapt_optim.GateConfig
```
"""

from __future__ import annotations

import importlib
import re
from typing import Any, get_args

from docutils import nodes
from pydantic import BaseModel
from pydantic.fields import FieldInfo
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

_BOUNDS = {"gt": "> {}", "ge": "≥ {}", "lt": "< {}", "le": "≤ {}"}


class Settings(SphinxDirective):
    required_arguments = 1

    def run(self) -> list[nodes.Node]:
        module, _, name = self.arguments[0].rpartition(".")
        model: type[BaseModel] = getattr(importlib.import_module(module), name)
        return self.parse_text_to_nodes("\n\n".join(item(field, info) for field, info in model.model_fields.items()))


def item(name: str, info: FieldInfo) -> str:
    if not info.description:
        raise ValueError(f"the setting {name} has no docstring")
    # Docstrings are reStructuredText, this page is Markdown.
    meaning = re.sub(r":\w+:`~?([^`]+)`", r"`\1`", " ".join(info.description.split())).replace("``", "`")
    return f"`{name}` = `{default_of(info)}`\n: *{values_of(info)}*\n\n  {meaning}"


def default_of(info: FieldInfo) -> str:
    value = info.get_default(call_default_factory=True)
    return f'"{value}"' if isinstance(value, str) else repr(value)


def values_of(info: FieldInfo) -> str:
    literals = [choice for choice in get_args(info.annotation) if isinstance(choice, str)]
    if literals:
        return " or ".join(f'"{choice}"' for choice in literals)
    bounds = [
        text.format(getattr(bound, key))
        for bound in info.metadata
        for key, text in _BOUNDS.items()
        if hasattr(bound, key)
    ]
    return ", ".join([type_name(info.annotation), *bounds])


def type_name(annotation: Any) -> str:
    return annotation.__name__ if isinstance(annotation, type) else str(annotation).replace(" | ", " or ")


def setup(app: Sphinx) -> dict[str, Any]:
    app.add_directive("settings", Settings)
    return {"parallel_read_safe": True}
