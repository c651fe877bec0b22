"""Wrapped against bare: the same numbers, bit for bit, wherever the wrapper promises them."""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torchao.optim
from torch import Tensor, nn
from torch.optim import Optimizer
from torchao.optim import CPUOffloadOptimizer  # needs an accelerator to be made at all

from gapt_optim import (
    EntropyConfig,
    GAPTConfig,
    GAPTOptimizer,
    GateConfig,
    LayerConfig,
    ObjectiveConfig,
    matrix_entropy,
)

from .loops import (
    COMPRESSING,
    Net,
    adamw,
    assert_same,
    gradients,
    loss_of,
    make_net,
    pair,
    run,
    sgd,
    weights,
    without_ours,
    wrap,
)

STEPS = 20


def every(module: Any) -> list[type[Optimizer]]:
    """All optimizer classes that a module offers."""
    found = [value for name, value in vars(module).items() if inspect.isclass(value) and not name.startswith("_")]
    return [c for c in found if issubclass(c, Optimizer) and c not in (Optimizer, CPUOffloadOptimizer)]


def base_of(kind: type[Optimizer]) -> Callable[[nn.Module], Optimizer]:
    def make(model: nn.Module) -> Optimizer:
        parameters = list(model.parameters())
        if kind is torch.optim.SparseAdam:
            parameters = parameters[:1]  # the embedding, the others have dense gradients
        options: dict[str, Any] = {"lr": 0.01}
        if kind is torch.optim.LBFGS:
            options["max_iter"] = 3
        return kind(parameters, **options)

    return make


def take_step(model: nn.Module, optimizer: Optimizer, i: int) -> Any:
    """One step with a closure where the optimizer needs one, otherwise without; zero_grad as usual."""
    base = optimizer.base if isinstance(optimizer, GAPTOptimizer) else optimizer

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = loss_of(model, i)
        if isinstance(optimizer, GAPTOptimizer):
            optimizer.backward(loss)
        else:
            loss.backward()
        return loss

    if isinstance(base, torch.optim.LBFGS):
        return optimizer.step(closure)
    closure()
    return optimizer.step()


@pytest.mark.parametrize("kind", [*every(torch.optim), *every(torchao.optim)], ids=lambda kind: kind.__name__)
def test_memorization_is_the_bare_optimizer(kind: type[Optimizer]) -> None:
    """Parameters, state and what ``step`` returns, at every step; the base's state holds nothing of ours."""
    # 64 features give torchao matrices that are large enough to quantize.
    torchao_s = kind.__module__.startswith("torchao")
    net = {"features": 64 if torchao_s else 6, "sparse": kind is torch.optim.SparseAdam}
    (bare_model, bare), (model, optimizer) = pair(base_of(kind), GAPTConfig(gate=GateConfig(frozen=True)), **net)
    with torch.compiler.set_stance("force_eager"):
        for i in range(STEPS):
            assert_same(take_step(model, optimizer, i), take_step(bare_model, bare, i))
            assert_same(weights(model), weights(bare_model))
    assert optimizer.metrics is not None
    assert optimizer.metrics.step == STEPS
    start = make_net(**net).state_dict()
    assert any(not torch.equal(value, start[name]) for name, value in model.state_dict().items())
    assert [state.keys() for state in optimizer.base.state.values()] == [state.keys() for state in bare.state.values()]
    ours, theirs = optimizer.base.state_dict(), bare.state_dict()
    assert_same(without_ours(ours)["param_groups"], theirs["param_groups"])
    if not torchao_s:  # tensor subclasses there; the parameters' path above holds them
        assert_same(ours["state"], theirs["state"])


def test_every_optimizer_is_really_found() -> None:
    assert len(every(torch.optim)) >= 14
    assert "AdamW8bit" in {kind.__name__ for kind in every(torchao.optim)}


@pytest.mark.parametrize("activation", [True, False])
@pytest.mark.parametrize(
    "entropy", [EntropyConfig(), EntropyConfig(alpha=1.0, window=None), EntropyConfig(normalize=True, window=3)]
)
def test_memorization_does_not_depend_on_what_is_measured(entropy: EntropyConfig, activation: bool) -> None:
    config = GAPTConfig(
        entropy=entropy,
        gate=GateConfig(frozen=True),
        alignment={"every": int(activation)},
        layers=LayerConfig(schedule="rotate"),
    )
    (bare_model, bare), (model, optimizer) = pair(adamw, config)
    run(bare_model, bare, range(STEPS))
    run(model, optimizer, range(STEPS))
    assert_same(weights(model), weights(bare_model))


def test_compression_is_not_the_bare_optimizer() -> None:
    """So that the comparisons above can fail."""
    (bare_model, bare), (model, optimizer) = pair(adamw, COMPRESSING)
    run(bare_model, bare, range(1))
    run(model, optimizer, range(1))
    assert not torch.equal(model.layers[0][0].weight, bare_model.layers[0][0].weight)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_value_in_memorization_is_the_loss_to_the_bit(dtype: torch.dtype) -> None:
    model = make_net().to(dtype)
    optimizer = wrap(model)
    for i in range(5):
        loss = loss_of(model, i) / 3
        total = optimizer.objective(loss)
        assert total.dtype == dtype
        assert total.shape == loss.shape
        assert torch.equal(total, loss)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_models(dtype: torch.dtype) -> None:
    def build() -> Net:
        return make_net().to(dtype)

    bare_model, model, compressed = build(), build(), build()
    run(bare_model, sgd(bare_model), range(5))
    run(model, wrap(model, sgd), range(5))
    assert_same(weights(model), weights(bare_model))
    metrics = run(compressed, wrap(compressed, sgd, COMPRESSING), range(5))
    assert all(p.dtype == dtype and p.isfinite().all() for p in compressed.parameters())
    assert not torch.equal(compressed.head.weight, model.head.weight)
    assert metrics[-1]["nonfinite_steps"] == 0


# Frozen parameters, gradients that are None, groups


def test_frozen_parameters_and_missing_gradients() -> None:
    (bare_model, bare), (model, optimizer) = pair(adamw)
    for one in (bare_model, model):
        one.layers[1].requires_grad_(False)
        one.register_parameter("unused", nn.Parameter(torch.ones(3)))
    bare.add_param_group({"params": [bare_model.unused], "lr": 0.5})
    optimizer.add_param_group({"params": [model.unused], "lr": 0.5})
    run(bare_model, bare, range(5))
    run(model, optimizer, range(5))
    assert_same(weights(model), weights(bare_model))
    assert_same(without_ours(optimizer.base.state_dict()), bare.state_dict())
    assert model.unused.grad is None


@pytest.mark.parametrize("frozen_below", [False, True])
def test_all_layers_below_the_taps_may_be_frozen(frozen_below: bool) -> None:
    model = make_net()
    model.embedding.requires_grad_(False)
    if frozen_below:
        model.layers.requires_grad_(False)
    optimizer = wrap(model, lambda m: torch.optim.SGD([p for p in m.parameters() if p.requires_grad], lr=0.1))
    (metrics,) = run(model, optimizer, range(1))
    assert metrics is not None
    assert metrics["entropy"] > 0


@pytest.mark.parametrize("set_to_none", [True, False])
def test_zero_grad(set_to_none: bool) -> None:
    (bare_model, bare), (model, optimizer) = pair(adamw)
    loss_of(bare_model, 0).backward()
    optimizer.backward(loss_of(model, 0))
    assert_same(gradients(model), gradients(bare_model))
    bare.zero_grad(set_to_none)
    optimizer.zero_grad(set_to_none)
    assert_same(gradients(model), gradients(bare_model))


def test_added_group_is_trained_alike() -> None:
    def without_head(model: nn.Module) -> Optimizer:
        return torch.optim.AdamW([p for name, p in model.named_parameters() if "head" not in name], lr=0.01)

    (bare_model, bare), (model, optimizer) = pair(without_head)
    run(bare_model, bare, range(3))
    run(model, optimizer, range(3))
    bare.add_param_group({"params": bare_model.head.parameters(), "lr": 0.1})
    optimizer.add_param_group({"params": model.head.parameters(), "lr": 0.1})
    run(bare_model, bare, range(3, 6))
    run(model, optimizer, range(3, 6))
    assert_same(weights(model), weights(bare_model))
    assert len(optimizer.param_groups) == 2


# Accumulation


@pytest.mark.parametrize("scales", [[0.25] * 4, [1.0, 1.0, 1.0], [0.7, 0.1, 0.2]])
@pytest.mark.parametrize("config", [GAPTConfig(), COMPRESSING], ids=["memorization", "compression"])
def test_accumulated_gradients_are_the_sum_over_micro_batches(config: GAPTConfig, scales: list[float]) -> None:
    expected: dict[str, Tensor] = {}
    for i, scale in enumerate(scales):
        single = make_net().double()
        optimizer = wrap(single, config=config)
        optimizer.backward(loss_of(single, i), scale=scale)
        for name, p in single.named_parameters():
            assert p.grad is not None
            expected[name] = expected.get(name, 0) + p.grad

    model = make_net().double()
    optimizer = wrap(model, config=config)
    for i, scale in enumerate(scales):
        optimizer.backward(loss_of(model, i), scale=torch.tensor(scale, dtype=torch.float64))
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.grad, expected[name], rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize(
    "sections", [{}, {"layers": LayerConfig(reduce="largest_drop")}, {"layers": LayerConfig(skip_first=1)}]
)
def test_compression_differentiates_loss_plus_weighted_entropy(sections: dict[str, Any]) -> None:
    """Three layers, so that their shares are no binary fractions."""
    config = GAPTConfig(gate=COMPRESSING.gate, objective=ObjectiveConfig(weight=0.3), **sections)
    model, plain = make_net().double(), make_net().double()
    optimizer = wrap(model, config=config)
    loss = loss_of(model, 0)
    total = optimizer.objective(loss)
    total.backward()

    outputs: list[Tensor] = []
    for layer in plain.layers:
        layer.register_forward_hook(lambda module, args, output: outputs.append(output))
    plain_loss = loss_of(plain, 0)
    # Of 10 tokens in windows of 8, the last two have no entropy about their mean.
    entropies = [matrix_entropy(h[:, :8]).mean() for h in outputs]
    if config.layers.reduce == "largest_drop":
        falls = [float((before - after).detach()) for before, after in itertools.pairwise(entropies)]
        entropy = entropies[1 + falls.index(max(falls))]
    else:
        entropy = torch.stack(entropies[config.layers.skip_first :]).mean()
    expected = plain_loss + 0.3 * entropy
    expected.backward()
    torch.testing.assert_close(total, expected, rtol=1e-12, atol=0)
    for (name, p), q in zip(model.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-10, atol=1e-14, msg=lambda text, name=name: f"{name} {text}")


def test_metrics_are_the_mean_over_micro_batches() -> None:
    model = make_net()
    optimizer = wrap(model, lambda m: torch.optim.SGD(m.parameters(), lr=0.0))
    singles = run(model, optimizer, range(3))
    for i, scale in enumerate((0.7, 0.1, 0.2)):
        optimizer.backward(loss_of(model, i), scale=scale)
    optimizer.step()
    metrics = optimizer.metrics
    assert metrics is not None
    assert metrics.step == 4
    assert metrics.loss == pytest.approx(sum(m["loss"] for m in singles) / 3, rel=1e-6)
    assert metrics.entropy == pytest.approx(sum(m["entropy"] for m in singles) / 3, rel=1e-6)
    for name, value in metrics.layer_entropy.items():
        assert value == pytest.approx(sum(m["layer_entropy"][name] for m in singles) / 3, rel=1e-6)


def test_gate_moves_once_a_step_on_the_means() -> None:
    from gapt_optim import PhaseGate

    gate_config = GateConfig(patience_memorization=2, patience_compression=2, min_improvement=0.5, smoothing=0.5)
    gate = PhaseGate(gate_config)
    model = make_net()
    optimizer = wrap(model, config=GAPTConfig(gate=gate_config))
    for step in range(12):
        for micro in range(3):
            optimizer.backward(loss_of(model, 3 * step + micro), scale=1 / 3)
        optimizer.step()
        optimizer.zero_grad()
        metrics = optimizer.metrics
        assert metrics is not None
        assert metrics.step == step + 1
        assert metrics.loss is not None
        assert metrics.entropy is not None
        assert gate.update(metrics.loss, metrics.entropy) is optimizer.phase
        assert gate.reason == metrics.reason
    assert gate.switches == metrics.switches > 2


# GradScaler

SCALED_BASES: dict[str, Callable[[nn.Module], Any]] = {
    f"{kind.__name__}{' fused' if fused else ''}": lambda m, kind=kind, fused=fused: kind(
        m.parameters(), lr=0.01, fused=fused
    )
    for kind in (torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW, torch.optim.Adagrad)
    for fused in (False, True)
}


def scaled_loop(
    model: nn.Module, optimizer: Optimizer, *, unscale: bool, overflow: set[int], steps: int = 10
) -> tuple[list[float], list[dict[str, Tensor]]]:
    """Scales and weights after each step; gradients are infinite at the steps in ``overflow``."""
    scaler = torch.amp.GradScaler("cpu", init_scale=256.0, growth_interval=3)
    scales, path = [], []
    for i in range(steps):
        loss = loss_of(model, i)
        total = optimizer.objective(loss) if isinstance(optimizer, GAPTOptimizer) else loss
        scaler.scale(total).backward()
        if i in overflow:
            parameter = next(p for p in model.parameters() if p.grad is not None)
            assert parameter.grad is not None
            parameter.grad.view(-1)[0] = torch.inf
        if unscale:
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        scales.append(scaler.get_scale())
        path.append(weights(model))
    return scales, path


@pytest.mark.parametrize("unscale", [False, True])
@pytest.mark.parametrize("base", SCALED_BASES.values(), ids=SCALED_BASES)
def test_grad_scaler_sees_the_bare_optimizer(base: Any, unscale: bool) -> None:
    (bare_model, bare), (model, optimizer) = pair(base)
    assert optimizer._step_supports_amp_scaling is getattr(bare, "_step_supports_amp_scaling", False)
    expected = scaled_loop(bare_model, bare, unscale=unscale, overflow={0, 4, 5})
    assert_same(scaled_loop(model, optimizer, unscale=unscale, overflow={0, 4, 5}), expected)
    assert not hasattr(optimizer, "grad_scale")
    assert not hasattr(optimizer.base, "grad_scale")
    assert not hasattr(optimizer.base, "found_inf")


@pytest.mark.parametrize("fused", [(False, False), (True, True), (True, False)])
def test_grad_scaler_with_several_bases(fused: tuple[bool, bool]) -> None:
    """Two optimizers are one with two groups."""

    def parts(model: nn.Module) -> list[list[nn.Parameter]]:
        return [list(model.layers.parameters()), [*model.embedding.parameters(), *model.head.parameters()]]

    bare_model, model = make_net(), make_net()
    groups = [{"params": part, "fused": one} for part, one in zip(parts(bare_model), fused, strict=True)]
    bare = torch.optim.AdamW(groups, lr=0.01, fused=all(fused))
    bases = [torch.optim.AdamW(part, lr=0.01, fused=one) for part, one in zip(parts(model), fused, strict=True)]
    optimizer = wrap(model, lambda _: bases)
    expected = scaled_loop(bare_model, bare, unscale=False, overflow={0, 4})
    assert_same(scaled_loop(model, optimizer, unscale=False, overflow={0, 4}), expected)


@pytest.mark.parametrize("base", SCALED_BASES.values(), ids=SCALED_BASES)
def test_skipped_step_leaves_no_trace(base: Any) -> None:
    """No counter moves, no silent step is counted, and the next step reports itself alone."""
    gate = GateConfig(patience_memorization=3, patience_compression=3, min_improvement=0.5)
    seen: list[Any] = []
    model = make_net()
    optimizer = wrap(model, base, GAPTConfig(gate=gate), observers=[seen.append])
    skipped = set(range(2, 14))
    scaled_loop(model, optimizer, unscale=False, overflow=skipped, steps=16)
    assert [m.step for m in seen] == [1, 2, 3, 4]

    clean = make_net()
    reference: list[Any] = []
    other = wrap(clean, base, GAPTConfig(gate=gate), observers=[reference.append])
    run(clean, other, range(2))
    run(clean, other, range(14, 16))
    assert [m.loss for m in seen] == pytest.approx([m.loss for m in reference], rel=1e-5)
    assert [m.phase for m in seen] == [m.phase for m in reference]


@pytest.mark.parametrize("set_to_none", [True, False])
@pytest.mark.parametrize("skipped", [True, False])
def test_zeroed_gradients_are_those_of_a_skipped_step_or_of_a_loop_that_zeroes_late(
    skipped: bool, set_to_none: bool
) -> None:
    """A loss is forgotten where its gradients were zeroed, and kept where its backward comes after."""
    model = make_net()
    optimizer = wrap(model, sgd)
    run(model, optimizer, range(1))
    first = optimizer.objective(loss_of(model, 1))
    if skipped:
        first.backward()
    optimizer.zero_grad(set_to_none=set_to_none)
    if not skipped:
        first.backward()
    optimizer.backward(loss_of(model, 2))
    losses = [float(loss_of(model, i).detach()) for i in (1, 2)]
    optimizer.step()
    assert optimizer.metrics is not None
    assert optimizer.metrics.loss == pytest.approx(losses[1] if skipped else sum(losses) / 2, rel=1e-5)


def test_validation_loss_survives_a_skipped_step() -> None:
    for base in SCALED_BASES.values():
        model = make_net()
        optimizer = wrap(model, base, GAPTConfig(gate=GateConfig(signal="validation")))
        optimizer.record_validation(2.5)
        scaled_loop(model, optimizer, unscale=False, overflow={0}, steps=2)
        assert optimizer.metrics is not None
        assert optimizer.metrics.validation_loss == 2.5
