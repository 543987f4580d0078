"""Trainings whose memory grows, and some that only look so: each is a function."""

import os
import sys
from functools import cache

import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

torch.manual_seed(0)
torch.set_num_threads(1)
STEPS = 600
KEPT = 512 * 256  # numbers in 0.5 MB


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(256, 512), nn.ReLU(), nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 8))

    def forward(self, x):
        return self.layers(x)


class Trainer:
    def __init__(self):
        self.model = Net()
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=1e-3)
        self.outputs = []

    def step(self, x):
        self.optimizer.zero_grad()
        loss = self.model(x).pow(2).mean()
        loss.backward()
        self.optimizer.step()
        return loss.detach()

    def keep(self, x):
        self.outputs.append(x.clone())


def batches(count=STEPS, rows=512):
    for _ in range(count):
        yield torch.randn(rows, 256)


def losses():
    trainer, regular = Trainer(), []
    for x in batches():
        trainer.step(x)
        regular.append(trainer.model(x[:128]).abs().mean())  # holds the graph of its step


def running_sum():
    trainer, total = Trainer(), torch.zeros(())
    for x in batches():
        trainer.step(x)
        total = total + trainer.model(x[:128]).abs().mean()


def outputs():
    trainer = Trainer()
    for x in batches():
        trainer.step(x)
        trainer.keep(x)


def hook():
    trainer, activations = Trainer(), []

    def remember(module, inputs, output):
        activations.append(output.detach())

    trainer.model.layers[0].register_forward_hook(remember)
    for x in batches():
        trainer.step(x)


@cache
def load(number):
    return torch.randn(512, 256) * (1 + number % 2)


def cached():
    trainer = Trainer()
    for number in range(STEPS):
        trainer.step(load(number))


class Listing(Dataset):
    """Names of many files; a sample reads some of them, and so copies their pages into its worker."""

    def __init__(self):
        self.files = [f"/data/train/{number:08}/image.jpg" * 3 for number in range(5_000_000)]

    def __len__(self):
        return len(self.files) // 24

    def __getitem__(self, index):
        names = self.files[index * 24 : index * 24 + 24]
        return torch.full((256,), sum(map(len, names)) / 2000)  # near 1, or the loss is infinite


def listing():
    trainer = Trainer()
    for x in DataLoader(Listing(), 128, num_workers=1):
        for _ in range(5):
            trainer.step(x)


def evaluates():
    trainer = Trainer()
    for number, x in enumerate(batches()):
        trainer.step(x)
        if number % 60 == 59:
            with torch.no_grad():
                torch.cat([trainer.model(part).repeat(1, 64) for part in batches(20, 4096)]).sum()


def fills_a_cache():
    trainer, cache = Trainer(), {}
    data = torch.randn(12800, 256)
    for _ in range(STEPS // 100):
        for number, (x,) in enumerate(DataLoader(TensorDataset(data), 128)):
            trainer.step(cache.setdefault(number, x.repeat(4, 1)))


def batches_of_all_sizes():
    trainer = Trainer()
    for number in range(STEPS):
        trainer.step(torch.randn(64 + number * 37 % 900, 256))


def floats():
    trainer, history = Trainer(), []
    for x in batches():
        loss = trainer.step(x)
        history += [loss.item()]


def holds(parts):
    """Train beside a part of a data set as large as an eighth of the host's memory."""
    data = torch.ones(int(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") * parts / 8 / 4))
    trainer = Trainer()
    for x in batches(300):
        trainer.step(x + data[0])


def rank_0_holds_all():
    holds(1 if os.environ["RANK"] == "0" else 0.001)


def each_rank_holds_half():
    holds(0.5)


if __name__ == "__main__":
    globals()[sys.argv[1]]()
