"""Image classifier in the style of pytorch/examples: epochs over a DataLoader, evaluation after each, a checkpoint."""

import argparse
import gc
import time

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, Dataset

parser = argparse.ArgumentParser()
parser.add_argument("--fault", default="none")
parser.add_argument("--workers", type=int, default=0)
parser.add_argument("--epochs", type=int, default=3)
parser.add_argument("--batches", type=int, default=60)
options = parser.parse_args()


class Images(Dataset):
    def __init__(self, batches):
        self.labels = torch.arange(batches * 32) % 10

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, index):
        if options.fault == "decode":
            decode(index)
        elif options.fault == "read":
            read(index)

        return torch.rand(1, 28, 28), self.labels[index]


def decode(index):
    value = index
    for _ in range(6000):
        value = value * 31 % 65537
    return value


def read(index):
    time.sleep(0.002)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(1, 16, 3)
        self.conv2 = nn.Conv2d(16, 32, 3)
        self.fc = nn.Linear(32 * 25, 10)

    def forward(self, x):
        x = F.max_pool2d(F.relu(self.conv1(x)), 2)
        if options.fault == "forward":
            attend(x)

        x = F.max_pool2d(F.relu(self.conv2(x)), 2)
        return self.fc(x.flatten(1))


def attend(x):
    return [x.numpy(force=True).mean() for _ in range(1500)]


history = []


def update_metrics(loss):
    until = time.perf_counter() + 0.03
    while time.perf_counter() < until:
        sum(range(200))


def smooth_history(loss):
    history.append(loss.item())
    return [sum(history[:i]) for i in range(len(history))]


def log_images(step):
    if step % 25 == 24:
        time.sleep(0.6)


def train(model, loader, optimizer, epoch):
    model.train()
    for step, (data, target) in enumerate(loader):
        optimizer.zero_grad()
        loss = F.cross_entropy(model(data), target)
        loss.backward()
        optimizer.step()
        if options.fault == "metrics":
            update_metrics(loss)
        elif options.fault == "history":
            smooth_history(loss)
        elif options.fault == "periodic":
            log_images(step)
        elif options.fault == "gc":
            gc.collect()
        elif options.fault == "save" and step % 20 == 19:
            torch.save([torch.zeros(20_000_000)], "checkpoint.pt")


@torch.no_grad()
def evaluate(model, loader):
    model.eval()
    correct = 0
    for data, target in loader:
        correct += (model(data).argmax(1) == target).sum().item()
    return correct


if __name__ == "__main__":
    torch.manual_seed(0)
    if options.fault == "startup":
        vocabulary = {str(i): i for i in range(100_000)}
        until = time.time() + 8
        while time.time() < until:
            sorted(vocabulary)

    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    kwargs = {"num_workers": options.workers}
    training = DataLoader(Images(options.batches), batch_size=32, shuffle=True, **kwargs)
    held_out = DataLoader(
        Images(options.batches * (20 if options.fault == "evaluation" else 1) // 4), batch_size=32, **kwargs
    )
    for epoch in range(options.epochs):
        train(model, training, optimizer, epoch)
        evaluate(model, held_out)

    torch.save(model.state_dict(), "model.pt")
