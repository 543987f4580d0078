"""A loop by Accelerate on two ranks: prepared, accumulating, evaluated and saved, with `traceml.init` and without."""

from __future__ import annotations

import json
import os
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed

import traceml
from tests.integrations.left_behind import digest, state_of


def train(**more: Any) -> dict[str, Any]:
    """Train two epochs of 22 batches per rank in steps of 4."""
    set_seed(0)
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=4, **more)
    if more:
        accelerator.init_trackers("a-project", {"lr": 0.01}, {"traceml": {"run_name": "by-name", "report": False}})

    model = torch.nn.Sequential(torch.nn.Linear(8, 64), torch.nn.Dropout(0.1), torch.nn.Linear(64, 1))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 5)
    rows = torch.utils.data.TensorDataset(torch.randn(176, 8))
    loaders = [
        torch.utils.data.DataLoader(rows, batch_size=4),
        torch.utils.data.DataLoader(rows.tensors[0][:24], batch_size=4),
    ]
    model, optimizer, train_loader, other, schedule = accelerator.prepare(model, optimizer, *loaders, schedule)
    losses = []
    for _ in range(2):
        model.train()
        for (x,) in train_loader:
            with accelerator.accumulate(model):
                loss = model(x).square().mean()
                accelerator.backward(loss)
                accelerator.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                schedule.step()
                optimizer.zero_grad()
                losses.append(loss.item())

        model.eval()
        with torch.no_grad():
            losses += [accelerator.gather_for_metrics(model(x)).sum().item() for x in other]

        accelerator.save_state("state")
        accelerator.log({"last loss": losses[-1]}, step=len(losses))

    for tracker in accelerator.trackers:  # as `end_training`, which also ends the process group
        tracker.finish()

    return {"losses": losses, "weights": digest(model), "random": torch.rand(1).item()}


if __name__ == "__main__":
    torch.set_num_threads(1)
    plain = train()
    before = state_of()
    traceml.init(local=True)
    traced = train()
    traceml.shutdown()
    named = train(log_with="traceml")
    after = state_of()
    left = [name for name, value in before.items() if after.get(name) != value]
    if os.environ["RANK"] == "0":
        print(json.dumps({"same": plain == traced == named, "left": left}), flush=True)

    torch.distributed.destroy_process_group()
