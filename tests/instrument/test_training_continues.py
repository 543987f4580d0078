"""Nothing of ours comes through into training: whatever raises, the losses are the same to the last bit."""

from __future__ import annotations

import gc
import io
import logging
import random
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from itertools import count
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import traceml.instrument
from tests.instrument.clocks import use_clock
from tests.instrument.conftest import FEW_ROWS
from tests.instrument.fake_cuda import FakeCuda, FakeEvent
from traceml.database.flight.flight import FlightFile
from traceml.fail_open import failures
from traceml.instrument import (
    Instrumentation,
    clock_implementations,
    divided_step,
    install,
    phase_timer,
)
from traceml.instrument.maintenance import overhead
from traceml.instrument.native.extension import extension

_FOLDER = str(Path(traceml.instrument.__file__).parent)
# Functions that call the user's code, or that user and torch call: they catch what the others raise.
_GUARDS = frozenset(
    {
        "DeviceTimes.drain",
        "ForwardTimer.__call__",
        "ModuleDiscovery.watch.<locals>.on_registration",
        "Guard.__call__",
        "DeviceTimes.fail",
        "Instrumentation.phase",
        "SaveLog.add_nested",
        "SaveLog.end",
        "PhaseTimer.cancel",
        "PhaseTimer.enter",
        "PhaseTimer.fail",
        "PhaseTimer.leave",
        "PhaseTimer.stop",
        "DividedStep.workers_ended",
        "CellClock.enter_user",
        "CellClock.leave_user",
        "CellField.__get__",  # a field of the clock, which is a member in C
        "CellField.__set__",
        "CheckpointPatches._begin",
        "guarded.<locals>._guarded",
        "StepBlock.__enter__",
        "StepBlock.__exit__",
        "UserPhase.__enter__",
        "UserPhase.__exit__",
        "_TracedIterator.__next__",
        "_fail_open.<locals>.call",
        "LoaderToken.follow.<locals>.leave",
        "StepClock.loader_left",
        "_count_own_step",
        "_differentiates_parameters",
        "_measure_own.<locals>.finished",
        "_measure_own.<locals>.queue",
        "_note_skip",
        "_restore_own_step",
        "_timed_iter.<locals>.follow",
        "_timed_iter.<locals>.token_of",
        "timed_wait.<locals>.begin",
        "timed_wait.<locals>.end",
    }
)
_GUARD_NAMES = frozenset({"_begin", "_end", "_nested_call", "_slow_path", "<genexpr>", "<lambda>"})
_OUTER = frozenset({"compile_in_place", "inner", "original", "original_iter", "original_next", "timed"})


class Injected(Exception):
    """An error of ours."""


@pytest.fixture(autouse=True)
def unlogged(monkeypatch: pytest.MonkeyPatch) -> None:
    """Log no error: pytest would keep each with its frames, so the models of all trainings, which are searched."""
    monkeypatch.setattr(logging.getLogger("traceml"), "disabled", True)


@pytest.fixture(scope="module")
def plain() -> Iterator[list[float]]:
    """Losses without tracing, on one compute thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    expected = losses(None)
    gc.collect()
    gc.freeze()  # searches for models are fast then
    yield expected

    torch.set_num_threads(threads)


def losses(traced: Instrumentation | None, at_moment: Callable[[int], object] = lambda _: None) -> list[float]:
    """Train in a loop that meets most hooks; return the losses.

    Args:
        traced: the hooks, if there are any.
        at_moment: called at the start and before each batch with the number of such calls before.
    """
    moments = count()
    at_moment(next(moments))
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    scaler = torch.amp.GradScaler("cpu")
    found = []
    for epoch in range(2):
        for index, (x,) in enumerate(DataLoader(TensorDataset(torch.randn(24, 4)), batch_size=2, shuffle=True)):
            at_moment(next(moments))
            x.to("meta")
            loss = model(x).square().mean()
            if epoch:
                scaler.scale(loss).backward()
                scaler.step(optimizer)
                scaler.update()
            elif index % 2:
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
            else:
                (loss / 2).backward()

            if traced is not None:
                with traced.phase("log"):
                    if index % 3 == 0:  # saving takes as long as all else
                        torch.save(model.state_dict(), io.BytesIO())

            found.append(loss.item())

        at_moment(next(moments))
        model.eval()
        with torch.no_grad():
            found += [model(x).sum().item() for (x,) in DataLoader(TensorDataset(torch.randn(4, 4)))]

            found += [model(torch.ones(1, 4)).item() for _ in range(2)]

        model.train()

    optimizer = torch.optim.AdamW(model.parameters(), fused=True)  # a tenth of the time of the default
    (fixed,) = next(iter(DataLoader(TensorDataset(torch.randn(4, 4)), batch_size=2)))
    for index in range(20):  # the hooks look for a device after 16 and 32 steps, of which there were 18 already
        at_moment(next(moments))
        if index == 16:
            with torch.no_grad():
                found.append(model.eval()(fixed).sum().item())

            model.train()

        optimizer.zero_grad()
        loss = model(fixed).square().mean()
        loss.backward()
        if index % 10 == 0:  # clipping takes longer than the update
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)

        optimizer.step()
        found.append(loss.item())

    found += [grad.sum().item() for grad in torch.autograd.grad(model(torch.ones(2, 4)).mean(), model.parameters())]
    return found


@contextmanager
def installed(folder: Path) -> Iterator[Instrumentation]:
    """Install the hooks, and remove them at the end. They look after themselves every 16 steps, in place of 64."""
    gc.collect()  # models and optimizers of the training before are garbage, and found otherwise
    flight = FlightFile.create(folder, {}, capacities=FEW_ROWS)
    with pytest.MonkeyPatch.context() as patch:
        for module in (clock_implementations, divided_step):
            patch.setattr(module, "MAINTENANCE_MASK", 15)

        instrumentation = install(flight, device_types=frozenset({"cuda", "meta"}))
        try:
            yield instrumentation
            instrumentation.close_open_step()
        finally:
            instrumentation.uninstall()
            flight.close(unlink=True)


def name_of(code: CodeType) -> str | None:
    """Return the name of a function of ours that may raise."""
    if not code.co_filename.startswith(_FOLDER) or code.co_qualname in _GUARDS or code.co_name in _GUARD_NAMES:
        return None

    mine = {*code.co_freevars, *code.co_varnames[: code.co_argcount]}
    return None if mine & _OUTER else f"{Path(code.co_filename).stem}.{code.co_qualname}"


@contextmanager
def watched(on_call: Callable[[str], None]) -> Iterator[None]:
    """Call a function at the start of each of ours that may raise."""
    names: dict[CodeType, str | None] = {}

    def on_event(frame: FrameType, event: str, _argument: Any) -> None:
        code = frame.f_code
        if event == "call" and code.co_filename.startswith(_FOLDER):
            if code not in names:
                names[code] = name_of(code)

            if (name := names[code]) is not None:
                on_call(name)

    sys.setprofile(on_event)
    try:
        yield
    finally:
        sys.setprofile(None)


def calls_of_ours(plain: list[float], folder: Path) -> dict[str, list[int]]:
    """Train; return the moment of each call of each function of ours that may raise."""
    now = [0]
    calls: defaultdict[str, list[int]] = defaultdict(list)
    with installed(folder) as traced, watched(lambda name: calls[name].append(now[0])):
        assert losses(traced, lambda moment: now.__setitem__(0, moment)) == plain

    return calls


@pytest.mark.long
@pytest.mark.timeout(400)  # 220 trainings, on a machine that runs other tests, too
def test_each_function_of_ours_may_raise(
    form: str, cuda: FakeCuda, plain: list[float], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An error in one call of any function during training is counted, and the losses are those without tracing.

    Each of them takes a training, so functions of both forms raise in the native one only.
    """
    calls_of_ours(plain, tmp_path)  # what it imports is called in the first training of a process only
    calls = calls_of_ours(plain, tmp_path)
    assert len(calls) > 80
    if form == "python":
        monkeypatch.setenv("TRACEML_NATIVE", "1")
        in_both = calls_of_ours(plain, tmp_path) if extension() is not None else {}
        monkeypatch.setenv("TRACEML_NATIVE", "0")
        calls = {name: moments for name, moments in calls.items() if name not in in_both}

    chosen = random.Random(0)
    raised, came_through, not_counted = [], [], []
    for name, moments in sorted(calls.items()):
        at, before = chosen.randrange(len(moments)), failures().get("instrument", 0)
        call = f"{name}, call {at + 1}"
        left = [at - moments.index(moments[at]) + 1]  # calls of that moment

        def raise_once(called: str, name: str = name, call: str = call, left: list[int] = left) -> None:
            left[0] -= called == name
            if left[0] == 0 and called == name:
                sys.setprofile(None)  # it has done its work, and costs more than the training
                raised.append(call)
                raise Injected(name)

        try:
            with installed(tmp_path) as traced, ExitStack() as watching:

                def watch(moment: int, begin: int = moments[at], on_call: Any = raise_once) -> None:
                    if moment == begin:
                        watching.enter_context(watched(on_call))

                assert losses(traced, watch) == plain
        except Injected:
            came_through.append(call)

        if raised[-1:] == [call] and failures().get("instrument", 0) == before:
            not_counted.append(call)

    assert came_through == not_counted == []
    assert len(raised) > 0.9 * len(calls)


class FailingSlots:
    """Words of the flight file that cannot always be written."""

    def __init__(self, slots: Any, failing: Callable[[Callable[..., Any]], Callable[..., Any]]) -> None:
        self._slots, self._set = slots, failing(slots.__setitem__)

    def __getitem__(self, index: int) -> int:
        return int(self._slots[index])

    def __setitem__(self, index: int, value: int) -> None:
        self._set(index, value)


@pytest.mark.parametrize("seed", [*range(12), *(pytest.param(seed, marks=pytest.mark.long) for seed in range(12, 24))])
def test_clocks_slots_and_events_may_raise(
    form: str, cuda: FakeCuda, plain: list[float], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    """At random moments a clock, a word of the flight file, or an event raises."""
    chance = random.Random(seed)
    share = 10 ** chance.uniform(-3.5, -1.5)
    raised, before = [], failures().get("instrument", 0)

    def failing(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            if chance.random() < share:
                raised.append(function)
                raise Injected(function)

            return function(*args, **kwargs)

        return call

    kinds = chance.choice([("clock",), ("slots",), ("device",), ("clock", "slots", "device")])
    if "clock" in kinds:
        now_ns = failing(phase_timer.monotonic_ns)
        use_clock(monkeypatch, now_ns, clock_implementations, overhead)

    if "device" in kinds:
        for name in ("record", "query", "elapsed_time"):
            monkeypatch.setattr(FakeEvent, name, failing(getattr(FakeEvent, name)))

        for name in ("is_capturing", "current", "stream", "event"):
            monkeypatch.setattr(FakeCuda, name, failing(getattr(FakeCuda, name)))

    with installed(tmp_path) as traced:
        clock = traced.clock
        if "slots" in kinds:
            clock.open_slots = FailingSlots(clock.open_slots, failing)

        assert losses(traced) == plain

    assert (failures().get("instrument", 0) > before) == bool(raised)
