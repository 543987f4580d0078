"""Trainings by Hugging Face's Trainer: what they compute with us and without, and what is left afterwards."""

from __future__ import annotations

import gc
import json
import os
import sys
import time
from typing import Any

import torch
from transformers import Trainer, TrainerCallback, TrainingArguments

import traceml
from tests.integrations.left_behind import digest, state_of
from traceml.integrations.huggingface import TraceMLCallback, TraceMLTrainer
from traceml.recorder.current_recorder import is_enabled

ROWS = 88
SAVE_S = 0.03


class Data(torch.utils.data.Dataset[Any]):
    """Rows that may take their time."""

    def __init__(self, rows: int, wait_s: float = 0.0) -> None:
        self.rows, self.wait_s = rows, wait_s

    def __len__(self) -> int:
        return self.rows

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        time.sleep(self.wait_s) if self.wait_s else None
        generator = torch.Generator().manual_seed(index)
        return {"x": torch.randn(8, generator=generator), "labels": torch.tensor([float(index % 2)])}


class Model(torch.nn.Module):
    """A small one, with dropout, so that a changed random state shows."""

    def __init__(self) -> None:
        super().__init__()
        self.net = torch.nn.Sequential(torch.nn.Linear(8, 32), torch.nn.Dropout(0.1), torch.nn.Linear(32, 1))

    def forward(self, x: torch.Tensor, labels: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
        out = self.net(x)
        return {"loss": (out - labels).pow(2).mean(), "logits": out}


class Failing(TrainerCallback):
    """Ends a training by an exception."""

    def on_step_end(self, _args: Any, state: Any, *_: Any, **__: Any) -> None:
        if state.global_step == 5:
            raise ValueError("the user's own")


def trainer(kind: type[Trainer] = Trainer, *, rows: int = ROWS, wait_s: float = 0.0, **more: Any) -> Trainer:
    """Return a trainer of two epochs in steps of 8 rows, with evaluation and saving."""
    torch.manual_seed(0)
    given = {name: more.pop(name) for name in ("callbacks", "traceml_kwargs") if name in more}
    wanted = {
        "num_train_epochs": 2, "per_device_train_batch_size": 8, "logging_steps": 4, "use_cpu": True, "report_to": [],
        "save_strategy": "steps", "save_steps": 10, "eval_strategy": "epoch", "disable_tqdm": True, "seed": 3,
    }  # fmt: skip
    arguments = TrainingArguments(f"out-{time.monotonic_ns()}", **wanted | more)
    return kind(model=Model(), args=arguments, train_dataset=Data(rows, wait_s), eval_dataset=Data(24), **given)


def outcome(one: Trainer) -> dict[str, Any]:
    """Return what a training computed."""
    timed = ("runtime", "per_second")
    history = [{k: v for k, v in line.items() if not k.endswith(timed)} for line in one.state.log_history]
    return {"history": history, "weights": digest(one.model), "random": torch.rand(1).item()}


def alone() -> dict[str, Any]:
    """Every way to train, one after another in one process."""
    said: dict[str, Any] = {"left": []}
    one = trainer()
    for accumulation in (1, 4):
        plain = trainer(gradient_accumulation_steps=accumulation)
        plain.train()
        expected = outcome(plain)
        one = trainer(gradient_accumulation_steps=accumulation, callbacks=[TraceMLCallback(report=False)])
        before = state_of()
        one.train()
        said[f"same {accumulation}"] = outcome(one) == expected
        said["left"] += changed(before)

    said["history"] = list(one.state.log_history)
    one.evaluate()
    one.predict(Data(8))
    said["running after predict"] = is_enabled()

    failing = trainer(callbacks=[TraceMLCallback(report=False), Failing()])
    before = state_of()
    try:
        failing.train()
    except ValueError as error:
        said["error"] = str(error)

    said["left"] += changed(before)
    said["same after a resume"] = resumed(Trainer) == resumed(TraceMLTrainer, traceml_kwargs={"report": False})
    wrapped = hasattr(Trainer.train, "_traceml_original")
    del one, failing, plain
    gc.collect()
    said["train is put back"] = wrapped and not hasattr(Trainer.train, "_traceml_original")
    trainer(rows=320, wait_s=0.006, save_strategy="no", report_to="traceml", run_name="by-name").train()
    return said


def resumed(kind: type[Trainer], **more: Any) -> dict[str, Any]:
    """Train ten steps, and then the rest from the checkpoint."""
    one = trainer(kind, max_steps=10, **more)
    one.train()
    one.args.max_steps = 30
    one.train(resume_from_checkpoint=True)
    return outcome(one)


def changed(before: dict[str, Any]) -> list[str]:
    """Return what is not as it was."""
    after = state_of()
    return [name for name, value in before.items() if after.get(name) != value]


class SlowToSave(Trainer):
    """Saves more than torch writes."""

    def save_model(self, *args: Any, **kwargs: Any) -> None:
        time.sleep(SAVE_S)
        super().save_model(*args, **kwargs)


def by_init() -> dict[str, Any]:
    """Resume a training without a callback of ours, in a script that traces itself."""
    one = trainer(SlowToSave, max_steps=10)
    one.train()
    traceml.init(local=True, run_name="by-init")
    one.args.max_steps = 30
    one.train(resume_from_checkpoint=True)
    traceml.shutdown()
    return {"steps": one.state.global_step}


def ranks() -> dict[str, Any]:
    """One rank of several."""
    for _ in range(2):  # the second begins on one rank while the other still shows the first's verdict
        one = trainer(rows=ROWS * 2, callbacks=[TraceMLCallback()])
        one.train()
        said = outcome(one)

    plain = trainer(rows=ROWS * 2)
    plain.train()
    same = said == outcome(plain)
    return {"same": same} if int(os.environ["RANK"]) == 0 else {}


if __name__ == "__main__":
    torch.set_num_threads(1)
    found = {"alone": alone, "by_init": by_init, "ranks": ranks}[sys.argv[1]]()
    if found:
        print(json.dumps(found), flush=True)
