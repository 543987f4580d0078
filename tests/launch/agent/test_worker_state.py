"""Stacks of a worker as its agent asks for them: how long it waits for which process."""

from __future__ import annotations

import os
import signal
import subprocess
import threading
from collections.abc import Callable, Iterator

import pytest

from tests.fake_time import FakeTime
from traceml.launch.agent import worker_state
from traceml.launch.agent.worker_state import StackReader
from traceml.launch.shared.fd_socket import FdSocket
from traceml.launch.shared.launch_messages import StacksRequest, StackThread, ThreadStacks


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> FakeTime:
    made = FakeTime()
    monkeypatch.setattr(worker_state, "time", made)
    return made


@pytest.fixture
def reader() -> Iterator[StackReader]:
    made = StackReader()
    yield made
    made.started()
    made.close()


@pytest.fixture
def worker(reader: StackReader) -> Iterator[FdSocket]:
    """The worker's end of the socket."""
    made = FdSocket.from_fd(os.dup(reader.worker_fds[0]))
    yield made
    made.close()


def _sleeping() -> subprocess.Popen[bytes]:
    return subprocess.Popen(["sleep", "600"])


def _stopped() -> subprocess.Popen[bytes]:
    process = _sleeping()
    process.send_signal(signal.SIGSTOP)
    os.waitpid(process.pid, os.WUNTRACED)
    return process


@pytest.mark.parametrize("thread_is_known", [True, False])
def test_a_worker_that_got_no_core_for_seconds_is_awaited(
    clock: FakeTime, reader: StackReader, worker: FdSocket, thread_is_known: bool
) -> None:
    """On a busy host, where the report of a hang has to know where each rank was."""
    if thread_is_known:
        worker.send(StackThread(tid=threading.get_native_id()))

    with _sleeping() as process:
        try:
            reader.request(process.pid)
            assert worker.receive(StacksRequest, wait=False) is not None
            clock.now_s += 3.5
            assert not reader.done()
            worker.send(ThreadStacks(text="Thread 0x1 (most recent call first):\n"))
            assert reader.done()
            assert reader.answer(process.pid)["stack"].startswith("Thread 0x1")
        finally:
            process.kill()


@pytest.mark.parametrize(("start", "longest_s"), [(_stopped, 2.0), (_sleeping, 4.5)])
def test_a_worker_that_does_not_answer_is_given_up(
    clock: FakeTime, reader: StackReader, start: Callable[[], subprocess.Popen[bytes]], longest_s: float
) -> None:
    """One that is stopped earlier: it cannot answer."""
    with start() as process:
        try:
            reader.request(process.pid)
            assert not reader.done()
            clock.now_s += longest_s
            assert reader.done()
            assert reader.answer(process.pid)["stack"] == ""
        finally:
            process.kill()
