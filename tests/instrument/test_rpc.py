"""A training through `torch.distributed.rpc`, as by a parameter server; here the server is the process itself."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from tests.instrument.conftest import Traced

STEPS = 12


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
