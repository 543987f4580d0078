"""Trainings that stand still: garbage collections, compilations, checkpoints, and look-alikes without a fault."""

import argparse
import gc
from collections import deque

import torch
from torch import nn

parser = argparse.ArgumentParser()
parser.add_argument("how")
parser.add_argument("--steps", type=int, default=200)
options = parser.parse_args()
how = options.how


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(256, 512), nn.ReLU(), nn.Linear(512, 10))

    def forward(self, x):
        return self.layers(x)


def many_objects():
    return [{"id": i, "tokens": [i, i + 1]} for i in range(600_000)]


def collect():
    gc.collect()


def remember(step):
    for i in range(8_000):
        replay.append({"step": step, "index": i, "reward": [i]})


def make_and_drop(step):
    return [{"step": step, "index": i} for i in range(3_000)]


def train(model, optimizer, loss_of):
    for step in range(options.steps):
        optimizer.zero_grad()
        loss_of(model, torch.randn(128, 256), step).backward()
        optimizer.step()
        if how == "collects":
            collect()
        elif how in ("remembers", "remembers_frozen"):
            remember(step)
            if how == "remembers_frozen" and step % 100 == 99:
                gc.collect()
        elif how == "tidies" and step % 25 == 24:
            collect()
        elif how == "drops":
            make_and_drop(step)


if __name__ == "__main__":
    torch.manual_seed(0)
    held = many_objects() if how.startswith(("collects", "remembers")) else None
    replay = deque(maxlen=400_000)
    net = Net()
    sgd = torch.optim.SGD(net.parameters(), lr=0.01)
    if how == "remembers_frozen":
        gc.collect()
        gc.freeze()
        gc.disable()

    train(net, sgd, lambda model, x, _step: model(x).square().mean())
