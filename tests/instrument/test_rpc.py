"""A training through `torch.distributed.rpc`, as by a parameter server; here the server is the process itself."""

from __future__ import annotations

import time
from pathlib import Path

import torch
from torch import nn

from tests.instrument.conftest import Traced

STEPS = 12
SLEEP_NS = 2_000_000


def predict(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return model(x)


def test_steps_of_a_distributed_optimizer_are_seen(traced: Traced, tmp_path: Path) -> None:
    """Its backward pass and its steps go through other processes, and none of them is an optimizer of torch's here."""
    from torch.distributed import autograd, rpc
    from torch.distributed.optim import DistributedOptimizer

    options = rpc.TensorPipeRpcBackendOptions(init_method=f"file://{tmp_path / 'store'}")
    rpc.init_rpc("server", rank=0, world_size=1, rpc_backend_options=options)
    model = nn.Linear(8, 1)
    optimizer = DistributedOptimizer(torch.optim.SGD, [rpc.RRef(each) for each in model.parameters()], lr=0.01)
    for _ in range(STEPS):
        with autograd.context() as context:
            loss = rpc.rpc_sync("server", predict, args=(model, torch.ones(4, 8))).sum()
            autograd.backward(context, [loss])
            optimizer.step(context)

    rpc.shutdown()
    steps = traced.finish()

    assert len(steps) == STEPS
    assert all(row["backward_ns"] > 0 and row["optimizer_ns"] > 0 for row in steps)


def double(x: torch.Tensor) -> torch.Tensor:
    time.sleep(SLEEP_NS / 1e9)
    return 2 * x


def test_calls_of_other_processes_are_communication(traced: Traced, tmp_path: Path) -> None:
    """A rank asks a parameter server in each step: at once, later by a future, or through a reference."""
    from torch.distributed import rpc

    options = rpc.TensorPipeRpcBackendOptions(init_method=f"file://{tmp_path / 'store'}")
    rpc.init_rpc("server", rank=0, world_size=1, rpc_backend_options=options)
    model = nn.Linear(8, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    ask = (
        lambda x: rpc.rpc_sync("server", double, args=(x,)),
        lambda x: rpc.rpc_async("server", double, args=(x,)).wait(),
        lambda x: rpc.remote("server", double, args=(x,)).to_here(),
    )
    for step in range(STEPS):
        x = ask[step % len(ask)](torch.ones(4, 8))
        model(x).sum().backward()
        optimizer.step()
        optimizer.zero_grad()

    rpc.shutdown()
    steps = traced.finish()

    assert len(steps) == STEPS
    # Without a loader a step ends at the next forward, so a call is in the step before.
    assert all(row["comm_ns"] >= SLEEP_NS for row in steps[:-1])
