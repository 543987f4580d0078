"""Dependencies of tasks over all Runtimes of the process: which task waits for which, directly or through others."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from traceml.tasks.task_record import TaskEngine, TaskRecord
from traceml.tasks.task_statistics import QUEUED

__all__ = ["blocked_set", "depends_on", "forget_dependencies", "queued_dependencies", "waiting_for", "waiting_tasks"]

# The targets of each waiting task, in order: other tasks, or all tasks of an engine.
_targets: dict[TaskRecord, list[TaskRecord | TaskEngine]] = {}


@contextmanager
def waiting_for(task: TaskRecord | None, target: TaskRecord | TaskEngine) -> Iterator[None]:
    """Record that a task waits for a target; code outside of tasks blocks no task."""
    if task is None:
        yield
        return

    _targets.setdefault(task, []).append(target)
    try:
        yield
    finally:
        targets = _targets.get(task, [])
        if target in targets:  # not in the child of a fork
            targets.remove(target)

        if not targets:
            _targets.pop(task, None)


def waiting_tasks() -> list[TaskRecord]:
    """Return the tasks that wait for others."""
    return list(_targets)


def blocked_set(task: TaskRecord | None) -> set[TaskRecord]:
    """Return a task and all that cannot end before it: those that wait for it, for its engine, or for one of these."""
    if task is None:
        return set()

    known: set[Any] = {task, task.engine}
    pairs = [(waiter, tuple(targets)) for waiter, targets in list(_targets.items())]
    while (
        more := ({waiter for waiter, targets in pairs if not known.isdisjoint(targets)} | _coroutines_blocked_by(known))
        - known
    ):
        known |= more | {waiter.engine for waiter in more}

    return {one for one in known if isinstance(one, TaskRecord)}


def _coroutines_blocked_by(known: set[Any]) -> set[TaskRecord]:
    """Return the coroutines whose loop is blocked by one of these tasks."""
    loops = [one.engine.loop for one in known if isinstance(one, TaskRecord)]
    return {task for loop in loops if loop.blocker in known for task in list(loop.tasks)}


def depends_on(task: TaskRecord, other: TaskRecord) -> bool:
    """Whether a task waits for another, directly or through others."""
    return any(one is other for one in _dependencies(task))


def queued_dependencies(task: TaskRecord) -> Iterator[TaskRecord]:
    """Yield the queued tasks that a task waits for, directly or through others."""
    return (one for one in _dependencies(task, through_all=True) if one.state is QUEUED and one.entry)


def _dependencies(task: TaskRecord, *, through_all: bool = False) -> Iterator[TaskRecord]:
    """Yield a task and those that it waits for; `through_all`: also those of the engines that it waits for."""
    seen: set[Any] = set()
    pending: list[Any] = [task]
    while pending:
        one = pending.pop()
        if one in seen:
            continue

        seen.add(one)
        if isinstance(one, TaskRecord):
            yield one
            pending += _targets.get(one, ())
            loop = one.engine.loop
            if loop.blocker is not None and one in loop.tasks:
                pending.append(loop.blocker)
        elif through_all:
            pending += [waiter for waiter in list(_targets) if waiter.engine is one]
            pending += one.next_queued()


def forget_dependencies(keep: set[TaskRecord]) -> None:
    """Forget the waits of all other tasks: the threads of a parent process do not exist in its child."""
    for task in _targets.keys() - keep:
        del _targets[task]
