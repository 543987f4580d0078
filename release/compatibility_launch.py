"""A function on two workers, as users launch it."""

from __future__ import annotations

import torch
import torch.distributed as dist

import traceml


def total() -> float:
    values = torch.tensor([float(dist.get_rank() + 1)])
    dist.all_reduce(values)
    return float(values)


if __name__ == "__main__":
    results = traceml.launch(total, hostnames=["localhost"], workers_per_host=2)
    print(results.rank(0), results.rank(1))
