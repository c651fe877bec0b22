"""Every text architecture of transformers at a tiny size: the right rows, or a word about it.

The entropies of a right-padded batch equal those of its sequences alone, a mask of ones equals none, and readings with
gradients equal those without.

    python -m tests.sweeps.test_transformers             # all of them, and a table of counts
"""

from __future__ import annotations

import collections
import gc
import inspect
import sys
import warnings
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

from ..watching import Watch
from .tiny import blocks, build, names_of_models, takes_text

LENGTHS = (40, 11, 26)


class SkippedError(Exception):
    """A model that has nothing to compare."""


def inputs(model: nn.Module, rows: list[int], masked: bool) -> dict[str, Tensor]:
    """A right-padded batch of the sequences ``rows``, or one of them alone."""
    longest = max(LENGTHS[row] for row in rows)
    ids = torch.randint(5, 90, (len(LENGTHS), max(LENGTHS)), generator=torch.Generator().manual_seed(1))[rows, :longest]
    mask = (torch.arange(longest) < torch.tensor([LENGTHS[row] for row in rows])[:, None]).long()
    ids = torch.where(mask.bool(), ids, pad_of(model))
    names = inspect.signature(model.forward).parameters
    found = {"input_ids": ids}
    if masked and "attention_mask" in names:
        found["attention_mask"] = mask
    if "decoder_input_ids" in names:
        found["decoder_input_ids"] = ids.clone()
        if masked and "decoder_attention_mask" in names:
            found["decoder_attention_mask"] = mask.clone()
    if "bbox" in names:
        found["bbox"] = torch.zeros(*ids.shape, 4 if "layout" in type(model).__name__.lower() else 8, dtype=torch.long)
    return found


def images(model: nn.Module, rows: list[int]) -> dict[str, Tensor]:
    """Images of the size that the model's vision tower is for, where it takes them beside a text."""
    vision = getattr(getattr(model, "config", None), "vision_config", None)
    if "pixel_values" not in inspect.signature(model.forward).parameters or not hasattr(vision, "image_size"):
        return {}
    size, channels = vision.image_size, getattr(vision, "num_channels", 3)
    sides = size if isinstance(size, (tuple, list)) else (size, size)
    pixels = torch.randn(len(LENGTHS), channels, *sides, generator=torch.Generator().manual_seed(2))
    return {"pixel_values": pixels[rows]}


class Tiny:
    """A model with what it is called with."""

    def __init__(self, model: nn.Module, with_images: bool) -> None:
        self.model, self.with_images = model, with_images
        self.names = self._runs(blocks(model))
        self.mask = inputs(model, [0, 1, 2], masked=True).get("attention_mask")

    def call(self, rows: list[int], masked: bool) -> None:
        pixels = images(self.model, rows) if self.with_images else {}
        self.model(**inputs(self.model, rows, masked), **pixels)

    def _runs(self, names: list[str]) -> list[str]:
        """Those of the modules that run for a text, and return rows."""
        ran: list[str] = []
        handles = [
            self.model.get_submodule(name).register_forward_hook(lambda *_, name=name: ran.append(name))
            for name in names
        ]
        try:
            with torch.no_grad():
                self.call([0, 1, 2], masked=True)
                self.call([1], masked=False)
        finally:
            for handle in handles:
                handle.remove()
        return [name for name in names if name in ran]


def tiny(name: str) -> Tiny:
    """The first variant of a model that runs."""
    problem = "takes no text"
    for variant in range(3):
        for with_images in (True, False):
            try:
                model = build(name, variant)
                if not takes_text(model):
                    raise SkippedError(problem)
                return Tiny(model, with_images)
            except SkippedError:
                raise
            except Exception as error:
                if variant == 0 and with_images:
                    problem = f"does not run: {type(error).__name__}: {first_line(error)}"
    raise SkippedError(problem)


def pad_of(model: nn.Module) -> int:
    pad = getattr(getattr(model, "config", None), "pad_token_id", None)
    return pad if isinstance(pad, int) and 0 <= pad < 90 else 0


def first_line(error: Exception) -> str:
    return " ".join(str(error).split())[:60]


Entropies = dict[str, tuple[float, int]]


class Summed(NamedTuple):
    padded: Entropies
    """Of the padded batch."""
    alone: Entropies
    """Of its sequences alone."""
    with_ones: set[str]
    """Layers that a mask of ones changed, where it did not change what the model computed."""
    trained: Entropies
    """With gradients."""
    readings: dict[str, Any]
    """Of the padded batch."""


def summed(case: Tiny) -> Summed:
    """Sums of entropies of the layers."""
    model, names = case.model, case.names
    with Watch(model, names) as watch, torch.no_grad():
        case.call([0, 1, 2], masked=True)
        padded = dict(watch.sums)
        readings = {name: watch.readings[name][0] for name in names}
    with Watch(model, names) as watch, torch.no_grad():
        for row in range(3):
            case.call([row], masked=False)
        alone = dict(watch.sums)
    with Watch(model, names) as watch, torch.no_grad():
        case.call([0], masked=True)
        case.call([0], masked=False)
        with_ones = {name for name in names if not _alike(*watch.readings[name][:: len(watch.readings[name]) // 2][:2])}
    with Watch(model, names) as watch:
        for _ in range(2):  # as they are known then
            watch.clear()
            case.call([0, 1, 2], masked=True)
        trained = dict(watch.sums)
    return Summed(padded, alone, with_ones, trained, readings)


def _alike(ones: Any, none: Any) -> bool:
    """The same rows count with a mask of ones and without."""
    if ones.rows.shape != none.rows.shape or ones.axes != none.axes:
        return False
    every = torch.ones(ones.rows.shape[:2], dtype=torch.bool)
    first, second = (every if reading.live is None else reading.live for reading in (ones, none))
    return torch.equal(first, second)


def near(first: tuple[float, int], second: tuple[float, int]) -> bool:
    """The same number of windows, and the same mean."""
    return first[1] == second[1] and abs(first[0] - second[0]) <= 2e-3 * max(first[1], 1)


def verdict(name: str) -> tuple[str, str]:
    """("equal" | "told" | "refused" | "different" | "skipped", why) of one model."""
    try:
        case = tiny(name)
    except SkippedError as reason:
        return "skipped", str(reason)
    names, mask = case.names, case.mask
    if not names:
        return "skipped", "has no list of blocks that runs"
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        try:
            padded, alone, with_ones, trained, readings = summed(case)
        except (TypeError, ValueError) as error:
            if "module" not in str(error):
                raise
            return "refused", str(error)[:150]
    told = [str(warning.message) for warning in said if "layer" in str(warning.message)]
    # Where the model takes no mask, padding is text to it.
    wrong = [layer for layer in names if mask is not None and not near(padded[layer], alone[layer])]
    wrong = [layer for layer in wrong if not _exact(readings[layer], mask)]
    wrong += sorted(with_ones)
    wrong += [layer for layer in names if not near(padded[layer], trained[layer])]
    silent = [layer for layer in wrong if not any(f'"{layer}"' in text for text in told)]
    if silent:
        reading = readings[silent[0]]
        return "different", (
            f"{silent[0]}: {padded[silent[0]]} and {alone[silent[0]]} alone, {tuple(reading.h.shape)} as "
            f"{reading.axes} ({reading.why_axes}); {reading.why_rows}; {'no ' if mask is None else ''}mask"
        )
    if told:
        return "told", told[0][:150]
    return "equal", f"{len(names)} layers"


def _exact(reading: Any, mask: Tensor | None) -> bool:
    """The rows are those of the mask, in an order that shows in the shape: what differs is the model's own doing."""
    return reading.live is not None and mask is not None and torch.equal(reading.live, mask.bool())


@pytest.mark.slow
@pytest.mark.parametrize("kind_and_name", names_of_models(), ids=lambda both: both[0])
@pytest.mark.filterwarnings("ignore")
def test_every_text_architecture(kind_and_name: tuple[str, str]) -> None:
    found, why = verdict(kind_and_name[1])
    if found == "skipped":
        pytest.skip(why)
    assert found != "different", why


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "name", ["BertModel", "GPT2Model", "T5Model", "XLNetModel", "LongformerModel", "MixtralModel", "FSMTModel"]
)
def test_a_sample(name: str) -> None:
    found, why = verdict(name)
    assert found == "equal", why


def main() -> None:
    counts: dict[str, int] = collections.Counter()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    for kind, name in names_of_models():
        if len(sys.argv) > 1 and name not in sys.argv[1:]:
            continue
        found, why = verdict(name)
        counts[found] += 1
        print(f"{found:10} {kind:28} {name:36} {why}", flush=True)
        gc.collect()
    print(dict(counts))


if __name__ == "__main__":
    main()
