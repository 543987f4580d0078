"""A training as users write it, which records its losses to the last bit. It does not know of traceml.

Each rank writes `losses.RANK` into the working directory: its losses in hexadecimal, a hash of the weights, and
whether the hooks were in C.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, TensorDataset

_NATIVE = "traceml.instrument.native._hot_path"


class Net(nn.Module):
    def __init__(self, *, checkpointed: bool) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(32, 64), nn.Linear(64, 10)
        self.middle = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64))
        self.checkpointed = checkpointed

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        hidden = torch.relu(self.first(inputs))
        if self.checkpointed:
            return self.second(checkpoint(self.middle, hidden, use_reentrant=False))

        return self.second(self.middle(hidden))


def sharded(model: nn.Module) -> nn.Module:
    """Return the model under FSDP2, which torch 2.4 and 2.5 have in a private module."""
    try:
        from torch.distributed.fsdp import fully_shard
    except ImportError:
        from torch.distributed._composable.fsdp import fully_shard

    from torch.distributed.device_mesh import init_device_mesh

    fully_shard(model, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
    return model


def wrapped(model: nn.Module, options: argparse.Namespace) -> nn.Module:
    if options.compile:
        model = torch.compile(model)

    if options.fsdp:
        return sharded(model)

    return DistributedDataParallel(model) if dist.is_initialized() else model


def hash_of(model: nn.Module) -> str:
    found = hashlib.sha256()
    for value in model.parameters():
        local = value.to_local() if hasattr(value, "to_local") else value
        found.update(local.detach().numpy().tobytes())

    return found.hexdigest()[:16]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--workers", type=int, default=0, help="loader processes")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--fsdp", action="store_true")
    parser.add_argument("--checkpointed", action="store_true")
    parser.add_argument("--amp", action="store_true", help="bfloat16 where autocast chooses it")
    options = parser.parse_args()

    rank, world_size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    torch.set_num_threads(1)
    torch.manual_seed(0)
    if world_size > 1 and not dist.is_initialized():
        dist.init_process_group("gloo")

    model = wrapped(Net(checkpointed=options.checkpointed), options)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    chance = torch.Generator().manual_seed(rank)
    data = TensorDataset(
        torch.randn(16 * options.steps, 32, generator=chance),
        torch.randint(10, (16 * options.steps,), generator=chance),
    )
    losses = []
    for inputs, targets in DataLoader(data, 16, num_workers=options.workers):
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=options.amp):
            loss = nn.functional.cross_entropy(model(inputs), targets)

        loss.backward()
        optimizer.step()
        losses.append(loss.item().hex())

    form = "C" if _NATIVE in sys.modules else "Python" if "traceml.instrument" in sys.modules else "none"
    Path(f"losses.{rank}").write_text("\n".join([form, hash_of(model), *losses]))
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
