"""Workers of pools and of Ray, which may be ended while they wait for a task."""

from __future__ import annotations

import multiprocessing.pool
import sys
from queue import SimpleQueue
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from traceml.session import task_workers
from traceml.session.task_workers import watch_pool_worker, watch_ray_worker


@pytest.fixture
def idle(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """What is recorded."""
    found: list[bool] = []
    monkeypatch.setattr(task_workers, "note_idle", lambda *, idle: found.append(idle))
    return found


class Queue:
    """A queue as pools use: with attributes of its own."""

    def __init__(self) -> None:
        self._items: SimpleQueue[Any] = SimpleQueue()
        self.get, self.put = self._items.get, self._items.put


def test_a_worker_of_a_pool_waits_from_its_result_until_the_next_task(idle: list[bool]) -> None:
    """The pool may end it as soon as it has the result. The last task is None."""
    tasks, results = Queue(), Queue()
    tasks.put("task")
    tasks.put(None)
    watch_pool_worker(multiprocessing.pool.worker, (tasks, results))  # type: ignore[attr-defined]

    assert tasks.get() == "task"
    assert idle == [True, False]
    results.put("result")
    assert tasks.get() is None
    assert idle[2:] == [True, True, True]


def test_another_process_is_left_alone(idle: list[bool]) -> None:
    """Its queues are the script's own."""
    tasks = Queue()
    tasks.put("task")
    watch_pool_worker(test_another_process_is_left_alone, (tasks, Queue()))

    assert (tasks.get(), idle) == ("task", [])


@pytest.mark.parametrize(("mode", "is_actor", "titles", "told"), [
    (1, False, ["ray::IDLE", "ray::work", "ray::IDLE"], [True, False, True]),
    (1, True, ["ray::Trainer", "ray::Trainer.fit", "ray::Trainer"], [True, False, True]),
    (0, False, ["ray::IDLE"], []),
])  # fmt: skip
def test_ray_names_a_worker_that_waits(
    mode: int,
    is_actor: bool,
    titles: list[str],
    told: list[bool],
    idle: list[bool],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A driver is no worker."""
    named: list[str] = []
    ray, library = ModuleType("ray._private.worker"), ModuleType("ray._raylet")
    worker = SimpleNamespace(mode=mode, actor_id=SimpleNamespace(is_nil=lambda: not is_actor))
    vars(ray).update(WORKER_MODE=1, global_worker=worker)
    vars(library).update(setproctitle=named.append)
    monkeypatch.setitem(sys.modules, "ray._private.worker", ray)
    monkeypatch.setitem(sys.modules, "ray._raylet", library)

    watch_ray_worker()
    watch_ray_worker()
    for title in titles:
        vars(library)["setproctitle"](title)

    assert (named, idle) == (titles, told)
