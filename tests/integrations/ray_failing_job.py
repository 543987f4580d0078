"""Two trainings of Ray Train in which one rank raises: first rank 1, then rank 0."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import ray
import ray.train
import ray.train.torch
import torch

from traceml.integrations.ray import trace


def train(config: dict[str, Any]) -> None:
    """Train a wrapped model; one rank raises in step 50."""
    model = ray.train.torch.prepare_model(torch.nn.Linear(8, 1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for step in range(80):
        optimizer.zero_grad()
        model(torch.randn(4, 8)).square().mean().backward()
        optimizer.step()
        if step == 50 and ray.train.get_context().get_world_rank() == config["failing"]:
            raise RuntimeError(f"rank {config['failing']} is bad")


def fit(failing: int) -> str:
    """Train, and return the name of the error."""
    trainer = ray.train.torch.TorchTrainer(
        trace(train),
        train_loop_config={"failing": failing},
        scaling_config=ray.train.ScalingConfig(num_workers=2, resources_per_worker={"CPU": 0.5}),
        run_config=ray.train.RunConfig(storage_path=str(Path("ray").absolute())),
    )
    try:
        trainer.fit()
    except Exception as error:  # whatever Ray makes of it
        return type(error).__name__

    return ""


if __name__ == "__main__":
    ray.init(num_cpus=2, include_dashboard=False, object_store_memory=80 << 20, log_to_driver=False)
    print(json.dumps({"errors": [fit(1), fit(0)]}), flush=True)
    ray.shutdown()
