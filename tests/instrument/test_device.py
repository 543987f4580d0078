"""Device times from events, with a device that is a list: an event is complete when the test says so."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import nn

from tests.instrument.conftest import Traced
from traceml.database.flight import FlightFile
from traceml.database.schema import StepFlag
from traceml.instrument import device, install


class Device:
    """A stream on which each event takes its place one millisecond after the one before."""

    def __init__(self) -> None:
        self.now_ms = 0.0
        self.made = 0
        self.finished = True
        self.capturing = False

    def event(self) -> FakeEvent:
        self.made += 1
        return FakeEvent(self)


class FakeEvent:
    """torch.cuda.Event without a GPU."""

    def __init__(self, on: Device) -> None:
        self.on = on
        self.at_ms = -1.0

    def record(self) -> None:
        self.on.now_ms += 1
        self.at_ms = self.on.now_ms

    def query(self) -> bool:
        return self.on.finished

    def elapsed_time(self, end_event: FakeEvent) -> float:
        assert self.on.finished, "read before it was complete: this would wait"
        return end_event.at_ms - self.at_ms


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[tuple[Device, Traced]]:
    """Hooks with a device that is a list."""
    fake_device = Device()
    monkeypatch.setattr(device, "cuda_events", lambda: (fake_device.event, lambda: fake_device.capturing))
    flight = FlightFile.create(tmp_path, {})
    instrumentation = install(flight, device_types=frozenset({"cuda"}))
    yield fake_device, Traced(flight, instrumentation)

    instrumentation.uninstall()
    flight.close(unlink=True)


def train(steps: int) -> None:
    model = nn.Linear(4, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    x = torch.randn(2, 4)
    for _ in range(steps):
        optimizer.zero_grad()
        model(x).sum().backward()
        optimizer.step()


def test_phases_have_device_time(fake: tuple[Device, Traced]) -> None:
    """Between two events the time is the first one's phase; own backward ends at the engine's callback."""
    _, traced = fake
    train(9)
    rows = traced.finish()

    device_rows = traced.table("device_steps")
    assert [row["step"] for row in device_rows] == [row["step"] for row in rows if row["flags"] & StepFlag.DEVICE]
    assert len(device_rows) >= 2
    for row in device_rows[1:]:
        assert row["forward_ns"] == row["optimizer_ns"] == 1_000_000
        assert (row["backward_ns"], row["backward_own_ns"]) == (2_000_000, 1_000_000)
        parts = row["h2d_ns"] + row["forward_ns"] + row["backward_ns"] + row["optimizer_ns"] + row["comm_ns"]
        assert parts <= row["total_ns"]


def test_nothing_is_read_before_it_is_complete(fake: tuple[Device, Traced]) -> None:
    """While the device lags no row comes, and the events in flight are bounded."""
    fake_device, traced = fake
    fake_device.finished = False
    train(600)
    assert traced.table("device_steps") == []
    assert fake_device.made < 64 * 12

    fake_device.finished = True
    traced.instrumentation.close_open_step()
    assert len(traced.table("device_steps")) == 64


def test_events_are_used_again(fake: tuple[Device, Traced]) -> None:
    """A device that keeps up needs a handful of events for ever."""
    fake_device, _ = fake
    train(400)

    assert fake_device.made < 40


def test_a_graph_that_is_captured_is_left_alone(fake: tuple[Device, Traced]) -> None:
    """During CUDA graph capture no event is recorded or asked."""
    fake_device, traced = fake
    fake_device.capturing = True
    train(8)

    assert fake_device.made <= 1
    assert traced.table("device_steps") == []
    assert len(traced.finish()) == 8
