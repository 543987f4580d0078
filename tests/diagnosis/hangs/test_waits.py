"""Sentences about ranks that wait for another process or thread, or for a connection; and the advice about it."""

from __future__ import annotations

from typing import Any

import pytest

from tests.diagnosis.hangs.standing import found, group, in_backward, line, snapshot
from traceml.database.snapshots.rank_snapshot import FrameSnapshot, ProcessSnapshot, ThreadSnapshot, WorkerSnapshot
from traceml.diagnosis.findings import Finding

SLEEPS = {"wchan": "hrtimer_nanosleep"}
LOCK = {"wchan": "locks_lock_inode_wait", "waits_on": "/tmp/lock"}
HOLDER = ProcessSnapshot(pid=77, name="python build.py", state="S", wchan="hrtimer_nanosleep")
CHILD = ProcessSnapshot(pid=78, name="ffmpeg", state="S", wchan="do_sys_poll")
FULL = ProcessSnapshot(pid=79, name="ffmpeg", state="S", wchan="anon_pipe_write", waits_on="stdout")
STOPPED = ProcessSnapshot(pid=82, name="ffmpeg", state="T", wchan="do_signal_stop")
DEAD = ProcessSnapshot(pid=81, state="Z", end="ended with exit code 3")
HELPER = ThreadSnapshot(name="Thread-1", line=line(40, "upload"))
QUEUE = FrameSnapshot(file="/usr/lib/python3.11/multiprocessing/queues.py", line=103, function="get")
BEHIND = (group(14, "all_reduce", flying=False),)
END = FrameSnapshot(file="/usr/lib/python3.11/threading.py", line=1590, function="_shutdown")


def stuck(*frames: FrameSnapshot, **seen: Any) -> Finding:
    """Return the finding about one process that stands still."""
    finding = found(snapshot(0, *(frames or (line(6, "stuck"),)), **seen), ranks=1)
    assert finding is not None
    return finding


@pytest.mark.parametrize(
    ("seen", "words", "advice"),
    [
        (
            LOCK | {"blocker": HOLDER},
            "waiting for a file lock (/tmp/lock, held by process 77, python build.py) for 75 s.",
            "`kill 77`",
        ),
        (
            LOCK | {"blocker": ProcessSnapshot(pid=70, is_self=True, name="python train.py")},
            "waiting for a file lock (/tmp/lock, held by this process itself) for 75 s.",
            "Open the file only once",
        ),
        (LOCK, "waiting for a file lock (/tmp/lock) for 75 s.", "stale lock file"),
        ({**SLEEPS, "waits_on": "lock /a.lock"}, "waiting for a file lock (/a.lock) for 75 s.", "stale lock file"),
        (
            {**SLEEPS, "waits_on": "lock /a.lock", "blocker": HOLDER},
            "waiting for a file lock (/a.lock, held by process 77, python build.py)",
            "why process 77 keeps the lock",
        ),
        (
            {"wchan": "do_wait", "blocker": CHILD},
            "waiting for process 78 to end (ffmpeg) for 75 s.",
            "what process 78 does",
        ),
        (
            {"wchan": "do_wait", "blocker": FULL},
            "waiting for process 79 to end (ffmpeg, nobody reads its stdout) for 75 s.",
            "communicate()",
        ),
        (
            {"wchan": "do_wait", "blocker": STOPPED},
            "waiting for process 82 to end (ffmpeg, stopped by a signal) for 75 s.",
            "`kill -CONT 82`",
        ),
        ({"wchan": "do_sys_poll", "blocker": CHILD}, "waiting for process 78 to end (ffmpeg)", "what process 78 does"),
        ({"wchan": "do_wait"}, "waiting for a child process to end for 75 s.", "traceml stacks"),
        (
            {"wchan": "anon_pipe_read", "blocker": DEAD},
            "waiting for another process (its child process 81 ended with exit code 3) for 75 s.",
            "why process 81 has ended",
        ),
        (
            {"wchan": "futex_wait", "blocker": ProcessSnapshot(state="Z", end="has died")},
            "waiting for another process (a process of its Pool has died) for 75 s.",
            "ProcessPoolExecutor raises BrokenProcessPool",
        ),
        ({"wchan": "anon_pipe_read", "waits_on": "stdin"}, "waiting for input on stdin", "option of the script"),
        (
            {"wchan": "wait_woken", "waits_on": "tcp 10.0.0.7:443"},
            "waiting for the network (10.0.0.7:443)",
            "Give the connection a timeout",
        ),
        (
            {"wchan": "do_sys_poll", "waits_on": "connect 10.0.0.7:443"},
            "stuck, connecting to 10.0.0.7:443 for 75 s.",
            "Give the connection a timeout",
        ),
        ({"wchan": "anon_pipe_write", "waits_on": "stderr"}, "writing to stderr, which nobody", "parent process read"),
        ({"wchan": "anon_pipe_write", "waits_on": "pipe:[5]"}, "writing to pipe:[5], which nobody", "communicate()"),
        ({"process_state": "D", "waits_on": "/data/x"}, "waiting for a disk (/data/x)", "or the server"),
        ({"wchan": "request_wait_answer", "waits_on": "/nas/x"}, "waiting for a disk (/nas/x)", "or the server"),
        ({"process_state": "D", "wchan": "kernel_clone"}, "waiting for a child process to start", "traceml stacks"),
        ({"process_state": "D", "wchan": "__refrigerator"}, "stuck, frozen by its cgroup", "docker unpause"),
        ({**SLEEPS, "process_state": "D", "answered": "kernel"}, "frozen by its cgroup for", "docker unpause"),
        ({"wchan": "get_signal", "answered": "kernel"}, "frozen by its cgroup for", "docker unpause"),
        ({"wchan": "inet_csk_accept"}, "stuck, waiting for a connection for 75 s.", "traceml stacks"),
        ({"wchan": "do_epoll_wait"}, "stuck, waiting for input for 75 s.", "traceml stacks"),
        ({"wchan": "wait_for_partner"}, "waiting for another process to open the pipe for 75 s.", "traceml stacks"),
        ({"wchan": "do_sigtimedwait.isra."}, "stuck, waiting for a signal for 75 s.", "traceml stacks"),
    ],
)
def test_what_a_rank_waits_for_is_named(seen: dict[str, Any], words: str, advice: str) -> None:
    """The process that has the lock, the child, the other end of the connection; and what to do about it."""
    finding = stuck(**seen)

    assert words in finding.summary
    assert advice in finding.next


def test_the_process_that_is_waited_for_is_evidence() -> None:
    """Its number; there is none where a rank only sleeps."""
    assert stuck(**LOCK, blocker=HOLDER).evidence["blocker"] == 77
    assert "blocker" not in stuck(wchan="hrtimer_nanosleep").evidence


def test_a_wait_for_a_lock_tells_where_the_other_threads_are() -> None:
    """One of them may hold it."""
    finding = stuck(wchan="futex_do_wait", threads=(HELPER,))

    assert finding.summary == (
        "Rank 0 has been in train.py:6 stuck, waiting for a lock, with its thread 'Thread-1' in train.py:40 upload "
        "for 75 s."
    )
    assert finding.next.startswith("Find out what thread 'Thread-1' waits for at train.py:40 upload: it may hold the")


@pytest.mark.parametrize(
    ("function", "says"),
    [
        ("Thread.join", "If join() is of thread 'Thread-1', find out what keeps it at train.py:40 upload"),
        ("Event.wait", "Find out what thread 'Thread-1' waits for at train.py:40 upload"),
    ],
)
def test_a_thread_that_is_joined_is_told_to_end(function: str, says: str) -> None:
    """It has no lock, and fills no queue."""
    joins = FrameSnapshot(file="/usr/lib/python3.11/threading.py", line=1119, function=function)

    finding = stuck(joins, line(6, "stuck"), wchan="futex_do_wait", threads=(HELPER,))

    assert finding.next.startswith(says)


def test_threads_at_one_line_are_told_once() -> None:
    """As those that answer remote calls: a library has started them, without a name."""
    threads = (ThreadSnapshot(line=line(7, "push"), is_daemon=True),) * 2
    finding = stuck(wchan="futex_do_wait", threads=threads)

    assert "stuck, waiting for a lock, with 2 of its threads in train.py:7 push for 75 s." in finding.summary
    assert finding.next.startswith("Find out what the 2 threads wait for at train.py:7 push: one of them may hold")
    alone = stuck(wchan="futex_do_wait", threads=threads[:1])
    assert ", with its thread in train.py:7 push for 75 s." in alone.summary
    assert alone.next.startswith("Find out what its thread waits for at train.py:7 push: it may hold the lock")


def test_threads_at_several_lines_have_no_advice_of_their_own() -> None:
    """Which of them has the lock is not known."""
    other = ThreadSnapshot(name="log", line=line(50, "log"))
    finding = stuck(wchan="futex_do_wait", threads=(HELPER, other))

    assert (
        "with its thread 'Thread-1' in train.py:40 upload, with its thread 'log' in train.py:50 log" in finding.summary
    )
    assert not finding.next.startswith("Find out what thread")


def test_a_thread_that_had_failed_is_told() -> None:
    """What it was to bring never comes; it holds no lock any more."""
    failed = ThreadSnapshot(
        name="feeder", line=line(9, "feed"), is_daemon=True, exception="ValueError: no data\nat all"
    )
    finding = stuck(wchan="futex_do_wait", threads=(failed,))

    assert finding.summary == (
        "Rank 0 has been in train.py:6 stuck, waiting for a lock for 75 s. Its thread 'feeder' had ended with "
        "ValueError: no data at train.py:9 feed."
    )
    assert finding.evidence["failed_thread"] == "feeder"
    assert "look at that exception" in finding.next


def test_an_event_loop_waits_for_an_event() -> None:
    """The line is that of the coroutine, and the kernel's wait that of the loop."""
    loop = FrameSnapshot(file="/usr/lib/python3.11/asyncio/base_events.py", line=1000, function="run_until_complete")

    assert (
        "in train.py:6 stuck, waiting for an event for 75 s." in stuck(line(6, "stuck"), loop, wchan="ep_poll").summary
    )


def test_a_rank_that_sleeps_waits_for_no_thread() -> None:
    """A thread of its own that runs beside it says nothing."""
    assert "Thread-1" not in stuck(wchan="hrtimer_nanosleep", threads=(HELPER,)).summary


def test_an_end_that_waits_for_a_thread_names_it() -> None:
    """The main thread has no line of the user's code any more; the thread has."""
    finding = stuck(END, phase="exit", wchan="futex_do_wait", threads=(HELPER,))

    assert finding.summary == (
        "Rank 0 has been at its end, waiting for its thread 'Thread-1' in train.py:40 upload for 75 s."
    )
    assert (finding.evidence["file"], finding.evidence["line"]) == ("/home/me/train.py", 40)
    assert finding.evidence["thread"] == "Thread-1"
    assert "daemon" in finding.next


@pytest.mark.parametrize(
    ("file", "function", "says"),
    [
        ("queues.py", "Queue._finalize_join", "let its reader empty it"),
        ("process.py", "BaseProcess.join", "daemon=True"),
    ],
)
def test_an_end_that_waits_for_processes_tells_what_it_waits_for(file: str, function: str, says: str) -> None:
    """None of them is a call of the script that could be given a timeout."""
    folder = "/usr/lib/python3.11/multiprocessing"
    call = FrameSnapshot(file=f"{folder}/{file}", line=149, function=function)
    at_end = FrameSnapshot(file=f"{folder}/util.py", line=357, function="_exit_function")
    blocker = ProcessSnapshot(pid=81, name="python train.py", state="S")

    finding = stuck(call, at_end, phase="exit", wchan="do_wait", blocker=blocker)

    assert says in finding.next
    assert "timeout" not in finding.next


def test_a_thread_of_a_pool_is_not_told_to_be_made_a_daemon() -> None:
    """It is one that the pool has started."""
    joins = FrameSnapshot(file="/usr/lib/python3.11/concurrent/futures/thread.py", line=31, function="_python_exit")

    assert "that was submitted to it" in stuck(joins, END, phase="exit", wchan="futex_do_wait", threads=(HELPER,)).next


def test_an_end_does_not_wait_for_a_daemon() -> None:
    """The interpreter ends without it."""
    daemon = ThreadSnapshot(name="Thread-1", line=line(40, "upload"), is_daemon=True)

    assert "waiting for its thread" not in stuck(END, phase="exit", threads=(daemon,)).summary


def test_a_stopped_worker_is_to_be_continued() -> None:
    """Nothing in the data set keeps it."""
    worker = WorkerSnapshot(index=0, pid=80, state="T", waits_for_batch=2, frames=(line(9, "__getitem__"),))
    waits = snapshot(1, QUEUE, line(28), phase="input_wait", groups=BEHIND, workers=(worker,), wchan="futex_do_wait")
    finding = found(in_backward(0), waits)

    assert finding is not None
    assert "stopped by a signal" in finding.summary
    assert finding.next == "Continue process 80 with `kill -CONT 80`, and find out what stopped it."


def test_a_worker_before_a_locked_file_is_not_told_to_be_spawned() -> None:
    """A lock of a file is no lock of a thread: who holds it is told."""
    worker = WorkerSnapshot(index=0, pid=80, state="S", waits_for_batch=2, blocker=HOLDER, **LOCK)
    waits = snapshot(1, QUEUE, line(28), phase="input_wait", groups=BEHIND, workers=(worker,), wchan="futex_do_wait")
    finding = found(in_backward(0), waits)

    assert finding is not None
    assert "(process 80) is waiting for a file lock (/tmp/lock, held by process 77" in finding.summary
    assert "spawn" not in finding.next
    assert "`kill 77`" in finding.next


def test_a_rank_that_holds_the_lock_is_named() -> None:
    """It waits for the one that it keeps out; ending it would end the job."""
    holder = ProcessSnapshot(pid=77, name="python train.py", state="S", wchan="futex_do_wait")
    waits = snapshot(1, line(28), groups=BEHIND, pid=78, blocker=holder, **LOCK)
    finding = found(in_backward(0, pid=77), waits)

    assert finding is not None
    assert finding.ranks == (1,)
    assert "waiting for a file lock (/tmp/lock, held by rank 0) for 75 s" in finding.summary
    assert finding.next == "Let rank 0 release the lock before it waits for other ranks."


def test_a_rank_that_is_ready_to_run_computes() -> None:
    """On a busy host it gets less than a fifth of a core."""
    runs = snapshot(0, line(6, "solve"), process_state="R", cpu_share=0.05)

    assert found(runs, ranks=1) is None
    assert found(runs, ranks=1, hang_timeout_s=14.0) is not None


def test_a_call_that_holds_the_gil_may_read_a_large_file_before_the_first_step() -> None:
    """As json.load does; in training a call that uses a core has twice the time, and one that sleeps none."""
    loads = snapshot(
        0, line(6, "read_labels"), answered="signal", process_state="R", phase="startup", step=-1, in_step=False
    )
    training = snapshot(0, line(6, "match"), answered="signal", process_state="R")
    sleeps = snapshot(0, line(6, "wait"), answered="signal", phase="startup", step=-1, in_step=False)

    computes = snapshot(0, line(6, "sort"), answered="signal", process_state="R", cpu_share=1.0)

    assert found(loads, ranks=1, rows=False) is None
    assert found(loads, ranks=1, rows=False, hang_timeout_s=14.0) is not None
    assert found(training, ranks=1) is not None
    assert found(sleeps, ranks=1, rows=False) is not None
    assert found(computes, ranks=1) is None
    assert found(computes, ranks=1, hang_timeout_s=34.0) is not None


@pytest.mark.parametrize(
    ("call", "words"), [("get", "waiting for an item of a queue"), ("put", "waiting for room in a queue")]
)
def test_a_queue_is_named(call, words):
    """Its lock is a detail; another thread of the script fills or empties it."""
    waits = FrameSnapshot(file="/usr/lib/python3.11/threading.py", line=327, function="Condition.wait")
    called = FrameSnapshot(file="/usr/lib/python3.11/queue.py", line=171, function=f"Queue.{call}")

    finding = stuck(waits, called, line(6, "stuck"), wchan="futex_do_wait", threads=(HELPER,))

    assert f"in train.py:6 stuck, {words}, with its thread 'Thread-1' in train.py:40 upload" in finding.summary


THREADING, FUTURES = "/usr/lib/python3.11/threading.py", "/usr/lib/python3.11/concurrent/futures/_base.py"


@pytest.mark.parametrize(
    ("file", "function", "words"),
    [
        (THREADING, "Event.wait", "waiting for an event to be set"),
        (THREADING, "Condition.wait_for", "waiting for a condition to be notified"),
        (THREADING, "Semaphore.acquire", "waiting for a semaphore"),
        (FUTURES, "Future.result", "waiting for a result of an executor"),
        ("/usr/lib/python3.10/threading.py", "wait", "waiting for a lock"),  # the class is not known there
        ("/home/me/threading.py", "Event.wait", "waiting for a lock"),
    ],
)
def test_what_another_thread_has_to_do_is_named(file: str, function: str, words: str) -> None:
    """An event has no lock that anybody could release."""
    inner = FrameSnapshot(file=THREADING, line=327, function="Condition.wait")
    is_user = file.startswith("/home")
    called = FrameSnapshot(file=file, line=629, function=function, is_user=is_user)
    frames = (called,) if is_user or function == "wait" else (inner, called)

    finding = stuck(*frames, line(6, "stuck"), wchan="futex_do_wait")

    assert words in finding.summary


def test_a_lock_in_a_queue_of_the_user_is_a_lock():
    waits = FrameSnapshot(file="/home/me/queue.py", line=9, function="get", is_user=True)

    assert "waiting for a lock" in stuck(waits, wchan="futex_do_wait").summary
