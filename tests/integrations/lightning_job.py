"""Trainings by Lightning, by either of its names: what they compute with us and without, and what is left behind."""

from __future__ import annotations

import copy
import json
import pickle
import sys
import time
from importlib import import_module
from typing import Any

import torch

import traceml
from tests.integrations.left_behind import digest, state_of
from traceml.integrations.lightning import TraceMLCallback, TraceMLLogger
from traceml.recorder.current_recorder import is_enabled

package: Any = import_module(sys.argv[2])
LOSS_S, SAVE_S = 0.005, 0.2


class Data(torch.utils.data.Dataset[Any]):
    """Rows that may take their time."""

    def __init__(self, rows: int, wait_s: float = 0.0) -> None:
        self.rows, self.wait_s = rows, wait_s

    def __len__(self) -> int:
        return self.rows

    def __getitem__(self, index: int) -> torch.Tensor:
        time.sleep(self.wait_s) if self.wait_s else None
        return torch.randn(8, generator=torch.Generator().manual_seed(index))


class Module(package.LightningModule):  # type: ignore[name-defined,misc]
    """A small one, with dropout, so that a changed random state shows. Its parts are called, never itself."""

    def __init__(self, *, fails: bool = False) -> None:
        super().__init__()
        self.net = torch.nn.Sequential(torch.nn.Linear(8, 32), torch.nn.Dropout(0.1), torch.nn.Linear(32, 1))
        self.fails = fails
        self.losses: list[float] = []

    def training_step(self, batch: torch.Tensor, index: int) -> torch.Tensor:
        if self.fails and index == 5:
            raise ValueError("the user's own")

        loss = self.net(batch).square().mean()
        self.losses.append(loss.item())
        self.log("loss", loss)
        return loss

    def validation_step(self, batch: torch.Tensor, index: int) -> None:
        self.log("val", self.net(batch).mean(), sync_dist=True)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=0.01)


class Manual(Module):
    """Two optimizers by hand: one step per batch all the same."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: torch.Tensor, index: int) -> None:
        for optimizer in self.optimizers():
            optimizer.zero_grad()
            loss = self.net(batch).square().mean()
            self.manual_backward(loss)
            optimizer.step()
            self.losses.append(loss.item())

    def configure_optimizers(self) -> list[torch.optim.Optimizer]:
        return [torch.optim.SGD(self.net[index].parameters(), lr=0.01) for index in (0, 2)]


def fit(module: Module, *, traced: bool, rows: int = 88, wait_s: float = 0.0, **more: Any) -> Any:
    """Train two epochs in steps of 8 rows, with validation and a checkpoint at the end of each."""
    torch.manual_seed(0)
    for layer in (module.net[0], module.net[2]):
        layer.reset_parameters()

    callbacks = [TraceMLCallback(report=bool(wait_s) or more.get("devices", 1) > 1)] if traced else []
    wanted = {
        "max_epochs": 2, "accelerator": "cpu", "logger": False, "enable_progress_bar": False, "log_every_n_steps": 4,
        "enable_model_summary": False, "default_root_dir": f"out-{time.monotonic_ns()}",
    }  # fmt: skip
    checkpoint = more.pop("ckpt_path", None)
    trainer = package.Trainer(callbacks=callbacks, **wanted | more)
    train = torch.utils.data.DataLoader(Data(rows, wait_s), batch_size=8)
    trainer.fit(module, train, torch.utils.data.DataLoader(Data(24), batch_size=8), ckpt_path=checkpoint)
    return trainer


def outcome(module: Module) -> dict[str, Any]:
    """Return what a training computed."""
    return {"losses": module.losses, "weights": digest(module), "random": torch.rand(1).item()}


def trained(kind: type[Module], *, traced: bool, **more: Any) -> dict[str, Any]:
    """Return what a training of a new module computed."""
    module = kind()
    fit(module, traced=traced, **more)
    return outcome(module)


def alone() -> dict[str, Any]:
    """Every way to train, one after another in one process."""
    said: dict[str, Any] = {}
    for kind in (torch.optim.SGD, torch.optim.AdamW):
        kind(Module().parameters())  # torch itself wraps `step` when the first one is made

    before = state_of()
    for name, kind, more in (
        ("plain", Module, {}),
        ("accumulating", Module, {"accumulate_grad_batches": 4, "gradient_clip_val": 0.5}),
        ("manual", Manual, {}),
    ):
        said[name] = trained(kind, traced=False, **more) == trained(kind, traced=True, **more)

    try:
        fit(Module(fails=True), traced=True)
    except ValueError as error:
        said["error"] = str(error)

    trainer = fit(Module(), traced=True)
    trainer.validate(Module(), torch.utils.data.DataLoader(Data(24), batch_size=8), verbose=False)
    said["running after validate"] = is_enabled()
    trainer.fit_loop.max_epochs = 3
    trainer.fit(Module(), torch.utils.data.DataLoader(Data(88), batch_size=8))
    for more in ({}, {"frameworks": []}):
        logger = TraceMLLogger(report=False, run_name="logged", **more)
        trainer = fit(Module(), traced=False, logger=logger)
        logger.log_metrics({"after": 1.0}, step=3)

    said["checkpoint"] = trainer.checkpoint_callback.best_model_path.split("/")[-4]
    trainer = fit(Module(), traced=True)
    trainer.save_checkpoint("resumed.ckpt")
    fit(Module(), traced=True, max_epochs=3, ckpt_path="resumed.ckpt")
    after = state_of()
    said["left"] = [name for name, value in before.items() if after.get(name) != value]
    return said


class SlowLoss(Module):
    """Works for a while outside of its layers."""

    def training_step(self, batch: torch.Tensor, index: int) -> torch.Tensor:
        time.sleep(LOSS_S)
        return super().training_step(batch, index)


def by_init() -> dict[str, Any]:
    """Resume a training without a callback or logger of ours, in a script that traces itself."""
    fit(SlowLoss(), traced=False).save_checkpoint("resumed.ckpt")
    traceml.init(local=True, run_name="by-init")
    trainer = fit(SlowLoss(), traced=False, max_epochs=3, ckpt_path="resumed.ckpt")
    traceml.shutdown()
    by_fabric()
    return {"steps": trainer.global_step}


def by_fabric() -> None:
    """Save once, in the user's own loop."""
    name = {"lightning.pytorch": "lightning.fabric", "pytorch_lightning": "lightning_fabric"}[package.__name__]

    class Slow(import_module(f"{name}.plugins.io.torch_io").TorchCheckpointIO):  # type: ignore[misc]
        """Writes for a while after `torch.save`."""

        def save_checkpoint(self, *args: Any, **more: Any) -> None:
            super().save_checkpoint(*args, **more)
            time.sleep(SAVE_S)

    traceml.init(local=True, run_name="by-fabric")
    fabric = import_module(name).Fabric(accelerator="cpu", devices=1, plugins=[Slow()])
    net = torch.nn.Linear(8, 1)
    model, optimizer = fabric.setup(net, torch.optim.SGD(net.parameters(), lr=0.01))
    for step in range(4):
        optimizer.zero_grad()
        fabric.backward(model(torch.ones(4, 8)).mean())
        optimizer.step()
        if step == 1:
            fabric.save("fabric.ckpt", {"model": model})

    traceml.shutdown()


def names() -> dict[str, Any]:
    """Whose callback it is."""
    import lightning.pytorch
    import pytorch_lightning

    class Own(TraceMLCallback):
        """A user's."""

    callback = TraceMLCallback(report=False, run_name="a-name")
    again = [callback, pickle.loads(pickle.dumps(callback)), copy.deepcopy(callback), Own()]
    bases = (lightning.pytorch.Callback, pytorch_lightning.Callback, TraceMLCallback)
    return {"both": [all(isinstance(each, base) for base in bases) for each in again], "key": callback.state_key}


def waiting() -> dict[str, Any]:
    """A training that waits for its data; and whose the callback is, before and after the other package is imported."""
    alone = TraceMLCallback()
    fit(Module(), traced=True, rows=320, wait_s=0.006)
    return {"bases": [base.__module__.split(".")[0] for base in type(alone).__bases__]} | names()


def ranks() -> dict[str, Any]:
    """Two ranks, of which Lightning starts the second by running this script again."""
    module = Module()
    trainer = fit(module, traced=True, rows=176, devices=2, strategy="ddp")
    return {"rank": trainer.global_rank, "steps": trainer.global_step} if trainer.is_global_zero else {}


if __name__ == "__main__":
    torch.set_num_threads(1)
    found = {"alone": alone, "by_init": by_init, "waiting": waiting, "ranks": ranks}[sys.argv[1]]()
    if found:
        print(json.dumps(found), flush=True)
