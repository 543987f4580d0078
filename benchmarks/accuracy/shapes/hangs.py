"""A training on two ranks or more that hangs in its 60th step, in the way that is asked for; or only looks like it."""

from __future__ import annotations

import argparse
import ctypes
import fcntl
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, Dataset

LOCK = threading.Lock()
LONG_S = 3600.0


class Items(Dataset):
    """Random items; one of them takes a lock that is never free, if wanted."""

    def __init__(self, count: int, blocked: int = -1) -> None:
        self.count, self.blocked = count, blocked

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> torch.Tensor:
        if index == self.blocked:
            wait_for_lock()

        return torch.randn(64)


def wait_for_lock() -> None:
    """Take a lock for ever."""
    LOCK.acquire()
    LOCK.acquire()


def sleep() -> None:
    """Wait for what does not come."""
    time.sleep(LONG_S)


def hold_interpreter() -> None:
    """Sleep in C without releasing the interpreter's lock."""
    ctypes.PyDLL(None).sleep(int(LONG_S))


def wait_for_file() -> None:
    """Wait for the lock of a file that another descriptor holds."""
    path = Path(tempfile.gettempdir()) / f"hang-{os.getpid()}"
    with path.open("w") as first, path.open("w") as second:
        path.unlink()
        fcntl.flock(first, fcntl.LOCK_EX)
        fcntl.flock(second, fcntl.LOCK_EX)


def fill_pipe() -> None:
    """Write to a pipe that nobody reads."""
    _, end = os.pipe()
    while True:
        os.write(end, bytes(65536))


def receive() -> None:
    """Receive what nobody sends."""
    dist.recv(torch.zeros(4), src=0)


def pause() -> None:
    """Have this process stopped by a signal for 12 seconds."""
    pid = os.getpid()
    subprocess.Popen(["/bin/sh", "-c", f"kill -STOP {pid}; sleep 12; kill -CONT {pid}"])


def evaluate(model: torch.nn.Module) -> None:
    """Evaluate for long, on this rank only."""
    end_s = time.monotonic() + 15
    with torch.no_grad():
        while time.monotonic() < end_s:
            model(torch.randn(256, 64))
            time.sleep(0.02)


def tokenize() -> None:
    """Compute for long in Python, on this rank only."""
    end_s = time.monotonic() + 15
    while time.monotonic() < end_s:
        sum(range(10_000))


ON_RANK_1 = {
    "sleep": sleep, "held": hold_interpreter, "file_lock": wait_for_file, "pipe": fill_pipe, "receive": receive,
    "tokenize": tokenize, "paused": pause,
}  # fmt: skip


def act(how: str, rank: int, net: torch.nn.Module, group: dist.ProcessGroup) -> None:
    """Hang, or look like it."""
    if rank == 1 and how in ON_RANK_1:
        ON_RANK_1[how]()
    elif rank == 1 and how == "stopped":
        os.kill(os.getpid(), signal.SIGSTOP)
    elif rank == 0 and how == "barrier":
        dist.barrier()
    elif rank != 1 and how == "skip":
        dist.all_gather([torch.ones(8) for _ in range(dist.get_world_size())], torch.ones(8))
    elif rank == 0 and how == "subgroup":
        dist.all_reduce(torch.ones(8), group=group)
    elif rank == 1 and how == "leave":
        sys.exit(0)
    elif rank == 1 and how == "evaluate":
        evaluate(net)


def main() -> None:
    """Train."""
    parser = argparse.ArgumentParser()
    parser.add_argument("how")
    parser.add_argument("--start-method", default="fork")
    options = parser.parse_args()
    how = options.how
    dist.init_process_group("gloo")
    rank, group = dist.get_rank(), dist.new_group([0, 1])
    net = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.ReLU(), torch.nn.Linear(64, 8))
    model = DistributedDataParallel(net)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    steps = 60 if how == "uneven" and rank == 1 else 80
    items = Items(steps * 8, blocked=480 if how == "worker" and rank == 1 else -1)
    many = {"num_workers": 2, "multiprocessing_context": options.start_method} if how == "worker" else {}
    for step, batch in enumerate(DataLoader(items, batch_size=8, **many)):
        loss = model(batch).pow(2).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        time.sleep(0.02)
        if step == 59:
            act(how, rank, net, group)

    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
