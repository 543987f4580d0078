"""Forked and spawned children: they neither send, nor write, nor hang, nor count twice."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.aggregator.conftest import TOKEN, Serving
from tests.eventually import eventually
from tests.recorder.conftest import Run, environ, exit_rows, stored_steps

START = """
import os, sys, traceml
recorder = traceml.init()
def steps(n):
    for _ in range(n):
        with traceml.trace_step():
            pass
steps(5)
"""


def test_a_forked_child_is_no_rank(serving: Serving, run_script: Run) -> None:
    """Its calls do nothing, its end flushes nothing, and the parent goes on undisturbed."""
    done = run_script(
        START
        + """
pid = os.fork()
if pid == 0:
    assert not traceml.is_enabled()
    steps(50)
    with traceml.phase("child"):
        pass
    traceml.shutdown()
    sys.exit(3)
assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 3
steps(5)
"""
    )

    assert done.returncode == 0, done.stderr
    assert stored_steps(serving) == list(range(10))
    assert [row["code"] for row in exit_rows(serving)] == [0]
    with serving.store() as store:
        assert len(store.streams()) == 1
        assert "child" not in {row["name"] for _, row in store.log_rows("names")}


def test_a_childs_exception_is_shown_and_not_recorded(serving: Serving, run_script: Run) -> None:
    """The hook that the child inherits only passes on."""
    done = run_script(START + "if os.fork() == 0:\n    1 / 0\nos.wait()\nsteps(1)\n")

    assert done.returncode == 0
    assert "ZeroDivisionError" in done.stderr
    assert [row["code"] for row in exit_rows(serving)] == [0]


def test_a_child_does_not_hide_its_parents_death(serving: Serving, tmp_path: Path) -> None:
    """While a forked worker lives on, the aggregator still sees that the rank was killed, and loses no row."""
    script = tmp_path / "script.py"
    script.write_text(
        START
        + "import time\nif os.fork() == 0:\n    print(os.getpid(), flush=True)\n    time.sleep(600)\ntime.sleep(600)\n"
    )
    process = subprocess.Popen(
        [sys.executable, str(script)],
        env=environ(tmp_path, TRACEML_PORT=str(serving.port), TRACEML_TOKEN=TOKEN),
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    child = int(process.stdout.readline())
    try:
        process.kill()
        process.wait()

        def ended() -> bool:
            with serving.store() as store:
                return [stream.state for stream in store.streams()] not in ([], ["running"])

        eventually(ended)
        assert stored_steps(serving) == list(range(5))
    finally:
        os.kill(child, signal.SIGKILL)
        process.stdout.close()


def test_a_forked_child_may_trace_itself(serving: Serving, run_script: Run) -> None:
    """It calls init and becomes a rank of a run of its own; multiprocessing's end, without atexit, sends its rows."""
    done = run_script(
        START
        + """
import multiprocessing
def child():
    assert traceml.init() is not recorder
    steps(7)
process = multiprocessing.get_context("fork").Process(target=child)
process.start()
process.join()
assert process.exitcode == 0, process.exitcode
"""
    )

    assert done.returncode == 0, done.stderr
    assert len(serving.run_dirs) == 2
    counts = []
    for folder in serving.run_dirs:
        from traceml.database.store.reader import StoreReader
        from traceml.run_folder import STORE_NAME

        with StoreReader(folder / STORE_NAME) as store:
            counts.append(store.stored("steps"))
    assert sorted(counts) == [5, 7]


CONNECTS = """
import os, signal, sys, threading, traceml
from traceml.fork_gate import fork_gate
from traceml.recorder.recording import Recording

signal.alarm(60)  # ends a process that waits for itself
connect = Recording.connect
def connect_after(recording):
    while_connecting()
    connect(recording)
Recording.connect = connect_after
"""


def test_a_child_that_is_forked_while_another_thread_starts_logs(serving: Serving, run_script: Run) -> None:
    """It waited for that thread, which it does not have, at its first value."""
    done = run_script(
        CONNECTS
        + """
connects, go_on = threading.Event(), threading.Event()
def while_connecting():
    if threading.current_thread() is thread:
        connects.set()
        with fork_gate.opened():
            go_on.wait()
thread = threading.Thread(target=traceml.init)
thread.start()
connects.wait()
if os.fork() == 0:
    signal.alarm(60)
    traceml.log_metric("of the child", 1.0)
    traceml.shutdown()
    os._exit(0)
status = os.wait()[1]
go_on.set()
thread.join()
assert status == 0, status
traceml.log_metric("of the parent", 1.0)
"""
    )

    assert done.returncode == 0, done.stderr
    assert _names(serving) >= {"of the child", "of the parent"}


def test_a_signal_handler_comes_in_between_the_start(serving: Serving, run_script: Run) -> None:
    """It waited for the start that it had interrupted, forever, or lost its values."""
    done = run_script(
        CONNECTS
        + """
def while_connecting():
    signal.raise_signal(signal.SIGUSR1)
def handle(*_):
    traceml.log_metric("of the handler", 1.0)
    traceml.init()
    traceml.shutdown()
signal.signal(signal.SIGUSR1, handle)
traceml.init()
assert traceml.is_enabled()
"""
    )

    assert done.returncode == 0, done.stderr
    assert "of the handler" in _names(serving)


def _names(serving: Serving) -> set[str]:
    """Names of what was logged in the only run."""
    [_] = serving.run_dirs
    with serving.store() as store:
        return {row["name"] for _, row in store.log_rows("names")}


@pytest.mark.parametrize("method", ["fork", "spawn", "forkserver"])
def test_data_loader_workers_are_no_ranks(serving: Serving, run_script: Run, method: str) -> None:
    """Whatever their start method, and although the script calls init without a guard."""
    done = run_script(
        """
        import sys, torch, traceml
        from torch.utils.data import DataLoader, Dataset
        recorder = traceml.init()

        class Data(Dataset):
            def __len__(self):
                return 8
            def __getitem__(self, index):
                assert not traceml.is_enabled()
                with traceml.phase("decode"):
                    return torch.zeros(4)

        if __name__ == "__main__":
            model = torch.nn.Linear(4, 1)
            optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
            for batch in DataLoader(Data(), batch_size=1, num_workers=2, multiprocessing_context=sys.argv[1]):
                optimizer.zero_grad()
                model(batch).sum().backward()
                optimizer.step()
        """,
        method,
    )

    assert done.returncode == 0, done.stderr
    assert len(serving.run_dirs) == 1
    with serving.store() as store:
        assert len(store.streams()) == 1
        assert store.stored("steps") == 8, done.stderr
        assert store.stored("user_phases") == 0


def test_a_spawned_child_that_only_logs_loses_nothing(serving: Serving, run_script: Run) -> None:
    """It connects late, as it might join a process group: the report counted its recorder's own rows as lost."""
    done = run_script(
        """
        import multiprocessing, time, traceml
        from traceml.recorder import recorder_thread
        recorder_thread._TELEMETRY_NS = recorder_thread._FIRST_TELEMETRY_NS = 1

        def work():
            traceml.log_metric("value", 1.0)
            time.sleep(2.5)  # the recorder's thread has woken several times

        if __name__ == "__main__":
            traceml.init()
            child = multiprocessing.get_context("spawn").Process(target=work)
            child.start()
            child.join()
        """
    )

    assert done.returncode == 0, done.stderr
    with serving.store() as store:
        assert (store.stored("metrics"), store.lost("telemetry")) == (1, 0)
