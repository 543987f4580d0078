"""Putting hooks in place and taking them away: nothing stays, nothing of ours reaches the script."""

from __future__ import annotations

import copy
import gc
import logging
import os
import pickle
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.modules import module
from torch.utils.data import DataLoader, TensorDataset, dataloader

from tests.instrument.conftest import Traced
from traceml.database.flight.flight import FlightFile
from traceml.instrument import install

ATTRIBUTES: list[tuple[Any, str]] = [
    (torch.autograd, "backward"),
    (torch, "save"),
    (torch.serialization, "save"),
    (torch.optim.SGD, "step"),
    (torch.optim.Adam, "step"),
    (torch.optim.Optimizer, "__init__"),
    (torch.optim.Optimizer, "add_param_group"),
    (torch.amp.GradScaler, "step"),
    (torch.autocast, "__enter__"),
    (nn.Module, "compile"),
    (nn.Module, "__setstate__"),
    (dataloader._BaseDataLoaderIter, "__next__"),
    (DataLoader, "__iter__"),
    (torch.distributed, "all_reduce"),
    (torch.distributed, "init_process_group"),
    (torch.distributed.distributed_c10d, "broadcast"),
    (torch.distributed.Work, "wait"),
    (torch.Tensor, "to"),
    (torch.Tensor, "cuda"),
]


def train(steps: int = 10) -> list[float]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Dropout(0.5), nn.Linear(8, 1))
    optimizer = torch.optim.Adam(model.parameters())
    losses = []
    for (x,) in DataLoader(TensorDataset(torch.randn(steps * 2, 4)), batch_size=2, shuffle=True):
        optimizer.zero_grad()
        loss = model(x).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())

    return losses


def test_uninstall_puts_every_original_back(tmp_path: Path) -> None:
    """Each replaced attribute is the very object that was there."""
    torch.optim.SGD([torch.zeros(1, requires_grad=True)])  # torch replaces `step` itself at the first instance
    torch.optim.Adam([torch.zeros(1, requires_grad=True)])
    attributes = [*ATTRIBUTES, (import_module("torch.distributed.checkpoint"), "save")]
    before = [vars(owner).get(name, "absent") for owner, name in attributes]
    meta_path = list(sys.meta_path)
    model = nn.Linear(2, 2)
    flight = FlightFile.create(tmp_path, {})

    instrumentation = install(flight, device_types=frozenset({"meta"}))
    train()
    torch.optim.SGD(model.parameters())
    replaced = [
        f"{owner}.{name}" for (owner, name), old in zip(attributes, before, strict=True) if vars(owner).get(name) is old
    ]
    instrumentation.uninstall()

    assert replaced == []
    assert [vars(owner).get(name, "absent") for owner, name in attributes] == before
    assert sys.meta_path == meta_path
    assert not module._global_parameter_registration_hooks
    assert not module._global_module_registration_hooks
    assert "_compiled_call_impl" not in vars(model)
    flight.close(unlink=True)


def test_a_tool_that_wrapped_a_hook_may_call_it_after_the_end(traced: Traced, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its function stays in place, and calls ours for iterators that are made later."""
    wrapped: Any = dataloader._BaseDataLoaderIter.__next__
    monkeypatch.setattr(dataloader._BaseDataLoaderIter, "__next__", lambda iterator: wrapped(iterator))

    traced.instrumentation.uninstall()

    assert len(list(DataLoader(TensorDataset(torch.randn(4, 2))))) == 4


def test_losses_are_equal_to_the_last_bit(traced: Traced) -> None:
    """Hooks change no number and no random draw."""
    with_hooks = train()
    traced.instrumentation.uninstall()

    assert with_hooks == train()


def test_installing_again_begins_anew(tmp_path: Path) -> None:
    """A second recorder in one process is on_registration of the same models."""
    for part in ("first", "second"):
        flight = FlightFile.create(tmp_path / part, {})
        instrumentation = install(flight)
        train(6)
        instrumentation.close_open_step()
        instrumentation.uninstall()

        assert (flight.ring("steps").appended, instrumentation.clock.errors) == (6, 0)
        flight.close(unlink=True)


def test_facts_are_reported_once(traced: Traced) -> None:
    """Loader, batch, model, its input and optimizer are described, and which loader is trained on, each once."""
    train()
    on_registration = {info["kind"]: info for info in traced.info}

    assert len(traced.info) == 6
    assert (on_registration["input"]["dimensions"], on_registration["input"]["tokens"]) == (2, False)
    assert on_registration["model"]["model"] == "Sequential"
    assert on_registration["model"]["parameters"] == 4 * 8 + 8 + 8 + 1
    assert (
        on_registration["loader"]["dataset"],
        on_registration["loader"]["in_memory"],
        on_registration["loader"]["length"],
    ) == (
        "TensorDataset",
        True,
        20,
    )
    assert on_registration["optimizer"]["optimizer"] == "Adam"


@pytest.mark.process
def test_hooks_in_a_forked_child_do_nothing(traced: Traced) -> None:
    """A child appends no row and opens no phase in what it shares with its parent."""
    train(3)
    rows, slots = traced.flight.ring("steps").appended, bytes(traced.flight.open_slots)
    child = os.fork()
    if not child:
        traced.instrumentation.clock.stop()
        train(5)
        os._exit(0)

    assert os.waitpid(child, 0)[1] == 0
    assert traced.flight.ring("steps").appended == rows
    assert bytes(traced.flight.open_slots) == slots


@pytest.mark.process
def test_loader_workers_do_not_count(traced: Traced) -> None:
    """With worker processes there is one step per batch, and waiting for them is input."""
    model = nn.Linear(4, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(2):
        for (x,) in DataLoader(TensorDataset(torch.randn(8, 4)), batch_size=2, num_workers=1):
            optimizer.zero_grad()
            model(x).sum().backward()
            optimizer.step()

    rows = traced.finish()
    assert len(rows) == 8
    assert all(row["input_wait_ns"] > 0 for row in rows)


def test_an_internal_error_is_said_once_and_switches_off(
    traced: Traced, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A defect of ours is counted and logged; the script goes on with the same numbers."""
    expected = train()

    def broken(*_: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(type(traced.instrumentation.clock), "boundary", broken)
    traced.instrumentation.uninstall()
    instrumentation = install(traced.flight)
    with caplog.at_level(logging.WARNING, logger="traceml"):
        assert train() == expected

    assert instrumentation.clock.errors == 1
    assert len(caplog.records) == 1
    instrumentation.uninstall()


def test_training_on_another_thread_is_followed(traced: Traced) -> None:
    """The thread that makes the first optimizer is the training thread: its first step is a whole one."""
    thread = threading.Thread(target=train)
    thread.start()
    thread.join()

    steps = traced.finish()
    assert len(steps) == 10
    assert all(row["input_wait_ns"] > 0 and row["forward_ns"] > 0 for row in steps)
    assert len(traced.table("epochs")) == 1


def test_training_with_an_optimizer_of_another_thread_is_followed(traced: Traced) -> None:
    """The thread that runs backward is the training thread, whoever made the optimizer."""
    model = nn.Linear(4, 1)
    thread = threading.Thread(target=lambda: optimizers.append(torch.optim.SGD(model.parameters(), lr=0.1)))
    optimizers: list[torch.optim.Optimizer] = []
    thread.start()
    thread.join()
    for _ in range(10):
        model(torch.randn(2, 4)).sum().backward()
        optimizers[0].step()

    assert len(traced.finish()) == 10


def test_a_step_that_raises_is_no_step(traced: Traced) -> None:
    """An optimizer's exception passes, its phase is closed, and later steps count."""
    model = nn.Linear(4, 1)

    class Failing(torch.optim.SGD):
        fails = False

        def step(self, closure: object = None) -> None:
            if self.fails:
                raise RuntimeError("out of memory")

            super().step()

    optimizer = Failing(model.parameters(), lr=0.1)
    for index in range(8):
        optimizer.fails = index % 4 == 3
        model(torch.randn(2, 4)).sum().backward()
        try:
            optimizer.step()
        except RuntimeError:
            assert traced.flight.open_slots[4] == 0

    assert len(traced.finish()) == 6


def test_saving_is_a_phase(traced: Traced, tmp_path: Path) -> None:
    """torch.save and distributed checkpoints are `checkpoint`, outside `other`."""
    model = nn.Linear(4, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for index in range(4):
        model(torch.randn(2, 4)).sum().backward()
        optimizer.step()
        if index == 1:
            torch.save(model.state_dict(), tmp_path / "model.pt")

    rows = traced.finish()
    assert [row["checkpoint_ns"] > 0 for row in rows] == [False, True, False, False]


def test_copies_to_a_device_are_h2d(tmp_path: Path) -> None:
    """A copy to an accelerator is `h2d`; a change of dtype is not."""
    flight = FlightFile.create(tmp_path, {})
    instrumentation = install(flight, device_types=frozenset({"meta"}))
    traced = Traced(flight, instrumentation, [], 0)
    model = nn.Linear(4, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for index in range(4):
        x = torch.randn(2, 4)
        model(x).sum().backward()
        optimizer.step()
        x.to(torch.float64)
        if index % 2:
            x.to("meta")

    instrumentation.close_open_step()
    instrumentation.uninstall()
    assert [row["h2d_ns"] > 0 for row in traced.steps()] == [False, True, False, True]
    flight.close(unlink=True)


SCRIPT = """
import sys
from pathlib import Path
from traceml.database.flight.flight import FlightFile
from traceml.instrument import install

flight = FlightFile.create(Path(sys.argv[1]), {})
instrumentation = install(flight)
assert "torch" not in sys.modules and "numpy" not in sys.modules

import torch

model = torch.nn.Linear(4, 1)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
for _ in range(5):
    model(torch.randn(2, 4)).sum().backward()
    optimizer.step()

import torch.distributed.checkpoint
assert torch.distributed.checkpoint.save.__wrapped__
assert type(torch.__spec__.loader).__name__ == "SourceFileLoader" and "exec_module" not in vars(torch.__loader__)
instrumentation.close_open_step()
assert instrumentation.clock.errors == 0
assert flight.ring("steps").appended == 5, flight.ring("steps").appended
instrumentation.uninstall()
"""


@pytest.mark.process
def test_torch_may_be_imported_later(tmp_path: Path) -> None:
    """Installed before torch, hooks are there as soon as the script imports it; nothing is imported for it."""
    done = subprocess.run(
        [sys.executable, "-W", "error::ImportWarning", "-c", SCRIPT, str(tmp_path)],
        capture_output=True,
        text=True,
        check=False,
    )

    assert done.returncode == 0, done.stderr


def test_overhead_is_measured_on_the_rank(traced: Traced) -> None:
    """After the first step the cost of the hooks is known, and plausible."""
    assert traced.instrumentation.hook_ns_per_step() == 0
    train(330)  # six measurements: the median leaves out one that was preempted

    assert 200 < traced.instrumentation.hook_ns_per_step() < 1_000_000


def test_a_model_copied_later_is_evaluated(traced: Traced) -> None:
    """Batches that go to a copy made during training (an average, the best so far) are evaluation."""
    model = nn.Linear(4, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    training, validation = DataLoader(TensorDataset(torch.randn(8, 4))), DataLoader(TensorDataset(torch.randn(3, 4)))
    for _ in range(2):
        for (x,) in training:
            optimizer.zero_grad()
            model(x).sum().backward()
            optimizer.step()

        best = copy.deepcopy(model)
        with torch.no_grad():
            for (x,) in validation:
                best(x)

    assert len(traced.finish()) == 16
    assert sum(row["batches"] for row in traced.table("evals")) == 6


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_that_train_are_found(traced: Traced, copied: Callable[[nn.Module], nn.Module]) -> None:
    """Each client of a federated training trains a copy of the model, for a few short steps."""
    shared = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 1))
    for _ in range(30):
        model = copied(shared)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
        for (x,) in DataLoader(TensorDataset(torch.randn(4, 4)), batch_size=2):
            optimizer.zero_grad()
            model(x).sum().backward()
            optimizer.step()

    rows = traced.finish()
    assert [row["forward_ns"] > 0 for row in rows] == [True] * 60


def test_models_of_many_trainings_are_found(traced: Traced) -> None:
    """Every fold's model is timed, however many there were, and none is kept alive."""
    refs = []
    for _ in range(30):
        model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 1))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
        refs.append(weakref.ref(model))
        for (x,) in DataLoader(TensorDataset(torch.randn(2, 4))):
            optimizer.zero_grad()
            model(x).sum().backward()
            optimizer.step()

    del model, optimizer
    gc.collect()
    rows = traced.finish()
    assert len(rows) == 60
    assert all(row["forward_ns"] for row in rows)
    assert not any(ref() for ref in refs)


def test_an_optimizer_with_a_scheduler_made_before(tmp_path: Path) -> None:
    """A scheduler's `step` on the optimizer, made before installing, is timed, and is back afterwards."""
    model = nn.Linear(4, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 2)
    own = vars(optimizer)["step"]
    flight = FlightFile.create(tmp_path, {})
    instrumentation = install(flight)
    for (x,) in DataLoader(TensorDataset(torch.randn(8, 4))):
        optimizer.zero_grad()
        model(x).sum().backward()
        optimizer.step()
        scheduler.step()

    instrumentation.close_open_step()
    steps, errors = instrumentation.clock.rows, instrumentation.clock.errors
    instrumentation.uninstall()
    flight.close(unlink=True)
    assert (steps, errors) == (8, 0)
    assert vars(optimizer)["step"] is own


def test_an_optimizer_keeps_its_fast_attributes(traced: Traced) -> None:
    """Nothing reads its `__dict__`: Python would make one, and find attributes more slowly from then on."""
    model = nn.Linear(4, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    for _ in range(3):
        model(torch.randn(2, 4)).sum().backward()
        optimizer.step()

    held = gc.get_referents(optimizer)  # its values, or the dictionary that has them
    assert not any(type(part) is dict and "param_groups" in part for part in held)
    assert any(part is optimizer.param_groups for part in held)
    assert len(traced.finish()) == 3


class Engine:
    """A framework's class, which calls parts of a model by itself."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def train_batch(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(x, self.model.weight).square().mean()

    def clip(self) -> None:
        time.sleep(0.002)

    def save(self) -> None:
        time.sleep(0.002)


def test_a_frameworks_own_calls_are_timed(traced: Traced) -> None:
    """Its training call is the forward, its saving a checkpoint, until all is undone; what it has not is left out."""
    originals = dict(vars(Engine))
    traced.instrumentation.frameworks.time_forward(Engine, "train_batch", lambda engine: engine.model)
    traced.instrumentation.frameworks.time_saving(Engine, "save")
    traced.instrumentation.frameworks.time_saving(Engine, "save")
    traced.instrumentation.frameworks.time_saving(Engine, "save_differently")
    traced.instrumentation.frameworks.time_update(Engine, "clip")
    engine = Engine(nn.Linear(4, 1))
    optimizer = torch.optim.SGD(engine.model.parameters(), lr=0.1)
    for x in torch.randn(3, 2, 4):
        engine.train_batch(x).backward()
        engine.clip()
        optimizer.step()
        engine.save()

    rows = traced.finish()
    assert len(rows) == 3
    assert all(row["forward_ns"] > 0 for row in rows)
    assert [row["optimizer_ns"] > 2_000_000 for row in rows] == [True] * 3, rows
    assert sum(row["checkpoint_ns"] for row in rows) > 6_000_000
    traced.instrumentation.uninstall()
    assert dict(vars(Engine)) == originals
