"""Trainings of two workers of Ray Train, all by one Ray: two that end well, and two in which one rank raises."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import ray
import ray.train
import ray.train.torch
import torch
from ray.train import report

from traceml.integrations.ray import trace
from traceml.recorder.current_recorder import is_enabled


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


def fail(config: dict[str, Any]) -> None:
    """Train a wrapped model; one rank raises in step 50."""
    model = ray.train.torch.prepare_model(torch.nn.Linear(8, 1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for step in range(80):
        optimizer.zero_grad()
        model(torch.randn(4, 8)).square().mean().backward()
        optimizer.step()
        if step == 50 and ray.train.get_context().get_world_rank() == config["failing"]:
            raise RuntimeError(f"rank {config['failing']} is bad")


once = trace(train, connect_timeout=9.0)


class Trainer(ray.train.torch.TorchTrainer):
    """Trainer without datasets, that nobody kills: for each Ray starts a process that imports for seconds."""

    def _create_default_callbacks(self) -> list[Any]:
        needless = {"DatasetsCallback", "PlacementGroupCleanerCallback"}
        return [each for each in super()._create_default_callbacks() if type(each).__name__ not in needless]


def fit(function: Any, **config: int) -> str:
    """Train on two workers; return the name of the error."""
    trainer = Trainer(
        function,
        train_loop_config=config,
        scaling_config=ray.train.ScalingConfig(num_workers=2, resources_per_worker={"CPU": 0.5}),
        run_config=ray.train.RunConfig(storage_path=str(Path("ray").absolute())),
    )
    try:
        trainer.fit()
    except Exception as error:  # whatever Ray makes of it
        return type(error).__name__

    return ""


if __name__ == "__main__":
    forked = {"py_executable": sys.argv[1]}
    ray.init(num_cpus=2, include_dashboard=False, object_store_memory=80 << 20, log_to_driver=False, runtime_env=forked)
    errors = [fit(both, epochs=3), fit(trace(fail), failing=1), fit(trace(fail), failing=0)]
    print(json.dumps({"errors": errors}), flush=True)
    ray.shutdown()
