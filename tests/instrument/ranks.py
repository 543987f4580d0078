"""Trainings that the distributed tests run in processes of their own: `python ranks.py RANK STORE OUT KIND...`."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from traceml.database.flight.flight import FlightFile
from traceml.database.schema import STEPS, StepFlag, unpack_bits
from traceml.instrument import install
from traceml.instrument.facts.descriptions import model_facts

STEPS_DONE = 24


def ddp(rank: int) -> tuple[nn.Module, nn.Module]:
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), Slow(rank), nn.Linear(8, 1))
    return model, nn.parallel.DistributedDataParallel(model)


def ddp_buffers(rank: int) -> tuple[nn.Module, nn.Module]:
    model = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Linear(8, 1))
    return model, nn.parallel.DistributedDataParallel(model)


def ddp_no_sync(rank: int) -> tuple[nn.Module, nn.Module]:
    return ddp(rank)


def ddp_accumulates(rank: int) -> tuple[nn.Module, nn.Module]:
    return ddp(rank)


def ddp_repeats(rank: int) -> tuple[nn.Module, nn.Module]:
    return ddp(rank)


def ddp_bypassed(rank: int) -> tuple[nn.Module, nn.Module]:
    return ddp(rank)


def fsdp2(rank: int) -> tuple[nn.Module, nn.Module]:
    from torch.distributed.fsdp import fully_shard

    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 1))
    fully_shard(model)
    return model, model


def manual(rank: int) -> tuple[nn.Module, nn.Module]:
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 1))
    return model, model


def tensor_parallel(rank: int) -> tuple[nn.Module, nn.Module]:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 1))
    mesh = init_device_mesh("cpu", (2,))
    return model, parallelize_module(model, mesh, {"0": ColwiseParallel(), "2": RowwiseParallel()})


class Slow(nn.Module):
    """Takes 5 ms in the backward pass of rank 1."""

    def __init__(self, rank: int) -> None:
        super().__init__()
        self.rank = rank

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return _Burn.apply(x) if self.rank == 1 else x


class _Burn(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        until = time.perf_counter() + 0.005
        while time.perf_counter() < until:
            pass

        return gradient


def train(kind: str, rank: int) -> list[float]:
    torch.manual_seed(0)
    _, model = globals()[kind](rank)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    losses = []
    batches: Iterable[Any] = [[torch.ones(4, 8)]] * STEPS_DONE
    if kind == "ddp_repeats":
        batches = DataLoader(TensorDataset(torch.ones(4 * STEPS_DONE, 8)), batch_size=4)

    for (x,) in batches:
        optimizer.zero_grad()
        if kind == "ddp_buffers" and rank == 0:
            time.sleep(0.005)

        if kind == "ddp_no_sync":
            with model.no_sync():
                model(x).sum().backward()
        elif kind == "ddp_accumulates":
            model(x).sum().backward()
        elif kind == "ddp_repeats":
            model(x).sum().backward()
            optimizer.step()

        loss = (model.module if kind == "ddp_bypassed" else model)(x).sum()
        loss.backward()
        if kind == "manual":
            for parameter in model.parameters():
                dist.all_reduce(parameter.grad)
                work = dist.all_reduce(parameter.grad, async_op=True)
                work.wait()

        optimizer.step()
        losses.append(loss.item())

    return losses


def traced(kind: str, rank: int, store: str, folder: Path) -> dict[str, Any]:
    """Train with hooks and without; return what the hooks found."""
    flight = FlightFile.create(folder / f"flight-{rank}", {})
    groups: list[tuple[tuple[int, int] | None, bool]] = []
    facts: list[dict[str, Any]] = []

    def on_group(joining: tuple[int, int] | None) -> None:
        groups.append((joining, dist.is_initialized()))

    instrumentation = install(flight, on_info=facts.append, on_group=on_group)
    if not dist.is_initialized():
        dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)

    losses = train(kind, rank)
    instrumentation.close_open_step()
    ring = flight.ring("steps")
    rows = [rows_of(values) for values in STEPS.struct.iter_unpack(ring.read_from(0, ring.appended).data)]
    instrumentation.uninstall()
    flight.close(unlink=True)
    clock = instrumentation.clock
    same = losses == train(kind, rank)
    return {
        "rows": rows,
        "groups": groups,
        "same": same,
        "errors": clock.errors,
        "reductions": next((each for each in facts if each["kind"] == "reductions"), None),
        "gradient_size": model_facts(globals()[kind](rank)[1]).get("gradient_size"),
    }


def rows_of(values: tuple[int, ...]) -> dict[str, Any]:
    row: dict[str, Any] = dict(zip([column.name for column in STEPS.columns], values, strict=True))
    micro, flags, sequence = unpack_bits(row["bits"])
    return {**row, "micro": micro, "callback": bool(flags & StepFlag.CALLBACK), "sequence": sequence}


def main(rank: int, store: str, out: str, kinds: list[str]) -> None:
    torch.set_num_threads(1)
    found = {kind: traced(kind, rank, store, Path(out).parent) for kind in kinds}
    dist.barrier()
    dist.destroy_process_group()
    Path(out).write_text(json.dumps(found))
    # Gloo's threads abort about one in 25 interpreters that end in the usual way, also without traceml.
    os._exit(0)


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2], sys.argv[3], sys.argv[4:])
