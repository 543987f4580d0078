"""Data-parallel training as the torch tutorials write it: DistributedSampler, DDP, a reduced metric each epoch."""

import argparse
import os
import time

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, Dataset, DistributedSampler

parser = argparse.ArgumentParser()
parser.add_argument("--fault", default="none")
parser.add_argument("--ms", type=float, default=20)
parser.add_argument("--slow-rank", type=int, default=1)
parser.add_argument("--width", type=int, default=256)
parser.add_argument("--epochs", type=int, default=2)
parser.add_argument("--batches", type=int, default=80)
parser.add_argument("--accumulate", type=int, default=1)
options = parser.parse_args()

dist.init_process_group("gloo")
rank, world = dist.get_rank(), dist.get_world_size()
torch.manual_seed(rank)  # the data is random: with one seed all ranks would train on the same
faulty = rank == options.slow_rank


def stall():
    time.sleep(options.ms / 1e3)


class Rows(Dataset):
    def __len__(self):
        return options.batches * 16 * world

    def __getitem__(self, index):
        if options.fault == "dataset":
            time.sleep(options.ms / 16e3)

        return torch.randn(256), index % 10


def collate(samples):
    if options.fault == "input" and faulty:
        stall()

    return torch.utils.data.default_collate(samples)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(256, options.width), nn.ReLU(), nn.Linear(options.width, options.width), nn.ReLU()
        )
        self.head = nn.Linear(options.width, 10)

    def forward(self, x):
        if options.fault == "forward" and faulty:
            stall()

        return self.head(self.layers(x))


class SlowSGD(torch.optim.SGD):
    def step(self, closure=None):
        if options.fault == "optimizer" and faulty:
            stall()

        return super().step(closure)


def write_log(step):
    stall()


def clean_up_on_all():
    stall()


class SlowGrad(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad):
        stall()
        return grad


def main():
    model = DistributedDataParallel(Net())
    optimizer = SlowSGD(model.parameters(), lr=0.01)
    sampler = DistributedSampler(Rows(), shuffle=True)
    loader = DataLoader(Rows(), batch_size=16, sampler=sampler, collate_fn=collate)
    for epoch in range(options.epochs):
        sampler.set_epoch(epoch)
        total = torch.zeros(1)
        for step, (x, y) in enumerate(loader):
            x.requires_grad_(options.fault == "backward")
            if options.fault == "backward" and faulty:
                x = SlowGrad.apply(x)

            loss = F.cross_entropy(model(x), y)
            loss.backward()
            if step % options.accumulate == options.accumulate - 1:
                optimizer.step()
                optimizer.zero_grad()

            total += loss.detach()
            if options.fault == "other" and faulty:
                write_log(step)
            elif options.fault == "everywhere":
                clean_up_on_all()
            elif options.fault == "turns" and step % world == rank:
                write_log(step)
            elif options.fault == "killed" and faulty and epoch == 1 and step == 10:
                os.kill(os.getpid(), 9)
            elif options.fault == "raises" and faulty and epoch == 1 and step == 10:
                raise ValueError("a label is out of range")

        dist.all_reduce(total)


main()
dist.destroy_process_group()
