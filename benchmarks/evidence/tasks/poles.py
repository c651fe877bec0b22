"""Reinforcement learning where the world is rewired: PPO balances gymnasium's cart poles.

A network maps what it observes to the logits of two actions and to a value. Observations change places and signs from
task to task, and actions may be exchanged. Proximal policy optimization is as in its paper (Schulman et al. 2017,
arXiv 1707.06347), its clipped loss and generalized advantages in their plainest form.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

if TYPE_CHECKING:
    from .trainability import MLP, Settings

OBSERVED, OUTPUTS = 4, 3
"""Position and angle with their velocities; two logits and a value."""
POLES, HORIZON, UPDATES = 64, 16, 8
"""Side by side; steps of each between two sets of minibatches; minibatches of a set."""
LONGEST = 300
"""Steps of an episode, and so the largest return."""
SCALE = np.array([1.0, 1.0, 0.1, 1.0])
"""By which observations are divided: angles in radians are small beside the rest."""
DISCOUNT, TRACE, CLIP = 0.99, 0.95, 0.2
EXPLORATION, VALUE = 0.01, 0.5
"""Parts of the policy's entropy and of the value's error in the loss."""


class Wiring(NamedTuple):
    """What is new in a task."""

    order: Any
    signs: Any
    exchanged: bool
    """Left is right."""


class Poles:
    """PPO's data, made by the network that is trained."""

    def __init__(self, s: Settings, build: Callable[[int, int], MLP]) -> None:
        self.s, self.build = s, build
        drawn = np.random.default_rng(s.seed + 1_000_003)
        self.wirings = [
            Wiring(drawn.permutation(OBSERVED), drawn.choice([-1.0, 1.0], OBSERVED), bool(drawn.integers(2)))
            for _ in range(s.tasks)
        ]
        self.draws = torch.Generator().manual_seed(s.seed + 1_000_003)
        self.task = -1
        self.due = 0

    def network(self) -> MLP:
        """With weights from torch's global generator."""
        return self.build(OBSERVED, OUTPUTS)

    def begin(self, model: nn.Module) -> None:
        """The network that acts."""
        self.model = model

    def batch(self, task: int) -> tuple[Tensor, Tensor]:
        """Observations; beside each the action, its log-probability, the advantage and the return."""
        if task != self.task:
            self.task, self.due = task, 0
            self.world = World(self.wirings[task], self.s.seed * self.s.tasks + task)
        if self.due == 0:
            self.pool, self.due = self._rollout(), UPDATES
        self.due -= 1
        rows = torch.randint(len(self.pool[0]), (self.s.batch,), generator=self.draws)
        return self.pool[0][rows], self.pool[1][rows]

    @torch.no_grad()
    def _rollout(self) -> tuple[Tensor, Tensor]:
        """What happens in HORIZON steps of all poles."""
        world, steps = self.world, []
        for _ in range(HORIZON):
            observed, counts = world.observed, world.counts()
            logits = self.model(observed)[:, :2].log_softmax(-1)
            actions = self._act(logits)
            reward, failed, ended = world.step(actions)
            said = logits.gather(1, actions[:, None])[:, 0]
            steps.append((observed, actions, said, reward, failed, ended, counts))
        observed, actions, said, reward, failed, ended, counts = map(torch.stack, zip(*steps, strict=True))
        values = self.model(torch.cat([observed, world.observed[None]]))[..., 2]
        gains = advantages(reward, values, failed, ended)
        returns = gains + values[:-1]
        gains = (gains - gains[counts].mean()) / (gains[counts].std() + 1e-8)
        return observed[counts], torch.stack([actions, said, gains, returns], -1)[counts]

    def _act(self, logits: Tensor) -> Tensor:
        """0 or 1, drawn; 0 from a network that has diverged."""
        chance = torch.rand(len(logits), generator=self.draws)
        return (chance < (logits[:, 1] - logits[:, 0]).sigmoid()).long()

    def loss(self, model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        """PPO's."""
        answers: Tensor = model(x)
        actions, before, gains, returns = y.unbind(-1)
        logits = answers[:, :2].log_softmax(-1)
        ratio = (logits.gather(1, actions.long()[:, None])[:, 0] - before).exp()
        gained = torch.minimum(ratio * gains, ratio.clamp(1 - CLIP, 1 + CLIP) * gains).mean()
        spread = -(logits.exp() * logits).sum(-1).mean()
        return -gained - EXPLORATION * spread + VALUE * F.mse_loss(answers[:, 2], returns)

    @torch.no_grad()
    def held_out(self, task: int) -> tuple[Tensor, Tensor]:
        """Of one episode of each of other poles: some of what was observed, and the returns."""
        world = World(self.wirings[task], self.s.seed * self.s.tasks + task + 1_000_003)
        going, returns, seen = torch.ones(POLES, dtype=torch.bool), torch.zeros(POLES), []
        while going.any():
            seen.append(world.observed[going])
            _, _, ended = world.step(self._act(self.model(world.observed)[:, :2]))
            returns += going
            going &= ~ended
        observed = torch.cat(seen)
        return observed[:: -(-len(observed) // 512)], returns

    def scores(self, answers: Tensor, y: Tensor) -> dict[str, float]:
        """The mean return."""
        return {"return": y.mean().item()}


class World:
    """Poles with one wiring. gymnasium begins an episode anew in the step behind its end, whose action is without
    effect: such a step does not count."""

    def __init__(self, wiring: Wiring, seed: int) -> None:
        from gymnasium.envs.classic_control.cartpole import CartPoleVectorEnv

        self.wiring = wiring
        self.poles = CartPoleVectorEnv(POLES, LONGEST)
        self.observed = self._wired(self.poles.reset(seed=seed)[0])

    def counts(self) -> Tensor:
        """Whether the next step of each pole counts."""
        return torch.from_numpy(~self.poles.prev_done)

    def step(self, actions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Rewards, whose discounted sum is 1 for a pole that stands for ever; which failed; whose episode ended."""
        chosen = (1 - actions if self.wiring.exchanged else actions).numpy()
        state, reward, failed, late, _ = self.poles.step(chosen)
        self.observed = self._wired(state)
        rewards = torch.from_numpy(reward).float() * (1 - DISCOUNT)
        return rewards, torch.from_numpy(failed), torch.from_numpy(failed | late)

    def _wired(self, state: Any) -> Tensor:
        return torch.from_numpy(((state / SCALE)[:, self.wiring.order] * self.wiring.signs).astype(np.float32))


def advantages(reward: Tensor, values: Tensor, failed: Tensor, ended: Tensor) -> Tensor:
    """Generalized advantages (Schulman et al. 2016, arXiv 1506.02438).

    Args:
        reward: (steps, poles), as ``failed`` and ``ended``.
        values: (steps + 1, poles). Where an episode ended without failure, the next one stands for the rest of it.
    """
    surprise = reward + DISCOUNT * values[1:] * ~failed - values[:-1]
    found = torch.zeros_like(surprise)
    later = torch.zeros_like(surprise[0])
    for step in reversed(range(len(surprise))):
        later = surprise[step] + DISCOUNT * TRACE * later * ~ended[step]
        found[step] = later
    return found
