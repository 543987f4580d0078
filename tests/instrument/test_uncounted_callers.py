"""Warnings of torch name the line of the user's code that called it, not one of ours."""

from __future__ import annotations

import functools
import logging
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from types import FunctionType
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import utils
from torch.utils.data import DataLoader, TensorDataset, dataloader

from traceml.database.flight.flight import FlightFile
from traceml.instrument import Instrumentation, importlib_bootstrap, install
from traceml.instrument.importlib_bootstrap import uncounted
from traceml.instrument.patches import Patches
from traceml.track.rank.frameworks.framework_capture import FrameworkCapture

_FOLDER = str(Path(importlib_bootstrap.__file__).parent)


@pytest.fixture
def start(tmp_path: Path, form: str):
    """Return a function that installs the hooks, which the end of the test removes."""
    installed: list[Instrumentation] = []

    def begin() -> Instrumentation:
        installed.append(install(FlightFile.create(tmp_path / "flight", {}), device_types=frozenset({"meta"})))
        return installed[0]

    yield begin
    for each in installed:
        each.uninstall()


def test_each_function_that_is_replaced_is_uncounted(monkeypatch, start):
    """Also those that are replaced later, as they are defined in the same places."""
    made: list[Any] = []
    replace = Patches.replace
    monkeypatch.setattr(Patches, "replace", lambda *args: (made.append(args[-1]), replace(*args))[1])
    start()
    torch.optim.SGD([nn.Parameter(torch.ones(1))])
    python = [each for each in made if isinstance(each, FunctionType)]

    assert len(python) > 30
    assert {each.__code__.co_filename for each in python if not each.__code__.co_filename.startswith(_FOLDER)} == set()
    assert all(Path(each.__code__.co_filename).exists() for each in python)


def warns(original: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function that warns its caller, its caller's caller, and so on."""

    @functools.wraps(original)
    def call(*args: Any, **kwargs: Any) -> Any:
        for level in (2, 3):
            warnings.warn(f"{original.__name__} warns", UserWarning, stacklevel=level)

        return original(*args, **kwargs)

    return call


class Net(nn.Module):
    """Model whose forward warns."""

    def __init__(self) -> None:
        super().__init__()
        self.line = nn.Linear(2, 1)

    def forward(self, x):
        """Warn the caller of the model, which is two of torch's functions above."""
        for level in (2, 3, 4):
            warnings.warn("as a model does", UserWarning, stacklevel=level)

        return self.line(x)


def train(folder: Path) -> None:
    """Call what is replaced, in all the ways that take other paths through our code."""
    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1)
    scheduler.step()  # warns: called before the optimizer
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
    for (x,) in DataLoader(TensorDataset(torch.ones(8, 2)), 2):
        optimizer.zero_grad()
        scaler.scale(model(x).sum()).backward()
        scaler.unscale_(optimizer)
        utils.clip_grad_norm_(model.parameters(), 1.0)
        scaler.step(optimizer)
        scaler.update()
        optimizer.step()
        optimizer.step(lambda x=x: model(x).sum())

    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        model(x)

    torch.autograd.grad(model(x).sum(), model.line.weight)
    torch.autograd.grad(model(x).sum(), list(model.parameters()))
    torch.utils.checkpoint.checkpoint_sequential(
        nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)), 1, x, use_reentrant=False
    )
    torch.save(model.state_dict(), folder / "model.pt")
    torch.load(folder / "model.pt")
    model.compile()
    x.to("meta")
    torch.distributed.init_process_group("gloo", init_method="file://" + str(folder / "store"), rank=0, world_size=1)
    torch.distributed.all_reduce(x)
    torch.distributed.all_reduce(x, async_op=True).wait()
    torch.distributed.destroy_process_group()
    (folder / "store").unlink(missing_ok=True)


REPLACED = [
    (torch, "save"),
    (torch, "load"),
    (torch.autograd, "backward"),
    (torch.autograd, "grad"),
    (torch.optim.SGD, "step"),
    (torch.optim.Optimizer, "__init__"),
    (torch.optim.Optimizer, "add_param_group"),
    (torch.amp.GradScaler, "scale"),
    (torch.amp.GradScaler, "unscale_"),
    (torch.amp.GradScaler, "step"),
    (torch.autocast, "__enter__"),
    (utils, "clip_grad_norm_"),
    (nn.Module, "compile"),
    (dataloader._BaseDataLoaderIter, "__init__"),
    (dataloader._BaseDataLoaderIter, "__next__"),
    (DataLoader, "__iter__"),
    (torch.utils.checkpoint, "checkpoint_sequential"),
    (torch.distributed, "all_reduce"),
    (torch.distributed.Work, "wait"),
    (torch.distributed, "init_process_group"),
    (torch.distributed, "destroy_process_group"),
    (torch.Tensor, "to"),
]


def test_warnings_have_the_line_of_the_caller(monkeypatch, tmp_path, start):
    """The same lines as without hooks; torch's own may be others, as it calls a timed model by another one."""
    for owner, name in REPLACED:
        known = getattr(owner, name)
        for module in (owner, torch.serialization, utils.clip_grad, torch.distributed.distributed_c10d):
            if getattr(module, name, None) is known:
                monkeypatch.setattr(module, name, warns(known))

    _warned(tmp_path)  # some things torch says once
    before = _warned(tmp_path)
    start()

    assert before == _warned(tmp_path)
    assert {f"{name} warns" for _, name in REPLACED} <= {message for _, _, message in before}


def _warned(folder: Path) -> list[tuple[str, int, str]]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        train(folder)

    of_test = Path(__file__).name
    places = [(Path(each.filename).name, each.lineno, str(each.message)[:40]) for each in caught]
    return [(file, line if file == of_test else 0, message) for file, line, message in places]


def test_logging_has_the_line_of_the_caller_too(caplog):
    """Frameworks log instead of warning."""

    @uncounted
    def wrapping():
        def call() -> None:
            inner()

        return call

    def inner() -> None:
        logging.getLogger("x").warning("as a framework does", stacklevel=2)

    with caplog.at_level("WARNING"):
        wrapping()()

    assert caplog.records[0].funcName == "test_logging_has_the_line_of_the_caller_too"


def test_a_trace_shows_the_lines_of_the_file():
    """The path leads to it, and is that of instrumentation."""

    @uncounted
    def fails() -> None:
        raise LookupError

    with pytest.raises(LookupError) as failed:
        fails()

    last = traceback.extract_tb(failed.value.__traceback__)[-1]
    assert last.line == "raise LookupError"
    assert last.filename.startswith(_FOLDER)
    assert uncounted(fails).__code__ is fails.__code__


def test_captures_of_frameworks_are_uncounted():
    """What they call warns, too."""
    assert FrameworkCapture.around.__code__.co_filename.startswith(_FOLDER)
