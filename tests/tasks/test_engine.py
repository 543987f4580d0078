"""Runtimes at exit, at Ctrl-C, and in forked children."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import threading

import pytest

from traceml import Runtime, TaskForkedError

HEAD = """
import os, sys, threading, time
import traceml
"""


def run(code: str, **more: object) -> subprocess.CompletedProcess[str]:
    script = HEAD + textwrap.dedent(code)
    return subprocess.run(
        [sys.executable, "-W", "error", "-c", script], capture_output=True, text=True, timeout=240, check=False, **more
    )


@pytest.mark.process
def test_the_interpreter_waits_for_tasks() -> None:
    """Also for tasks of tasks, and for a Runtime without references."""
    done = run(r"""
        rt = traceml.Runtime(threads=1)
        async def later():
            os.write(1, b"coroutine\n")
        def parent():
            time.sleep(0.1)
            rt.submit(os.write, 1, b"child\n")
            rt.submit(later)
        rt.submit(parent)
    """)

    assert (sorted(done.stdout.split()), done.stderr, done.returncode) == (["child", "coroutine"], "", 0)


@pytest.mark.process
def test_tasks_may_use_executors_at_the_end() -> None:
    """`asyncio` loads them at their first use, here while the interpreter waits."""
    done = run(r"""
        import asyncio
        rt = traceml.Runtime(threads=1)
        async def fetch():
            await asyncio.to_thread(os.write, 1, b"from a thread\n")
        rt.submit(fetch)
    """)

    assert (done.stdout, done.stderr, done.returncode) == ("from a thread\n", "", 0)


@pytest.mark.process
def test_tasks_may_use_another_runtime_at_the_end() -> None:
    """Also one that they make while the interpreter waits."""
    done = run(r"""
        rt, ending = traceml.Runtime(threads=1), threading.Event()
        def work():
            ending.wait()
            traceml.get_default_runtime().submit(parent)
        def parent():
            time.sleep(0.1)
            traceml.get_default_runtime().submit(os.write, 1, b"child\n")
        rt.submit(work)
        threading._register_atexit(ending.set)
    """)

    assert (done.stdout, done.stderr, done.returncode) == ("child\n", "", 0)


@pytest.mark.process
def test_the_interpreter_waits_for_no_task_beyond_its_time() -> None:
    done = run("""
        rt = traceml.Runtime(threads=1)
        handle = rt.submit(threading.Event().wait, timeout=0.05)
        try:
            handle.get()
        except TimeoutError as error:
            print("timed out")
    """)

    assert (done.stdout, done.returncode) == ("timed out\n", 0)


@pytest.mark.process
def test_ctrl_c_ends_a_program_at_once() -> None:
    """With a queue full of work, while the main thread waits for it."""
    script = HEAD + textwrap.dedent("""
        from traceml.tasks.task_record import idle_waiters
        def announce():
            while not idle_waiters:
                time.sleep(0.001)
            print("ready", flush=True)
        with traceml.Runtime(threads=1) as rt:
            for i in range(1000):
                rt.submit(threading.Event().wait, 60)
            threading.Thread(target=announce).start()
            rt.wait_all()
    """)
    process = subprocess.Popen(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=240)

    assert process.returncode == -signal.SIGINT
    assert errors.rstrip().endswith("KeyboardInterrupt")


@pytest.mark.process
def test_an_exit_with_work_left_is_an_exit() -> None:
    done = run("""
        with traceml.Runtime(threads=1) as rt:
            for i in range(1000):
                rt.submit(threading.Event().wait, 60)
            sys.exit(5)
    """)

    assert (done.returncode, done.stderr) == (5, "")


@pytest.mark.process
def test_a_forked_child_has_fresh_pools() -> None:
    """While the parent's threads, loop and watchdog are at work."""
    done = run("""
        import asyncio
        rt = traceml.Runtime(threads=2)
        async def double(x):
            await asyncio.sleep(0)
            return 2 * x
        release = threading.Event()
        running, queued = rt.submit(release.wait), [rt.submit(release.wait) for _ in range(5)]
        rt.submit(double, 1).get()
        rt.submit(len, "a", io=True, timeout=60).get()
        child = os.fork()
        if child == 0:
            for handle in (running, *queued):
                try:
                    handle.get(timeout=60)
                except traceml.TaskForkedError as error:
                    assert "Submit it again" in str(error)
                else:
                    os._exit(3)
            assert rt.get_progress()["total"] == 0
            assert [rt.submit(len, "ab").get(timeout=60) for _ in range(10)] == [2] * 10
            assert rt.submit(double, 4).get(timeout=60) == 8
            assert rt.submit(len, "abc", timeout=60, io=True).get() == 3
            rt.wait_all(timeout=60)
            rt.shutdown()
            os._exit(0)
        status = os.waitpid(child, 0)[1]
        release.set()
        rt.wait_all()
        assert rt.get_progress()["completed"] == 8
        print("child", os.waitstatus_to_exitcode(status))
    """)

    assert (done.stdout, done.stderr) == ("child 0\n", "")


@pytest.mark.process
def test_a_process_pool_can_be_used_in_a_task() -> None:
    """It forks in a worker's thread."""
    done = run("""
        import multiprocessing
        def work():
            context = multiprocessing.get_context("fork")
            with context.Pool(2) as pool:
                return pool.map(len, ["a", "ab"])
        with traceml.Runtime(threads=1) as rt:
            print(rt.submit(work).get(), rt.submit(lambda: os.fork() or os._exit(0)).get() > 0)
    """)

    assert (done.stdout, done.stderr) == ("[1, 2] True\n", "")


@pytest.mark.process
@pytest.mark.parametrize("work", ["start", "nested"])
def test_a_process_that_a_task_forked_ends(work) -> None:
    """At its exit it waits for its own tasks, not for those that its parent had begun, also when they run in place."""
    done = run(f"""
        import multiprocessing
        context = multiprocessing.get_context("fork")
        def child():
            lengths = [rt.submit(len, "a" * size) for size in range(3)]
            rt.wait_all()
            assert [length.get() for length in lengths] == [0, 1, 2]
            progress = rt.get_progress()
            assert (progress["completed"], progress["total"] - progress["running"]) == (3, 3), progress
            rt.submit(lambda: time.sleep(0.2) or os.write(1, b"waited "))
        def code_of(target):
            process = context.Process(target=target)
            process.start()
            process.join(60)
            code = process.exitcode
            process.kill()
            return code
        def start():
            return code_of(int), code_of(child)
        def nested():
            return rt.submit(start).get()
        with traceml.Runtime(threads=1) as rt:
            print(rt.submit({work}).get())
    """)

    assert (done.stdout, done.stderr) == ("waited (0, 0)\n", "")


@pytest.mark.process
def test_a_child_that_returns_from_its_task_ends() -> None:
    """A bare fork inside a task: the child has no worker to go back to."""
    done = run("""
        with traceml.Runtime(threads=1) as rt:
            handle = rt.submit(os.fork)
            while not handle.done():
                time.sleep(0.01)
            print(os.waitpid(handle.get(), 0)[1])
    """)

    assert (done.stdout, done.stderr) == ("0\n", "")


@pytest.mark.process
def test_a_forked_child_in_this_process(rt: Runtime) -> None:
    """The child raises the error; the parent is not affected."""
    release = threading.Event()
    handle = rt.submit(release.wait)
    child = os.fork()
    if child == 0:
        try:
            handle.get(timeout=60)
        except TaskForkedError:
            os._exit(7)

        os._exit(1)

    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
    release.set()
    assert handle.get() is True


@pytest.mark.process
def test_a_task_that_waits_in_the_parent_raises_in_a_forked_child(single: Runtime) -> None:
    """Its thread runs another task in place of the wait."""
    release, began = threading.Event(), threading.Event()

    def inner() -> bool:
        began.set()
        return release.wait()

    outer = single.submit(lambda: single.submit(inner).get())
    assert began.wait(60)
    child = os.fork()
    if child == 0:
        try:
            outer.get(timeout=60)
        except TaskForkedError:
            os._exit(7)

        os._exit(1)

    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
    release.set()
    assert outer.get() is True
