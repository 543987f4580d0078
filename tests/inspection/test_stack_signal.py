"""Stacks of real processes that cannot tell them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import pytest

from tests.eventually import eventually
from tests.inspection.processes import Standing, standing
from traceml.inspection import stack_signal
from traceml.inspection.kernel_state import process_info
from traceml.inspection.stack_signal import SignaledStacks, find_stack_file, is_registered, signal_target
from traceml.inspection.stack_text import main_first, main_frames
from traceml.inspection.user_files import PACKAGE_FOLDERS

pytestmark = pytest.mark.process

_HOLDS_GIL = """
def hold_in_c():
    print("ready", flush=True)
    {call}

hold_in_c()
"""


def _ask_when_silent(told: Standing, file: int) -> str:
    """Ask until the thread that would answer waits for the GIL; before, it sleeps."""
    texts: list[str] = []

    def ask() -> bool:
        texts.append(SignaledStacks(told.pid, file, silent_thread=told.thread).wait(2))
        return bool(texts[-1])

    eventually(ask)
    return texts[-1]


@pytest.mark.parametrize(
    "call", ["ctypes.PyDLL(None).sleep(600)", "ctypes.PyDLL(None).poll(None, 0, 600_000)", "sum(range(10**11))"]
)
def test_the_line_that_holds_the_gil_is_reported(call: str) -> None:
    """Waiting or computing in C, the main thread's innermost frame is the caller of the C function."""
    with standing(_HOLDS_GIL.format(call=call)) as told:
        file = find_stack_file(told.pid)
        assert file is not None
        frames = main_frames(_ask_when_silent(told, file))
        os.close(file)

        assert [name for _, _, name in frames] == ["hold_in_c", "<module>"]
        assert told.process.poll() is None


def test_a_wait_in_c_is_not_ended() -> None:
    """The signal goes to another thread, so the user's poll returns when there is something to read, not with -1."""
    call = "import select, struct; wanted = ctypes.create_string_buffer(struct.pack('ihh', 0, select.POLLIN, 0))"
    call += "\n    print(ctypes.PyDLL(None).poll(wanted, 1, -1), flush=True)"
    with standing(_HOLDS_GIL.format(call=call)) as told:
        file = find_stack_file(told.pid)
        assert file is not None
        assert _ask_when_silent(told, file)
        os.close(file)

        assert told.process.stdin is not None
        told.process.stdin.write("\n")
        told.process.stdin.flush()
        assert told.line() == "1"


@pytest.mark.parametrize(
    "code", ["print('ready', flush=True)\ntime.sleep(600)", "print('ready', flush=True)\nwhile True:\n    pass"]
)
def test_a_process_whose_thread_gets_the_gil_is_not_asked(code: str) -> None:
    """Its frames may change while a handler reads them, which crashes it."""
    with standing(code) as told:
        file = find_stack_file(told.pid)
        assert file is not None

        assert SignaledStacks(told.pid, file, silent_thread=told.thread).wait(2) == ""
        assert os.fstat(file).st_size == 0
        os.close(file)


_IN_TURNS = """
def descend(depth):
    return depth and descend(depth - 1)

def spin():
    while True:
        descend(20)

def wake():
    print(threading.get_native_id(), flush=True)
    while True:
        time.sleep(0.002)

print("ready", flush=True)
for run in (wake, spin, spin):
    threading.Thread(target=run, daemon=True).start()

time.sleep(600)
"""


_ASKS_OFTEN = """
import re, sys

sys.setswitchinterval(50e-6)
other = threading.Thread(target=threading.Event().wait, daemon=True)
other.start()
print("ready", flush=True)
threading.Thread(target=re.match, args=("(a*)*b", "a" * 40), daemon=True).start()
while True:
    other.join(0.01)
"""


def test_a_thread_that_asks_for_the_gil_often_does_not_run() -> None:
    """With a short switch interval, which nobody can restore any more, it wakes a thousand times in a probe."""
    with standing(_ASKS_OFTEN) as told:
        file = find_stack_file(told.pid)
        assert file is not None

        assert "match" in _ask_when_silent(told, file)
        os.close(file)


@pytest.mark.parametrize("interval_s", [0.005, 50e-6])
def test_a_process_whose_threads_run_in_turns_is_not_asked(interval_s: float) -> None:
    """On a busy host a thread may ask for the GIL for seconds, and get it yet: one that wakes often looks the same."""
    with standing(f"import sys; sys.setswitchinterval({interval_s})\n{_IN_TURNS}") as told:
        thread, file = int(told.line()), find_stack_file(told.pid)
        assert file is not None
        for _ in range(10):
            asked = SignaledStacks(told.pid, file, silent_thread=thread)
            assert asked.wait(2) == ""
            assert not asked.was_sent

        assert told.process.poll() is None
        os.close(file)


def test_a_thread_that_had_no_core_is_probed_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a busy host it wakes a few times only; it gets the signal once it has woken often enough within one probe."""
    monkeypatch.setattr(stack_signal, "_PROBES_S", 3600.0)
    monkeypatch.setattr(stack_signal, "_FIRST_S", 240.0)
    with standing(_HOLDS_GIL.format(call="ctypes.PyDLL(None).sleep(600)")) as told:
        file = find_stack_file(told.pid)
        assert file is not None
        _ask_when_silent(told, file)
        wakes = iter([0, *(count for probe in range(3) for count in (100 * probe + 7, 100 * probe + 100))])
        monkeypatch.setattr(SignaledStacks, "_wakes_of", lambda _: next(wakes, 1000))
        asked = SignaledStacks(told.pid, file, silent_thread=told.thread)

        assert main_frames(asked.wait(240))
        assert next(wakes, None) is None
        os.close(file)


def test_a_stopped_process_is_not_asked() -> None:
    """It would handle the signal when it runs again."""
    with standing(_HOLDS_GIL.format(call="ctypes.PyDLL(None).sleep(600)")) as told:
        os.kill(told.pid, signal.SIGSTOP)
        eventually(lambda: (info := process_info(told.pid)) is not None and info.state == "T")
        file = find_stack_file(told.pid)
        assert file is not None

        assert SignaledStacks(told.pid, file, silent_thread=told.thread).wait(2) == ""
        os.close(file)


def test_a_process_without_a_handler_is_spared() -> None:
    """An unhandled real-time signal would kill it."""
    with subprocess.Popen(["sleep", "60"]) as process:
        try:
            assert find_stack_file(process.pid) is None
            assert not is_registered(process.pid)
            file = os.memfd_create("none")
            assert SignaledStacks(process.pid, file, target=process.pid).wait(1) == ""
            os.close(file)
            assert process.poll() is None
        finally:
            process.kill()


def test_two_askers_do_not_mix_their_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    """The second one is refused while the first one reads."""
    monkeypatch.setattr(stack_signal, "_FIRST_S", 240.0)
    with standing(_HOLDS_GIL.format(call="ctypes.PyDLL(None).sleep(600)")) as told:
        files = [find_stack_file(told.pid), find_stack_file(told.pid)]
        assert files[0] is not None
        assert files[1] is not None
        _ask_when_silent(told, files[0])  # by now its thread waits for the GIL
        first, second = (
            SignaledStacks(told.pid, file, silent_thread=told.thread) for file in files if file is not None
        )
        eventually(lambda: first.step() or bool(first._sent_s))

        assert second.wait(2) == ""
        assert main_frames(first.wait(240))
        for file in files:
            os.close(file)  # type: ignore[arg-type]


_STOPS_IN_BETWEEN = """
def write(*_):
    os.write(file, b"half")
    os.kill(os.getpid(), signal.SIGSTOP)
    os.write(file, b" and half")

import signal
signal.signal(stack_signal.STACK_SIGNAL, write)
print("ready", flush=True)
while True:
    signal.pause()
"""


def test_what_has_no_core_to_write_on_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """Half of the stacks looks like those of a process with fewer threads, and its last thread like the main one."""
    monkeypatch.setattr(stack_signal, "_FIRST_S", 240.0)
    monkeypatch.setattr(stack_signal, "_QUIET_S", -1.0)
    monkeypatch.setattr(stack_signal, "_NO_CORE_S", 240.0)
    with standing(_STOPS_IN_BETWEEN) as told:
        file = find_stack_file(told.pid)
        assert file is not None
        asked = SignaledStacks(told.pid, file, target=told.pid)
        assert not asked.step()
        eventually(lambda: (info := process_info(told.pid)) is not None and info.state == "T")
        assert not asked.step()

        os.kill(told.pid, signal.SIGCONT)
        assert asked.wait(240) == "half and half"
        os.close(file)


def test_a_worker_in_a_sleep_of_c_code_is_left_alone() -> None:
    """Its only thread is in a wait that a signal would end; in a lock it is not."""
    sleeper = [sys.executable, "-c", "import ctypes; print(flush=True); ctypes.PyDLL(None).sleep(600)"]
    with subprocess.Popen(sleeper, stdout=subprocess.PIPE) as process:
        try:
            assert process.stdout is not None
            process.stdout.readline()
            eventually(lambda: (info := process_info(process.pid)) is not None and info.state == "S")

            assert signal_target(process.pid) is None
            assert signal_target(process.pid, even_if_disturbed=True) == process.pid
        finally:
            process.kill()


def test_the_main_thread_is_the_last_one_written() -> None:
    """Its frames are the innermost first; a text that was cut before them has none."""
    text = (
        'Thread 0x1 (most recent call first):\n  File "a.py", line 1 in other\n\n'
        'Current thread 0x2 (most recent call first):\n  File "b c.py", line 2 in inner\n'
        '  File "b c.py", line 9 in <module>\n'
    )

    assert main_frames(text) == [("b c.py", 2, "inner"), ("b c.py", 9, "<module>")]
    assert main_first(text).startswith("Current thread 0x2")
    started = f'{text}  File "{PACKAGE_FOLDERS[0]}session/entry.py", line 26 in <module>\n'
    assert main_frames(started) == main_frames(text)  # what starts a script is in no traceback either
    saves = f'line 2 in inner\n  File "{PACKAGE_FOLDERS[0]}instrument/patch.py", line 5 in call\n'
    assert main_frames(text.replace("line 2 in inner\n", saves)) == main_frames(text)  # nor is a wrapper of ours
    assert main_frames(text + "\n...\n") == []
    assert main_frames("") == []
