"""Steps in CUDA graphs, on graphs that call again what they were captured from."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tests.instrument.conftest import Traced
from tests.instrument.fake_cuda import FakeCuda
from traceml.database.flight.flight import FlightFile
from traceml.instrument import install
from traceml.instrument.device import DeviceTimes


class FakeGraph:
    """torch.cuda.CUDAGraph: a replay does the work without calling any of torch's functions."""

    error: RuntimeError | None = None

    def capture_begin(self, *_: Any, **__: Any) -> None:
        """As by `torch.cuda.graph`."""

    def capture_end(self) -> None:
        """As by `torch.cuda.graph`."""

    def replay(self) -> None:
        """Queue the captured work."""
        if self.error is not None:
            raise self.error


@pytest.fixture
def traced(form: str, cuda: FakeCuda, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Traced]:
    """Hooks on these graphs."""
    monkeypatch.setattr(torch.cuda, "CUDAGraph", FakeGraph)
    monkeypatch.setattr("traceml.instrument.open_step.detailed_steps._FIRST", 10**6)
    gc.collect()
    flight = FlightFile.create(tmp_path, {})
    instrumentation = install(flight, device_types=frozenset({"cuda", "meta"}))
    yield Traced(flight, instrumentation)

    instrumentation.uninstall()
    flight.close(unlink=True)


class Training:
    """A linear layer."""

    def __init__(self) -> None:
        self.model = nn.Linear(4, 1)
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.1)

    def passes(self) -> None:
        self.optimizer.zero_grad()
        self.model(torch.randn(2, 4)).sum().backward()

    def step(self) -> None:
        self.passes()
        self.optimizer.step()


def captured(work: Callable[[], None]) -> FakeGraph:
    graph = FakeGraph()
    graph.capture_begin()
    work()
    graph.capture_end()
    return graph


def test_each_replay_of_a_whole_step_is_a_step(traced: Traced) -> None:
    """After the warm-up and the capture, which are steps as the hooks see them; its time is forward."""
    training = Training()
    for _ in range(3):
        training.step()

    graph = captured(training.step)
    for _ in range(50):
        graph.replay()

    rows = traced.finish()
    assert len(rows) == 3 + 1 + 50
    assert all(row["forward_ns"] > 0 for row in rows[4:])
    assert all(row["micro"] == 1 for row in rows)


def test_replays_with_a_loader_close_with_its_batches(traced: Traced) -> None:
    """The wait for a batch belongs to the step that it is for."""
    training = Training()
    loader: Any = torch.utils.data.DataLoader(torch.randn(40, 4), batch_size=2)
    training.step()
    graph = captured(training.step)
    for _ in range(2):
        for _batch in loader:
            graph.replay()

    rows = traced.finish()
    assert len(rows) == 2 + 40
    assert all(row["input_wait_ns"] > 0 for row in rows[3:])


def test_a_step_that_is_captured_on_the_first_batch(traced: Traced) -> None:
    """The warm-up, the capture and the first replay are on one batch, so one step; then each replay is one."""
    training = Training()
    loader: Any = torch.utils.data.DataLoader(torch.randn(80, 4), batch_size=2)
    graph = None
    for _batch in loader:
        if graph is None:
            training.step()
            graph = captured(training.step)

        graph.replay()

    assert len(traced.finish()) == 40


def test_replays_of_the_optimizer_alone_are_no_backward_passes(traced: Traced) -> None:
    """The passes before it are counted as they are."""
    training = Training()
    training.step()
    graph = captured(training.optimizer.step)
    for _ in range(30):
        training.passes()
        graph.replay()

    rows = traced.finish()
    assert len(rows) >= 31
    assert {row["micro"] for row in rows[2:]} == {1}


def test_replays_of_passes_alone_are_no_steps(traced: Traced) -> None:
    """An optimizer that steps after each replay is what ends a step."""
    training = Training()
    training.step()
    graph = captured(training.passes)
    training.optimizer.step()
    for _ in range(30):
        graph.replay()
        training.optimizer.step()

    rows = traced.finish()
    assert len(rows) == 32
    assert sum(row["forward_ns"] > 0 for row in rows) >= 31


def test_a_replay_inside_a_model_belongs_to_its_phase(traced: Traced) -> None:
    """Compiled models replay graphs in their forward and their backward."""
    training = Training()
    graph = captured(lambda: None)
    training.model.register_forward_hook(lambda *_: graph.replay())
    training.optimizer.register_step_post_hook(lambda *_: graph.replay())
    for _ in range(20):
        training.step()

    assert len(traced.finish()) == 20


def test_a_replay_has_device_time(traced: Traced) -> None:
    """All of it is forward: nothing else is known of it."""
    training = Training()
    training.step()
    graph = captured(training.step)
    for _ in range(40):
        graph.replay()

    traced.finish()
    rows = traced.table("device_steps")
    assert isinstance(traced.instrumentation.clock.device, DeviceTimes)
    assert len(rows) >= 30
    assert {(row["forward_ns"], row["backward_ns"]) for row in rows[5:]} == {(1_000_000, 0)}


def test_a_replay_after_a_warm_up_on_another_stream(traced: Traced, cuda: FakeCuda) -> None:
    """As torch's documentation has it: the device times are of the stream on which graphs are replayed."""
    training = Training()
    with cuda.on_stream(cuda.new_stream()):
        for _ in range(8):
            training.step()

    graph = captured(training.step)
    for _ in range(40):
        graph.replay()

    traced.finish()
    rows = traced.table("device_steps")
    assert len(rows) >= 40
    assert {row["forward_ns"] for row in rows[12:]} == {1_000_000}


def test_an_error_of_a_replay_reaches_the_script(traced: Traced) -> None:
    """A graph that was not captured cannot be replayed; the next one is a step again."""
    training = Training()
    training.step()
    graph = captured(training.step)
    graph.error = RuntimeError("called without a preceding successful capture")
    with pytest.raises(RuntimeError, match="capture"):
        graph.replay()

    graph.error = None
    for _ in range(20):
        graph.replay()

    assert len(traced.finish()) == 22
