"""Real scripts that stand still for a while; what their ranks tell of it."""

from __future__ import annotations

import textwrap
import time

import pytest

from tests.aggregator.conftest import Serving
from tests.recorder.conftest import Run
from traceml.database.snapshots.rank_snapshot import SNAPSHOT, RankSnapshot

pytestmark = pytest.mark.process

_QUICK = {"TRACEML_HANG_TIMEOUT": "2"}  # so the first snapshot comes after a second
# The scripts go on when the snapshots that they are about are there, however long that takes on a busy machine.
_NOTES = """
import os, signal, threading
from traceml.recorder.no_progress.progress_watch import ProgressWatch
send, resume, seen, over = ProgressWatch._send, ProgressWatch._resume, [], []

def note(watch, snapshot, now):
    send(watch, snapshot, now)
    if not seen and CONDITION:
        seen.append(snapshot)
        THEN

def note_end(watch, now):
    resume(watch, now)
    over.extend(seen)

ProgressWatch._send, ProgressWatch._resume = note, note_end
"""
_HEAD = _NOTES.count("\n")  # lines before a script's own


def _noting(code: str, condition: str = "True", then: str = "pass") -> str:
    """Return a script in which `seen` is true after a snapshot, and `over` after the end of that pause."""
    return _NOTES.replace("CONDITION", condition).replace("THEN", then) + textwrap.dedent(code).lstrip("\n")


def _interrupted(code: str, condition: str = "True") -> str:
    """Return a script that gets SIGINT after a snapshot."""
    return _noting(code, condition, "os.kill(os.getpid(), signal.SIGINT)")


def _snapshots(serving: Serving) -> list[RankSnapshot]:
    with serving.store() as store:
        return [RankSnapshot.from_row(row) for _, row in store.log_rows("info") if row["kind"] == SNAPSHOT]


def _lines(snapshot: RankSnapshot) -> list[str]:
    return [f"{frame.line} {frame.function}" for frame in snapshot.frames]


def test_a_sleep_in_the_users_code_is_in_the_snapshots(run_script: Run, serving: Serving) -> None:
    """Line, state and phase are told while it lasts; that it is over is told once."""
    code = """
        import time, traceml
        traceml.init()

        def stuck():
            while not seen: time.sleep(3)

        stuck()
        print("on", flush=True)
        while not over:
            with traceml.trace_step():
                time.sleep(0.02)
        """
    began_s = time.monotonic()
    done = run_script(_noting(code, 'snapshot.user_line and snapshot.user_line.function == "stuck"'), **_QUICK)
    took_s = time.monotonic() - began_s

    assert done.returncode == 0, done.stderr
    snapshots = [
        snapshot
        for snapshot in _snapshots(serving)
        if snapshot.user_line is None or snapshot.user_line.function == "stuck"
    ]
    first, last = snapshots[0], snapshots[-1]
    assert _lines(first) == [f"{_HEAD + 5} stuck", f"{_HEAD + 7} <module>"]
    assert (first.user_line, first.outer_line) == (first.frames[0], first.frames[1])
    assert all(frame.is_user for frame in first.frames)
    assert (first.answered, first.phase, first.step, first.in_step) == ("recorder", "startup", -1, False)
    assert (first.process_state, first.is_debugged, first.is_compiling) == ("S", False, False)
    assert [snapshot.ended for snapshot in snapshots] == [False] * (len(snapshots) - 1) + [True]
    assert 1 <= first.quiet_s < last.quiet_s < took_s


def test_an_import_that_stands_still_has_the_frames_of_modules(run_script: Run, serving: Serving) -> None:
    """As in a traceback: the import machinery's own, five for each import, would push the script's out."""
    code = """
        import pathlib, sys, tempfile, traceml
        traceml.init()
        sys.path.insert(0, tempfile.mkdtemp())
        stuck = "import time, __main__\\nwhile not __main__.seen: time.sleep(3)"
        pathlib.Path(sys.path[0], "slow.py").write_text(stuck)
        import slow
        """
    done = run_script(_noting(code, "snapshot.frames and snapshot.frames[0].line == 2"), **_QUICK)

    assert done.returncode == 0, done.stderr
    assert ["2 <module>", f"{_HEAD + 6} <module>"] in map(_lines, _snapshots(serving))


def test_a_script_that_moves_has_no_snapshot(run_script: Run, serving: Serving) -> None:
    """Steps, output, also a child's, logged values and new lines of the script are, however long each takes."""
    body = "\n".join("        time.sleep(0.4)" for _ in range(16))
    done = run_script(
        f"""
        import subprocess, time, traceml
        traceml.init()
{body}
        for _ in range(16):
            with traceml.trace_step():
                time.sleep(0.4)
        for _ in range(16):
            time.sleep(0.4)
            print("written", flush=True)
        subprocess.run(["sh", "-c", "for part in $(seq 16); do sleep 0.4; echo $part; done"])
        for _ in range(16):
            time.sleep(0.4)
            traceml.log_metric("score", 1.0)
        """,
        TRACEML_HANG_TIMEOUT="12",  # each of the five takes longer than the 6 s after which a snapshot comes
    )

    assert done.returncode == 0, done.stderr
    assert [_lines(snapshot) for snapshot in _snapshots(serving)] == []


def test_a_loop_that_waits_for_a_file_stands_still(run_script: Run, serving: Serving) -> None:
    """It passes the same lines again and again."""
    code = """
        import os, time, traceml
        traceml.init()

        def wait_for(path):
            while not os.path.exists(path):
                time.sleep(0.1)
                if len(seen) > 1:
                    print(len(over))
                    break

        wait_for("build.lock")
        """
    in_it = 'snapshot.user_line and snapshot.user_line.function == "wait_for"'
    done = run_script(_noting(code, in_it, "threading.Timer(3, seen.append, [snapshot]).start()"), **_QUICK)

    assert done.returncode == 0, done.stderr
    assert done.stdout == "0\n"
    assert "wait_for" in {
        snapshot.user_line.function for snapshot in _snapshots(serving) if snapshot.user_line is not None
    }


@pytest.mark.parametrize("native", ["1", "0"], ids=["c", "python"])
def test_values_that_another_thread_logs_are_no_progress(run_script: Run, serving: Serving, native: str) -> None:
    """A thread that logs the load of the host goes on while the training hangs."""
    code = """
        import threading, time, traceml
        traceml.init()

        def watch_host():
            while True:
                traceml.log_metric("load", 0.5)
                traceml.log_text("state", "up")
                time.sleep(0.1)

        threading.Thread(target=watch_host, daemon=True).start()

        def hang():
            while not seen and time.monotonic() < begun + 60:
                time.sleep(0.1)

        with traceml.trace_step():
            begun = time.monotonic()
            hang()
        """
    in_it = 'snapshot.user_line and snapshot.user_line.function == "hang"'
    done = run_script(_noting(code, in_it), **_QUICK, TRACEML_NATIVE=native)

    assert done.returncode == 0, done.stderr
    assert "hang" in {snapshot.user_line.function for snapshot in _snapshots(serving) if snapshot.user_line is not None}


def test_the_notice_of_a_hang_is_no_output_of_the_script(run_script: Run) -> None:
    """The rank prints it itself; taken for work of the script, it made the hang one that computes, and none."""
    code = """
        import sys, time, traceml

        class Tee:
            text = ""

            def write(self, text):
                self.text += text
                return sys.__stderr__.write(text)

            def flush(self):
                sys.__stderr__.flush()

        has_output, make = [], ProgressWatch._make

        def note_made(watch, **options):
            snapshot = make(watch, **options)
            if "traceml: HANG" in sys.stderr.text:
                has_output.append(snapshot.has_output)
            return snapshot

        ProgressWatch._make, sys.stderr = note_made, Tee()
        traceml.init()
        while len(has_output) < 3: time.sleep(0.1)
        print(has_output[1:])  # the first may come between the line and the note that it was one of ours
        """
    done = run_script(_noting(code), **_QUICK, TRACEML_QUIET="0")

    assert done.stdout == "[False, False]\n", done.stderr


def test_an_interrupted_hang_has_not_ended(run_script: Run, serving: Serving) -> None:
    """That the process ends is no progress: the report has to know that it was stuck."""
    code = """
        import time, traceml
        traceml.init()
        time.sleep(600)
        """
    done = run_script(_interrupted(code), **_QUICK)

    assert done.returncode != 0
    snapshots = _snapshots(serving)
    assert snapshots
    assert not any(snapshot.ended for snapshot in snapshots)


@pytest.mark.parametrize("has_moved", [False, True])
def test_what_the_end_of_a_rank_has_moved_is_not_in_the_last_snapshot(
    run_script: Run, serving: Serving, has_moved: bool
) -> None:
    """The launcher asks for it while Ctrl-C takes the rank's stack down: the one before has the place of the hang."""
    code = f"""
        import time, traceml
        traceml.init()
        while not seen: time.sleep(0.1)
        watch, = watches
        watch._moved_ns -= 10 * 10**9  # long enough for the last one
        watch._progress.moved = lambda: {has_moved}
        watch.snapshot_now(is_last=True)
        """
    done = run_script("watches = []\n" + _noting(code, then="watches.append(watch)"), **_QUICK)

    assert done.returncode == 0, done.stderr
    assert [each.is_last for each in _snapshots(serving)].count(True) == (not has_moved)


def test_workers_ahead_of_a_training_that_stands_still_are_not_waited_for(run_script: Run, serving: Serving) -> None:
    """They have made their batches; the training has not asked for one."""
    code = """
        import time, torch, traceml
        from torch.utils.data import DataLoader
        traceml.init()
        for batch in DataLoader(torch.ones(64, 4), batch_size=4, num_workers=2, multiprocessing_context="fork"):
            time.sleep(3600)
        """
    # A busy machine may start the workers in more than the second after which a snapshot comes.
    sleeps = f"snapshot.workers and snapshot.user_line and snapshot.user_line.line == {_HEAD + 5}"
    run_script(_interrupted(code, sleeps), **_QUICK)

    snapshots = (each for each in _snapshots(serving) if each.workers and each.user_line is not None)
    snapshot = next(each for each in snapshots if each.user_line.line == _HEAD + 5)
    assert [worker.waits_for_batch for worker in snapshot.workers] == [None, None]
    assert all(worker.frames == () for worker in snapshot.workers)
    assert snapshot.user_line is not None
    assert snapshot.user_line.line == _HEAD + 5


def test_a_stuck_loader_worker_is_named(run_script: Run, serving: Serving) -> None:
    """The batch that the rank waits for, its worker, and the worker's line, by the signal."""
    code = """
        import threading, torch, traceml
        from torch.utils.data import DataLoader, Dataset
        traceml.init()
        LOCK = threading.Lock()

        class Locked(Dataset):
            def __len__(self):
                return 64

            def __getitem__(self, index):
                if index == 20:
                    with LOCK:
                        pass

                return torch.ones(4)

        LOCK.acquire()
        for batch in DataLoader(Locked(), batch_size=4, num_workers=2, multiprocessing_context="fork"):
            pass
        """
    # The one before its stack is known, and those of workers that a busy machine starts late, come first.
    is_seen = "any(worker.waits_for_batch == 5 and worker.frames for worker in snapshot.workers)"
    run_script(_interrupted(code, is_seen), **_QUICK)

    found = ((snapshot, worker) for snapshot in _snapshots(serving) for worker in snapshot.workers if worker.frames)
    snapshot, stuck = next((each, worker) for each, worker in found if worker.waits_for_batch == 5)
    assert (stuck.index, stuck.state) == (1, "S")
    assert "futex" in stuck.wchan
    assert (stuck.frames[0].function, stuck.frames[0].line, stuck.frames[0].is_user) == (
        "__getitem__",
        _HEAD + 12,
        True,
    )
    assert all(worker.frames == () for worker in snapshot.workers if worker is not stuck)
    assert snapshot.user_line is not None
    assert snapshot.user_line.line == _HEAD + 18
