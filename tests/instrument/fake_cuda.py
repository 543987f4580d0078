"""torch.cuda without a GPU: streams are clocks, and events keep torch's rules."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field


@dataclass
class FakeStream:
    """A queue of work: `now_ms` is the time at which the device has done all of it."""

    device: int
    handle: int
    now_ms: float = 0.0


@dataclass
class FakeCuda:
    """Devices with streams; the `CudaDevice` of the tests.

    Attributes:
        cpu_ms: time on the CPU, before which no work is queued.
        tick_ms: work that is queued with each event.
        reached_ms: time that all devices have reached: later events are not complete.
        made: number of events.
        calls: number of calls that CUDA would see.
    """

    initialized: bool = True
    capturing: bool = False
    cpu_ms: float = 0.0
    tick_ms: float = 1.0
    reached_ms: float = math.inf
    made: int = 0
    calls: int = 0
    _device: int = 0
    _handles: Iterator[int] = field(default_factory=lambda: itertools.count(1))
    _current: dict[int, FakeStream] = field(default_factory=dict)

    def is_initialized(self) -> bool:
        return self.initialized

    def is_capturing(self) -> bool:
        self._called()
        return self.capturing

    def current(self) -> tuple[int, int]:
        self._called()
        return self._device, self.stream().handle

    def stream(self) -> FakeStream:
        # The default stream of every device has the handle 0, as in torch.
        return self._current.setdefault(self._device, FakeStream(self._device, 0))

    def event(self) -> FakeEvent:
        self._called()
        self.made += 1
        return FakeEvent(self)

    def record(self, event: FakeEvent, stream: FakeStream) -> None:
        event.record(stream)

    def query(self, event: FakeEvent) -> bool:
        return event.query()

    def elapsed_ms(self, event: FakeEvent, end_event: FakeEvent) -> float:
        return event.elapsed_time(end_event)

    def new_stream(self) -> FakeStream:
        """Make a stream of the current device, as `torch.cuda.Stream()`."""
        return FakeStream(self._device, next(self._handles))

    @contextmanager
    def on_stream(self, stream: FakeStream) -> Iterator[None]:
        """Make a stream current, as `torch.cuda.stream`."""
        before, self._current[stream.device] = self._current.get(stream.device), stream
        try:
            yield
        finally:
            self._current[stream.device] = before or FakeStream(stream.device, 0)

    @contextmanager
    def on_device(self, index: int) -> Iterator[None]:
        """Make a device current, as `torch.cuda.device`."""
        before, self._device = self._device, index
        try:
            yield
        finally:
            self._device = before

    def launch(self, ms: float) -> None:
        """Queue work on the current stream."""
        stream = self.stream()
        stream.now_ms = max(stream.now_ms, self.cpu_ms) + ms

    def _called(self) -> None:
        assert self.initialized, "this would initialize CUDA"
        self.calls += 1


class FakeEvent:
    """torch.cuda.Event: it belongs to the device on which it is first recorded."""

    def __init__(self, cuda: FakeCuda) -> None:
        self.cuda = cuda
        self.device: int | None = None
        self.at_ms = math.nan

    def record(self, stream: FakeStream) -> None:
        self.cuda._called()
        assert not self.cuda.capturing, "this would break the capture"
        if self.device is None:
            self.device = stream.device

        if self.device != stream.device:
            raise RuntimeError(f"Event device {self.device} does not match recording stream's device {stream.device}.")

        stream.now_ms = max(stream.now_ms, self.cuda.cpu_ms) + self.cuda.tick_ms
        self.at_ms = stream.now_ms

    def query(self) -> bool:
        assert not self.cuda.capturing, "this would break the capture"
        return self.at_ms <= self.cuda.reached_ms

    def elapsed_time(self, end_event: FakeEvent) -> float:
        if self.device is None or end_event.device is None:
            raise ValueError("Both events must be recorded before calculating elapsed time.")

        if self.device != end_event.device:
            raise RuntimeError("Both events must be on the same device.")

        if not (self.query() and end_event.query()):
            raise RuntimeError("CUDA error: device not ready")

        return end_event.at_ms - self.at_ms
