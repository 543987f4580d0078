"""A training whose ranks do not meet in their collectives after the 40th step: python collectives.py HOW."""

from __future__ import annotations

import argparse
import os
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

STEPS, AT = 80, 40


def late() -> None:
    """Never come to the start of the process group."""
    time.sleep(3600)


def validate(model: torch.nn.Module) -> None:
    """Evaluate for 30 s."""
    end_s = time.monotonic() + 30
    with torch.no_grad():
        while time.monotonic() < end_s:
            model(torch.randn(256, 64))
            time.sleep(0.02)


def write_index(path: Path) -> None:
    """Write, on rank 0, what the others wait for."""
    if dist.get_rank() == 0:
        dist.barrier()  # the others come here only when the file is there
        path.touch()


def poll(path: Path) -> None:
    """Wait for a file."""
    while not path.exists():
        time.sleep(0.5)


def diverge(how: str, rank: int, model: torch.nn.Module, half: object, path: Path) -> None:
    """Part from the other ranks."""
    world = dist.get_world_size()
    if how == "gather_sizes":
        size = 8 if rank else 16
        dist.all_gather([torch.ones(size) for _ in range(world)], torch.ones(size))
    elif how == "reduce_sizes":
        dist.all_reduce(torch.ones(8 if rank else 1 << 20))
    elif how == "send" and rank == 0:
        dist.send(torch.ones(1 << 22), dst=1)
    elif how == "receive" and rank == 0:
        dist.recv(torch.ones(4), src=1)
    elif how == "half" and rank == 0:
        dist.barrier(group=half)  # type: ignore[arg-type]
    elif how == "destroy" and rank == 1:
        dist.destroy_process_group()
        time.sleep(3600)
    elif how == "leaves" and rank == 1:
        sys.exit(0)
    elif how == "leaves_at_once" and rank == 1:
        os._exit(0)
    elif how == "index":
        write_index(path) if rank == 0 else poll(path)
    elif how == "validates":
        if rank == 0:
            validate(model)

        dist.barrier()
    elif how == "objects" and rank == 0:
        dist.broadcast_object_list([None], src=0)


def main() -> None:
    """Train."""
    parser = argparse.ArgumentParser()
    parser.add_argument("how")
    options = parser.parse_args()
    if options.how == "late" and os.environ["RANK"] == "1":
        late()

    dist.init_process_group("gloo")
    rank, half = dist.get_rank(), dist.new_group([0, 1])
    net = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.ReLU(), torch.nn.Linear(64, 8))
    model = DistributedDataParallel(net)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    for step in range(STEPS):
        optimizer.zero_grad()
        model(torch.randn(8, 64)).pow(2).mean().backward()
        optimizer.step()
        time.sleep(0.02)
        if step == AT:
            diverge(options.how, rank, net, half, Path(f"index-{os.environ['TORCHELASTIC_RUN_ID']}"))

    dist.destroy_process_group()


if __name__ == "__main__":
    main()
