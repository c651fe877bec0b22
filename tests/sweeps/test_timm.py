"""One small model of each family of timm: the axis of the features is read rightly, or refused.

Which axis that is, a second image of another shape tells: its size stays what it was.

    python -m tests.sweeps.test_timm             # all of them, and a table of counts
"""

from __future__ import annotations

import collections
import gc
import sys
import warnings
from typing import Any

import pytest
import torch
from torch import nn

from gapt_optim.layout import Layout
from gapt_optim.layout.outputs import checked_hidden

timm = pytest.importorskip("timm")

SMALL = ("test_", "atto", "femto", "pico", "nano", "xxtiny", "xxs", "xx_small", "extra_tiny", "xtiny", "_xs", "tiny")
SMALL += ("_ti", "_t0", "_t1", "_s0", "_0", "x0_25", "_100", "mini", "small", "_s", "18", "_b0", "_m0", "_p1", "_n")
MOST_LAYERS = 24
SHAPES = ((2, 3, 96, 96), (3, 3, 128, 160))
"""Of two batches of images; where a model takes one size only, the batch alone differs."""


def families() -> list[tuple[str, str]]:
    """(family, name of a small model of it)."""
    found = []
    for family in timm.list_modules():
        names = timm.list_models(module=family)
        if names:
            found.append((family, min(names, key=_size_by_name)))
    return found


def _size_by_name(name: str) -> tuple[bool, int, int]:
    marks = [i for i, mark in enumerate(SMALL) if mark in name]
    return "gigantic" in name or "384" in name, min(marks) if marks else len(SMALL), len(name)


def build(name: str) -> nn.Module:
    torch.manual_seed(0)
    model: nn.Module = timm.create_model(name, pretrained=False).eval()
    return model


def blocks(model: nn.Module) -> list[str]:
    """Modules with parts of their own in lists, and one module of each type of layer."""
    found = [
        name
        for name, module in model.named_modules()
        if name.rpartition(".")[2].isdigit() and any(True for _ in module.children())
    ]
    types = {type(module): name for name, module in model.named_modules() if not any(True for _ in module.children())}
    step = max(1, len(found) // MOST_LAYERS)
    return [*found[::step], *types.values()]


def outputs(model: nn.Module, names: list[str], shape: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
    """Shapes of the outputs for a batch of images."""
    found: dict[str, tuple[int, ...]] = {}

    def note(name: str, out: Any) -> None:
        try:
            found[name] = tuple(checked_hidden(name, out, None).shape)
        except (TypeError, ValueError):
            return

    handles = [
        model.get_submodule(name).register_forward_hook(lambda _, __, out, name=name: note(name, out)) for name in names
    ]
    try:
        with torch.no_grad():
            model(torch.randn(shape))
    finally:
        for handle in handles:
            handle.remove()
    return found


def shapes_of(model: nn.Module, names: list[str]) -> tuple[tuple[int, ...], dict[str, Any], dict[str, Any]]:
    """A shape of batches that the model takes, the outputs' shapes for it, and for another one."""
    try:
        return SHAPES[0], outputs(model, names, SHAPES[0]), outputs(model, names, SHAPES[1])
    except Exception:
        _, height, width = model.default_cfg["input_size"]
        first = (1, 3, height, width)
        return first, outputs(model, names, first), outputs(model, names, (2, 3, height, width))


def feature_axes(first: tuple[int, ...], second: tuple[int, ...], channels: set[int]) -> set[int]:
    """The axes that may have the features: their size stays, and is that of some weight."""
    same = {axis for axis, (a, b) in enumerate(zip(first, second, strict=True)) if a == b and axis}
    return {axis for axis in same if first[axis] in channels} or same if len(same) > 1 else same


def read(model: nn.Module, names: list[str], shape: tuple[int, ...]) -> dict[str, Any]:
    """The axes of each output, or why it was refused."""
    found: dict[str, Any] = {}
    layout = Layout(model, {name: model.get_submodule(name) for name in names})
    handles: list[Any] = []

    def note(name: str, out: Any) -> None:
        try:
            found[name] = layout.read(name, out)
        except (TypeError, ValueError) as error:
            found[name] = str(error)

    for module, calls in layout.callers():
        handles.append(
            module.register_forward_pre_hook(
                lambda _, args, kwargs, calls=calls: calls.enter(args, kwargs, lambda: True),
                with_kwargs=True,
                prepend=True,
            )
        )
    for name in names:
        handles.append(model.get_submodule(name).register_forward_hook(lambda _, __, out, name=name: note(name, out)))
    for module, calls in layout.callers():
        handles.append(module.register_forward_hook(lambda *_, calls=calls: calls.leave(), always_call=True))
    try:
        with torch.no_grad():
            model(torch.randn(shape))
    finally:
        for handle in handles:
            handle.remove()
    return found


def verdict(name: str) -> tuple[str, str]:
    """("equal" | "refused" | "different" | "skipped", why) of one model."""
    try:
        model = build(name)
        names = blocks(model)
        first, *shapes = shapes_of(model, names)
        readings = read(model, names, first)
    except Exception as error:
        return "skipped", f"{type(error).__name__}: {str(error)[:80]}"
    channels = {size for parameter in model.parameters() for size in parameter.shape}
    refused = different = checked = 0
    why = ""
    for layer in names:
        if layer not in shapes[0] or layer not in shapes[1] or len(shapes[0][layer]) not in (3, 4):
            continue
        possible = feature_axes(shapes[0][layer], shapes[1][layer], channels)
        if len(shapes[0][layer]) != len(shapes[1][layer]) or len(possible) != 1:
            continue
        checked += 1
        reading = readings[layer]
        if isinstance(reading, str):
            refused, why = refused + 1, reading[:150]
            continue
        (axis,) = possible
        if not _is_features(reading.axes.split(" "), axis):
            different += 1
            kind = type(model.get_submodule(layer)).__name__
            why = f"{layer} ({kind}) {shapes[0][layer]} as {reading.axes} ({reading.why_axes}), not {axis}"
    if different:
        return "different", why
    if refused:
        return "refused", f"{refused} of {checked}: {why}"
    return ("equal", f"{checked} layers") if checked else ("skipped", "no layer whose axes are known")


def _is_features(words: list[str], axis: int) -> bool:
    return words[axis] in ("features", "channels")


@pytest.mark.slow
@pytest.mark.parametrize("family", families(), ids=lambda family: family[0])
@pytest.mark.filterwarnings("ignore")
def test_every_family(family: tuple[str, str]) -> None:
    found, why = verdict(family[1])
    if found == "skipped":
        pytest.skip(why)
    assert found != "different", why


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["test_convnext", "test_vit", "test_resnet", "test_efficientnet"])
def test_a_sample(name: str) -> None:
    found, why = verdict(name)
    assert found == "equal", why


def main() -> None:
    counts: dict[str, int] = collections.Counter()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    for family, name in families():
        if len(sys.argv) > 1 and family not in sys.argv[1:]:
            continue
        found, why = verdict(name)
        counts[found] += 1
        print(f"{found:10} {family:28} {name:36} {why}", flush=True)
        gc.collect()
    print(dict(counts))


if __name__ == "__main__":
    main()
