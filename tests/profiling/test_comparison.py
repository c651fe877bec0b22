"""What `compare` says of profiles of the same data, and of those that differ."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from gapt_optim import Profile, compare, profile
from gapt_optim.profiling import draw_profile, load_profiles, save_profiles, write_profile
from gapt_optim.profiling.charts import over_profiles
from gapt_optim.profiling.comparison import rankme_at_equal_rows

from . import reference


class Shared(nn.Module):
    """One layer that runs several times, as ALBERT's does."""

    def __init__(self, times: int = 3) -> None:
        super().__init__()
        self.layer, self.times = nn.Linear(8, 8), times

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(self.times):
            x = torch.tanh(self.layer(x))
        return x


def stack(layers: int = 2, width: int = 8) -> nn.Module:
    return nn.Sequential(*(nn.Linear(8 if i == 0 else width, width) for i in range(layers)))


def data(sequences: int = 6, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return list(torch.randn(sequences, 20, 8, generator=generator).split(2))


def made(model: nn.Module | None = None, batches: list[Tensor] | None = None, **options: Any) -> Profile:
    layers = "layer" if isinstance(model, Shared) else "*"
    return profile(model or stack(), batches or data(), layers, **options)


def test_of_the_same_data_nothing_is_said_and_changes_are_differences() -> None:
    first, second = made(), made()
    found = compare({"a": first, "b": second})
    assert found.warnings == ()
    table = found.to_pandas()
    for i, name in enumerate(["0", "1"]):
        before, after = (one.layers[i].entropy().nats for one in (first, second))
        assert table.loc[name, "cosine, centred S"] == after
        assert table.loc[name, "Δ cosine, centred S"] == pytest.approx(after - before)  # type: ignore[operator]


def test_how_data_is_batched_is_no_difference() -> None:
    model = stack()
    whole = made(model, [torch.cat(data())])
    assert compare({"a": made(model), "b": whole}).warnings == ()


@pytest.mark.parametrize(("seed", "sequences"), [(1, 6), (0, 4)])
def test_other_data_is_refused_or_said(seed: int, sequences: int) -> None:
    """Another text, and more of the same."""
    profiles = {"a": made(), "b": made(batches=data(sequences, seed))}
    with pytest.raises(ValueError, match=r"a and b were not profiled on the same data: .*digest.*anyway"):
        compare(profiles)
    warned = compare(profiles, anyway=True).warnings
    assert "not profiled on the same data" in warned[0]
    assert any("RankMe grows with rows alone" in warning for warning in warned) == (sequences != 6)


def test_padding_is_no_data() -> None:
    ids = torch.arange(1, 13).reshape(2, 6)
    mask = torch.tensor([[1] * 6, [1] * 4 + [0] * 2])
    model = nn.ModuleDict({"embed": nn.Embedding(20, 8)})

    def call(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        out: Tensor = model.get_submodule("embed")(batch["input_ids"])
        return out

    other = ids.clone()
    other[1, 4:] = 0
    digests = [
        profile(model, [{"input_ids": each, "attention_mask": mask}], "embed", call=call).origin.digest
        for each in (ids, other)
    ]
    assert digests[0] == digests[1]


def test_rankme_is_compared_at_equal_rows() -> None:
    model = nn.Sequential(nn.Identity())
    z = torch.randn(400, 8)
    few, many = (profile(model, [z[:n]], "0", rankme_rows=None).layers[0] for n in (300, 400))
    expected = reference.rankme(z[:256])
    assert rankme_at_equal_rows(few, many) == pytest.approx((expected, expected))
    assert rankme_at_equal_rows(few, replace(many, rankme_at={})) == (None, None)


def test_other_architectures() -> None:
    base = made()
    with pytest.raises(ValueError, match="a and b have 2 and 3 layers, which cannot be paired"):
        compare({"a": base, "b": made(stack(3))})
    assert compare({"a": base, "b": made(stack(2, 16))}).warnings == (
        "a and b have 8 and 16 features; limits of entropies and RankMe differ",
    )
    named = nn.Sequential(OrderedDict(x=nn.Linear(8, 8), y=nn.Linear(8, 8)))
    found = compare({"a": base, "b": made(named)})
    assert found.warnings == ("a and b name their layers differently; they are paired by place: 0 with x, 1 with y",)
    assert list(found.to_pandas().index) == ["0 / x", "1 / y"]


def test_other_types_versions_and_settings() -> None:
    model = stack()
    base = made(model)
    half = made(model, dtype=torch.bfloat16)
    model.float()
    assert "a and b ran in float32 and bfloat16" in compare({"a": base, "b": half}).warnings
    old = replace(base, origin=replace(base.origin, versions={**base.origin.versions, "torch": "1.0"}))
    assert compare({"a": base, "b": old}).warnings == (f"a and b were made with torch {torch.__version__} and 1.0",)
    with pytest.raises(ValueError, match="no window and order in common"):
        compare({"a": base, "b": made(windows=(4,))})
    with pytest.raises(ValueError, match="have the presets None and diff-erank"):
        compare({"a": base, "b": made(preset="diff-erank")})
    with pytest.raises(ValueError, match="at least two profiles by name, found 1"):
        compare({"a": base})


def test_calls_of_a_shared_layer_are_depths_of_their_own() -> None:
    model = Shared()
    found = made(model)
    assert found.names == ["layer", "layer (call 2)", "layer (call 3)"]
    assert found.notes == ("layer layer runs up to 3 times in a pass; its calls are layers of their own",)
    x = torch.cat(data())
    for layer in found.layers:
        z = model.layer(x).detach()
        entropies = [reference.entropy(window, "cosine", True, 2.0)[0] for rows in z for window in rows.split(8)]
        assert layer.entropy().nats == pytest.approx(sum(entropies) / len(entropies), rel=1e-4)
        x = torch.tanh(z)
    assert compare({"a": found, "b": made(Shared())}).warnings == ()


def test_steps_of_a_recurrent_cell_are_taken_together() -> None:
    class Loop(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.cell = nn.GRUCell(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            h = torch.zeros(len(x), 8)
            for t in range(x.shape[1]):
                h = self.cell(x[:, t], h)
            return h

    found = profile(Loop(), data(12), "cell")
    assert found.names == ["cell"]
    assert found.notes == ("layer cell runs up to 20 times in a pass; its calls are taken together",)
    assert found.rows == 12 * 20


def test_files_of_one_and_of_several(tmp_path: Path) -> None:
    profiles = {"a": made(), "b": made()}
    assert load_profiles(save_profiles(profiles, tmp_path / "both.json")) == profiles
    assert load_profiles(profiles["a"].save(tmp_path / "one.json")) == {"one": profiles["a"]}
    with pytest.raises(ValueError, match="holds 2 profiles"):
        Profile.load(tmp_path / "both.json")


def test_pages_and_pictures_of_several(tmp_path: Path) -> None:
    pytest.importorskip("plotly")
    named = nn.Sequential(OrderedDict(a=nn.Linear(8, 8), b=nn.Tanh()))
    second = made(named, [*data(), torch.full((2, 20, 8), torch.nan)])
    second = replace(second, origin=made().origin)
    first = made()
    page = write_profile({"first": first, "second": second}, tmp_path / "page.html").read_text()
    assert "they are paired by place: 0 with a, 1 with b" in page
    assert f"<b>second</b>: {second.notes[0]}" in page
    assert "<b>first</b>:" not in page
    assert "Layers over profiles" in page
    heat = over_profiles(compare({"first": first, "second": second}))
    assert [shown for shown, _ in heat.views][:2] == ["cosine, centred S (nats)", "rank (effective rank)"]
    found = [[layer.entropy().nats for layer in one.layers] for one in (first, second)]
    drawn = heat.traces[0]["z"].T
    assert drawn == pytest.approx(np.array(found), rel=1e-6)
    steps = {f"step {i}": made() for i in range(3)}
    assert "Layers over profiles" in write_profile(steps, tmp_path / "steps.html").read_text()
    assert draw_profile(steps, tmp_path / "steps.svg").stat().st_size > 10_000
    frame = compare(steps).to_pandas()
    assert frame.shape == (2, 3)
    assert frame.loc["0", "step 1"] == steps["step 1"]["0"].entropy().nats
    for write in (write_profile, draw_profile):
        with pytest.raises(ValueError, match="profiles is empty"):
            write({}, tmp_path / "none.html")
