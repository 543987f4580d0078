"""Forks while other threads of ours are at work."""

from __future__ import annotations

import hmac
import os
import signal
import ssl
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from textwrap import dedent

import pytest

import traceml
from tests.eventually import eventually
from traceml import settings
from traceml.fork_gate import ForkGate, fork_gate

ROOT = Path(__file__).parents[1]

pytestmark = pytest.mark.process


def printed_alone(code: str, path: Path) -> str:
    """Run code beside what is in this module; return what it prints. Of a process with all tests a fork takes 60 ms.

    Args:
        path: folder of further modules.
    """
    environ = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(path)])}
    command = [sys.executable, "-c", f"from tests.test_fork_gate import *\n{dedent(code)}"]
    return subprocess.run(command, env=environ, stdout=subprocess.PIPE, text=True, check=True, timeout=240).stdout


@contextmanager
def working(work: Callable[[], object], gate: AbstractContextManager[None] = fork_gate) -> Iterator[None]:
    """Let another thread do something over and over, as the recorder's does: inside the gate, with pauses."""
    ended = threading.Event()

    def run() -> None:
        while not ended.is_set():
            with gate:
                work()

            ended.wait(0.0001)

    thread = threading.Thread(target=run)
    thread.start()
    yield
    ended.set()
    thread.join()


def status_of_child(work: Callable[[], object]) -> int:
    """Fork a child that does something; return its status, or the signal that ended it, after 20 s at most."""
    child = os.fork()
    if child == 0:
        signal.signal(signal.SIGALRM, signal.SIG_DFL)  # ends a child that waits for a lock, too
        signal.alarm(20)
        work()
        os._exit(0)

    return os.waitpid(child, 0)[1]


def digest() -> bytes:
    """Compute an HMAC, as `multiprocessing` does where a loader worker passes a descriptor."""
    return hmac.digest(b"key", b"message", "sha256")


def make_context() -> ssl.SSLContext:
    """Do what takes OpenSSL's locks without the interpreter's, as our handshake's HMAC does too, but for longer."""
    return ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)


def import_it() -> None:
    """Import a module for the first time, which holds its lock for the time of the import."""
    sys.modules.pop("this_takes_long", None)
    import this_takes_long  # type: ignore[import-not-found] # noqa: F401


def test_a_child_never_waits_for_locks_of_openssl(tmp_path: Path) -> None:
    """Without the gate 6 of 98 children did, here."""
    code = """
    with working(make_context):
        print({status_of_child(digest) for _ in range(100)})
    """

    assert printed_alone(code, tmp_path) == "{0}\n"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with a module whose import takes a while."""
    (tmp_path / "this_takes_long.py").write_text("import time\ntime.sleep(0.002)\n")
    return tmp_path


def test_a_child_never_waits_for_an_import(folder: Path) -> None:
    """Without the gate 6 of 7 children did: the lock of a module that the parent imported stays locked in the child."""
    code = """
    with working(import_it):
        print({status_of_child(import_it) for _ in range(50)})
    """

    assert printed_alone(code, folder) == "{0}\n"


def test_a_child_never_waits_for_what_a_thread_uses_first(folder: Path) -> None:
    """A thread of the user that calls `traceml.log_metric` for the first time imports its module."""
    code = """
    from contextlib import nullcontext

    def use():
        sys.modules.pop("this_takes_long", None)
        traceml._imported("this_takes_long")

    with working(use, nullcontext()):
        print({status_of_child(import_it) for _ in range(50)})
    """

    assert printed_alone(code, folder) == "{0}\n"


def test_a_fork_waits_for_what_a_start_imports(monkeypatch: pytest.MonkeyPatch) -> None:
    """A child that was forked while a thread called `init` waited for its imports at the first value, forever."""
    inside: list[int] = []
    config = settings.load(enabled=False)

    def load() -> settings.Config:
        inside.extend(fork_gate._inside)
        return config

    monkeypatch.setattr(settings, "load", load)
    traceml.init()

    assert inside == [threading.get_ident()]


@pytest.mark.parametrize(("before", "is_there"), [("import threading", True), ("", False)])
def test_the_gate_is_there_before_threads_are(before: str, is_there: bool) -> None:
    """Else a thread would import it while another one forks; without threads `import traceml` is not to pay for it."""
    code = f"import sys\n{before}\nimport traceml\nprint('traceml.fork_gate' in sys.modules)"
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout

    assert printed == f"{is_there}\n"


def test_a_fork_waits_until_the_work_has_ended() -> None:
    """Also one of work inside work; what waits inside `opened` does not hold it up."""
    gate = ForkGate()
    inside, leave, order = threading.Event(), threading.Event(), []

    def work() -> None:
        with gate, gate, gate.opened():
            inside.set()
            leave.wait()
            order.append("waited")

        order.append("left")

    thread = threading.Thread(target=work)
    thread.start()
    inside.wait()
    gate.hold()
    leave.set()
    eventually(lambda: order == ["waited"])
    gate.release()
    thread.join()
    assert order == ["waited", "left"]


def test_a_fork_takes_no_lock_of_logging_before_the_work_has_ended() -> None:
    """In a script that imports `threading`, and `logging` only later, each such fork waited 2 s, and did not help."""
    code = """
    import os, threading, traceml, logging
    from traceml.fork_gate import fork_gate

    inside = threading.Event()

    def work():
        with fork_gate:
            inside.set()
            while not fork_gate._changed._waiters:
                pass

            logging.getLogger("new")

    threading.Thread(target=work).start()
    inside.wait()
    if os.fork() == 0:
        os._exit(0)

    print(fork_gate._timeout_s)
    """
    printed = subprocess.run([sys.executable, "-c", dedent(code)], capture_output=True, text=True, check=True).stdout

    assert printed == "2.0\n"


def test_a_thread_that_stays_inside_delays_few_forks(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first fork waits for it; the next ones only briefly; it still leaves the gate as usual."""
    monkeypatch.setattr("traceml.fork_gate._TIMEOUT_S", 0.05)
    gate = ForkGate()
    inside, leave = threading.Event(), threading.Event()

    def work() -> None:
        with gate:
            inside.set()
            leave.wait()

    thread = threading.Thread(target=work)
    thread.start()
    inside.wait()
    for _ in range(2):
        gate.hold()
        gate.release()

    leave.set()
    thread.join()
    gate.hold()
    gate.release()
    with gate:
        pass


def test_a_thread_forks_inside_its_own_work() -> None:
    """It stays inside in the parent and in the child, and leaves as usual in both."""

    def leave_and_fork() -> None:
        fork_gate.__exit__()
        assert fork_gate._inside == {}
        assert status_of_child(digest) == 0

    with fork_gate:
        assert status_of_child(leave_and_fork) == 0
        assert list(fork_gate._inside.values()) == [1]

    assert fork_gate._inside == {}


def test_threads_do_not_wait_for_each_other() -> None:
    """The recorder's thread waits for the one that copies files."""
    ended = threading.Event()

    def work() -> None:
        with fork_gate:
            ended.set()

    with fork_gate:
        threading.Thread(target=work).start()
        assert ended.wait(240)
