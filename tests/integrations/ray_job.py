"""Two workers of Ray Train, traced as one run: on one host, and as if they were on two."""

from __future__ import annotations

import json
from typing import Any

import ray
import ray.train
import ray.train.torch
import torch
from ray.train import report

from traceml.integrations.ray import trace
from traceml.recorder.current import is_enabled


def train(config: dict[str, Any]) -> None:
    """Train a wrapped model on a sharded loader."""
    torch.manual_seed(0)
    model = ray.train.torch.prepare_model(torch.nn.Linear(8, 1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    rows = torch.utils.data.TensorDataset(torch.randn(64, 8))
    loader = ray.train.torch.prepare_data_loader(torch.utils.data.DataLoader(rows, batch_size=4))
    for epoch in range(config["epochs"]):
        for (x,) in loader:
            optimizer.zero_grad()
            model(x).square().mean().backward()
            optimizer.step()

        report({"epoch": epoch, "nested": {"half": epoch / 2}})


def both(config: dict[str, Any]) -> None:
    """Train once as it is, and once where each worker believes to be alone on its host."""
    once(config)
    torch.distributed.barrier()
    type(ray.train.get_context()).get_local_world_size = lambda _self: 1
    assert ray.train.get_context().get_local_world_size() == 1
    once(config)
    report({"running": is_enabled()})


once = trace(train, connect_timeout=9.0)

if __name__ == "__main__":
    ray.init(num_cpus=2, include_dashboard=False, object_store_memory=80 << 20, log_to_driver=True)
    result = ray.train.torch.TorchTrainer(
        both,
        train_loop_config={"epochs": 3},
        scaling_config=ray.train.ScalingConfig(num_workers=2, resources_per_worker={"CPU": 0.5}),
        run_config=ray.train.RunConfig(storage_path=str(__import__("pathlib").Path("ray").absolute())),
    ).fit()
    print(json.dumps({"error": repr(result.error)}), flush=True)
    ray.shutdown()
