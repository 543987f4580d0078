"""Progress is consistent at every moment."""

from __future__ import annotations

import asyncio
import io
import json
import random
import threading
import time
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from rich.console import Console

from tests.eventually import eventually
from traceml import Runtime, TaskError, UsageError
from traceml.tasks.progress import progress, showing, view

STATES = ("completed", "failed", "cancelled", "timed_out", "running", "queued")


def test_the_keys_are_those_of_the_document(rt: Runtime) -> None:
    rt.submit(len, "a", name="iter_lines").wait()
    rt.submit(len, 1, name="bad")
    rt.wait_all()
    found = rt.get_progress()

    assert {"total", "completed", "running", "queued", "failed", "workers", "tasks", "errors"} <= set(found)
    assert {"id", "idle", "task", "queue_depth"} <= set(found["workers"][0])
    assert {"name", "state", "execution_duration_ms", "queued_duration_ms", "progress_pct"} <= set(found["tasks"][0])
    assert [(one["name"], one["state"], one["progress_pct"]) for one in found["tasks"]] == [
        ("iter_lines", "completed", 100.0),
        ("bad", "failed", 0.0),
    ]
    assert found["errors"] == [{"task": "bad", "error": "TypeError: object of type 'int' has no len()"}]
    assert json.loads(json.dumps(found)) == found


def test_workers_tell_what_they_do(single: Runtime) -> None:
    release = threading.Event()

    def outer() -> None:
        single.submit(release.wait, name="inner").get()

    single.submit(outer)
    eventually(lambda: single.get_progress()["workers"][0]["task"] == "inner")
    (compute,), (io,) = single.get_progress()["workers"], single.get_progress()["io_workers"]
    assert compute == {"id": 0, "idle": False, "task": "inner", "queue_depth": 1, "pool": "compute"}
    assert io == {"id": 1, "idle": True, "task": "", "queue_depth": 0, "pool": "io"}
    assert single.get_progress()["running"] == 2
    release.set()
    single.wait_all()
    eventually(lambda: all(worker["idle"] for worker in single.get_progress()["workers"]))


def test_tasks_report_how_far_they_are(rt: Runtime) -> None:
    reported, release = threading.Barrier(3), threading.Event()

    def work() -> None:
        rt.progress(25)
        reported.wait(60)
        release.wait(60)

    async def work_async() -> None:
        progress(50)
        await asyncio.to_thread(reported.wait, 60)

    rt.submit(work)
    rt.submit(work_async).done()
    reported.wait(60)
    found = {one["name"]: one["progress_pct"] for one in rt.get_progress()["tasks"]}
    assert found["work"] == 25.0
    release.set()
    rt.wait_all()
    assert {one["progress_pct"] for one in rt.get_progress()["tasks"]} == {100.0}


@pytest.mark.parametrize("pct", [-1, 100.5, float("nan"), "5", None])
def test_progress_is_between_0_and_100(rt: Runtime, pct: Any) -> None:
    with pytest.raises(UsageError, match="from 0 to 100"):
        rt.submit(rt.progress, pct).get()


def test_only_tasks_report_progress() -> None:
    with pytest.raises(TaskError, match="outside of a task"):
        progress(5)


def test_the_last_1000_tasks_are_remembered(rt: Runtime) -> None:
    for i in range(1500):
        rt.submit(int, name=f"t{i}")

    rt.wait_all()
    found = rt.get_progress()
    assert found["completed"] == 1500
    assert (
        sorted(one["name"] for one in found["tasks"]) == sorted(f"t{i}" for i in range(500, 1500))
        or len({one["name"] for one in found["tasks"]}) == 1000
    )  # two workers end their tasks in nearly the order of submission
    assert rt.get_progress(tasks=False)["tasks"] == []


def _consistent(found: dict[str, Any]) -> None:
    assert all(found[state] >= 0 for state in STATES), found
    assert found["total"] == sum(found[state] for state in STATES), found


@pytest.mark.long
def test_counts_hold_at_every_moment() -> None:
    """Under load the states add up to the total, ended counts never fall, and no worker is listed twice."""
    rt = Runtime(threads=2, io_threads=1)
    stop, wrong = threading.Event(), []
    count = 4000

    def nested() -> None:
        rt.submit(int).get()

    async def coroutine() -> None:
        await rt.submit(int)

    def submit(seed: int) -> None:
        choose = random.Random(seed).choice
        for _ in range(count):
            kind = choose([int, int, int, nested, lambda: 1 / 0, "cancel", "get", "io", coroutine])
            if kind == "cancel":
                rt.submit(int).cancel()
            elif kind == "get":
                rt.submit(int).get()
            elif kind == "io":
                rt.submit(int, io=True, timeout=60)
            else:
                rt.submit(kind)

    def watch() -> None:
        before = dict.fromkeys((*STATES, "total"), 0)
        while not stop.is_set():
            found = rt.get_progress(tasks=False)
            try:
                _consistent(found)
                for state in ("total", "completed", "failed", "cancelled"):
                    assert found[state] >= before[state], (state, before, found)
            except AssertionError as error:
                wrong.append(error)
                return

            before = found

    watcher = threading.Thread(target=watch)
    watcher.start()
    submitters = [threading.Thread(target=submit, args=(seed,)) for seed in range(3)]
    for one in submitters:
        one.start()

    for one in submitters:
        one.join()

    rt.wait_all(timeout=60)
    stop.set()
    watcher.join()
    rt.shutdown()
    found = rt.get_progress()
    _consistent(found)
    assert wrong == []
    assert (found["running"], found["queued"]) == (0, 0)
    assert found["total"] >= 3 * count
    assert found["failed"] == len(rt.get_failed())


def test_running_is_never_more_than_there_are_threads(rt: Runtime) -> None:
    most = 0
    for _ in range(3000):
        rt.submit(int)
        found = rt.get_progress(tasks=False)
        most = max(most, found["running"])

    assert most <= 2


actions = st.lists(
    st.sampled_from(["run", "fail", "cancel", "get", "child", "coroutine", "slow", "drop"]), min_size=1, max_size=25
)


@settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)
@given(actions)
def test_any_mixture_adds_up(plan: list[str]) -> None:
    """After any mix of operations each task is counted once, in the state of its handle."""

    async def coroutine() -> None:
        await asyncio.sleep(0)

    with Runtime(threads=1, io_threads=1) as rt:

        def child() -> None:
            rt.submit(int).get()

        handles = []
        for action in plan:
            fn = {"fail": lambda: 1 / 0, "child": child, "coroutine": coroutine, "slow": time.sleep}.get(action, int)
            handle = rt.submit(fn, *([0.001] if action == "slow" else []))
            if action == "cancel":
                handle.cancel()
            elif action == "get":
                handle.get()

            if action != "drop":
                handles.append(handle)

        rt.wait_all()
        found = rt.get_progress()

    _consistent(found)
    assert found["total"] == len(plan) + plan.count("child")
    states = [handle.state for handle in handles]
    for state in ("failed", "cancelled"):
        assert found[state] == states.count(state)

    assert found["completed"] == states.count("completed") + plan.count("drop") + plan.count("child")
    assert len(found["tasks"]) == found["total"]


def _text(progress: dict[str, object]) -> str:
    console = Console(file=io.StringIO(), width=120)
    console.print(view(progress))
    return console.file.getvalue()  # type: ignore[attr-defined]


def test_the_view_counts_and_names_what_runs(rt: Runtime) -> None:
    release = threading.Event()

    def crunch() -> None:
        rt.progress(40)
        release.wait()

    rt.submit(len, "a")
    rt.submit(len, 1)
    rt.submit(crunch)
    eventually(lambda: (found := rt.get_progress())["running"] == 1 and found["tasks"][-1]["progress_pct"] == 40)
    eventually(lambda: (found := rt.get_progress())["failed"] == found["completed"] == 1)
    text = _text(rt.get_progress())
    release.set()

    assert "2/3, 1 running, 1 failed" in text
    assert "crunch" in text


def test_an_empty_runtime_can_be_shown(rt: Runtime) -> None:
    assert "0/0" in _text(rt.get_progress())


def test_a_terminal_is_drawn_on_until_the_block_ends(rt: Runtime) -> None:
    console = Console(file=io.StringIO(), force_terminal=True, width=100)
    with showing(rt.get_progress, console):
        rt.submit(len, "a").wait()

    assert "1/1" in console.file.getvalue()  # type: ignore[attr-defined]


def test_without_a_terminal_nothing_is_drawn(rt: Runtime, capfd: object) -> None:
    """show() still waits for all tasks."""
    handle = rt.submit(threading.Event().wait, 0.05)
    rt.show()

    assert handle.done()
    assert tuple(capfd.readouterr()) == ("", "")  # type: ignore[attr-defined]
