"""The optimizers of the main example, their memory, and its faster arithmetic."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from errors import StoppedError, UserError
from gpt2 import PRESETS, build, token_loss
from gpt2_fineweb import run
from optimizers import LOW_BIT, OPTIMIZERS, check_optimizer, make_optimizers, state_bytes
from speedups import check_float8, to_float8, use_linear_layers
from torch import nn

from gapt_optim.viewing import read_metrics
from tests.examples.conftest import Interrupting

CPU = torch.device("cpu")
VOCABULARY = 512


def model() -> nn.Module:
    torch.manual_seed(0)
    return build(*PRESETS["nano"].size, vocabulary=VOCABULARY, separator=0, context=16, dropout=0.0)


def tokens() -> tuple[torch.Tensor, torch.Tensor]:
    rows = torch.randint(VOCABULARY, (4, 17), generator=torch.Generator().manual_seed(1))
    return rows[:, :-1], rows[:, 1:]


@pytest.fixture
def eager() -> Iterator[None]:
    """torchao compiles its step, which takes a minute; uncompiled it does the same."""
    with torch.compiler.set_stance("force_eager"):
        yield


@pytest.mark.filterwarnings("ignore:.torch.jit.script_method. is deprecated:DeprecationWarning")  # inductor's import
@pytest.mark.usefixtures("eager")
@pytest.mark.parametrize("method", ["plain", "gapt"])
@pytest.mark.parametrize("optimizer", [name for name in OPTIMIZERS if name != "adamw"])
def test_trains_and_goes_on_bit_for_bit(
    tiny: list[str], tmp_path: Path, optimizer: str, method: str, interrupting: Interrupting
) -> None:
    flags = [*tiny, "--optimizer", optimizer, "--method", method]
    run([*flags, "--out", str(tmp_path / "whole")])
    with interrupting(6), pytest.raises(StoppedError, match="stopped after step 7 of 12"):
        run([*flags, "--out", str(tmp_path / "parts")])
    run(["--resume", "--quiet", "--out", str(tmp_path / "parts")])
    for name in ("metrics.jsonl", "validation.jsonl"):
        assert (tmp_path / "whole" / name).read_text() == (tmp_path / "parts" / name).read_text()
    results = json.loads((tmp_path / "whole" / "results.json").read_text())
    assert results["config"]["optimizer"] == optimizer
    assert math.isfinite(results["runs"][method]["val_loss"])
    losses = [record["loss"] for record in read_metrics(tmp_path / "whole" / "metrics.jsonl")]
    assert losses[-1] < losses[0]


def trained(optimizer: Any) -> tuple[nn.Module, list[torch.optim.Optimizer]]:
    net = model()
    made = make_optimizers(optimizer, net, lr=1e-3, weight_decay=0.1, beta2=0.95)
    token_loss(net, *tokens()).backward()  # type: ignore[no-untyped-call]
    for each in made:
        each.step()
    return net, made


@pytest.mark.usefixtures("eager")
def test_state_is_counted_as_it_is_stored() -> None:
    net, adamw = trained("adamw")
    sizes = [p.numel() for p in net.parameters()]
    assert state_bytes(adamw) == sum(4 * (2 * size + 1) for size in sizes)
    matrices = [p.numel() for p in net.get_submodule("transformer.h").parameters() if p.ndim == 2]
    _, muon = trained("muon")
    rest = sum(sizes) - sum(matrices)
    assert state_bytes(muon) == 4 * (sum(matrices) + 2 * rest + len(sizes) - len(matrices))
    for name, bits in (("adamw8bit", 8), ("adamw4bit", 4), ("adamwfp8", 8)):
        _, low = trained(name)
        large = sum(size for size in sizes if size >= 4096)
        stored = sum(4 * (2 * size + 1) for size in sizes if size < 4096) + 2 * large * bits // 8
        assert stored < state_bytes(low) < 1.1 * stored  # and a scale for each block of numbers


def test_muon_takes_the_matrices_of_the_blocks() -> None:
    net = model()
    muon, adamw = make_optimizers("muon", net, lr=1e-3, weight_decay=0.1, beta2=0.95)
    (matrices,) = muon.param_groups
    assert len(matrices["params"]) == 4 * PRESETS["nano"].layers
    assert matrices["weight_decay"] == 0.1
    names = {id(p): name for name, p in net.named_parameters()}
    decayed, others = ([names[id(p)] for p in group["params"]] for group in adamw.param_groups)
    assert decayed == ["transformer.wte.weight", "transformer.wpe.weight"]
    assert all(name.endswith("bias") or "ln_" in name for name in others)
    owned = [p for each in (muon, adamw) for group in each.param_groups for p in group["params"]]
    assert sorted(map(id, owned)) == sorted(names)


@pytest.mark.parametrize("name", LOW_BIT)
def test_quantized_state_is_refused_over_shards(name: Any) -> None:
    with pytest.raises(UserError, match=f"--optimizer {name}: its quantized state cannot be gathered"):
        check_optimizer(name, "fsdp", CPU)


# Faster arithmetic


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")  # inductor's own
def test_compiled_model_learns_the_same(tiny: list[str], tmp_path: Path) -> None:
    for name, flags in (("plain", []), ("compiled", ["--compile"])):
        run([*tiny, *flags, "--out", str(tmp_path / name)])
    for name in ("metrics.jsonl", "validation.jsonl"):
        here, there = (read_metrics(tmp_path / way / name) for way in ("compiled", "plain"))
        assert [record.get("phase") for record in here] == [record.get("phase") for record in there]
        for key in ("loss", "entropy"):
            assert [record[key] for record in here] == pytest.approx([record[key] for record in there], rel=1e-3)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")  # inductor's own
def test_low_bit_optimizer_compiles_its_step(tiny: list[str], tmp_path: Path) -> None:
    run([*tiny, "--optimizer", "adamw8bit", "--out", str(tmp_path / "compiled")])
    with torch.compiler.set_stance("force_eager"):
        run([*tiny, "--optimizer", "adamw8bit", "--out", str(tmp_path / "eager")])
    here, there = ([r["loss"] for r in read_metrics(tmp_path / n / "metrics.jsonl")] for n in ("compiled", "eager"))
    assert here == pytest.approx(there, rel=1e-3)


def test_linear_layers_compute_what_conv1d_does() -> None:
    net, linear = model(), model()
    use_linear_layers(linear.get_submodule("transformer.h"))
    assert sum(isinstance(module, nn.Linear) for module in linear.modules()) == 4 * PRESETS["nano"].layers + 1
    losses = []
    for each in (net, linear):
        loss = token_loss(each, *tokens())
        loss.backward()  # type: ignore[no-untyped-call]
        losses.append(loss.item())
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)
    for (name, a), (other, b) in zip(net.named_parameters(), linear.named_parameters(), strict=True):
        assert name == other
        assert a.grad is not None
        assert b.grad is not None
        transposed = a.ndim == 2 and name.startswith("transformer.h.")
        torch.testing.assert_close(b.grad, a.grad.T if transposed else a.grad, rtol=1e-4, atol=1e-6)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")  # torchao's own
def test_float8_layers_learn_as_others_do() -> None:
    """On any device by emulation, which rounds as the tensor cores do."""
    losses = []
    for convert in (False, True):
        net = model()
        if convert:
            to_float8(net, emulate=True)
            names = {type(module).__name__ for module in net.get_submodule("transformer.h").modules()}
            assert "Float8Linear" in names
            assert not names & {"Conv1D", "Linear"}
        (optimizer,) = make_optimizers("adamw", net, lr=1e-3, weight_decay=0.1, beta2=0.95)
        losses.append([])
        for _ in range(10):
            loss = token_loss(net, *tokens())
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            optimizer.zero_grad()
            losses[-1].append(loss.item())
    assert losses[1] != losses[0]
    assert losses[1] == pytest.approx(losses[0], rel=0.02)
    assert losses[1][-1] < losses[1][0] - 0.2


def test_float8_is_refused_without_its_tensor_cores() -> None:
    with pytest.raises(UserError, match=r"--float8: needs a CUDA GPU .*found --device cpu; leave it out"):
        check_float8(CPU)
