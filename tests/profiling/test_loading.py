"""Models and data of every kind: on disk, quantized, with their own code, revisions, texts; none is downloaded."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import AutoModel, LlamaConfig, LlamaModel, PreTrainedTokenizerFast

from gapt_optim import Profile, profile
from gapt_optim.cli import main
from gapt_optim.profiling import untrained
from gapt_optim.profiling.batches import device_of
from gapt_optim.profiling.loading import load_model

from .test_command import TEXT, model_folder  # noqa: F401, a fixture

IDS = torch.randint(1, 97, (4, 21), generator=torch.Generator().manual_seed(0))
REMOTE = """
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
class RemoteConfig(PreTrainedConfig):
    model_type = "remote"
class RemoteModel(PreTrainedModel):
    config_class = RemoteConfig
    def __init__(self, config):
        super().__init__(config)
        self.embed = nn.Embedding(300, 8)
        self.blocks = nn.ModuleList(nn.Linear(8, 8) for _ in range(2))
        self.post_init()
    def get_input_embeddings(self):
        return self.embed
    def forward(self, input_ids, attention_mask=None):
        x = self.embed(input_ids)
        for block in self.blocks:
            x = block(x)
        return x
"""


def nats(found: Profile) -> list[float | None]:
    return [layer.entropy().nats for layer in found.layers]


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=97, hidden_size=64, intermediate_size=128, num_hidden_layers=3, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=64,
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("llama")
    LlamaModel(config).save_pretrained(folder)
    return folder


@pytest.mark.filterwarnings("ignore")  # of accelerate's offloading
@pytest.mark.parametrize("some", [True, False])
def test_weights_on_disk(llama: Path, tmp_path: Path, some: bool) -> None:
    """The first parameter may be nowhere; inputs go where the embedding is, and the layers are what they are."""
    places: dict[str, Any] = {"": "disk"}
    if some:
        places = {"embed_tokens": "cpu", "layers.0": "disk", "layers.1": "cpu", "layers.2": "disk", "norm": "cpu"}
        places["rotary_emb"] = "cpu"
    model = AutoModel.from_pretrained(llama, device_map=places, offload_folder=tmp_path)
    assert any(parameter.device.type == "meta" for parameter in model.parameters())
    assert device_of(model).type == "cpu"
    assert nats(profile(model, IDS)) == nats(profile(load_model(str(llama)), IDS))


def test_inputs_go_where_the_embedding_is() -> None:
    class Apart(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Linear(4, 4, device="meta")
            self.embedding = nn.Embedding(9, 4)

        def get_input_embeddings(self) -> nn.Module:
            return self.embedding

    assert device_of(Apart()).type == "cpu"
    assert device_of(nn.Linear(2, 2, device="meta")).type == "cpu"


def test_device_map_on_the_command_line(llama: Path) -> None:
    pytest.importorskip("accelerate")
    assert nats(profile(load_model(str(llama), device_map="auto"), IDS)) == nats(profile(load_model(str(llama)), IDS))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("bits", ["4bit", "8bit"])
def test_quantized_weights(llama: Path, bits: Any) -> None:
    pytest.importorskip("bitsandbytes", reason="--quantize is bitsandbytes', which is not installed")
    model = load_model(str(llama), quantize=bits)
    assert any("bitsandbytes" in type(module).__module__ for module in model.modules())
    found, plain = (nats(profile(each, IDS)) for each in (model, load_model(str(llama))))
    assert found == pytest.approx(plain, rel=0.01)
    assert found != plain
    assert nats(profile(untrained(model), IDS)) != pytest.approx(found, rel=1e-4)


@pytest.mark.filterwarnings("ignore")
def test_weights_of_torchao(llama: Path) -> None:
    torchao = pytest.importorskip("torchao.quantization")
    model = load_model(str(llama))
    plain = nats(profile(model, IDS))
    torchao.quantize_(model, torchao.Int8WeightOnlyConfig())
    found = nats(profile(model, IDS))
    assert found == pytest.approx(plain, rel=0.01)
    assert found != plain


@pytest.mark.skipif("bitsandbytes" in sys.modules, reason="bitsandbytes is installed")
def test_quantized_without_its_package_is_one_clear_line(
    llama: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers.quantizers import quantizer_bnb_4bit

    monkeypatch.setattr("importlib.metadata.version", _absent)
    monkeypatch.setattr(quantizer_bnb_4bit, "is_bitsandbytes_available", lambda *args: False)
    assert main(["profile", str(llama), "--data", "no:where", "--quantize", "4bit"]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert "bitsandbytes" in said


def _absent(name: str) -> str:
    from importlib.metadata import PackageNotFoundError

    raise PackageNotFoundError(name)


def test_code_that_comes_with_a_model_runs_only_when_allowed(
    model_folder: Path,  # noqa: F811
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "remote"
    folder.mkdir()
    (folder / "modeling_remote.py").write_text(REMOTE)
    auto = {"AutoConfig": "modeling_remote.RemoteConfig", "AutoModel": "modeling_remote.RemoteModel"}
    (folder / "config.json").write_text(json.dumps({"model_type": "remote", "auto_map": auto}))
    for path in model_folder.glob("tokenizer*"):
        shutil.copy(path, folder)
    namespace: dict[str, Any] = {"__name__": "remote"}
    exec(REMOTE, namespace)
    from safetensors.torch import save_model

    save_model(
        namespace["RemoteModel"](namespace["RemoteConfig"]()), str(folder / "model.safetensors"), {"format": "pt"}
    )
    arguments = [str(folder), "--data", "the quick brown fox jumps over"]
    assert main(["profile", *arguments]) == 2
    said = capsys.readouterr().err
    assert "comes with code of its own; look at it, and pass --trust-remote-code to run it" in said
    assert said.count("\n") == 1
    assert main(["profile", *arguments, "--trust-remote-code", "--out", "p.json"]) == 0
    assert Profile.load("p.json").names == ["blocks.0", "blocks.1"]
    capsys.readouterr()
    assert main(["explain", *arguments, "--trust-remote-code"]) == 0
    assert "blocks.0, blocks.1" in capsys.readouterr().out


def test_revisions_of_a_model_on_the_hub(model_folder: Path, tmp_path: Path) -> None:  # noqa: F811
    """From the cache that the hub's client leaves, offline."""
    cache = tmp_path / "hub" / "models--somebody--tiny"
    for number, step in enumerate(("step1000", "step2000", "step3000")):
        snapshot = cache / "snapshots" / (f"{number}" * 40)
        shutil.copytree(model_folder, snapshot)
        model = AutoModel.from_pretrained(snapshot)
        torch.manual_seed(number)
        nn.init.normal_(model.h[0].mlp.c_fc.weight)
        model.save_pretrained(snapshot)
        (cache / "refs").mkdir(exist_ok=True)
        (cache / "refs" / step).write_text(snapshot.name)
    environment = {**os.environ, "HF_HUB_CACHE": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "1"}
    flags = [
        "--revision",
        "step1000,step2000,step3000",
        "--data",
        "the quick brown fox jumps",
        "--out",
        "map.csv",
        "map.json",
    ]
    start = "from gapt_optim.cli import main; raise SystemExit(main())"
    command = [sys.executable, "-c", start, "profile", "somebody/tiny", *flags]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    header, *rows = (tmp_path / "map.csv").read_text().splitlines()
    assert header == "layer,step1000,step2000,step3000"
    assert len({tuple(row.split(",")[1:]) for row in rows}) == 3
    assert all(len(set(row.split(","))) == 4 for row in rows)


def test_a_data_set_is_read_row_by_row(
    model_folder: Path,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """By `datasets` itself: a folder of a data set is read as one of the hub is."""
    pytest.importorskip("datasets")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    (tmp_path / "corpus").mkdir()
    lines = [json.dumps({"text": text}) for text in (TEXT[:200], TEXT[:77])]
    (tmp_path / "corpus" / "train.jsonl").write_text("\n".join(lines))
    assert main(["profile", str(model_folder), "--data", "corpus", "--out", "a.json"]) == 0
    (tmp_path / "same.jsonl").write_text("\n".join(lines))
    assert main(["profile", str(model_folder), "--data", "same.jsonl", "--out", "b.json"]) == 0
    first, second = Profile.load("a.json"), Profile.load("b.json")
    assert first.origin.digest == second.origin.digest
    assert nats(first) == nats(second)


def test_ids_texts_and_loaders_are_batches(model_folder: Path) -> None:  # noqa: F811
    model = load_model(str(model_folder))
    tokenizer = PreTrainedTokenizerFast.from_pretrained(model_folder)
    texts = [TEXT[:60], TEXT[:35], TEXT[10:90]]
    rows: list[dict[str, Tensor]] = [{"input_ids": torch.tensor([tokenizer(text)["input_ids"]])} for text in texts]
    expected = profile(model, rows)
    loader: Any = DataLoader(texts, batch_size=2)  # type: ignore[arg-type]
    for batches in (texts, [texts], loader, iter([texts[:1], texts[1:]])):
        found = profile(model, batches, tokenizer=tokenizer)
        assert found.origin.digest == expected.origin.digest
        assert nats(found) == pytest.approx(nats(expected), rel=1e-5)
        assert len(found.prompts) == 3
    ids = torch.cat([rows[0]["input_ids"], rows[0]["input_ids"].flip(1)])
    by_name = profile(model, [{"input_ids": ids}])
    ids_of_rows: Any = DataLoader([{"input_ids": row} for row in ids], batch_size=2)  # type: ignore[arg-type]
    for batches in (ids, [ids], ids_of_rows):
        found = profile(model, batches)
        assert nats(found) == nats(by_name)
        assert found.layers[-1].longest[0].token in ids.unique().tolist()
