"""Requests for the end of a process, and words for it."""

from __future__ import annotations

import os
import pty
import signal
import subprocess
import sys
import threading
import time

import pytest

from traceml.process_ends import (
    StopRequest,
    end_of_status,
    exit_text,
    forget_interrupts,
    interrupts_held,
    shell_status,
    signal_name,
    signal_text,
    start_without_signals,
)

# The signal comes anywhere in `wait`, also where it is about to sleep, or was just woken.
ROUNDS = """
import random, signal
from traceml.process_ends import StopRequest

for _ in range(20_000):
    request = StopRequest()
    signal.signal(signal.SIGALRM, request)
    signal.setitimer(signal.ITIMER_REAL, random.uniform(1e-6, 2e-5))
    while not request.wait(0.001):
        pass
"""


def test_a_signal_has_its_name() -> None:
    """A number without a name stays a number."""
    assert (signal_name(9), signal_name(250)) == ("SIGKILL", "signal 250")
    assert (signal_text(9), signal_text(250)) == ("signal 9 (SIGKILL)", "signal 250")


@pytest.mark.parametrize(
    ("code", "ended_by", "text"),
    [
        (3, None, "ended with exit code 3"),
        (None, 11, "was killed by signal 11 (SIGSEGV)"),
        (0, 9, "was killed by signal 9 (SIGKILL)"),
        (None, None, "ended"),
    ],
)
def test_an_end_has_a_signal_or_a_code(code, ended_by, text) -> None:
    """The signal counts where there is one: the code was told before it."""
    assert exit_text(code, ended_by) == text


def test_a_status_of_subprocess_is_either() -> None:
    """Signals are negative there."""
    assert (end_of_status(-15), end_of_status(2)) == ("was killed by signal 15 (SIGTERM)", "ended with exit code 2")


@pytest.mark.parametrize(("exitcode", "status"), [(0, 0), (3, 3), (-9, 137)])
def test_a_shell_has_a_status_of_its_own_for_signals(exitcode: int, status: int) -> None:
    """128 and the signal's number."""
    assert shell_status(exitcode) == status


@pytest.mark.process
def test_a_handler_interrupts_the_wait_at_any_place() -> None:
    """With `threading.Event` it waits for a lock of the code that it has interrupted."""
    done = subprocess.run([sys.executable, "-c", ROUNDS], timeout=280, check=False)

    assert done.returncode == 0


def test_a_wait_ends_when_the_stop_is_requested() -> None:
    """By another thread, too; before that it ends after its time."""
    request = StopRequest()
    assert not request.wait(0.0)
    assert not request.is_set

    threading.Timer(0.01, request).start()

    assert request.wait(60)
    assert request.is_set
    assert request.wait(60)  # at once


def test_ctrl_c_waits_for_the_end_of_the_block() -> None:
    """Also if another thread receives it, as the kernel chooses one that does not block it."""
    reached = []

    with pytest.raises(KeyboardInterrupt), interrupts_held():  # noqa: PT012 - raised by the end of the block
        other = threading.Thread(target=os.kill, args=(os.getpid(), signal.SIGINT))
        other.start()
        other.join()
        deadline = time.monotonic() + 60  # the thread that receives it may be another one, which has to run first
        while not reached and time.monotonic() < deadline:
            time.sleep(0.001)  # CPython 3.11 sees the signals of other threads only when it takes the GIL again
            reached += signal.sigpending()

    assert signal.SIGINT in reached


def test_a_held_ctrl_c_can_be_forgotten() -> None:
    with interrupts_held():
        signal.raise_signal(signal.SIGINT)
        forget_interrupts()


LAUNCHER = """
import os, select, signal, sys
from traceml.process_ends import EndedBySignal, ended_by

def wait():  # a signal just before a read would be handled after it
    while not select.select([sys.stdin], [], [], 0.05)[0]:
        pass

if "nohup" in sys.argv:
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
try:
    with ended_by(signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT):
        try:
            print("ready", flush=True)
            wait()
        finally:
            if "hangs" in sys.argv:
                print("ending", flush=True)
                wait()
except EndedBySignal as error:
    sys.exit(f"{signal.Signals(error.number).name}, {error.from_terminal}")
sys.exit("not ended")
"""


def launcher_with(*words: str) -> subprocess.Popen[str]:
    pipe = subprocess.PIPE
    return subprocess.Popen([sys.executable, "-c", LAUNCHER, *words], stdin=pipe, stdout=pipe, stderr=pipe, text=True)


@pytest.mark.process
@pytest.mark.parametrize(("words", "end"), [((), "SIGHUP, False"), (("nohup",), "not ended")])
def test_a_hang_up_ends_a_launcher_that_was_not_told_to_ignore_it(words, end) -> None:
    """Its terminal did not close; under `nohup` the signal is dropped."""
    with launcher_with(*words) as launcher:
        launcher.stdout.readline()
        launcher.send_signal(signal.SIGHUP)
        _, err = launcher.communicate()

    assert err.strip() == end


@pytest.mark.process
@pytest.mark.parametrize(("first", "end"), [("SIGQUIT", "SIGQUIT, False"), ("SIGTERM", "SIGTERM, False")])
@pytest.mark.parametrize("second", ["", "SIGTERM", "SIGQUIT"])
def test_a_second_quit_ends_a_launcher_that_hangs_in_its_end(first, second, end) -> None:
    """The first one lets it end the job and restore the terminal; other signals do not hurry it."""
    with launcher_with("hangs") as launcher:
        launcher.stdout.readline()
        launcher.send_signal(signal.Signals[first])
        assert launcher.stdout.readline() == "ending\n"
        if second:
            launcher.send_signal(signal.Signals[second])

        _, err = launcher.communicate()

    assert (launcher.returncode, err.strip()) == ((-signal.SIGQUIT, "") if second == "SIGQUIT" else (1, end))


@pytest.mark.process
def test_a_launcher_knows_that_its_terminal_was_closed(tmp_path) -> None:
    """The kernel sends it SIGHUP when the terminal emulator, tmux or sshd goes."""
    pid, terminal = pty.fork()
    if not pid:
        os.dup2(os.open(tmp_path / "end", os.O_WRONLY | os.O_CREAT), 2)
        os.execv(sys.executable, [sys.executable, "-c", LAUNCHER])

    os.read(terminal, 100)
    os.close(terminal)
    os.waitpid(pid, 0)

    assert (tmp_path / "end").read_text().strip() == "SIGHUP, True"


def test_a_thread_that_cannot_be_started_is_an_error_of_the_system(monkeypatch: pytest.MonkeyPatch) -> None:
    """At a limit, or in a subinterpreter, tracing ends without a traceback; no signal stays blocked."""

    def refuse() -> None:
        raise RuntimeError("can't start new thread")

    thread, before = threading.Thread(), signal.pthread_sigmask(signal.SIG_BLOCK, ())
    monkeypatch.setattr(thread, "start", refuse)

    with pytest.raises(OSError, match=r"^can't start new thread$"):
        start_without_signals(thread)

    assert signal.pthread_sigmask(signal.SIG_BLOCK, ()) == before


@pytest.mark.process
@pytest.mark.parametrize(("environ", "status"), [({"SLURM_JOB_ID": "7"}, 0), ({}, -signal.SIGUSR2)])
def test_a_program_that_is_started_inherits_that_warnings_are_ignored(environ: dict[str, str], status: int) -> None:
    """In a job of Slurm a warning ends no program without a handler, as torchrun is; elsewhere it is a usual signal."""
    code = "from traceml.process_ends import ignore_slurm_warnings as ignore; import os; ignore(); "
    code += "os.execvp('sh', ['sh', '-c', 'kill -USR2 $$'])"
    variables = {key: value for key, value in os.environ.items() if not key.startswith("SLURM_")} | environ

    assert subprocess.run([sys.executable, "-c", code], env=variables, check=False).returncode == status
