"""Groups that are destroyed right after a backward pass, on one rank of two: `python group_cycles.py RANK STORE`."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn

from traceml.database.flight.flight import FlightFile
from traceml.instrument import install

CYCLES = 60


def main(rank: int, store: str) -> None:
    torch.set_num_threads(1)
    install(FlightFile.create(Path(f"{store}-flight-{rank}"), {}))
    net = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
    shared = dist.FileStore(store, 2)
    for number in range(CYCLES):
        dist.init_process_group("gloo", store=dist.PrefixStore(str(number), shared), rank=rank, world_size=2)
        model = nn.parallel.DistributedDataParallel(net)
        for _ in range(3):
            model(torch.ones(8, 64)).sum().backward()

        dist.destroy_process_group()
        del model  # the last to have the group

    print(f"{CYCLES} groups", flush=True)
    os._exit(0)


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2])
