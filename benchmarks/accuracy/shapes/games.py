"""Reinforcement learning as public examples have it: REINFORCE, DQN, CleanRL's PPO; a game takes the time."""

import collections
import random
import sys
import time

import torch
import torch.nn.functional as F
from torch import nn

torch.manual_seed(0)
random.seed(0)


def net(inputs=64, hidden=512, outputs=10):
    return nn.Sequential(
        nn.Linear(inputs, hidden), nn.ReLU(), nn.Linear(hidden, hidden), nn.ReLU(), nn.Linear(hidden, outputs)
    )


class Game:
    """An environment; a step of it takes a while in Python."""

    def __init__(self, step_s):
        self.step_s, self.steps = step_s, 0

    def reset(self):
        self.steps = 0
        return torch.randn(64)

    def step(self, action):
        self.steps += 1
        self.simulate()
        return torch.randn(64), float(action), self.steps >= 60

    def simulate(self):
        until = time.perf_counter() + self.step_s
        while time.perf_counter() < until:
            pass


def reinforce(step_s=0.001):
    """pytorch/examples: an episode with gradients, then one update."""
    policy, game = net(64, 128, 2), Game(step_s)
    optimizer = torch.optim.Adam(policy.parameters(), 1e-2)
    for _ in range(60):
        state, done, saved, rewards = game.reset(), False, [], []
        while not done:
            distribution = torch.distributions.Categorical(logits=policy(state[None]))
            action = distribution.sample()
            saved.append(distribution.log_prob(action))
            state, reward, done = game.step(action.item())
            rewards.append(reward)
        optimizer.zero_grad()
        loss = torch.cat([-log * reward for log, reward in zip(saved, rewards, strict=True)]).sum()
        loss.backward()
        optimizer.step()


def dqn():
    """The DQN tutorial: a step of the game, then an update from the replay memory, with a target network."""
    policy, target, game = net(64, 256, 4), net(64, 256, 4), Game(0.005)
    target.load_state_dict(policy.state_dict())
    optimizer, memory = torch.optim.AdamW(policy.parameters(), 1e-4), collections.deque(maxlen=10_000)
    for _ in range(6):
        state, done = game.reset(), False
        while not done:
            with torch.no_grad():
                action = policy(state[None]).argmax(1)
            following, reward, done = game.step(action.item())
            memory.append((state, action, following, reward))
            state = following
            if len(memory) >= 64:
                learn(policy, target, optimizer, memory)
            for kept, new in zip(target.parameters(), policy.parameters(), strict=True):
                kept.data.lerp_(new.data, 0.005)


def learn(policy, target, optimizer, memory):
    states, actions, following, rewards = zip(*random.sample(memory, 64), strict=True)
    values = policy(torch.stack(states)).gather(1, torch.stack(actions))
    with torch.no_grad():
        expected = target(torch.stack(following)).max(1).values * 0.99 + torch.tensor(rewards)
    loss = F.smooth_l1_loss(values, expected[:, None])
    optimizer.zero_grad()
    loss.backward()
    nn.utils.clip_grad_value_(policy.parameters(), 100)
    optimizer.step()


class Agent(nn.Module):
    def __init__(self):
        super().__init__()
        self.critic, self.actor = net(64, 256, 1), net(64, 256, 4)

    def get_value(self, x):
        return self.critic(x)

    def get_action_and_value(self, x, action=None):
        chosen = torch.distributions.Categorical(logits=self.actor(x))
        action = chosen.sample() if action is None else action
        return action, chosen.log_prob(action), chosen.entropy(), self.critic(x)


def cleanrl_ppo():
    """CleanRL: the agent is never called, only its methods; rollouts in training mode without gradients."""
    agent, games = Agent(), [Game(0.001) for _ in range(4)]
    optimizer = torch.optim.Adam(agent.parameters(), 2.5e-4, eps=1e-5)
    state = torch.stack([game.reset() for game in games])
    for _ in range(10):
        states, actions, logs, rewards = [], [], [], []
        for _ in range(64):
            states.append(state)
            with torch.no_grad():
                action, log, _, _ = agent.get_action_and_value(state)
            actions.append(action)
            logs.append(log)
            played = [game.step(int(each)) for game, each in zip(games, action, strict=True)]
            state, reward = torch.stack([each[0] for each in played]), torch.tensor([each[1] for each in played])
            rewards.append(reward)
        with torch.no_grad():
            agent.get_value(state)
        b_states, b_actions, b_logs, b_rewards = (torch.cat(each) for each in (states, actions, logs, rewards))
        for _ in range(4):
            for part in torch.randperm(256).split(64):
                _, log, entropy, value = agent.get_action_and_value(b_states[part], b_actions[part])
                ratio = (log - b_logs[part]).exp()
                loss = -(b_rewards[part] * ratio).mean() - 0.01 * entropy.mean() + 0.5 * value.square().mean()
                optimizer.zero_grad()
                loss.backward()
                nn.utils.clip_grad_norm_(agent.parameters(), 0.5)
                optimizer.step()


if __name__ == "__main__":
    globals()[sys.argv[1]]()
