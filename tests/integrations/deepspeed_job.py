"""A training by DeepSpeed's ZeRO on CPU ranks, traced by `traceml.init`."""

from __future__ import annotations

import json
import os
import sys

os.environ["DS_ACCELERATOR"] = "cpu"

import deepspeed
import torch

import traceml

if __name__ == "__main__":
    torch.set_num_threads(1)
    torch.manual_seed(0)
    traceml.init(local=True)
    deepspeed.init_distributed("gloo")
    model = torch.nn.Sequential(*(torch.nn.Linear(256, 256) for _ in range(8)), torch.nn.Linear(256, 1))
    rows = torch.utils.data.TensorDataset(torch.randn(640, 256), torch.randn(640, 1))
    engine, _, loader, _ = deepspeed.initialize(
        model=model,
        model_parameters=model.parameters(),
        training_data=rows,
        optimizer=torch.optim.AdamW(model.parameters(), lr=1e-3),
        config={
            "train_micro_batch_size_per_gpu": 8,
            "gradient_accumulation_steps": 2,
            "zero_optimization": {"stage": int(sys.argv[1])},
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
        },
    )
    for x, y in loader:
        loss = torch.nn.functional.mse_loss(engine(x), y)
        engine.backward(loss)
        engine.step()

    traceml.shutdown()
    if os.environ["RANK"] == "0":
        print(json.dumps({"steps": engine.global_steps}), flush=True)

    torch.distributed.destroy_process_group()
