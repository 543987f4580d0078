"""A small training on two ranks that hangs in one of several ways after 40 steps."""

from __future__ import annotations

import sys
import time

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader

HOW = sys.argv[1]


def stuck() -> None:
    time.sleep(600)  # STUCK


def train() -> None:
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    model = DistributedDataParallel(torch.nn.Linear(64, 64))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    steps = 40 if HOW == "uneven" and rank == 1 else 50 if HOW == "uneven" else 41
    for step, batch in enumerate(DataLoader(torch.randn(8 * steps, 64), batch_size=8)):
        loss = model(batch).pow(2).mean()
        optimizer.zero_grad()
        loss.backward()  # BACKWARD
        optimizer.step()
        time.sleep(0.02)
        if step == 30 and HOW == "sleep" and rank == 1:
            stuck()

        if step == 30 and HOW == "skip" and rank == 0:
            dist.barrier()  # SKIPPED

    dist.barrier()  # BARRIER
    dist.destroy_process_group()


train()
