"""Device times from events, on devices whose streams are clocks: see `fake_cuda`."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tests.instrument.clocks import use_clock
from tests.instrument.conftest import FEW_ROWS, Traced
from tests.instrument.fake_cuda import FakeCuda, FakeEvent
from traceml.clock import monotonic_ns
from traceml.database.flight.flight import FlightFile
from traceml.database.schema import DEVICE_STEPS, STEPS, StepFlag
from traceml.diagnosis.intake import RowIntake
from traceml.diagnosis.kinds import Kind
from traceml.diagnosis.ruleset import diagnose
from traceml.fail_open import failures
from traceml.instrument import (
    device,
    install,
)
from traceml.instrument.open_step import detailed_steps

_MS = 1_000_000
_FIRST = 5  # by then the device is known; from here on all are measured


class Training:
    """A loop of one linear layer whose phases take device time: 5 ms forward, 5 ms backward, 1 ms optimizer.

    The CPU launches each phase in 10 us and waits for the device at the end of a step, as `loss.item()` does.
    """

    def __init__(self, cuda: FakeCuda, monkeypatch: pytest.MonkeyPatch) -> None:
        self.cuda = cuda
        cuda.tick_ms, cuda.cpu_ms = 0.0, 1.0
        use_clock(monkeypatch, lambda: round(cuda.cpu_ms * _MS), device)

        self.model = nn.Linear(4, 1)
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.1)
        self.x = torch.randn(2, 4)
        self.model.register_forward_hook(lambda *_: self._launch(5))
        self.optimizer.register_step_post_hook(lambda *_: self._launch(1))

    def step(self) -> None:
        self.forward().backward()
        self.optimizer.step()
        self.wait()

    def forward(self) -> torch.Tensor:
        loss = self.model(self.x).sum()
        loss.register_hook(lambda _: self._launch(5))
        return loss

    def wait(self) -> None:
        self.cuda.cpu_ms = max(self.cuda.cpu_ms, self.cuda.stream().now_ms)

    def copy(self, ms: float) -> None:
        """Copy a batch to the device on the current stream."""
        batch: Any = torch.zeros(1).as_subclass(Batch)
        batch.launch = lambda: self._launch(ms)
        batch.to("meta")

    def _launch(self, ms: float) -> None:
        self.cuda.cpu_ms += 0.01
        self.cuda.launch(ms)


class Batch(torch.Tensor):
    """Tensor that queues work where it is copied to a device; the meta device does not."""

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(function, "__name__", "") == "to":
            args[0].launch()

        return super().__torch_function__(function, types, args, kwargs or {})


@pytest.fixture
def traced(request: pytest.FixtureRequest, form: str, cuda: FakeCuda, tmp_path: Path) -> Iterator[Traced]:
    """Hooks on these devices; all steps are measured, unless the test has `short_steps`."""
    if "short_steps" not in request.fixturenames:
        request.getfixturevalue("monkeypatch").setattr(detailed_steps, "_FIRST", 10**6)

    gc.collect()  # models and optimizers of the test before are garbage, and found otherwise
    flight = FlightFile.create(tmp_path, {}, capacities=FEW_ROWS)
    instrumentation = install(flight, device_types=frozenset({"cuda", "meta"}))
    yield Traced(flight, instrumentation)

    instrumentation.uninstall()
    flight.close(unlink=True)


@pytest.fixture
def short_steps(form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A clock by which steps are short, so that one in sixteen is measured: on a busy machine they are long."""
    times = count(monotonic_ns(), 1000)
    use_clock(monkeypatch, times.__next__, device)


def train(steps: int, *, optimizer_on: Callable[[], Any] = ExitStack) -> None:
    model = nn.Linear(4, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    x = torch.randn(2, 4)
    for _ in range(steps):
        optimizer.zero_grad()
        model(x).sum().backward()
        with optimizer_on():
            optimizer.step()


def rows_of(traced: Traced) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Return the step rows and the device rows; each announced device row must have come."""
    rows = traced.finish()
    device_rows = traced.table("device_steps")
    assert [row["step"] for row in device_rows] == [row["step"] for row in rows if row["flags"] & StepFlag.DEVICE]
    return rows, device_rows


def measured(device_rows: list[dict[str, Any]]) -> list[int]:
    return [row["step"] for row in device_rows if row["step"] >= _FIRST]


def test_phases_have_device_time(traced: Traced) -> None:
    """Between two events the time is the first one's phase; own backward, of a group, ends at the engine's callback."""
    clock = traced.instrumentation.clock
    clock.is_grouped = clock.slow_commits = True
    train(9)
    _, device_rows = rows_of(traced)

    assert len(device_rows) >= 2
    for row in device_rows[1:]:
        assert row["forward_ns"] == row["optimizer_ns"] == 1_000_000
        assert (row["backward_ns"], row["backward_own_ns"]) == (2_000_000, 1_000_000)
        parts = row["h2d_ns"] + row["forward_ns"] + row["backward_ns"] + row["optimizer_ns"] + row["comm_ns"]
        assert parts <= row["total_ns"]


@pytest.mark.usefixtures("short_steps")
def test_nothing_is_read_before_it_is_complete(cuda: FakeCuda, traced: Traced) -> None:
    """While the device lags no row comes, and the events in flight are bounded."""
    cuda.reached_ms = 0.0
    train(1200)
    assert traced.table("device_steps") == []
    assert cuda.made < 64 * 16  # 13 for a long step

    cuda.reached_ms = 1e9
    traced.instrumentation.close_open_step()
    assert len(traced.table("device_steps")) == 64


@pytest.mark.usefixtures("short_steps")
def test_of_short_steps_one_in_sixteen_is_measured(cuda: FakeCuda, traced: Traced) -> None:
    """After the first ones. In the others the hooks ask the device for nothing."""
    train(100)
    before = cuda.calls
    train(8)  # 100 to 107, and the next one that is measured is 112
    in_between = cuda.calls - before
    train(92)
    _, device_rows = rows_of(traced)

    assert [row["step"] for row in device_rows if row["step"] > 20] == list(range(32, 200, 16))
    assert in_between == 0


@pytest.mark.parametrize(("step_ms", "interval"), [(50, 1), (15, 2), (7, 4), (2, 16)])
def test_longer_steps_are_measured_more_often(
    cuda: FakeCuda, traced: Traced, monkeypatch: pytest.MonkeyPatch, step_ms: int, interval: int
) -> None:
    """Measuring costs a step 0.1 ms on the host: it is done for 0.4 % of the time."""
    training = Training(cuda, monkeypatch)
    traced.instrumentation.clock.detailed.mean_ns = step_ms * _MS
    for _ in range(120):
        training.cuda.cpu_ms += step_ms - 11  # of which the device computes 11
        training.step()
        traced.instrumentation.clock.detailed.all_to = -1
        traced.instrumentation.clock.detailed.mean_ns = step_ms * _MS

    steps = [row["step"] for row in rows_of(traced)[1] if row["step"] > 64]
    assert steps == list(range(steps[0], 120, interval))


@pytest.mark.parametrize(("calls", "interval"), [(1, 1), (12, 2), (24, 4)])
def test_steps_whose_events_take_long_are_measured_less_often(
    cuda: FakeCuda, traced: Traced, monkeypatch: pytest.MonkeyPatch, calls: int, interval: int
) -> None:
    """As those of a policy that is called for each action: for 1 % of the time."""
    training = Training(cuda, monkeypatch)
    record = cuda.record

    def slow_record(event: FakeEvent, stream: Any) -> None:
        cuda.cpu_ms += 0.02
        record(event, stream)

    monkeypatch.setattr(cuda, "record", slow_record)
    for _ in range(200):
        for _ in range(calls - 1):
            with torch.no_grad():
                training.model(training.x)

        training.step()
        cuda.cpu_ms += 40 - cuda.cpu_ms % 40
        traced.instrumentation.clock.detailed.all_to = -1
        traced.instrumentation.clock.detailed.mean_ns = 40 * _MS

    steps = [row["step"] for row in rows_of(traced)[1] if row["step"] > 64]
    assert steps == list(range(steps[0], 200, interval))


def test_the_end_of_the_script_is_no_time_of_its_last_step(
    cuda: FakeCuda, traced: Traced, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a script does after its loop is in no step, on the device either."""
    training = Training(cuda, monkeypatch)
    for _ in range(40):
        training.step()

    cuda.cpu_ms += 10_000
    rows, device_rows = rows_of(traced)

    assert len(rows) == 40
    assert max(row["total_ns"] for row in device_rows) < 20 * _MS


def two_optimizers(steps: int) -> None:
    """Train two models in turns without a loader: each step is cut where it may end."""
    models = [nn.Linear(4, 1) for _ in range(2)]
    optimizers = [torch.optim.SGD(model.parameters(), lr=0.1) for model in models]
    for _ in range(steps):
        for model, own in zip(models, optimizers, strict=True):
            own.zero_grad()
            model(torch.randn(2, 4)).sum().backward()
            own.step()


@pytest.mark.parametrize("before", [0, 8, 1008])
@pytest.mark.parametrize("loop", [train, two_optimizers])
@pytest.mark.usefixtures("short_steps")
def test_a_resumed_training_is_measured_as_another(traced: Traced, loop: Callable[[int], None], before: int) -> None:
    """The first steps, and then each whose number is a multiple of 16, also where steps are cut."""
    traced.instrumentation.set_step(before)
    loop(100)
    traced.instrumentation.close_open_step()

    steps = [row["step"] for row in traced.table("device_steps")]
    assert steps[:16] == list(range(before + 1, before + 17))
    assert [step for step in steps if step > before + 20] == [
        step for step in range(before + 21, before + 98) if step % 16 == 0
    ]


@pytest.mark.usefixtures("short_steps")
def test_the_stated_cost_is_per_step(traced: Traced) -> None:
    """Also after the number of the next step was set."""
    train(100)
    device_times = traced.instrumentation.clock.device
    assert isinstance(device_times, device.DeviceTimes)
    assert device_times.ns_per_step > 0

    traced.instrumentation.set_step(100_000)
    train(20)
    assert device_times.ns_per_step > 0


def test_events_are_used_again(cuda: FakeCuda, traced: Traced) -> None:
    """A device that keeps up needs a handful of events for ever."""
    train(400)

    assert len(traced.table("device_steps")) >= 98
    assert cuda.made < 40


def test_a_graph_that_is_captured_is_left_alone(cuda: FakeCuda, traced: Traced) -> None:
    """During CUDA graph capture no event is recorded or asked."""
    train(8)
    before = cuda.made
    cuda.capturing = True
    train(8)

    assert cuda.made == before
    assert len(traced.finish()) == 16


@pytest.mark.usefixtures("short_steps")
def test_a_job_on_the_cpu_never_touches_cuda(cuda: FakeCuda, traced: Traced) -> None:
    """Until the script has initialized CUDA nothing is called; afterwards steps have device times."""
    cuda.initialized = False
    train(70)
    assert cuda.calls == 0
    assert traced.instrumentation.clock.device is None

    cuda.initialized = True
    train(70)
    _, device_rows = rows_of(traced)

    assert [row["step"] for row in device_rows] == list(range(130, 140))


def test_a_prefetch_on_another_stream(cuda: FakeCuda, traced: Traced, monkeypatch: pytest.MonkeyPatch) -> None:
    """A copy on a stream of its own, slower than the step, costs no row and has no device time."""
    training = Training(cuda, monkeypatch)
    copies = cuda.new_stream()
    for _ in range(40):
        with cuda.on_stream(copies):
            training.copy(30)

        training.step()

    rows, device_rows = rows_of(traced)

    assert len(rows) == 40
    assert measured(device_rows) == list(range(_FIRST, 40))
    assert {(row["h2d_ns"], row["forward_ns"]) for row in device_rows} == {(0, 5.01 * _MS)}


def test_steps_that_end_on_another_stream(cuda: FakeCuda, traced: Traced, monkeypatch: pytest.MonkeyPatch) -> None:
    """A prefetcher that asks the loader while its own stream is current: steps end on the training's stream."""
    training = Training(cuda, monkeypatch)
    copies = cuda.new_stream()
    batches = iter(traced.instrumentation.trace_data(range(40)))
    for _ in range(40):
        with cuda.on_stream(copies):
            next(batches)

        training.step()

    rows, device_rows = rows_of(traced)

    assert len(rows) == 40
    assert measured(device_rows) == list(range(_FIRST, 40))
    assert all(row["total_ns"] == pytest.approx(11 * _MS, rel=0.01) for row in device_rows)


@pytest.mark.parametrize("where", ["device", "stream"])
def test_an_optimizer_elsewhere(cuda: FakeCuda, traced: Traced, where: str) -> None:
    """A phase on another device or stream has no device time; the step and its other phases have."""
    failed = failures()
    stream = cuda.new_stream()
    train(60, optimizer_on=lambda: cuda.on_device(1) if where == "device" else cuda.on_stream(stream))
    rows, device_rows = rows_of(traced)

    assert len(rows) == 60
    assert len(device_rows) >= 13
    assert all(row["optimizer_ns"] == 0 and row["forward_ns"] == 1_000_000 for row in device_rows[1:])
    assert failures() == failed


def test_a_teacher_on_another_device(cuda: FakeCuda, traced: Traced, monkeypatch: pytest.MonkeyPatch) -> None:
    """A model that runs on a second device now and then costs no device row."""
    training = Training(cuda, monkeypatch)
    teacher = nn.Linear(4, 1)
    for step in range(60):
        if step % 10 == 9:
            with cuda.on_device(1), torch.no_grad():
                teacher(training.x)

        training.step()

    rows, device_rows = rows_of(traced)

    assert len(rows) == 60
    assert measured(device_rows) == list(range(_FIRST, 60))


@pytest.mark.parametrize("where", ["device", "stream"])
def test_training_that_moves(cuda: FakeCuda, traced: Traced, monkeypatch: pytest.MonkeyPatch, where: str) -> None:
    """When training goes on elsewhere, one step loses its device times, and those after it have theirs."""
    training = Training(cuda, monkeypatch)
    for _ in range(20):
        training.step()

    with cuda.on_device(1) if where == "device" else cuda.on_stream(cuda.new_stream()):
        for _ in range(20):
            training.step()

        rows, device_rows = rows_of(traced)

    assert len(rows) == 40
    assert measured(device_rows) == [step for step in range(_FIRST, 40) if step != 20]


@pytest.mark.parametrize("method", ["record", "query", "elapsed_time"])
def test_an_event_that_fails(cuda: FakeCuda, traced: Traced, monkeypatch: pytest.MonkeyPatch, method: str) -> None:
    """It costs its step the device row, it is counted, and the next step is measured."""
    training = Training(cuda, monkeypatch)
    before = failures().get("instrument", 0)
    for _ in range(10):
        training.step()

    with monkeypatch.context() as broken:
        broken.setattr(FakeEvent, method, _raise)
        training.step()

    for _ in range(10):
        training.step()

    rows = traced.finish()
    lost = 21 - _FIRST - len(measured(traced.table("device_steps")))
    assert len(rows) == 21
    assert 1 <= lost <= 2
    assert failures()["instrument"] > before


def _raise(*_: Any) -> Any:
    raise RuntimeError("CUDA error: unspecified launch failure")


def verdict_of(traced: Traced) -> tuple[list[Kind], float]:
    """Return the kinds of the findings, and the mean device time of copies as a share of the step."""
    _, device_rows = rows_of(traced)
    intake = RowIntake(128, 1)
    for table in (STEPS.name, DEVICE_STEPS.name):
        ring = traced.flight.ring(table)
        intake.add(table, 0, ring.read_from(0, ring.appended).data)

    intake.flush()
    window, facts = intake.snapshot(100)
    assert window.device
    share = sum(row["h2d_ns"] for row in device_rows) / sum(row["total_ns"] for row in device_rows)
    return [finding.kind for finding in diagnose(window, facts)], share


def test_hidden_copies_are_no_bottleneck(cuda: FakeCuda, traced: Traced, monkeypatch: pytest.MonkeyPatch) -> None:
    """3 ms of copies behind 10 ms of computing cost nothing."""
    training = Training(cuda, monkeypatch)
    copies = cuda.new_stream()
    for _ in range(60):
        with cuda.on_stream(copies):
            training.copy(3)

        training.step()

    kinds, share = verdict_of(traced)

    assert Kind.H2D_BOUND not in kinds
    assert share == 0


def test_copies_on_the_training_stream_are_a_bottleneck(
    cuda: FakeCuda, traced: Traced, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Copies that computing waits for, a quarter of the step, are reported."""
    training = Training(cuda, monkeypatch)
    for _ in range(60):
        training.copy(11 / 3)
        training.step()

    kinds, share = verdict_of(traced)

    assert kinds[0] is Kind.H2D_BOUND
    assert share == pytest.approx(0.25, abs=0.01)


def test_steps_that_are_cut(cuda: FakeCuda, traced: Traced, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two optimizers without a loader: a step ends where the last of them has stepped, and is measured to there."""
    training = Training(cuda, monkeypatch)
    critic = torch.optim.SGD(training.model.parameters(), lr=0.1)
    for _ in range(40):
        training.step()
        training.forward().backward()
        critic.step()
        training.wait()

    rows, device_rows = rows_of(traced)

    assert len(rows) == 40
    assert measured(device_rows) == list(range(_FIRST, 40))
    assert [row["backward_ns"] for row in device_rows] == pytest.approx([10 * _MS] * len(device_rows), rel=0.01)


def test_the_current_stream_of_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Device and stream are read by torch's private functions, and without them by the public ones."""

    class Stream:
        cuda_stream = 7

    for private in ("_cuda_getDevice", "_cuda_getCurrentRawStream"):
        monkeypatch.delattr(torch._C, private, raising=False)  # a build for CUDA has them

    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    monkeypatch.setattr(torch.cuda, "current_stream", Stream)
    assert device.CudaDevice().current() == (1, 7)

    monkeypatch.setattr(torch._C, "_cuda_getDevice", lambda: 2, raising=False)
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda index: 10 * index, raising=False)
    assert device.CudaDevice().current() == (2, 20)


def test_devices_that_torch_was_built_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """What torch was built for is known without asking a driver."""
    monkeypatch.setattr(torch.cuda, "is_available", _raise)
    monkeypatch.setattr(torch._C, "_has_cuda", True)
    monkeypatch.setattr(torch._C, "_get_privateuse1_backend_name", lambda: "npu")

    assert {"cuda", "npu"} <= device.built_devices()
