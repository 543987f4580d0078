"""Hooks in C are, to the interpreter, to torch and to users, functions that time a call."""

from __future__ import annotations

import copy
import ctypes
import dis
import gc
import importlib
import inspect
import logging
import os
import pickle
import sys
import traceback
import warnings
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import nn

from tests.instrument.conftest import Traced
from traceml.database.schema import Phase
from traceml.instrument import forward
from traceml.instrument.clock_implementations import CellClock
from traceml.instrument.native import extension as native


@pytest.fixture
def form(monkeypatch: pytest.MonkeyPatch) -> str:
    """Only hooks in C."""
    monkeypatch.setenv("TRACEML_NATIVE", "1")
    if native.extension() is None:
        pytest.skip("the hooks in C are not built")

    return "native"


def made(width: int = 4) -> tuple[nn.Module, torch.optim.Optimizer]:
    model = nn.Linear(width, 1)
    return model, torch.optim.SGD(model.parameters(), lr=0.01)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> None:
    x = torch.randn(2, 4)
    for _ in range(steps):
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()


def test_they_are_in_use(traced: Traced) -> None:
    """The four functions of a loop are hooks in C, whose faces for dynamo are Python functions."""
    model, _ = made()
    hook_type = native.extension().Hook

    iterator = torch.utils.data.dataloader._BaseDataLoaderIter
    hooks = (model.__dict__["_compiled_call_impl"], torch.autograd.backward, torch.optim.SGD.step, iterator.__next__)
    assert [type(hook) for hook in hooks] == [hook_type] * 4
    assert inspect.isfunction(hook_type.__dict__["__call__"])
    assert inspect.isfunction(hook_type.__dict__["__get__"])


_READING = ("TorchHooks._read_backward", "LossReader.", "Ring.", "DividedStep.step")  # of a loss


@pytest.mark.parametrize("loss_mask", [0, 15, 1023])
def test_calls_reach_the_code_in_c(traced: Traced, loss_mask: int) -> None:
    """Once a loop is known, the interpreter calls no function of ours in Python, and no face, but to read a loss."""
    model, optimizer = made()
    train(model, optimizer, 70)
    traced.instrumentation.clock.loss_mask = loss_mask  # else the pace of the steps decides which losses are read
    called = []

    def on_event(frame: Any, event: str, _argument: Any) -> None:
        if event == "call" and "traceml" in frame.f_code.co_filename:
            called.append(frame.f_code.co_qualname)

    sys.setprofile(on_event)
    try:
        train(model, optimizer, 20)
    finally:
        sys.setprofile(None)

    assert {name for name in called if not name.startswith(_READING)} == set()
    assert ("LossReader.read" in called) is (loss_mask < 1023)


def test_a_forward_inside_another_stays_in_c(traced: Traced, monkeypatch: pytest.MonkeyPatch) -> None:
    """As that of a model which is timed, and was compiled afterwards: it is a part of the outer one."""
    model, optimizer = made()
    outer = nn.Sequential(model, nn.ReLU())
    traced.instrumentation.trace_step(model=outer)
    assert all("_compiled_call_impl" in vars(module) for module in (model, outer))
    slow = []
    monkeypatch.setattr(forward, "_begin", lambda *_: slow.append(True))

    train(outer, optimizer, 4)

    assert not slow
    assert all(row["forward_ns"] > 0 for row in traced.finish())


@pytest.mark.parametrize("is_known", [True, False])
def test_gradients_are_asked_for(traced: Traced, monkeypatch: pytest.MonkeyPatch, is_known: bool) -> None:
    """By torch's function in C, or where there is none, by that in Python: a call without them begins no step."""
    if not is_known:
        monkeypatch.setattr(ctypes, "CDLL", missing_library)

    model, optimizer = made()
    train(model, optimizer, 3)
    model.eval()
    with torch.no_grad():
        for _ in range(4):
            model(torch.ones(3, 4))

    model.train()
    train(model, optimizer, 3)

    rows = traced.finish()
    assert len(rows) == 6
    assert [row["samples"] for row in rows] == [2] * 6
    assert len(traced.table("evals")) == 1


def missing_library(name: str, **_: object) -> None:
    raise OSError(name)


def test_they_look_like_the_functions_that_they_time(traced: Traced) -> None:
    """Name, documentation, signature and source are those of the original."""
    _, optimizer = made()
    step = torch.optim.SGD.step

    assert (step.__name__, step.__qualname__, step.__module__) == ("step", "SGD.step", "torch.optim.sgd")
    assert str(inspect.signature(step)) == "(self, closure=None)"
    assert str(inspect.signature(optimizer.step)) == "(closure=None)"
    assert "grad_tensors" in inspect.signature(torch.autograd.backward).parameters
    assert inspect.getfullargspec(torch.autograd.backward).args[:2] == ["tensors", "grad_tensors"]
    assert "def backward" in inspect.getsource(torch.autograd.backward)
    assert step.__doc__ == inspect.unwrap(step).__doc__


def test_they_copy_and_pickle_by_name(traced: Traced) -> None:
    """A function stays the same object; the slot of a module is empty in the copy."""
    model, _ = made()

    for function in (torch.optim.SGD.step, torch.autograd.backward):
        assert copy.deepcopy(function) is copy.copy(function) is pickle.loads(pickle.dumps(function)) is function

    timer = model.__dict__["_compiled_call_impl"]
    assert copy.deepcopy(timer) is None
    assert pickle.loads(pickle.dumps(timer)) is None


def test_the_interpreter_adapts_to_them(traced: Traced) -> None:
    """A loop finds `optimizer.step` as fast as the method that the hook replaced: the type cannot change."""

    class Fresh(torch.optim.SGD):
        """A class none of whose instances was given a `step` of its own, as schedulers do."""

    model, _ = made()
    optimizer = Fresh(model.parameters(), lr=0.1)
    train(model, optimizer, 1)

    def loop() -> None:
        for _ in range(2000):  # Python 3.14 tries a lookup again only after many
            optimizer.step()

    loop()
    lookups = [each.opname for each in dis.get_instructions(loop, adaptive=True) if each.argval == "step"]
    assert len(lookups) == 1
    assert "METHOD_WITH_VALUES" in lookups[0]


def test_user_phases_run_no_python(traced: Traced) -> None:
    """Begin and end of a phase call no function in Python, and leave an exception as it is."""
    model, optimizer = made()
    train(model, optimizer, 2)
    phase = traced.instrumentation.phase("augment")
    error, caught = ValueError("of the user"), None
    frames: list[str] = []

    sys.setprofile(lambda frame, event, _: frames.append(frame.f_code.co_name) if event == "call" else None)
    try:
        with phase, phase:
            raise error
    except ValueError as passed:
        caught = passed
    finally:
        sys.setprofile(None)

    assert caught is error
    assert frames == []
    assert traced.flight.open_slots[Phase.USER] == 0


@pytest.mark.parametrize("first", ["scheduler", "tracing"])
def test_schedulers_keep_steps_timed(tmp_path: Path, form: str, first: str) -> None:
    """A scheduler calls `__get__` of the class's step by its name: each step has its row, and no warning comes."""
    from traceml.database.flight.flight import FlightFile
    from traceml.instrument import install

    gc.collect()
    model, optimizer = made()
    if first == "scheduler":
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 5)

    flight = FlightFile.create(tmp_path, {})
    instrumentation = install(flight)
    try:
        if first == "tracing":
            scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 5)

        with warnings.catch_warnings():
            warnings.simplefilter("error")
            for _ in range(12):
                train(model, optimizer, 1)
                scheduler.step()

        instrumentation.close_open_step()
        assert flight.ring("steps").appended == 12
    finally:
        instrumentation.uninstall()
        flight.close(unlink=True)


class Wide(nn.Module):
    """A model with many arguments."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))

    def forward(self, *args: torch.Tensor, **kwargs: torch.Tensor) -> torch.Tensor:
        return self.weight * (sum(args) + sum(value * int(name[1:]) for name, value in kwargs.items()))


@pytest.mark.parametrize("count", [0, 1, 7, 8, 9, 40])
def test_arguments_arrive(traced: Traced, count: int) -> None:
    """Any number of positional and named arguments."""
    model = Wide()
    torch.optim.SGD(model.parameters(), lr=0.1)
    positional = [torch.tensor(float(i)) for i in range(count)]
    named = {f"k{i}": torch.tensor(float(i)) for i in range(count + 1)}

    for _ in range(3):
        assert model(*positional, **named).item() == sum(range(count)) + sum(i * i for i in range(count + 1))


def test_arguments_by_name(traced: Traced) -> None:
    """`tensors` and `self` may be given by name; what the original refuses is refused in its words."""
    model, optimizer = made()
    torch.autograd.backward(tensors=model(torch.ones(2, 4)).sum())
    torch.optim.SGD.step(self=optimizer)

    with pytest.raises(TypeError, match="nonsense"):
        torch.autograd.backward(model(torch.ones(2, 4)).sum(), nonsense=1)
    with pytest.raises(TypeError, match="tensors"):
        torch.autograd.backward()


def test_errors_of_training_show_no_frame_of_ours(traced: Traced) -> None:
    """The traceback of a failing forward has the user's frames and torch's."""
    model, optimizer = made()
    train(model, optimizer, 3)
    with pytest.raises(RuntimeError, match="shapes") as caught:
        model(torch.randn(2, 5))

    assert not [frame for frame in traceback.extract_tb(caught.tb) if "traceml/instrument" in frame.filename]
    assert traced.instrumentation.clock.current == 8


def first_batch(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    next(iter(torch.utils.data.DataLoader([torch.ones(4)])))


@torch.no_grad()
def evaluate(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    model(torch.ones(2, 4))


def two_steps(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    train(model, optimizer, 2)


@pytest.mark.parametrize(
    ("rule", "action"), [("boundary", first_batch), ("forward_begins", evaluate), ("commit_slow", two_steps)]
)
def test_interrupts_pass_through(traced: Traced, monkeypatch: pytest.MonkeyPatch, rule: str, action: Any) -> None:
    """Ctrl-C in a rule of ours ends the training like everywhere else, and is no error of ours."""

    def interrupted(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    model, optimizer = made()
    clock = traced.instrumentation.clock
    train(model, optimizer, 3)
    monkeypatch.setattr(type(clock), rule, interrupted)
    clock.needs_slow_commit = True
    with pytest.raises(KeyboardInterrupt):
        action(model, optimizer)

    assert clock.errors == 0


@pytest.mark.process
def test_a_forked_child_leaves_the_rows_alone(traced: Traced) -> None:
    """Its thread has the parent's number, and the memory is shared: it must not write."""
    model, optimizer = made()
    train(model, optimizer, 5)
    rows, slots = traced.flight.ring("steps").appended, list(traced.flight.open_slots)
    pid = os.fork()
    if not pid:
        traced.instrumentation.clock.stop()  # as the recorder does after a fork
        train(model, optimizer, 3)
        os._exit(0)

    assert os.waitpid(pid, 0)[1] == 0
    assert traced.flight.ring("steps").appended == rows
    assert list(traced.flight.open_slots) == slots


def test_a_step_keeps_no_memory(traced: Traced) -> None:
    """Neither objects nor references are left of thousands of steps."""
    model, optimizer = made()
    train(model, optimizer, 200)
    watched = (None, model, optimizer, traced.instrumentation.clock, torch.optim.SGD.step)
    gc.collect()
    blocks, references = sys.getallocatedblocks(), [sys.getrefcount(each) for each in watched]

    train(model, optimizer, 3000)

    gc.collect()
    assert sys.getallocatedblocks() - blocks < 500
    assert max(now - before for now, before in zip(map(sys.getrefcount, watched), references, strict=True)) < 500


def test_clocks_and_hooks_are_collected(traced: Traced) -> None:
    """A clock and hooks that refer to each other are garbage together."""
    hook_type, fields_type = native.extension().Hook, native.extension().HotFields
    gc.collect()

    def count() -> int:
        return sum(isinstance(each, hook_type | fields_type) for each in gc.get_objects())

    before = count()
    for _ in range(10):
        fields = fields_type()
        hook = hook_type(fields, 4, print, print)
        fields.batch = hook.me = hook

    del fields, hook
    gc.collect()
    assert count() == before


def test_wrong_memory_is_refused() -> None:
    """A ring that is not in its memory is an error, not a write elsewhere; a hook needs what its phase uses."""
    loaded = native.extension()
    if loaded is None:
        pytest.skip("the hooks in C are not built")

    words = memoryview(bytearray(8 * 32)).cast("q")
    rest = ((65535, 0, 63, 1 << 32, 0), (1, 2, 3), lambda: ())
    for offset, mask, slot in ((0, 7, 0), (0, 0, 32), (0, 0, -1), (-8, 0, 0), (200, 0, 0)):
        with pytest.raises(ValueError, match="does not fit"):
            loaded.HotFields().connect(words, (words, offset, mask, words, slot), *rest)

    with pytest.raises(ValueError, match="does not fit"):
        loaded.HotFields().connect(words[:10], (words, 0, 0, words, 0), *rest)
    with pytest.raises(BufferError):
        loaded.HotFields().connect(bytes(256), (words, 0, 0, words, 0), *rest)
    with pytest.raises(TypeError):
        loaded.Hook(object(), 4, print, print)
    for phase in (0, 2, 3, 7, 99):
        with pytest.raises(ValueError, match=f"no hook for phase {phase}"):
            loaded.Hook(loaded.HotFields(), phase, print, print)


def _missing(_name: str) -> ModuleType:
    raise ImportError("no such file")


def _other_version(_name: str) -> ModuleType:
    module = ModuleType("other")
    module.__file__, module.LAYOUT = "other.so", "PHASE_FORWARD=1"
    return module


def _without_faces(_name: str) -> ModuleType:
    """A build whose hooks are called by their Python face."""

    class Hook:
        __call__: Any

        def __init__(self, *_: Any) -> None: ...

    real = importlib.import_module("traceml.instrument.native._hot_path")
    module = ModuleType("faceless")
    module.LAYOUT, module.HotFields, module.Hook = real.LAYOUT, real.HotFields, Hook
    return module


@pytest.mark.parametrize("load", [_missing, _other_version, _without_faces])
def test_a_library_that_does_not_fit_is_not_used(
    form: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, load: Any
) -> None:
    """Python's hooks are used instead, with a warning where an installation is mixed up."""
    native._load.cache_clear()
    monkeypatch.setattr(native, "import_module", load)
    try:
        with caplog.at_level(logging.WARNING, "traceml"):
            assert native.extension() is None
    finally:
        monkeypatch.undo()
        native._load.cache_clear()

    assert bool(caplog.records) == (load is _other_version)


def test_free_threaded_python_has_hooks_in_python(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """They are told of once, and the extension is not loaded: the stable ABI does not cover such a Python."""
    native._load.cache_clear()
    monkeypatch.setattr(sys, "abiflags", "t")
    try:
        with caplog.at_level(logging.WARNING, "traceml"):
            assert (native.extension(), native.extension()) == (None, None)
    finally:
        monkeypatch.undo()
        native._load.cache_clear()

    assert [record.getMessage()[:31] for record in caplog.records] == ["this Python is free-threaded: t"]
    assert native.extension() is not None
    assert len(caplog.records) == 1


def test_it_can_be_forbidden(monkeypatch: pytest.MonkeyPatch, traced: Traced) -> None:
    """With TRACEML_NATIVE=0 the clock is the one in Python."""
    from traceml.instrument.clock_implementations import new_clock

    monkeypatch.setenv("TRACEML_NATIVE", "0")

    assert isinstance(new_clock(traced.flight, traced.instrumentation.events), CellClock)


def test_what_is_forbidden_is_not_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    """With TRACEML_NATIVE=0 nothing opens the library, as its user may have a reason; dynamo needs no faces then."""
    opened: list[str] = []
    monkeypatch.setenv("TRACEML_NATIVE", "0")
    monkeypatch.setattr(native, "import_module", opened.append)
    native._load.cache_clear()
    try:
        assert native.extension() is None
        native.show_torch()
    finally:
        monkeypatch.undo()
        native._load.cache_clear()

    assert opened == []
    assert native.extension() is not None
