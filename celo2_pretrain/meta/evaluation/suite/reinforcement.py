"""Reinforcement learning: PPO (arXiv 1707.06347) on classic control and on an Atari game's memory.

An optimizer step is one minibatch. Every EPOCHS · MINIBATCHES steps the policy plays HORIZON steps in each of ENVS
environments. The measure is the negative mean return per episode of the training games themselves, or for Atari (long
episodes) the negative score per 1,000 steps, over the last RECENT of the play.
"""

from __future__ import annotations

import functools

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from .models import ActorCritic
from .problem import Problem, Task

ENVS, HORIZON, EPOCHS, MINIBATCHES = 8, 64, 4, 4
GAMMA, LAMBDA, CLIP, ENTROPY, VALUE = 0.99, 0.95, 0.2, 0.01, 0.5
RECENT_EPISODES, RECENT_ROLLOUTS = 32, 16
GYM = (("gymnasium", "gymnasium"),)
ATARI = (*GYM, ("ale_py", "ale-py"))


def make_control(name: str):
    import gymnasium

    return gymnasium.make(name)


def make_atari(name: str):
    """The game's 128 bytes of memory as observation, 4 frames a step, no sticky actions."""
    import ale_py
    import gymnasium

    ale_py.ALEInterface.setLoggerMode(ale_py.LoggerMode.Error)
    gymnasium.register_envs(ale_py)
    return gymnasium.make(f"ALE/{name}-v5", obs_type="ram", frameskip=4, repeat_action_probability=0.0)


def scaled(reward: float) -> float:
    return 0.02 * reward


class Play:
    """Plays ENVS environments with the policy, and keeps what came out.

    `rollout` returns flat tensors over HORIZON · ENVS transitions: observations (n, size), actions, their log
    probabilities, advantages and returns (n,).
    """

    def __init__(self, make, model_of, reward_of, seed: int) -> None:
        self.environments = [make() for _ in range(ENVS)]
        self.observations = np.stack([env.reset(seed=seed * 1000 + k)[0] for k, env in enumerate(self.environments)])
        self.bytes = self.observations.dtype == np.uint8
        self.model = model_of(self.observations.shape[1], int(self.environments[0].action_space.n))
        self.reward_of = reward_of
        self.generator = torch.Generator().manual_seed(seed)
        self.running, self.episodes, self.scores = np.zeros(ENVS), [], []

    def tensor(self, observations: np.ndarray) -> Tensor:
        x = torch.from_numpy(observations.astype(np.float32))
        return x / 128 - 1 if self.bytes else x

    @torch.no_grad()
    def rollout(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        shape = (HORIZON, ENVS)
        seen, actions, logs = [], torch.zeros(shape, dtype=torch.long), torch.zeros(shape)
        values, rewards, alive, cut_values = (torch.zeros(shape) for _ in range(4))
        score = 0.0
        for t in range(HORIZON):
            x = self.tensor(self.observations)
            logits, values[t] = self.model(x)
            log = F.log_softmax(logits, -1)
            actions[t] = torch.multinomial(log.exp(), 1, generator=self.generator)[:, 0]
            logs[t] = log.gather(1, actions[t][:, None])[:, 0]
            seen.append(x)
            for k, env in enumerate(self.environments):
                observation, reward, ended, cut, _ = env.step(int(actions[t, k]))
                score += reward
                self.running[k] += reward
                rewards[t, k] = self.reward_of(reward)
                alive[t, k] = not (ended or cut)
                if cut and not ended:  # out of time, not out of the game: what would have followed counts
                    cut_values[t, k] = self.model(self.tensor(observation[None]))[1][0]
                if ended or cut:
                    self.episodes.append(self.running[k])
                    self.running[k] = 0.0
                    observation = env.reset()[0]
                self.observations[k] = observation
        self.scores.append(score / (HORIZON * ENVS))
        following = self.model(self.tensor(self.observations))[1]
        advantages, advantage = torch.zeros(shape), torch.zeros(ENVS)
        for t in reversed(range(HORIZON)):  # generalised advantage estimation
            error = rewards[t] + GAMMA * (following * alive[t] + cut_values[t]) - values[t]
            advantage = error + GAMMA * LAMBDA * alive[t] * advantage
            advantages[t], following = advantage, values[t]
        return torch.cat(seen), actions.flatten(), logs.flatten(), advantages.flatten(), (advantages + values).flatten()


def ppo(make, episodic: bool, width: int, seed: int) -> Problem:
    torch.manual_seed(seed)
    # Returns of order 1, or the value's gradient would leave none of the clipped norm to the policy.
    play = Play(make, functools.partial(ActorCritic, width=width), scaled if episodic else np.sign, seed)
    model, order = play.model, torch.Generator().manual_seed(seed)
    data: list = []  # the rollout, and the minibatches still to come of it

    def loss(step: int) -> Tensor:
        if step % (EPOCHS * MINIBATCHES) == 0:
            batches = [
                part for _ in range(EPOCHS) for part in torch.randperm(HORIZON * ENVS, generator=order).chunk(MINIBATCHES)
            ]
            data[:] = play.rollout(), batches
        rollout, batches = data
        seen, actions, old, advantages, returns = (x[batches[step % (EPOCHS * MINIBATCHES)]] for x in rollout)
        advantages = (advantages - advantages.mean()) / (advantages.std() + 1e-8)
        logits, values = model(seen)
        log = F.log_softmax(logits, -1)
        ratio = (log.gather(1, actions[:, None])[:, 0] - old).exp()
        policy = torch.minimum(ratio * advantages, ratio.clamp(1 - CLIP, 1 + CLIP) * advantages).mean()
        entropy = -(log.exp() * log).sum(1).mean()
        return VALUE * F.mse_loss(values, returns) - policy - ENTROPY * entropy

    def measure() -> float:
        if not episodic:
            return -1000.0 * float(np.mean(play.scores[-RECENT_ROLLOUTS:]))
        recent = play.episodes[-RECENT_EPISODES:]
        return -float(np.mean(recent)) if recent else -float(play.running.mean())

    return Problem(model, loss, measure)


def task(
    name: str, about: str, make, steps: int, unit: str, needs, span: float, episodic: bool, width: int, seconds: float
) -> Task:
    return Task(
        name,
        about,
        functools.partial(ppo, make, episodic, width),
        steps,
        unit,
        needs,
        lr_scale=0.3,
        span=span,
        seconds=seconds,
    )


TASKS = (
    task(
        "ppo-cartpole",
        "PPO on CartPole-v1",
        functools.partial(make_control, "CartPole-v1"),
        1200,
        "− mean return (−500 at best)",
        GYM,
        500.0,
        True,
        64,
        7,
    ),
    task(
        "ppo-acrobot",
        "PPO on Acrobot-v1",
        functools.partial(make_control, "Acrobot-v1"),
        1000,
        "− mean return (70 at best)",
        GYM,
        430.0,
        True,
        64,
        7,
    ),
    task(
        "ppo-atari",
        "PPO on Atari Krull from its 128 bytes of memory",
        functools.partial(make_atari, "Krull"),
        800,
        "− score per 1,000 steps",
        ATARI,
        2000.0,
        False,
        128,
        17,
    ),
)
