"""Training loops as libraries write them: torchvision's references, timm, PyTorch Geometric, fastai.

Each function has the structure of its model: who iterates, who calls whom, what wraps the loader and the optimizer.
"""

import collections
import random
import sys
import time

import torch
import torch.nn.functional as F
from small_net import net, rows
from torch import nn
from torch.utils.data import DataLoader, Dataset

torch.manual_seed(0)
random.seed(0)


# torchvision's references: a generator around the loader prints smoothed meters; an engine trains and evaluates.


class SmoothedValue:
    def __init__(self, window=20):
        self.deque = collections.deque(maxlen=window)
        self.total, self.count = 0.0, 0

    def update(self, value, n=1):
        self.deque.append(value)
        self.count += n
        self.total += value * n

    @property
    def median(self):
        return torch.tensor(list(self.deque)).median().item()


class MetricLogger:
    def __init__(self):
        self.meters = collections.defaultdict(SmoothedValue)

    def update(self, **values):
        for name, value in values.items():
            self.meters[name].update(value.item() if isinstance(value, torch.Tensor) else value)

    def log_every(self, iterable, every, header):
        end = time.time()
        for i, batch in enumerate(iterable):
            self.meters["data"].update(time.time() - end)
            yield batch
            self.meters["time"].update(time.time() - end)
            if i % every == 0:
                print(header, i, {name: round(meter.median, 4) for name, meter in self.meters.items()})
            end = time.time()


def accuracy(output, target, topk=(1,)):
    _, predicted = output.topk(max(topk), 1)
    correct = predicted.t().eq(target[None])
    return [correct[:k].flatten().sum(dtype=torch.float32) * (100.0 / len(target)) for k in topk]


def train_one_epoch(model, criterion, optimizer, loader, epoch):
    model.train()
    metrics = MetricLogger()
    warmup = torch.optim.lr_scheduler.LinearLR(optimizer, 0.1, total_iters=20) if epoch == 0 else None
    for image, target in metrics.log_every(loader, 20, f"epoch {epoch}"):
        output = model(image)
        loss = criterion(output, target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if warmup is not None:
            warmup.step()
        acc1, acc5 = accuracy(output, target, topk=(1, 5))
        metrics.update(loss=loss, lr=optimizer.param_groups[0]["lr"], acc1=acc1, acc5=acc5)


@torch.inference_mode()
def evaluate(model, criterion, loader):
    model.eval()
    metrics = MetricLogger()
    for image, target in metrics.log_every(loader, 20, "test"):
        output = model(image)
        metrics.update(loss=criterion(output, target), acc1=accuracy(output, target)[0])


def references():
    model, criterion = net(64, 1024), nn.CrossEntropyLoss(label_smoothing=0.1)
    optimizer = torch.optim.SGD(model.parameters(), 0.01, momentum=0.9)
    training, held_out = DataLoader(rows(1920), 16, shuffle=True), DataLoader(rows(480), 16)
    for epoch in range(3):
        train_one_epoch(model, criterion, optimizer, training, epoch)
        evaluate(model, criterion, held_out)
        torch.save({"model": model.state_dict(), "epoch": epoch}, "checkpoint.pth")


# timm: a prefetcher around the loader, mixup, a scaler object that does backward and step, an averaged model.


class PrefetchLoader:
    """Normalizes the next batch while the model computes the last one (on CUDA: on a side stream)."""

    def __init__(self, loader):
        self.loader = loader

    def __len__(self):
        return len(self.loader)

    def __iter__(self):
        first, batch = True, None
        for following in self.loader:
            following = (following[0].sub(0.1).div(0.9), following[1])
            if not first:
                yield batch
            first, batch = False, following
        yield batch


class NativeScaler:
    def __init__(self):
        self._scaler = torch.amp.GradScaler("cpu")

    def __call__(self, loss, optimizer, clip_grad=None, parameters=None, need_update=True):
        self._scaler.scale(loss).backward()
        if need_update:
            self._scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(parameters, clip_grad)
            self._scaler.step(optimizer)
            self._scaler.update()


def mixup(x, target):
    mixed = F.one_hot(target, 10).float()
    return x.mul(0.8).add_(x.flip(0), alpha=0.2), mixed.mul(0.8).add_(mixed.flip(0), alpha=0.2)


def prefetcher():
    model = net(64, 1024)
    averaged = torch.optim.swa_utils.AveragedModel(model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn())
    optimizer, scaler = torch.optim.AdamW(model.parameters(), 1e-3), NativeScaler()
    loader = PrefetchLoader(DataLoader(rows(), 16, shuffle=True, drop_last=True))
    for _ in range(2):
        model.train()
        for i, (x, target) in enumerate(loader):
            x, target = mixup(x, target)
            with torch.autocast("cpu", torch.bfloat16):
                loss = torch.sum(-target * F.log_softmax(model(x).float(), -1), -1).mean() / 2
            needs = i % 2 == 1
            scaler(loss, optimizer, clip_grad=1.0, parameters=model.parameters(), need_update=needs)
            if needs:
                averaged.update_parameters(model)
                optimizer.zero_grad()


# PyTorch Geometric: a loader with its own collater makes one large graph of many of different sizes.


class Graph:
    def __init__(self, x, edges, y, batch=None):
        self.x, self.edges, self.y, self.batch = x, edges, y, batch

    def to(self, device):
        return Graph(*(None if each is None else each.to(device) for each in (self.x, self.edges, self.y, self.batch)))


class Graphs(Dataset):
    def __len__(self):
        return 3200

    def __getitem__(self, index):
        count = 10 + index % 15
        return Graph(torch.randn(count, 32), torch.randint(0, count, (2, 3 * count)), torch.tensor([index % 2]))


def collate_graphs(graphs):
    counts = torch.tensor([len(each.x) for each in graphs])
    offsets = counts.cumsum(0) - counts
    edges = torch.cat([each.edges + int(offset) for each, offset in zip(graphs, offsets, strict=True)], 1)
    batch = torch.repeat_interleave(torch.arange(len(graphs)), counts)
    return Graph(torch.cat([each.x for each in graphs]), edges, torch.cat([each.y for each in graphs]), batch)


class GraphLoader(DataLoader):
    def __init__(self, dataset, **kwargs):
        super().__init__(dataset, collate_fn=collate_graphs, **kwargs)


class Convolution(nn.Module):
    def __init__(self, inputs, outputs):
        super().__init__()
        self.linear = nn.Linear(inputs, outputs)

    def forward(self, x, edges):
        x = self.linear(x)
        return torch.zeros_like(x).index_add_(0, edges[1], x[edges[0]])


class GCN(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1, self.conv2, self.head = Convolution(32, 256), Convolution(256, 256), nn.Linear(256, 2)

    def forward(self, x, edges, batch):
        x = F.relu(self.conv2(F.relu(self.conv1(x, edges)), edges))
        sums = torch.zeros(int(batch.max()) + 1, 256).index_add_(0, batch, x)
        return self.head(F.dropout(sums, 0.5, self.training))


def graphs(slow=False):
    model = GCN()
    optimizer = torch.optim.Adam(model.parameters(), 0.01)
    for _ in range(2):
        model.train()
        for data in GraphLoader(Graphs(), batch_size=32, shuffle=True):
            data = data.to("cpu")
            optimizer.zero_grad()
            F.cross_entropy(model(data.x, data.edges, data.batch), data.y).backward()
            optimizer.step()
            if slow:
                plot_embedding()


def plot_embedding():
    time.sleep(0.02)


def graphs_plotted():
    graphs(slow=True)


# fastai: a Learner with callbacks, own data loaders and an own optimizer of composed steppers.


class CancelBatchError(Exception):
    pass


class Optimizer:
    """As fastai's: no torch.optim.Optimizer; steppers change parameters in place."""

    def __init__(self, parameters, steppers, lr):
        self.parameters, self.steppers, self.lr = list(parameters), steppers, lr
        self.state = collections.defaultdict(dict)

    def zero_grad(self):
        for each in self.parameters:
            each.grad = None

    @torch.no_grad()
    def step(self):
        for each in self.parameters:
            if each.grad is not None:
                for stepper in self.steppers:
                    stepper(each, self.state[each], self.lr)


def average_grad(parameter, state, lr):
    state.setdefault("average", torch.zeros_like(parameter)).mul_(0.9).add_(parameter.grad)


def momentum_step(parameter, state, lr):
    parameter.sub_(state["average"], alpha=lr)


class Batches:
    """As fastai's DataLoader: an own class, with transforms after the batch."""

    def __init__(self, dataset, size, after_batch):
        self.dataset, self.size, self.after_batch = dataset, size, after_batch

    def __iter__(self):
        order = torch.randperm(len(self.dataset))
        for part in order.split(self.size):
            yield self.after_batch(self.dataset[part])


class Recorder:
    def after_batch(self, learner):
        self.losses = [*getattr(self, "losses", []), learner.loss.item()][-50:]


class Scheduler:
    def before_batch(self, learner):
        learner.optimizer.lr = 0.01 * (1 - learner.iteration / 400)


class Learner:
    def __init__(self, training, held_out, model, callbacks):
        self.training, self.held_out, self.model, self.callbacks = training, held_out, model, callbacks
        self.optimizer = Optimizer(model.parameters(), [average_grad, momentum_step], 0.01)
        self.iteration = 0

    def __call__(self, event):
        for callback in self.callbacks:
            getattr(callback, event, lambda _: None)(self)

    def fit(self, epochs):
        for _ in range(epochs):
            self.model.train()
            self._all_batches(self.training, train=True)
            self.model.eval()
            with torch.no_grad():
                self._all_batches(self.held_out, train=False)

    def _all_batches(self, batches, train):
        for batch in batches:
            self._one_batch(*batch, train=train)

    def _one_batch(self, x, y, train):
        try:
            self("before_batch")
            self.loss = F.cross_entropy(self.model(x), y)
            if not train:
                raise CancelBatchError
            self.loss.backward()
            self.optimizer.step()
            self.optimizer.zero_grad()
            self.iteration += 1
        except CancelBatchError:
            pass
        finally:
            self("after_batch")


def learner(transform=lambda batch: batch):
    data = rows()
    training, held_out = Batches(data, 16, transform), Batches(rows(480), 16, transform)
    Learner(training, held_out, net(64, 1024), [Recorder(), Scheduler()]).fit(2)


def rotate_and_crop(batch):
    time.sleep(0.02)
    return batch


def learner_transforms():
    learner(rotate_and_crop)


if __name__ == "__main__":
    globals()[sys.argv[1]]()
