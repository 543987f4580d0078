"""The kernel's view of real processes."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from tests.eventually import eventually
from traceml.inspection.kernel_state import (
    WaitState,
    children_of,
    end_started_processes,
    is_job_suspended,
    process_info,
    thread_cpu_ns,
    thread_here,
    threads_of,
    tree_usage,
    uncollected_status,
    wait_state,
)

pytestmark = pytest.mark.process


def _python(code: str, **streams: int) -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, "-c", code], **streams)  # type: ignore[call-overload, no-any-return]


def _assert_waits(code: str, port: int, expected: str) -> None:
    """Run code that reads a port and connects to it, until it waits for what is expected."""
    with _python(code, stdin=subprocess.PIPE) as process:
        try:
            assert process.stdin is not None
            process.stdin.write(f"{port}\n".encode())
            process.stdin.flush()
            eventually(lambda: wait_state(process.pid).waits_on == expected)
        finally:
            process.kill()


def test_a_full_pipe_is_named() -> None:
    """A process that writes to a pipe which nobody reads waits for its standard error."""
    with _python("import os\nwhile True: os.write(2, bytes(4096))", stderr=subprocess.PIPE) as process:
        try:
            eventually(lambda: wait_state(process.pid).waits_on == "stderr")
            seen = wait_state(process.pid)

            assert seen.state == "S"
            assert "pipe" in seen.wchan
            assert not seen.is_terminal_input
        finally:
            process.kill()


def test_a_lock_on_a_file_is_named(tmp_path: Path) -> None:
    """A process that waits for a lock waits on that file."""
    path = tmp_path / "build.lock"
    code = f"import fcntl\nfile = open({str(path)!r}, 'w')\nfcntl.flock(file, fcntl.LOCK_EX)"
    import fcntl

    with path.open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        with _python(code) as process:
            try:
                eventually(lambda: wait_state(process.pid).waits_on == str(path))
            finally:
                process.kill()


@pytest.mark.parametrize(("family", "host"), [(socket.AF_INET, "127.0.0.1"), (socket.AF_INET6, "::1")])
def test_the_other_end_of_a_connection_is_named(family: socket.AddressFamily, host: str) -> None:
    """A process that receives from a server which sends nothing."""
    code = f"import socket\nsocket.create_connection(({host!r}, int(input()))).recv(1)"
    with socket.create_server((host, 0), family=family) as server:
        port = server.getsockname()[1]
        with _python(code, stdin=subprocess.PIPE) as process:
            try:
                assert process.stdin is not None
                process.stdin.write(f"{port}\n".encode())
                process.stdin.flush()
                shown = f"[{host}]" if family is socket.AF_INET6 else host
                eventually(lambda: wait_state(process.pid).waits_on == f"tcp {shown}:{port}")
            finally:
                process.kill()


@pytest.mark.parametrize("timeout_s", ["None", "90"])
def test_a_server_that_does_not_answer_is_named(timeout_s: str) -> None:
    """As one behind a firewall; with a timeout, Python waits in poll()."""
    code = f"import socket\nsocket.create_connection(('127.0.0.1', int(input())), {timeout_s})"
    with socket.socket() as server, socket.socket() as first, socket.socket() as second:
        server.bind(("127.0.0.1", 0))
        server.listen(0)
        port = server.getsockname()[1]
        for client in (first, second):  # the queue is full: no other one is answered
            client.setblocking(False)
            client.connect_ex(("127.0.0.1", port))

        _assert_waits(code, port, f"connect 127.0.0.1:{port}")


def test_a_reader_with_a_timeout_is_named() -> None:
    """Python waits in poll() before it receives."""
    code = "import socket\nsocket.create_connection(('127.0.0.1', int(input())), 90).recv(1)"
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        _assert_waits(code, port, f"tcp 127.0.0.1:{port}")


@pytest.mark.parametrize("name", ["a", "a" * 200])
def test_a_file_that_is_being_opened_is_named(tmp_path: Path, name: str) -> None:
    """As one on a server that does not answer; here a pipe that nobody else opens."""
    os.mkfifo(tmp_path / name)
    with _python(f"import os; os.chdir({str(tmp_path)!r}); open({name!r})") as process:
        try:
            eventually(lambda: wait_state(process.pid).waits_on == str(tmp_path / name))
        finally:
            process.kill()


def test_none_of_several_descriptors_is_named() -> None:
    """Any of them may be what the process waits for."""
    code = "import os, select; select.select([os.pipe()[0], os.pipe()[0]], [], [])"
    with _python(code) as process:
        try:
            eventually(lambda: "poll" in wait_state(process.pid).wchan)

            assert not wait_state(process.pid).waits_on
        finally:
            process.kill()


@pytest.mark.parametrize("waits", ["import os; os.read(0, 1)", "import select; select.select([0], [], [])"])
def test_input_of_a_terminal_is_recognized(waits: str) -> None:
    """A process that waits for its user is no hang; readline, which pdb and others import, waits in select()."""
    ours, theirs = os.openpty()
    with _python(waits, stdin=theirs) as process:
        try:
            eventually(lambda: wait_state(process.pid).is_terminal_input)

            assert wait_state(process.pid).waits_on == "stdin"
        finally:
            process.kill()

    os.close(ours)
    os.close(theirs)


def test_a_stopped_process_without_a_terminal_is_not_suspended() -> None:
    """SIGSTOP from somewhere is a fault; Ctrl-Z at a terminal is a wish."""
    with subprocess.Popen(["sleep", "60"], start_new_session=True) as process:
        try:
            os.kill(process.pid, signal.SIGSTOP)
            eventually(lambda: wait_state(process.pid).state == "T")
            info = process_info(process.pid)

            assert info is not None
            assert not is_job_suspended(info)
        finally:
            process.kill()


def test_a_process_that_is_gone_has_no_state() -> None:
    """Its number may be asked for a moment later."""
    with subprocess.Popen(["true"]) as process:
        process.wait()

    assert wait_state(process.pid) == WaitState()
    assert threads_of(process.pid) == []
    assert tree_usage(process.pid)[0] == 0


@pytest.mark.parametrize(
    ("code", "status"), [("", 0), ("import os; os._exit(3)", 3), ("import os; os.kill(os.getpid(), 9)", -9)]
)
def test_the_end_of_a_child_can_be_read_and_collected(code: str, status: int) -> None:
    """Its parent, which waits for it later, gets the same; then nothing is known any more."""
    with _python(code) as child:
        eventually(lambda: uncollected_status(child.pid) is not None, "the end of the child")
        assert uncollected_status(child.pid) == status
        assert child.wait() == status
        assert uncollected_status(child.pid) is None
        assert uncollected_status(os.getpid()) is None


def test_a_thread_has_its_own_cpu_time() -> None:
    """Of this process by a clock, of any process by /proc; a thread that is gone has none."""
    thread = threading.get_native_id()
    own_ns, told_ns = thread_cpu_ns(thread), thread_cpu_ns(thread, os.getpid())

    assert own_ns is not None
    assert told_ns is not None
    assert min(own_ns, told_ns) > 0
    assert thread_cpu_ns(0) is thread_cpu_ns(1 << 22) is thread_cpu_ns(1 << 22, os.getpid()) is None


def test_a_thread_is_found_by_its_number_in_its_own_namespace() -> None:
    """Here both are the same."""
    assert thread_here(os.getpid(), threading.get_native_id()) == threading.get_native_id()
    assert thread_here(os.getpid(), 1 << 30) is None


def test_use_counts_children() -> None:
    """CPU time and bytes of a loader's workers are the rank's."""
    cpu_s, moved = tree_usage(os.getpid())
    with _python("import os\nfile = open('/dev/null', 'wb')\nwhile True: file.write(bytes(1 << 16))") as process:
        try:
            eventually(lambda: tree_usage(os.getpid())[1] - moved > 1 << 20)
            eventually(lambda: tree_usage(os.getpid())[0] - cpu_s > 0.1)
            assert tree_usage(process.pid)[0] > 0
        finally:
            process.kill()


@pytest.mark.parametrize("attempt", range(12))
def test_a_shell_that_starts_programs_leaves_none(attempt: int) -> None:
    """A program whose fork has begun would keep the output open after all others have ended."""
    script = "for i in 1 2 3 4 5 6 7 8 9; do sleep 600 & done; wait"
    code = f"import subprocess\nsubprocess.Popen(['sh', '-c', {script!r}])\ninput()"
    with _python(code, stdin=subprocess.PIPE, stdout=subprocess.PIPE, process_group=0) as process:
        try:
            eventually(lambda: children_of(process.pid))
            time.sleep(attempt % 4 * 3e-4)
            end_started_processes(process.pid)
        finally:
            process.kill()

        output, _ = process.communicate(timeout=120)
        assert output == b""
