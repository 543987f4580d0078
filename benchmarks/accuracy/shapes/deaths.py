"""Trainings that die in the middle: python deaths.py HOW [--rank 1] [--at 60]."""

from __future__ import annotations

import argparse
import ctypes
import os
import resource
import signal
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, Dataset

KEPT: list[torch.Tensor] = []


class Rows(Dataset):
    """Rows of numbers, of which one may be bad."""

    def __init__(self, bad: int | None) -> None:
        self.bad = bad

    def __len__(self) -> int:
        return 4000

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        return self.decode(index), index % 10

    def decode(self, index: int) -> torch.Tensor:
        """Return a row, unless it is the bad one."""
        if index == self.bad:
            raise ValueError(f"row {index} cannot be decoded")

        return torch.full((64,), float(index % 7))


def keep(megabytes: int) -> None:
    """Append memory that nothing frees."""
    KEPT.append(torch.ones(megabytes << 18))
    time.sleep(0.05)


def allocate() -> torch.Tensor:
    """Ask for more memory than the process may have."""
    resource.setrlimit(resource.RLIMIT_AS, (24 << 30, 24 << 30))
    return torch.ones(16 << 30)


def crash() -> None:
    """Read from address 0, in C."""
    ctypes.string_at(0)


def fail() -> None:
    """Raise an exception."""
    raise KeyError("label")


def terminate_job() -> None:
    """Have the launcher ended by SIGTERM, as a scheduler does it: it is the parent of torchrun."""
    torchrun = Path(f"/proc/{os.getppid()}/stat").read_text()
    os.kill(int(torchrun.rpartition(")")[2].split()[1]), signal.SIGTERM)
    time.sleep(60)


def stop(how: str) -> None:
    """End this process."""
    if how == "terminated":
        terminate_job()

    if how == "memory":
        keep(24)
    elif how == "allocation":
        allocate()
    elif how == "segfault":
        crash()
    elif how == "exit":
        sys.exit(3)
    elif how == "os_exit":
        os._exit(4)
    elif how in ("raise", "raise_again"):
        fail()


def main() -> None:
    """Train, and die on one rank."""
    parser = argparse.ArgumentParser()
    parser.add_argument("how")
    parser.add_argument("--rank", type=int, default=1)
    parser.add_argument("--at", type=int, default=60)
    options = parser.parse_args()
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    dies = rank == options.rank
    torch.manual_seed(0)
    model = DistributedDataParallel(nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 10)))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    bad = 16 * options.at if dies and options.how == "worker" else None
    loader = DataLoader(Rows(bad), batch_size=16, num_workers=1 if options.how == "worker" else 0)
    try:
        train(model, optimizer, loader, options.how, options.at if dies else None)
    except Exception as error:
        if options.how == "raise_again":
            raise RuntimeError("the training has failed") from error

        raise

    dist.destroy_process_group()


def train(
    model: nn.Module, optimizer: torch.optim.Optimizer, loader: DataLoader, how: str, dies_at: int | None
) -> None:
    """Train, and die in a step."""
    for step, (rows, labels) in enumerate(loader):
        loss = nn.functional.cross_entropy(model(rows), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        time.sleep(0.01)
        if dies_at is not None and step >= dies_at:
            stop(how)


if __name__ == "__main__":
    main()
