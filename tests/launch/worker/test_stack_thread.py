"""The thread of a worker that reports its stacks."""

from __future__ import annotations

import signal
import socket
import threading

import pytest

from traceml.launch.shared.fd_socket import FdSocket
from traceml.launch.shared.launch_messages import StackThread
from traceml.launch.worker import stack_thread


def test_the_agent_knows_the_thread_before_it_has_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """A function that holds the GIL from its first line keeps the thread from running, and is reported by a signal.

    The thread takes none of the signals that the function may wait for in its own threads.
    """
    over, blocked = threading.Event(), set[int]()

    def without_the_gil(agent: FdSocket) -> None:
        blocked.update(signal.pthread_sigmask(signal.SIG_BLOCK, ()))
        over.wait()
        agent.close()

    monkeypatch.setattr(stack_thread, "_serve", without_the_gil)
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    agent = FdSocket.from_fd(ours.detach())
    try:
        stack_thread.serve_stacks(theirs.detach())
        received = agent.receive(StackThread, wait=False)
        assert received is not None
        (thread,) = (each for each in threading.enumerate() if each.native_id == received[0].tid)
    finally:
        over.set()
        agent.close()

    assert thread.name == "traceml-stacks"
    thread.join()
    assert signal.SIGTERM in blocked
