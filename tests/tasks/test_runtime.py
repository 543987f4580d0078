"""The Runtime as docs/tasks.md describes it."""

from __future__ import annotations

import contextvars
import gc
import os
import threading
import time
import weakref
from typing import Any

import pytest

import traceml
from tests.eventually import eventually
from traceml import (
    NotCallableError,
    Runtime,
    RuntimeClosedError,
    TaskError,
    TasksFailedError,
    UsageError,
    WaitTimeoutError,
    get_default_runtime,
    set_default_runtime,
)


class Value:
    """An object that takes weak references."""


def fail(text: str = "no") -> None:
    raise ValueError(text)


def index(filename: str) -> str:
    return f"index of {filename}"


def process(indexed: Any) -> str:
    return f"processed {indexed.get() if isinstance(indexed, traceml.TaskHandle) else indexed}"


def test_the_documents_examples_run_as_written(capsys: pytest.CaptureFixture[str]) -> None:
    files = ["a.pfw", "b.pfw"]
    rt = traceml.Runtime(threads=8, io_threads=4)

    # Submit a Python callable
    h = rt.submit(lambda x, y: x + y, 3, 4, name="add")
    result = h.get()
    assert result == 7

    # Fire multiple tasks
    handles = [rt.submit(process, f, name=f"proc-{f}") for f in files]
    rt.wait_all()

    # Check results
    for h in handles:
        print(h.name, h.get())

    assert capsys.readouterr().out == "proc-a.pfw processed a.pfw\nproc-b.pfw processed b.pfw\n"
    rt.shutdown()


def test_the_documents_compositions_run_as_written(single: Runtime) -> None:
    """Arguments by value and by handle; with one worker the tasks run inside the one that waits."""
    rt = single

    def by_value(filename: str) -> str:
        h1 = rt.submit(index, filename)
        result = h1.get()
        h2 = rt.submit(process, result)
        return h2.get()

    def by_handle(filename: str) -> str:
        h1 = rt.submit(index, filename)
        h2 = rt.submit(process, h1)
        return h2.get()

    for compose in (by_value, by_handle):
        assert rt.submit(compose, "trace.pfw.gz", name="compose").get() == "processed index of trace.pfw.gz"


def test_the_documents_error_handling_runs_as_written(rt: Runtime) -> None:
    seen = []
    h = rt.submit(fail, name="fail")
    with pytest.raises(ValueError, match="no"):
        h.get()

    rt.wait_all()
    assert [f"{h.name} failed: {h.exception}" for h in rt.get_failed()] == ["fail failed: no"]

    with pytest.raises(RuntimeError, match=r"1 task\(s\) failed: fail: ValueError: no"):
        rt.wait_all(raise_on_error=True)

    rt.set_error_callback(lambda h, e: seen.append(f"FAILED {h.name}: {e}"))
    rt.submit(fail, name="monitored")
    rt.wait_all()
    assert seen == ["FAILED monitored: no"]


def test_a_failure_has_its_type_and_the_users_traceback(rt: Runtime) -> None:
    handle = rt.submit(fail)
    for _ in range(3):  # waiting again does not lengthen it
        with pytest.raises(ValueError, match="no") as caught:
            handle.get()

        assert [frame.name for frame in caught.traceback][-1] == "fail"
        assert sum(frame.name == "fail" for frame in caught.traceback) == 1

    assert handle.exception is caught.value
    assert handle.state == "failed"


def test_all_failures_are_raised_together(rt: Runtime) -> None:
    """A RuntimeError, and an ExceptionGroup with the originals and their tracebacks."""
    rt.submit(fail, "a", name="first").done()
    rt.submit(dict[str, int]().__getitem__, "b")
    rt.submit(len, 5)
    rt.submit(len, "fine")
    with pytest.raises(RuntimeError, match=r"^3 task\(s\) failed: ") as caught:
        rt.wait_all(raise_on_error=True)

    assert isinstance(caught.value, ExceptionGroup)
    assert isinstance(caught.value, TasksFailedError)
    assert {type(error) for error in caught.value.exceptions} == {ValueError, KeyError, TypeError}
    value, rest = caught.value.split(ValueError)
    assert value is not None
    assert value.exceptions[0].__traceback__.tb_frame.f_code.co_name == "fail"
    assert isinstance(rest, TasksFailedError)


def test_failures_stay_until_they_are_cleared(rt: Runtime) -> None:
    rt.submit(fail)
    rt.wait_all()
    for _ in range(2):
        with pytest.raises(TasksFailedError):
            rt.wait_all(raise_on_error=True)

    rt.clear_failed()
    rt.wait_all(raise_on_error=True)
    assert rt.get_failed() == []


def test_many_failures_make_one_line(rt: Runtime) -> None:
    for i in range(200):
        rt.submit(fail, str(i), name=f"t{i}")

    with pytest.raises(TasksFailedError, match=r"^200 task\(s\) failed: .*; and 197 more$") as caught:
        rt.wait_all(raise_on_error=True)

    assert len(caught.value.exceptions) == 200


def test_an_exit_in_a_task_is_raised_where_it_is_waited_for(rt: Runtime) -> None:
    """SystemExit does not end the worker; it is raised where the task is waited for."""
    handle = rt.submit(os.sys.exit, 3)
    with pytest.raises(SystemExit) as caught:
        handle.get()

    assert caught.value.code == 3
    assert [rt.submit(len, "ab").get() for _ in range(20)] == [2] * 20


def test_an_exit_in_a_task_is_a_failure_among_others(rt: Runtime) -> None:
    """It is raised with the other failures, which it hid when `wait_all` raised it by itself."""
    rt.submit(os.sys.exit, 3, name="leave").done()
    rt.submit(fail, name="bad")
    with pytest.raises(RuntimeError, match=r"^2 task\(s\) failed: .*leave: SystemExit: 3") as caught:
        rt.wait_all(raise_on_error=True)

    assert isinstance(caught.value, TasksFailedError)
    assert {type(error) for error in caught.value.exceptions} == {TaskError, ValueError}
    (left,) = (error for error in caught.value.exceptions if isinstance(error, TaskError))
    assert isinstance(left.__cause__, SystemExit)
    assert left.__cause__.code == 3


def test_an_error_callback_is_called_after_the_task_is_done(rt: Runtime) -> None:
    seen: list[Any] = []
    rt.set_error_callback(lambda handle, error: seen.append((handle.done(), handle.state, handle.exception is error)))
    rt.submit(fail)
    rt.wait_all()  # waits for the callback too

    assert seen == [(True, "failed", True)]


def test_an_error_callback_may_use_the_runtime(single: Runtime) -> None:
    results = []

    def callback(handle: Any, error: BaseException) -> None:
        results.append(single.submit(len, "abc").get())
        single.wait_all()

    single.set_error_callback(callback)
    single.submit(fail)
    single.wait_all()

    assert results == [3]


@pytest.mark.parametrize("error", [KeyError("mine"), SystemExit(4)])
def test_errors_of_a_callback_are_reported(rt: Runtime, caplog: pytest.LogCaptureFixture, error: BaseException) -> None:
    def callback(*_: Any) -> None:
        raise error

    rt.set_error_callback(callback)
    rt.submit(fail, name="bad")
    rt.wait_all()

    assert "the error callback failed for task 'bad'" in caplog.text
    assert {"task": "bad", "error": f"error callback: {type(error).__name__}: {error}"} in rt.get_progress()["errors"]
    rt.set_error_callback(None)
    assert rt.submit(len, "a").get() == 1


def test_a_callback_must_be_callable(rt: Runtime) -> None:
    with pytest.raises(NotCallableError, match=r"set_error_callback\(\) takes a callable or None, not str 'print'"):
        rt.set_error_callback("print")  # type: ignore[arg-type]


def test_tasks_of_tasks_are_waited_for(rt: Runtime) -> None:
    done = []

    def tree(depth: int) -> None:
        time.sleep(0.001)
        if depth:
            rt.submit(tree, depth - 1)
            rt.submit(tree, depth - 1)

        done.append(depth)

    rt.submit(tree, 5)
    rt.wait_all()

    assert len(done) == 63


def test_shutdown_waits_for_tasks_of_tasks() -> None:
    done = []
    with Runtime(threads=1) as rt:

        def parent() -> None:
            time.sleep(0.02)
            rt.submit(done.append, 1)

        rt.submit(parent)

    assert done == [1]


def test_wait_all_can_run_out_of_time(rt: Runtime) -> None:
    release = threading.Event()
    rt.submit(release.wait)
    rt.submit(release.wait, io=True)
    with pytest.raises(WaitTimeoutError, match=r"2 tasks had not ended after 0.05 s"):
        rt.wait_all(timeout=0.05)

    release.set()
    rt.wait_all(timeout=60)


def test_io_tasks_have_threads_of_their_own(rt: Runtime) -> None:
    """A full compute pool does not delay I/O tasks."""
    release = threading.Event()
    for _ in range(4):
        rt.submit(release.wait)

    handle = rt.submit(threading.current_thread, io=True)
    eventually(handle.done)
    release.set()

    assert handle.get().name.startswith("traceml-io-")
    assert rt.submit(lambda: threading.current_thread().name).get()


def test_contexts_are_those_of_the_submitter(rt: Runtime) -> None:
    """Context variables that a task sets stay in the task."""
    variable = contextvars.ContextVar("variable", default="none")
    variable.set("mine")

    def change() -> str:
        before = variable.get()
        variable.set("changed")
        return before

    assert [rt.submit(change).get() for _ in range(3)] == ["mine"] * 3
    assert variable.get() == "mine"


def test_results_live_no_longer_than_their_handles(rt: Runtime) -> None:
    """Results of tasks that a worker ran, that were waited for, and that ran before the worker slept."""
    for wait in (lambda handle: eventually(handle.done), lambda handle: handle.get()):
        handle = rt.submit(Value)
        wait(handle)
        result = weakref.ref(handle.get())
        del handle
        eventually(lambda result=result: result() is None)


def test_results_of_tasks_run_in_place_are_not_kept_by_the_queue(single: Runtime) -> None:
    """The one worker waits itself, so the entries of the tasks that ran in place are still in its queue."""

    def parent() -> list[object]:
        handles = [single.submit(Value) for _ in range(50)]
        results = [weakref.ref(handle.get()) for handle in handles]
        handles.clear()
        return [result() for result in results]

    assert single.submit(parent).get() == [None] * 50


def test_arguments_are_let_go_with_the_end(rt: Runtime) -> None:
    value = Value()
    kept = weakref.ref(value)
    handle = rt.submit(lambda _: None, value)
    handle.wait()
    del value
    eventually(lambda: kept() is None)


def test_failures_are_kept_and_then_let_go(rt: Runtime) -> None:
    def lose(value: Value) -> None:
        raise LookupError

    value = Value()
    kept = weakref.ref(value)
    rt.submit(lose, value)
    rt.wait_all()
    del value
    assert len(rt.get_failed()) == 1
    assert kept() is not None  # in the traceback

    rt.clear_failed()
    eventually(lambda: gc.collect() >= 0 and kept() is None)  # the worker may still be in the task's last lines


@pytest.mark.parametrize(
    "arguments", [{"threads": -1}, {"io_threads": -2}, {"threads": 1.5}, {"threads": True}, {"threads": 10**9}]
)
def test_sizes_must_be_numbers_of_threads(arguments: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match="whole number of threads"):
        Runtime(**arguments)


def test_an_infinite_time_is_no_limit(rt: Runtime) -> None:
    """The waits of a handle took it, a task's limit did not."""
    with Runtime(1, timeout=float("inf"), stall_after=float("inf")) as unlimited:
        assert unlimited.submit(len, "ab").get(timeout=float("inf")) == 2

    assert rt.submit(len, "ab", timeout=float("inf")).get() == 2


@pytest.mark.parametrize("seconds", [0, -1, float("nan"), "1", True])
def test_times_must_be_positive(rt: Runtime, seconds: Any) -> None:
    with pytest.raises(UsageError, match="positive number of seconds"):
        rt.submit(len, "", timeout=seconds)

    for name in ("timeout", "stall_after"):
        with pytest.raises(UsageError, match=f"{name}="):
            Runtime(**{name: seconds})


def test_sizes_suit_the_host() -> None:
    with Runtime() as rt:
        assert rt.threads == len(os.sched_getaffinity(0))
        assert rt.io_threads > rt.threads
        assert len(rt.get_progress()["workers"]) == rt.threads
        assert len(rt.get_progress()["io_workers"]) == rt.io_threads


def test_submit_after_shutdown_raises() -> None:
    rt = Runtime(threads=1)
    assert rt.submit(len, "ab").get() == 2
    rt.shutdown()
    rt.shutdown()  # again: nothing happens
    with pytest.raises(RuntimeClosedError, match="shut down"):
        rt.submit(len, "ab")

    with pytest.raises(RuntimeClosedError):
        rt.submit(nothing)


def test_shutdown_without_wait_lets_tasks_end() -> None:
    done, release = [], threading.Event()
    rt = Runtime(threads=1)
    for i in range(3):
        rt.submit(lambda i=i: (release.wait(), done.append(i)))

    rt.shutdown(wait=False)
    assert done == []
    release.set()
    eventually(lambda: done == [0, 1, 2])


def test_shutdown_can_cancel_what_has_not_begun() -> None:
    release = threading.Event()
    rt = Runtime(threads=1)
    running = rt.submit(release.wait, 10)
    queued = [rt.submit(len, "a") for _ in range(3)]
    eventually(lambda: running.state == "running")
    rt.shutdown(wait=False, cancel=True)
    assert [one.state for one in queued] == ["cancelled"] * 3
    release.set()
    rt.shutdown()
    assert running.get() is True


def test_a_task_may_shut_its_runtime_down() -> None:
    rt = Runtime(threads=1)
    handle = rt.submit(rt.shutdown)
    eventually(handle.done)
    handle.get()


def test_an_interrupted_block_waits_for_nothing() -> None:
    """After Ctrl-C in a `with` block queued tasks never begin, and the exception propagates."""
    release, queued = threading.Event(), []

    def block() -> None:
        with Runtime(threads=1) as rt:
            running = rt.submit(release.wait)
            eventually(lambda: running.state == "running")
            queued.append(rt.submit(len, "a"))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        block()

    assert queued[0].state == "cancelled"
    release.set()


def test_a_forgotten_runtime_ends_its_threads() -> None:
    rt = Runtime(threads=2)
    handle = rt.submit(time.sleep, 0.02)
    del rt
    gc.collect()
    eventually(handle.done)
    handle.get()


def test_keyword_arguments_reach_the_function(rt: Runtime) -> None:
    """Also keyword arguments named like the parameters of submit."""
    assert rt.submit(dict, a=1, fn=2, self=3).get() == {"a": 1, "fn": 2, "self": 3}


async def nothing() -> None: ...


@pytest.mark.parametrize("fn", [int, nothing])
def test_a_task_without_a_thread_raises(fn: Any) -> None:
    """The system gives no thread with such a stack; wait_all does not wait for tasks that cannot run."""
    rt = Runtime(threads=1)
    before = threading.stack_size(1 << 46)
    try:
        with pytest.raises(TaskError, match="no thread can be started"):
            rt.submit(fn)
    finally:
        threading.stack_size(before)

    rt.wait_all(timeout=60)
    assert rt.get_progress()["cancelled"] == 1
    assert rt.submit(len, "a").get(timeout=60) == 1
    rt.submit(nothing).get(timeout=60)
    rt.shutdown()


@pytest.mark.parametrize("fn", [int, nothing])
def test_ctrl_c_while_a_task_is_submitted_leaves_none_to_wait_for(fn: Any) -> None:
    """A signal's handler may run between any two calls; here behind the one that counts the task."""
    rt = Runtime(threads=1)
    count = rt._engine.count_submission

    def interrupted() -> int:
        count()
        raise KeyboardInterrupt

    rt._engine.count_submission = interrupted
    with pytest.raises(KeyboardInterrupt):
        rt.submit(fn)

    rt._engine.count_submission = count
    assert rt.submit(len, "a").get(timeout=60) == 1
    progress = rt.get_progress()
    rt.shutdown(wait=False, cancel=True)
    assert (progress["queued"], progress["cancelled"]) == (0, 1)


def test_handles_come_from_runtimes_only() -> None:
    with pytest.raises(TypeError, match=r"Runtime\.submit"):
        traceml.TaskHandle()


def test_the_default_runtime_is_made_once() -> None:
    rt = get_default_runtime()
    try:
        assert get_default_runtime() is rt
        rt.shutdown()
        fresh = get_default_runtime()
        assert fresh is not rt  # one that is shut down is of no use
        fresh.shutdown()
    finally:
        set_default_runtime(None)


def test_the_default_runtime_can_be_set(rt: Runtime) -> None:
    assert set_default_runtime(rt) is None
    assert get_default_runtime() is rt
    assert set_default_runtime(None) is rt
    with pytest.raises(TypeError, match="takes a Runtime or None, not int"):
        set_default_runtime(3)  # type: ignore[arg-type]
