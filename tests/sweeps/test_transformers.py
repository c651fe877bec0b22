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
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ..watching import Watch
from .tiny import blocks, build, names_of_models, takes_text

LENGTHS = (40, 11, 26)


class SkippedError(Exception):
    """A model that has nothing to compare."""


def inputs(model: nn.Module, rows: list[int], masked: bool, decoder: bool = True) -> dict[str, Tensor]:
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
        if masked and "decoder_attention_mask" in names and decoder:
            found["decoder_attention_mask"] = mask.clone()
    vision = getattr(getattr(model, "config", None), "vision_config", None)
    if "pixel_values" in names and hasattr(vision, "image_size"):
        size, channels = vision.image_size, getattr(vision, "num_channels", 3)
        sides = size if isinstance(size, (tuple, list)) else (size, size)
        images = torch.randn(len(LENGTHS), channels, *sides, generator=torch.Generator().manual_seed(2))
        found["pixel_values"] = images[rows]
    if "bbox" in names:
        found["bbox"] = torch.zeros(*ids.shape, 4 if "layout" in type(model).__name__.lower() else 8, dtype=torch.long)
    return found


def pad_of(model: nn.Module) -> int:
    pad = getattr(getattr(model, "config", None), "pad_token_id", None)
    return pad if isinstance(pad, int) and 0 <= pad < 90 else 0


def runs(model: nn.Module, names: list[str]) -> list[str]:
    """Those of the modules that run for a text, and return rows."""
    ran: list[str] = []
    handles = [
        model.get_submodule(name).register_forward_hook(lambda *_, name=name: ran.append(name)) for name in names
    ]
    try:
        with torch.no_grad():
            model(**inputs(model, [0, 1, 2], masked=True))
    except Exception as error:
        raise SkippedError(f"does not run: {type(error).__name__}: {first_line(error)}") from error
    finally:
        for handle in handles:
            handle.remove()
    return [name for name in names if name in ran]


def first_line(error: Exception) -> str:
    return " ".join(str(error).split())[:60]


Entropies = dict[str, tuple[float, int]]


def summed(model: nn.Module, names: list[str]) -> tuple[Entropies, Entropies, Entropies, Entropies, list[Any]]:
    """Sums of entropies: of the padded batch, its sequences alone, without a mask, with gradients; and readings."""
    with Watch(model, names) as watch, torch.no_grad():
        model(**inputs(model, [0, 1, 2], masked=True))
        padded = dict(watch.sums)
        readings = [watch.readings[name][0] for name in names]
    with Watch(model, names) as watch, torch.no_grad():
        for row in range(3):
            model(**inputs(model, [row], masked=False))
        alone = dict(watch.sums)
    with Watch(model, names) as watch, torch.no_grad():
        model(**inputs(model, [0], masked=True))
        ones = dict(watch.sums)
        watch.clear()
        model(**inputs(model, [0], masked=False))
        none = dict(watch.sums)
    with Watch(model, names) as watch:
        for grad in (True, True):
            watch.clear()
            with torch.set_grad_enabled(grad):
                model(**inputs(model, [0, 1, 2], masked=True))
        trained = dict(watch.sums)
    return (
        padded,
        alone,
        {name: ones[name] if not near(ones[name], none[name]) else (0.0, 0) for name in names},
        trained,
        readings,
    )


def near(first: tuple[float, int], second: tuple[float, int]) -> bool:
    """The same number of windows, and the same mean."""
    return first[1] == second[1] and abs(first[0] - second[0]) <= 2e-3 * max(first[1], 1)


def verdict(name: str) -> tuple[str, str]:
    """("equal" | "told" | "refused" | "different" | "skipped", why) of one model."""
    try:
        model = build(name)
    except Exception as error:
        return "skipped", f"cannot be built: {type(error).__name__}: {first_line(error)}"
    if not takes_text(model):
        return "skipped", "takes no text"
    try:
        names = runs(model, blocks(model))
    except SkippedError as reason:
        return "skipped", str(reason)
    if not names:
        return "skipped", "has no list of blocks that runs"
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        try:
            padded, alone, ones, trained, readings = summed(model, names)
        except (TypeError, ValueError) as error:
            if "module" in str(error) and ("output of" in str(error) or "returned" in str(error)):
                return "refused", str(error)[:150]
            return "skipped", f"does not run alone: {first_line(error)}"
        except (RuntimeError, IndexError, AssertionError, AttributeError, NotImplementedError) as error:
            return "skipped", f"does not run alone: {type(error).__name__}: {first_line(error)}"
    told = [str(warning.message) for warning in said if "layer" in str(warning.message)]
    mask = inputs(model, [0, 1, 2], masked=True).get("attention_mask")
    # Where the model takes no mask, padding is text to it.
    wrong = [layer for layer in names if mask is not None and not near(padded[layer], alone[layer])]
    wrong = [layer for layer in wrong if not _exact(readings[names.index(layer)], mask)]
    wrong += [layer for layer in names if ones[layer] != (0.0, 0)]
    wrong += [layer for layer in names if not near(padded[layer], trained[layer])]
    silent = [layer for layer in wrong if not any(f'"{layer}"' in text for text in told)]
    if silent:
        reading = readings[names.index(silent[0])]
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
@pytest.mark.parametrize("name", ["BertModel", "GPT2Model", "T5Model", "XLNetModel", "LongformerModel", "MixtralModel"])
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
