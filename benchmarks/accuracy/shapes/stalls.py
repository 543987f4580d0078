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


class Deep(nn.Module):
    """Many different layers, which take long to compile."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(256, 256) for _ in range(150))

    def forward(self, x):
        for i, layer in enumerate(self.layers):
            x = torch.tanh(layer(x) * (1 + i / 100) + x.mean(dim=-1, keepdim=True))

        return x


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(256, 512), nn.ReLU(), nn.Linear(512, 10))

        self.name = "first"

    def forward(self, x):
        return self.layers(x) * len(self.name)


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
        elif how == "drops":
            make_and_drop(step)


def loss_of(model, x, step):
    if how == "names":
        net.name = f"step {step}"
    elif how in ("sizes", "sizes_dynamic"):
        x = x[: 128 - step % 60]
    elif how == "last_batch" and step % 20 == 19:
        x = x[:50]

    return model(x).square().mean()


def compiled(model):
    return torch.compile(model, backend="aot_eager", dynamic=False if how == "sizes" else None)


if __name__ == "__main__":
    torch.manual_seed(0)
    held = many_objects() if how.startswith(("collects", "remembers")) else None
    replay = deque(maxlen=400_000)
    net = Deep() if how == "deep" else Net()
    sgd = torch.optim.SGD(net.parameters(), lr=0.01)
    if how == "remembers_frozen":
        gc.collect()
        gc.freeze()
        gc.disable()

    compiles = how in ("names", "sizes", "sizes_dynamic", "last_batch", "deep")
    train(compiled(net) if compiles else net, sgd, loss_of)
