"""Trainings of several parts: two loaders, two optimizers, averaged weights, tasks, and plots after the last step."""

import asyncio
import copy
import sys
import time

import torch
import torch.nn.functional as F
from small_net import net, rows
from torch.utils.data import DataLoader, Dataset

torch.manual_seed(0)


def train(model, optimizer, x, y):
    optimizer.zero_grad()
    loss = F.cross_entropy(model(x), y)
    loss.backward()
    optimizer.step()
    return loss


@torch.no_grad()
def accuracy(model, loader):
    model.eval()
    right = sum((model(x).argmax(1) == y).sum().item() for x, y, *_ in loader)
    model.train()
    return right / len(loader.dataset)


def loader_per_epoch():
    """A function makes the loader of each epoch, whose workers are asked to stay."""
    model, data = net(), rows(640)
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    for _ in range(8):
        for x, y in DataLoader(data, 32, shuffle=True, num_workers=2, persistent_workers=True):
            train(model, optimizer, x, y)


def adam_and_lbfgs():
    """Both optimizers are made first; the second one refines what the first one has found."""
    model, x = net(), torch.randn(1024, 64)
    y = torch.randint(10, (1024,))
    adam = torch.optim.Adam(model.parameters(), 1e-3)
    lbfgs = torch.optim.LBFGS(model.parameters(), max_iter=8, line_search_fn="strong_wolfe")
    for _ in range(200):
        train(model, adam, x[:256], y[:256])

    def closure():
        lbfgs.zero_grad()
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        return loss

    for _ in range(20):
        lbfgs.step(closure)


def awaits_batches():
    """Batches come from a task that waits for a server."""

    async def fetch(queue):
        for _ in range(150):
            await asyncio.sleep(0.03)
            await queue.put((torch.randn(32, 64), torch.randint(10, (32,))))

    async def train(queue):
        model = net()
        optimizer = torch.optim.SGD(model.parameters(), 0.01)
        for _ in range(150):
            x, y = await queue.get()
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()

    async def both():
        queue = asyncio.Queue(4)
        await asyncio.gather(fetch(queue), train(queue))

    asyncio.run(both())


class Views(Dataset):
    """Several noisy views of a sample, read from a slow disk."""

    def __init__(self, count, views, read_s=0.0):
        self.x, self.y = torch.randn(count, 64), torch.randint(10, (count,))
        self.views, self.read_s = views, read_s

    def __len__(self):
        return len(self.x)

    def __getitem__(self, index):
        time.sleep(self.read_s)
        return [self.x[index] + 0.1 * torch.randn(64) for _ in range(self.views)], self.y[index]


def _next(iterators, loader):
    try:
        return next(iterators[loader])
    except (KeyError, StopIteration):
        iterators[loader] = iter(loader)
        return next(iterators[loader])


def pseudo_labels(rounds=4, steps=60, read_s=0.0, workers=0):
    """FixMatch: labels of weak views train strong ones where the model is sure; evaluated after each round."""
    labeled = DataLoader(rows(640), 32, shuffle=True, drop_last=True)
    unlabeled = DataLoader(Views(1600, 2, read_s), 32, shuffle=True, drop_last=True, num_workers=workers)
    tested, iterators = DataLoader(rows(960), 64), {}
    model = net()
    average = copy.deepcopy(model)
    optimizer = torch.optim.SGD(model.parameters(), 0.03, momentum=0.9, nesterov=True)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, rounds * steps)
    for _ in range(rounds):
        for _ in range(steps):
            x, y = _next(iterators, labeled)
            (weak, strong), _ = _next(iterators, unlabeled)
            known, guessed, trained = model(torch.cat([x, weak, strong])).split([len(x), len(weak), len(strong)])
            sure, label = guessed.detach().softmax(-1).max(-1)
            loss = F.cross_entropy(known, y)
            loss = loss + (F.cross_entropy(trained, label, reduction="none") * (sure > 0.9)).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            with torch.no_grad():
                for kept, new in zip(average.parameters(), model.parameters(), strict=True):
                    kept.lerp_(new, 0.01)
        print(f"accuracy {accuracy(model, tested):.3f}, of averages {accuracy(average, tested):.3f}")


def pseudo_labels_wait():
    """One worker reads the data without labels from a slow disk."""
    pseudo_labels(4, 40, read_s=0.001, workers=1)


def evaluates_averages():
    """The average of the weights is evaluated after each epoch, by itself and as its inner module."""
    model, data, tested = net(hidden=1280), rows(1920), DataLoader(rows(640), 64)
    average = torch.optim.swa_utils.AveragedModel(model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.99))
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    for _ in range(4):
        for x, y in DataLoader(data, 32, shuffle=True):
            train(model, optimizer, x, y)
            average.update_parameters(model)
        print(accuracy(average, tested), accuracy(average.module, tested))


def plots_at_the_end():
    """After the last evaluation the script draws figures for a while."""
    model, data, tested = net(hidden=1280), DataLoader(rows(1600), 32, shuffle=True), DataLoader(rows(320), 64)
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    for _ in range(4):
        for x, y in data:
            train(model, optimizer, x, y)
        print(accuracy(model, tested))
    began = time.monotonic()
    while time.monotonic() < began + 6:
        torch.histc(torch.randn(100_000), 100)


def trials():
    """Each trial of a search loads its data anew; the trials are of equal length."""

    def load():
        time.sleep(0.8)
        return rows(1280)

    for lr in (0.1, 0.03, 0.01, 0.003, 0.001, 0.0003):
        data = load()
        model = net()
        optimizer = torch.optim.Adam(model.parameters(), lr)
        for x, y in DataLoader(data, 32, shuffle=True):
            train(model, optimizer, x, y)


if __name__ == "__main__":
    globals()[sys.argv[1]]()
