"""A model from what stands on the command line: a folder, a name on the hub, or a function of the user's."""

from __future__ import annotations

import copy
import importlib
import os
import re
import sys
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

TOKENIZER_FILES = ("tokenizer*", "vocab*", "merges*", "*.model", "*.spm", "*.tiktoken")


def load_python(spec: str, what: str) -> Any:
    """What ``package.module:name`` names, called where it is a function.

    Raises:
        ValueError: it cannot be imported, or calling it raises.
    """
    module_name, _, attribute = spec.partition(":")
    here = os.getcwd()
    if here not in sys.path:
        sys.path.insert(0, here)
    try:
        value = importlib.import_module(module_name)
        for part in attribute.split("."):
            value = getattr(value, part)
    except Exception as error:
        raise ValueError(f"{what} {spec!r} cannot be imported: {one_line(error)}") from error
    if isinstance(value, nn.Module) or not callable(value):
        return value
    try:
        return value()
    except Exception as error:
        raise ValueError(f"{what} {spec!r} cannot be built, {attribute}() raised {one_line(error)}") from error


def is_python(spec: str) -> bool:
    """``package.module:name``, and no path."""
    module_name, colon, attribute = spec.partition(":")
    parts = [*module_name.split("."), *attribute.split(".")]
    return bool(colon) and all(part.isidentifier() for part in parts)


def load_model(
    spec: str,
    *,
    revision: str | None = None,
    dtype: torch.dtype | None = None,
    device_map: str | None = None,
    quantize: Literal["4bit", "8bit"] | None = None,
    trust_remote_code: bool = False,
) -> nn.Module:
    """A model from a ``transformers`` folder or hub name, without its head, or from ``package.module:name``.

    Raises:
        ValueError: there is none.
    """
    if is_python(spec):
        model = load_python(spec, "the model")
        if not isinstance(model, nn.Module):
            raise ValueError(f"the model {spec!r} gives {type(model).__name__}, not a torch.nn.Module")
        return model if dtype is None else model.to(dtype)
    _check_folder(spec)
    try:
        from transformers import AutoModel, BitsAndBytesConfig
        from transformers.utils import logging
    except ImportError as error:
        raise ValueError("a model's folder needs transformers: pip install transformers") from error
    logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    options: dict[str, Any] = {"dtype": dtype or "auto", "revision": revision, "device_map": device_map}
    try:
        if quantize is not None:
            bits = BitsAndBytesConfig(**{f"load_in_{quantize}": True})  # type: ignore[no-untyped-call]
            options["quantization_config"] = bits
        options = {name: value for name, value in options.items() if value is not None}
        # The layers are all that is looked at; a head would only cost time and memory.
        model = AutoModel.from_pretrained(spec, trust_remote_code=trust_remote_code, **options)
    except Exception as error:
        raise _not_loaded("model", spec, error) from error
    assert isinstance(model, nn.Module)
    return model


def load_tokenizer(spec: str, *, revision: str | None = None, trust_remote_code: bool = False) -> Any:
    """The tokenizer of a ``transformers`` folder or hub name.

    Raises:
        ValueError: there is none.
    """
    folder = Path(spec)
    # Without them transformers makes an empty tokenizer, to which all text is nothing or unknown.
    if folder.is_dir() and not any(next(folder.glob(pattern), None) for pattern in TOKENIZER_FILES):
        raise ValueError(
            f"the folder {spec!r} has no tokenizer (tokenizer.json or the like), which a text needs; write it with "
            "tokenizer.save_pretrained(folder), or give batches of tokens as --data package.module:name"
        )
    from transformers import AutoTokenizer

    options: dict[str, Any] = {} if revision is None else {"revision": revision}
    try:
        return AutoTokenizer.from_pretrained(spec, trust_remote_code=trust_remote_code, **options)
    except Exception as error:
        raise _not_loaded("tokenizer of", spec, error) from error


def checkpoints(spec: str, revisions: str | None) -> list[tuple[str, str, str | None]]:
    """Name, folder or hub name, and revision of each model that is meant.

    A folder that holds folders of checkpoints, as a Trainer writes them, means all of them in order of their numbers.
    """
    if revisions is not None:
        return [(revision.strip(), spec, revision.strip()) for revision in revisions.split(",")]
    folder = Path(spec)
    if not is_python(spec) and folder.is_dir() and not (folder / "config.json").is_file():
        inside = [path for path in folder.iterdir() if (path / "config.json").is_file()]
        if inside:
            return [(path.name, str(path), None) for path in sorted(inside, key=_by_number)]
    return [(spec if is_python(spec) else folder.name or spec, spec, None)]


def untrained(model: nn.Module) -> nn.Module:
    """The same architecture with new random weights, in the same place and mode.

    >>> torch.manual_seed(0)
    <...>
    >>> trained = nn.Linear(4, 4)
    >>> torch.equal(untrained(trained).weight, trained.weight)
    False
    """
    first = next(model.parameters(), torch.empty(0))
    config = getattr(model, "config", None)
    kind: Any = type(model)
    if config is not None and hasattr(kind, "_from_config"):
        fresh = kind._from_config(config)
    else:
        fresh = copy.deepcopy(model)
        for module in fresh.modules():
            reset = getattr(module, "reset_parameters", None)
            if callable(reset):
                reset()
    found: nn.Module = fresh.to(device=first.device, dtype=first.dtype).train(model.training)
    return found


def _not_loaded(what: str, spec: str, error: Exception) -> ValueError:
    if "trust_remote_code" in str(error):
        return ValueError(
            f"the {what} {spec!r} comes with code of its own; look at it, and pass --trust-remote-code to run it"
        )
    return ValueError(f"the {what} {spec!r} cannot be loaded: {one_line(error)}")


def _by_number(path: Path) -> tuple[int, str]:
    numbers = re.findall(r"\d+", path.name)
    return (int(numbers[-1]) if numbers else -1, path.name)


def _check_folder(spec: str) -> None:
    path = Path(spec)
    looks_like_path = path.is_absolute() or spec.startswith((".", "~")) or spec.count("/") > 1
    if path.is_dir() and not (path / "config.json").is_file():
        raise ValueError(f"the folder {spec!r} has no config.json: is it what model.save_pretrained wrote?")
    if path.is_file():
        raise ValueError(f"{spec!r} is a file; give the folder of a transformers model, or package.module:name")
    if looks_like_path and not path.exists():
        raise ValueError(f"there is no folder {spec!r}")


def one_line(error: BaseException) -> str:
    """An error of somebody else's, in a line."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
    return text if len(text) <= 300 else text[:297] + "..."


def checked_device(name: str | None) -> torch.device | None:
    """The device of a flag. Raises ValueError where it is none, or not there."""
    if name is None:
        return None
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except Exception as error:
        raise ValueError(f"--device {name} cannot be used: {one_line(error)}") from error
    return device
