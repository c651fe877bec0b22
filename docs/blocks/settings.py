"""The fields of one configuration class, from the fields and their docstrings."""

from __future__ import annotations

import re
from typing import Any, get_args

from pydantic import BaseModel
from pydantic.fields import FieldInfo

import gapt_optim

_BOUNDS = {"gt": "> {}", "ge": "≥ {}", "lt": "< {}", "le": "≤ {}"}


def settings(name: str) -> str:
    """Of a class of `gapt_optim`, a list item per field."""
    model: type[BaseModel] = getattr(gapt_optim, name)
    return "\n".join(item(field, info) for field, info in model.model_fields.items())


def item(name: str, info: FieldInfo) -> str:
    if not info.description:
        raise ValueError(f"the setting {name} has no docstring")
    # Docstrings are reStructuredText, the page is Markdown.
    meaning = re.sub(r":\w+:`~?([^`]+)`", r"`\1`", " ".join(info.description.split())).replace("``", "`")
    return f"- **`{name}`** = `{default_of(info)}` ({values_of(info)})<br>\n  {meaning}"


def default_of(info: FieldInfo) -> str:
    value = info.get_default(call_default_factory=True)
    return f'"{value}"' if isinstance(value, str) else repr(value)


def values_of(info: FieldInfo) -> str:
    literals = [choice for choice in get_args(info.annotation) if isinstance(choice, str)]
    if literals:
        return " or ".join(f'`"{choice}"`' for choice in literals)
    bounds = [
        text.format(getattr(bound, key))
        for bound in info.metadata
        for key, text in _BOUNDS.items()
        if hasattr(bound, key)
    ]
    return ", ".join([type_name(info.annotation), *bounds])


def type_name(annotation: Any) -> str:
    return annotation.__name__ if isinstance(annotation, type) else str(annotation).replace(" | ", " or ")
