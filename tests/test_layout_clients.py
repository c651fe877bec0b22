"""The rows that count in models that people use: transformers, peft, and modules of torch."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from .models import adapted
from .watching import Watch

transformers = pytest.importorskip("transformers")

LENGTH = 17
LIVE = torch.arange(LENGTH) < torch.tensor([17, 5])[:, None]
IDS = torch.randint(5, 90, (2, LENGTH), generator=torch.Generator().manual_seed(0)).masked_fill(~LIVE, 1)
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")


def text(kind: str, **sizes: Any) -> Any:
    """A tiny configuration of ``kind``."""
    common = {"vocab_size": 99, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    return getattr(transformers, kind)(**{**common, "intermediate_size": 16, **sizes})


def lives(
    model: nn.Module, layers: list[str], *calls: dict[str, Any], **options: Any
) -> dict[str, list[Tensor | None]]:
    """The rows that count in each call, of two rounds which must agree."""
    torch.manual_seed(0)
    with Watch(model.eval(), layers, **options) as watch:
        for grad in (True, False):
            watch.clear()
            with torch.set_grad_enabled(grad):
                for call in calls:
                    model(**call)
    return {name: [reading.live for reading in found] for name, found in watch.readings.items()}


def clip() -> nn.Module:
    """As many patches, with the class, as tokens of text."""
    torch.manual_seed(0)
    parts = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16}
    config = transformers.CLIPConfig(
        text_config={**parts, "vocab_size": 99, "max_position_embeddings": 32},
        vision_config={**parts, "image_size": 32, "patch_size": 8},
        projection_dim=16,
    )
    model: nn.Module = transformers.CLIPModel(config)
    return model


def test_clip() -> None:
    layers = ["text_model.encoder.layers.1", "vision_model.encoder.layers.1", "vision_model.encoder.layers.1.mlp"]
    images = torch.randn(2, 3, 32, 32)
    found = lives(clip(), layers, {"input_ids": IDS, "pixel_values": images, "attention_mask": LIVE.long()})
    assert torch.equal(found[layers[0]][0], LIVE)  # type: ignore[arg-type]
    assert found[layers[1]] == [None]
    assert found[layers[2]] == [None]


@pytest.mark.parametrize("kind", ["t5", "bart"])
@pytest.mark.parametrize("labels", [True, False])
def test_an_encoder_decoder_with_labels_only(kind: str, labels: bool) -> None:
    target = torch.arange(LENGTH) < torch.tensor([9, 17])[:, None]
    if kind == "t5":
        config = transformers.T5Config(
            vocab_size=99, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2, decoder_start_token_id=0
        )
        model: Any = transformers.T5ForConditionalGeneration(config)
        layers = ["encoder.block.0", "decoder.block.0"]
    else:
        sizes = {"encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16}
        heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "max_position_embeddings": 32}
        model = transformers.BartForConditionalGeneration(
            transformers.BartConfig(vocab_size=99, d_model=16, **sizes, **heads)
        )
        layers = ["model.encoder.layers.0", "model.decoder.layers.0"]
    call: dict[str, Any] = {"input_ids": IDS, "attention_mask": LIVE.long()}
    if labels:
        call["labels"] = IDS.flip(1).masked_fill(~target, -100)
    else:
        call |= {"decoder_input_ids": IDS, "decoder_attention_mask": target.long()}
    found = lives(model, layers, call)
    assert torch.equal(found[layers[0]][0], LIVE)  # type: ignore[arg-type]
    assert torch.equal(found[layers[1]][0], target)  # type: ignore[arg-type]


def test_prompts_of_a_decoder_only_model_count() -> None:
    model = transformers.LlamaForCausalLM(text("LlamaConfig", num_key_value_heads=2))
    labels = IDS.clone()
    labels[:, :4] = -100
    found = lives(model, ["model.layers.0"], {"input_ids": IDS, "labels": labels})
    assert found["model.layers.0"] == [None]


def test_a_mask_of_four_dimensions() -> None:
    model = transformers.LlamaForCausalLM(text("LlamaConfig", num_key_value_heads=2))
    seen = (torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril() & LIVE[:, None, :])[:, None]
    mask = torch.zeros(seen.shape).masked_fill(~seen, torch.finfo(torch.float32).min)
    found = lives(model, ["model.layers.1"], {"input_ids": IDS, "attention_mask": mask})
    assert torch.equal(found["model.layers.1"][0], LIVE)  # type: ignore[arg-type]


def test_packed_documents() -> None:
    """As a collator without padding gives them."""
    model = transformers.LlamaForCausalLM(text("LlamaConfig", num_key_value_heads=2)).eval()
    positions = torch.cat([torch.arange(size) for size in (5, 9, 3)])[None]
    with Watch(model, ["model.layers.0", "model.layers.1.mlp"]) as watch:
        model(input_ids=IDS[:1], position_ids=positions)
    for readings in watch.readings.values():
        segments = readings[0].segments
        assert segments is not None
        assert torch.unique_consecutive(segments, return_counts=True)[1].tolist() == [5, 9, 3]


def test_generation_with_a_cache() -> None:
    model = transformers.LlamaForCausalLM(text("LlamaConfig", num_key_value_heads=2)).eval()
    left = LIVE.flip(1)
    with warnings.catch_warnings(), Watch(model, ["model.layers.0"]) as watch:
        warnings.simplefilter("error")
        model.generate(
            input_ids=IDS,
            attention_mask=left.long(),
            max_new_tokens=3,
            do_sample=False,
            pad_token_id=1,
            eos_token_id=98,
        )
    first, *rest = watch.readings["model.layers.0"]
    assert torch.equal(first.live, left)  # type: ignore[arg-type]
    assert [bool(reading.live.all()) for reading in rest] == [True, True]  # type: ignore[union-attr]


@pytest.mark.parametrize("kind", ["PrefixTuningConfig", "PromptTuningConfig"])
def test_virtual_tokens(kind: str) -> None:
    """Of prefix tuning the mask is longer than the rows; of prompt tuning the rows have the virtual tokens too."""
    peft = pytest.importorskip("peft")
    base = transformers.GPT2LMHeadModel(transformers.GPT2Config(vocab_size=99, n_embd=16, n_layer=1, n_head=2))
    model = peft.get_peft_model(base, getattr(peft, kind)(task_type="CAUSAL_LM", num_virtual_tokens=3))
    found = lives(model, ["base_model.transformer.h.0"], {"input_ids": IDS, "attention_mask": LIVE.long()})
    expected = LIVE if kind == "PrefixTuningConfig" else nn.functional.pad(LIVE, (3, 0), value=True)
    assert torch.equal(found["base_model.transformer.h.0"][0], expected)  # type: ignore[arg-type]


def test_lora() -> None:
    peft = pytest.importorskip("peft")
    base = transformers.GPT2LMHeadModel(transformers.GPT2Config(vocab_size=99, n_embd=16, n_layer=1, n_head=2))
    model = adapted(base, peft.LoraConfig(task_type="CAUSAL_LM", r=2, fan_in_fan_out=True))
    layer = "base_model.model.transformer.h.0"
    found = lives(model, [layer], {"input_ids": IDS, "attention_mask": LIVE.long()})
    assert torch.equal(found[layer][0], LIVE)  # type: ignore[arg-type]


def test_experts() -> None:
    """Tokens that were sent to an expert have no mask; the block around it has that of the text."""
    config = text("MixtralConfig", num_key_value_heads=2, num_local_experts=2, num_experts_per_tok=2)
    model = transformers.MixtralForCausalLM(config)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = lives(
            model, ["model.layers.0", "model.layers.0.mlp"], {"input_ids": IDS, "attention_mask": LIVE.long()}
        )
    assert torch.equal(found["model.layers.0"][0], LIVE)  # type: ignore[arg-type]
    assert torch.equal(found["model.layers.0.mlp"][0], LIVE)  # type: ignore[arg-type]


def test_audio_with_layers_that_rest() -> None:
    """The encoder makes a mask at its own rate; the convolutions before it are told."""
    config = transformers.Wav2Vec2Config(
        vocab_size=32, hidden_size=16, num_hidden_layers=3, num_attention_heads=2, intermediate_size=16, layerdrop=0.5,
        conv_dim=(8, 8), conv_stride=(5, 2), conv_kernel=(10, 3), num_feat_extract_layers=2,
        num_conv_pos_embeddings=4, num_conv_pos_embedding_groups=2, mask_time_prob=0.0,
    )  # fmt: skip
    model = transformers.Wav2Vec2Model(config)
    torch.manual_seed(0)
    audio = torch.randn(2, 800)
    mask = (torch.arange(800) < torch.tensor([800, 300])[:, None]).long()
    layers = [f"encoder.layers.{i}" for i in range(3)]
    with Watch(model.train(), [*layers, "feature_extractor.conv_layers.1"]) as watch:
        with pytest.warns(UserWarning, match=r'\(2, 800\) does not fit layer "feature_extractor.conv_layers.1".*mask='):
            model(input_values=audio, attention_mask=mask)
        for _ in range(5):
            model(input_values=audio, attention_mask=mask)
    counts = {tuple(reading.live.sum(1).tolist()) for name in layers for reading in watch.readings[name]}  # type: ignore[union-attr]
    assert counts == {(79, 29)}
    assert watch.readings["feature_extractor.conv_layers.1"][0].axes == "batch channels length"


def test_speech_to_text_is_told() -> None:
    config = transformers.Speech2TextConfig(
        vocab_size=99, d_model=16, encoder_layers=1, decoder_layers=1, encoder_ffn_dim=16, decoder_ffn_dim=16,
        encoder_attention_heads=2, decoder_attention_heads=2, input_feat_per_channel=8, conv_channels=16,
        max_source_positions=128, max_target_positions=128,
    )  # fmt: skip
    model = transformers.Speech2TextModel(config).eval()
    features, mask = torch.randn(2, 80, 8), (torch.arange(80) < torch.tensor([80, 40])[:, None]).long()
    with Watch(model, ["encoder.layers.0", "decoder.layers.0"]) as watch, warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        for _ in range(2):
            model(
                input_features=features, attention_mask=mask, decoder_input_ids=IDS, decoder_attention_mask=LIVE.long()
            )
    lives = watch.readings["encoder.layers.0"][1].live
    told = [str(w.message) for w in said if 'layer "encoder.layers.0"' in str(w.message)]
    assert (lives is not None and lives.sum(1).tolist() == [20, 10]) or len(told) == 1
    assert torch.equal(watch.readings["decoder.layers.0"][1].live, LIVE)  # type: ignore[arg-type]


class SentenceEncoder(nn.Module):
    """As a module of sentence-transformers: a dict in, a dict out."""

    def __init__(self) -> None:
        super().__init__()
        self.auto_model = transformers.BertModel(text("BertConfig"))

    def forward(self, features: dict[str, Tensor]) -> dict[str, Tensor]:
        states = self.auto_model(**{key: features[key] for key in ("input_ids", "attention_mask")})
        return {**features, "token_embeddings": states.last_hidden_state}


class Pooling(nn.Module):
    def forward(self, features: dict[str, Tensor]) -> dict[str, Tensor]:
        mask = features["attention_mask"][..., None]
        pooled = (features["token_embeddings"] * mask).sum(1) / mask.sum(1)
        return {**features, "sentence_embedding": pooled}


def test_a_dict_of_features() -> None:
    model = nn.Sequential(SentenceEncoder(), Pooling()).eval()
    layers = ["0.auto_model.encoder.layer.1", "1"]
    batch = transformers.BatchEncoding({"input_ids": IDS, "attention_mask": LIVE.long()})
    with Watch(model, layers[:1]) as watch:
        for _ in range(2):
            model(batch)
    assert all(torch.equal(reading.live, LIVE) for reading in watch.readings[layers[0]])  # type: ignore[arg-type]
    with Watch(model, layers[1:], output=lambda out: out["sentence_embedding"]) as watch:
        model(batch)
    assert watch.readings["1"][0].rows.shape == (1, 2, 16)
    assert watch.readings["1"][0].live is None


class Attention(nn.Module):
    def __init__(self, batch_first: bool) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(16, 2, batch_first=batch_first)
        self.linear = nn.Linear(16, 16)

    def forward(self, x: Tensor, key_padding_mask: Tensor) -> Tensor:
        out: Tensor = self.linear(self.attention(x, x, x, key_padding_mask=key_padding_mask)[0])
        return out


@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("length", [LENGTH, 2])
def test_attention_of_torch(batch_first: bool, length: int) -> None:
    model, live = Attention(batch_first), LIVE[:, :length].clone()
    live[1, length // 2 :] = False
    x = torch.randn(2, length, 16)
    call = {"x": x if batch_first else x.transpose(0, 1), "key_padding_mask": ~live}
    found = lives(model, ["attention", "linear"], call)
    assert torch.equal(found["attention"][0], live)  # type: ignore[arg-type]
    assert torch.equal(found["linear"][0], live)  # type: ignore[arg-type]
