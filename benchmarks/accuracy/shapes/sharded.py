"""FSDP2, tensor parallelism, two stages, local SGD, and processes that a script spawns by itself."""

import os
import sys

import torch
import torch.distributed as dist
from torch import nn


def fsdp():
    from torch.distributed.fsdp import fully_shard

    dist.init_process_group("gloo")
    model = nn.Sequential(*(nn.Sequential(nn.Linear(256, 256), nn.ReLU()) for _ in range(4)))
    for layer in model:
        fully_shard(layer)
    fully_shard(model)
    optimizer = torch.optim.AdamW(model.parameters())
    torch.manual_seed(dist.get_rank())  # other data on each rank
    for _ in range(120):
        model(torch.randn(32, 256)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    dist.destroy_process_group()


def tensor_parallel():
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    mesh = init_device_mesh("cpu", (int(os.environ["WORLD_SIZE"]),))
    model = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 64))
    parallelize_module(model, mesh, {"0": ColwiseParallel(), "2": RowwiseParallel()})
    optimizer = torch.optim.AdamW(model.parameters(), foreach=True)
    for step in range(200):
        torch.manual_seed(step)
        model(torch.randn(32, 64)).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    dist.destroy_process_group()


def average(model, rounds=3):
    for _ in range(rounds):  # as long as a slower network takes
        for parameter in model.parameters():
            dist.all_reduce(parameter.data)
            parameter.data /= dist.get_world_size()


def local_sgd():
    """Averages the parameters of the ranks in each 25th step, and trains by itself in between."""
    dist.init_process_group("gloo")
    model = nn.Sequential(*(nn.Linear(512, 512) for _ in range(8)))
    optimizer = torch.optim.SGD(model.parameters(), 0.001)
    torch.manual_seed(dist.get_rank())
    for step in range(400):
        model(torch.randn(32, 512)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        if step % 25 == 24:
            average(model)
    dist.destroy_process_group()


def two_stages():
    """A pipeline by send and recv, whose second stage computes far more than the first."""
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    if rank == 0:
        stage = nn.Sequential(nn.Linear(256, 512), nn.ReLU())
    else:
        stage = nn.Sequential(*(nn.Sequential(nn.Linear(512, 512), nn.ReLU()) for _ in range(4)))
    optimizer = torch.optim.SGD(stage.parameters(), 0.01)
    for _ in range(300):
        optimizer.zero_grad()
        if rank == 0:
            hidden = stage(torch.randn(64, 256))
            gradient = torch.empty_like(hidden)
            dist.send(hidden.detach(), 1)
            dist.recv(gradient, 1)
            hidden.backward(gradient)
        else:
            hidden = torch.empty(64, 512)
            dist.recv(hidden, 0)
            stage(hidden.requires_grad_()).square().mean().backward()
            dist.send(hidden.grad, 0)
        optimizer.step()
    dist.destroy_process_group()


def work(rank, world):
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="29781")
    dist.init_process_group("gloo", rank=rank, world_size=world)
    model = nn.parallel.DistributedDataParallel(nn.Linear(256, 256))
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    torch.manual_seed(rank)  # other data on each rank
    for _ in range(150):
        model(torch.randn(64, 256)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    dist.destroy_process_group()


def spawned():
    torch.multiprocessing.spawn(work, args=(2,), nprocs=2)


if __name__ == "__main__":
    globals()[sys.argv[1]]()
