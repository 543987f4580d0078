"""A training that records loss and weights of each step, so that two runs can be compared to the last bit.

Each rank writes below `--folder`: its pid; a line per step with the loss and a hash of the weights; and how many steps
it has closed and values it has logged, in a file that survives the death of the process.
"""

from __future__ import annotations

import argparse
import hashlib
import mmap
import os
import struct
import time
from datetime import timedelta
from pathlib import Path

import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset

import traceml


class Seeded(Dataset):
    """Batches that depend on rank and index only."""

    def __init__(self, steps: int, rank: int) -> None:
        self.steps, self.rank = steps, rank

    def __len__(self) -> int:
        return self.steps

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        chance = torch.Generator().manual_seed(index * 1000 + self.rank)
        return torch.randn(16, 32, generator=chance), torch.randint(10, (16,), generator=chance)


class Counts:
    """Steps closed and values logged, in a mapped file."""

    def __init__(self, path: Path) -> None:
        path.write_bytes(bytes(16))
        with path.open("r+b") as file:
            self._map = mmap.mmap(file.fileno(), 16)

    def store(self, steps: int, logged: int) -> None:
        """Store both."""
        struct.pack_into("=QQ", self._map, 0, steps, logged)


def hash_of(model: nn.Module) -> str:
    found = hashlib.sha256()
    for value in model.state_dict().values():
        found.update(value.numpy().tobytes())

    return found.hexdigest()[:16]


def take_descriptors() -> list[int]:
    """Open files until the process may open no more."""
    taken = []
    try:
        while True:
            taken.append(os.open(os.devnull, os.O_RDONLY))
    except OSError:
        return taken


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--pause", type=float, default=0.03, help="seconds of sleep in each step")
    parser.add_argument("--take-descriptors-at", type=int, default=-1, help="step from which no file can be opened")
    options = parser.parse_args()

    rank, world_size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model: nn.Module = nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Dropout(0.1), nn.Linear(32, 10))
    if world_size > 1:
        if not torch.distributed.is_initialized():
            torch.distributed.init_process_group("gloo", timeout=timedelta(seconds=90))

        model = nn.parallel.DistributedDataParallel(model)

    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    counts, taken = Counts(options.folder / f"counts.{rank}"), []
    (options.folder / f"pid.{rank}").write_text(str(os.getpid()))
    with (options.folder / f"losses.{rank}").open("w", buffering=1) as losses:
        for step, (inputs, targets) in enumerate(DataLoader(Seeded(options.steps, rank), batch_size=None)):
            counts.store(step, step)
            if step == options.take_descriptors_at:
                taken = take_descriptors()

            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(model(inputs), targets)
            loss.backward()
            optimizer.step()
            losses.write(f"{loss.item().hex()} {hash_of(model)}\n")
            traceml.log_metric("loss", loss.item(), step=step)
            counts.store(step, step + 1)
            time.sleep(options.pause)

    counts.store(options.steps, options.steps)
    print(f"rank {rank} trained {options.steps} steps, {len(taken)} descriptors taken", flush=True)
    if world_size > 1:
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
