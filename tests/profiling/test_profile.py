"""Profiles of real models, against the definitions written out in `reference`."""

from __future__ import annotations

import json
import math
import pickle
import warnings
from collections.abc import Callable
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from gapt_optim import EntropyConfig, RepresentationHook
from gapt_optim.layout import Reading
from gapt_optim.profiling import LayerProfile, Profile, profile
from gapt_optim.profiling.charts import ProfileCharts
from gapt_optim.profiling.statistics import LayerSums, What
from gapt_optim.profiling.tables import profile_table
from gapt_optim.profiling.window_values import values_of_gram, values_of_order_2

from . import reference

KINDS = [(kernel, center) for kernel in ("linear", "cosine") for center in (False, True)]


def gpt2() -> nn.Module:
    config = GPT2Config(vocab_size=97, n_positions=32, n_embd=24, n_layer=3, n_head=2, bos_token_id=0, eos_token_id=0)
    return GPT2LMHeadModel(config)


def llama() -> nn.Module:
    config = LlamaConfig(
        vocab_size=97, hidden_size=24, intermediate_size=48, num_hidden_layers=3, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=64, bos_token_id=0, eos_token_id=0, pad_token_id=0,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def tokens(mask: bool = False, batches: int = 2, length: int = 21) -> list[dict[str, Tensor]]:
    found = []
    for _ in range(batches):
        batch = {"input_ids": torch.randint(1, 97, (3, length))}
        if mask:
            live = torch.ones(3, length, dtype=torch.long)
            live[0, 12:] = 0  # padding on the right
            live[1, :5] = 0  # and on the left
            batch["attention_mask"] = live
        found.append(batch)
    return found


class Residual(nn.Module):
    """A block of a ResNet: channels first."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(channels, channels, 3, padding=1), nn.BatchNorm2d(channels), nn.ReLU(),
            nn.Conv2d(channels, channels, 3, padding=1), nn.BatchNorm2d(channels),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(x + self.body(x))


class ResNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, stride=2, padding=1)
        self.layer1 = nn.Sequential(Residual(8), Residual(8))
        self.down = nn.Conv2d(8, 80, 3, stride=2, padding=1)
        self.layer2 = nn.Sequential(Residual(80))
        self.head = nn.Linear(80, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.layer2(self.down(self.layer1(self.stem(x))))
        return self.head(x.flatten(2).mean(-1))


class ViT(nn.Module):
    def __init__(self, width: int = 20) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, width, 4, stride=4)
        self.cls = nn.Parameter(torch.randn(1, 1, width))
        layer = nn.TransformerEncoderLayer(width, 2, 2 * width, dropout=0.0, batch_first=True, norm_first=True)
        self.blocks = nn.ModuleList(nn.TransformerEncoder(layer, 1, enable_nested_tensor=False) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).mT
        x = torch.cat([self.cls.expand(len(x), -1, -1), x], 1)
        for block in self.blocks:
            x = block(x)
        return x[:, 0]


class Encoder(nn.Module):
    """An encoder with padding masks, which packs masked sequences in evaluation."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(12, 2, 24, dropout=0.0, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2)

    def forward(self, x: Tensor, padding: Tensor) -> Tensor:
        return self.encoder(x, src_key_padding_mask=padding)


class MLP(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([nn.Linear(6, 6), nn.Linear(6, 6)])

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = torch.tanh(block(x))
        return x


def outputs(model: nn.Module, names: list[str], run: Callable[[], Any]) -> dict[str, list[Tensor]]:
    """Outputs of modules, kept by hooks of the test's own."""
    kept: dict[str, list[Tensor]] = {name: [] for name in names}
    modules = dict(model.named_modules())

    def keep(name: str) -> Callable[..., None]:
        return lambda module, args, out: kept[name].append(out[0] if isinstance(out, tuple) else out)

    handles = [modules[name].register_forward_hook(keep(name)) for name in names]
    model.eval()
    with torch.no_grad():
        run()
    for handle in handles:
        handle.remove()
    return kept


def reading_of(h: Tensor) -> Reading:
    return Reading(h, h, None, None, "batch length features", "", "", None, lambda z: z)


def saying(windows: list[Tensor], fewest: int) -> list[Tensor]:
    """Those with enough rows for an entropy."""
    return [window for window in windows if len(window) >= fewest]


def check_layer(
    found: LayerProfile, sequences: list[tuple[Tensor, Tensor]], *, tokens: bool, orders: tuple[float, ...],
    sizes: tuple[int | None, ...],
) -> None:  # fmt: skip
    """Every number of a layer against the definitions, from (rows (seq, d), mask (seq,)) of each sequence."""
    close = {"rel": 2e-3, "abs": 2e-4}
    for with_first in (True, False) if tokens else (True,):
        parts = []
        for rows, mask in sequences:
            start = int(mask.nonzero()[0]) if mask.any() else 0  # windows begin where a sequence does
            rows, mask = rows[start:], mask[start:].clone()
            if not with_first and len(mask):
                mask[0] = False
            parts.append((rows, mask))
        for size in sizes:
            cut = [window for rows, mask in parts for window in reference.windows(rows, mask, size)]
            for kernel, center in KINDS:
                for alpha in orders:
                    value = found.entropy(kernel, center, alpha=alpha, window=size, first_token=with_first)
                    nats, normalized = zip(
                        *(reference.entropy(window, kernel, center, alpha) for window in saying(cut, 2 + center)),
                        strict=True,
                    )
                    assert value.nats == pytest.approx(fmean(nats), **close), (kernel, center, alpha, size, with_first)
                    assert value.normalized == pytest.approx(fmean(normalized), **close)
            shape = found.shape(window=size, first_token=with_first)
            assert shape.norm_ratio == pytest.approx(fmean(map(reference.norm_ratio, saying(cut, 2))), rel=1e-4)
            assert shape.mean_share == pytest.approx(fmean(map(reference.mean_share, saying(cut, 2))), rel=1e-4)
        every = torch.cat([rows[mask] for rows, mask in parts])
        rank = found.rankme if with_first else found.rankme_without_first
        assert rank == pytest.approx(reference.rankme(every), rel=1e-3)
        if tokens:
            bent = [angle for rows, mask in parts for angle in reference.curvature(rows[mask])]
            assert (found.curvature if with_first else found.curvature_without_first) == pytest.approx(
                fmean(bent), rel=1e-3
            )
    if tokens:
        shares = [float(rows[mask][0].square().sum() / rows[mask].square().sum()) for rows, mask in sequences]
        assert found.first_token_share == pytest.approx(fmean(shares), rel=1e-4)
    else:
        assert found.first_token_share is found.curvature is found.rankme_without_first is None


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(("build", "layers"), [(gpt2, "transformer.h.*"), (llama, "model.layers.*")])
def test_language_models_equal_the_definitions(build: Callable[[], nn.Module], layers: str, masked: bool) -> None:
    model, batches = build(), tokens(masked)
    orders, sizes = (2.0, 1.0), (8, None)
    result = profile(model, batches, orders=orders, windows=sizes)
    assert result.names == [layers.replace("*", str(i)) for i in range(3)]
    kept = outputs(model, result.names, lambda: [model(**batch, use_cache=False) for batch in batches])
    masks = [batch.get("attention_mask", torch.ones_like(batch["input_ids"])).bool() for batch in batches]
    for layer in result.layers:
        sequences = [
            (rows, mask)
            for h, live in zip(kept[layer.name], masks, strict=True)
            for rows, mask in zip(h, live, strict=True)
        ]
        check_layer(layer, sequences, tokens=True, orders=orders, sizes=sizes)


def test_more_rows_than_features_equal_the_definitions() -> None:
    torch.manual_seed(3)
    layer = nn.ModuleList([nn.Linear(4, 5)])
    model = nn.Sequential(layer[0])
    x = torch.randn(3, 30, 4)
    x[:, 0] *= 200  # a first token that dwarfs all others
    mask = torch.ones(3, 30, dtype=torch.bool)
    mask[1, 20:] = False
    result = profile(model, [x], "0", windows=(8, 16, None), orders=(2.0, 3.0, math.inf), mask=lambda batch: mask)
    (h,) = outputs(model, ["0"], lambda: model(x))["0"]
    check_layer(
        result["0"],
        list(zip(h, mask, strict=True)),
        tokens=True,
        orders=(2.0, 3.0, math.inf),
        sizes=(8, 16, None),
    )
    assert result["0"].first_token_share > 0.9  # type: ignore[operator]


def test_images_are_positions_with_channels_as_features() -> None:
    model, x = ResNet(), torch.randn(2, 3, 16, 16)
    result = profile(model, [(x, "labels")], ["layer1.*", "layer2.*"])
    assert result.names == ["layer1.0", "layer1.1", "layer2.0"]
    kept = outputs(model, result.names, lambda: model(x))
    for layer in result.layers:
        rows = kept[layer.name][0].flatten(2).mT
        sequences = [(z, torch.ones(len(z), dtype=torch.bool)) for z in rows]
        check_layer(layer, sequences, tokens=False, orders=(2.0,), sizes=(8, None))


def test_vision_transformer() -> None:
    model, x = ViT(), torch.randn(3, 3, 16, 16)
    result = profile(model, [x])
    assert result.names == ["blocks.0", "blocks.1", "blocks.2"]
    kept = outputs(model, result.names, lambda: model(x))
    for layer in result.layers:
        sequences = [(z, torch.ones(len(z), dtype=torch.bool)) for z in kept[layer.name][0]]
        check_layer(layer, sequences, tokens=True, orders=(2.0,), sizes=(8, None))


def test_encoder_that_packs_padded_sequences() -> None:
    model = Encoder()
    x, padding = torch.randn(3, 11, 12), torch.zeros(3, 11, dtype=torch.bool)
    padding[0, 7:] = padding[2, 3:] = True
    batch = {"x": x, "padding": padding}
    with warnings.catch_warnings():
        # PyTorch warns once per process that nested tensors are a prototype, so not always here.
        warnings.filterwarnings("ignore", message=".*nested tensors", category=UserWarning)
        result = profile(model, [batch], mask=lambda b: ~b["padding"])
    direct = profile(model, [{"x": x[i : i + 1, : int((~padding[i]).sum())], "padding": None} for i in range(3)])
    for found, expected in zip(result.layers, direct.layers, strict=True):
        assert found.rankme == pytest.approx(expected.rankme, rel=1e-3)
        for a, b in zip(found.entropies, expected.entropies, strict=True):
            assert a.nats == pytest.approx(b.nats, rel=1e-3, abs=1e-4)


def test_samples_without_a_sequence() -> None:
    model, x = MLP(), torch.randn(20, 6)
    result = profile(model, [x])
    kept = outputs(model, result.names, lambda: model(x))
    for layer in result.layers:
        check_layer(
            layer,
            [(kept[layer.name][0], torch.ones(20, dtype=torch.bool))],
            tokens=False,
            orders=(2.0,),
            sizes=(8, None),
        )


def test_agrees_with_the_hook_of_training() -> None:
    model, batches = gpt2().eval(), tokens(True, batches=1)
    result = profile(model, batches, windows=(8,))
    hook = RepresentationHook(model, "transformer.h.*")
    for kernel, center in KINDS:
        with torch.no_grad(), hook.measuring(EntropyConfig(kernel=kernel, center=center)) as measured:
            model(**batches[0])
        for name, value in measured.entropies.items():
            assert result[name].entropy(kernel, center).nats == pytest.approx(float(value), rel=1e-4)
    for name, measures in measured.measures.items():
        assert result[name].shape().norm_ratio == pytest.approx(measures.norm_ratio, rel=1e-4)
        assert result[name].shape().mean_share == pytest.approx(measures.mean_share, rel=1e-4)


@given(st.lists(st.integers(1, 4), min_size=1, max_size=4), st.integers(9, 20))
def test_how_sequences_are_batched_does_not_matter(sizes: list[int], length: int) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 7))
    x = torch.randn(sum(sizes), length, 5)
    whole = profile(model, [x], "0")
    cut = profile(model, list(x.split(sizes)), "0")
    for a, b in zip(whole.layers[0].entropies, cut.layers[0].entropies, strict=True):
        assert a.nats == pytest.approx(b.nats, rel=1e-4, abs=1e-5)
    assert whole.layers[0].curvature == pytest.approx(cut.layers[0].curvature, rel=1e-4)
    assert whole.layers[0].rankme == pytest.approx(cut.layers[0].rankme, rel=1e-6)


@given(st.floats(0.01, 100), st.integers(0, 5))
def test_token_norms_change_the_linear_entropy_alone(scale: float, position: int) -> None:
    torch.manual_seed(1)
    z = torch.randn(2, 16, 6)
    longer = z.clone()
    longer[:, position] *= scale
    identity = nn.Sequential(nn.Identity())
    before, after = (profile(identity, [x], "0").layers[0] for x in (z, longer))
    for center in (False, True):
        assert after.entropy("cosine", center).nats == pytest.approx(before.entropy("cosine", center).nats, abs=1e-4)
    if scale > 10:
        assert after.entropy("linear", False).nats < before.entropy("linear", False).nats  # type: ignore[operator]
        assert after.shape().norm_ratio > before.shape().norm_ratio  # type: ignore[operator]


def test_memory_does_not_grow_with_the_data() -> None:
    def size(sequences: int) -> int:
        sums = LayerSums(What())
        for _ in range(sequences // 64):
            sums.add(reading_of(torch.randn(64, 4, 8)))
        return len(pickle.dumps(sums))

    assert size(4096) < 1.01 * size(2048)  # from 1,024 sequences on


def test_rankme_stops_at_its_rows() -> None:
    model = nn.Sequential(nn.Identity())
    z = torch.randn(4, 10, 6)
    some = profile(model, [z[:2], z[2:]], "0", rankme_rows=20).layers[0].rankme
    assert some == pytest.approx(reference.rankme(z[:2].flatten(0, 1)), rel=1e-6)
    assert profile(model, [z], "0", rankme_rows=0).layers[0].rankme is None
    every = profile(model, [z], "0", rankme_rows=None).layers[0].rankme
    assert every == pytest.approx(reference.rankme(z.flatten(0, 1)), rel=1e-6)
    many = torch.randn(5, 50, 6)
    enough = profile(model, list(many.split(1)), "0").layers[0]
    assert enough.rankme_rows == 120
    assert enough.rankme == pytest.approx(reference.rankme(many.flatten(0, 1)[:120]), rel=1e-6)
    assert not enough.few_rows


def test_model_is_left_as_it_was() -> None:
    model = gpt2().train()
    model.get_submodule("transformer.drop").eval()
    before = {name: module.training for name, module in model.named_modules()}
    profile(model, tokens())
    assert {name: module.training for name, module in model.named_modules()} == before
    assert all(not module._forward_hooks for module in model.modules())
    assert all(p.grad is None for p in model.parameters())


def test_rows_that_are_not_finite_are_left_out_and_said() -> None:
    z = torch.randn(2, 8, 4)
    z[0, 3] = math.nan
    result = profile(nn.Sequential(nn.Identity()), [z], "0")
    assert result.notes == ("layer 0: 1 rows were not finite and are left out",)
    assert math.isfinite(result.layers[0].entropy().nats)  # type: ignore[arg-type]


def test_outputs_of_every_size_are_taken(tmp_path: Path) -> None:
    """One token, one row, one feature, zeros, halves, images of a pixel, batches of several lengths or of nothing."""
    z = torch.randn(2, 12, 6)
    shapes = [(3, 1, 6), (3, 2, 6), (1, 6), (2, 12, 1), (2, 6, 1, 1), (2, 6, 2, 2, 2)]
    cases = [[torch.randn(shape)] for shape in shapes]
    cases += [[torch.zeros(2, 12, 6)], [torch.ones(2, 12, 6)], [1e-30 * z], [z.half()], [z.double()]]
    cases += [[z, torch.randn(3, 7, 6)], [torch.randn(0, 12, 6), z], [z, torch.randn(2, 0, 6)]]
    for batches in cases:
        axes = {4: "batch channels height width", 5: "batch channels depth height width"}.get(batches[0].ndim)
        found = profile(nn.Sequential(nn.Identity()), batches, "0", name="<b>", data="a", layout=axes)
        assert Profile.load(found.save(tmp_path / "p.json")) == found
        assert len(profile_table(found))
        charts = ProfileCharts({"a": found})
        assert [chart.traces for chart in (*charts.entropies(), *charts.others())]
        assert all(value.nats is None or value.nats >= 0 for value in found.layers[0].entropies)


@pytest.mark.parametrize("features", [9, 48, 100])
@pytest.mark.parametrize("rows", [40, 130])
def test_large_windows_in_few_passes_equal_the_general_way(rows: int, features: int) -> None:
    """With zero rows, masks, long first tokens, a window without one, and a large common vector."""
    kinds = What().kinds
    for length, common in ((1, 0), (300, 0), (1, 10)):
        z = torch.randn(3, rows, features) + common
        z[:, 0] *= length
        live = torch.rand(3, rows) > 0.2
        first = live & (live.cumsum(1) == 1)
        first[2] = False
        z[1, 5] = 0
        z = z * live.unsqueeze(-1)
        gram = z.double() @ z.double().mT
        found = values_of_order_2(z, live, first, kinds)
        expected = [
            values_of_gram(gram.clone(), keep, features, kinds, torch.float32) for keep in (live, live & ~first)
        ]
        for name, values in found._asdict().items():
            both = torch.cat([getattr(one, name) for one in expected], 1).double()
            torch.testing.assert_close(values.double(), both, rtol=1e-4, atol=1e-4, msg=name)


def test_rows_that_are_alike_to_rounding_have_no_centred_entropy() -> None:
    z = (torch.randn(6) + 1e-9 * torch.randn(2, 30, 6)).float()
    live = torch.ones(2, 30, dtype=torch.bool)
    first = torch.zeros_like(live)
    first[:, 0] = True
    found = values_of_order_2(z, live, first, What().kinds)
    torch.testing.assert_close(found.values[:4], torch.zeros(4, 4), atol=1e-6, rtol=0)


def test_saved_and_loaded_is_the_same(tmp_path: Path) -> None:
    result = profile(gpt2(), tokens(True), orders=(2.0, math.inf), name="a", data="b")
    loaded = Profile.load(result.save(tmp_path / "sub" / "p.json"))
    assert loaded == result
    assert json.loads((tmp_path / "sub" / "p.json").read_text())["kind"] == "profile"


@pytest.mark.parametrize("content", ["", "[1]", '{"kind": "run"}', '{"kind": "profile", "layers": [3]}'])
def test_a_file_that_is_no_profile_is_named(tmp_path: Path, content: str) -> None:
    path = tmp_path / "p.json"
    path.write_text(content)
    with pytest.raises(ValueError, match=r"p\.json holds no profile of this version; make one with gapt-optim"):
        Profile.load(path)


def test_a_layer_is_found_by_its_name() -> None:
    result = profile(gpt2(), tokens())
    assert result["transformer.h.1"] is result.layers[1]
    with pytest.raises(KeyError, match=r"no layer 'h\.1'; the profile has"):
        _ = result["h.1"]


def test_a_mask_that_fits_no_tokens_is_left_aside() -> None:
    """As of an attention mask (batch, 1, seq, seq), or of a layer that gives a vector a sequence."""
    batches = tokens()
    plain = profile(gpt2_of(0), batches)
    square = [{**batch, "attention_mask": torch.ones(3, 1, 21, 21)} for batch in batches]
    kept = profile(gpt2_of(0), square, call=lambda model, batch: model(input_ids=batch["input_ids"]))
    assert [layer.entropies for layer in kept.layers] == [layer.entropies for layer in plain.layers]


def gpt2_of(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return gpt2()


def test_progress_is_shown_on_stderr(capsys: pytest.CaptureFixture[str]) -> None:
    batches = [torch.randn(8, 4) for _ in range(3)]
    shown = profile(nn.Sequential(nn.Linear(4, 4)), iter(batches), "0", progress=True)
    said = capsys.readouterr()
    assert (shown.batches, said.out) == (3, "")


def test_half_precision_runs(tmp_path: Path) -> None:
    model, batches = gpt2(), tokens()
    exact, half = profile(model, batches), profile(model, batches, dtype=torch.bfloat16)
    for a, b in zip(exact.layers, half.layers, strict=True):
        assert b.entropy().nats == pytest.approx(a.entropy().nats, rel=0.02)


SAME = {"model": nn.Sequential(nn.Identity()), "layers": "0"}


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"model": "gpt2"}, TypeError, r"model must be a torch\.nn\.Module"),
        ({"batches": []}, ValueError, "batches is empty"),
        ({"layers": "nothing.*"}, ValueError, "matches no module"),
        ({"orders": (0.0,)}, ValueError, "orders must hold numbers"),
        ({"windows": (1,)}, ValueError, "windows must hold integers of at least 2"),
        ({"windows": (8, 8)}, ValueError, "must not name a value twice"),
        ({**SAME, "batches": [torch.zeros(0, 5)]}, ValueError, "no row of any layer counts"),
        ({"mask": lambda batch: torch.zeros(3, 21)}, ValueError, "no row of any layer counts"),
        ({"output": lambda out: torch.full((2, 3, 4), math.nan)}, ValueError, "no row of any layer counts"),
        (
            {**SAME, "batches": [torch.zeros(2, 3, 4), torch.zeros(2, 3, 5)]},
            ValueError,
            "3 dimensions and 5 features, but",
        ),
        ({"rankme_rows": -1}, ValueError, "rankme_rows must be at least 0"),
        ({"rankme_rows": "all"}, ValueError, 'rankme_rows must be at least 0, "auto", or None for all'),
        ({"mask": lambda call: torch.ones(3)}, ValueError, r"mask= gave shape \(3,\), but the output"),
        ({"output": lambda out: "text"}, TypeError, "gave str, not a tensor"),
        ({"output": lambda out: torch.ones(2, 3, 4).long()}, TypeError, "entropy needs floating point"),
        ({"output": lambda out: torch.randn(3)}, ValueError, r"shape \(3,\)"),
        ({"layers": "lm_head", "call": lambda model, batch: model.transformer(**batch)}, ValueError, "did not run"),
    ],
)
def test_errors_name_what_to_change(change: dict[str, Any], error: type[Exception], message: str) -> None:
    arguments: dict[str, Any] = {"model": gpt2(), "batches": tokens(), "layers": None} | change
    with pytest.raises(error, match=message):
        profile(arguments.pop("model"), arguments.pop("batches"), arguments.pop("layers"), **arguments)
    with pytest.raises(KeyError, match="no entropy of"):
        profile(nn.Sequential(nn.Identity()), [torch.randn(2, 3)], "0").layers[0].entropy(window=4)


class Scaled(nn.Module):
    """Two arguments."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: Tensor, scale: Tensor) -> Tensor:
        out: Tensor = self.linear(x) * scale
        return out


class Around(nn.Module):
    """Passes on what it is given, as DistributedDataParallel does."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.module(*args, **kwargs)


@pytest.mark.parametrize("kind", [tuple, list])
def test_a_tuple_for_a_model_with_several_arguments_says_to_give_a_dict(kind: type[Any]) -> None:
    x, scale = torch.randn(8, 4), torch.randn(8, 4)
    message = (
        rf"missing 1 required positional argument: 'scale'; of a {kind.__name__} in batches only the first item is "
        "passed to the model; for several arguments give a dict"
    )
    with pytest.raises(TypeError, match=message):
        profile(Scaled(), [kind([x, scale])], "linear")
    with pytest.raises(TypeError, match=message):
        profile(Around(Scaled()), [kind([x, scale])], "module.linear")
    assert profile(Scaled(), [{"x": x, "scale": scale}], "linear").rows == 8


def test_other_type_errors_of_a_model_stay_as_they_are() -> None:
    x = torch.randn(8, 4)
    with pytest.raises(TypeError) as raised:
        profile(nn.Sequential(nn.Linear(4, 4)), [(x, 0)], "0", output=lambda out: torch.ones(2, 3).long())
    assert "give a dict" not in str(raised.value)
    with pytest.raises(TypeError) as raised:
        profile(Scaled(), [x], "linear")
    assert "give a dict" not in str(raised.value)
