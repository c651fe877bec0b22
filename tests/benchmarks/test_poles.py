"""Reinforcement learning: advantages by definition, which steps count, what a network sees, and that PPO learns."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks.evidence.tasks import poles, trainability
from benchmarks.evidence.tasks.poles import DISCOUNT, HORIZON, POLES, TRACE, World, advantages
from benchmarks.evidence.tasks.trainability import Settings

SMALL = Settings(setting="poles", tasks=2, steps=24, batch=32, width=16, lr=1e-2)
FLOOR: dict[str, Any] = {"method": "penalty", "press": "floor", "objective": {"direction": "up", "target_share": 1.0}}


def data(s: Settings = SMALL) -> poles.Poles:
    """With a network that acts."""
    made = trainability.SETTINGS["poles"](s)
    assert isinstance(made, poles.Poles)
    torch.manual_seed(s.seed)
    made.begin(made.network())
    return made


def test_advantages_are_discounted_surprises_up_to_the_end_of_an_episode() -> None:
    steps = 12
    draws = torch.Generator().manual_seed(0)
    reward, values = torch.rand(steps, 5, generator=draws), torch.rand(steps + 1, 5, generator=draws)
    failed = torch.rand(steps, 5, generator=draws) < 0.2
    ended = failed | (torch.rand(steps, 5, generator=draws) < 0.2)
    found = advantages(reward, values, failed, ended)
    for pole in range(5):
        for first in range(steps):
            expected, share = 0.0, 1.0
            for step in range(first, steps):
                rest = 0.0 if failed[step, pole] else DISCOUNT * values[step + 1, pole].item()
                expected += share * (reward[step, pole].item() + rest - values[step, pole].item())
                if ended[step, pole]:
                    break
                share *= DISCOUNT * TRACE
            assert found[first, pole].item() == pytest.approx(expected, rel=1e-4, abs=1e-6)


def test_a_pole_that_stands_for_ever_is_worth_one() -> None:
    never = torch.zeros(6, 3, dtype=torch.bool)
    surprise = advantages(torch.full((6, 3), 1 - DISCOUNT), torch.ones(7, 3), never, never)
    torch.testing.assert_close(surprise, torch.zeros(6, 3))


def test_each_step_counts_but_those_between_two_episodes() -> None:
    """Poles that are always pushed one way fall in about ten steps."""
    world = World(data().wirings[0], 3)
    push = torch.zeros(POLES, dtype=torch.long)
    counted, failures, before = 0, 0, torch.zeros(POLES, dtype=torch.bool)
    for _ in range(40):
        counts = world.counts()
        assert (counts == ~before).all()
        counted += int(counts.sum())
        reward, failed, before = world.step(push)
        failures += int(failed.sum())
        assert ((reward > 0) == counts).all()
    assert 3 * POLES < failures < 5 * POLES
    assert 40 * POLES - counted == failures - int(before.sum())


def test_a_task_rewires_what_is_observed_and_done() -> None:
    made = data(replace(SMALL, tasks=20))
    assert {wiring.exchanged for wiring in made.wirings} == {True, False}
    for wiring in made.wirings[:4]:
        world = World(wiring, 5)
        start = world.poles.state.copy()
        world.step(torch.ones(POLES, dtype=torch.long))
        unwired = np.empty((POLES, 4))
        unwired[:, wiring.order] = world.observed.numpy() * wiring.signs
        np.testing.assert_allclose(unwired * poles.SCALE, world.poles.state.T, rtol=1e-5, atol=1e-6)
        speeds = world.poles.state[1] - start[1]  # one push to the right, or to the left
        assert (np.sign(speeds) == (-1 if wiring.exchanged else 1)).all()


def test_what_was_said_is_what_the_network_says_until_it_learns() -> None:
    made = data()
    x, y = made.batch(0)
    assert len(x) == SMALL.batch
    logits = made.model(x)[:, :2].log_softmax(-1)
    torch.testing.assert_close(logits.gather(1, y[:, :1].long())[:, 0], y[:, 1])
    pool_x, pool_y = made.pool
    assert len(pool_x) <= HORIZON * POLES
    assert pool_y[:, 2].mean().item() == pytest.approx(0, abs=1e-5)
    assert pool_y[:, 2].std().item() == pytest.approx(1, abs=1e-4)
    first = made.pool
    for _ in range(poles.UPDATES - 1):
        made.batch(0)
    assert made.pool is first
    made.batch(0)
    assert made.pool is not first


def test_the_loss_stops_pushing_an_action_that_has_become_likely_enough() -> None:
    made = data()
    x, y = made.batch(0)
    y = y.clone()
    y[:, 2], y[:, 1] = 1.0, y[:, 1] - 1.0  # every action is a gain, and e times as likely as when it was taken
    y[:, 3] = made.model(x)[:, 2].detach()
    made.loss(made.model, x, y).backward()
    parameters = list(made.model.parameters())
    pushed = [p.grad.clone() for p in parameters if p.grad is not None]
    for p in parameters:
        p.grad = None
    logits = made.model(x)[:, :2].log_softmax(-1)
    (poles.EXPLORATION * (logits.exp() * logits).sum(-1).mean()).backward()
    for p, found in zip(parameters, pushed, strict=True):
        assert p.grad is not None
        torch.testing.assert_close(found, p.grad, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("changes", [{}, {"fresh": True}, {**FLOOR, "weight": 1.0, "window": None}])
def test_the_seed_alone_decides(changes: dict[str, Any]) -> None:
    settings = replace(SMALL, **changes)
    once = trainability.train(settings)
    assert once == trainability.train(settings)
    assert {name: len(values) for name, values in once["curve"].items()} == {"return": 2, "rank": 2, "dormant": 2}
    assert once != trainability.train(replace(settings, seed=1))
    if changes:
        assert once["final"] != trainability.train(SMALL)["final"]


def test_a_policy_that_diverged_falls() -> None:
    found = trainability.train(replace(SMALL, lr=1e30, norm=False))
    assert found["final"]["return"] < 60
    assert found["curve"]["rank"][-1] == 1.0


def test_ppo_learns_to_balance() -> None:
    made = trainability.train(replace(SMALL, tasks=1, steps=160, batch=256, width=64, lr=3e-3))
    assert made["final"]["return"] > 3 * 25  # random pushes: 22 steps
